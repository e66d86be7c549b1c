//! What two forwarders agree on about a VXLAN tunnel: addresses, ports, VNI, MTU
//! (spec/control-plane.md 3.5 and 3.6). Pure, chance is an argument.

use std::{collections::HashMap, net::IpAddr};

use nsm_api::{
    mechanism::{REMOTE, VXLAN_PORT, key, kind, vni_is_even},
    pb::connection::{Connection, Mechanism},
};
use nsm_kernel::plan::vxlan_overhead;

/// What a connection is given when it asks for no MTU: the kernel's largest common one.
pub const DEFAULT_MTU: u32 = 9000;

/// This node's end of all tunnels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunnelEnd {
    /// Our address in the underlay.
    pub ip: IpAddr,
    /// The port we listen on.
    pub port: u16,
    /// What one of our tunnels can carry over the device that holds `ip`.
    pub mtu: u32,
}

impl TunnelEnd {
    /// At that address of a device with that MTU.
    #[must_use]
    pub fn over(ip: IpAddr, port: u16, uplink: u32) -> Self {
        // 0 would say nothing, and the kernel take its own; of 1 it says that it is too little.
        Self { ip, port, mtu: uplink.saturating_sub(vxlan_overhead(ip)).max(1) }
    }

    /// What a tunnel carries: the less of what both ends say. 0 says nothing.
    #[must_use]
    pub fn carries(&self, m: &Mechanism) -> u32 {
        m.number(key::MTU).filter(|mtu| *mtu != 0).map_or(self.mtu, |theirs: u32| theirs.min(self.mtu))
    }

    /// What we offer as the side next to the client.
    #[must_use]
    pub fn offer(&self) -> Mechanism {
        let mut m = Mechanism::new(REMOTE, kind::VXLAN);
        m.set(key::SRC_IP, self.ip.to_string());
        m.set(key::SRC_PORT, self.port.to_string());
        m.set(key::MTU, self.mtu.to_string());
        m
    }

    /// What we answer as the side next to the endpoint, but for the VNI.
    pub fn accept(&self, m: &mut Mechanism) {
        m.set(key::DST_IP, self.ip.to_string());
        m.set(key::DST_PORT, self.port.to_string());
        m.set(key::MTU, self.carries(m).to_string());
    }

    /// The peer's end in a complete mechanism.
    ///
    /// # Errors
    /// A sentence that names what is missing or wrong.
    pub fn peer(&self, m: &Mechanism, we_are_source: bool) -> Result<(IpAddr, u16), String> {
        let (ip, port) =
            if we_are_source { (key::DST_IP, key::DST_PORT) } else { (key::SRC_IP, key::SRC_PORT) };
        let address = m.ip(ip).ok_or_else(|| {
            format!("the VXLAN parameter {ip} is {:?}, not an address", m.get(ip).unwrap_or(""))
        })?;
        if address.is_ipv4() != self.ip.is_ipv4() {
            return Err(format!("the tunnel ends {address} and {} are of different families", self.ip));
        }
        if address == self.ip {
            return Err(format!(
                "the peer's tunnel end {address} is our own: two forwarders share NSM_TUNNEL_IP"
            ));
        }
        // Unreadable and 0 mean the fixed port (section 3.1).
        Ok((address, m.number(port).filter(|p| *p != 0).unwrap_or(VXLAN_PORT)))
    }
}

/// Makes the connection's MTU no larger than `limit`; one that is not set becomes it.
pub fn clamp_mtu(conn: &mut Connection, limit: u32) {
    let context = conn.context.get_or_insert_default();
    context.mtu = if context.mtu == 0 { limit } else { context.mtu.min(limit) };
}

/// The VNIs in use at this node's port, and by which connection. The kernel takes each only once per port,
/// whatever the peer, so they are unique per node and not, as upstream has them, per peer.
#[derive(Debug, Default)]
pub struct Vnis(HashMap<u32, String>);

impl Vnis {
    /// Draws a free one for a connection that we serve: even or odd as the addresses demand. `random` is the
    /// source of chance. `None`: 2^23 tunnels exist.
    pub fn draw(&mut self, m: &Mechanism, connection: &str, mut random: impl FnMut() -> u32) -> Option<u32> {
        const MASK: u32 = (1 << 24) - 1;
        let parity = u32::from(!vni_is_even(m));
        let start = (random().wrapping_mul(2) & MASK) | parity;
        (0..1u32 << 23)
            .map(|step| start.wrapping_add(step * 2) & MASK)
            .find(|vni| *vni != 0 && !self.0.contains_key(vni))
            .inspect(|vni| {
                self.0.insert(*vni, connection.to_owned());
            })
    }

    /// Takes a VNI that is already agreed on. False: another connection of this node has it.
    pub fn claim(&mut self, vni: u32, connection: &str) -> bool {
        self.0.entry(vni).or_insert_with(|| connection.to_owned()) == connection
    }

    /// Those in use.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        self.0.keys().copied()
    }

    /// Gives back what this connection has.
    pub fn release(&mut self, vni: u32, connection: &str) {
        if self.0.get(&vni).is_some_and(|holder| holder == connection) {
            self.0.remove(&vni);
        }
    }
}

#[cfg(test)]
mod tests {
    use nsm_api::{mechanism::interface_name, nsurl::check_interface_name};
    use nsm_kernel::plan::validate_ifname;
    use proptest::prelude::*;

    use super::*;

    const A: TunnelEnd =
        TunnelEnd { ip: IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)), port: 4789, mtu: 1446 };
    const B: TunnelEnd =
        TunnelEnd { ip: IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2)), port: 4790, mtu: 1400 };

    #[test]
    fn both_sides_agree() {
        let mut m = A.offer();
        B.accept(&mut m);
        assert_eq!(m.get(key::MTU), Some("1400"));
        assert_eq!(A.peer(&m, true), Ok((B.ip, 4790)));
        assert_eq!(B.peer(&m, false), Ok((A.ip, 4789)));
        assert!(B.peer(&m, true).unwrap_err().contains("our own"));
        m.set(key::DST_IP, "fd00::1");
        assert!(A.peer(&m, true).unwrap_err().contains("families"));
        m.set(key::DST_IP, "nonsense");
        assert!(A.peer(&m, true).unwrap_err().contains("nonsense"));
    }

    #[test]
    fn mtus_only_shrink() {
        let mut conn = Connection::default();
        clamp_mtu(&mut conn, 9000);
        clamp_mtu(&mut conn, 1446);
        clamp_mtu(&mut conn, 9000);
        assert_eq!(conn.context.unwrap().mtu, 1446);
    }

    #[test]
    fn parity_uniqueness_and_release() {
        let mut m = A.offer();
        B.accept(&mut m);
        let mut vnis = Vnis::default();
        let first = vnis.draw(&m, "a", || 5).unwrap();
        let second = vnis.draw(&m, "b", || 5).unwrap();
        assert_eq!((first, second), (10, 12), "A ≤ B draws even ones");
        assert!(vnis.claim(first, "a") && !vnis.claim(first, "b"));
        vnis.release(first, "b");
        assert!(!vnis.claim(first, "b"));
        vnis.release(first, "a");
        assert!(vnis.claim(first, "b"));
        let mut reversed = B.offer();
        A.accept(&mut reversed);
        assert_eq!(vnis.draw(&reversed, "c", || 5), Some(11));
        assert_ne!(vnis.draw(&m, "d", || 0), Some(0), "0 reads as unset");
    }

    /// A hop's MTU is what a VXLAN packet leaves of the device below it, at every device that there can be.
    #[test]
    fn no_tunnel_says_that_it_carries_more_than_its_uplink() {
        // Ethernet header of the inner packet, VXLAN, UDP, IP.
        for (ip, around) in [("10.0.0.1", 14 + 8 + 8 + 20), ("fd00::1", 14 + 8 + 8 + 40)] {
            let ip: IpAddr = ip.parse().unwrap();
            for uplink in (0..=65_535).chain([u32::MAX]) {
                let mtu = TunnelEnd::over(ip, 4789, uplink).mtu;
                assert!(mtu >= 1, "it says something");
                assert!(mtu == 1 || mtu + around <= uplink, "{mtu} over {uplink}");
                assert!(mtu + around + 4 >= uplink, "{mtu} over {uplink}: a VLAN tag at most is spared");
            }
        }
    }

    fn mechanism_mtu() -> impl Strategy<Value = String> {
        prop_oneof![
            Just(String::new()),
            Just("0".into()),
            "[0-9]{1,12}",
            "[ -~]{0,6}",
            (1u32..10_000).prop_map(|n| n.to_string())
        ]
    }

    proptest! {
        /// Whatever client, endpoint and peers say or leave out, both sides of a chain of tunnels get an MTU, and no hop a
        /// larger one than its tunnels carry.
        #[test]
        fn an_mtu_only_shrinks_on_its_way_and_is_never_more_than_a_tunnel_carries(
            asked: u32,
            hops in prop::collection::vec((1u32..10_000, mechanism_mtu()), 1..5),
        ) {
            let mut conn = Connection::default();
            conn.context.get_or_insert_default().mtu = asked;
            let mut before = asked;
            let mut least = u32::MAX;
            for (own, said) in hops {
                let end = TunnelEnd { mtu: own, ..A };
                let mut m = B.offer();
                m.set(key::MTU, said.clone());
                let theirs = said.parse().ok().filter(|mtu| *mtu != 0);
                let carried = theirs.unwrap_or(own).min(own);
                prop_assert_eq!(end.carries(&m), carried);
                end.accept(&mut m);
                prop_assert_eq!(m.number(key::MTU), Some(carried));
                prop_assert_eq!(end.carries(&m), carried, "agreed on, it stays");
                clamp_mtu(&mut conn, end.carries(&m));
                let now = conn.context.as_ref().unwrap().mtu;
                least = least.min(carried);
                prop_assert!(now != 0 && now <= least && (before == 0 || now <= before));
                before = now;
            }
            prop_assert_eq!(before, if asked == 0 { least } else { asked.min(least) });
        }

        /// No number has two connections, whatever is drawn, claimed and given back; each drawn one is of the parity that
        /// its tunnel demands, and the next free one from where chance began.
        #[test]
        fn no_vni_has_two_connections(
            ops in prop::collection::vec((0u8..4, 0u8..3, prop_oneof![0u32..6, Just(u32::MAX), Just(0x7f_fffe), any::<u32>()]), 0..60),
        ) {
            const END: u32 = 1 << 24;
            let mut held = HashMap::<u32, u8>::new();
            let mut vnis = Vnis::default();
            for (id, op, number) in ops {
                let name = id.to_string();
                let vni = number % END;
                match op {
                    0 => {
                        let even = number % 2 == 0;
                        let (source, destination) = if even { (A, B) } else { (B, A) };
                        let mut m = source.offer();
                        destination.accept(&mut m);
                        let drawn = vnis.draw(&m, &name, || number).unwrap();
                        prop_assert!((1..END).contains(&drawn) && (drawn % 2 == 0) == even);
                        prop_assert!(held.insert(drawn, id).is_none(), "{drawn} is taken");
                        let start = number.wrapping_mul(2) % END + u32::from(!even);
                        let mut passed = start;
                        while passed != drawn {
                            prop_assert!(passed == 0 || held.contains_key(&passed), "{passed} was free");
                            passed = (passed + 2) % END;
                        }
                    }
                    1 => {
                        let holder = *held.entry(vni).or_insert(id);
                        prop_assert_eq!(vnis.claim(vni, &name), holder == id);
                    }
                    _ => {
                        vnis.release(vni, &name);
                        if held.get(&vni) == Some(&id) {
                            held.remove(&vni);
                        }
                    }
                }
                let mut known: Vec<_> = vnis.iter().collect();
                known.sort_unstable();
                let mut wanted: Vec<_> = held.keys().copied().collect();
                wanted.sort_unstable();
                prop_assert_eq!(known, wanted);
            }
        }

        /// What is drawn for a wire, and what a URL may ask for, is a name for its interface.
        #[test]
        fn the_kernel_takes_every_name_that_we_draw_or_let_pass(
            service in ".{0,20}", random: u8, asked in "[a-z%/:. \\t\u{a0}é]{0,16}",
        ) {
            let drawn = interface_name(&service, || random);
            prop_assert_eq!(validate_ifname(&drawn), Ok(()));
            prop_assert_eq!(check_interface_name(&asked).is_ok(), validate_ifname(&asked).is_ok(), "{:?}", asked);
        }
    }
}
