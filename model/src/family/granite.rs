//! Granite: Llama's block with factors of embeddings, residuals, scores and logits.

use super::{Family, GgufFamily, GgufWindow, OwnFields, Scales, Sizes, llama};
use crate::{ModelError, config::Fields};

pub(super) const FAMILY: Family = Family {
    class: "GraniteForCausalLM",
    model_type: "granite",
    gguf: Some(GgufFamily {
        architecture: "granite",
        interleaved: true,
        fields: &[
            ("attention_multiplier", "attention.scale"),
            ("embedding_multiplier", "embedding_scale"),
            ("residual_multiplier", "residual_scale"),
            ("logits_scaling", "logit_scale"),
        ],
        window: GgufWindow::Refused,
    }),
    read,
    ..llama::FAMILY
};

fn read(fields: Fields<'_>, sizes: Sizes) -> Result<OwnFields, ModelError> {
    let factor = |field| fields.number_in(1e-6, 1e6, field, Some(1.0));
    let mut own = OwnFields::uniform(fields, sizes, None)?;
    let score_scale = Some(factor("attention_multiplier")?);
    own.layers.iter_mut().for_each(|layer| layer.score_scale = score_scale);
    own.scales = Scales {
        embedding: Some(factor("embedding_multiplier")?),
        residual: factor("residual_multiplier")?,
        logits: factor("logits_scaling")?.recip(),
        logit_cap: None,
    };
    Ok(own)
}
