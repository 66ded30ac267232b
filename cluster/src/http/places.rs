//! The connection limit of a server, and eviction of idle connections.
//!
//! A connection is idle while it has no request in progress: during its handshake, while the head of a request arrives,
//! and between two requests. Idle connections are closed after a time limit. If a new connection finds no free place,
//! it evicts the connection that has been idle longest. A well-behaved client is hardly affected, because it sends its
//! request right after connecting.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{ConnectionLimits, SPARE};

/// Idle limit during shutdown. It leaves time to send the last bytes of a response.
const CLOSING_GRACE: Duration = Duration::from_secs(2);

/// The connection places of one server.
pub(super) struct ConnectionPlaces {
    connections: usize,
    first_request: Duration,
    idle: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Connections that hold a place: the busy and the idle ones.
    open: usize,
    /// Connections with requests in progress.
    busy: usize,
    /// Idle connections, in the order in which they became idle.
    idle: BTreeMap<u64, Idle>,
    next_key: u64,
    closing: bool,
    /// Connections evicted since the last log message.
    evicted: usize,
    /// Connections refused since the last log message.
    refused: usize,
}

struct Idle {
    since: Instant,
    limit: Duration,
    sent_away: CancellationToken,
}

/// The place of one connection. Dropping it frees the place.
pub(super) struct ConnectionPlace {
    all: Arc<ConnectionPlaces>,
    stage: Mutex<Stage>,
    sent_away: CancellationToken,
}

enum Stage {
    /// Idle; the key in [`State::idle`]. If the key is absent there, the connection was evicted and has lost its place.
    Idle(u64),
    /// Busy; the number of requests in progress.
    Busy(usize),
}

/// A request in progress. It counts as in progress until this is dropped.
pub(super) struct InProgress {
    place: Arc<ConnectionPlace>,
    /// More connections had requests in progress than the limit when this request began.
    pub crowded: bool,
}

impl ConnectionPlaces {
    pub fn new(limits: &ConnectionLimits) -> Arc<Self> {
        let ConnectionLimits { connections, first_request, idle, .. } = *limits;
        Arc::new(Self { connections, first_request, idle, state: Mutex::default() })
    }

    /// Takes a place for a new connection. If all are taken, evicts the connection that has been idle longest. Returns
    /// `None` if all places are taken by busy connections.
    pub fn enter(self: &Arc<Self>) -> Option<Arc<ConnectionPlace>> {
        let sent_away = CancellationToken::new();
        let mut state = self.state.lock();
        if state.open >= self.connections + SPARE {
            let Some((_, longest)) = state.idle.pop_first() else {
                state.refused += 1;
                return None;
            };
            longest.sent_away.cancel();
            state.open -= 1;
            state.evicted += 1;
        }
        state.open += 1;
        let key = state.idles(self.first_request, &sent_away);
        drop(state);
        Some(Arc::new(ConnectionPlace { all: self.clone(), stage: Mutex::new(Stage::Idle(key)), sent_away }))
    }

    /// Closes connections that have been idle for too long. Logs how many were evicted or refused since the last call.
    pub fn sweep(&self) {
        let now = Instant::now();
        let mut state = self.state.lock();
        let closing = state.closing;
        let before = state.idle.len();
        state.idle.retain(|_, idle| {
            let limit = if closing { CLOSING_GRACE } else { idle.limit };
            let stays = now.saturating_duration_since(idle.since) < limit;
            if !stays {
                idle.sent_away.cancel();
            }
            stays
        });
        state.open -= before - state.idle.len();
        let (evicted, refused) = (std::mem::take(&mut state.evicted), std::mem::take(&mut state.refused));
        drop(state);
        if evicted + refused > 0 {
            warn!(limit = self.connections, evicted, refused, "connection limit reached");
        }
    }

    /// Starts the shutdown: from now on the idle limit is [`CLOSING_GRACE`].
    pub fn close(&self) {
        self.state.lock().closing = true;
    }
}

impl State {
    /// Adds a connection to `idle` and returns its key.
    fn idles(&mut self, limit: Duration, sent_away: &CancellationToken) -> u64 {
        let key = self.next_key;
        self.next_key += 1;
        self.idle.insert(key, Idle { since: Instant::now(), limit, sent_away: sent_away.clone() });
        key
    }
}

impl ConnectionPlace {
    /// Resolves when the connection has lost its place and must close.
    pub async fn lost(&self) {
        self.sent_away.cancelled().await;
    }

    /// Begins a request. The connection is busy until all its requests have ended.
    pub fn begin(self: &Arc<Self>) -> InProgress {
        let mut stage = self.stage.lock();
        let mut state = self.all.state.lock();
        match &mut *stage {
            Stage::Busy(requests) => *requests += 1,
            Stage::Idle(key) => {
                if state.idle.remove(key).is_some() {
                    state.busy += 1;
                    *stage = Stage::Busy(1);
                }
            }
        }
        InProgress { place: self.clone(), crowded: state.busy > self.all.connections }
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        let place = &self.place;
        let mut stage = place.stage.lock();
        let mut state = place.all.state.lock();
        match &mut *stage {
            Stage::Busy(1) => {
                state.busy -= 1;
                *stage = Stage::Idle(state.idles(place.all.idle, &place.sent_away));
            }
            Stage::Busy(requests) => *requests -= 1,
            // The place was already lost when the request began, so the request was not counted.
            Stage::Idle(_) => {}
        }
    }
}

impl Drop for ConnectionPlace {
    fn drop(&mut self) {
        let mut state = self.all.state.lock();
        // The stage is never `Busy` here, because every `InProgress` holds a reference to the place.
        let Stage::Idle(key) = self.stage.get_mut() else { return };
        if state.idle.remove(key).is_some() {
            state.open -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(connections: usize) -> Arc<ConnectionPlaces> {
        let seconds = Duration::from_secs;
        let limits =
            ConnectionLimits { first_request: seconds(10), idle: seconds(100), ..ConnectionLimits::http(connections) };
        ConnectionPlaces::new(&limits)
    }

    fn counts(places: &ConnectionPlaces) -> (usize, usize, usize) {
        let state = places.state.lock();
        (state.open, state.busy, state.idle.len())
    }

    #[tokio::test]
    async fn the_longest_idle_gives_way() {
        let all = places(2);
        let mut rest: Vec<_> = (0..2 + SPARE).map(|_| all.enter().unwrap()).collect();
        let (first, second, third) = (rest.remove(0), rest.remove(0), rest.remove(0));
        let request = first.begin();
        // The second connection has just ended a request, so it has been idle for the shortest time.
        drop(second.begin());
        let newcomer = all.enter().unwrap();
        assert!(third.sent_away.is_cancelled());
        assert!(![&first, &second, &newcomer].iter().any(|place| place.sent_away.is_cancelled()));
        assert_eq!(counts(&all), (2 + SPARE, 1, 1 + SPARE));
        // A request that begins on an evicted connection changes no count.
        drop(third.begin());
        drop(third);
        assert_eq!(counts(&all), (2 + SPARE, 1, 1 + SPARE));
        drop(first);
        assert_eq!(counts(&all).0, 2 + SPARE, "its request is still in progress");
        drop((request, second, newcomer, rest));
        assert_eq!(counts(&all), (0, 0, 0));
    }

    #[tokio::test]
    async fn requests_beyond_the_limit_are_told_apart_and_who_has_one_stays() {
        let all = places(2);
        let held: Vec<_> = (0..2 + SPARE).map(|_| all.enter().unwrap().begin()).collect();
        assert_eq!(held.iter().filter(|request| request.crowded).count(), SPARE);
        assert!(all.enter().is_none());
        drop(held);
        let place = all.enter().unwrap();
        let (one, two) = (place.begin(), place.begin());
        assert!(!one.crowded && !two.crowded);
        assert_eq!(counts(&all), (1, 1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_idle_for_long_is_sent_away() {
        let all = places(4);
        let (silent, kept, busy) = (all.enter().unwrap(), all.enter().unwrap(), all.enter().unwrap());
        drop(kept.begin());
        let request = busy.begin();
        let sweep_after = async |seconds| {
            tokio::time::advance(Duration::from_secs(seconds)).await;
            all.sweep();
            [&silent, &kept, &busy].map(|place| place.sent_away.is_cancelled())
        };
        assert_eq!(sweep_after(9).await, [false, false, false]);
        assert_eq!(sweep_after(1).await, [true, false, false]);
        assert_eq!(sweep_after(90).await, [true, true, false]);
        all.close();
        assert_eq!(sweep_after(10).await, [true, true, false]);
        drop(request);
        assert_eq!(sweep_after(1).await, [true, true, false]);
        assert_eq!(sweep_after(1).await, [true, true, true]);
        assert_eq!(counts(&all), (0, 0, 0));
    }
}
