//! Rotary embeddings: base, scaling and the resulting frequencies.

use std::fmt;

/// How rotary frequencies are scaled for contexts longer than the model was first trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.x: frequencies of long waves are divided by `factor`, those of short waves are kept, those between are
    /// interpolated.
    Llama3 {
        /// The divisor of long waves.
        factor: f64,
        /// Waves longer than `original / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Waves shorter than `original / high_freq_factor` are short.
        high_freq_factor: f64,
        /// Context length in tokens before scaling.
        original_max_position_embeddings: u32,
    },
    /// Each frequency divided by its own factor, `[head_dim / 2]`, as GGUF files store it.
    Factors(Vec<f32>),
}

impl fmt::Display for RopeScaling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Linear { factor } => write!(f, "linear factor={factor}"),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => write!(
                f,
                "llama3 factor={factor} low={low_freq_factor} high={high_freq_factor} \
                 original={original_max_position_embeddings}"
            ),
            // Factors in full precision, run-length encoded: schemas compare this text.
            Self::Factors(factors) => {
                f.write_str("factors")?;
                for (i, run) in factors.chunk_by(|a, b| a == b).enumerate() {
                    write!(f, "{}{}x{}", if i == 0 { " " } else { "," }, run[0], run.len())?;
                }
                Ok(())
            }
        }
    }
}

/// One rotary embedding. Layers with the same rotation use the same one.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Scaling of the frequencies.
    pub scaling: RopeScaling,
}

impl Rope {
    /// Rotary frequencies in radians per token, `[head_dim / 2]`, computed like transformers' modeling_rope_utils.py.
    /// They are f32 whatever the weight type: transformers' `from_pretrained`, vLLM, SGLang and llama.cpp all keep them
    /// in f32.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        let base = |i: usize| 1.0 / (self.theta as f32).powf((2 * i) as f32 / head_dim as f32);
        let scale = |(i, freq): (usize, f32)| match self.scaling {
            RopeScaling::None => freq,
            RopeScaling::Linear { factor } => freq / factor as f32,
            RopeScaling::Factors(ref factors) => freq / factors.get(i).copied().unwrap_or(1.0),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let original = f64::from(original_max_position_embeddings);
                let wave = 2.0 * std::f64::consts::PI / f64::from(freq);
                let stretched = freq / factor as f32;
                if wave < original / high_freq_factor {
                    freq
                } else if wave > original / low_freq_factor {
                    stretched
                } else {
                    let smooth = ((original / wave - low_freq_factor) / (high_freq_factor - low_freq_factor)) as f32;
                    (1.0 - smooth) * stretched + smooth * freq
                }
            }
        };
        (0..head_dim / 2).map(base).enumerate().map(scale).collect()
    }
}
