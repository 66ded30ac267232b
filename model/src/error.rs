//! Errors of this crate. Each message is one line that names the file, the field, its value and the supported values.

use std::path::{Path, PathBuf};

/// Any failure of this crate.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file cannot be read.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// A file's content does not match its format.
    #[error("{}: {reason}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A field's value is not supported.
    #[error("{}: {field} is {value}, supported: {supported}", file.display())]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// The field's name.
        field: String,
        /// Its value.
        value: String,
        /// Supported values.
        supported: String,
    },
    /// The configuration requires a tensor that the files do not have.
    #[error("{}: tensor {name} is missing (expected shape {expected:?})", file.display())]
    MissingTensor {
        /// The folder, or the index file.
        file: PathBuf,
        /// Name of the tensor.
        name: String,
        /// Shape required by the configuration.
        expected: Vec<usize>,
    },
    /// A tensor's shape does not match the configuration.
    #[error("{}: tensor {name} has shape {found:?}, the configuration asks for {expected:?}", file.display())]
    WrongShape {
        /// The file that holds the tensor.
        file: PathBuf,
        /// Name of the tensor.
        name: String,
        /// Shape required by the configuration.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A device is not available.
    #[error("device {device}: {reason}")]
    Device {
        /// The requested device.
        device: String,
        /// The cause.
        reason: String,
    },
    /// A device that served has failed and does not recover. The process must end.
    #[error("device {device} is lost: {reason}")]
    DeviceLost {
        /// The device.
        device: String,
        /// The cause.
        reason: String,
    },
    /// A model can't be found locally or downloaded from the hub.
    #[error("model {id}: {reason}")]
    Hub {
        /// The requested model.
        id: String,
        /// The cause.
        reason: String,
    },
    /// The text files (tokenizer, chat template) cannot be read.
    #[error(transparent)]
    Text(#[from] overfill_text::TextError),
    /// An engine returned no token for a slice of a batch.
    #[error("the engine returned no token for slice {slice} of the batch")]
    NoToken {
        /// Index of the slice.
        slice: usize,
    },
    /// A computation failed.
    #[error("computation failed: {0}")]
    Compute(candle_core::Error),
}

impl From<candle_core::Error> for ModelError {
    fn from(error: candle_core::Error) -> Self {
        Self::Compute(plain(error))
    }
}

impl From<std::io::Error> for ModelError {
    /// The only operation that fails without a file name is allocating memory for weights and KV.
    fn from(error: std::io::Error) -> Self {
        Self::Io { file: "memory for weights or KV".into(), source: error }
    }
}

/// Strips the backtraces that candle attaches, so that an error is one line.
pub(crate) fn plain(error: candle_core::Error) -> candle_core::Error {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => plain(*inner),
        candle_core::Error::Context { inner, .. } => plain(*inner),
        other => other,
    }
}

impl ModelError {
    /// Whether the device that served has failed. It computes nothing any more; only a new process can open it again.
    pub fn is_lost_device(&self) -> bool {
        matches!(self, Self::DeviceLost { .. })
    }

    /// A GPU was asked for.
    #[cfg(not(feature = "cuda"))]
    pub(crate) fn no_gpu_support(index: usize) -> Self {
        let reason = "this binary was built without GPU support; build it with `--features cuda`, or use --device cpu";
        Self::Device { device: crate::DeviceSpec::Cuda(index).to_string(), reason: reason.into() }
    }

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
