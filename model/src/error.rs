//! Why a model can't be served: one line that names file, field and both values.

use std::path::{Path, PathBuf};

/// Any failure of this crate.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file that can't be read.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file that is not what its name says.
    #[error("{}: {reason}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A setting that this software can't serve.
    #[error("{}: {field} is {value}, supported: {supported}", file.display())]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// Name of the field in it.
        field: String,
        /// Its value.
        value: String,
        /// What it may be.
        supported: String,
    },
    /// A tensor that the configuration needs and the weights lack.
    #[error("{}: tensor {name} is missing (expected shape {expected:?})", file.display())]
    MissingTensor {
        /// The folder, or the index file.
        file: PathBuf,
        /// Name of the tensor.
        name: String,
        /// Shape that the configuration asks for.
        expected: Vec<usize>,
    },
    /// A tensor of another shape than the configuration says.
    #[error("{}: tensor {name} has shape {found:?}, the configuration asks for {expected:?}", file.display())]
    WrongShape {
        /// The file that holds the tensor.
        file: PathBuf,
        /// Name of the tensor.
        name: String,
        /// Shape that the configuration asks for.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A device that is not there.
    #[error("device {device}: {reason}")]
    Device {
        /// As asked for.
        device: String,
        /// Why not.
        reason: String,
    },
    /// A model named by hub id that could not be had.
    #[error("model {id}: {reason}")]
    Hub {
        /// The id.
        id: String,
        /// Why not.
        reason: String,
    },
    /// Text files that can't be read.
    #[error(transparent)]
    Text(#[from] overfill_text::TextError),
    /// A fault in the computation.
    #[error("computing: {0}")]
    Compute(candle_core::Error),
}

impl From<candle_core::Error> for ModelError {
    fn from(error: candle_core::Error) -> Self {
        Self::Compute(plain(error))
    }
}

impl From<std::io::Error> for ModelError {
    /// Only memory for weights is asked of the system without a file to name.
    fn from(error: std::io::Error) -> Self {
        Self::Io { file: "memory for weights".into(), source: error }
    }
}

/// The error without the backtraces that the tensor library prints with it: an error is one line.
pub(crate) fn plain(error: candle_core::Error) -> candle_core::Error {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => plain(*inner),
        candle_core::Error::Context { inner, .. } => plain(*inner),
        other => other,
    }
}

impl ModelError {
    pub(crate) fn io(file: &Path, source: std::io::Error) -> Self {
        Self::Io { file: file.into(), source }
    }

    pub(crate) fn malformed(file: &Path, reason: impl ToString) -> Self {
        Self::Malformed { file: file.into(), reason: reason.to_string() }
    }

    pub(crate) fn unsupported(file: &Path, field: &str, value: impl ToString, supported: &str) -> Self {
        Self::Unsupported {
            file: file.into(),
            field: field.into(),
            value: value.to_string(),
            supported: supported.into(),
        }
    }
}
