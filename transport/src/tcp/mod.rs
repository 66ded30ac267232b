//! KV transport over TCP, with one connection per handoff. A [`Link`] may also be TLS or another stream. [`frame`],
//! [`mod@format`] and [`hello`] define the wire format.

mod answers;
mod connection;
pub mod format;
pub mod frame;
pub mod hello;
mod link;
mod listener;
mod mover;
mod newcomers;
pub(crate) mod payload;
mod sender;
mod target;

pub use link::{Dialer, Link, Opening, PlainListener, plain_dialer};
pub(crate) use listener::accept;
pub(crate) use sender::send;
