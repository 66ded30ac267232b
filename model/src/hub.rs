//! Models on the Hugging Face hub: finding them in the cache, and downloading them.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use hf_hub::{
    Repo, RepoType,
    api::sync::{ApiBuilder, ApiError, ApiRepo},
};

use crate::{ModelError, gguf::Gguf};

/// File that [`pull`] writes last: its folder is complete. It contains the id of the model.
pub const COMPLETE: &str = ".overfill-complete";
/// Folder of unfinished downloads in the folder of a model.
const DOWNLOADS: &str = ".overfill-downloads";
/// Interval at which a folder is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Resolves `model` to a folder or .gguf file. An existing path is returned as it is. Otherwise `model` is a hub id
/// (`owner/name` or `owner/name@revision`), and its files are taken from the Hugging Face cache or downloaded into it.
pub fn resolve(model: &str) -> Result<PathBuf, ModelError> {
    let path = PathBuf::from(model);
    if path.is_dir() || Gguf::find(&path)?.is_some() {
        return Ok(path);
    }
    if path.is_file() {
        return Err(fault(model, "neither a folder nor a .gguf file"));
    }
    let repo = open(model, ApiBuilder::from_env())?;
    let (_, config) = download(model, &repo)?.swap_remove(0);
    let folder = config.parent().map(PathBuf::from);
    folder.ok_or_else(|| fault(model, "the Hugging Face cache path has no parent folder"))
}

/// Downloads a model from the hub into `folder`, unless it is complete there. Unfinished downloads are continued.
///
/// # Errors
/// `folder` has another model, or a file can't be downloaded or written.
pub fn pull(model: &str, folder: &Path) -> Result<(), ModelError> {
    if is_complete(model, folder)? {
        return Ok(());
    }
    let write = |error: io::Error| fault(model, format!("writing to {}: {error}", folder.display()));
    let downloads = folder.join(DOWNLOADS);
    fs::create_dir_all(&downloads).map_err(write)?;
    let repo = open(model, ApiBuilder::from_env().with_cache_dir(downloads.clone()))?;
    for (name, file) in download(model, &repo)? {
        let to = folder.join(name);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(write)?;
        }
        // The hub's cache has links to the contents. Moving the contents needs no second copy of the weights.
        let contents = file.canonicalize().map_err(write)?;
        fs::rename(contents, to).map_err(write)?;
    }
    fs::remove_dir_all(&downloads).map_err(write)?;
    fs::write(folder.join(COMPLETE), model).map_err(write)
}

/// Waits until another process has downloaded a model into `folder`, for at most `time`.
///
/// # Errors
/// `folder` has another model, or the model is still not complete.
pub fn wait_until_complete(model: &str, folder: &Path, time: Duration) -> Result<(), ModelError> {
    let began = Instant::now();
    while !is_complete(model, folder)? {
        if began.elapsed() >= time {
            return Err(fault(model, format!("not complete in {} after {} s", folder.display(), time.as_secs_f64())));
        }
        thread::sleep(LOOK_INTERVAL);
    }
    Ok(())
}

/// Whether `folder` has all files of the model. It is an error if it has another model.
fn is_complete(model: &str, folder: &Path) -> Result<bool, ModelError> {
    let Ok(have) = fs::read_to_string(folder.join(COMPLETE)) else { return Ok(false) };
    match have.trim() {
        have if have == model => Ok(true),
        have => Err(fault(model, format!("{} has the model {have}", folder.display()))),
    }
}

fn fault(model: &str, reason: impl Into<String>) -> ModelError {
    ModelError::Hub { id: model.into(), reason: reason.into() }
}

fn unreachable(model: &str, error: ApiError) -> ModelError {
    fault(model, format!("no such folder or .gguf file; hub download: {error}"))
}

/// Opens the repository of a model.
fn open(model: &str, builder: ApiBuilder) -> Result<ApiRepo, ModelError> {
    let looks_like_an_id = model.matches('/').count() == 1 && !model.starts_with(['/', '.', '~']);
    if !looks_like_an_id {
        return Err(fault(model, "no such folder or .gguf file, and not a hub id of the form owner/name"));
    }
    let (id, revision) = model.split_once('@').unwrap_or((model, "main"));
    let builder = match std::env::var("HF_TOKEN") {
        Ok(token) if !token.is_empty() => builder.with_token(Some(token)),
        _ => builder,
    };
    let api = builder.with_progress(true).build().map_err(|e| unreachable(model, e))?;
    Ok(api.repo(Repo::with_revision(id.into(), RepoType::Model, revision.into())))
}

/// Downloads the files that are needed to serve the model. Returns their names and paths, config.json first.
fn download(model: &str, repo: &ApiRepo) -> Result<Vec<(String, PathBuf)>, ModelError> {
    let info = repo.info().map_err(|e| unreachable(model, e))?;
    let there: Vec<&str> = info.siblings.iter().map(|sibling| sibling.rfilename.as_str()).collect();
    let others = there.iter().filter(|file| is_needed(file, &there)).copied();
    let get = |file: &str| Ok((file.to_owned(), repo.get(file).map_err(|e| unreachable(model, e))?));
    std::iter::once("config.json").chain(others).map(get).collect()
}

/// Whether serving needs a file other than config.json. `there` are all files of the repository.
fn is_needed(file: &str, there: &[&str]) -> bool {
    let ends = |ends: &[&str]| ends.iter().any(|end| file.ends_with(end));
    match file.split_once('/') {
        None => {
            let wanted = file != "config.json" && ends(&[".safetensors", ".json", ".jinja"]);
            wanted || file == "tokenizer.model" && !there.contains(&"tokenizer.json")
        }
        Some((folder, name)) => folder == "additional_chat_templates" && !name.contains('/') && ends(&[".jinja"]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        assert!(resolve("/no/such/folder").unwrap_err().to_string().starts_with("model /no/such/folder: no such"));
    }

    #[test]
    fn files_of_a_tokenizer_and_of_templates_are_needed() {
        let there =
            ["config.json", "model.safetensors", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"];
        assert!(there[1..].iter().all(|file| is_needed(file, &there)) && !is_needed(there[0], &there));
        assert!(is_needed("tokenizer.model", &there) && !is_needed("tokenizer.model", &["tokenizer.json"]));
        for file in ["pytorch_model.bin", "onnx/config.json", "additional_chat_templates/a/b.jinja", "README.md"] {
            assert!(!is_needed(file, &there), "{file}");
        }
    }

    #[test]
    fn a_complete_folder_is_not_downloaded_again_and_keeps_its_model() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(COMPLETE), "owner/name").unwrap();
        pull("owner/name", folder.path()).unwrap();
        wait_until_complete("owner/name", folder.path(), Duration::ZERO).unwrap();
        for result in [
            pull("owner/other", folder.path()),
            wait_until_complete("owner/other", folder.path(), Duration::from_secs(9)),
        ] {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("has the model owner/name"), "{error}");
        }
    }

    #[test]
    fn another_process_completes_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let wait = |time| wait_until_complete("owner/name", folder.path(), time);
        let error = wait(Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains("not complete in") && error.ends_with("after 0 s"), "{error}");
        thread::scope(|scope| {
            scope.spawn(|| fs::write(folder.path().join(COMPLETE), "owner/name").unwrap());
            wait(Duration::from_secs(60)).unwrap();
        });
    }
}
