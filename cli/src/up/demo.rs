//! The demo pair, which is part of the binary.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// Path relative to the folder of the pair, and content.
type File = (&'static str, &'static [u8]);

/// Files of both models. Paths are relative to the `demo` folder of the repository.
macro_rules! files {
    ($($path:literal),* $(,)?) => {
        &[$(($path, include_bytes!(concat!("../../../demo/", $path)))),*]
    };
}

const FILES: &[File] = files![
    "full/chat_template.jinja",
    "full/config.json",
    "full/generation_config.json",
    "full/model.safetensors",
    "full/overfill.json",
    "full/special_tokens_map.json",
    "full/tokenizer.json",
    "full/tokenizer_config.json",
    "decode/chat_template.jinja",
    "decode/config.json",
    "decode/generation_config.json",
    "decode/model.safetensors",
    "decode/overfill.json",
    "decode/special_tokens_map.json",
    "decode/tokenizer.json",
    "decode/tokenizer_config.json",
];

/// Unpacks the pair to the cache folder, unless this version is there already. Returns both folders.
pub fn unpack() -> Result<(PathBuf, PathBuf)> {
    let folder = cache_folder().join(format!("demo-{}", digest(FILES)));
    if !folder.is_dir() {
        place(FILES, &folder).with_context(|| format!("unpacking the demo pair to {}", folder.display()))?;
    }
    Ok((folder.join("full"), folder.join("decode")))
}

fn cache_folder() -> PathBuf {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    cache.unwrap_or_else(std::env::temp_dir).join("overfill")
}

fn digest(files: &[File]) -> String {
    let mut hash = Sha256::new();
    for (name, content) in files {
        hash.update(name.as_bytes());
        hash.update(content.len().to_le_bytes());
        hash.update(content);
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Writes the folder atomically, even if two processes unpack at the same time.
fn place(files: &[File], folder: &Path) -> Result<()> {
    let parent = folder.parent().context("no parent folder")?;
    fs::create_dir_all(parent)?;
    let draft = parent.join(format!("draft-{}", std::process::id()));
    for (name, content) in files {
        let path = draft.join(name);
        fs::create_dir_all(path.parent().unwrap_or(&draft))?;
        fs::write(&path, content)?;
    }
    let renamed = fs::rename(&draft, folder);
    if renamed.is_err() {
        fs::remove_dir_all(&draft)?;
    }
    if folder.is_dir() { Ok(()) } else { renamed.map_err(Into::into) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpacking_twice_leaves_one_whole_copy() {
        let base = std::env::temp_dir().join(format!("overfill-demo-test-{}", std::process::id()));
        let folder = base.join("demo");
        let files: &[File] = &[("full/a", b"1"), ("decode/b", b"2")];
        place(files, &folder).unwrap();
        place(files, &folder).unwrap();
        assert_eq!(fs::read(folder.join("decode/b")).unwrap(), b"2");
        assert_eq!(fs::read_dir(&base).unwrap().count(), 1, "no draft is left");
        fs::remove_dir_all(&base).unwrap();
    }
}
