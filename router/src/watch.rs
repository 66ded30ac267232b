//! Watches the quality of answers: the full model scores a share of the answers that decode models have written.
//!
//! An answer is chosen when it begins, so that its tokens have log-probabilities. When it has ended, its tokens go to a prefill
//! node, which scores them while it has nothing else to compute. Only counts are kept of them.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use overfill_cluster::Shutdown;
use overfill_kv::{Mode, OutputToken, Role, protocol::EXTEND};
use overfill_proto::v1;
use parking_lot::Mutex;
use tokio::{sync::Semaphore, time::timeout};
use tonic::Status;
use tracing::debug;

use crate::{
    metrics::Metrics,
    node::{Node, View},
    request::Generation,
};

/// Maximum time until a prefill node has scored an answer.
const SCORE_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum number of answers that this router has scored at once.
const MAX_SCORES: usize = 32;
/// Number of answers per model in a [`Summary`].
const RECENT_ANSWERS: usize = 1000;
/// The least log-probability that counts, so that a token that a model thinks impossible keeps sums finite.
const LEAST_LOGPROB: f32 = -100.0;

/// Chooses answers and has them scored.
#[derive(Clone)]
pub struct Watch {
    share: f64,
    metrics: Arc<Metrics>,
    /// Owns the tasks that wait for scores.
    owner: Shutdown,
    places: Arc<Semaphore>,
    recent: Arc<Mutex<BTreeMap<String, VecDeque<Answer>>>>,
}

/// An answer that is watched.
pub struct Watched {
    /// For each token, its log-probability if a decode model has chosen it.
    drafts: Vec<Option<f32>>,
    /// Whether the client did not ask for log-probabilities.
    hides_logprobs: bool,
}

impl Watched {
    /// Records a token that a node of this role has chosen. Removes its log-probability if the client did not ask for one.
    pub fn token(&mut self, token: &mut OutputToken, stage: Role) {
        self.drafts.push((stage == Role::Decode).then_some(token.logprob));
        if self.hides_logprobs {
            token.logprob = f32::NAN;
        }
    }
}

/// What the full model says about one answer. Only tokens that the decode model has chosen count.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Answer {
    tokens: u64,
    /// Tokens that the full model would have chosen too.
    agreed: u64,
    /// Sum of the tokens' negative log-probabilities under the decode model.
    decode_nats: f64,
    /// The same under the full model.
    full_nats: f64,
    /// Number of the first token, counted from 1, that the full model would not have chosen.
    parted_at: Option<u64>,
}

impl Answer {
    /// Compares an answer with its score. `None` if the score has another length, or a number is missing.
    fn new(output: &[u32], drafts: &[Option<f32>], score: &v1::ScoreResponse) -> Option<Self> {
        let v1::ScoreResponse { choices, logprobs } = score;
        if [drafts.len(), choices.len(), logprobs.len()] != [output.len(); 3] {
            return None;
        }
        let mut answer = Self { tokens: 0, agreed: 0, decode_nats: 0.0, full_nats: 0.0, parted_at: None };
        for (i, draft) in drafts.iter().enumerate() {
            let Some(draft) = draft else { continue };
            if draft.is_nan() || logprobs[i].is_nan() {
                return None;
            }
            answer.tokens += 1;
            answer.decode_nats -= f64::from(draft.clamp(LEAST_LOGPROB, 0.0));
            answer.full_nats -= f64::from(logprobs[i].clamp(LEAST_LOGPROB, 0.0));
            match choices[i] == output[i] {
                true => answer.agreed += 1,
                false => drop(answer.parted_at.get_or_insert(i as u64 + 1)),
            }
        }
        Some(answer)
    }
}

/// The last watched answers of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Number of answers, at most [`RECENT_ANSWERS`].
    pub answers: u64,
    /// Their tokens that the decode model has chosen.
    pub tokens: u64,
    /// Share of these that the full model would have chosen too, with the same sampling parameters.
    pub agreement: f64,
    /// Mean log-probability under the decode model less that under the full model, in nats per token.
    pub logprob_gap_nats: f64,
    /// Number of answers that the full model would have written differently.
    pub parted_answers: u64,
    /// Median of the number of the first token that the full model would not have chosen. 0 if there is none.
    pub median_parted_at_tokens: u64,
}

impl Summary {
    fn new(answers: &VecDeque<Answer>) -> Option<Self> {
        let tokens: u64 = answers.iter().map(|answer| answer.tokens).sum();
        if tokens == 0 {
            return None;
        }
        let agreed: u64 = answers.iter().map(|answer| answer.agreed).sum();
        let gap: f64 = answers.iter().map(|answer| answer.full_nats - answer.decode_nats).sum();
        let mut parted: Vec<u64> = answers.iter().filter_map(|answer| answer.parted_at).collect();
        parted.sort_unstable();
        Some(Self {
            answers: answers.len() as u64,
            tokens,
            agreement: agreed as f64 / tokens as f64,
            logprob_gap_nats: gap / tokens as f64,
            parted_answers: parted.len() as u64,
            median_parted_at_tokens: parted.get(parted.len() / 2).copied().unwrap_or_default(),
        })
    }
}

impl From<Summary> for v1::WatchSummary {
    fn from(summary: Summary) -> Self {
        let Summary { answers, tokens, agreement, logprob_gap_nats, parted_answers, median_parted_at_tokens } = summary;
        Self { answers, tokens, agreement, logprob_gap_nats, parted_answers, median_parted_at_tokens }
    }
}

impl Watch {
    /// Watches this share of the answers, in [0, 1].
    pub fn new(share: f64, metrics: Arc<Metrics>) -> Self {
        let places = Arc::new(Semaphore::new(MAX_SCORES));
        Self { share, metrics, owner: Shutdown::new(), places, recent: Arc::default() }
    }

    /// Decides whether the answer to `generation` is watched, and if so, asks for the log-probabilities of its tokens. Answers
    /// under a grammar are not watched, because the full model would have to follow it too.
    pub fn begin(&self, generation: &mut Generation) -> Option<Watched> {
        let eligible =
            generation.mode() == Mode::Draft && generation.max_tokens > 1 && generation.sampling.grammar.is_none();
        if !eligible || self.share == 0.0 || rand::random::<f64>() >= self.share {
            return None;
        }
        let hides_logprobs = generation.sampling.logprobs.is_none();
        generation.sampling.logprobs.get_or_insert(0);
        Some(Watched { drafts: Vec::new(), hides_logprobs })
    }

    /// Has a prefill node score an answer that has ended. `producer` is the fingerprint of its full model, `prefill_node` the
    /// name of the node that probably has its prompt in the prefix cache.
    pub fn ended(
        &self,
        view: &View,
        watched: Watched,
        generation: &Generation,
        output: &[u32],
        producer: &str,
        prefill_node: &str,
    ) {
        if !watched.drafts.iter().any(Option::is_some) {
            return;
        }
        let model = &generation.model.name;
        let length = (generation.prompt.len() + output.len()) as u32;
        let node = view.prefill.iter().filter(|node| {
            let full_model = node.info.schema.full_model.as_deref().unwrap_or_default();
            full_model == producer
                && node.info.protocol.newest >= EXTEND
                && node.info.max_context_tokens >= length
                && node.admits()
        });
        let node = node.min_by_key(|node| (node.info.node_id != prefill_node, node.load().queued_tokens));
        let (Some(node), Ok(place)) = (node, self.places.clone().try_acquire_owned()) else {
            return self.metrics.watch.dropped(model);
        };
        let request = v1::ScoreRequest {
            request_id: generation.request_id.0.clone(),
            incarnation: node.info.incarnation.clone(),
            tokens: generation.prompt.iter().chain(output).copied().collect(),
            generated_tokens: output.len() as u32,
            sampling: Some((&generation.sampling).into()),
            deadline_seconds: SCORE_TIMEOUT.as_secs_f64(),
        };
        let (watch, node, model, output) = (self.clone(), node.clone(), model.clone(), output.to_owned());
        let stop = self.owner.token();
        self.owner.spawn("watch", async move {
            let _place = place;
            let Some(score) = stop.run_until_cancelled(score(&node, request)).await else { return };
            match score {
                Ok(score) => watch.record(&model, Answer::new(&output, &watched.drafts, &score)),
                Err(error) => {
                    debug!(model, node = node.info.node_id, %error, "an answer was not scored");
                    watch.metrics.watch.dropped(&model);
                }
            }
        });
    }

    fn record(&self, model: &str, answer: Option<Answer>) {
        let Some(answer) = answer else { return self.metrics.watch.failed(model) };
        let Answer { tokens, agreed, decode_nats, full_nats, parted_at } = answer;
        self.metrics.watch.scored(model, tokens, agreed, [decode_nats, full_nats], parted_at);
        let mut recent = self.recent.lock();
        let answers = recent.entry(model.to_owned()).or_default();
        if answers.len() == RECENT_ANSWERS {
            answers.pop_front();
        }
        answers.push_back(answer);
    }

    /// The last watched answers of a model; `None` if there is none.
    pub fn summary(&self, model: &str) -> Option<Summary> {
        self.recent.lock().get(model).and_then(Summary::new)
    }

    /// Gives up the answers that are not scored yet, and waits for the tasks, for at most `limit`. Returns false if some still
    /// run.
    pub async fn close(&self, limit: Duration) -> bool {
        self.owner.begin();
        self.owner.wait(limit).await
    }
}

async fn score(node: &Node, request: v1::ScoreRequest) -> Result<v1::ScoreResponse, Status> {
    let mut client = node.prefill_client();
    let late = |_| Status::deadline_exceeded("the node has not answered");
    Ok(timeout(SCORE_TIMEOUT, client.score(request)).await.map_err(late)??.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(choices: &[u32], logprobs: &[f32]) -> v1::ScoreResponse {
        v1::ScoreResponse { choices: choices.to_vec(), logprobs: logprobs.to_vec() }
    }

    #[test]
    fn tokens_of_the_full_model_do_not_count() {
        let drafts = [None, Some(-0.5), Some(-0.25), Some(f32::NEG_INFINITY)];
        let answer = Answer::new(&[1, 2, 3, 4], &drafts, &score(&[9, 2, 4, 5], &[-9.0, -1.0, -2.0, -3.0])).unwrap();
        let expected = Answer { tokens: 3, agreed: 1, decode_nats: 100.75, full_nats: 6.0, parted_at: Some(3) };
        assert_eq!(answer, expected);
    }

    #[test]
    fn a_score_that_does_not_fit_counts_as_failed() {
        let drafts = [None, Some(-0.5)];
        assert_eq!(Answer::new(&[1, 2], &drafts, &score(&[1], &[-1.0, -1.0])), None);
        assert_eq!(Answer::new(&[1, 2], &drafts, &score(&[1, 2], &[-1.0, f32::NAN])), None);
        assert_eq!(Answer::new(&[1, 2], &[None, Some(f32::NAN)], &score(&[1, 2], &[-1.0, -1.0])), None);
        assert!(Answer::new(&[1, 2], &drafts, &score(&[1, 2], &[f32::NAN, -1.0])).is_some());
    }

    #[test]
    fn the_summary_weights_tokens_equally() {
        let answer =
            |tokens, agreed, full_nats, parted_at| Answer { tokens, agreed, decode_nats: 1.0, full_nats, parted_at };
        let answers = VecDeque::from([
            answer(10, 10, 1.0, None),
            answer(30, 20, 9.0, Some(2)),
            answer(0, 0, 1.0, None),
            answer(60, 30, 13.0, Some(50)),
            answer(100, 90, 1.0, Some(7)),
        ]);
        let summary = Summary::new(&answers).unwrap();
        let expected = Summary {
            answers: 5,
            tokens: 200,
            agreement: 0.75,
            logprob_gap_nats: 0.1,
            parted_answers: 3,
            median_parted_at_tokens: 7,
        };
        assert_eq!(summary, expected);
        assert_eq!(Summary::new(&VecDeque::new()), None);
    }
}
