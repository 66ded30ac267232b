//! Rotary embeddings: base, scaling, and the frequencies that they give.

use std::fmt;

/// How rotary frequencies are stretched beyond the length a model was first trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.x: long waves divided by `factor`, short ones kept, those between interpolated.
    Llama3 {
        /// The divisor of long waves.
        factor: f64,
        /// Waves longer than `original / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Waves shorter than `original / high_freq_factor` are short.
        high_freq_factor: f64,
        /// Context in tokens before stretching.
        original_max_position_embeddings: u32,
    },
    /// Each frequency divided by a factor of its own, `[head_dim / 2]`: the form that GGUF files have.
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
            // Every factor to its last digit, equal neighbours counted: a schema compares the text.
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

/// One rotary embedding. Layers that rotate alike share it.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Their scaling.
    pub scaling: RopeScaling,
}

impl Rope {
    /// Rotary frequencies in radians per token, `[head_dim / 2]`, as in transformers' modeling_rope_utils.py. They are f32
    /// whatever the type of the weights: transformers' `from_pretrained`, vLLM, SGLang and llama.cpp all keep them so.
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
