//! The forwarder: turns connections into wires of the kernel. Its chain is the list in [`chain`].

// The clock is `nsm_identity::clock::now()`.
#![warn(clippy::disallowed_methods)]

pub mod cross_connect;
pub mod discover;
pub mod machine;
mod serve;
mod tell;
pub mod tunnel;
pub mod wires;

pub use serve::{Config, Forwarder, Running, chain};
