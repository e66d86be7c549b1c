//! The forwarder: turns connections into wires of the kernel. Its chain is the list in [`chain`].

pub mod cross_connect;
pub mod discover;
pub mod machine;
mod serve;
mod tell;
pub mod tunnel;
pub mod wires;

pub use serve::{Config, Forwarder, Running, chain};
