//! Identities on Kubernetes, without SPIRE: who a process is follows from the pod that it runs in.
//!
//! ```text
//!  pod ── Workload API ──► agent, one on each node            signer, several for the cluster
//!         (unix socket)    kernel: process → pod's UID  ────► API server: this token is of the agent on node N
//!                          makes a key                  https API server: this UID is a pod on node N, called so
//!                          ◄───────────────────────────────── signs for spiffe://DOMAIN/ns/NAMESPACE/pod/NAME
//! ```
//!
//! The key of the trust domain is at the signer only ([`signer`]). An agent ([`agent`]) has no rights at the API server
//! but to read whom to trust; it cannot say who a pod is, only which UID asks, and the signer believes it for pods of
//! its own node only, which the agent's token is bound to. So whoever takes a node gets the identities of that node's
//! pods and no others.
//!
//! [`pod`] tells the pod of a process, [`protocol`] is what agents and signers say to each other.

// The clock is `nsm_identity::clock::now()`.
#![warn(clippy::disallowed_methods)]

pub mod agent;
pub mod pod;
pub mod protocol;
pub mod signer;
