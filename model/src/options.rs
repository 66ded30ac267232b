//! How a model is loaded: source, device and element types.

use std::{fmt, str::FromStr};

use candle_core::{DType, Device};
use overfill_kv::KvDtype;

use crate::{ModelError, error::plain};

pub use crate::cpu::kernels::packed::Rows;

/// Element type of a model's tensors when training, pruning and writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightDtype {
    /// 4 bytes; exact for every stored type.
    F32,
    /// 2 bytes.
    Bf16,
    /// 2 bytes.
    F16,
}

impl WeightDtype {
    /// candle's type.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

impl fmt::Display for WeightDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

impl FromStr for WeightDtype {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            other => Err(format!("dtype must be f32, bf16 or f16, got {other:?}")),
        }
    }
}

/// How a node stores the weights that it serves in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFormat {
    /// 4 bytes; exact for every stored type.
    F32,
    /// 2 bytes.
    Bf16,
    /// 2 bytes.
    F16,
    /// 8 bits, with one scale per 32 weights of an output, as in GGUF's Q8_0.
    Int8,
    /// 8 bits, with one scale per output.
    Int8Channel,
    /// 4 bits, with one scale per 32 weights of an output, as in GGUF's Q4_0. The head uses `int8`.
    Int4,
    /// 8-bit floats (e4m3), with one scale per 32 weights of an output. On GPUs only.
    Fp8,
}

impl WeightFormat {
    const NAMES: [(Self, &str); 7] = [
        (Self::F32, "f32"),
        (Self::Bf16, "bf16"),
        (Self::F16, "f16"),
        (Self::Int8, "int8"),
        (Self::Int8Channel, "int8-channel"),
        (Self::Int4, "int4"),
        (Self::Fp8, "fp8"),
    ];

    /// The names of all formats, for messages.
    pub const SUPPORTED: &str = "f32, bf16, f16, int8, int8-channel, int4 or fp8";
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::NAMES.iter().find(|(format, _)| format == self).map_or("", |(_, name)| name))
    }
}

impl FromStr for WeightFormat {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let found = Self::NAMES.iter().find(|(_, name)| *name == s).map(|(format, _)| *format);
        found.ok_or_else(|| format!("weights must be {}, got {s:?}", Self::SUPPORTED))
    }
}

/// The device that a model runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceSpec {
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU, by index.
    Cuda(usize),
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

impl FromStr for DeviceSpec {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match (s, s.strip_prefix("cuda:").map(str::parse)) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(Ok(n))) => Ok(Self::Cuda(n)),
            _ => Err(format!("device must be cpu or cuda:N, got {s:?}")),
        }
    }
}

impl DeviceSpec {
    /// Opens the device for training and pruning. The error says what is missing.
    pub fn open(self) -> Result<Device, ModelError> {
        let fault = |reason: String| ModelError::Device { device: self.to_string(), reason };
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(_) if !cfg!(feature = "train-cuda") => Err(fault(
                "this binary can't train on GPUs; build it with `--features train-cuda`, or use --device cpu".into(),
            )),
            // candle panics, rather than returning an error, if the driver's library is not installed.
            Self::Cuda(n) => match std::panic::catch_unwind(|| Device::new_cuda(n)) {
                Ok(device) => device.map_err(|e| fault(plain(e).to_string())),
                Err(_) => Err(fault("the CUDA driver library (libcuda) could not be loaded".into())),
            },
        }
    }
}

/// How a model is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Device to run on.
    pub device: DeviceSpec,
    /// Format of the weights in memory.
    pub weights: WeightFormat,
    /// Element type of the KV, in memory and on the wire.
    pub kv_dtype: KvDtype,
    /// Number of rows per matrix product to optimise for.
    pub rows: Rows,
    /// Largest batch in tokens. GPU engines allocate memory for it, and refuse larger ones.
    pub max_rows: usize,
    /// Most sequences of one token each in a batch. As `max_rows`.
    pub max_sequences: usize,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            device: DeviceSpec::Cpu,
            weights: WeightFormat::F32,
            kv_dtype: KvDtype::F32,
            rows: Rows::Few,
            max_rows: 2048,
            max_sequences: 64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_parse() {
        assert_eq!("cuda:3".parse(), Ok(DeviceSpec::Cuda(3)));
        assert_eq!("cpu".parse(), Ok(DeviceSpec::Cpu));
        assert!("cuda:x".parse::<DeviceSpec>().is_err());
        assert!("gpu".parse::<DeviceSpec>().is_err());
    }

    #[cfg(not(feature = "train-cuda"))]
    #[test]
    fn a_gpu_without_support_is_a_clear_error() {
        assert!(DeviceSpec::Cuda(0).open().unwrap_err().to_string().contains("--features train-cuda"));
    }
}
