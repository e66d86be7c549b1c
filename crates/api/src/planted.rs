//! Bugs that are planted to see whether the simulation finds them (`crates/sim`; feature `planted`, tests only).
//!
//! Each is an entry of [`BUGS`] and a place in the code that asks [`is`] for it:
//!
//! ```
//! use nsm_api::planted;
//! # fn give_back() {}
//! if !planted::is("ipam keeps addresses") {
//!     give_back();
//! }
//! ```
//!
//! Without the feature that is never so, and nothing of it is in a program.

/// What can be planted, in a few words that say what goes wrong.
pub const BUGS: &[&str] = &[
    "a broken stream tells nobody",
    "a close is not handed on",
    "a failed request keeps what it took",
    "a reselection keeps the endpoint",
    "an address is given twice",
    "an expired certificate is still used",
    "events of a former life count",
    "garbage is collected by the wall clock",
    "ipam keeps addresses",
    "nobody mends a wire",
    "nobody refreshes",
    "nobody undoes what its caller has left",
    "nobody waits for a late close",
    "nothing expires",
    "orphans stay",
    "plans are forgotten",
    "registrations do not expire",
    "the forwarder keeps its wires",
    "VNIs are not given back",
];

/// Whether this bug is planted now.
#[cfg(not(feature = "planted"))]
#[inline(always)]
#[must_use]
pub const fn is(_: &str) -> bool {
    false
}

#[cfg(feature = "planted")]
mod ground {
    use std::sync::OnceLock;

    static PLANTED: OnceLock<&str> = OnceLock::new();

    /// Plants a bug in this process, for good.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn plant(name: &str) -> Result<(), String> {
        let bug = super::BUGS.iter().find(|bug| **bug == name);
        let bug =
            bug.ok_or_else(|| format!("no bug is called {name:?}; expected one of {:?}", super::BUGS))?;
        PLANTED.get_or_init(|| bug);
        Ok(())
    }

    /// Whether this bug is planted now.
    #[must_use]
    pub fn is(bug: &str) -> bool {
        debug_assert!(super::BUGS.contains(&bug), "{bug:?} is not in the list of bugs");
        PLANTED.get().is_some_and(|planted| *planted == bug)
    }
}

#[cfg(feature = "planted")]
pub use ground::{is, plant};
