//! Names in a pod: a local forwarder that asks the DNS servers of every wire, with the search domains of each
//! (spec/control-plane.md 11.4, spec/kubernetes.md 5).
//!
//! [`forwarder::Forwarder`] is the protocol without sockets: packets, time and chance go in, actions come out. [`serve`]
//! gives it sockets, [`resolv`] makes `/etc/resolv.conf` point to it and back, [`Names`] is all of it for a client.

pub mod cache;
pub mod config;
pub mod forwarder;
pub mod message;
mod names;
pub mod resolv;
pub mod serve;

pub use config::Config;
pub use names::{Names, Options};
