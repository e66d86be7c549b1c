//! What two forwarders agree on about a VXLAN tunnel: addresses, ports, VNI, MTU
//! (spec/control-plane.md 3.5 and 3.6). Pure, chance is an argument.

use std::{collections::HashMap, net::IpAddr};

use nsm_api::{
    mechanism::{REMOTE, VXLAN_PORT, key, kind, vni_is_even},
    pb::connection::{Connection, Mechanism},
};

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
        let mtu =
            m.number(key::MTU).filter(|mtu| *mtu != 0).map_or(self.mtu, |theirs: u32| theirs.min(self.mtu));
        m.set(key::MTU, mtu.to_string());
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
}
