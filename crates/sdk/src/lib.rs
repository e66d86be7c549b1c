//! The public library: clients, endpoints and network functions of a network service mesh. [`program`] is the short way
//! into it; `examples/` of the repository has whole programs.

// The clock is `nsm_identity::clock::now()`.
#![warn(clippy::disallowed_methods)]

pub mod client;
pub mod dns;
pub mod endpoint;
pub mod failures;
mod groups;
pub mod ipam;
pub mod liveness;
pub mod own_end;
mod predecessor;
pub mod prefix_client;
pub mod prefix_server;
pub mod prefixes;
pub mod program;
pub mod provides;
pub mod single_point;

pub use nsm_api::pb;
pub use nsm_mesh::{Chain, Context, Element, Error, Lease, Next, Release, Result, chain};
pub use program::{Program, Serving};
