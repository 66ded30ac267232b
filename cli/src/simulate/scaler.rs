//! The horizontal autoscaler of Kubernetes, with the behaviour that our chart configures.
//!
//! Source: <https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/>, "Algorithm details" and
//! "Configurable scaling behavior".

use std::collections::VecDeque;

/// Seconds between two looks of the autoscaler.
pub const PERIOD_SECONDS: f64 = 15.0;
/// The number of nodes is kept if the load per node differs from its target by at most this share.
const TOLERANCE: f64 = 0.1;
/// Most nodes that are added in a minute, unless the pool doubles.
const MOST_ADDED: usize = 4;
/// Seconds in which at most [`MOST_ADDED`] nodes, or as many as there are, are added, and at most one is removed.
const POLICY_SECONDS: f64 = 60.0;

/// Settings of a pool's autoscaler.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scaling {
    /// Fewest nodes.
    pub min: usize,
    /// Most nodes.
    pub max: usize,
    /// Load per node that is aimed at.
    pub target: f64,
    /// A pool shrinks to the highest number of nodes that was right in this time, in seconds.
    pub down_seconds: f64,
}

/// The autoscaler of one pool.
#[derive(Debug)]
pub struct Scaler {
    scaling: Scaling,
    /// Earlier recommendations, and their times.
    recommended: VecDeque<(f64, usize)>,
    /// Numbers of nodes that the pool had, and since when.
    sizes: VecDeque<(f64, usize)>,
    /// When there was load last.
    busy: f64,
}

impl Scaler {
    /// An autoscaler of a pool that has `nodes` nodes at time 0.
    pub fn new(scaling: Scaling, nodes: usize) -> Self {
        Self { scaling, recommended: VecDeque::new(), sizes: [(f64::MIN, nodes)].into(), busy: 0.0 }
    }

    /// The number of nodes that the pool should have. `load`: the load of the whole pool; `nodes`: those it has, ready or
    /// not.
    pub fn wanted(&mut self, now: f64, load: f64, nodes: usize) -> usize {
        let Scaling { min, max, target, down_seconds } = self.scaling;
        if load > 0.0 {
            self.busy = now;
        }
        // A pool without nodes gets its first one from KEDA, which looks whether there is any load.
        if nodes == 0 {
            let first = if load > 0.0 { min.max(1) } else { min };
            return self.resized(now, first, nodes);
        }
        let per_node = load / (nodes as f64 * target);
        let right = if (per_node - 1.0).abs() <= TOLERANCE { nodes } else { (load / target).ceil() as usize };
        let right = right.clamp(min.max(1), max);
        self.recommended.push_back((now, right));
        while self.recommended.front().is_some_and(|(at, _)| *at < now - down_seconds) {
            self.recommended.pop_front();
        }
        let highest = self.recommended.iter().map(|(_, nodes)| *nodes).max().unwrap_or(right);
        if right > nodes {
            let before = self.fewest(now);
            let most = (2 * before).max(before + MOST_ADDED).max(nodes);
            return self.resized(now, right.min(most), nodes);
        }
        // KEDA removes the last node after the cool-down.
        if min == 0 && load == 0.0 && nodes == 1 && now - self.busy >= down_seconds {
            return self.resized(now, 0, nodes);
        }
        let least = self.most(now).saturating_sub(1).min(nodes);
        self.resized(now, highest.min(nodes).max(least), nodes)
    }

    fn resized(&mut self, now: f64, wanted: usize, nodes: usize) -> usize {
        if wanted != nodes {
            self.sizes.push_back((now, wanted));
        }
        // The first entry that is kept was the size at the beginning of the period.
        while self.sizes.get(1).is_some_and(|(at, _)| *at <= now - POLICY_SECONDS) {
            self.sizes.pop_front();
        }
        wanted
    }

    fn fewest(&self, now: f64) -> usize {
        self.within(now).min().unwrap_or(0)
    }

    fn most(&self, now: f64) -> usize {
        self.within(now).max().unwrap_or(0)
    }

    /// The sizes that the pool had in the period before `now`.
    fn within(&self, now: f64) -> impl Iterator<Item = usize> {
        let last_before = self.sizes.iter().rposition(|(at, _)| *at <= now - POLICY_SECONDS).unwrap_or(0);
        self.sizes.iter().skip(last_before).map(|(_, nodes)| *nodes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaler(min: usize, nodes: usize) -> Scaler {
        Scaler::new(Scaling { min, max: 20, target: 0.5, down_seconds: 300.0 }, nodes)
    }

    #[test]
    fn a_pool_grows_by_four_or_by_half_of_itself_in_a_minute() {
        let mut pool = scaler(1, 1);
        assert_eq!(pool.wanted(0.0, 0.52, 1), 1);
        assert_eq!(pool.wanted(15.0, 100.0, 1), 5);
        assert_eq!(pool.wanted(30.0, 100.0, 5), 5);
        assert_eq!(pool.wanted(75.0, 100.0, 5), 10);
        assert_eq!(pool.wanted(135.0, 100.0, 10), 20);
    }

    #[test]
    fn a_pool_shrinks_one_by_one_when_the_load_has_been_low_for_long() {
        let mut pool = scaler(1, 4);
        assert_eq!(pool.wanted(0.0, 2.0, 4), 4);
        assert_eq!(pool.wanted(150.0, 0.5, 4), 4);
        assert_eq!(pool.wanted(315.0, 0.5, 4), 3);
        assert_eq!(pool.wanted(330.0, 0.5, 3), 3);
        assert_eq!(pool.wanted(375.0, 0.5, 3), 2);
        assert_eq!(pool.wanted(435.0, 0.0, 2), 1);
        assert_eq!(pool.wanted(495.0, 0.0, 1), 1);
    }

    #[test]
    fn a_pool_of_zero_wakes_up_and_goes_to_sleep() {
        let mut pool = scaler(0, 0);
        assert_eq!(pool.wanted(0.0, 0.0, 0), 0);
        assert_eq!(pool.wanted(15.0, 0.01, 0), 1);
        assert_eq!(pool.wanted(30.0, 0.0, 1), 1);
        assert_eq!(pool.wanted(330.0, 0.0, 1), 0);
    }
}
