//! A decode model that is made to agree with the full model at a given rate: forced agreement.
//!
//! It does all of its work. Then, of the tokens that it has chosen, a share is replaced by the full model's own, and all
//! others by wrong ones. So the cost of a mode can be measured at any rate of accepted drafts.

use std::{collections::HashMap, sync::Arc};

use overfill_decode_node::compute::{Compute, Stepping};
use overfill_kv::OutputToken;
use overfill_model::ModelError;
use parking_lot::Mutex;

/// What a decode model is made to agree with. Shared by the bench and the engine's thread.
#[derive(Default)]
pub struct Agreement {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Share of places in which the decode model chooses the full model's token; `None`: its own choices stand.
    rate: Option<f64>,
    /// The full model's answers, by prompt.
    answers: HashMap<Vec<u32>, Vec<u32>>,
}

impl Agreement {
    /// Sets the answer of the full model to a prompt.
    pub fn learn(&self, prompt: Vec<u32>, answer: Vec<u32>) {
        self.state.lock().answers.insert(prompt, answer);
    }

    /// Sets the rate of agreement; `None` lets the decode model's own choices stand.
    pub fn force(&self, rate: Option<f64>) {
        self.state.lock().rate = rate;
    }
}

impl State {
    /// The token that is forced on place `place` of the answer to `prompt`.
    fn token(&self, prompt: &[u32], place: usize) -> Option<u32> {
        let rate = self.rate?;
        let right = *self.answers.get(prompt)?.get(place)?;
        // Any other token is wrong. Special tokens do not matter here: requests ignore them.
        Some(if uniform(prompt, place) < rate { right } else { right.saturating_sub(1) + u32::from(right == 0) })
    }
}

/// A number in [0, 1) that depends on the prompt and the place in its answer: FNV-1a, finished as in SplitMix64.
fn uniform(prompt: &[u32], place: usize) -> f64 {
    let words = prompt.iter().copied().chain([place as u32]);
    let mut x = words.fold(0xcbf2_9ce4_8422_2325_u64, |x, word| (x ^ u64::from(word)).wrapping_mul(0x0100_0000_01b3));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

/// A computation whose choices are replaced.
pub struct Forced<C> {
    /// The decode model's own computation.
    pub inner: C,
    /// What it is made to agree with.
    pub agreement: Arc<Agreement>,
}

impl<C: Compute> Compute for Forced<C> {
    fn step(&mut self, sequences: &[Stepping<'_>]) -> Result<Vec<Option<OutputToken>>, ModelError> {
        let mut chosen = self.inner.step(sequences)?;
        let state = self.agreement.state.lock();
        for (stepping, chosen) in sequences.iter().zip(&mut chosen) {
            let (prompt, output) = stepping.sequence.flow.prompt_and_output();
            if let (Some(chosen), Some(token)) = (chosen, state.token(prompt, output.len())) {
                chosen.token = token;
            }
        }
        Ok(chosen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_the_places_is_right() {
        let agreement = Agreement::default();
        let prompts: Vec<Vec<u32>> = (0..20).map(|i| vec![i, 7]).collect();
        let answer: Vec<u32> = (0..500).map(|i| i % 3).collect();
        for prompt in &prompts {
            agreement.learn(prompt.clone(), answer.clone());
        }
        let state = || agreement.state.lock();
        assert_eq!(state().token(&prompts[0], 0), None);
        for rate in [0.0, 0.5, 0.9, 1.0] {
            agreement.force(Some(rate));
            let state = state();
            let right = |prompt: &Vec<u32>| {
                let is_right = |place: usize| state.token(prompt, place).unwrap() == answer[place];
                (0..500).filter(|place| is_right(*place)).count()
            };
            let share = prompts.iter().map(right).sum::<usize>() as f64 / 10_000.0;
            assert!((share - rate).abs() < 0.015, "{share} of {rate}");
            assert_eq!(state.token(&prompts[0], 500), None);
            assert_eq!(state.token(&[99], 0), None);
        }
    }
}
