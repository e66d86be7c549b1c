//! The manager: one per node, between workloads, forwarders and other managers.
