//! The decoder block of all supported families over packed weights. [`crate::Decoder`] is the same in tensor
//! operations.

use std::time::Instant;

use rayon::prelude::*;

use super::{
    cache::CpuKv,
    linear::{GatedLinear, Linear},
    workspace::{Rotation, Widths, Workspace},
};
use crate::{
    LayerSink, ModelConfig, ModelError, Parameter, SequenceSlice, Weights,
    cpu::kernels::{
        attention::{Heads, Scoring},
        inputs::InputBuffer,
        packed::{Arithmetic, Rows, WeightFormat},
        rows::{SoftCap, rms_norm, rms_norm_in_place, rope},
        simd::Isa,
    },
    source::Sources,
};

/// Minimum number of activation elements for which rows are processed in parallel.
const WORTH_SHARING: usize = 1 << 15;
/// Interval between two progress messages while loading.
const REPORT_SECONDS: f64 = 2.0;

struct Block {
    /// Index of the rope that rotates q and k; `None`: no rotation.
    rope: Option<usize>,
    /// Factor of the queries.
    query_factor: Option<f32>,
    scoring: Scoring,
    attention_norm: Option<Vec<f32>>,
    /// The rows of q, k and v, in this order.
    qkv: Linear,
    /// Norms of q and of k: of each head, or of all heads at once.
    qk_norm: [Option<Vec<f32>>; 2],
    o: Linear,
    attention_output_norm: Option<Vec<f32>>,
    mlp_norm: Option<Vec<f32>>,
    gate_up: GatedLinear,
    down: Linear,
    mlp_output_norm: Option<Vec<f32>>,
}

/// A model on the CPU.
pub(crate) struct CpuDecoder {
    config: ModelConfig,
    how: Arithmetic,
    ropes: Vec<Rotation>,
    /// `[vocab, hidden]`; `None` if tied to the head, which is then used instead.
    embedding: Option<Linear>,
    blocks: Vec<Block>,
    /// The final norm, times the factor of the logits.
    norm: Vec<f32>,
    head: Linear,
}

impl CpuDecoder {
    /// Packs a model's weights from the mapped files, in parallel. `rows`: number of rows per product to optimise for.
    pub(crate) fn load(
        config: &ModelConfig,
        weights: &Weights,
        format: WeightFormat,
        rows: Rows,
    ) -> Result<Self, ModelError> {
        for (name, shape) in config.tensor_shapes() {
            weights.check(&name, &shape)?;
        }
        let find = Sources::new(config, weights);
        // 4 bits are too coarse for logits. A tied embedding is the head.
        let head_format = if format == WeightFormat::Int4 { WeightFormat::Int8 } else { format };
        let embedding = Linear::load(&find, head_format, &[Parameter::Embedding], None)?;
        let (embedding, head) = match config.tie_word_embeddings {
            true => (None, embedding),
            false => (Some(embedding), Linear::load(&find, head_format, &[Parameter::Head], None)?),
        };
        let mut reported = Instant::now();
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for (layer, spec) in config.layers.iter().enumerate() {
            let at = Some(layer);
            blocks.push(Block {
                rope: spec.rope,
                query_factor: spec.query_factor(config.head_dim),
                scoring: Scoring::of(spec),
                attention_norm: find.norm(Parameter::AttentionNorm, at)?,
                qkv: Linear::load(&find, format, &[Parameter::Query, Parameter::Key, Parameter::Value], at)?,
                qk_norm: [find.head_norm(Parameter::QueryNorm, at)?, find.head_norm(Parameter::KeyNorm, at)?],
                o: Linear::load(&find, format, &[Parameter::AttentionOutput], at)?,
                attention_output_norm: find.norm(Parameter::AttentionOutputNorm, at)?,
                mlp_norm: find.norm(Parameter::MlpNorm, at)?,
                gate_up: GatedLinear::load(&find, format, config.activation, at)?,
                down: Linear::load(&find, format, &[Parameter::Down], at)?,
                mlp_output_norm: find.norm(Parameter::MlpOutputNorm, at)?,
            });
            if reported.elapsed().as_secs_f64() > REPORT_SECONDS {
                reported = Instant::now();
                tracing::info!(layers = layer + 1, of = config.num_hidden_layers, "packing weights");
            }
        }
        let norm = find.final_norm(config.scales.logits)?;
        find.all_used()?;
        Ok(Self {
            config: config.clone(),
            how: Arithmetic { isa: Isa::best(), rows },
            ropes: Rotation::all(config),
            embedding,
            blocks,
            norm,
            head,
        })
    }

    /// The model's configuration.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Changes the number of rows per product to optimise for.
    pub(crate) fn set_rows(&mut self, rows: Rows) {
        self.how.rows = rows;
    }

    /// Size of the packed weights in bytes.
    pub(crate) fn weight_bytes(&self) -> usize {
        let of = |b: &Block| b.qkv.size_bytes() + b.o.size_bytes() + b.gate_up.size_bytes() + b.down.size_bytes();
        let embedding = self.embedding.as_ref().map_or(0, Linear::size_bytes);
        self.head.size_bytes() + embedding + self.blocks.iter().map(of).sum::<usize>()
    }

    /// Bytes of weights that a decode step reads. Excludes an untied embedding: a step reads only one of its rows per
    /// token.
    pub(crate) fn step_weight_bytes(&self) -> usize {
        self.weight_bytes() - self.embedding.as_ref().map_or(0, Linear::size_bytes)
    }

    /// Runs a batch that [`crate::batch::check`] accepted. `logits` receives `[vocab]` values for each requested row.
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
        w.prepare(batch, &widths, &self.ropes);
        self.embed(batch, &mut w.x);
        for (layer, block) in self.blocks.iter().enumerate() {
            let input = self.norm(&w.x, block.attention_norm.as_deref(), &mut w.normed);
            block.qkv.forward(how, input, &mut w.inputs, &mut w.qkv);
            self.position(block, sizes, w);
            kv.put(layer, &w.slots, &w.qkv);
            layers.layer_ready(layer);
            kv.attend(how, layer, batch, block.scoring, &w.q, &mut w.attended, &mut w.attention);
            self.add(
                &block.o,
                block.attention_output_norm.as_deref(),
                &w.attended,
                &mut w.inputs,
                &mut w.normed,
                &mut w.x,
            );

            let input = self.norm(&w.x, block.mlp_norm.as_deref(), &mut w.normed);
            block.gate_up.forward(how, input, &mut w.inputs, &mut w.inner);
            self.add(&block.down, block.mlp_output_norm.as_deref(), &w.inner, &mut w.inputs, &mut w.normed, &mut w.x);
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
            if let Some(cap) = self.config.scales.logit_cap {
                logits.par_chunks_mut(WORTH_SHARING).for_each(|x| how.isa.run(SoftCap { x, cap: cap as f32 }));
            }
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
        let scale = self.config.embedding_scale() as f32;
        let tokens = batch.iter().flat_map(|slice| slice.tokens);
        for (token, x) in tokens.zip(x.chunks_exact_mut(self.config.hidden_size)) {
            table.row(*token as usize, x);
            if scale != 1.0 {
                x.iter_mut().for_each(|x| *x *= scale);
            }
        }
    }

    /// Rows of the residual stream, normalised into `out` if there is a norm.
    fn norm<'a>(&self, x: &'a [f32], weight: Option<&[f32]>, out: &'a mut [f32]) -> &'a [f32] {
        let Some(weight) = weight else { return x };
        let (hidden, eps) = (self.config.hidden_size, self.config.rms_norm_eps as f32);
        if x.len() < WORTH_SHARING {
            let rows = x.chunks_exact(hidden).zip(out.chunks_exact_mut(hidden));
            rows.for_each(|(x, out)| rms_norm(self.how.isa, x, weight, eps, out));
        } else {
            let rows = x.par_chunks_exact(hidden).zip(out.par_chunks_exact_mut(hidden));
            rows.for_each(|(x, out)| rms_norm(self.how.isa, x, weight, eps, out));
        }
        out
    }

    /// Adds a layer's result to the residual stream `x`, normalised if there is a norm. `y`: a buffer of x's size.
    fn add(
        &self,
        linear: &Linear,
        norm: Option<&[f32]>,
        input: &[f32],
        buffer: &mut InputBuffer,
        y: &mut [f32],
        x: &mut [f32],
    ) {
        let (how, factor) = (self.how, self.config.scales.residual as f32);
        let Some(norm) = norm else { return linear.add(how, input, buffer, factor, x) };
        linear.forward(how, input, buffer, y);
        let (hidden, eps) = (self.config.hidden_size, self.config.rms_norm_eps as f32);
        let row = |(x, y): (&mut [f32], &mut [f32])| {
            rms_norm_in_place(how.isa, y, norm, eps);
            x.iter_mut().zip(y).for_each(|(x, y)| *x += factor * *y);
        };
        if x.len() < WORTH_SHARING {
            x.chunks_exact_mut(hidden).zip(y.chunks_exact_mut(hidden)).for_each(row);
        } else {
            x.par_chunks_exact_mut(hidden).zip(y.par_chunks_exact_mut(hidden)).for_each(row);
        }
    }

    /// Normalises and rotates q and k, then copies q out.
    fn position(&self, block: &Block, Heads { heads, kv_heads, head_dim }: Heads, w: &mut Workspace) {
        let eps = self.config.rms_norm_eps as f32;
        let (width, q_width, half) = ((heads + 2 * kv_heads) * head_dim, heads * head_dim, self.config.rotary_dim / 2);
        let Workspace { qkv, q, cos, sin, .. } = w;
        let tokens = qkv.len() / width;
        let rotation = block.rope.map(|rope| {
            let table = rope * tokens * half..(rope + 1) * tokens * half;
            (&cos[table.clone()], &sin[table])
        });
        let row = |token: usize, qkv: &mut [f32], q: &mut [f32]| {
            let at = token * half..(token + 1) * half;
            let rotation = rotation.map(|(cos, sin)| (&cos[at.clone()], &sin[at]));
            let (queries, rest) = qkv.split_at_mut(q_width);
            let keys = &mut rest[..kv_heads * head_dim];
            for (part, norm) in [queries, keys].into_iter().zip(&block.qk_norm) {
                if let Some(norm) = norm {
                    part.chunks_exact_mut(norm.len()).for_each(|x| rms_norm_in_place(self.how.isa, x, norm, eps));
                }
                if let Some((cos, sin)) = rotation {
                    part.chunks_exact_mut(head_dim).for_each(|head| rope(&mut head[..2 * half], cos, sin));
                }
            }
            q.copy_from_slice(&qkv[..q_width]);
            if let Some(factor) = block.query_factor {
                q.iter_mut().for_each(|q| *q *= factor);
            }
        };
        if qkv.len() < WORTH_SHARING {
            let rows = qkv.chunks_exact_mut(width).zip(q.chunks_exact_mut(q_width)).enumerate();
            rows.for_each(|(token, (qkv, q))| row(token, qkv, q));
        } else {
            let rows = qkv.par_chunks_exact_mut(width).zip(q.par_chunks_exact_mut(q_width)).enumerate();
            rows.for_each(|(token, (qkv, q))| row(token, qkv, q));
        }
    }
}
