//! Whether sequences should draft at all, from measured speed. The number of drafts is chosen for each sequence alone, by the time
//! that a draft costs it ([`crate::drafts`]). That does not count what drafts cost other sequences: the full model's passes give
//! fewer tokens if sequences ask at different times, and drafts may take time from verdicts. So sequences that run together try
//! both, and keep what was faster. Pure decisions, without model, threads or clock.

use std::time::Duration;

use crate::drafts::Round;

/// Rounds that a phase has at least, and for each sequence.
const PHASE_ROUNDS: usize = 64;
const PHASE_ROUNDS_PER_SEQUENCE: usize = 8;
/// Rounds of each sequence that do not count after a change: sequences go on with the drafts that they have.
const SETTLING_ROUNDS_PER_SEQUENCE: usize = 2;
/// Rounds, for each sequence, after which a new number of sequences counts. One sequence often ends just before another one comes.
const NEW_NUMBER_ROUNDS_PER_SEQUENCE: usize = 8;
/// Phases until the next trial after a change. They double with each trial that is lost, up to a maximum.
const TRIAL_PHASES: u32 = 4;
const MOST_TRIAL_PHASES: u32 = 64;
/// A trial is won if it is faster by this factor.
const LEAST_GAIN: f64 = 1.03;
/// A round that takes this many times as long as the mean counts as that long: something else kept it waiting. Rounds with many
/// drafts are longer than others, but not by as much.
const MOST_SLOWDOWN: f64 = 16.0;
/// Numbers of sequences are told apart by their binary logarithm, up to 2 to the power of this.
const LEVELS: usize = 10;

/// What is known of a number of sequences that run together.
#[derive(Clone, Copy, Debug)]
struct Level {
    /// Whether drafts are made, but for a trial.
    drafts: bool,
    /// Recent mean of standing tokens per second and sequence, outside of trials.
    speed: Option<f64>,
    /// Phases until the next trial. At 0, the present phase is the trial.
    phases: u32,
    /// Phases before the next trial, if this one is lost.
    lost_phases: u32,
    /// The present phase: rounds, their standing tokens, and the sum of their durations in seconds.
    rounds: usize,
    tokens: f64,
    seconds: f64,
    /// Mean duration of the rounds of the last phase in seconds.
    round_seconds: Option<f64>,
}

impl Level {
    fn new(drafts: bool) -> Self {
        let (phases, lost_phases) = (1, TRIAL_PHASES);
        Self { drafts, speed: None, phases, lost_phases, rounds: 0, tokens: 0.0, seconds: 0.0, round_seconds: None }
    }

    fn drafts_now(&self) -> bool {
        self.drafts != (self.phases == 0)
    }

    fn add(&mut self, tokens: usize, lasted: Duration) {
        let lasted = lasted.as_secs_f64();
        let mean = if self.rounds == 0 { self.round_seconds } else { Some(self.seconds / self.rounds as f64) };
        self.rounds += 1;
        self.tokens += tokens as f64;
        self.seconds += lasted.min(mean.map_or(f64::INFINITY, |mean| MOST_SLOWDOWN * mean));
    }

    /// Ends the phase, and chooses what the next one does.
    fn end_phase(&mut self) {
        let (speed, round_seconds) = (self.tokens / self.seconds, self.seconds / self.rounds as f64);
        if self.phases > 0 {
            let mean = self.speed.get_or_insert(speed);
            *mean += (speed - *mean) / 4.0;
            self.phases -= 1;
        } else if self.speed.is_none_or(|mean| speed > LEAST_GAIN * mean) {
            let lost_phases = 2 * TRIAL_PHASES;
            *self = Self { speed: Some(speed), phases: TRIAL_PHASES, lost_phases, ..Self::new(!self.drafts) };
        } else {
            self.phases = self.lost_phases;
            self.lost_phases = (2 * self.lost_phases).min(MOST_TRIAL_PHASES);
        }
        self.round_seconds = Some(round_seconds);
        (self.rounds, self.tokens, self.seconds) = (0, 0.0, 0.0);
    }
}

/// Measures the speed of sequences in mode exact with drafts and without, and chooses between the two for each number of sequences
/// that run together.
#[derive(Clone, Debug)]
pub struct Trials {
    levels: [Option<Level>; LEVELS + 1],
    /// The level that counts now, and the number of rounds in a row with another one.
    level: usize,
    strays: usize,
    /// Whether drafts are made now, and since when.
    drafts: bool,
    since: Duration,
    /// Rounds that do not count yet.
    settling: usize,
}

impl Default for Trials {
    fn default() -> Self {
        Self { levels: [None; LEVELS + 1], level: 0, strays: 0, drafts: true, since: Duration::ZERO, settling: 0 }
    }
}

impl Trials {
    /// Whether sequences may draft.
    pub fn drafts(&self) -> bool {
        self.drafts
    }

    /// Records a round that has ended at `now`. `sequences`: number of sequences that run together, at least one.
    pub fn observe(&mut self, round: &Round, sequences: usize, now: Duration) {
        let sequences = sequences.max(1);
        let drafts = self.drafts;
        let level = (sequences.ilog2() as usize).min(LEVELS);
        self.strays = if level == self.level { 0 } else { self.strays + 1 };
        if self.strays >= NEW_NUMBER_ROUNDS_PER_SEQUENCE * sequences {
            (self.level, self.strays) = (level, 0);
        }
        let level = self.levels[self.level].get_or_insert_with(|| Level::new(drafts));
        if level.drafts_now() == drafts && self.settling == 0 {
            // A round that began before the last change does not count.
            let counts = |lasted: &Duration| !lasted.is_zero() && *lasted <= now.saturating_sub(self.since);
            if let Some(lasted) = round.lasted.filter(counts) {
                level.add(round.accepted + 1, lasted);
            }
        }
        self.settling = self.settling.saturating_sub(1).min(SETTLING_ROUNDS_PER_SEQUENCE * sequences);
        if level.rounds >= PHASE_ROUNDS.max(PHASE_ROUNDS_PER_SEQUENCE * sequences) {
            level.end_phase();
        }
        if level.drafts_now() != drafts {
            self.drafts = !drafts;
            self.since = now;
            self.settling = SETTLING_ROUNDS_PER_SEQUENCE * sequences;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets sequences run for a number of rounds. `speed`: rounds per second of each sequence, with drafts and without, by the number
    /// of the round. A round with drafts gives two tokens. Returns the share of rounds with drafts.
    fn run(
        trials: &mut Trials,
        now: &mut Duration,
        sequences: usize,
        rounds: usize,
        speed: impl Fn(usize) -> (f64, f64),
    ) -> f64 {
        let mut drafted = 0;
        for i in 0..rounds {
            let (with, without) = speed(i);
            let (accepted, speed) = if trials.drafts() { (1, with) } else { (0, without) };
            drafted += accepted;
            let lasted = Duration::from_secs_f64(1.0 / speed);
            *now += lasted / sequences as u32;
            let round =
                Round { drafted: accepted, accepted, took: lasted, lasted: Some(lasted), seconds_per_draft: None };
            trials.observe(&round, sequences, *now);
        }
        drafted as f64 / rounds as f64
    }

    #[test]
    fn what_is_faster_is_kept() {
        for (with, without, best) in [(60.0, 100.0, 1.0), (40.0, 100.0, 0.0)] {
            for sequences in [1, 8, 32, 5000] {
                let (mut trials, mut now) = (Trials::default(), Duration::ZERO);
                let phase = PHASE_ROUNDS.max(PHASE_ROUNDS_PER_SEQUENCE * sequences) + 2 * sequences;
                run(&mut trials, &mut now, sequences, 4 * phase, |_| (with, without));
                let share = run(&mut trials, &mut now, sequences, 200 * phase, |_| (with, without));
                assert!((share - best).abs() < 0.06, "{sequences} sequences: {share}");
                assert!(share != best, "no trials");
            }
        }
    }

    #[test]
    fn a_change_is_noticed() {
        let (mut trials, mut now) = (Trials::default(), Duration::ZERO);
        for with in [60.0, 40.0, 60.0] {
            run(&mut trials, &mut now, 8, MOST_TRIAL_PHASES as usize * 100, |_| (with, 100.0));
            let share = run(&mut trials, &mut now, 8, 2000, |_| (with, 100.0));
            assert!(if with > 50.0 { share > 0.8 } else { share < 0.2 }, "{share} at {with}");
        }
    }

    #[test]
    fn each_number_of_sequences_is_measured_by_itself() {
        let (mut trials, mut now) = (Trials::default(), Duration::ZERO);
        let mut shares = [0.0; 2];
        for _ in 0..100 {
            for (share, (sequences, with)) in shares.iter_mut().zip([(2, 90.0), (16, 30.0)]) {
                *share = run(&mut trials, &mut now, sequences, 1000, |_| (with, 100.0));
            }
        }
        assert!(shares[0] > 0.7 && shares[1] < 0.3, "{shares:?}");
    }

    #[test]
    fn a_number_that_changes_often_does_not_keep_the_trials_from_an_end() {
        for rounds in [5, 14] {
            let (mut trials, mut now, mut shares) = (Trials::default(), Duration::ZERO, Vec::new());
            for _ in 0..400 {
                for sequences in [8, 7] {
                    shares.push(run(&mut trials, &mut now, sequences, rounds, |_| (30.0, 100.0)));
                }
            }
            let share = shares[400..].iter().sum::<f64>() / 400.0;
            assert!(share < 0.2, "{rounds} rounds: {share}");
        }
    }

    #[test]
    fn a_round_without_duration_does_not_count() {
        let (mut trials, mut now) = (Trials::default(), Duration::ZERO);
        let none = Round { drafted: 0, accepted: 0, took: now, lasted: Some(now), seconds_per_draft: None };
        (0..1000).for_each(|_| trials.observe(&none, 1, now));
        run(&mut trials, &mut now, 1, 1000, |_| (40.0, 100.0));
        let share = run(&mut trials, &mut now, 1, 1000, |_| (40.0, 100.0));
        assert!(share < 0.2, "{share}");
    }

    #[test]
    fn a_round_that_was_kept_waiting_does_not_decide() {
        let (mut trials, mut now) = (Trials::default(), Duration::ZERO);
        let share =
            run(
                &mut trials,
                &mut now,
                8,
                20_000,
                |round| if round % 500 == 250 { (0.01, 0.01) } else { (60.0, 100.0) },
            );
        assert!(share > 0.8, "{share}");
    }
}
