//! KV over TCP: a connection per handoff, plain or over any other stream. The wire is in [`frame`].

mod connection;
pub mod frame;
mod link;
mod listener;
mod newcomers;
pub(crate) mod payload;
mod sender;

pub use link::{Dialer, Link, Opening, PlainListener, plain_dialer};
pub(crate) use listener::accept;
pub(crate) use sender::send;
