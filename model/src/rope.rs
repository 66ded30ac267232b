//! Rotary embeddings: base, scaling and the resulting frequencies.

use std::{f64::consts::PI, fmt};

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
    /// Dynamic NTK: the base grows with the length of the context. transformers takes the length of each sequence. Here
    /// it is the longest that the model serves, so that a token's key does not depend on what follows it, as in vLLM.
    Dynamic {
        /// The growth of the base.
        factor: f64,
        /// Context length in tokens up to which nothing is scaled.
        original_max_position_embeddings: u32,
        /// Context length in tokens that is served.
        context_tokens: u32,
    },
    /// YaRN (Peng et al., arXiv 2309.00071). Frequencies that turn less than `beta_slow` times over the original context
    /// are divided by `factor`. Frequencies that turn more than `beta_fast` times are kept. Between the two is a ramp.
    Yarn {
        /// The divisor of low frequencies.
        factor: f64,
        /// Context length in tokens before scaling.
        original_max_position_embeddings: u32,
        /// Turns over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Turns over the original context below which a frequency is divided.
        beta_slow: f64,
        /// Whether the ends of the ramp are whole numbers of dimensions.
        truncate: bool,
        /// Factor of the rotated queries and keys.
        attention_factor: f64,
    },
    /// Each frequency is divided by a factor of its own, `[rotary_dim / 2]`. The factors are LongRoPE's (Ding et al., arXiv
    /// 2402.13753) for the context that is served, or a GGUF file stores them.
    Factors {
        /// The divisors.
        factors: Vec<f32>,
        /// Factor of the rotated queries and keys.
        attention_factor: f64,
    },
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
            Self::Dynamic { factor, original_max_position_embeddings, context_tokens } => {
                write!(
                    f,
                    "dynamic factor={factor} original={original_max_position_embeddings} context={context_tokens}"
                )
            }
            Self::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                truncate,
                attention_factor,
            } => {
                let truncated = if *truncate { "" } else { " truncate=false" };
                write!(
                    f,
                    "yarn factor={factor} original={original_max_position_embeddings} fast={beta_fast} slow={beta_slow} \
                     attention={}{truncated}",
                    *attention_factor as f32
                )
            }
            // Factors in full precision, run-length encoded: schemas compare this text.
            Self::Factors { factors, attention_factor } => {
                f.write_str("factors")?;
                for (i, run) in factors.chunk_by(|a, b| a == b).enumerate() {
                    write!(f, "{}{}x{}", if i == 0 { " " } else { "," }, run[0], run.len())?;
                }
                match *attention_factor as f32 {
                    1.0 => Ok(()),
                    factor => write!(f, " attention={factor}"),
                }
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
    /// Rotary frequencies in radians per token, `[rotary_dim / 2]`, computed like transformers' modeling_rope_utils.py.
    /// They are f32 whatever the weight type: transformers' `from_pretrained`, vLLM, SGLang and llama.cpp all keep them
    /// in f32.
    pub fn inverse_frequencies(&self, rotary_dim: usize) -> Vec<f32> {
        let power = |i: usize| (2 * i) as f32 / rotary_dim as f32;
        let waves = |theta: f64| (0..rotary_dim / 2).map(move |i| (theta as f32).powf(power(i)));
        let plain = || waves(self.theta).map(|wave| 1.0 / wave);
        match self.scaling {
            RopeScaling::None => plain().collect(),
            RopeScaling::Linear { factor } => plain().map(|freq| freq / factor as f32).collect(),
            RopeScaling::Factors { ref factors, .. } => {
                plain().zip(factors).map(|(freq, factor)| freq / factor).collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let original = f64::from(original_max_position_embeddings);
                let scale = |freq: f32| {
                    let wave = 2.0 * PI / f64::from(freq);
                    let stretched = freq / factor as f32;
                    if wave < original / high_freq_factor {
                        freq
                    } else if wave > original / low_freq_factor {
                        stretched
                    } else {
                        let smooth =
                            ((original / wave - low_freq_factor) / (high_freq_factor - low_freq_factor)) as f32;
                        (1.0 - smooth) * stretched + smooth * freq
                    }
                };
                plain().map(scale).collect()
            }
            RopeScaling::Dynamic { factor, original_max_position_embeddings, context_tokens } => {
                let (original, dim) = (f64::from(original_max_position_embeddings), rotary_dim as f64);
                let length = f64::from(context_tokens.max(original_max_position_embeddings));
                let growth = (factor * length / original - (factor - 1.0)).powf(dim / (dim - 2.0));
                waves(self.theta * growth).map(|wave| 1.0 / wave).collect()
            }
            RopeScaling::Yarn { factor, original_max_position_embeddings, beta_fast, beta_slow, truncate, .. } => {
                let (original, dim) = (f64::from(original_max_position_embeddings), rotary_dim as f64);
                // The dimension whose wave turns this often over the original context.
                let turning = |turns: f64| dim * (original / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (turning(beta_fast), turning(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let scale = |(i, wave): (usize, f32)| {
                    let kept = 1.0 - ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                    1.0 / (factor as f32 * wave) * (1.0 - kept) + 1.0 / wave * kept
                };
                waves(self.theta).enumerate().map(scale).collect()
            }
        }
    }

    /// Factor of the rotated queries and keys: cosines and sines are multiplied by it.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::Factors { attention_factor, .. } => {
                attention_factor as f32
            }
            _ => 1.0,
        }
    }

    /// Longest context in tokens that the scaling is for, if config.json states `context_tokens`.
    pub(crate) fn context(&self, context_tokens: usize) -> usize {
        match self.scaling {
            RopeScaling::Dynamic { context_tokens, .. } => context_tokens as usize,
            RopeScaling::Yarn { factor, original_max_position_embeddings, .. } => {
                let scaled = factor * f64::from(original_max_position_embeddings);
                context_tokens.max(scaled as usize)
            }
            _ => context_tokens,
        }
    }
}

#[cfg(test)]
mod tests;
