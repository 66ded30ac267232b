//! Reads the rotary embedding of config.json.

use serde_json::{Map, Value};

use super::{Fields, fields::MOST};
use crate::{ModelError, Rope, RopeScaling};

/// Greatest factor by which a scaling may stretch frequencies or contexts.
const MAX_FACTOR: f64 = 1e6;

impl Fields<'_> {
    /// The rotary embedding of a model, or of its layers without windows. transformers 5 writes `rope_parameters`;
    /// earlier versions write `rope_theta` and `rope_scaling`. `theta` is the default base, `rotary_dim` the number of
    /// rotated channels of a head.
    pub(crate) fn rope(&self, theta: f64, rotary_dim: usize) -> Result<Rope, ModelError> {
        // Where layers have different ropes, transformers 5 writes one object for each kind of layer.
        let parameters =
            self.present(PARAMETERS).map(|parameters| parameters.get("full_attention").unwrap_or(parameters));
        let object = parameters.or(self.present("rope_scaling")).and_then(Value::as_object);
        let empty = Map::new();
        let rope = Fields { file: self.file, map: object.unwrap_or(&empty) };
        let theta = rope.number("rope_theta", Some(self.number("rope_theta", Some(theta))?))?;
        let rope = Rope { theta, scaling: rope.scaling(*self, theta, rotary_dim)? };
        if rope.inverse_frequencies(rotary_dim).iter().any(|frequency| !frequency.is_finite()) {
            let field = if object.is_some() { "rope_scaling" } else { "rope_theta" };
            return Err(self.bad(field, "values that give finite frequencies"));
        }
        Ok(rope)
    }

    /// Base of the rotary embedding of layers with windows, if they have one of their own.
    pub(crate) fn local_theta(&self) -> Result<f64, ModelError> {
        let theta = self.number("rope_local_base_freq", Some(10_000.0))?;
        let parameters = self.present(PARAMETERS).and_then(|parameters| parameters.get("sliding_attention"));
        match parameters.and_then(Value::as_object) {
            Some(map) => Fields { file: self.file, map }.number("rope_theta", Some(theta)),
            None => Ok(theta),
        }
    }

    /// Number of leading channels of a head that are rotated. `partial`: whether the family may leave some out.
    pub(crate) fn rotary_dim(&self, head_dim: usize, partial: bool) -> Result<usize, ModelError> {
        const FIELD: &str = "partial_rotary_factor";
        let factor = self.number_in(0.0, 1.0, FIELD, Some(1.0))?;
        let factor = match self.present(PARAMETERS).and_then(Value::as_object) {
            Some(map) => Fields { file: self.file, map }.number_in(0.0, 1.0, FIELD, Some(factor))?,
            None => factor,
        };
        let rotary_dim = (head_dim as f64 * factor) as usize;
        if rotary_dim == head_dim {
            return Ok(head_dim);
        }
        let unsupported = |supported: &str| Err(ModelError::unsupported(self.file, FIELD, factor, supported));
        if !partial {
            return unsupported("1 for this family");
        }
        if rotary_dim < 2 || !rotary_dim.is_multiple_of(2) {
            return unsupported(&format!("a part of head_dim ({head_dim}) that is an even number"));
        }
        Ok(rotary_dim)
    }

    /// The scaling that this object states. `model` has the fields of the whole model.
    fn scaling(&self, model: Fields<'_>, theta: f64, rotary_dim: usize) -> Result<RopeScaling, ModelError> {
        let kind = self.present("rope_type").or(self.present("type")).and_then(Value::as_str).unwrap_or("default");
        let original = |default: Option<usize>| Ok::<_, ModelError>(self.size(ORIGINAL, default)? as u32);
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: self.number("factor", None)? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: self.number("factor", None)?,
                low_freq_factor: self.number("low_freq_factor", None)?,
                high_freq_factor: self.number("high_freq_factor", None)?,
                original_max_position_embeddings: original(None)?,
            }),
            "dynamic" => {
                if rotary_dim < 4 {
                    return Err(self.bad_scaling(kind, "4 or more rotated channels per head"));
                }
                let factor = self.number_in(1.0, MAX_FACTOR, "factor", None)?;
                let original = model.context()?;
                let context = (factor * original as f64) as usize;
                if context > MOST {
                    return Err(self.bad("factor", &format!("a factor for a context of up to {MOST} tokens")));
                }
                Ok(RopeScaling::Dynamic {
                    factor,
                    original_max_position_embeddings: original as u32,
                    context_tokens: context as u32,
                })
            }
            // Phi-3's first files call their scaling `su` or `yarn`.
            "longrope" | "su" => self.longrope(model, rotary_dim),
            "yarn" if self.present("long_factor").is_some() => self.longrope(model, rotary_dim),
            "yarn" => {
                if theta <= 1.0 {
                    return Err(model.bad("rope_theta", "a number above 1, with yarn"));
                }
                let factor = self.number_in(1e-3, MAX_FACTOR, "factor", None)?;
                let mscale = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
                let stated = |field| self.present(field).map(|_| self.number_in(1e-3, 1e3, field, None)).transpose();
                let implied = match (stated("mscale")?, stated("mscale_all_dim")?) {
                    (Some(one), Some(all)) => mscale(one) / mscale(all),
                    _ => mscale(1.0),
                };
                let original = original(Some(model.context()?))?;
                if factor * f64::from(original) > MOST as f64 {
                    return Err(self.bad("factor", &format!("a factor for a context of up to {MOST} tokens")));
                }
                Ok(RopeScaling::Yarn {
                    factor,
                    original_max_position_embeddings: original,
                    beta_fast: self.number("beta_fast", Some(32.0))?,
                    beta_slow: self.number("beta_slow", Some(1.0))?,
                    truncate: self.flag("truncate", true)?,
                    attention_factor: self.attention_factor(implied)?,
                })
            }
            "factors" => Ok(RopeScaling::Factors {
                factors: self.factors("factors", rotary_dim)?,
                attention_factor: self.attention_factor(1.0)?,
            }),
            other => Err(self.bad_scaling(other, "default, linear, dynamic, yarn, longrope, llama3, factors")),
        }
    }

    /// LongRoPE has factors for contexts up to the original one, and others for longer ones. A key can't change when
    /// its sequence grows, so the context that is served decides, as in vLLM and llama.cpp. transformers decides by the
    /// length of each sequence, and computes all keys again when it passes the original context.
    fn longrope(&self, model: Fields<'_>, rotary_dim: usize) -> Result<RopeScaling, ModelError> {
        let context = model.context()?;
        let of_model = model.present(ORIGINAL).map(|_| model.size(ORIGINAL, None)).transpose()?;
        let original = match of_model {
            Some(original) => original,
            None => self.size(ORIGINAL, Some(context))?,
        };
        let scale = match self.present("factor") {
            Some(_) if of_model.is_none() => self.number("factor", None)?,
            _ => context as f64 / original as f64,
        };
        let implied =
            if scale <= 1.0 || original == 1 { 1.0 } else { (1.0 + scale.ln() / (original as f64).ln()).sqrt() };
        // Both lists are checked.
        let (short, long) = (self.factors("short_factor", rotary_dim)?, self.factors("long_factor", rotary_dim)?);
        Ok(RopeScaling::Factors {
            factors: if context > original { long } else { short },
            attention_factor: self.attention_factor(implied)?,
        })
    }

    fn attention_factor(&self, default: f64) -> Result<f64, ModelError> {
        self.number_in(1e-3, 1e3, "attention_factor", Some(default))
    }

    /// Context length in tokens that the whole model's configuration states.
    pub(crate) fn context(&self) -> Result<usize, ModelError> {
        self.size("max_position_embeddings", Some(2048))
    }

    fn bad_scaling(&self, kind: &str, supported: &str) -> ModelError {
        ModelError::unsupported(self.file, "rope_type", kind, supported)
    }

    fn factors(&self, field: &str, rotary_dim: usize) -> Result<Vec<f32>, ModelError> {
        let supported = "a list of numbers from 1e-6 to 1e6";
        let factor = |value: &Value| value.as_f64().filter(|n| (1e-6..=1e6).contains(n)).map(|n| n as f32);
        let factors = self.present(field).and_then(Value::as_array);
        let factors: Option<Vec<f32>> = factors.and_then(|list| list.iter().map(factor).collect());
        let factors = factors.ok_or_else(|| self.bad(field, supported))?;
        if factors.len() != rotary_dim / 2 {
            let supported = format!("half of the rotated channels of a head ({rotary_dim})");
            let field = format!("number of elements of {field}");
            return Err(ModelError::unsupported(self.file, &field, factors.len(), &supported));
        }
        Ok(factors)
    }
}

const PARAMETERS: &str = "rope_parameters";
const ORIGINAL: &str = "original_max_position_embeddings";
