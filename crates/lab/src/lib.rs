//! A mesh on one machine: namespaces, real programs, expectations, leak snapshots.
