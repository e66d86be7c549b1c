//! A mesh on one machine: namespaces, real programs, expectations, leak snapshots.
//!
//! A [`Scenario`] file becomes a [`Plan`] (pure data); a *holder* process builds the plan, watches over it, checks
//! the expectations and takes everything down; [`Front`] is what the person at the terminal talks to.

mod chance;
mod chaos;
mod confine;
mod disk;
mod dns;
mod error;
mod expect;
mod fault;
mod front;
mod holder;
mod lab;
pub mod leaks;
mod logs;
pub mod network;
pub mod plan;
pub mod probe;
pub mod process;
mod relay;
pub mod report;
pub mod scenario;
pub mod serve;

pub use chaos::{Chaos, Plan as ChaosPlan, Round, Strike};
pub use confine::{is_privileged, run_in_memory, settle_in, start_confined};
pub use error::Error;
pub use expect::Outcome;
pub use fault::Struck;
pub use front::Front;
pub use holder::{Event, Hold, hold, on_signals};
pub use lab::{Lab, ProcessState, State, leftovers, remove};
pub use logs::Logged;
pub use plan::Plan;
pub use report::{Format, Report};
pub use scenario::Scenario;
