//! Whose receives are posted next.

use std::collections::VecDeque;

/// Receives that may be under way at once: one that moves, and one behind it that hides the round trip of `posted`.
const UNDER_WAY: usize = 2;

/// Receives that wait, in the order of their announcements, and how many are under way.
///
/// Receives of one communicator at a time are under way. Each waits for a sender that has agreed to it. That sender's sends
/// over this communicator are in the same order, and nothing else is in front of them, since each communicator has
/// a stream of its own. So no cycle of nodes can wait for each other; a sender that is dead is ended by its deadline.
pub(super) struct Turns<K, T> {
    waiting: VecDeque<(K, T)>,
    current: Option<K>,
    under_way: usize,
}

impl<K: Copy + PartialEq, T> Turns<K, T> {
    pub fn new() -> Self {
        Self { waiting: VecDeque::new(), current: None, under_way: 0 }
    }

    pub fn push(&mut self, key: K, receive: T) {
        self.waiting.push_back((key, receive));
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether a receive of this communicator waits.
    pub fn contains(&self, key: &K) -> bool {
        self.waiting.iter().any(|(other, _)| other == key)
    }

    /// The next receive to post, if one may be. `able`: whether a communicator can post. A communicator that can't does not
    /// hold up the others; one that can waits for its turn, so that no other communicator overtakes it for ever.
    pub fn next(&mut self, able: impl Fn(&K) -> bool) -> Option<(K, T)> {
        let at = self.waiting.iter().position(|(key, _)| able(key))?;
        let key = self.waiting.get(at)?.0;
        let may = self.under_way == 0 || (self.under_way < UNDER_WAY && self.current == Some(key));
        if !may {
            return None;
        }
        self.current = Some(key);
        self.under_way += 1;
        self.waiting.remove(at)
    }

    /// A receive has ended.
    pub fn ended(&mut self) {
        self.under_way = self.under_way.saturating_sub(1);
    }

    /// Takes out the receives that wait and that nobody wants any more.
    pub fn remove_unwanted(&mut self, is_wanted: impl Fn(&T) -> bool) -> Vec<T> {
        let all = std::mem::take(&mut self.waiting);
        let (wanted, unwanted): (VecDeque<_>, VecDeque<_>) =
            all.into_iter().partition(|(_, receive)| is_wanted(receive));
        self.waiting = wanted;
        unwanted.into_iter().map(|(_, receive)| receive).collect()
    }

    /// Takes out the receives of a communicator that wait.
    pub fn remove(&mut self, key: &K) -> Vec<T> {
        let (gone, waiting) = std::mem::take(&mut self.waiting).into_iter().partition(|(other, _)| other == key);
        self.waiting = waiting;
        let gone: VecDeque<(K, T)> = gone;
        gone.into_iter().map(|(_, receive)| receive).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(turns: &mut Turns<u8, u8>) -> Vec<u8> {
        std::iter::from_fn(|| turns.next(|_| true)).map(|(_, receive)| receive).collect()
    }

    #[test]
    fn one_communicator_at_a_time_and_two_receives() {
        let mut turns = Turns::new();
        for (key, receive) in [(1, 10), (1, 11), (1, 12), (2, 20), (1, 13)] {
            turns.push(key, receive);
        }
        assert_eq!(all(&mut turns), [10, 11]);
        turns.ended();
        assert_eq!(all(&mut turns), [12]);
        turns.ended();
        assert!(all(&mut turns).is_empty(), "the other communicator is next, and 12 is under way");
        turns.ended();
        assert_eq!(all(&mut turns), [20]);
        turns.ended();
        assert_eq!(all(&mut turns), [13]);
    }

    #[test]
    fn a_communicator_that_is_not_ready_holds_up_nobody() {
        let mut turns = Turns::new();
        turns.push(1, 10);
        turns.push(2, 20);
        assert!(turns.contains(&1) && !turns.contains(&3));
        assert_eq!(turns.next(|key| *key == 2), Some((2, 20)));
        assert_eq!(turns.next(|key| *key == 2), None);
        turns.push(1, 11);
        assert_eq!(turns.remove_unwanted(|receive| *receive != 11), [11]);
        assert_eq!(turns.remove(&1), [10]);
        assert!(turns.is_empty());
    }
}
