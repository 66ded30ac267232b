//! Causal attention over a ragged batch, for training and evaluation.
//!
//! The tokens of all sequences lie one after the other. Each sequence attends to itself, and to a prompt whose keys and
//! values are given. There is no padding. On CPUs in f32, one operation computes a tile of queries at a time and keeps no
//! weights for the backward pass, which computes them again (as in FlashAttention, arXiv 2205.14135). Other devices and
//! types use basic operations. Tests compare the two.

use std::{ops::Range, sync::Arc};

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{
    decoder::{LayerKv, soft_cap},
    lanes::{Add, AddProduct, ExpShifted, Scale, each, greatest, lanes, rows, total},
    passes::{fuses, slice},
    product::{Matrix, Threads, Write, multiply},
    trained::Values,
};
use crate::LayerSpec;

/// Tokens of one tile of queries.
const TILE: usize = 64;

/// Lengths of the sequences of a flat batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ragged {
    /// Tokens of each sequence in the batch.
    pub lengths: Vec<usize>,
    /// Tokens of each sequence before those, whose keys and values are known.
    pub prompts: Vec<usize>,
}

impl Ragged {
    /// Checks that the lengths add up to `n` rows after the rows of `prompt`.
    pub(super) fn check(&self, n: usize, prompt: Option<&LayerKv>) -> Result<()> {
        let sum = |lengths: &[usize]| lengths.iter().sum::<usize>();
        let before = prompt.map_or(Ok(0), |(k, _)| k.dim(0))?;
        if self.lengths.len() != self.prompts.len() || sum(&self.lengths) != n || sum(&self.prompts) != before {
            bail!("attention: {n} rows after {before} rows of prompts, not {self:?}");
        }
        Ok(())
    }

    /// The rows of each sequence in the batch, and the rows of its prompt among all prompts.
    fn places(&self) -> Vec<(Range<usize>, Range<usize>)> {
        let (mut own, mut prompt) = (0, 0);
        let place = |(length, before): (&usize, &usize)| {
            let at = (own..own + length, prompt..prompt + before);
            (own, prompt) = (at.0.end, at.1.end);
            at
        };
        self.lengths.iter().zip(&self.prompts).map(place).collect()
    }
}

/// Attention of one layer. `q` is `[n, heads, head_dim]`, `k` and `v` are `[n, kv_heads, head_dim]`, and `prompt` has the
/// keys and values of all prompts, `[prompt tokens, kv_heads, head_dim]`, which receive no gradient. Scores are the
/// products times `1 / sqrt(head_dim)`. The result is `[n, heads, head_dim]`.
///
/// # Errors
/// The lengths do not add up to the rows.
pub fn ragged_attention(
    ragged: &Arc<Ragged>,
    spec: &LayerSpec,
    prompt: Option<&LayerKv>,
    [q, k, v]: [&Tensor; 3],
) -> Result<Tensor> {
    ragged.check(q.dim(0)?, prompt)?;
    let of_prompt = prompt.is_none_or(|(k, v)| fuses(k) && fuses(v));
    if of_prompt && [q, k, v].iter().all(|x| fuses(x)) {
        let prompt =
            prompt.map(|(k, v)| Ok::<_, candle_core::Error>((k.contiguous()?, v.contiguous()?))).transpose()?;
        let op = Tiled { ragged: ragged.clone(), spec: spec.clone(), prompt };
        return q.contiguous()?.apply_op3_no_bwd(&k.contiguous()?, &v.contiguous()?, &op);
    }
    plain(ragged, spec, prompt, [q, k, v])
}

/// Attention by tiles: which sequences, how they attend, and the keys and values of their prompts.
pub(super) struct Tiled {
    pub(super) ragged: Arc<Ragged>,
    pub(super) spec: LayerSpec,
    pub(super) prompt: Option<LayerKv>,
}

/// The data of a batch.
struct Data<'a> {
    spec: &'a LayerSpec,
    q: &'a [f32],
    own: [&'a [f32]; 2],
    prompt: [&'a [f32]; 2],
    heads: usize,
    kv_heads: usize,
    width: usize,
}

/// One tile: some neighbouring queries of a sequence.
struct Tile {
    /// Rows of the queries in the batch.
    rows: Range<usize>,
    /// Rows of the keys and values that the queries see, among the prompts' rows and in the batch.
    seen: [Range<usize>; 2],
    /// Keys that each query sees, as columns of the tile.
    visible: Vec<Range<usize>>,
}

impl Tile {
    fn columns(&self) -> usize {
        self.seen[0].len() + self.seen[1].len()
    }
}

const K: usize = 0;
const V: usize = 1;

impl Data<'_> {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn scale(&self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }

    /// The tile of a sequence's queries `tokens`, counted from its first row.
    fn tile(&self, (own, prompt): &(Range<usize>, Range<usize>), tokens: Range<usize>) -> Tile {
        let before = prompt.len();
        let first = self.spec.first_visible(before + tokens.start);
        let seen = [
            prompt.start + first.min(before)..prompt.end,
            own.start + first.saturating_sub(before)..own.start + tokens.end,
        ];
        let columns = |t: usize| self.spec.first_visible(before + t) - first..before + t + 1 - first;
        Tile { rows: own.start + tokens.start..own.start + tokens.end, seen, visible: tokens.map(columns).collect() }
    }

    /// Rows of a `[n, heads, width]` tensor for the query heads of one KV head: `[tokens * group, width]`.
    fn gather(&self, x: &[f32], rows: &Range<usize>, head: usize) -> Vec<f32> {
        let (part, all) = (self.group() * self.width, self.heads * self.width);
        rows.clone().flat_map(|row| &x[row * all + head * part..][..part]).copied().collect()
    }

    /// Keys or values that a tile sees, of the prompts (`of` = 0) or of the batch (1). `None` if there are none.
    fn seen(&self, which: usize, of: usize, tile: &Tile, head: usize) -> Option<Matrix<'_>> {
        let (rows, stride) = (&tile.seen[of], self.kv_heads * self.width);
        let data = if of == 0 { self.prompt[which] } else { self.own[which] };
        (!rows.is_empty())
            .then(|| Matrix::new(&data[rows.start * stride + head * self.width..], rows.len(), self.width, stride))
    }

    /// `x` times the transposed keys or values that a tile sees: `[rows, columns]`.
    fn against(&self, x: &[f32], which: usize, tile: &Tile, head: usize) -> Vec<f32> {
        let (count, columns) = (x.len() / self.width, tile.columns());
        let mut out = vec![0.0; count * columns];
        let x = Matrix::dense(x, count, self.width);
        let mut at = 0;
        for of in [0, 1] {
            if let Some(seen) = self.seen(which, of, tile, head) {
                multiply(x, seen.t(), &mut out[at..], columns, Write::Replace, Threads::One);
                at = tile.seen[0].len();
            }
        }
        out
    }

    /// `weights`, `[rows, columns]`, times the keys or values that a tile sees: `[rows, width]`.
    fn along(&self, weights: &[f32], which: usize, tile: &Tile, head: usize) -> Vec<f32> {
        let columns = tile.columns();
        let count = weights.len() / columns;
        let mut out = vec![0.0; count * self.width];
        let mut at = 0;
        for of in [0, 1] {
            if let Some(seen) = self.seen(which, of, tile, head) {
                let part = Matrix::new(&weights[at..], count, tile.seen[of].len(), columns);
                multiply(part, seen, &mut out, self.width, Write::Add, Threads::One);
                at = tile.seen[0].len();
            }
        }
        out
    }

    /// Softmax of scores, in their place. Returns the slope of the soft cap at each score, if there is one.
    fn weights(&self, scores: &mut [f32], tile: &Tile) -> Option<Vec<f32>> {
        let (columns, scale) = (tile.columns(), self.scale());
        let mut slopes = None;
        let mut factor = scale;
        if let Some(cap) = self.spec.score_cap {
            let cap = cap as f32;
            scores.iter_mut().for_each(|x| *x = cap * (*x * scale / cap).tanh());
            slopes = Some(scores.iter().map(|x| 1.0 - (x / cap) * (x / cap)).collect());
            factor = 1.0;
        }
        for (row, scores) in scores.chunks_exact_mut(columns).enumerate() {
            let visible = tile.visible[row / self.group()].clone();
            scores[..visible.start].fill(0.0);
            scores[visible.end..].fill(0.0);
            let scores = &mut scores[visible];
            let max = greatest(scores);
            each(&ExpShifted { scale: factor, max }, scores, []);
            let sum = total(&Add {}, [scores]);
            each(&Scale { factor: 1.0 / sum }, scores, []);
        }
        slopes
    }

    /// The result of a tile, `[tokens, heads, width]`.
    fn forward(&self, tile: &Tile, out: &mut [f32]) {
        let part = self.group() * self.width;
        for head in 0..self.kv_heads {
            let q = self.gather(self.q, &tile.rows, head);
            let mut weights = self.against(&q, K, tile, head);
            self.weights(&mut weights, tile);
            let result = self.along(&weights, V, tile, head);
            for (to, from) in out.chunks_exact_mut(self.heads * self.width).zip(result.chunks_exact(part)) {
                to[head * part..][..part].copy_from_slice(from);
            }
        }
    }

    /// Gradients of one sequence for one KV head: of its queries `[tokens, group, width]`, keys and values `[tokens, width]`.
    fn backward(&self, place: &(Range<usize>, Range<usize>), head: usize, out: &[f32], grad: &[f32]) -> [Vec<f32>; 3] {
        let (own, count) = (&place.0, place.0.len());
        let mut dq = Vec::with_capacity(count * self.group() * self.width);
        let (mut dk, mut dv) = (vec![0.0; count * self.width], vec![0.0; count * self.width]);
        for start in (0..count).step_by(TILE) {
            let tile = self.tile(place, start..(start + TILE).min(count));
            let [q, out, grad] = [self.q, out, grad].map(|x| self.gather(x, &tile.rows, head));
            let (columns, rows) = (tile.columns(), q.len() / self.width);
            let mut weights = self.against(&q, K, &tile, head);
            let slopes = self.weights(&mut weights, &tile);
            let mut scores = self.against(&grad, V, &tile, head);
            let scale = self.scale();
            for (row, scores) in scores.chunks_exact_mut(columns).enumerate() {
                let at = row * self.width..(row + 1) * self.width;
                let dot = total(&AddProduct {}, [&out[at.clone()], &grad[at]]);
                each(&SoftmaxBack { dot, scale }, scores, [&weights[row * columns..][..columns]]);
            }
            if let Some(slopes) = slopes {
                scores.iter_mut().zip(slopes).for_each(|(x, slope)| *x *= slope);
            }
            dq.extend(self.along(&scores, K, &tile, head));
            let (first, seen, skipped) = (tile.seen[1].start - own.start, tile.seen[1].len(), tile.seen[0].len());
            for (to, weights, x) in [(&mut dk, &scores, &q), (&mut dv, &weights, &grad)] {
                let of_own = Matrix::new(&weights[skipped..], rows, seen, columns).t();
                let x = Matrix::dense(x, rows, self.width);
                multiply(of_own, x, &mut to[first * self.width..], self.width, Write::Add, Threads::One);
            }
        }
        [dq, dk, dv]
    }
}

lanes!(
    /// Computes the gradient of a score. `target` is the gradient of its weight: `weight (target - dot) scale`.
    SoftmaxBack { dot, scale } 1, |self, target, [weight]| {
        S::mul(S::mul(weight, S::sub(target, S::splat(self.dot))), S::splat(self.scale))
    }
);

impl Tiled {
    /// The result for queries, keys and values of as many heads of `width` values.
    pub(super) fn forward(&self, slices: [&[f32]; 3], heads: [usize; 2], width: usize) -> Result<Vec<f32>> {
        let mut out = vec![0.0; slices[0].len()];
        self.with(slices, heads, width, |data| {
            let (mut tiles, mut rest) = (Vec::new(), out.as_mut_slice());
            for place in &self.ragged.places() {
                let count = place.0.len();
                for start in (0..count).step_by(TILE) {
                    let tile = data.tile(place, start..(start + TILE).min(count));
                    let (part, after) = rest.split_at_mut(tile.rows.len() * data.heads * data.width);
                    rest = after;
                    tiles.push((tile, part));
                }
            }
            tiles.into_par_iter().for_each(|(tile, part)| data.forward(&tile, part));
        })?;
        Ok(out)
    }

    /// The gradients by queries, keys and values, from the result and its gradient.
    pub(super) fn backward(
        &self,
        slices: [&[f32]; 3],
        heads: [usize; 2],
        width: usize,
        [out, grad]: [&[f32]; 2],
    ) -> Result<[Vec<f32>; 3]> {
        let (places, kv_heads) = (self.ragged.places(), heads[1]);
        let tasks: Vec<(usize, usize)> = (0..places.len()).flat_map(|i| (0..kv_heads).map(move |h| (i, h))).collect();
        let parts: Vec<[Vec<f32>; 3]> = self.with(slices, heads, width, |data| {
            let task = |(i, head): &(usize, usize)| data.backward(&places[*i], *head, out, grad);
            tasks.par_iter().map(task).collect()
        })?;
        // The parts are by KV head, and the gradients by token.
        let owner: Vec<(usize, usize)> =
            places.iter().enumerate().flat_map(|(i, (own, _))| (0..own.len()).map(move |token| (i, token))).collect();
        let joined = |which: usize| {
            let mut all = vec![0.0; slices[which].len()];
            let row = all.len() / owner.len().max(1);
            let part = row / kv_heads;
            rows(&mut all, row.max(1), |row, to| {
                let (i, token) = owner[row];
                for (head, to) in to.chunks_exact_mut(part).enumerate() {
                    to.copy_from_slice(&parts[i * kv_heads + head][which][token * part..][..part]);
                }
            });
            all
        };
        Ok([joined(0), joined(1), joined(2)])
    }

    /// Calls `f` with the batch's data.
    fn with<R>(
        &self,
        [q, k, v]: [&[f32]; 3],
        [heads, kv_heads]: [usize; 2],
        width: usize,
        f: impl FnOnce(&Data<'_>) -> R,
    ) -> Result<R> {
        let data = Data { spec: &self.spec, q, own: [k, v], prompt: [&[], &[]], heads, kv_heads, width };
        match &self.prompt {
            None => Ok(f(&data)),
            Some((k, v)) => Ok(f(&Data { prompt: [&Values::of(k)?, &Values::of(v)?], ..data })),
        }
    }
}

impl CustomOp3 for Tiled {
    fn name(&self) -> &'static str {
        "ragged-attention"
    }

    fn cpu_fwd(
        &self,
        qs: &CpuStorage,
        ql: &Layout,
        ks: &CpuStorage,
        kl: &Layout,
        vs: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((_, heads, width), (_, kv_heads, _)) = (ql.shape().dims3()?, kl.shape().dims3()?);
        let slices = [slice(qs, ql)?, slice(ks, kl)?, slice(vs, vl)?];
        Ok((CpuStorage::F32(self.forward(slices, [heads, kv_heads], width)?), ql.shape().clone()))
    }
}

fn plain(ragged: &Ragged, spec: &LayerSpec, prompt: Option<&LayerKv>, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
    let ((_, heads, width), kv_heads) = (q.dims3()?, k.dim(1)?);
    let group = heads / kv_heads;
    let mut outputs = Vec::with_capacity(ragged.lengths.len());
    for (own, before) in ragged.places().into_iter().filter(|(own, _)| !own.is_empty()) {
        let (count, keys) = (own.len(), before.len() + own.len());
        // [keys, kv_heads, width] to [kv_heads, keys, width]
        let seen = |of_prompt: Option<&Tensor>, x: &Tensor| {
            let mine = x.narrow(0, own.start, count)?;
            let all = match of_prompt {
                Some(prompt) => Tensor::cat(&[&prompt.narrow(0, before.start, before.len())?, &mine], 0)?,
                None => mine,
            };
            all.transpose(0, 1)?.contiguous()
        };
        let (k, v) = (seen(prompt.map(|p| &p.0), k)?, seen(prompt.map(|p| &p.1), v)?);
        let q = q.narrow(0, own.start, count)?.reshape((count, kv_heads, group, width))?;
        let q = q.permute((1, 2, 0, 3))?.contiguous()?.reshape((kv_heads, group * count, width))?;
        let scores = (q.matmul(&k.t()?)? * (1.0 / (width as f64).sqrt()))?.to_dtype(DType::F32)?;
        let scores = match spec.score_cap {
            Some(cap) => soft_cap(&scores, cap)?,
            None => scores,
        };
        let sees = |t: usize| spec.first_visible(before.len() + t)..before.len() + t + 1;
        let mask: Vec<f32> = (0..count)
            .flat_map(|t| (0..keys).map(move |c| if sees(t).contains(&c) { 0.0 } else { f32::NEG_INFINITY }))
            .collect();
        let mask = Tensor::from_vec(mask, (1, 1, count, keys), q.device())?;
        let scores = scores.reshape((kv_heads, group, count, keys))?.broadcast_add(&mask)?;
        let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let weights = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?.to_dtype(q.dtype())?;
        let out = weights.reshape((kv_heads, group * count, keys))?.matmul(&v)?;
        let out = out.reshape((kv_heads, group, count, width))?.permute((2, 0, 1, 3))?;
        outputs.push(out.contiguous()?.reshape((count, heads, width))?);
    }
    Tensor::cat(&outputs, 0)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn tiles_equal_basic_operations_gradients_included() {
        let random = |n: usize, heads: usize| Var::randn(0f32, 1f32, (n, heads, 8), &Device::Cpu).unwrap();
        // The second sequence has more than one tile, the third no prompt, and the fourth no tokens of its own.
        let whole = Ragged { lengths: vec![3, 70, 5, 0], prompts: vec![9, 20, 0, 4] };
        let alone = Ragged { lengths: vec![6, 1], prompts: vec![0, 0] };
        for (ragged, spec) in [
            (&whole, LayerSpec::PLAIN),
            (&whole, LayerSpec { window: Some(12), score_cap: Some(2.0), ..LayerSpec::PLAIN }),
            (&alone, LayerSpec::PLAIN),
        ] {
            let ragged = Arc::new(ragged.clone());
            let (n, before) = (ragged.lengths.iter().sum(), ragged.prompts.iter().sum());
            let (q, k, v) = (random(n, 4), random(n, 2), random(n, 2));
            let prompt =
                (before > 0).then(|| (random(before, 2).as_detached_tensor(), random(before, 2).as_detached_tensor()));
            let factors = random(n, 4).as_detached_tensor();
            let detached = [&q, &k, &v].map(|x| x.as_detached_tensor());
            let tiled = ragged_attention(&ragged, &spec, prompt.as_ref(), detached.each_ref()).unwrap();
            let basic = plain(&ragged, &spec, prompt.as_ref(), [&q, &k, &v]).unwrap();
            let gap = |a: &Tensor, b: &Tensor| {
                (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
            };
            assert!(gap(&tiled, &basic) < 1e-5);
            let expected = (&basic * &factors).unwrap().sum_all().unwrap().backward().unwrap();
            let op = Tiled { ragged: ragged.clone(), spec: spec.clone(), prompt: prompt.clone() };
            let values = detached.each_ref().map(|x| Values::of(x).unwrap());
            let of = [&*Values::of(&tiled).unwrap(), &*Values::of(&factors).unwrap()].map(<[f32]>::to_vec);
            let got = op.backward(values.each_ref().map(|x| &**x), [4, 2], 8, [&of[0], &of[1]]).unwrap();
            for (x, got) in [&q, &k, &v].into_iter().zip(got) {
                let got = Tensor::from_vec(got, x.shape(), &Device::Cpu).unwrap();
                assert!(gap(&got, expected.get(x).unwrap()) < 1e-4);
            }
            let short = Arc::new(Ragged { lengths: vec![n - 1], prompts: vec![before] });
            assert!(ragged_attention(&short, &spec, prompt.as_ref(), [&q, &k, &v]).is_err());
        }
    }
}
