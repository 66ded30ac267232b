//! The decoder block of all supported families over packed weights; see [`crate::Decoder`] for the same in tensors.

use std::time::Instant;

use rayon::prelude::*;

use super::{
    cache::CpuKv,
    linear::{GatedLinear, Linear, Source},
    workspace::{Widths, Workspace},
};
use crate::{
    LayerSink, ModelConfig, ModelError, SequenceSlice, Weights,
    cpu::kernels::{
        attention::Heads,
        packed::{Arithmetic, Format, Rows},
        rows::{rms_norm, rms_norm_in_place, rope},
        simd::Isa,
    },
};

/// Elements of activations below which their rows are not worth sharing out.
const WORTH_SHARING: usize = 1 << 15;
/// Between two reports on loading.
const REPORT_SECONDS: f64 = 2.0;

struct Block {
    input_norm: Vec<f32>,
    /// q, k and v, one below the other.
    qkv: Linear,
    /// Norms of q's and k's heads.
    qk_norm: Option<[Vec<f32>; 2]>,
    o: Linear,
    post_attention_norm: Vec<f32>,
    gate_up: GatedLinear,
    down: Linear,
}

/// A model on the CPU.
pub(crate) struct CpuDecoder {
    config: ModelConfig,
    how: Arithmetic,
    inverse_frequencies: Vec<f32>,
    /// `[vocab, hidden]`; none where the head is tied to it.
    embedding: Option<Linear>,
    blocks: Vec<Block>,
    norm: Vec<f32>,
    head: Linear,
}

impl CpuDecoder {
    /// Packs the weights of a model folder, in parallel, from the mapped files. `rows` is what products are fast for.
    pub(crate) fn load(
        config: &ModelConfig,
        weights: &Weights,
        format: Format,
        rows: Rows,
    ) -> Result<Self, ModelError> {
        for (name, shape) in config.tensor_shapes() {
            weights.check(&name, &shape)?;
        }
        let vector = |name: String, count: usize| {
            let mut out = vec![0.0; count];
            weights.read_rows(&name, &[count], 0..count, &mut out)?;
            Ok::<_, ModelError>(out)
        };
        let (h, m, d) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (q, kv) = (config.num_attention_heads * d, config.num_key_value_heads * d);
        // Logits of four bits would be coarse, and the embedding is the head where they are tied.
        let head_format = if format == Format::Int4 { Format::Int8 } else { format };
        let matrix = |name: &str| {
            let source = Source { name: name.into(), shape: [config.vocab_size, h], weights };
            Linear::stacked(head_format, &[source], None)
        };
        let embedding = matrix("model.embed_tokens.weight")?;
        let (embedding, head) = match config.tie_word_embeddings {
            true => (None, embedding),
            false => (Some(embedding), matrix("lm_head.weight")?),
        };
        let mut reported = Instant::now();
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for layer in 0..config.num_hidden_layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let source = |part: &str, rows, columns| Source {
                name: name(&format!("{part}.weight")),
                shape: [rows, columns],
                weights,
            };
            let bias =
                |has: bool, part: &str, count| has.then(|| vector(name(&format!("{part}.bias")), count)).transpose();
            let qkv_bias = match config.qkv_bias {
                true => {
                    let parts = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
                    let parts = parts.map(|(part, count)| bias(true, &format!("self_attn.{part}"), count));
                    let mut all = Vec::new();
                    for part in parts {
                        all.extend(part?.unwrap_or_default());
                    }
                    Some(all)
                }
                false => None,
            };
            let mlp_bias = match (bias(config.mlp_bias, "mlp.gate_proj", m)?, bias(config.mlp_bias, "mlp.up_proj", m)?)
            {
                (Some(gate), Some(up)) => Some([gate, up]),
                _ => None,
            };
            let qk_norm = match config.qk_norm() {
                true => {
                    Some([vector(name("self_attn.q_norm.weight"), d)?, vector(name("self_attn.k_norm.weight"), d)?])
                }
                false => None,
            };
            blocks.push(Block {
                input_norm: vector(name("input_layernorm.weight"), h)?,
                qkv: Linear::stacked(
                    format,
                    &[
                        source("self_attn.q_proj", q, h),
                        source("self_attn.k_proj", kv, h),
                        source("self_attn.v_proj", kv, h),
                    ],
                    qkv_bias,
                )?,
                qk_norm,
                o: Linear::stacked(
                    format,
                    &[source("self_attn.o_proj", h, q)],
                    bias(config.o_bias, "self_attn.o_proj", h)?,
                )?,
                post_attention_norm: vector(name("post_attention_layernorm.weight"), h)?,
                gate_up: GatedLinear::new(
                    format,
                    &source("mlp.gate_proj", m, h),
                    &source("mlp.up_proj", m, h),
                    mlp_bias,
                )?,
                down: Linear::stacked(
                    format,
                    &[source("mlp.down_proj", h, m)],
                    bias(config.mlp_bias, "mlp.down_proj", h)?,
                )?,
            });
            if reported.elapsed().as_secs_f64() > REPORT_SECONDS {
                reported = Instant::now();
                tracing::info!(layers = layer + 1, of = config.num_hidden_layers, "packing weights");
            }
        }
        Ok(Self {
            config: config.clone(),
            how: Arithmetic { isa: Isa::best(), rows },
            inverse_frequencies: config.inverse_frequencies(),
            embedding,
            blocks,
            norm: vector("model.norm.weight".into(), h)?,
            head,
        })
    }

    /// The model's geometry.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Changes what products are fast for.
    pub(crate) fn set_rows(&mut self, rows: Rows) {
        self.how.rows = rows;
    }

    /// Bytes of the packed weights.
    pub(crate) fn weight_bytes(&self) -> usize {
        let of = |b: &Block| b.qkv.size_bytes() + b.o.size_bytes() + b.gate_up.size_bytes() + b.down.size_bytes();
        let embedding = self.embedding.as_ref().map_or(0, Linear::size_bytes);
        self.head.size_bytes() + embedding + self.blocks.iter().map(of).sum::<usize>()
    }

    /// Bytes of them that a decode step reads: of an embedding that is not the head, too, it reads but a row.
    pub(crate) fn step_weight_bytes(&self) -> usize {
        self.weight_bytes() - self.embedding.as_ref().map_or(0, Linear::size_bytes)
    }

    /// Runs a batch whose slices have been checked. `logits` gets a row of `[vocab]` for each row that the batch wants.
    pub(crate) fn run(
        &self,
        kv: &CpuKv,
        batch: &[SequenceSlice<'_>],
        layers: &dyn LayerSink,
        logits: &mut Vec<f32>,
        w: &mut Workspace,
    ) {
        let how = self.how;
        let sizes = self.config.heads();
        let widths = self.widths(sizes);
        w.prepare(batch, &widths, &self.inverse_frequencies);
        self.embed(batch, &mut w.x);
        for (layer, block) in self.blocks.iter().enumerate() {
            self.norm(&w.x, &block.input_norm, &mut w.normed);
            block.qkv.forward(how, &w.normed, &mut w.inputs, &mut w.qkv);
            self.position(block, sizes, w);
            kv.put(layer, &w.slots, &w.qkv);
            layers.layer_ready(layer);
            kv.attend(how, layer, batch, &w.q, &mut w.attended, &mut w.attention);
            block.o.add(how, &w.attended, &mut w.inputs, &mut w.x);

            self.norm(&w.x, &block.post_attention_norm, &mut w.normed);
            block.gate_up.forward(how, &w.normed, &mut w.inputs, &mut w.inner);
            block.down.add(how, &w.inner, &mut w.inputs, &mut w.x);
        }
        let hidden = self.config.hidden_size;
        w.normed.resize(w.wanted.len() * hidden, 0.0);
        for (row, normed) in w.wanted.iter().zip(w.normed.chunks_exact_mut(hidden)) {
            rms_norm(how.isa, &w.x[row * hidden..][..hidden], &self.norm, self.config.rms_norm_eps as f32, normed);
        }
        // Every row is overwritten.
        logits.resize(w.wanted.len() * self.head.outputs(), 0.0);
        if !w.wanted.is_empty() {
            self.head.forward(how, &w.normed, &mut w.inputs, logits);
        }
    }

    fn widths(&self, Heads { heads, kv_heads, head_dim }: Heads) -> Widths {
        Widths {
            hidden: self.config.hidden_size,
            qkv: (heads + 2 * kv_heads) * head_dim,
            heads: heads * head_dim,
            inner: self.config.intermediate_size,
        }
    }

    fn embed(&self, batch: &[SequenceSlice<'_>], x: &mut [f32]) {
        let table = self.embedding.as_ref().unwrap_or(&self.head);
        let tokens = batch.iter().flat_map(|slice| slice.tokens);
        for (token, x) in tokens.zip(x.chunks_exact_mut(self.config.hidden_size)) {
            table.row(*token as usize, x);
        }
    }

    fn norm(&self, x: &[f32], weight: &[f32], out: &mut [f32]) {
        let (hidden, eps) = (self.config.hidden_size, self.config.rms_norm_eps as f32);
        if x.len() < WORTH_SHARING {
            let rows = x.chunks_exact(hidden).zip(out.chunks_exact_mut(hidden));
            rows.for_each(|(x, out)| rms_norm(self.how.isa, x, weight, eps, out));
        } else {
            let rows = x.par_chunks_exact(hidden).zip(out.par_chunks_exact_mut(hidden));
            rows.for_each(|(x, out)| rms_norm(self.how.isa, x, weight, eps, out));
        }
    }

    /// Norms and rotates the heads of q and k, and takes q out.
    fn position(&self, block: &Block, Heads { heads, kv_heads, head_dim }: Heads, w: &mut Workspace) {
        let eps = self.config.rms_norm_eps as f32;
        let (width, q_width, half) = ((heads + 2 * kv_heads) * head_dim, heads * head_dim, head_dim / 2);
        let row = |qkv: &mut [f32], q: &mut [f32], cos: &[f32], sin: &[f32]| {
            for (i, head) in qkv[..(heads + kv_heads) * head_dim].chunks_exact_mut(head_dim).enumerate() {
                if let Some(norms) = &block.qk_norm {
                    rms_norm_in_place(self.how.isa, head, &norms[usize::from(i >= heads)], eps);
                }
                rope(head, cos, sin);
            }
            q.copy_from_slice(&qkv[..q_width]);
        };
        if w.qkv.len() < WORTH_SHARING {
            let rows = w.qkv.chunks_exact_mut(width).zip(w.q.chunks_exact_mut(q_width));
            let rows = rows.zip(w.cos.chunks_exact(half).zip(w.sin.chunks_exact(half)));
            rows.for_each(|((qkv, q), (cos, sin))| row(qkv, q, cos, sin));
        } else {
            let rows = w.qkv.par_chunks_exact_mut(width).zip(w.q.par_chunks_exact_mut(q_width));
            let rows = rows.zip(w.cos.par_chunks_exact(half).zip(w.sin.par_chunks_exact(half)));
            rows.for_each(|((qkv, q), (cos, sin))| row(qkv, q, cos, sin));
        }
    }
}
