//! Network functions: firewall and passthrough, which stand in a wire between a client and an endpoint.
//!
//! [`rules`] reads what a firewall is told, [`filter`] says it in nftables (both pure), [`works`] keeps interfaces
//! joined and filtered, [`function`] is the chain that serves a connection by a request of its own.

pub mod filter;
pub mod function;
pub mod rules;
pub mod works;
