//! Mechanisms: how two neighbours join their ends (spec/control-plane.md section 3).

use std::{collections::BTreeMap, fmt, net::IpAddr, str::FromStr};

use crate::pb::connection::Mechanism;

/// `Mechanism.cls` of a mechanism within one node.
pub const LOCAL: &str = "LOCAL";
/// `Mechanism.cls` of a mechanism between nodes.
pub const REMOTE: &str = "REMOTE";

/// `Mechanism.type` values that this mesh builds or passes on.
pub mod kind {
    /// A kernel interface in a network namespace.
    pub const KERNEL: &str = "KERNEL";
    /// A VXLAN tunnel between two nodes (RFC 7348).
    pub const VXLAN: &str = "VXLAN";
    /// A shared-memory packet interface.
    pub const MEMIF: &str = "MEMIF";
    /// Nothing: the ends are joined elsewhere.
    pub const NOOP: &str = "NOOP";
}

/// Parameter names, exact (spec/control-plane.md 3.1, 3.2).
pub mod key {
    /// A reference to a namespace or socket file, see [`super::InodeUrl`].
    pub const INODE_URL: &str = "inodeURL";
    /// Interface name.
    pub const NAME: &str = "name";
    /// Tunnel end next to the client.
    pub const SRC_IP: &str = "src_ip";
    /// Tunnel end next to the endpoint.
    pub const DST_IP: &str = "dst_ip";
    /// UDP port at `src_ip`.
    pub const SRC_PORT: &str = "src_port";
    /// UDP port at `dst_ip`.
    pub const DST_PORT: &str = "dst_port";
    /// `src_ip` before a proxy between domains rewrote it.
    pub const ORIG_SRC_IP: &str = "orig_src_ip";
    /// `dst_ip` before a proxy between domains rewrote it.
    pub const ORIG_DST_IP: &str = "orig_dst_ip";
    /// VXLAN network identifier, 24 bit.
    pub const VNI: &str = "vni";
    /// What the tunnel can carry, decimal.
    pub const MTU: &str = "MTU";
    /// Ours: the workload wants its interface without addresses and routes (a function that joins two
    /// wires). Upstream forwarders ignore it.
    pub const UNNUMBERED: &str = "nsmUnnumbered";
    /// Ours: hardware address of the interface next to the client. Whoever is offered it answers [`DST_MAC`], and neither
    /// end has to ask for the other's. Upstream forwarders ignore it.
    pub const SRC_MAC: &str = "nsmSrcMac";
    /// Ours: hardware address of the interface next to the endpoint.
    pub const DST_MAC: &str = "nsmDstMac";
}

/// The fixed VXLAN port (RFC 7348, IANA).
pub const VXLAN_PORT: u16 = 4789;

/// A file named by device and inode: the only reference to a namespace that has a meaning between processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InodeUrl {
    /// `st_dev`
    pub dev: u64,
    /// `st_ino`
    pub ino: u64,
}

/// Not of the form `inode://DEV/INO`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a file reference: expected inode://DEVICE/INODE, both decimal")]
pub struct BadInodeUrl(pub String);

impl fmt::Display for InodeUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "inode://{}/{}", self.dev, self.ino)
    }
}

impl FromStr for InodeUrl {
    type Err = BadInodeUrl;

    fn from_str(s: &str) -> Result<Self, BadInodeUrl> {
        let bad = || BadInodeUrl(s.chars().take(80).collect());
        let (dev, ino) = s.strip_prefix("inode://").and_then(|rest| rest.split_once('/')).ok_or_else(bad)?;
        let number = |n: &str| if n.bytes().all(|b| b.is_ascii_digit()) { n.parse().ok() } else { None };
        Ok(Self { dev: number(dev).ok_or_else(bad)?, ino: number(ino).ok_or_else(bad)? })
    }
}

impl Mechanism {
    /// A mechanism without parameters.
    #[must_use]
    pub fn new(cls: &str, kind: &str) -> Self {
        Self { cls: cls.into(), r#type: kind.into(), parameters: BTreeMap::new(), ..Self::default() }
    }

    /// A kernel interface of this name (empty: the other side or a generator names it) in this namespace.
    #[must_use]
    pub fn kernel(name: &str, netns: Option<InodeUrl>) -> Self {
        let mut m = Self::new(LOCAL, kind::KERNEL);
        if !name.is_empty() {
            m.set(key::NAME, name);
        }
        if let Some(url) = netns {
            m.set(key::INODE_URL, url.to_string());
        }
        m
    }

    /// A parameter that is there and not empty.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.parameters.get(key).map(String::as_str).filter(|v| !v.is_empty())
    }

    /// Sets a parameter.
    pub fn set(&mut self, key: &str, value: impl Into<String>) {
        self.parameters.insert(key.into(), value.into());
    }

    /// A decimal parameter; missing or unreadable is `None`, as upstream reads it (section 3.1).
    #[must_use]
    pub fn number<T: FromStr>(&self, key: &str) -> Option<T> {
        self.get(key)?.parse().ok()
    }

    /// An address parameter.
    #[must_use]
    pub fn ip(&self, key: &str) -> Option<IpAddr> {
        self.number(key)
    }

    /// The VNI, where there is one: 0 counts as unset.
    #[must_use]
    pub fn vni(&self) -> Option<u32> {
        self.number(key::VNI).filter(|v| (1..1 << 24).contains(v))
    }

    /// The file reference, if it has the form that goes between processes. `Ok(None)`: there is none.
    ///
    /// # Errors
    /// A value of another form.
    pub fn inode(&self) -> Result<Option<InodeUrl>, BadInodeUrl> {
        self.get(key::INODE_URL).map(str::parse).transpose()
    }

    /// Whether a Go peer would read this boolean parameter as true (section 3).
    #[must_use]
    pub fn is_true(&self, key: &str) -> bool {
        matches!(self.get(key), Some("1" | "t" | "T" | "true" | "TRUE" | "True"))
    }
}

/// Moves the mechanisms of these types to the front, in this order; the rest follow as they stood (section 8.6).
pub fn prioritise(preferences: &mut [Mechanism], priority: &[String]) {
    preferences.sort_by_key(|m| {
        priority.iter().position(|kind| kind.eq_ignore_ascii_case(&m.r#type)).unwrap_or(priority.len())
    });
}

/// Whether a VNI drawn by the destination side must be even (section 3.5 rule 4): the two forwarders of a
/// node pair never collide when both allocate towards each other.
#[must_use]
pub fn vni_is_even(m: &Mechanism) -> bool {
    let end = |orig: &str, plain: &str| match m.parameters.get(orig) {
        Some(value) => value.parse::<IpAddr>().ok(),
        None => m.ip(plain),
    };
    let wide = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    match (end(key::ORIG_SRC_IP, key::SRC_IP), end(key::ORIG_DST_IP, key::DST_IP)) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(a), Some(b)) => wide(a) <= wide(b),
    }
}

/// An interface name for a service: `<service cut to 10>-<random>`, 15 characters in all (section 3.4).
/// `random` yields values below 62.
pub fn interface_name(service: &str, mut random: impl FnMut() -> u8) -> String {
    const ALPHABET: &[u8; 62] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    // A service name may hold what an interface name must not.
    let mut name: String =
        service.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.@".contains(*c)).take(10).collect();
    name.push('-');
    while name.len() < 15 {
        name.push(char::from(ALPHABET[usize::from(random()) % ALPHABET.len()]));
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inode_urls() {
        let url: InodeUrl = "inode://4/4026532001".parse().unwrap();
        assert_eq!(url, InodeUrl { dev: 4, ino: 4026532001 });
        assert_eq!(url.to_string(), "inode://4/4026532001");
        for bad in [
            "",
            "inode://4",
            "inode://4/",
            "inode:///4",
            "file:///proc/1/ns/net",
            "inode://-1/2",
            "inode://+1/2",
            "inode://1/2/3",
        ] {
            assert!(bad.parse::<InodeUrl>().is_err(), "{bad}");
        }
    }

    #[test]
    fn vni_parity_follows_the_addresses() {
        let m = |src: &str, dst: &str| {
            let mut m = Mechanism::new(REMOTE, kind::VXLAN);
            m.set(key::SRC_IP, src);
            m.set(key::DST_IP, dst);
            m
        };
        assert!(vni_is_even(&m("10.0.0.1", "10.0.0.2")));
        assert!(!vni_is_even(&m("10.0.0.2", "10.0.0.1")));
        assert!(vni_is_even(&m("10.0.0.1", "10.0.0.1")));
        assert!(vni_is_even(&m("nonsense", "10.0.0.1")));
        assert!(!vni_is_even(&m("10.0.0.1", "")));
        let mut proxied = m("192.0.2.9", "10.0.0.1");
        proxied.set(key::ORIG_SRC_IP, "10.0.0.0");
        assert!(vni_is_even(&proxied));
    }

    #[test]
    fn what_has_priority_comes_first_and_the_rest_keeps_its_order() {
        let order = |priority: &[&str]| {
            let mut preferences =
                ["VXLAN", "WIREGUARD", "IPSEC", "VLAN"].map(|kind| Mechanism::new(REMOTE, kind));
            prioritise(&mut preferences, &priority.iter().map(|kind| (*kind).to_owned()).collect::<Vec<_>>());
            preferences.map(|m| m.r#type).join(" ")
        };
        assert_eq!(order(&[]), "VXLAN WIREGUARD IPSEC VLAN");
        assert_eq!(order(&["ipsec"]), "IPSEC VXLAN WIREGUARD VLAN");
        assert_eq!(order(&["Vlan", "SRV6", "wireguard"]), "VLAN WIREGUARD VXLAN IPSEC");
    }

    #[test]
    fn names_fit_the_kernel() {
        assert_eq!(interface_name("my-service-of-some-length", || 0), "my-service-0000");
        assert_eq!(interface_name("a/b c", || 61), "abc-ZZZZZZZZZZZ");
    }

    #[test]
    fn every_name_that_is_drawn_is_one_of_the_kernels() {
        // Every character that fits into two bytes, and some that do not, at the beginning, and after 9 bytes.
        for character in (0..0x0800).chain([0x2028, 0xfeff, 0x1_f600]).filter_map(char::from_u32) {
            for service in [format!("{character}"), format!("123456789{character}rest")] {
                for random in 0..=u8::MAX {
                    let name = interface_name(&service, || random);
                    assert_eq!(name.len(), 15, "{service:?}");
                    assert!(
                        name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.@".contains(&b)),
                        "{name:?}"
                    );
                }
            }
        }
    }

    proptest::proptest! {
        /// Both sides of a tunnel know by themselves who draws even numbers, and never both do.
        #[test]
        fn of_two_ends_one_draws_even_numbers(a: IpAddr, other: IpAddr, same: bool) {
            let b = if same { a } else { other };
            let even = |src: IpAddr, dst: IpAddr| {
                let mut m = Mechanism::new(REMOTE, kind::VXLAN);
                m.set(key::SRC_IP, src.to_string());
                m.set(key::DST_IP, dst.to_string());
                vni_is_even(&m)
            };
            proptest::prop_assert_eq!(even(a, b) == even(b, a), a.to_canonical() == b.to_canonical());
        }
    }

    #[test]
    fn parameters() {
        let mut m = Mechanism::kernel("nsm0", None);
        assert_eq!((m.get(key::NAME), m.get(key::INODE_URL), m.inode()), (Some("nsm0"), None, Ok(None)));
        m.set(key::VNI, "16777216");
        assert_eq!(m.vni(), None);
        m.set(key::VNI, "7");
        assert_eq!(m.vni(), Some(7));
        m.set(key::INODE_URL, "/etc/passwd");
        assert!(m.inode().is_err());
    }
}
