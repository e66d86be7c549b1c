//! The heart of a forwarder: agrees on a mechanism with each side, and when the far side has answered, joins
//! both with a wire of the kernel.
//!
//! ```text
//!   near \ far │ KERNEL, this node        VXLAN, another node
//!   ───────────┼──────────────────────────────────────────────────────
//!   KERNEL     │ a veth pair              a VXLAN device in the client's pod
//!   VXLAN      │ … in the endpoint's pod  refused: nothing on this node
//! ```

use std::{fmt, net::IpAddr, sync::Arc};

use async_trait::async_trait;
use nsm_api::{
    context,
    mechanism::{LOCAL, REMOTE, interface_name, key, kind, prioritise},
    path, payload,
    pb::{
        connection::{Connection, Mechanism, State},
        networkservice::NetworkServiceRequest,
    },
    planted,
};
use nsm_kernel::{
    netns::NsId,
    plan::{ContextPolicy, ContextRoute, EndPlan, IpContext, Mac, Side, Vxlan, WirePlan},
};
use nsm_mesh::{
    Context, Element, Error, Lease, Next, NextHop, Reason, Release, Result, dial::dialed, fds::Fds,
};

use crate::{
    tell::Traffic,
    tunnel::{self, TunnelEnd},
    wires::{Claim, Record, Taken, Wires},
};

/// Tries to find a name that nobody has in the client's namespace, where the client left it to us.
const NAME_TRIES: usize = 8;

/// The element.
#[derive(Debug)]
pub struct CrossConnect {
    /// The wires of this node.
    pub wires: Arc<Wires>,
    /// Our end of tunnels.
    pub tunnel: TunnelEnd,
    /// Types of mechanisms to offer before others.
    pub priority: Vec<String>,
}

/// The wire itself.
#[derive(Debug)]
struct Wire {
    wires: Arc<Wires>,
    id: String,
}

#[async_trait]
impl Lease for Wire {
    fn name(&self) -> &'static str {
        "wire"
    }

    async fn release(self: Box<Self>, cx: &Release) -> Result<()> {
        match cx.reason {
            _ if planted::is("the forwarder keeps its wires") => {}
            Reason::Reselect => self.wires.leave(&self.id),
            _ => self.wires.remove(&self.id),
        }
        Ok(())
    }
}

/// A wire that stays until another endpoint's has taken its place, or until that is known not to come about.
struct Replaced<'w> {
    wires: &'w Wires,
    /// `None`: another has taken its place.
    id: Option<String>,
}

impl Drop for Replaced<'_> {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            self.wires.remove(id);
        }
    }
}

impl CrossConnect {
    /// What is remembered of the far side: by this process, or by the one before it.
    fn remembered(&self, id: &str) -> Option<Mechanism> {
        let mut far = self.wires.record(id)?.far;
        // An endpoint's namespace is the endpoint's to name: its descriptor is not kept here, and so cannot go along.
        far.parameters.remove(key::INODE_URL);
        Some(far)
    }

    /// Chooses what joins us with the side next to the client, and fills in our half. Whether the VNI was drawn now.
    fn near(
        &self,
        request: &mut NetworkServiceRequest,
        claims: &mut Vec<Claim>,
    ) -> Result<(Mechanism, bool)> {
        let conn = request.connection.get_or_insert_default();
        let mut near = choose(conn.mechanism.as_ref(), &request.mechanism_preferences)?;
        tunnel::clamp_mtu(conn, tunnel::DEFAULT_MTU);
        if near.r#type == kind::KERNEL {
            if near.get(key::INODE_URL).is_none() {
                return Err(Error::invalid(
                    "the KERNEL mechanism names no network namespace (parameter inodeURL)",
                ));
            }
            return Ok((near, false));
        }
        self.tunnel.accept(&mut near);
        tunnel::clamp_mtu(conn, self.tunnel.carries(&near));
        self.tunnel.peer(&near, false).map_err(Error::invalid)?;
        // A refresh keeps its VNI; a peer that found it taken on its node proposes another.
        let kept = || self.wires.record(&conn.id).filter(|r| r.plan.near.is_none())?.vni();
        let (claim, drawn) = match near.vni().or_else(kept) {
            Some(vni) => (self.claim(vni, &conn.id)?, false),
            None => (self.draw(&near, &conn.id)?, true),
        };
        near.set(key::VNI, claim.vni().to_string());
        claims.push(claim);
        Ok((near, drawn))
    }

    fn claim(&self, vni: u32, id: &str) -> Result<Claim> {
        self.wires.claim(vni, id).ok_or_else(|| {
            Error::new(tonic::Code::AlreadyExists, format!("VNI {vni} is taken by another wire of this node"))
                .hint("ask again without a VNI, or with another")
        })
    }

    fn draw(&self, m: &Mechanism, id: &str) -> Result<Claim> {
        self.wires
            .draw(m, id)
            .ok_or_else(|| Error::new(tonic::Code::ResourceExhausted, "every VNI of this node is in use"))
    }

    /// What we offer the next hop.
    fn offers(&self, local: bool, id: &str) -> Vec<Mechanism> {
        let mut offers = if local {
            vec![Mechanism::new(LOCAL, kind::KERNEL)]
        } else {
            let mut tunnel = self.tunnel.offer();
            tunnel.set(key::SRC_MAC, Mac::of(id, Side::Near).to_string());
            vec![tunnel]
        };
        prioritise(&mut offers, &self.priority);
        offers
    }

    fn plan(&self, fds: &Fds, conn: &Connection, near: &Mechanism, far: &Mechanism) -> Result<WirePlan> {
        let end = |side, m| end(fds, side, m, conn);
        match (near.r#type.as_str(), far.r#type.as_str()) {
            (kind::KERNEL, kind::KERNEL) => {
                let plan = WirePlan::veth(&conn.id, end(Side::Near, near)?, end(Side::Far, far)?);
                Ok(if carries_ip(conn) { introduced(plan, conn) } else { plan })
            }
            (kind::KERNEL, kind::VXLAN) => self.tunnelled(Side::Near, end(Side::Near, near)?, far, conn),
            (kind::VXLAN, kind::KERNEL) => self.tunnelled(Side::Far, end(Side::Far, far)?, near, conn),
            (near, far) => Err(Error::invalid(format!("nothing joins {near} with {far} on one node"))),
        }
    }

    /// The end that is ours of what two forwarders have agreed on.
    fn tunnelled(&self, side: Side, end: EndPlan, m: &Mechanism, conn: &Connection) -> Result<WirePlan> {
        let tunnel = self.vxlan(m, matches!(side, Side::Near))?;
        introduced_to(WirePlan::vxlan(&conn.id, tunnel, side, end), side, m, conn)
    }

    fn vxlan(&self, m: &Mechanism, we_are_source: bool) -> Result<Vxlan> {
        let (remote, remote_port) = self.tunnel.peer(m, we_are_source).map_err(Error::invalid)?;
        let vni = m.vni().ok_or_else(|| {
            Error::invalid(format!(
                "the tunnel's VNI is {:?}; expected 1 to 16777215",
                m.get(key::VNI).unwrap_or("")
            ))
        })?;
        Ok(Vxlan { vni, local: self.tunnel.ip, remote, port: self.tunnel.port, remote_port })
    }

    /// Makes the wire; where a name or a VNI turns out to be taken and the choice was ours, makes another. `redraw`
    /// takes the claim of a new VNI, where it may be one.
    async fn join(
        &self,
        fds: &Fds,
        conn: &mut Connection,
        near: &mut Mechanism,
        far: &Mechanism,
        name_is_ours: bool,
        mut redraw: Option<&mut Vec<Claim>>,
    ) -> std::result::Result<Option<Traffic>, Unjoined> {
        for _ in 0..NAME_TRIES {
            let plan = self.plan(fds, conn, near, far)?;
            if near.get(key::SRC_MAC).is_some()
                && let Some(mac) = plan.far.as_ref().and_then(|end| end.mac)
            {
                near.set(key::DST_MAC, mac.to_string());
            }
            let record = Record::new(plan, far.clone(), conn);
            match self.wires.apply(record, fds).await {
                Ok(traffic) => return Ok(traffic),
                Err(Taken::Name { near: true, .. }) if name_is_ours => {
                    near.set(key::NAME, interface_name(&conn.network_service, rand::random));
                }
                Err(Taken::Vni) => {
                    let Some(claims) = redraw.as_mut() else { return Err(Unjoined::Vni) };
                    let claim = self.draw(near, &conn.id)?;
                    near.set(key::VNI, claim.vni().to_string());
                    claims.push(claim);
                }
                Err(Taken::Name { near, name, by }) => {
                    let whose = if near { "client" } else { "endpoint" };
                    return Err(Error::new(
                        tonic::Code::AlreadyExists,
                        format!("the {whose}'s namespace has an interface {name:?} already, {by}"),
                    )
                    .hint(
                        "choose another interface name in the network-service URL, or remove that interface",
                    )
                    .into());
                }
                Err(Taken::Other(error)) => return Err(error.into()),
            }
        }
        Err(Error::new(tonic::Code::ResourceExhausted, "no free interface name was found").into())
    }
}

/// One end of the wire, as its mechanism and the connection's context want it.
fn end(fds: &Fds, side: Side, m: &Mechanism, conn: &Connection) -> Result<EndPlan> {
    let url = m.inode().map_err(|e| Error::invalid(e.to_string()))?;
    let url = url.ok_or_else(|| {
        Error::invalid(format!("the {} side names no network namespace (parameter inodeURL)", whose(side)))
    })?;
    if fds.get(url).is_none() {
        // A number alone gives no right to a namespace: whoever names it must hold it.
        return Err(Error::denied(format!(
            "the {} side names {url} and did not send its descriptor",
            whose(side)
        )));
    }
    let name = m.get(key::NAME).ok_or_else(|| {
        Error::invalid(format!("the {} side names no interface (parameter name)", whose(side)))
    })?;
    let mut end = EndPlan::new(side, NsId { dev: url.dev, ino: url.ino }, name, path::client_id(conn));
    let context = conn.context.clone().unwrap_or_default();
    if m.is_true(key::UNNUMBERED) {
        end.mtu = Some(context.mtu).filter(|mtu| *mtu != 0);
        return Ok(end);
    }
    let invalid = |e: nsm_kernel::plan::Invalid| Error::invalid(format!("the {} side: {e}", whose(side)));
    let ethernet = context.ethernet_context.unwrap_or_default();
    let mac = match side {
        Side::Near => ethernet.src_mac,
        Side::Far => ethernet.dst_mac,
    };
    end.mac = (!mac.is_empty()).then(|| mac.parse()).transpose().map_err(invalid)?;
    end.with_context(side, &ip_context(&context.ip_context.unwrap_or_default(), context.mtu)).map_err(invalid)
}

enum Unjoined {
    /// The far side's VNI is in use here.
    Vni,
    Error(Error),
}

impl From<Error> for Unjoined {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

#[async_trait]
impl Element for CrossConnect {
    fn name(&self) -> &'static str {
        "cross-connect"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        // What this process or the one before it has made goes, but not before there is another.
        let reselected = request.connection.as_ref().filter(|conn| conn.state() == State::ReselectRequested);
        let mut replaced = reselected.map(|conn| {
            self.wires.leave(&conn.id);
            Replaced { wires: &self.wires, id: Some(conn.id.clone()) }
        });
        // They are free again when this request ends, but for the one that is in a record then.
        let mut claims = Vec::new();
        let (mut near, vni_is_ours) = self.near(&mut request, &mut claims)?;
        let local = cx.next_hop.as_ref().is_some_and(NextHop::is_local);
        let conn = request.connection.get_or_insert_default();
        let id = conn.id.clone();
        let class = if local { LOCAL } else { REMOTE };
        // What was agreed with another endpoint is nothing to this one.
        let moves = replaced.is_some() || moves(cx, conn);
        conn.mechanism = self.remembered(&id).filter(|m| m.cls == class && !moves);
        request.mechanism_preferences = self.offers(local, &id);

        let name_is_ours = near.r#type == kind::KERNEL && near.get(key::NAME).is_none();
        if name_is_ours {
            let known = self.wires.record(&id).and_then(|r| r.plan.near.map(|end| end.ifname));
            near.set(key::NAME, known.unwrap_or_else(|| interface_name(&conn.network_service, rand::random)));
        }

        let mut proposed = None;
        loop {
            // Only a tunnel's number may make another attempt necessary.
            let mut attempt = if local { std::mem::take(&mut request) } else { request.clone() };
            if let Some(vni) = proposed {
                for offer in &mut attempt.mechanism_preferences {
                    offer.set(key::VNI, u32::to_string(&vni));
                }
            }
            let mut answer = next.request(cx, attempt).await?;
            let far = answer
                .mechanism
                .clone()
                .ok_or_else(|| Error::new(tonic::Code::Unknown, "the next hop's answer has no mechanism"))?;
            if far.cls != class {
                // Another node has no say over namespaces of this one.
                return Err(Error::denied(format!(
                    "the next hop answers with a {} mechanism, but only {class} ones can lead there",
                    far.cls
                )));
            }
            let limit = answer.context.as_ref().map_or(0, |c| c.mtu);
            tunnel::clamp_mtu(&mut answer, if limit == 0 { tunnel::DEFAULT_MTU } else { limit });
            if far.r#type == kind::VXLAN {
                tunnel::clamp_mtu(&mut answer, self.tunnel.carries(&far));
            }
            let far_vni = far.vni().filter(|_| far.r#type == kind::VXLAN);
            let claim = far_vni.map(|vni| self.wires.claim(vni, &id));
            let joined = if let None | Some(Some(_)) = claim {
                claims.extend(claim.flatten());
                let redraw = vni_is_ours.then_some(&mut claims);
                self.join(&cx.fds, &mut answer, &mut near, &far, name_is_ours, redraw).await
            } else {
                Err(Unjoined::Vni)
            };
            match joined {
                Ok(traffic) => {
                    if let Some(replaced) = &mut replaced {
                        replaced.id = None;
                    }
                    note_interfaces(&mut answer, &near, &far);
                    if cx.scope.get::<Wire>().is_none() {
                        cx.scope.lease(Wire { wires: Arc::clone(&self.wires), id });
                    }
                    if let Some(traffic) = traffic {
                        note_traffic(&mut answer, &traffic);
                    }
                    answer.mechanism = Some(near);
                    return Ok(answer);
                }
                Err(Unjoined::Vni) if proposed.is_none() && far_vni.is_some() && !local => {
                    // The peer's choice is taken here. Ours is proposed once: a peer keeps what comes with a
                    // source address (spec/control-plane.md 3.5 rule 2).
                    let claim = self.draw(&far, &id)?;
                    let vni = claim.vni();
                    claims.push(claim);
                    tracing::info!(taken = far_vni, proposed = vni, "the peer's VNI is taken on this node");
                    proposed = Some(vni);
                    // As a refresh of what the peer has made already: without the rest of the path it would be another
                    // connection, beside the first one.
                    let mut again = far.clone();
                    again.set(key::VNI, vni.to_string());
                    answer.mechanism = Some(again);
                    request.connection = Some(answer);
                }
                Err(Unjoined::Vni) => {
                    return Err(Error::new(
                        tonic::Code::AlreadyExists,
                        format!("VNI {} is taken on this node", far_vni.or(near.vni()).unwrap_or_default()),
                    )
                    .hint("another program made a VXLAN device with this VNI on this port; the next try draws another"));
                }
                Err(Unjoined::Error(error)) => return Err(error),
            }
        }
    }

    async fn close_forgotten(
        &self,
        cx: &mut Context<'_>,
        mut conn: Connection,
        next: Next<'_>,
    ) -> Result<()> {
        if let Some(record) = self.wires.record(&conn.id) {
            self.wires.remove(&conn.id);
            conn.mechanism = Some(record.far);
        }
        next.close_forgotten(cx, conn).await
    }
}

/// Whether the connection had another endpoint, at this process or, as the path says, at the one before it.
fn moves(cx: &Context<'_>, conn: &Connection) -> bool {
    let endpoint = &conn.network_service_endpoint_name;
    match dialed(cx.scope) {
        Some(old) => !old.is_called(endpoint),
        None => {
            let mut behind = path::segments(conn).iter().skip(path::index(conn) + 1);
            path::goes_on(conn) && behind.all(|hop| hop.name != *endpoint)
        }
    }
}

/// A chosen mechanism beats the preferences; of these the first that we can build is taken.
fn choose(chosen: Option<&Mechanism>, preferences: &[Mechanism]) -> Result<Mechanism> {
    let ours = |m: &&Mechanism| {
        matches!((m.cls.as_str(), m.r#type.as_str()), (LOCAL, kind::KERNEL) | (REMOTE, kind::VXLAN))
    };
    let said = |m: &Mechanism| format!("{} {}", m.cls, m.r#type);
    if let Some(chosen) = chosen.filter(|m| !m.r#type.is_empty()) {
        return ours(&chosen).then(|| chosen.clone()).ok_or_else(|| {
            Error::invalid(format!("unsupported mechanism {}", said(chosen)))
                .hint("this forwarder builds LOCAL KERNEL and REMOTE VXLAN")
        });
    }
    preferences.iter().find(ours).cloned().ok_or_else(|| {
        let offered: Vec<_> = preferences.iter().map(said).collect();
        Error::invalid(format!("cannot support any of the requested mechanism: {}", offered.join(", ")))
            .hint("this forwarder builds LOCAL KERNEL and REMOTE VXLAN")
    })
}

/// Tells people which interfaces belong to this hop (spec/control-plane.md 4.5).
fn note_interfaces(conn: &mut Connection, near: &Mechanism, far: &Mechanism) {
    let text = |m: &Mechanism| match (m.get(key::NAME), m.vni()) {
        (Some(name), _) => format!("{}/{name}", m.r#type),
        (None, Some(vni)) => format!("{}/{vni}", m.r#type),
        (None, None) => format!("{}/unknown", m.r#type),
    };
    if let Some(segment) = path::current_mut(conn) {
        segment.metrics.insert("server_interface".into(), text(near));
        segment.metrics.insert("client_interface".into(), text(far));
    }
}

fn whose(side: Side) -> &'static str {
    match side {
        Side::Near => "client's",
        Side::Far => "endpoint's",
    }
}

/// Upstream's in-band counters (spec/control-plane.md 4.5).
fn note_traffic(conn: &mut Connection, traffic: &Traffic) {
    if let Some(segment) = path::current_mut(conn) {
        let counters = traffic.counters().map(|(name, value)| (name.to_owned(), value.to_string()));
        segment.metrics.extend(counters);
    }
}

/// A service that is registered without a payload carries IP.
fn carries_ip(conn: &Connection) -> bool {
    matches!(conn.payload.as_str(), payload::IP | "")
}

/// On a wire that carries IP whatever has an address is at its other end, also behind a function without addresses.
fn introduced(plan: WirePlan, conn: &Connection) -> WirePlan {
    let (client, endpoint) = context::addresses(conn);
    plan.introduced(&client, &endpoint)
}

/// The same through a tunnel, where the forwarder at its other end is ours: that one says what has the addresses there.
fn introduced_to(plan: WirePlan, side: Side, m: &Mechanism, conn: &Connection) -> Result<WirePlan> {
    let ethernet = conn.context.as_ref().and_then(|context| context.ethernet_context.as_ref());
    let (client, endpoint) = context::addresses(conn);
    let (name, addresses, wanted) = match side {
        Side::Near => (key::DST_MAC, endpoint, ethernet.map(|ethernet| &ethernet.dst_mac)),
        Side::Far => (key::SRC_MAC, client, ethernet.map(|ethernet| &ethernet.src_mac)),
    };
    let Some(said) = m.get(name).filter(|_| carries_ip(conn)) else { return Ok(plan) };
    let mac = wanted.map(String::as_str).filter(|mac| !mac.is_empty()).unwrap_or(said);
    let mac = mac.parse().map_err(|e| Error::invalid(format!("the VXLAN parameter {name}: {e}")))?;
    Ok(plan.introduced_to(&addresses, mac))
}

/// The wire's context in the kernel crate's own words.
fn ip_context(ip: &nsm_api::pb::connectioncontext::IpContext, mtu: u32) -> IpContext {
    let route = |r: &nsm_api::pb::connectioncontext::Route| ContextRoute {
        prefix: r.prefix.clone(),
        next_hop: r.next_hop.clone(),
    };
    IpContext {
        src_addrs: ip.src_ip_addrs.clone(),
        dst_addrs: ip.dst_ip_addrs.clone(),
        src_routes: ip.src_routes.iter().map(route).collect(),
        dst_routes: ip.dst_routes.iter().map(route).collect(),
        neighbours: ip.ip_neighbors.iter().map(|n| (n.ip.clone(), n.hardware_address.clone())).collect(),
        policies: ip
            .policies
            .iter()
            .map(|p| ContextPolicy {
                from: p.from.clone(),
                proto: p.proto.clone(),
                dst_port: p.dst_port.clone(),
                src_port: p.src_port.clone(),
                routes: p.routes.iter().map(route).collect(),
            })
            .collect(),
        mtu,
    }
}

impl fmt::Display for TunnelEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ip: IpAddr = self.ip;
        write!(f, "{ip} port {} MTU {}", self.port, self.mtu)
    }
}

#[cfg(test)]
mod tests {
    use nsm_api::pb::connectioncontext::{ConnectionContext, EthernetContext, IpContext as PbIpContext};

    use super::*;

    /// What the client's end is told of the endpoint, where that is said of it.
    fn told(said: Option<&str>, ethernet: &str) -> Result<Vec<String>> {
        let (here, there) = ([10, 0, 0, 1], [10, 0, 0, 2]);
        let tunnel =
            Vxlan { vni: 2, local: here.into(), remote: there.into(), port: 4789, remote_port: 4789 };
        let end = EndPlan::new(Side::Near, NsId { dev: 4, ino: 1 }, "nsm0", "client-0");
        let ip = PbIpContext { dst_ip_addrs: vec!["172.16.1.2/32".into()], ..PbIpContext::default() };
        let ethernet = EthernetContext { dst_mac: ethernet.into(), ..EthernetContext::default() };
        let context = ConnectionContext {
            ip_context: Some(ip),
            ethernet_context: Some(ethernet),
            ..ConnectionContext::default()
        };
        let conn = Connection { context: Some(context), ..Connection::default() };
        let mut m = Mechanism::new(REMOTE, kind::VXLAN);
        said.into_iter().for_each(|mac| m.set(key::DST_MAC, mac));
        let plan = introduced_to(WirePlan::vxlan("w", tunnel, Side::Near, end), Side::Near, &m, &conn)?;
        Ok(plan.near.into_iter().flat_map(|end| end.neighbours).map(|known| known.to_string()).collect())
    }

    #[test]
    fn an_end_of_a_tunnel_is_told_what_the_other_forwarder_says_and_nothing_by_one_that_does_not() {
        let known = ["172.16.1.2 at 02:00:00:00:00:01 permanent"];
        assert_eq!(told(Some("02:00:00:00:00:01"), "").unwrap(), known);
        assert_eq!(
            told(Some("02:00:00:00:00:09"), "02:00:00:00:00:01").unwrap(),
            known,
            "the context's wins"
        );
        assert!(told(None, "02:00:00:00:00:01").unwrap().is_empty(), "upstream's may choose another");
        let error = told(Some("nonsense"), "").unwrap_err().to_string();
        assert!(error.contains("the VXLAN parameter nsmDstMac") && error.contains("nonsense"), "{error}");
    }
}
