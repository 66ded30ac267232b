//! Measures the time that a sequence spends in each leg of its processing.

use std::time::Duration;

use prometheus::HistogramVec;
use tokio::time::Instant;
use tracing::{Span, info_span};

/// A part of a sequence's processing. A sequence is in one leg at a time. A sequence that moves to other nodes enters legs
/// again, and their times add up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leg {
    /// The chat template and the tokenizer make token ids of the text, for all sequences of a request at once. Includes
    /// the wait for a thread that processes long texts.
    Tokenize,
    /// The sequence waits for its turn: for the first nodes of its model, and then for admission.
    Queue,
    /// A decode node makes room: from the search for nodes until the node's `Reserved`. Includes the nodes that had no
    /// room, and the pauses between attempts. Without a decode node it ends when the prefill node is chosen.
    Reserve,
    /// The request waits on the prefill node: from the call of `Prefill` until the node's `PrefillStarted`.
    PrefillQueue,
    /// The prefill node computes the prompt: from `PrefillStarted` until the first token.
    Prefill,
    /// The rest of the KV goes to the decode node: from the first token until the node's `HandoffReady`. The part of
    /// the transfer that the computation hides is in `Prefill`.
    Handoff,
    /// The decode node makes its first token, the second one of the output: from `HandoffReady` until that token.
    FirstDecodeStep,
    /// The decode node makes the other tokens: from the second token until the end.
    Decode,
}

impl Leg {
    /// Every leg, in order.
    pub const ALL: [Self; 8] = [
        Self::Tokenize,
        Self::Queue,
        Self::Reserve,
        Self::PrefillQueue,
        Self::Prefill,
        Self::Handoff,
        Self::FirstDecodeStep,
        Self::Decode,
    ];

    /// Name of the leg in metrics and spans.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tokenize => "tokenize",
            Self::Queue => "queue",
            Self::Reserve => "reserve",
            Self::PrefillQueue => "prefill_queue",
            Self::Prefill => "prefill",
            Self::Handoff => "handoff",
            Self::FirstDecodeStep => "first_decode_step",
            Self::Decode => "decode",
        }
    }
}

/// Time spent in each leg. `None` for a leg that was never entered.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LegTimes([Option<Duration>; Leg::ALL.len()]);

impl LegTimes {
    /// Time spent in `leg`.
    pub fn get(&self, leg: Leg) -> Option<Duration> {
        self.0[leg as usize]
    }

    /// Seconds spent in `leg`. 0 for a leg that was never entered.
    pub fn seconds(&self, leg: Leg) -> f64 {
        self.get(leg).unwrap_or_default().as_secs_f64()
    }

    fn add(&mut self, leg: Leg, time: Duration) {
        *self.0[leg as usize].get_or_insert_default() += time;
    }
}

/// Measures the legs of one sequence. Dropping it leaves the current leg.
pub struct Legs {
    times: LegTimes,
    current: Option<Current>,
    /// The sequence's span, the parent of the legs' spans.
    parent: Span,
    /// The histogram that observes the times at the end, and the model's name.
    histogram: Option<(HistogramVec, String)>,
}

struct Current {
    leg: Leg,
    since: Instant,
    /// Span of the current leg.
    _span: Span,
}

impl Legs {
    /// Measures the first legs of a request, before its sequences start. It has no histogram, because the times are passed
    /// to [`Legs::observed`].
    pub fn new(parent: Span) -> Self {
        Self { times: LegTimes::default(), current: None, parent, histogram: None }
    }

    /// Measures a sequence of `model`. `spent`: time already spent in earlier legs. `histogram` observes every entered leg
    /// when this is dropped, also after an error.
    pub fn observed(parent: Span, spent: LegTimes, histogram: HistogramVec, model: &str) -> Self {
        Self { times: spent, current: None, parent, histogram: Some((histogram, model.to_owned())) }
    }

    /// Leaves the current leg and enters this one.
    pub fn enter(&mut self, leg: Leg) {
        if self.current() == Some(leg) {
            return;
        }
        self.leave();
        let span = info_span!(parent: &self.parent, "leg", otel.name = leg.as_str(), leg = leg.as_str());
        self.current = Some(Current { leg, since: Instant::now(), _span: span });
    }

    /// Leaves the current leg.
    pub fn leave(&mut self) {
        if let Some(Current { leg, since, _span }) = self.current.take() {
            self.times.add(leg, since.elapsed());
        }
    }

    /// The current leg.
    pub fn current(&self) -> Option<Leg> {
        self.current.as_ref().map(|current| current.leg)
    }

    /// Times of the legs that were left. The current leg is not included.
    pub fn times(&self) -> LegTimes {
        self.times
    }
}

impl Drop for Legs {
    fn drop(&mut self) {
        self.leave();
        let Some((histogram, model)) = &self.histogram else { return };
        for leg in Leg::ALL {
            if let Some(time) = self.times.get(leg) {
                histogram.with_label_values(&[model.as_str(), leg.as_str()]).observe(time.as_secs_f64());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use prometheus::{HistogramOpts, core::Collector as _};
    use tokio::time::advance;

    use super::*;

    fn milliseconds(legs: &Legs) -> [Option<u128>; Leg::ALL.len()] {
        Leg::ALL.map(|leg| legs.times().get(leg).map(|time| time.as_millis()))
    }

    #[tokio::test(start_paused = true)]
    async fn one_leg_ends_where_the_next_begins() {
        let mut legs = Legs::new(Span::none());
        for (i, leg) in Leg::ALL.into_iter().enumerate() {
            advance(Duration::from_millis(1000)).await;
            legs.leave();
            legs.enter(leg);
            assert_eq!(legs.current(), Some(leg));
            advance(Duration::from_millis(i as u64 + 1)).await;
            legs.leave();
        }
        assert_eq!(milliseconds(&legs), [1, 2, 3, 4, 5, 6, 7, 8].map(Some));
    }

    #[tokio::test(start_paused = true)]
    async fn times_of_a_leg_that_is_entered_again_add_up() {
        let mut legs = Legs::new(Span::none());
        for leg in [Leg::Prefill, Leg::Decode, Leg::Reserve, Leg::Prefill, Leg::Decode, Leg::Decode] {
            legs.enter(leg);
            advance(Duration::from_millis(10)).await;
        }
        assert_eq!(milliseconds(&legs)[Leg::Decode as usize], Some(10), "a leg under way does not count yet");
        legs.leave();
        legs.leave();
        assert_eq!(milliseconds(&legs), [None, None, Some(10), None, Some(20), None, None, Some(30)]);
        assert_eq!((legs.times().seconds(Leg::Prefill), legs.times().seconds(Leg::Queue)), (0.02, 0.0));
    }

    #[tokio::test(start_paused = true)]
    async fn every_leg_entered_is_observed_once_at_the_end() {
        let histogram = HistogramVec::new(HistogramOpts::new("legs", "legs"), &["model_name", "leg"]).unwrap();
        let mut before = Legs::new(Span::none());
        before.enter(Leg::Tokenize);
        advance(Duration::from_secs(1)).await;
        before.leave();
        let mut legs = Legs::observed(Span::none(), before.times(), histogram.clone(), "m");
        for leg in [Leg::Queue, Leg::Reserve, Leg::Queue] {
            legs.enter(leg);
            advance(Duration::from_secs(2)).await;
        }
        let of = |leg: Leg| histogram.with_label_values(&["m", leg.as_str()]);
        assert_eq!(of(Leg::Queue).get_sample_count(), 0);
        drop((before, legs));
        let seen = |leg| (of(leg).get_sample_count(), of(leg).get_sample_sum());
        assert_eq!((seen(Leg::Tokenize), seen(Leg::Queue), seen(Leg::Reserve)), ((1, 1.0), (1, 4.0), (1, 2.0)));
        assert_eq!(seen(Leg::Decode), (0, 0.0));
        assert_eq!(histogram.collect().len(), 1);
    }
}
