//! The requests: their lengths, the part of their prompts that is cached, and the times between them.

use overfill_kv::BLOCK_TOKENS;
use overfill_prefill_node::scheduler::cacheable_blocks;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rand_distr::{Distribution as _, Exp1};

use super::trace::Trace;
use crate::bench::serve::load::Lengths;

/// Requests that means are taken over.
const SAMPLE: usize = 20_000;

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Length of the prompt.
    pub prompt_tokens: usize,
    /// Length of the answer.
    pub output_tokens: usize,
    /// Leading tokens of the prompt whose KV is in the prefix cache; whole blocks.
    pub cached_tokens: usize,
}

/// Where the lengths and the times between arrivals come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Lengths from distributions, independent (Poisson) arrivals.
    Drawn {
        /// Length of prompts.
        prompt: Lengths,
        /// Length of answers.
        output: Lengths,
    },
    /// Lengths and arrivals of recorded requests, again and again.
    Trace(Trace),
}

/// The request mix.
#[derive(Clone, Debug)]
pub struct Mix {
    /// Where lengths and arrivals come from.
    pub source: Source,
    /// Fraction of prompt tokens in the prefix cache. `None`: what the trace says, or 0.
    pub hit_rate: Option<f64>,
    /// Factor on all prompt lengths.
    pub prompt_factor: f64,
    /// Factor on all answer lengths.
    pub output_factor: f64,
}

/// Means and maxima of a mix, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Sizes {
    /// Mean length of prompts.
    pub mean_prompt_tokens: f64,
    /// Mean length of answers.
    pub mean_output_tokens: f64,
    /// Mean number of prompt tokens that are not cached.
    pub mean_computed_tokens: f64,
    /// Longest prompt.
    pub max_prompt_tokens: usize,
    /// Longest prompt and answer together.
    pub max_tokens: usize,
}

impl Mix {
    /// An endless sequence of requests. The first value is the time since the arrival before it, in mean times between
    /// arrivals. The same seed gives the same requests.
    pub fn asks(&self, seed: u64) -> impl Iterator<Item = (f64, Ask)> + '_ {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut next = 0;
        std::iter::from_fn(move || {
            let (gap, prompt, output, cached) = match &self.source {
                Source::Drawn { prompt, output } => {
                    (Exp1.sample(&mut rng), prompt.draw(&mut rng), output.draw(&mut rng), 0)
                }
                Source::Trace(trace) => {
                    let record = trace.records[next % trace.records.len()];
                    let gap = trace.gaps.get(next % trace.records.len()).copied();
                    next += 1;
                    let gap = gap.unwrap_or_else(|| Exp1.sample(&mut rng));
                    (gap, record.prompt_tokens, record.output_tokens, record.cached_tokens)
                }
            };
            let scaled = |tokens: usize, factor: f64| ((tokens as f64 * factor).round() as usize).max(1);
            let prompt_tokens = scaled(prompt, self.prompt_factor);
            let cacheable = cacheable_blocks(prompt_tokens);
            // Rounded at random, so that short prompts have the same rate on average. Drawn in any case, so that the rate
            // does not change the other draws.
            let rounding: f64 = rng.random();
            let blocks = match self.hit_rate {
                Some(rate) => (rate * prompt_tokens as f64 / BLOCK_TOKENS as f64 + rounding) as usize,
                None => (cached as f64 * self.prompt_factor) as usize / BLOCK_TOKENS,
            };
            let cached_tokens = blocks.min(cacheable) * BLOCK_TOKENS;
            Some((gap, Ask { prompt_tokens, output_tokens: scaled(output, self.output_factor), cached_tokens }))
        })
    }

    /// Requests per second of the trace, if it has times.
    pub fn own_rate(&self) -> Option<f64> {
        match &self.source {
            Source::Trace(trace) => trace.rate,
            Source::Drawn { .. } => None,
        }
    }

    /// Means and maxima.
    pub fn sizes(&self, seed: u64) -> Sizes {
        let count = match &self.source {
            Source::Trace(trace) => trace.records.len(),
            Source::Drawn { .. } => SAMPLE,
        };
        let asks: Vec<Ask> = self.asks(seed).take(count).map(|(_, ask)| ask).collect();
        let mean = |value: fn(&Ask) -> usize| asks.iter().map(value).sum::<usize>() as f64 / asks.len() as f64;
        let most = |value: fn(&Ask) -> usize| asks.iter().map(value).max().unwrap_or(0);
        Sizes {
            mean_prompt_tokens: mean(|ask| ask.prompt_tokens),
            mean_output_tokens: mean(|ask| ask.output_tokens),
            mean_computed_tokens: mean(|ask| ask.prompt_tokens - ask.cached_tokens),
            max_prompt_tokens: most(|ask| ask.prompt_tokens),
            max_tokens: most(|ask| ask.prompt_tokens + ask.output_tokens),
        }
    }
}

#[cfg(test)]
pub mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Prompts and answers of these lengths, without a cache.
    pub fn drawn(prompt: &str, output: &str) -> Mix {
        let source = Source::Drawn { prompt: prompt.parse().unwrap(), output: output.parse().unwrap() };
        Mix { source, hit_rate: None, prompt_factor: 1.0, output_factor: 1.0 }
    }

    #[test]
    fn arrivals_have_a_mean_distance_of_one() {
        let gaps: Vec<f64> = drawn("7", "3").asks(1).take(20_000).map(|(gap, _)| gap).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        assert!((mean - 1.0).abs() < 0.02, "{mean}");
    }

    #[test]
    fn a_recorded_trace_is_replayed_again_and_again() {
        let text = "{\"timestamp\":0,\"input_length\":40,\"output_length\":1}\n\
                    {\"timestamp\":3000,\"input_length\":50,\"output_length\":2}";
        let trace = Trace::parse(text, usize::MAX).unwrap();
        let mix = Mix { source: Source::Trace(trace), hit_rate: None, prompt_factor: 2.0, output_factor: 1.0 };
        let asks: Vec<_> = mix.asks(0).take(3).map(|(_, ask)| (ask.prompt_tokens, ask.output_tokens)).collect();
        assert_eq!(asks, [(80, 1), (100, 2), (80, 1)]);
        assert_eq!(mix.sizes(0).max_tokens, 102);
    }

    proptest! {
        #[test]
        fn the_last_block_is_never_cached(rate in 0.0_f64..=1.0, low in 1_usize..100, more in 0_usize..400) {
            let mix = Mix { hit_rate: Some(rate), ..drawn(&format!("uniform:{low},{}", low + more), "1") };
            for (gap, ask) in mix.asks(3).take(50) {
                prop_assert!(gap >= 0.0 && ask.cached_tokens < ask.prompt_tokens, "{ask:?}");
                prop_assert_eq!(ask.cached_tokens % BLOCK_TOKENS, 0);
            }
        }
    }

    #[test]
    fn a_hit_rate_holds_for_short_prompts_as_well() {
        let sizes = Mix { hit_rate: Some(0.5), ..drawn("uniform:30,50", "1") }.sizes(1);
        let share = 1.0 - sizes.mean_computed_tokens / sizes.mean_prompt_tokens;
        assert!((share - 0.5).abs() < 0.02, "{share}");
    }
}
