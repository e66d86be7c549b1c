//! Network functions: endpoint, passthrough, firewall.
