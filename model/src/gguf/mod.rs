//! GGUF files: one file with configuration, tokenizer and weights, written by llama.cpp's tools. This module presents
//! its content as a Hugging Face folder: config.json, the text files, and tensors under Hugging Face names.

mod config;
mod header;
mod text;
mod tokenizer;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use header::{Header, Metadata};
use memmap2::Mmap;
use overfill_text::TextFiles;

use crate::{Family, ModelConfig, ModelError, weights::TensorLocation};

/// An open file, memory-mapped.
pub(crate) struct Gguf {
    file: PathBuf,
    map: Mmap,
    header: Header,
    family: &'static Family,
    /// Maps Hugging Face names to indices into the header's tensors.
    by_name: HashMap<String, usize>,
    /// Width of a head if the rows of q and k are interleaved.
    interleaved: Option<usize>,
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"))
}

impl Gguf {
    /// The .gguf file that `path` refers to: itself, or the only one in a folder without safetensors. `None` if `path`
    /// is a Hugging Face folder.
    pub(crate) fn find(path: &Path) -> Result<Option<PathBuf>, ModelError> {
        if path.is_file() {
            return Ok(is_gguf(path).then(|| path.into()));
        }
        // If the folder cannot be listed, reading its files will report the error.
        let Ok(entries) = fs::read_dir(path) else { return Ok(None) };
        let files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        if files.iter().any(|file| file.extension().is_some_and(|end| end == "safetensors")) {
            return Ok(None);
        }
        let mut found: Vec<PathBuf> = files.into_iter().filter(|file| is_gguf(file)).collect();
        found.sort();
        match found.as_slice() {
            [] => Ok(None),
            [_] => Ok(found.pop()),
            [first, second, ..] => {
                let name = |file: &Path| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let (count, names) = (found.len(), format!("{}, {} ...", name(first), name(second)));
                Err(ModelError::malformed(path, format!("holds {count} .gguf files ({names}): specify one of them")))
            }
        }
    }

    /// Maps a file and reads its header.
    pub(crate) fn open(file: &Path) -> Result<Self, ModelError> {
        let map = map_file(file)?;
        let header = Header::read(file, &map)?;
        let metadata = Metadata { file, bytes: &map, values: &header.metadata };
        if metadata.index("split.count")?.is_some_and(|count| count > 1) {
            return Err(metadata.bad("split.count", "1: join the parts with llama-gguf-split --merge"));
        }
        let (family, interleaved) = config::family(&metadata)?;
        let mut by_name = HashMap::new();
        for (index, entry) in header.tensors.iter().enumerate() {
            if let Some(head_dim) = interleaved.filter(|_| family.is_rotated_in_gguf(&entry.name))
                && !entry.shape[0].is_multiple_of(head_dim)
            {
                let (name, shape) = (&entry.name, &entry.shape);
                let fault = format!("tensor {name} of shape {shape:?} is not whole heads of {head_dim} rows");
                return Err(ModelError::malformed(file, fault));
            }
            if by_name.insert(family.name_of_gguf(&entry.name), index).is_some() {
                return Err(ModelError::malformed(file, format!("tensor {} occurs twice", entry.name)));
            }
        }
        Ok(Self { file: file.into(), map, header, family, by_name, interleaved })
    }

    fn metadata(&self) -> Metadata<'_> {
        Metadata { file: &self.file, bytes: &self.map, values: &self.header.metadata }
    }

    /// Finds a tensor by its Hugging Face name.
    pub(crate) fn place(&self, name: &str) -> Option<TensorLocation<'_>> {
        let entry = &self.header.tensors[*self.by_name.get(name)?];
        Some(TensorLocation {
            file: &self.file,
            name: &entry.name,
            shape: entry.shape.clone(),
            stored: entry.stored,
            data: &self.map[entry.bytes.clone()],
            // llama.cpp's converter adds the 1 that the norms of these families add to their weights.
            offset: if self.family.norms_around_zero && self.family.is_norm_in_gguf(&entry.name) { -1.0 } else { 0.0 },
            interleaved: self.interleaved.filter(|_| self.family.is_rotated_in_gguf(&entry.name)),
        })
    }

    /// The error to return if [`Gguf::place`] finds no tensor.
    pub(crate) fn missing(&self, name: &str, shape: &[usize]) -> ModelError {
        let name = self.family.name_in_gguf(name);
        ModelError::MissingTensor { file: self.file.clone(), name, expected: shape.to_vec() }
    }

    /// Hugging Face names of the tensors.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// The model's configuration.
    pub(crate) fn config(&self) -> Result<ModelConfig, ModelError> {
        config::read(self)
    }
}

/// A model's text files: from its folder, or those next to a .gguf file, with missing ones built from the file's
/// metadata.
pub fn text_files(path: &Path) -> Result<TextFiles, ModelError> {
    match Gguf::find(path)? {
        Some(file) => text::files(&Gguf::open(&file)?),
        None => Ok(TextFiles::from_folder(path)?),
    }
}

/// The folder of a model's files: `path` itself, or the folder that contains a .gguf file.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if path.is_file() => parent,
        _ => path,
    }
}

#[allow(unsafe_code)]
fn map_file(path: &Path) -> Result<Mmap, ModelError> {
    let file = fs::File::open(path).map_err(|e| ModelError::io(path, e))?;
    // SAFETY: the mapping is read-only. If another process truncates the file, reading can fault (SIGBUS). This risk is
    // inherent to mapping weights.
    unsafe { Mmap::map(&file) }.map_err(|e| ModelError::io(path, e))
}
