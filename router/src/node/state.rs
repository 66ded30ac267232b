//! Whether a node gets requests.

/// Whether a node gets requests, or the kind of reason why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// It gets requests.
    Up,
    /// It failed requests. It gets none for up to 30 s, then one as a probe.
    Paused,
    /// It takes no new requests, and ends.
    Draining,
    /// It answers, but no node of the other role that is up may work with it, or the router may not.
    Incompatible,
    /// Its engine makes no progress.
    Stalled,
    /// It can't be reached.
    Down,
}

impl NodeState {
    /// Every state.
    pub const ALL: [Self; 6] = [Self::Up, Self::Paused, Self::Draining, Self::Incompatible, Self::Stalled, Self::Down];

    /// Name of the state in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Paused => "paused",
            Self::Draining => "draining",
            Self::Incompatible => "incompatible",
            Self::Stalled => "stalled",
            Self::Down => "down",
        }
    }
}
