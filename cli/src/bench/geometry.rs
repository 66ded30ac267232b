//! Models with random weights in the shapes of published models. They run as fast as trained ones.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use overfill_model::{Kind, ModelConfig, TensorSpec};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::{Value, json};

/// Shape of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Geometry {
    /// 28 million parameters.
    Small,
    /// `small`, pruned by 45 %.
    SmallOverfill,
    /// Llama-3.2-3B.
    #[value(name = "llama-3.2-3b")]
    Llama3b,
    /// `llama-3.2-3b`, pruned by 45 %.
    #[value(name = "llama-3.2-3b-overfill")]
    Llama3bOverfill,
    /// Llama-3.2-1B.
    #[value(name = "llama-3.2-1b")]
    Llama1b,
    /// Qwen2.5-0.5B.
    #[value(name = "qwen2.5-0.5b")]
    Qwen05b,
    /// SmolLM2-135M.
    #[value(name = "smollm2-135m")]
    Smollm135m,
    /// `smollm2-135m`, pruned by 45 %.
    #[value(name = "smollm2-135m-overfill")]
    Smollm135mOverfill,
}

/// Size of the write buffer. It bounds the memory needed to write a model of any size.
const BUFFER_BYTES: usize = 1 << 20;

impl Geometry {
    /// Name on the command line and in reports, and name of its folder.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    fn config(self) -> Value {
        let llama = |hidden: usize, intermediate: usize, layers: usize, heads: usize, head_dim: usize| {
            json!({
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
                "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": head_dim, "vocab_size": 128_256,
                "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
                "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
                "tie_word_embeddings": true, "eos_token_id": 128_001, "bos_token_id": 128_000,
                "torch_dtype": "bfloat16",
            })
        };
        let small = |hidden: usize, intermediate: usize| {
            json!({
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 8,
                "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192,
                "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
                "tie_word_embeddings": true, "eos_token_id": 0, "bos_token_id": 1, "torch_dtype": "bfloat16",
            })
        };
        let smollm = |hidden: usize, intermediate: usize| {
            json!({
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49_152,
                "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100_000.0,
                "tie_word_embeddings": true, "eos_token_id": 0, "bos_token_id": 0, "torch_dtype": "bfloat16",
            })
        };
        match self {
            Self::Small => small(512, 1408),
            Self::Smollm135m => smollm(576, 1536),
            Self::Smollm135mOverfill => smollm(316, 844),
            Self::SmallOverfill => small(281, 774),
            Self::Llama3b => llama(3072, 8192, 28, 24, 128),
            Self::Llama3bOverfill => llama(1689, 4505, 28, 24, 128),
            Self::Llama1b => llama(2048, 8192, 16, 32, 64),
            Self::Qwen05b => json!({
                "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
                "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936,
                "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
                "tie_word_embeddings": true, "eos_token_id": 151_643, "bos_token_id": 151_643,
                "torch_dtype": "bfloat16",
            }),
        }
    }

    /// The shape as a model configuration.
    pub fn model_config(self) -> Result<ModelConfig> {
        Ok(ModelConfig::from_json(Path::new("config.json"), self.config())?)
    }

    /// The model's folder in `models`. Writes the model unless it is there already.
    pub fn folder(self, models: &Path) -> Result<PathBuf> {
        let folder = models.join(self.name());
        let (config_file, weights) = (folder.join("config.json"), folder.join("model.safetensors"));
        let config_text = self.config().to_string();
        // The weights are renamed last, so a file with the final name is complete.
        if weights.is_file() && fs::read_to_string(&config_file).is_ok_and(|text| text == config_text) {
            tracing::info!(folder = %folder.display(), "found the random model");
            return Ok(folder);
        }
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let write =
            |file: &Path, text: String| fs::write(file, text).with_context(|| format!("writing {}", file.display()));
        write(&config_file, config_text)?;
        let config = ModelConfig::from_folder(&folder)?;
        write(&folder.join("tokenizer.json"), tokenizer(config.vocab_size).to_string())?;
        tracing::info!(folder = %folder.display(), "writing the random model");
        let unfinished = folder.join("model.safetensors.unfinished");
        write_weights(&unfinished, &config).with_context(|| format!("writing {}", unfinished.display()))?;
        fs::rename(&unfinished, &weights).with_context(|| format!("renaming to {}", weights.display()))?;
        Ok(folder)
    }
}

/// A placeholder that tokenizes no text. It must be valid, since nodes compare its hash and routers parse it.
fn tokenizer(vocabulary: usize) -> Value {
    let tokens: serde_json::Map<_, _> = (0..vocabulary).map(|id| (format!("w{id}"), json!(id))).collect();
    json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
           "model": {"type": "WordLevel", "vocab": tokens, "unk_token": "w0"}})
}

/// Writes the file piece by piece. The safetensors crate needs whole tensors in memory, and the largest has a gigabyte.
fn write_weights(path: &Path, config: &ModelConfig) -> Result<()> {
    let mut end = 0;
    let specs = config.tensors();
    let tensors: Vec<(String, TensorInfo)> = specs
        .iter()
        .map(|TensorSpec { name, shape, .. }| {
            let start = end;
            end += 2 * shape.iter().product::<usize>();
            (name.clone(), TensorInfo { dtype: Dtype::BF16, shape: shape.clone(), data_offsets: (start, end) })
        })
        .collect();
    let mut header = serde_json::to_vec(&Metadata::new(None, tensors.clone())?)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(BUFFER_BYTES, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut buffer = vec![0_u8; BUFFER_BYTES];
    for (spec, (_, info)) in specs.iter().zip(&tensors) {
        let (start, end) = info.data_offsets;
        let values = Values::of(spec);
        let mut left = end - start;
        while left > 0 {
            let part = &mut buffer[..left.min(BUFFER_BYTES)];
            values.fill(part, &mut state);
            file.write_all(part)?;
            left -= part.len();
        }
    }
    file.into_inner().context("writing the last bytes")?.sync_all()?;
    Ok(())
}

/// Content of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Values {
    Constant(f32),
    /// Uniform in [-spread, spread).
    Uniform(f32),
}

impl Values {
    /// Chooses the content so that activations stay near 1.
    fn of(tensor: &TensorSpec) -> Self {
        match (tensor.kind, tensor.shape.as_slice()) {
            (Kind::Bias, _) => Self::Constant(0.0),
            (Kind::Weight, [_, inputs]) => Self::Uniform((3.0 / *inputs as f32).sqrt()),
            (Kind::Weight, _) => Self::Constant(1.0),
        }
    }

    /// Writes bf16 values: the upper half of an f32, rounded towards zero. Each 64-bit random number (xorshift64) gives
    /// four values.
    fn fill(self, bytes: &mut [u8], state: &mut u64) {
        for eight in bytes.chunks_mut(8) {
            *state ^= *state << 13;
            *state ^= *state >> 7;
            *state ^= *state << 17;
            for (i, two) in eight.chunks_mut(2).enumerate() {
                let value = match self {
                    Self::Constant(value) => value,
                    Self::Uniform(spread) => f32::from((*state >> (16 * i)) as u16 as i16) / 32_768.0 * spread,
                };
                two.copy_from_slice(&value.to_le_bytes()[2..]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use overfill_model::{LoadOptions, Model};

    use super::*;

    #[test]
    fn every_geometry_is_one_that_the_model_code_reads() {
        for geometry in Geometry::value_variants() {
            let config = ModelConfig::from_json(Path::new("config.json"), geometry.config()).unwrap();
            assert!(config.tie_word_embeddings, "{geometry:?}");
        }
        let parameters = |geometry: Geometry| -> usize {
            let config = ModelConfig::from_json(Path::new("config.json"), geometry.config()).unwrap();
            config.tensor_shapes().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
        };
        // From their model cards.
        assert_eq!(parameters(Geometry::Llama3b), 3_212_749_824);
        assert_eq!(parameters(Geometry::Llama1b), 1_235_814_400);
        assert_eq!(parameters(Geometry::Qwen05b), 494_032_768);
        assert_eq!(parameters(Geometry::Smollm135m), 134_515_008);
    }

    #[test]
    fn pruned_geometries_are_cut_as_pruning_cuts_them() {
        for (full, cut) in [
            (Geometry::Small, Geometry::SmallOverfill),
            (Geometry::Llama3b, Geometry::Llama3bOverfill),
            (Geometry::Smollm135m, Geometry::Smollm135mOverfill),
        ] {
            let (mut full, cut) = (full.config(), cut.config());
            for width in ["hidden_size", "intermediate_size"] {
                full[width] = json!((full[width].as_f64().unwrap() * (1.0 - 0.45)) as usize);
            }
            assert_eq!(full, cut);
        }
    }

    #[test]
    fn a_written_model_loads_and_is_found_again() {
        let models = tempfile::tempdir().unwrap();
        let folder = Geometry::SmallOverfill.folder(models.path()).unwrap();
        let model = Model::load(&folder, &LoadOptions::default(), 1).unwrap();
        assert_eq!(model.config().hidden_size, 281);
        let weights = folder.join("model.safetensors");
        let written = fs::metadata(&weights).unwrap().modified().unwrap();
        assert_eq!(Geometry::SmallOverfill.folder(models.path()).unwrap(), folder);
        assert_eq!(fs::metadata(&weights).unwrap().modified().unwrap(), written);
        // Another geometry under its name is not taken for it.
        fs::write(folder.join("config.json"), Geometry::Small.config().to_string()).unwrap();
        Geometry::SmallOverfill.folder(models.path()).unwrap();
        assert_ne!(fs::metadata(&weights).unwrap().modified().unwrap(), written);
    }

    #[test]
    fn random_values_fill_their_range() {
        let mut bytes = vec![0; 40_002];
        Values::Uniform(0.5).fill(&mut bytes, &mut 1);
        let values: Vec<f32> = bytes.chunks(2).map(|two| f32::from_le_bytes([0, 0, two[0], two[1]])).collect();
        assert!(values.iter().all(|value| (-0.5..0.5).contains(value)));
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let spread = values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32;
        assert!(mean.abs() < 0.01 && (spread - 0.25 / 3.0).abs() < 0.005, "{mean} {spread}");
    }
}
