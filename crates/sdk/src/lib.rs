//! The public library: clients and endpoints of a network service mesh.

pub mod client;
pub mod endpoint;
pub mod failures;
pub mod ipam;
pub mod liveness;
pub mod own_end;
mod predecessor;
pub mod prefix_client;
pub mod prefix_server;
pub mod prefixes;
pub mod provides;
