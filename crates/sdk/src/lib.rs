//! Clients and endpoints: the public library.
