//! Choosing tokens on the device: `kernels/sample.cu`. The rules are those of `crate::sampler`.
//!
//! What a choice needs is laid out as words in pinned memory and copied at once: first the choices, then a pool with
//! changes of logits and masks. A choice that does not fit is left to the host.

use std::collections::HashMap;

use cudarc::driver::{CudaFunction, CudaStream};
use overfill_kv::{OutputToken, sampling::MAX_LOGPROBS};

use super::{
    device::{Fault, Gpu},
    launch::Sample,
    memory::{Buffer, Pinned, Pointer},
};
use crate::{
    Choice,
    sampler::{Change, RANDOM_BITS, min_p_distance, random_bits, sharpness},
};

/// Words of a `Choice`, a `Change` and a `Chosen` in `kernels/sample.cu`.
const CHOICE_WORDS: usize = 16;
const CHANGE_WORDS: usize = 5;
const CHOSEN_WORDS: usize = 2 + 2 * MAX_LOGPROBS as usize;
/// Changes per sequence that the pool has room for. A sequence with more uses the room of others.
const CHANGES: usize = 1024;
/// Largest vocabulary: the kernel's sums have room for as many weights.
const MOST_TOKENS: usize = 1 << 20;
/// No mask, or no log-probabilities.
const NONE: u32 = -1_i32 as u32;

/// Room for the choices of a step.
pub(super) struct Sampler {
    kernel: CudaFunction,
    host: Pinned<u32>,
    device: Buffer,
    chosen_host: Pinned<u32>,
    chosen: Buffer,
    /// Most choices.
    room: usize,
    vocab_size: usize,
    /// Alternatives of each choice so far; `None`: no log-probabilities.
    alternatives: Vec<Option<u32>>,
    /// End of what the pool holds, in words of `host`.
    end: usize,
}

impl Sampler {
    /// Allocates room for `room` choices.
    pub(super) fn new(gpu: &Gpu, room: usize, vocab_size: usize) -> Result<Self, Fault> {
        let words = room * (CHOICE_WORDS + CHANGES * CHANGE_WORDS + vocab_size.div_ceil(32));
        let buffer = |words: usize| Buffer::zeroed(gpu.launcher.stream(), words * size_of::<u32>());
        Ok(Self {
            kernel: gpu.launcher.function("sample_rows")?,
            host: Pinned::zeroed(&gpu.context, words)?,
            device: buffer(words)?,
            chosen_host: Pinned::zeroed(&gpu.context, room * CHOSEN_WORDS)?,
            chosen: buffer(room * CHOSEN_WORDS)?,
            room,
            vocab_size,
            alternatives: Vec::with_capacity(room),
            end: room * CHOICE_WORDS,
        })
    }

    /// Forgets all choices. The stream has passed them.
    pub(super) fn clear(&mut self) {
        self.alternatives.clear();
        self.end = self.room * CHOICE_WORDS;
    }

    /// Adds the choice of a token from row `row` of the logits. Returns false if there is no room.
    pub(super) fn add(&mut self, row: usize, choice: &Choice<'_>, changes: &HashMap<u32, Change>) -> bool {
        let Choice { params, context } = choice;
        let (index, pool) = (self.alternatives.len(), self.end);
        let mask = context.allowed.map_or(&[][..], |mask| mask.words);
        let words = self.host.as_mut_slice();
        let fits = pool + changes.len() * CHANGE_WORDS + mask.len() <= words.len();
        let alternatives = params.logprobs.unwrap_or(0);
        if index == self.room || !fits || self.vocab_size > MOST_TOKENS || alternatives > MAX_LOGPROBS {
            return false;
        }
        // Changes of tokens outside of the vocabulary change nothing.
        let inside = changes.iter().filter(|(token, _)| (**token as usize) < self.vocab_size);
        let mut num_changes = 0;
        for (place, (token, change)) in words[pool..].chunks_exact_mut(CHANGE_WORDS).zip(inside) {
            let (subtracted, bias) = (change.subtracted.to_bits(), change.bias.to_bits());
            place.copy_from_slice(&[*token, u32::from(change.is_repeated), subtracted, bias, 0]);
            num_changes += 1;
        }
        let mask_start = pool + num_changes * CHANGE_WORDS;
        words[mask_start..][..mask.len()].copy_from_slice(mask);
        self.end = mask_start + mask.len();

        let halves = |bits: u64| [bits as u32, (bits >> 32) as u32];
        let [top_p, min_p] = [params.top_p, min_p_distance(params)].map(|value| halves(value.to_bits()));
        let random = halves(random_bits(params.seed, context.position as u64) << (u64::BITS - RANDOM_BITS));
        let is_greedy = params.temperature == 0.0;
        let top_k = Some(params.top_k).filter(|k| (*k as usize) < self.vocab_size).unwrap_or(0);
        let in_pool = |word: usize| (word - self.room * CHOICE_WORDS) as u32;
        words[index * CHOICE_WORDS..][..CHOICE_WORDS].copy_from_slice(&[
            top_p[0],
            top_p[1],
            min_p[0],
            min_p[1],
            random[0],
            random[1],
            if is_greedy { 0 } else { sharpness(params.temperature).to_bits() },
            (params.repetition_penalty as f32).to_bits(),
            row as u32,
            top_k,
            params.logprobs.unwrap_or(NONE),
            in_pool(pool),
            num_changes as u32,
            if context.allowed.is_some() { in_pool(mask_start) } else { NONE },
            mask.len() as u32,
            context.allowed.map_or(0, |mask| mask.first()),
        ]);
        self.alternatives.push(params.logprobs);
        true
    }

    /// Queues the choices from rows of `stride` logits. Changes these rows.
    pub(super) fn queue(&mut self, gpu: &Gpu, logits: Pointer, stride: usize) -> Result<(), Fault> {
        let count = self.alternatives.len();
        if count == 0 {
            return Ok(());
        }
        let (choices, pool) = (self.device.pointer(), self.room * CHOICE_WORDS);
        let stream: &CudaStream = gpu.launcher.stream();
        self.device.queue_upload(stream, 0, &self.host, 0..count * CHOICE_WORDS)?;
        if self.end > pool {
            self.device.queue_upload(stream, pool * size_of::<u32>(), &self.host, pool..self.end)?;
        }
        let params = Sample {
            choices,
            pool: choices.offset(pool * size_of::<u32>()),
            logits,
            out: self.chosen.pointer(),
            vocab: self.vocab_size as i32,
            stride: stride as i32,
        };
        gpu.launcher.launch(&self.kernel, [count, 1, 1], &params)?;
        Ok(self.chosen.queue_download(stream, 0, &mut self.chosen_host, 0, count * CHOSEN_WORDS)?)
    }

    /// The tokens, in the order of [`Self::add`]. The stream has passed them.
    pub(super) fn chosen(&self) -> impl Iterator<Item = OutputToken> {
        let rows = self.chosen_host.as_slice().chunks_exact(CHOSEN_WORDS);
        rows.zip(&self.alternatives).map(|(words, alternatives)| {
            let (pairs, _) = words.as_chunks::<2>();
            let pair = |[token, logprob]: &[u32; 2]| (*token, f32::from_bits(*logprob));
            let (token, logprob) = pairs.first().map_or((0, f32::NAN), pair);
            let top = pairs[1..].iter().take(alternatives.unwrap_or(0) as usize).map(pair);
            OutputToken { token, logprob, top: top.take_while(|(token, _)| *token != NONE).collect() }
        })
    }
}
