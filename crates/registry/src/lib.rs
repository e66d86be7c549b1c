//! The directory of services and endpoints: model, matching, watch, expiry, stores.
