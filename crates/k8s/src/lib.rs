//! What this mesh has to do with Kubernetes. Nobody else in it knows the client library.
//!
//! [`crd`] are the two resources of `networkservicemesh.io/v1` as they are installed, [`resource`] what stands in them
//! and what it means in the protocol's terms; [`objects`] is an API server for those who take objects as they are.

pub mod crd;
pub mod objects;
pub mod resource;
