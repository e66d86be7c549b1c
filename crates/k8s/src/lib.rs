//! What this mesh has to do with Kubernetes. Nobody else in it knows the client library.
//!
//! [`crd`] are the resources of `networkservicemesh.io/v1` as they are installed, [`resource`] what stands in them
//! and what it means in the protocol's terms. [`cluster`] is the API server, [`objects`] the same for those who take
//! objects as they are, [`authorities`] what signs certificates and is kept there, and [`keeper`] keeps in these resources
//! what is registered: any number of registries may do so side by side, upstream's among them. [`wires`] says on pods what
//! became of their wires, [`prefixes`] finds what the cluster uses itself, [`addresses`] by which addresses others reach
//! its nodes, and [`properties`] what it says of itself.

// The clock is `nsm_identity::clock::now()`.
#![warn(clippy::disallowed_methods)]

pub mod addresses;
pub mod authorities;
pub mod cluster;
pub mod convert;
pub mod crd;
mod follow;
pub mod keeper;
mod nodes;
pub mod objects;
pub mod prefixes;
pub mod properties;
pub mod resource;
mod table;
mod verdict;
pub mod wires;

#[doc(hidden)]
pub use follow::object_of;
