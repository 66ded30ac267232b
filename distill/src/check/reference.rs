//! The reference's side of a check: how candle-transformers' implementation of the model's family is loaded. It shares only the
//! file reader with the engine.

use std::path::Path;

use candle_core::{DType, Device};
use candle_nn::Activation;
use candle_transformers::models::{
    gemma2, gemma3,
    llama::{self, Llama3RopeConfig, Llama3RopeType},
    mistral, olmo2, phi3, qwen2, qwen3,
    smol::smollm3,
};
use overfill_model::{LayerSpec, ModelConfig, ModelError, Rope, RopeScaling, Weights};

use super::{continuation::Reference, tensors::var_builder};

/// An implementation in candle-transformers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Implementation {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma2,
    Gemma3,
    Phi3,
    Olmo2,
    SmolLm3,
}

impl Implementation {
    /// All implementations.
    const ALL: [Self; 9] = [
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Gemma2,
        Self::Gemma3,
        Self::Phi3,
        Self::Olmo2,
        Self::SmolLm3,
    ];

    /// `model_type` of its family.
    fn model_type(self) -> &'static str {
        if self == Self::Gemma3 { "gemma3_text" } else { self.name() }
    }

    /// Name of the module in candle-transformers.
    fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3",
            Self::Phi3 => "phi3",
            Self::Olmo2 => "olmo2",
            Self::SmolLm3 => "smollm3",
        }
    }
}

/// Plan for computing a model with candle-transformers.
#[derive(Clone, Debug)]
pub struct Plan {
    implementation: Implementation,
    config: ModelConfig,
    rope: Rope,
    /// Gemma 3: every layer of this number has no window.
    pattern: usize,
    /// Hidden size of the reference: the model's own, or wider.
    hidden_size: usize,
    /// Limitations to report.
    pub notes: Vec<String>,
}

impl Plan {
    /// Finds an implementation. An error names the field that no implementation supports.
    pub fn new(path: &Path, config: &ModelConfig) -> Result<Self, ModelError> {
        let unsupported = |field: &str, value: &dyn std::fmt::Display, supported: &str| ModelError::Unsupported {
            file: if super::is_gguf(path) { path.into() } else { path.join("config.json") },
            field: field.into(),
            value: value.to_string(),
            supported: format!("{supported} (candle-transformers has no implementation of anything else)"),
        };
        if config.mlp_bias {
            return Err(unsupported("mlp_bias", &true, "false"));
        }
        let of_family = Implementation::ALL.into_iter().find(|i| i.model_type() == config.family.model_type);
        let Some(of_family) = of_family else {
            let mut supported = Implementation::ALL.map(Implementation::model_type).join(", ");
            if config.family.model_type == "granite" {
                supported += "; the granite of candle-transformers has no multipliers";
            }
            return Err(unsupported("model_type", &config.family.model_type, &supported));
        };
        // Two implementations have Llama's block.
        let plain = matches!(of_family, Implementation::Llama | Implementation::Mistral);
        if plain && config.attention_bias {
            return Err(unsupported("attention_bias", &true, "false"));
        }
        let gemma = matches!(of_family, Implementation::Gemma2 | Implementation::Gemma3);
        if gemma && !config.tie_word_embeddings {
            return Err(unsupported("tie_word_embeddings", &false, "true"));
        }
        if of_family == Implementation::Gemma3 && config.num_key_value_heads > 1 {
            // Its cache refuses the values of several heads, because they are not contiguous.
            return Err(unsupported("num_key_value_heads", &config.num_key_value_heads, "1, for gemma3"));
        }
        let own_scale = 1.0 / (config.head_dim as f64).sqrt();
        let other = config.layers.iter().filter_map(|layer| layer.score_scale).find(|s| (s - own_scale).abs() > 1e-9);
        if let Some(scale) = other {
            return Err(unsupported("factor of the scores", &scale, "1 / sqrt(head_dim)"));
        }
        let pattern = gemma3_pattern(&config.layers);
        let alike = match of_family {
            Implementation::Gemma3 => pattern.is_some(),
            Implementation::SmolLm3 => true,
            _ => config.layers.iter().all(|layer| layer.rope == Some(0)),
        };
        let (Some(rope), true) = (config.ropes.first(), alike) else {
            let supported = if gemma { "every nth layer without a window" } else { "one for all layers" };
            return Err(unsupported("rope", &config.rope_spec().scaling, supported));
        };
        match &rope.scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } if plain => {}
            scaling => {
                return Err(unsupported("rope_scaling", scaling, if plain { "none, linear, llama3" } else { "none" }));
            }
        }
        let heads_width = config.num_attention_heads * config.head_dim;
        let fills = heads_width == config.hidden_size;
        let implementation = match of_family {
            Implementation::Llama if fills => Implementation::Llama,
            // Mistral has Llama's block with a free head_dim, but without RoPE scaling.
            _ if plain && rope.scaling == RopeScaling::None => Implementation::Mistral,
            _ if plain => Implementation::Llama,
            of_family => of_family,
        };
        let mut notes = Vec::new();
        if implementation == Implementation::Mistral && of_family == Implementation::Llama {
            notes.push(
                "candle-transformers' mistral stands in for its llama, whose heads always fill hidden_size".into(),
            );
        }
        let mut hidden_size = config.hidden_size;
        let heads_fill = !matches!(
            implementation,
            Implementation::Mistral | Implementation::Qwen3 | Implementation::Gemma2 | Implementation::Gemma3
        );
        if !fills && heads_fill {
            if heads_width < config.hidden_size {
                let name = implementation.name();
                let supported = format!("hidden_size / num_attention_heads or more, for {name}");
                return Err(unsupported("head_dim", &config.head_dim, &supported));
            }
            hidden_size = heads_width;
            notes.push(format!(
                "the reference's hidden_size is {heads_width}, not {}: candle-transformers' heads always fill it. The \
                 added channels are zeros, and the norms are scaled so that the zeros don't change the result",
                config.hidden_size
            ));
            if implementation == Implementation::Olmo2 {
                notes.push("rms_norm_eps is made smaller for that, and with it that of q_norm and k_norm".into());
            }
        }
        let pattern = pattern.unwrap_or(1);
        Ok(Self { implementation, config: config.clone(), rope: rope.clone(), pattern, hidden_size, notes })
    }

    /// Name of the implementation in candle-transformers.
    pub fn name(&self) -> &'static str {
        self.implementation.name()
    }

    /// Size of the reference's weights in bytes.
    pub fn weight_bytes(&self) -> usize {
        let widened = ModelConfig { hidden_size: self.hidden_size, ..self.config.clone() };
        widened
            .tensor_shapes()
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>() * DType::F32.size_in_bytes())
            .sum()
    }

    /// Loads the model for sequences of up to `tokens` tokens. The caller must check first that every tensor exists:
    /// candle-transformers panics on some missing tensors.
    pub fn load(&self, weights: Weights, tokens: usize) -> Result<Reference, ModelError> {
        let (c, hidden_size) = (&self.config, self.hidden_size);
        // Rotations are computed up to this position. candle's llama also requires it to be at least the number of KV
        // heads, which configurations never exceed.
        let max_position_embeddings = tokens.max(llama::DEFAULT_MAX_SEQ_LEN);
        let vb = var_builder(c, weights, hidden_size);
        Ok(match self.implementation {
            Implementation::Llama => {
                let config = llama::Config {
                    hidden_size,
                    intermediate_size: c.intermediate_size,
                    vocab_size: c.vocab_size,
                    num_hidden_layers: c.num_hidden_layers,
                    num_attention_heads: c.num_attention_heads,
                    num_key_value_heads: c.num_key_value_heads,
                    use_flash_attn: false,
                    rms_norm_eps: self.rms_norm_eps(),
                    rope_theta: self.rope.theta as f32,
                    bos_token_id: None,
                    eos_token_id: None,
                    rope_scaling: llama_scaling(&self.rope.scaling),
                    max_position_embeddings,
                    tie_word_embeddings: c.tie_word_embeddings,
                };
                let cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu)?;
                Reference::Llama(llama::Llama::load(vb, &config)?, cache)
            }
            Implementation::Mistral => {
                let config = mistral::Config {
                    vocab_size: c.vocab_size,
                    hidden_size,
                    intermediate_size: c.intermediate_size,
                    num_hidden_layers: c.num_hidden_layers,
                    num_attention_heads: c.num_attention_heads,
                    head_dim: Some(c.head_dim),
                    num_key_value_heads: c.num_key_value_heads,
                    hidden_act: Activation::Silu,
                    max_position_embeddings,
                    rms_norm_eps: c.rms_norm_eps,
                    rope_theta: self.rope.theta,
                    // Sequences are not longer than the window.
                    sliding_window: None,
                    use_flash_attn: false,
                };
                Reference::Mistral(mistral::Model::new(&config, vb)?)
            }
            Implementation::Qwen2 => {
                let config = qwen2::Config {
                    vocab_size: c.vocab_size,
                    hidden_size,
                    intermediate_size: c.intermediate_size,
                    num_hidden_layers: c.num_hidden_layers,
                    num_attention_heads: c.num_attention_heads,
                    num_key_value_heads: c.num_key_value_heads,
                    max_position_embeddings,
                    // A required field in candle's qwen2. Sequences are not longer.
                    sliding_window: max_position_embeddings,
                    max_window_layers: c.num_hidden_layers,
                    tie_word_embeddings: c.tie_word_embeddings,
                    rope_theta: self.rope.theta,
                    rms_norm_eps: self.rms_norm_eps(),
                    use_sliding_window: false,
                    hidden_act: Activation::Silu,
                };
                Reference::Qwen2(qwen2::ModelForCausalLM::new(&config, vb)?)
            }
            Implementation::Qwen3 => {
                let config = qwen3::Config {
                    vocab_size: c.vocab_size,
                    hidden_size,
                    intermediate_size: c.intermediate_size,
                    num_hidden_layers: c.num_hidden_layers,
                    num_attention_heads: c.num_attention_heads,
                    head_dim: c.head_dim,
                    attention_bias: c.attention_bias,
                    num_key_value_heads: c.num_key_value_heads,
                    max_position_embeddings,
                    sliding_window: None,
                    max_window_layers: c.num_hidden_layers,
                    tie_word_embeddings: c.tie_word_embeddings,
                    rope_theta: self.rope.theta,
                    rms_norm_eps: c.rms_norm_eps,
                    use_sliding_window: false,
                    hidden_act: Activation::Silu,
                };
                Reference::Qwen3(qwen3::ModelForCausalLM::new(&config, vb)?)
            }
            Implementation::Gemma2 => {
                let config = gemma2::Config {
                    attention_bias: c.attention_bias,
                    head_dim: c.head_dim,
                    hidden_activation: activation(c),
                    hidden_size,
                    intermediate_size: c.intermediate_size,
                    num_attention_heads: c.num_attention_heads,
                    num_hidden_layers: c.num_hidden_layers,
                    num_key_value_heads: c.num_key_value_heads,
                    rms_norm_eps: c.rms_norm_eps,
                    rope_theta: self.rope.theta,
                    vocab_size: c.vocab_size,
                    final_logit_softcapping: c.scales.logit_cap,
                    attn_logit_softcapping: c.layers.first().and_then(|layer| layer.score_cap),
                    query_pre_attn_scalar: c.head_dim,
                    // Sequences are not longer than the window.
                    sliding_window: None,
                    max_position_embeddings,
                };
                Reference::Gemma2(gemma2::Model::new(false, &config, vb)?)
            }
            Implementation::Gemma3 => {
                let config = gemma3::Config {
                    attention_bias: c.attention_bias,
                    head_dim: c.head_dim,
                    hidden_activation: activation(c),
                    hidden_size,
                    intermediate_size: c.intermediate_size,
                    num_attention_heads: c.num_attention_heads,
                    num_hidden_layers: c.num_hidden_layers,
                    num_key_value_heads: c.num_key_value_heads,
                    rms_norm_eps: c.rms_norm_eps,
                    rope_theta: self.rope.theta,
                    rope_local_base_freq: c.ropes.last().map_or(self.rope.theta, |rope| rope.theta),
                    vocab_size: c.vocab_size,
                    final_logit_softcapping: c.scales.logit_cap,
                    attn_logit_softcapping: None,
                    query_pre_attn_scalar: c.head_dim,
                    // A layer is told from others by its window. Sequences are not longer than it.
                    sliding_window: max_position_embeddings,
                    sliding_window_pattern: self.pattern,
                    max_position_embeddings,
                };
                Reference::Gemma3(gemma3::Model::new(false, &config, vb)?)
            }
            Implementation::Phi3 => {
                let config = phi3::Config {
                    vocab_size: c.vocab_size,
                    hidden_act: Activation::Silu,
                    hidden_size,
                    intermediate_size: c.intermediate_size,
                    num_hidden_layers: c.num_hidden_layers,
                    num_attention_heads: c.num_attention_heads,
                    num_key_value_heads: c.num_key_value_heads,
                    rms_norm_eps: self.rms_norm_eps(),
                    rope_theta: self.rope.theta,
                    bos_token_id: None,
                    eos_token_id: None,
                    rope_scaling: None,
                    max_position_embeddings,
                    original_max_position_embeddings: None,
                    // candle rounds the product with head_dim down.
                    partial_rotary_factor: Some((c.rotary_dim as f64 + 0.5) / c.head_dim as f64),
                    tie_word_embeddings: c.tie_word_embeddings,
                };
                Reference::Phi3(phi3::Model::new(&config, vb)?)
            }
            Implementation::Olmo2 => {
                let config = olmo2::Config {
                    vocab_size: c.vocab_size,
                    hidden_size,
                    intermediate_size: c.intermediate_size,
                    attention_bias: c.attention_bias,
                    num_hidden_layers: c.num_hidden_layers,
                    num_attention_heads: c.num_attention_heads,
                    num_key_value_heads: c.num_key_value_heads,
                    rms_norm_eps: self.rms_norm_eps(),
                    hidden_act: Activation::Silu,
                    max_position_embeddings,
                    rope_theta: self.rope.theta,
                    tie_word_embeddings: c.tie_word_embeddings,
                    clip_qkv: None,
                };
                Reference::Olmo2(olmo2::Model::new(&config, vb)?)
            }
            Implementation::SmolLm3 => {
                let config = smollm3::Config {
                    vocab_size: c.vocab_size,
                    hidden_size,
                    intermediate_size: c.intermediate_size,
                    num_hidden_layers: c.num_hidden_layers,
                    num_attention_heads: c.num_attention_heads,
                    num_key_value_heads: c.num_key_value_heads,
                    max_position_embeddings,
                    tie_word_embeddings: c.tie_word_embeddings,
                    rope_theta: self.rope.theta,
                    rms_norm_eps: self.rms_norm_eps(),
                    hidden_act: Activation::Silu,
                    attention_bias: Some(c.attention_bias),
                    attention_dropout: None,
                    mlp_bias: None,
                    sliding_window: None,
                    use_sliding_window: None,
                    rope_scaling: None,
                    bos_token_id: None,
                    eos_token_id: None,
                    pad_token_id: None,
                    max_window_layers: None,
                    no_rope_layers: Some(c.layers.iter().map(|layer| usize::from(layer.rope.is_some())).collect()),
                    no_rope_layer_interval: None,
                };
                Reference::SmolLm3(smollm3::ModelForCausalLM::new(&config, vb)?)
            }
        })
    }

    /// Padding with zero channels shrinks the mean square by hidden_size / padded size, so epsilon shrinks by the same
    /// factor.
    fn rms_norm_eps(&self) -> f64 {
        self.config.rms_norm_eps * self.config.hidden_size as f64 / self.hidden_size as f64
    }
}

fn activation(config: &ModelConfig) -> Activation {
    match config.activation {
        overfill_model::Activation::Silu => Activation::Silu,
        overfill_model::Activation::GeluTanh => Activation::GeluPytorchTanh,
    }
}

/// The number n for which each nth layer has the first rope, and all others the second.
fn gemma3_pattern(layers: &[LayerSpec]) -> Option<usize> {
    let fits = |n: &usize| layers.iter().enumerate().all(|(i, l)| l.rope == Some(usize::from((i + 1) % n != 0)));
    (1..=layers.len() + 1).find(fits)
}

fn llama_scaling(scaling: &RopeScaling) -> Option<Llama3RopeConfig> {
    match *scaling {
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            Some(Llama3RopeConfig {
                factor: factor as f32,
                low_freq_factor: low_freq_factor as f32,
                high_freq_factor: high_freq_factor as f32,
                original_max_position_embeddings: original_max_position_embeddings as usize,
                rope_type: Llama3RopeType::Llama3,
            })
        }
        // With an original context of 0, every wavelength counts as long, so all frequencies are divided by the factor.
        RopeScaling::Linear { factor } => Some(Llama3RopeConfig {
            factor: factor as f32,
            low_freq_factor: 1.0,
            high_freq_factor: 1.0,
            original_max_position_embeddings: 0,
            rope_type: Llama3RopeType::Llama3,
        }),
        _ => None,
    }
}
