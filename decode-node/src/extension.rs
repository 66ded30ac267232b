//! What the full model does for one sequence after its first token ([`Mode`]): which tokens it is given and when, which of
//! them stand, and which blocks its KV has taken over. Pure decisions, without model, threads or clock.

use std::{sync::Arc, time::Duration};

use overfill_kv::{BLOCK_TOKENS, BlockLease, Mode};

use crate::drafts::{DraftLength, DraftRecord, MOST_DRAFTS, Round};

/// Maximum number of tokens that one verdict adds.
pub const MOST_CHOSEN: usize = MOST_DRAFTS + 1;
/// Attempts to land a block before the request fails.
const MOST_FAILURES: u32 = 5;

/// A request to the full model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Position of the first of `tokens`.
    pub position: usize,
    /// The next tokens of the sequence, at least one.
    pub tokens: Vec<u32>,
    /// Number of leading `tokens` that stand, at least one.
    pub standing: usize,
    /// Whether the sequence waits for a verdict.
    pub choose: bool,
    /// The block whose KV is wanted.
    pub landing: Option<Landing>,
}

/// A block of the full model's KV that is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Landing {
    /// Index of the block in the sequence.
    pub block: usize,
    /// Number of the landing in the sequence, so that a late report is not taken for another one's.
    pub number: u64,
}

/// State of one sequence's extensions.
#[derive(Debug)]
pub struct Extensions {
    mode: Mode,
    /// Maximum number of tokens of the sequence.
    most: usize,
    /// Number of tokens that stand.
    standing: usize,
    /// Number of leading blocks that hold KV of the full model.
    refreshed: usize,
    /// Number of tokens that the full model was given.
    given: usize,
    /// Drafts in the verdict that the sequence waits for, and the time of the request.
    awaited: Option<(usize, Duration)>,
    /// The time of the last verdict, unless a request was lost since.
    judged: Option<Duration>,
    /// The number of the last landing.
    number: u64,
    /// The block that the full model's KV for block `refreshed` is on its way to.
    landing: Option<Arc<BlockLease>>,
    /// A block in which KV has landed that is not in use yet.
    landed: Option<Arc<BlockLease>>,
    failures: u32,
    drafts: DraftLength,
}

impl Extensions {
    /// For a sequence whose first `prompt` tokens were prefilled. One more token stands: the first one. There will be at most
    /// `most` tokens.
    pub fn new(mode: Mode, prompt: usize, most: usize) -> Self {
        Self {
            mode,
            most,
            standing: prompt + 1,
            refreshed: prompt / BLOCK_TOKENS,
            given: prompt,
            awaited: None,
            judged: None,
            number: 0,
            landing: None,
            landed: None,
            failures: 0,
            drafts: DraftLength::default(),
        }
    }

    /// The mode.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Number of tokens that stand, of `tokens`.
    pub fn standing(&self, tokens: usize) -> usize {
        if self.mode == Mode::Exact { self.standing } else { tokens }
    }

    /// Number of leading tokens whose KV is the full model's.
    pub fn refreshed_tokens(&self) -> usize {
        self.refreshed * BLOCK_TOKENS
    }

    /// Whether the next token can't be computed yet: the full model's KV for an earlier block is missing, or there are enough
    /// drafts. `tokens`: number of tokens of the sequence.
    pub fn waits(&self, tokens: usize) -> bool {
        match self.mode {
            Mode::Draft => false,
            Mode::Refresh => (tokens - 1) / BLOCK_TOKENS >= self.refreshed + 2,
            Mode::Exact => {
                let (drafted, most) = (tokens - self.standing, self.drafts.best());
                // While a verdict is under way, drafts for the next one are made, with the token that the verdict adds.
                let goes_on = self.awaited.is_some() && self.drafts.goes_on();
                drafted >= if goes_on { 2 * most + 1 } else { most }
            }
        }
    }

    /// Whether the full model's KV for the next block is wanted and has no place to go to. `tokens`: number of tokens of the
    /// sequence.
    pub fn wants_landing(&self, tokens: usize) -> bool {
        let known = match self.mode {
            Mode::Draft => 0,
            Mode::Refresh => tokens,
            // The last standing token is computed again with the next drafts.
            Mode::Exact => self.standing - 1,
        };
        // The last token is never fed, and no earlier step would attend to the block.
        let is_used = (self.refreshed + 2) * BLOCK_TOKENS + 2 <= self.most;
        let is_free = self.landing.is_none() && self.landed.is_none();
        is_used && is_free && known >= (self.refreshed + 1) * BLOCK_TOKENS
    }

    /// What to ask the full model for now. `tokens`: the sequence; `is_over`: the draft has ended; `place`: a block for KV,
    /// if [`Self::wants_landing`]; `step`: duration of a step; `record`: what drafts have cost and gained. An unused place is given
    /// back.
    pub fn ask(
        &mut self,
        tokens: &[u32],
        is_over: bool,
        place: Option<Arc<BlockLease>>,
        step: Duration,
        record: &DraftRecord,
        now: Duration,
    ) -> Option<Ask> {
        match self.mode {
            Mode::Draft => None,
            Mode::Refresh => {
                let landing = self.land(place?);
                let end = (landing.block + 1) * BLOCK_TOKENS;
                // After a failure, the node that goes on may know fewer tokens. It is given at least one.
                let position = self.given.min(end - 1);
                self.given = end;
                let tokens = tokens[position..end].to_vec();
                Some(Ask { position, standing: tokens.len(), tokens, choose: false, landing: Some(landing) })
            }
            Mode::Exact => {
                let drafted = tokens.len() - self.standing;
                if self.awaited.is_some() || (drafted < self.drafts.choose(step, record) && !is_over) {
                    return None;
                }
                let drafted = drafted.min(MOST_DRAFTS);
                self.awaited = Some((drafted, now));
                let landing = place.map(|place| self.land(place));
                let position = self.standing - 1;
                let tokens = tokens[position..self.standing + drafted].to_vec();
                Some(Ask { position, tokens, standing: 1, choose: true, landing })
            }
        }
    }

    fn land(&mut self, place: Arc<BlockLease>) -> Landing {
        self.number += 1;
        self.landing = Some(place);
        Landing { block: self.refreshed, number: self.number }
    }

    /// Number of leading blocks that hold KV of the full model. The block that is on its way follows them.
    pub fn refreshed_blocks(&self) -> usize {
        self.refreshed
    }

    /// The block for the full model's KV of [`Ask::landing`].
    pub fn landing(&self) -> Option<&Arc<BlockLease>> {
        self.landing.as_ref()
    }

    /// Whether the full model's KV is on its way in the landing with this number.
    pub fn is_landing(&self, number: u64) -> bool {
        self.landing.is_some() && self.number == number
    }

    /// The full model's KV has arrived in its place.
    pub fn landed(&mut self) {
        self.failures = 0;
        if let Some(place) = self.landing.take() {
            self.landed = Some(place);
        }
    }

    /// The full model's KV has arrived or not, but its place is needed for something else.
    pub fn give_up_landing(&mut self) {
        self.landing = None;
    }

    /// The last request to the full model was lost. It is made again. Returns false if the request must not go on.
    pub fn lost(&mut self) -> bool {
        (self.awaited, self.judged) = (None, None);
        self.landing.is_none() || self.not_landed()
    }

    /// The place of the full model's KV that is not in use yet is needed for something else.
    pub fn give_up_landed(&mut self) {
        self.landed = None;
    }

    /// The full model's KV has not arrived. Returns false if the request must not go on.
    pub fn not_landed(&mut self) -> bool {
        self.landing = None;
        self.failures += 1;
        self.mode != Mode::Refresh || self.failures < MOST_FAILURES
    }

    /// A block of the full model's KV that takes the place of a block of the sequence now, and its index. `tokens`: number
    /// of tokens of the sequence.
    pub fn take_landed(&mut self, tokens: usize) -> Option<(usize, Arc<BlockLease>)> {
        let due = match self.mode {
            Mode::Refresh => (tokens - 1) / BLOCK_TOKENS >= self.refreshed + 2,
            Mode::Draft | Mode::Exact => true,
        };
        let place = self.landed.take_if(|_| due)?;
        self.refreshed += 1;
        Some((self.refreshed - 1, place))
    }

    /// Takes the verdict. Changes `tokens` accordingly. Returns the verdict's effect; `None` if the sequence does not wait for it.
    pub fn verdict(&mut self, tokens: &mut Vec<u32>, verdict: &Chosen, now: Duration) -> Option<Verdict> {
        let (drafted, asked) = self.awaited?;
        let &Chosen { position, tokens: ref chosen, seconds_per_draft } = verdict;
        if position != self.standing || chosen.is_empty() || chosen.len() > drafted + 1 {
            return None;
        }
        self.awaited = None;
        let (accepted, took) = (chosen.len() - 1, now.saturating_sub(asked));
        let lasted = self.judged.replace(now).map(|last| now.saturating_sub(last));
        let round = Round { drafted, accepted, took, lasted, seconds_per_draft };
        self.drafts.observe(&round);
        self.standing = position + chosen.len();
        let same = tokens[position..].iter().zip(chosen).take_while(|(draft, chosen)| draft == chosen).count();
        let is_changed = same < chosen.len();
        if is_changed {
            tokens.truncate(position + same);
            tokens.extend_from_slice(&chosen[same..]);
        }
        Some(Verdict { round, is_changed, valid: position + same })
    }
}

/// The full model's verdict on drafts.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// Position of the first of `tokens`.
    pub position: usize,
    /// The tokens that follow the standing ones.
    pub tokens: Vec<u32>,
    /// Seconds by which one more draft of each sequence would have prolonged the full model's step, if that is known.
    pub seconds_per_draft: Option<f64>,
}

/// Effect of a verdict.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// The drafts that it judged.
    pub round: Round,
    /// Whether tokens were dropped or added.
    pub is_changed: bool,
    /// Number of leading tokens that have not changed.
    pub valid: usize,
}

#[cfg(test)]
mod tests {
    use overfill_kv::BlockPool;

    use super::*;

    const STEP: Duration = Duration::from_millis(1);

    fn place(pool: &BlockPool) -> Option<Arc<BlockLease>> {
        pool.allocate(1).ok().map(Arc::new)
    }

    fn asks(extensions: &mut Extensions, tokens: &[u32], is_over: bool, place: Option<Arc<BlockLease>>) -> Option<Ask> {
        extensions.ask(tokens, is_over, place, STEP, &DraftRecord::default(), STEP)
    }

    fn chosen(position: usize, tokens: &[u32]) -> Chosen {
        Chosen { position, tokens: tokens.to_vec(), seconds_per_draft: None }
    }

    fn round(drafted: usize, accepted: usize) -> Round {
        Round { drafted, accepted, took: 8 * STEP, lasted: None, seconds_per_draft: None }
    }

    #[test]
    fn blocks_are_refreshed_one_block_late() {
        let pool = BlockPool::new(4);
        let mut extensions = Extensions::new(Mode::Refresh, 20, 66);
        let mut tokens: Vec<u32> = (0..21).collect();
        while !extensions.wants_landing(tokens.len()) {
            assert_eq!(asks(&mut extensions, &tokens, false, None), None);
            tokens.push(7);
        }
        assert_eq!(tokens.len(), 32);
        let ask = asks(&mut extensions, &tokens, false, place(&pool)).unwrap();
        assert_eq!((ask.position, ask.tokens.len(), ask.standing, ask.landing.map(|l| l.block)), (20, 12, 12, Some(1)));
        // Feeding position 48 attends to the refreshed block 1; all positions before it do not.
        extensions.landed();
        tokens.resize(48, 7);
        assert!(!extensions.waits(48) && extensions.take_landed(48).is_none());
        assert!(extensions.waits(49));
        assert_eq!(extensions.take_landed(49).map(|(block, _)| block), Some(1));
        assert!(!extensions.waits(49) && extensions.wants_landing(49));
        let ask = asks(&mut extensions, &tokens, false, place(&pool)).unwrap();
        assert_eq!((ask.position, ask.tokens.len(), ask.landing.map(|l| l.block)), (32, 16, Some(2)));
        assert!(extensions.waits(65));
        assert!(extensions.not_landed() && extensions.wants_landing(65));
        let again = asks(&mut extensions, &tokens, false, place(&pool)).unwrap();
        assert_eq!((again.position, again.tokens.len(), again.landing.map(|l| l.block)), (47, 1, Some(2)));
        assert!(extensions.is_landing(3) && !extensions.is_landing(2));
        // No step attends to block 3 of the full model.
        extensions.landed();
        assert!(extensions.take_landed(65).is_some() && !extensions.wants_landing(66));
        drop(extensions);
        assert_eq!(pool.in_use(), 0);
    }

    #[test]
    fn drafts_stand_as_far_as_the_full_model_agrees() {
        let mut extensions = Extensions::new(Mode::Exact, 3, 99);
        let mut tokens = vec![0, 1, 2, 3, 10, 11, 12, 13];
        let ask = asks(&mut extensions, &tokens, false, None).unwrap();
        assert_eq!((ask.position, ask.standing, &ask.tokens[..]), (3, 1, &[3, 10, 11, 12, 13][..]));
        assert_eq!(asks(&mut extensions, &tokens, false, None), None);
        // Drafting goes on meanwhile.
        assert!(!extensions.waits(8));
        tokens.push(14);
        assert_eq!(extensions.verdict(&mut tokens, &chosen(5, &[10]), 9 * STEP), None);
        let verdict = extensions.verdict(&mut tokens, &chosen(4, &[10, 11, 99]), 9 * STEP).unwrap();
        assert_eq!(verdict, Verdict { round: round(4, 2), is_changed: true, valid: 6 });
        assert_eq!((&tokens[..], extensions.standing(tokens.len())), (&[0, 1, 2, 3, 10, 11, 99][..], 7));
        tokens.extend([20, 21]);
        let ask = asks(&mut extensions, &tokens, true, None).unwrap();
        assert_eq!((ask.position, &ask.tokens[..]), (6, &[99, 20, 21][..]));
        tokens.push(22);
        let verdict = extensions.verdict(&mut tokens, &chosen(7, &[20, 21, 22]), 9 * STEP).unwrap();
        assert_eq!(
            verdict,
            Verdict { round: Round { lasted: Some(Duration::ZERO), ..round(2, 2) }, is_changed: false, valid: 10 }
        );
        assert_eq!((tokens.len(), extensions.standing(tokens.len())), (10, 10));
    }

    #[test]
    fn nothing_is_drafted_ahead_while_drafts_do_not_pay_off() {
        let mut extensions = Extensions::new(Mode::Exact, 3, 99);
        let mut record = DraftRecord::default();
        (0..500).for_each(|_| record.observe(&round(4, 0), 1, STEP));
        let ask = |extensions: &mut Extensions, tokens: &[u32]| {
            extensions.ask(tokens, false, None, STEP, &record, STEP).map(|ask| ask.tokens.len())
        };
        let mut tokens = vec![0, 1, 2, 3];
        // One draft shows whether drafts are accepted, and after some rounds another one.
        for rounds in [0, 32] {
            for _ in 0..rounds {
                assert_eq!(ask(&mut extensions, &tokens), Some(1));
                assert!(extensions.waits(tokens.len()));
                let verdict = chosen(tokens.len(), &[7]);
                extensions.verdict(&mut tokens, &verdict, 9 * STEP).unwrap();
            }
            assert_eq!(ask(&mut extensions, &tokens), None);
            assert!(!extensions.waits(tokens.len()));
            tokens.push(8);
            assert_eq!(ask(&mut extensions, &tokens), Some(2));
            assert!(extensions.waits(tokens.len()));
            let verdict = chosen(tokens.len() - 1, &[7]);
            extensions.verdict(&mut tokens, &verdict, 9 * STEP).unwrap();
        }
    }
}
