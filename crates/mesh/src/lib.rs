//! The request engine: chain runner, scopes and leases, path, selection, monitor, refresh.
