//! The receivers that this side sends to: its name there, their communicator, and pauses after failed joins.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::{CommunicatorId, NcclError, SenderId};

/// Receivers that this side remembers.
const MAX: usize = 1024;
/// Pause after the first join that failed. Each further one doubles it.
const PAUSE: Duration = Duration::from_secs(1);
/// A pause is at most this long.
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// What is known of one receiver.
struct Endpoint {
    /// This side's name for NCCL there. A communicator has one for its whole life.
    sender: SenderId,
    id: Option<CommunicatorId>,
    /// Joins that failed, without one between them that worked.
    failed: u32,
    /// No join before this time.
    paused_until: Option<Instant>,
}

/// Receivers by their addresses.
///
/// Each join that fails costs the receiver a thread: NCCL starts it for the id, and it waits for both ranks without end. So a
/// sender whose joins fail waits longer and longer between two of them.
#[derive(Default)]
pub(super) struct Endpoints(HashMap<String, Endpoint>);

impl Endpoints {
    /// This side's name at the receiver at `endpoint`: the one of their communicator, else `proposed`.
    pub fn introduce(&mut self, endpoint: String, proposed: SenderId, now: Instant) -> Result<SenderId, NcclError> {
        if self.0.len() >= MAX {
            self.0.retain(|_, known| known.id.is_some() || known.paused_until.is_some_and(|until| until > now));
        }
        if self.0.len() >= MAX && !self.0.contains_key(&endpoint) {
            return Err(NcclError::Busy("receivers"));
        }
        let new = || Endpoint { sender: proposed, id: None, failed: 0, paused_until: None };
        let known = self.0.entry(endpoint).or_insert_with(new);
        match known.paused_until {
            Some(until) if until > now => return Err(NcclError::Paused(known.failed)),
            Some(_) => (known.sender, known.paused_until) = (proposed, None),
            None => {}
        }
        Ok(known.sender)
    }

    /// The receiver has named a communicator. Returns the one before, which has ended there.
    pub fn name(&mut self, endpoint: &str, id: CommunicatorId) -> Result<Option<CommunicatorId>, NcclError> {
        let known = self.0.get_mut(endpoint).ok_or(NcclError::Ended)?;
        Ok(known.id.replace(id).filter(|before| *before != id))
    }

    /// A communicator has been joined.
    pub fn joined(&mut self, id: &CommunicatorId) {
        if let Some(known) = self.0.values_mut().find(|known| known.id == Some(*id)) {
            (known.failed, known.paused_until) = (0, None);
        }
    }

    /// A communicator has ended. The next one needs a new name, since the receiver may still know the old one.
    pub fn ended(&mut self, id: &CommunicatorId, joined: bool, now: Instant) {
        let Some(endpoint) = self.0.iter().find(|(_, known)| known.id == Some(*id)).map(|(name, _)| name.clone())
        else {
            return;
        };
        if joined {
            self.0.remove(&endpoint);
        }
        if let Some(known) = self.0.get_mut(&endpoint) {
            known.id = None;
            known.paused_until = Some(now + MAX_PAUSE.min(PAUSE.saturating_mul(1 << known.failed.min(16))));
            known.failed += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nccl::ID_BYTES;

    const AT: &str = "receiver:1";

    fn id(n: u8) -> CommunicatorId {
        CommunicatorId([n; ID_BYTES])
    }

    fn sender(n: u8) -> SenderId {
        SenderId([n; 16])
    }

    fn introduce(endpoints: &mut Endpoints, n: u8, now: Instant) -> Option<SenderId> {
        endpoints.introduce(AT.into(), sender(n), now).ok()
    }

    #[test]
    fn failed_joins_pause_longer_and_longer() {
        let mut endpoints = Endpoints::default();
        let mut now = Instant::now();
        for (n, pause) in [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 32), (7, 60), (8, 60)] {
            assert_eq!(introduce(&mut endpoints, n, now), Some(sender(n)));
            assert_eq!(introduce(&mut endpoints, 99, now), Some(sender(n)), "two handoffs share the communicator");
            assert_eq!(endpoints.name(AT, id(n)).unwrap(), None);
            endpoints.ended(&id(n), false, now);
            now += Duration::from_millis(pause * 1000 - 1);
            assert_eq!(introduce(&mut endpoints, 99, now), None);
            now += Duration::from_millis(2);
        }
        assert!(introduce(&mut endpoints, 9, now).is_some());
        endpoints.name(AT, id(9)).unwrap();
        endpoints.joined(&id(9));
        endpoints.ended(&id(9), true, now);
        assert_eq!(introduce(&mut endpoints, 10, now), Some(sender(10)), "it has worked, so nothing pauses");
    }

    #[test]
    fn receivers_are_limited() {
        let mut endpoints = Endpoints::default();
        let now = Instant::now();
        for i in 0..MAX {
            let name = format!("receiver:{i}");
            endpoints.introduce(name.clone(), sender(1), now).unwrap();
            endpoints.name(&name, id(i as u8)).unwrap();
        }
        assert!(matches!(endpoints.introduce("one:more".into(), sender(1), now), Err(NcclError::Busy(_))));
        assert!(introduce(&mut endpoints, 1, now).is_some(), "a known one");
    }
}
