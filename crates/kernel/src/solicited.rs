//! The moment between adding an IPv6 address and hearing who looks for it.
//!
//! The kernel joins the solicited-node group of a new address from a work queue, also where duplicate address
//! detection is off (`addrconf_dad_work` in `net/ipv6/addrconf.c`). Until then it drops the neighbour solicitations of
//! the other end, which asks again after a second: the first packet of a wire would take that long.

use std::fs;
use std::net::Ipv6Addr;
use std::thread;
use std::time::{Duration, Instant};

/// Groups of the calling thread's namespace; `/proc/net` would be those of the process.
const GROUPS: &str = "/proc/thread-self/net/igmp6";
/// The queue normally runs within a tenth of a millisecond.
const PAUSE: Duration = Duration::from_micros(100);
/// A wire whose first packet may be late is better than none.
const PATIENCE: Duration = Duration::from_secs(1);

/// Waits until the interface has joined the groups of all these addresses.
pub(crate) fn await_groups(ifname: &str, addresses: impl Iterator<Item = Ipv6Addr>) {
    let mut missing: Vec<_> = addresses.map(group).collect();
    let end = Instant::now() + PATIENCE;
    while !missing.is_empty() {
        let joined = fs::read_to_string(GROUPS).unwrap_or_default();
        missing.retain(|group| !joined.lines().any(|line| is_joined(line, ifname, group)));
        if !missing.is_empty() && Instant::now() >= end {
            tracing::warn!(
                ifname,
                ?missing,
                "the first packet to an IPv6 address may be late: group not joined"
            );
            return;
        }
        if !missing.is_empty() {
            thread::sleep(PAUSE);
        }
    }
}

/// The solicited-node group of an address (RFC 4291 section 2.7.1), as `/proc` writes it.
fn group(address: Ipv6Addr) -> String {
    let [.., a, b, c] = address.octets();
    format!("ff0200000000000000000001ff{a:02x}{b:02x}{c:02x}")
}

/// Whether a line (index, interface, group, users, flags, timer) says so.
fn is_joined(line: &str, ifname: &str, group: &str) -> bool {
    let mut words = line.split_whitespace().skip(1);
    words.next() == Some(ifname) && words.next() == Some(group)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_found_on_its_interface_only() {
        let group = group("2001:db8::12:3456".parse().expect("address"));
        assert_eq!(group, "ff0200000000000000000001ff123456");
        let line = "71   nsm0            ff0200000000000000000001ff123456     1 00000004 0";
        assert!(is_joined(line, "nsm0", &group));
        assert!(!is_joined(line, "nsm", &group));
        assert!(!is_joined("", "nsm0", &group));
    }
}
