//! What a forwarder tells of its wires: as planned, as the kernel has them, and why they are as large as they are.

use std::{collections::BTreeSet, sync::Arc};

use async_trait::async_trait;
use nsm_api::{
    path,
    pb::introspect::{End, Kind, Query, Wire, item::What},
};
use nsm_kernel::{
    EndFacts, Nsids, difference,
    plan::{Construction, EndPlan, WirePlan, vxlan_overhead},
};
use nsm_mesh::{
    error::explain,
    inspect::{self, Gone, Look, Teller},
    monitor::Hub,
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::counter::ConstCounter,
};
use tokio::task::spawn_blocking;

use crate::{
    tunnel::{DEFAULT_MTU, TunnelEnd},
    wires::{Record, Wires},
};

/// What a wire has carried, seen from the forwarder as upstream sees it: its *server* side is the client's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Traffic {
    server: Side,
    client: Side,
}

#[derive(Debug, Clone, Copy)]
struct Side {
    rx_bytes: u64,
    tx_bytes: u64,
    rx_packets: u64,
    tx_packets: u64,
    drops: u64,
}

impl Traffic {
    /// From the ends in the pods: what a pod's end has sent, the forwarder has received. Of a tunnel one end is here, and
    /// what goes in at that side comes out at the other.
    pub(crate) fn of(near: Option<EndFacts>, far: Option<EndFacts>) -> Option<Self> {
        let side = |end: EndFacts| Side {
            rx_bytes: end.counters.tx_bytes,
            tx_bytes: end.counters.rx_bytes,
            rx_packets: end.counters.tx_packets,
            tx_packets: end.counters.rx_packets,
            drops: end.counters.drops,
        };
        let through = |other: Side| Side {
            rx_bytes: other.tx_bytes,
            tx_bytes: other.rx_bytes,
            rx_packets: other.tx_packets,
            tx_packets: other.rx_packets,
            drops: 0,
        };
        match (near.map(side), far.map(side)) {
            (Some(server), Some(client)) => Some(Self { server, client }),
            (Some(server), None) => Some(Self { server, client: through(server) }),
            (None, Some(client)) => Some(Self { server: through(client), client }),
            (None, None) => None,
        }
    }

    /// Upstream's names (spec/data-plane.md 2.19).
    pub(crate) fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let Self { server: s, client: c } = *self;
        [
            ("server_rx_bytes", s.rx_bytes),
            ("server_tx_bytes", s.tx_bytes),
            ("server_rx_packets", s.rx_packets),
            ("server_tx_packets", s.tx_packets),
            ("server_drops", s.drops),
            ("client_rx_bytes", c.rx_bytes),
            ("client_tx_bytes", c.tx_bytes),
            ("client_rx_packets", c.rx_packets),
            ("client_tx_packets", c.tx_packets),
            ("client_drops", c.drops),
        ]
        .into_iter()
    }
}

/// Upstream's Prometheus counters of every wire (spec/kubernetes.md 7.3), read from the kernel at every scrape.
#[derive(Debug)]
pub(crate) struct Counted {
    /// The wires.
    pub(crate) wires: Arc<Wires>,
    /// What is known of their connections.
    pub(crate) hub: Arc<Hub>,
}

impl Collector for Counted {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let seen: Vec<_> = self.wires.ids().iter().filter_map(|id| self.labelled(id)).collect();
        // A family is encoded as a whole, so name by name.
        let names =
            seen.first().map(|(_, traffic)| traffic.counters().map(|(name, _)| name).collect::<Vec<_>>());
        for (at, name) in names.unwrap_or_default().into_iter().enumerate() {
            let counter = ConstCounter::new(0u64);
            let mut family =
                encoder.encode_descriptor(name, "Traffic of a wire", None, counter.metric_type())?;
            for (labels, traffic) in &seen {
                let value = traffic.counters().nth(at).map_or(0, |(_, value)| value);
                ConstCounter::new(value).encode(family.encode_family(labels)?)?;
            }
        }
        Ok(())
    }
}

impl Counted {
    fn labelled(&self, id: &str) -> Option<(Vec<(&'static str, String)>, Traffic)> {
        let traffic = self.wires.traffic_now(id)?;
        let (conn, _) = self.hub.get(id)?;
        let segments = path::segments(&conn);
        let interface = |key: &str| {
            let own = path::current(&conn).and_then(|own| own.metrics.get(key));
            own.and_then(|text| text.split_once('/')).map(|(_, name)| name.to_owned()).unwrap_or_default()
        };
        // Of a wire over two nodes each forwarder knows one interface.
        let (nearer, several) = (path::index(&conn) < 4, segments.len() > 4);
        let labels = vec![
            ("connection_id", path::client_id(&conn).to_owned()),
            ("network_service", conn.network_service.clone()),
            ("nsc", segments.first().map(|first| first.name.clone()).unwrap_or_default()),
            ("nsc_interface", if several && !nearer { String::new() } else { interface("server_interface") }),
            ("nse_interface", if several && nearer { String::new() } else { interface("client_interface") }),
        ];
        Some((labels, traffic))
    }
}

/// The wires of this node, for whoever asks.
#[derive(Debug)]
pub(crate) struct Told {
    /// They.
    pub(crate) wires: Arc<Wires>,
    /// Our end of tunnels.
    pub(crate) tunnel: TunnelEnd,
}

#[async_trait]
impl Look for Told {
    async fn look(&self, query: &Query, to: &Teller) -> Result<(), Gone> {
        if !inspect::wants(query, Kind::Wire) {
            return Ok(());
        }
        let verify = query.verify;
        for id in self.wires.ids() {
            let (wires, tunnel) = (Arc::clone(&self.wires), self.tunnel);
            // The kernel is asked on a thread that may wait.
            let told = spawn_blocking(move || {
                let (record, nsids, claimed) = wires.held(&id)?;
                Some(wire(&wires, &tunnel, &record, nsids, claimed, verify))
            });
            if let Ok(Some(wire)) = told.await {
                to.tell(What::Wire(wire)).await?;
            }
        }
        if verify {
            let wires = Arc::clone(&self.wires);
            for orphan in spawn_blocking(move || orphans(&wires)).await.unwrap_or_default() {
                to.tell(What::Wire(orphan)).await?;
            }
        }
        Ok(())
    }
}

fn wire(
    wires: &Wires,
    tunnel: &TunnelEnd,
    record: &Record,
    nsids: Nsids,
    claimed: bool,
    verify: bool,
) -> Wire {
    let plan = &record.plan;
    let mut differences = Vec::new();
    let (near, far) = wires.machine().facts(&plan.id, nsids).unwrap_or_else(|error| {
        differences.push(format!("the kernel cannot be asked: {}", explain(&error)));
        (None, None)
    });
    if verify {
        differences.extend(departures(wires, plan));
    }
    let mtu = plan.ends().filter_map(|(_, end)| end.mtu).min().unwrap_or_default();
    let client = plan.ends().next().map(|(_, end)| client_of(&end.alias)).unwrap_or_default();
    Wire {
        connection: plan.id.clone(),
        client,
        kind: kind(plan).into(),
        tunnel: match &plan.construction {
            Construction::Veth => String::new(),
            Construction::Vxlan(vxlan) => vxlan.to_string(),
        },
        near: plan.near.as_ref().map(|plan| end(plan, near)),
        far: plan.far.as_ref().map(|plan| end(plan, far)),
        mtu,
        mtu_because: arithmetic(plan, tunnel, mtu),
        expires: inspect::millis(record.expires),
        claimed,
        differences,
        orphan: false,
    }
}

fn kind(plan: &WirePlan) -> &'static str {
    match plan.construction {
        Construction::Veth => "veth",
        Construction::Vxlan(_) => "vxlan",
    }
}

/// The alias is `server-<client's connection id>` or `client-…` (spec/data-plane.md 2.5).
fn client_of(alias: &str) -> String {
    let id = alias.strip_prefix("server-").or_else(|| alias.strip_prefix("client-"));
    id.unwrap_or(alias).to_owned()
}

fn end(plan: &EndPlan, facts: Option<EndFacts>) -> End {
    let counters = facts.map(|facts| facts.counters);
    End {
        interface: plan.ifname.clone(),
        namespace: plan.ns.ino,
        there: facts.is_some(),
        up: facts.is_some_and(|facts| facts.up),
        mtu: facts.map_or(0, |facts| facts.mtu),
        addresses: plan.addresses.iter().map(ToString::to_string).collect(),
        rx_packets: counters.map_or(0, |c| c.rx_packets),
        rx_bytes: counters.map_or(0, |c| c.rx_bytes),
        tx_packets: counters.map_or(0, |c| c.tx_packets),
        tx_bytes: counters.map_or(0, |c| c.tx_bytes),
        drops: counters.map_or(0, |c| c.drops),
    }
}

/// What the kernel has otherwise than planned, in words.
fn departures(wires: &Wires, plan: &WirePlan) -> Vec<String> {
    let seen = match wires.machine().snapshot(plan) {
        Ok(seen) => seen,
        Err(error) => return vec![explain(&error)],
    };
    let left = difference(plan, &seen);
    let say = |(side, changes): (_, Option<Vec<_>>)| match changes {
        None => vec![format!("{side}: the interface is missing")],
        Some(changes) => changes.iter().map(|change| format!("{side}: missing: {change}")).collect(),
    };
    left.into_iter().flat_map(say).collect()
}

/// How the MTU came about.
fn arithmetic(plan: &WirePlan, tunnel: &TunnelEnd, mtu: u32) -> Vec<String> {
    let (limit, mut lines) = match &plan.construction {
        Construction::Veth => (
            DEFAULT_MTU,
            vec![format!("{DEFAULT_MTU}: both ends are on this node, no tunnel takes its part")],
        ),
        Construction::Vxlan(vxlan) => {
            let overhead = vxlan_overhead(vxlan.local);
            let family = if vxlan.local.is_ipv4() { "IPv4" } else { "IPv6" };
            let uplink = tunnel.mtu + overhead;
            let line = format!(
                "{uplink} of the uplink with {} - {overhead} of VXLAN over {family} = {}",
                vxlan.local, tunnel.mtu
            );
            (tunnel.mtu, vec![line])
        }
    };
    if mtu == 0 {
        lines.push("nobody set one: it is the kernel's own".into());
    } else if mtu < limit {
        lines.push(format!("{mtu}: the client, the endpoint or a tunnel further on carries no more"));
    } else if mtu > limit {
        lines.push(format!("{mtu}: more than our tunnels carry; has the uplink's MTU changed since?"));
    }
    lines
}

/// Links with our mark that no plan names, in the namespaces that the node knows by number.
fn orphans(wires: &Wires) -> Vec<Wire> {
    let known: BTreeSet<String> = wires.ids().into_iter().collect();
    let namespaces = wires.machine().numbered().unwrap_or_default();
    let mut found = Vec::new();
    for nsid in namespaces {
        // A namespace that has gone meanwhile has nothing any more.
        for link in wires.machine().owned(nsid).unwrap_or_default() {
            if !known.contains(&link.id) {
                let end = End { interface: link.ifname, there: true, ..End::default() };
                let (near, far) = match link.side {
                    nsm_kernel::plan::Side::Near => (Some(end), None),
                    nsm_kernel::plan::Side::Far => (None, Some(end)),
                };
                found.push(Wire { connection: link.id, orphan: true, near, far, ..Wire::default() });
            }
        }
    }
    found
}
