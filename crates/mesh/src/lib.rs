//! The request engine: a role is a list of [`Element`]s, the runner walks connections through it, and what a
//! connection holds is a list of [`Lease`]s.
//!
//! The decisions (path, tokens' life, monitor matching, refresh timing) are pure functions here and in
//! `nsm-api`; clocks and chance are arguments.

// The clock is `nsm_identity::clock::now()`.
#![warn(clippy::disallowed_methods)]

pub mod auth;
pub mod chain;
pub mod dial;
pub mod error;
pub mod fds;
mod feed;
pub mod from_file;
pub mod hop;
pub mod inside;
pub mod inspect;
pub mod metrics;
pub mod monitor;
pub mod refresh;
pub mod scope;
pub mod server;
mod signers;

pub use chain::{Answer, Call, Chain, Connections, Context, Element, Next, Waiting};
pub use error::{Error, Result};
pub use hop::{Holders, NextHop};
pub use inside::Inside;
pub use inspect::{Inspector, Trail, Verdict};
pub use scope::{Lease, Reason, Release, Scope};
