//! nsm.
fn main() {}
