//! The directory of services and endpoints: model, matching, watch, expiry, stores.

pub mod expiry;
pub mod path;
pub mod store;
