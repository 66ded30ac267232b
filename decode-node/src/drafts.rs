//! How many tokens to draft for a verdict. Pure decisions, without model, threads or clock.

use std::time::Duration;

use crate::trials::Trials;

/// Maximum number of drafts given to the full model at a time.
pub const MOST_DRAFTS: usize = 16;
/// Number of drafts while nothing is known about their cost.
const FIRST_DRAFTS: usize = 4;
/// Weight of one round of drafts of a sequence against all earlier ones.
const FORGET: f64 = 0.9;
/// Weight of one round against all earlier ones of all sequences.
const RECORD_FORGET: f64 = 0.97;
/// Weight of the node's record in a sequence's rate of acceptance, in drafts.
const RECORD_DRAFTS: f64 = 2.0;
/// A sequence that drafts nothing makes one draft after this number of rounds, to find out whether drafts are accepted by now. After
/// each draft that is rejected, it waits twice as long.
const PROBE_ROUNDS: u32 = 16;
/// Maximum number of rounds until the next such draft.
const MOST_PROBE_ROUNDS: u32 = 128;

/// A round: some drafts, and the full model's verdict on them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Round {
    /// Drafts that the full model was given.
    pub drafted: usize,
    /// Drafts that stand.
    pub accepted: usize,
    /// Time from the request to the verdict.
    pub took: Duration,
    /// Time from the last verdict to this one; `None` for the first one, and after a request was lost.
    pub lasted: Option<Duration>,
    /// Seconds by which one more draft of each sequence would have prolonged the full model's step, if that is known.
    pub seconds_per_draft: Option<f64>,
}

impl Round {
    /// Number of drafts that were judged. Drafts behind the first one that fell were not.
    fn judged(&self) -> usize {
        self.drafted.min(self.accepted + 1)
    }
}

/// What the drafts of a model have cost and gained on this node, over all sequences.
#[derive(Clone, Debug)]
pub struct DraftRecord {
    /// Weighted numbers of drafts that were judged and accepted.
    judged: f64,
    accepted: f64,
    /// Recent mean of the time until a verdict on no drafts, in seconds.
    verdict_seconds: Option<f64>,
    /// Recent mean of [`Round::seconds_per_draft`].
    seconds_per_draft: Option<f64>,
    trials: Trials,
}

impl Default for DraftRecord {
    fn default() -> Self {
        Self { judged: 4.0, accepted: 3.0, verdict_seconds: None, seconds_per_draft: None, trials: Trials::default() }
    }
}

impl DraftRecord {
    /// Records a round of a sequence that has ended at `now`. `sequences`: number of sequences that run together.
    pub fn observe(&mut self, round: &Round, sequences: usize, now: Duration) {
        self.trials.observe(round, sequences, now);
        if round.drafted > 0 {
            self.judged = self.judged * RECORD_FORGET + round.judged() as f64;
            self.accepted = self.accepted * RECORD_FORGET + round.accepted as f64;
        }
        if let Some(seconds) = round.seconds_per_draft {
            let mean = self.seconds_per_draft.get_or_insert(seconds);
            *mean += (seconds - *mean) / 16.0;
        }
        let verdict = (round.took.as_secs_f64() - round.drafted as f64 * self.draft_seconds()).max(0.0);
        let mean = self.verdict_seconds.get_or_insert(verdict);
        *mean += (verdict - *mean) / 16.0;
    }

    /// Time by which a draft prolongs a verdict, in seconds; 0 while it is unknown.
    fn draft_seconds(&self) -> f64 {
        self.seconds_per_draft.unwrap_or(0.0)
    }
}

/// Chooses how many tokens a sequence drafts for a verdict.
///
/// If a draft is accepted with probability `a`, a round with `k` drafts gives `(1 - a^(k + 1)) / (1 - a)` tokens on average
/// (Leviathan et al., arXiv 2211.17192). It takes `k` steps of this node and one verdict, which `k` drafts prolong. The best `k`
/// gives most tokens per second. It is 0 where drafts do not pay off: then the full model decodes alone. It is also 0 while sequences
/// that run together are faster without drafts ([`Trials`]).
#[derive(Clone, Debug)]
pub struct DraftLength {
    /// Weighted numbers of this sequence's drafts that were judged and accepted.
    judged: f64,
    accepted: f64,
    /// Rounds since the last draft.
    rounds: u32,
    /// Rounds without drafts until the next one is made.
    probe_rounds: u32,
    /// The best number of drafts.
    best: usize,
    /// Whether no drafts pay off, and one is made to find out whether it is accepted.
    is_probe: bool,
    /// Whether a round has ended since it was chosen.
    is_stale: bool,
}

impl Default for DraftLength {
    fn default() -> Self {
        Self {
            judged: 0.0,
            accepted: 0.0,
            // If other sequences' drafts do not pay off, the first round tells whether this one's do.
            rounds: PROBE_ROUNDS,
            probe_rounds: PROBE_ROUNDS,
            best: FIRST_DRAFTS,
            is_probe: false,
            is_stale: true,
        }
    }
}

impl DraftLength {
    /// The number of drafts that was last chosen.
    pub fn best(&self) -> usize {
        self.best
    }

    /// Whether drafts for the next verdict are made while one is under way. If none pay off, they would only be dropped.
    pub fn goes_on(&self) -> bool {
        self.best > 0 && !self.is_probe
    }

    /// Records a round.
    pub fn observe(&mut self, round: &Round) {
        let judged = round.judged();
        // A round without drafts tells nothing about them. If it made earlier rounds count less, one lucky draft would seem to
        // be all there is.
        if judged > 0 {
            self.judged = self.judged * FORGET + judged as f64;
            self.accepted = self.accepted * FORGET + round.accepted as f64;
        }
        if std::mem::take(&mut self.is_probe) && judged > 0 {
            // After an accepted draft, the next one follows at once.
            let rejected = (2 * self.probe_rounds).clamp(PROBE_ROUNDS, MOST_PROBE_ROUNDS);
            self.probe_rounds = if round.accepted > 0 { 0 } else { rejected };
        }
        self.rounds = if round.drafted == 0 { self.rounds + 1 } else { 0 };
        self.is_stale = true;
    }

    /// Number of tokens to draft. `step`: duration of a step.
    pub fn choose(&mut self, step: Duration, record: &DraftRecord) -> usize {
        if std::mem::take(&mut self.is_stale) {
            let drafts = record.trials.drafts();
            self.best = if drafts { self.length(step, record) } else { 0 };
            self.is_probe = drafts && self.best == 0 && self.rounds >= self.probe_rounds;
            if self.is_probe {
                self.best = 1;
            }
        }
        self.best
    }

    /// The best number of drafts, if a step takes `step`.
    fn length(&self, step: Duration, record: &DraftRecord) -> usize {
        let step = step.as_secs_f64();
        let Some(verdict) = record.verdict_seconds.filter(|_| step > 0.0) else { return FIRST_DRAFTS };
        let usual = record.accepted / record.judged;
        let rate = (self.accepted + RECORD_DRAFTS * usual) / (self.judged + RECORD_DRAFTS);
        let draft = step + record.draft_seconds();
        let gain = |k: usize| (0..=k as i32).map(|i| rate.powi(i)).sum::<f64>() / (k as f64 * draft + verdict);
        (0..=MOST_DRAFTS).max_by(|a, b| gain(*a).total_cmp(&gain(*b))).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(1);

    fn round(drafted: usize, accepted: usize, took: Duration, per_draft: f64) -> Round {
        Round { drafted, accepted, took, lasted: None, seconds_per_draft: Some(per_draft) }
    }

    /// A record after many rounds.
    fn record(round: Round) -> DraftRecord {
        let mut record = DraftRecord::default();
        (0..500).for_each(|_| record.observe(&round, 1, STEP));
        record
    }

    #[test]
    fn drafts_are_as_many_as_pay_off() {
        let length = |accepted, step, verdict, per_draft| {
            let round = round(4, accepted, Duration::from_millis(verdict), per_draft);
            let mut drafts = DraftLength::default();
            (0..50).for_each(|_| drafts.observe(&round));
            drafts.length(Duration::from_millis(step), &record(round))
        };
        assert_eq!(length(4, 1, 4, 0.0), MOST_DRAFTS);
        assert_eq!(length(0, 1, 4, 0.0), 0);
        let half = length(1, 1, 4, 0.0);
        assert!((1..4).contains(&half), "{half}");
        // A decode model as slow as the full one is of no use.
        assert_eq!(length(1, 4, 4, 0.0), 0);
        // The same time of a verdict, but three quarters of it are due to the drafts.
        assert_eq!(length(1, 1, 16, 0.003), 0);
        assert!(length(1, 1, 16, 0.0) > 1);
    }

    #[test]
    fn a_new_sequence_expects_what_others_have_seen() {
        let fresh = |record: &DraftRecord| DraftLength::default().choose(STEP, record);
        assert_eq!(fresh(&DraftRecord::default()), FIRST_DRAFTS);
        // Where drafts do not pay off, it makes a single one.
        assert_eq!(fresh(&record(round(4, 0, 8 * STEP, 0.0))), 1);
        assert_eq!(fresh(&record(round(4, 4, 8 * STEP, 0.0))), MOST_DRAFTS);
        // Its own drafts soon count for more.
        let mut drafts = DraftLength::default();
        (0..4).for_each(|_| drafts.observe(&round(4, 0, 8 * STEP, 0.0)));
        assert!(drafts.choose(STEP, &record(round(4, 4, 8 * STEP, 0.0))) <= 1);
    }

    #[test]
    fn nothing_is_drafted_while_sequences_are_faster_without_drafts() {
        let mut record = record(round(4, 4, 8 * STEP, 0.0));
        let mut drafts = DraftLength::default();
        assert!(drafts.choose(STEP, &record) > 0);
        let mut now = 1000 * STEP;
        let mut rounds = |count: usize, lasted: Duration, drafted: usize| {
            for _ in 0..count {
                now += lasted;
                record.observe(&Round { lasted: Some(lasted), ..round(drafted, drafted, STEP, 0.0) }, 1, now);
            }
        };
        // A phase with drafts, which takes long, a trial without, and more rounds without.
        rounds(70, 80 * STEP, 4);
        rounds(100, STEP, 0);
        drafts.observe(&round(4, 4, STEP, 0.0));
        assert!(drafts.choose(STEP, &record) == 0 && !drafts.goes_on());
    }

    /// The rounds in which a sequence drafts, with the number of drafts. They are rejected unless `accepts` says otherwise.
    fn drafted(rounds: usize, accepts: impl Fn(usize) -> bool) -> Vec<(usize, usize)> {
        let record = record(round(1, 0, 8 * STEP, 0.0));
        let mut drafts = DraftLength { judged: 10.0, rounds: 0, ..DraftLength::default() };
        let mut made = Vec::new();
        for i in 0..rounds {
            let count = drafts.choose(STEP, &record);
            if count > 0 {
                made.push((i, count));
            }
            drafts.observe(&round(count, if accepts(i) { count } else { 0 }, 8 * STEP, 0.0));
        }
        made
    }

    #[test]
    fn a_sequence_without_drafts_asks_ever_more_rarely_whether_they_are_accepted() {
        let asked: Vec<usize> = drafted(600, |_| false).iter().map(|(round, _)| *round).collect();
        assert_eq!(asked, [16, 49, 114, 243, 372, 501]);
        // One lucky draft is followed by another one, and not taken for a change.
        assert_eq!(drafted(60, |round| round == 16), [(16, 1), (17, 1), (34, 1)]);
        // Where drafts are accepted from then on, it soon makes more.
        let more = drafted(40, |round| round >= 16).iter().find(|(_, count)| *count > 1).map(|(round, _)| *round);
        assert!(more < Some(24) && more.is_some(), "{more:?}");
    }
}
