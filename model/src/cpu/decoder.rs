//! The decoder block of all supported families over packed weights. [`crate::Decoder`] is the same in tensor
//! operations.

use std::time::Instant;

use rayon::prelude::*;

use super::{
    cache::CpuKv,
    linear::{GatedLinear, Linear},
    workspace::{Widths, Workspace},
};
use crate::{
    LayerSink, ModelConfig, ModelError, Parameter, SequenceSlice, Weights,
    cpu::kernels::{
        attention::Heads,
        packed::{Arithmetic, Rows, WeightFormat},
        rows::{rms_norm, rms_norm_in_place, rope},
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
    input_norm: Vec<f32>,
    /// The rows of q, k and v, in this order.
    qkv: Linear,
    /// Norms of the heads of q and of k.
    qk_norm: [Option<Vec<f32>>; 2],
    o: Linear,
    post_attention_norm: Vec<f32>,
    gate_up: GatedLinear,
    down: Linear,
}

/// A model on the CPU.
pub(crate) struct CpuDecoder {
    config: ModelConfig,
    how: Arithmetic,
    /// Inverse frequencies of each rope.
    ropes: Vec<Vec<f32>>,
    /// `[vocab, hidden]`; `None` if tied to the head, which is then used instead.
    embedding: Option<Linear>,
    blocks: Vec<Block>,
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
                input_norm: find.norm(Parameter::AttentionNorm, at)?,
                qkv: Linear::load(&find, format, &[Parameter::Query, Parameter::Key, Parameter::Value], at)?,
                qk_norm: [find.head_norm(Parameter::QueryNorm, at)?, find.head_norm(Parameter::KeyNorm, at)?],
                o: Linear::load(&find, format, &[Parameter::AttentionOutput], at)?,
                post_attention_norm: find.norm(Parameter::MlpNorm, at)?,
                gate_up: GatedLinear::load(&find, format, at)?,
                down: Linear::load(&find, format, &[Parameter::Down], at)?,
            });
            if reported.elapsed().as_secs_f64() > REPORT_SECONDS {
                reported = Instant::now();
                tracing::info!(layers = layer + 1, of = config.num_hidden_layers, "packing weights");
            }
        }
        let norm = find.norm(Parameter::FinalNorm, None)?;
        find.all_used()?;
        Ok(Self {
            config: config.clone(),
            how: Arithmetic { isa: Isa::best(), rows },
            ropes: config.inverse_frequencies(),
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

    /// Normalises and rotates the heads of q and k, then copies q out.
    fn position(&self, block: &Block, Heads { heads, kv_heads, head_dim }: Heads, w: &mut Workspace) {
        let eps = self.config.rms_norm_eps as f32;
        let (width, q_width, half) = ((heads + 2 * kv_heads) * head_dim, heads * head_dim, head_dim / 2);
        let Workspace { qkv, q, cos, sin, .. } = w;
        let tokens = qkv.len() / width;
        let rotation = block.rope.map(|rope| {
            let table = rope * tokens * half..(rope + 1) * tokens * half;
            (&cos[table.clone()], &sin[table])
        });
        let row = |token: usize, qkv: &mut [f32], q: &mut [f32]| {
            let at = token * half..(token + 1) * half;
            let rotation = rotation.map(|(cos, sin)| (&cos[at.clone()], &sin[at]));
            for (i, head) in qkv[..(heads + kv_heads) * head_dim].chunks_exact_mut(head_dim).enumerate() {
                if let Some(norm) = &block.qk_norm[usize::from(i >= heads)] {
                    rms_norm_in_place(self.how.isa, head, norm, eps);
                }
                if let Some((cos, sin)) = rotation {
                    rope(head, cos, sin);
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
