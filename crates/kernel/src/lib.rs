//! Linux: namespaces, netlink, sysctls; wires as plans, apply and snapshot apart.
//!
//! [`plan`] says what shall be, as pure data. [`Kernel::apply`] makes the kernel equal to it, [`Kernel::snapshot`]
//! reads the kernel back into the same types, [`Kernel::remove`] deletes. All is synchronous and by netlink: no
//! program is started, no device is ever moved, and nothing stays open in the namespace of a pod.
//!
//! ```no_run
//! # fn main() -> nsm_kernel::Result<()> {
//! use nsm_kernel::netns::Namespace;
//! use nsm_kernel::plan::{EndPlan, Side, WirePlan};
//! use nsm_kernel::Kernel;
//!
//! let kernel = Kernel::new(Namespace::current()?)?;
//! let (client, endpoint) = (Namespace::named("client")?, Namespace::named("endpoint")?);
//! let near = EndPlan::new(Side::Near, client.id(), "nsm0", "nsc-0");
//! let far = EndPlan::new(Side::Far, endpoint.id(), "nse-0", "nsc-0");
//! let wire = WirePlan::veth("5b0e", near, far);
//! assert!(kernel.apply(&wire, &[&client, &endpoint])?.created);
//! assert_eq!(kernel.apply(&wire, &[])?.writes, 0);
//! # Ok(()) }
//! ```

mod apply;
mod backlog;
mod crew;
mod desk;
mod error;
pub mod join;
pub mod joiner;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod plan;
mod reaper;
pub mod resident;
mod rt;
mod snapshot;
mod solicited;
pub mod store;
mod sync;
mod sys;
pub mod sysctl;
pub mod travellers;
pub mod watch;

pub use apply::{Applied, EndState, Kernel, Nsids};
pub use error::{Error, Refusal, Result};
pub use rt::{Counters, Nsid, PROTOCOL};
pub use snapshot::{EndFacts, Owned, Snapshot, Uplink, difference};
