//! What the kernel can do alone: wires made by netlink in this process, and plain devices beside the mesh's.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nsm_kernel::Kernel;
use nsm_kernel::netlink::{Request, Route, Socket};
use nsm_kernel::netns::Namespace;
use nsm_kernel::plan::{EndPlan, IpContext, Side, Vxlan, WirePlan};
use nsm_lab::Lab;
use nsm_lab::network::Seen;
use nsm_lab::process::Supervisor;

use crate::Error;
use crate::client::first_ping;

/// Part of the local scenario: veth pairs that are no wires of the mesh.
pub(crate) const CABLES: &str = "cables:\n\
    - - {pod: client, interface: bare, addresses: [10.201.0.1/30]}\n  \
      - {pod: endpoint, interface: bare, addresses: [10.201.0.2/30]}\n\
    - - {pod: client, interface: control, addresses: [10.201.0.5/30]}\n  \
      - {pod: endpoint, interface: control, addresses: [10.201.0.6/30]}\n";

/// A plain device with an end in each pod.
pub(crate) struct Plain {
    /// Its name, at both ends.
    pub(crate) interface: &'static str,
    /// The client's address.
    pub(crate) near: Ipv4Addr,
    /// The endpoint's.
    pub(crate) far: Ipv4Addr,
    /// Where it is a tunnel: a network identifier that no forwarder of a fresh lab has come to.
    vni: u32,
}

/// What wires are compared with.
pub(crate) const BARE: Plain = Plain {
    interface: "bare",
    near: Ipv4Addr::new(10, 201, 0, 1),
    far: Ipv4Addr::new(10, 201, 0, 2),
    vni: 0x00ff_fffe,
};
/// Its equal: how far apart the two are measured is what the machine adds to every comparison.
pub(crate) const CONTROL: Plain = Plain {
    interface: "control",
    near: Ipv4Addr::new(10, 201, 0, 5),
    far: Ipv4Addr::new(10, 201, 0, 6),
    vni: 0x00ff_fffc,
};
/// RFC 7348.
const VXLAN_PORT: u16 = 4789;

/// A wire that was made without a mesh.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MadeBare {
    /// Until it is made and configured.
    pub(crate) apply: Duration,
    /// Until the first ping came back.
    pub(crate) ping: Duration,
}

// === wires as the forwarder makes them, without everything around it ===

/// Veth pairs between two namespaces of our own.
pub(crate) fn veths(count: usize, supervisor: &Supervisor) -> Result<Vec<MadeBare>, Error> {
    let [node, client, endpoint] = [fresh()?, fresh()?, fresh()?];
    let kernel = Kernel::new(node).map_err(Error::kernel("open the kernel"))?;
    inside(&client, || {
        each(count, supervisor, |index, addresses| {
            let (near, far) = ends(index, addresses, &client, &endpoint, None)?;
            let wire = WirePlan::veth(format!("bare-{index}"), near, far);
            let [src, dst] = addresses.map(|ip| [IpAddr::from(ip)]);
            let wire = wire.introduced(&src, &dst);
            kernel.apply(&wire, &[&client, &endpoint]).map_err(Error::kernel("make a wire"))?;
            Ok(())
        })
    })
}

/// VXLAN devices in two pods of two nodes with a cable between them.
pub(crate) fn vxlans(count: usize, supervisor: &Supervisor) -> Result<Vec<MadeBare>, Error> {
    let [node, node1, node2, client, endpoint] = [fresh()?, fresh()?, fresh()?, fresh()?, fresh()?];
    let tunnel_ips = [IpAddr::from([10, 202, 0, 1]), IpAddr::from([10, 202, 0, 2])];
    let cable_end = |side, ns: &Namespace, ip| {
        let mut end = EndPlan::new(side, ns.id(), "eth0", "underlay");
        end.addresses.push(IpNet::new_assert(ip, 30));
        end
    };
    let cable = WirePlan::veth(
        "underlay",
        cable_end(Side::Near, &node1, tunnel_ips[0]),
        cable_end(Side::Far, &node2, tunnel_ips[1]),
    );
    let open = |ns| Kernel::new(ns).map_err(Error::kernel("open the kernel"));
    open(node)?.apply(&cable, &[&node1, &node2]).map_err(Error::kernel("make the underlay"))?;
    let kernels = [open(node1)?, open(node2)?];
    inside(&client, || {
        each(count, supervisor, |index, addresses| {
            let (near, far) = ends(index, addresses, &client, &endpoint, Some(1450))?;
            let tunnel = |local: usize| Vxlan {
                vni: index as u32 + 1,
                local: tunnel_ips[local],
                remote: tunnel_ips[1 - local],
                port: VXLAN_PORT,
                remote_port: VXLAN_PORT,
            };
            // As in a mesh the endpoint's side is made first.
            let id = format!("bare-{index}");
            let far = WirePlan::vxlan(&id, tunnel(1), Side::Far, far);
            let near = WirePlan::vxlan(&id, tunnel(0), Side::Near, near);
            kernels[1].apply(&far, &[&endpoint]).map_err(Error::kernel("make the endpoint's side"))?;
            kernels[0].apply(&near, &[&client]).map_err(Error::kernel("make the client's side"))?;
            Ok(())
        })
    })
}

fn fresh() -> Result<Namespace, Error> {
    Namespace::unnamed().map_err(Error::kernel("make a namespace"))
}

fn inside<T: Send>(ns: &Namespace, work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    ns.run(work).map_err(Error::kernel("enter a namespace"))?
}

fn each(
    count: usize,
    supervisor: &Supervisor,
    make: impl Fn(usize, [Ipv4Addr; 2]) -> Result<(), Error>,
) -> Result<Vec<MadeBare>, Error> {
    (0..count)
        .map(|index| {
            supervisor.check()?;
            let far = u32::from(Ipv4Addr::new(10, 203, 0, 0)) + 2 * index as u32;
            let began = Instant::now();
            make(index, [Ipv4Addr::from(far + 1), Ipv4Addr::from(far)])?;
            let apply = began.elapsed();
            first_ping(Ipv4Addr::from(far).into())
                .map_err(Error::system("ping through a wire of our own"))?;
            Ok(MadeBare { apply, ping: began.elapsed() })
        })
        .collect()
}

/// Addresses and routes as the mesh gives them to both ends.
fn ends(
    index: usize,
    [near, far]: [Ipv4Addr; 2],
    client: &Namespace,
    endpoint: &Namespace,
    mtu: Option<u32>,
) -> Result<(EndPlan, EndPlan), Error> {
    let context = IpContext {
        src_addrs: vec![format!("{near}/32")],
        dst_addrs: vec![format!("{far}/32")],
        mtu: mtu.unwrap_or_default(),
        ..IpContext::default()
    };
    let end = |side, ns: &Namespace| {
        let name = format!("w{index}");
        let end = EndPlan::new(side, ns.id(), name, "bare").with_context(side, &context);
        end.map_err(|invalid| Error::Client(format!("made a plan that is none: {invalid}")))
    };
    Ok((end(Side::Near, client)?, end(Side::Far, endpoint)?))
}

// === plain devices beside the mesh's, in the same pods and over the same underlay ===

/// A VXLAN device in each pod, as a person would make them, but without outer checksums, as the mesh's wires (and
/// VPP's) have none.
pub(crate) fn hand_made_vxlan(lab: &Lab, plain: &Plain, mtu: u32) -> Result<(), Error> {
    let sides = [("node1", "client", plain.near), ("node2", "endpoint", plain.far)];
    let ips = sides.map(|(node, ..)| underlay_ip(lab, node));
    let [Some(ip1), Some(ip2)] = ips else { return Err(Error::Client("finds no underlay".into())) };
    for ((node, pod, address), (local, remote)) in sides.into_iter().zip([(ip1, ip2), (ip2, ip1)]) {
        let (node, pod) = (lab.namespace(node)?, lab.namespace(pod)?);
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(plain.interface.into()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::NetNsFd(pod.as_fd().as_raw_fd()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Vxlan),
                LinkInfo::Data(InfoData::Vxlan(vec![
                    InfoVxlan::Id(plain.vni),
                    InfoVxlan::Port(VXLAN_PORT),
                    InfoVxlan::Learning(false),
                    InfoVxlan::UDPCsum(false),
                    InfoVxlan::Local(local),
                    InfoVxlan::Group(remote),
                ])),
            ]),
        ];
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        // The socket's namespace is where the tunnel's packets come out.
        commit(&node, vec![Request::with(RouteNetlinkMessage::NewLink(link), flags)])?;
        let mut up = LinkMessage::default();
        up.header.index = index(&pod, plain)?;
        up.header.flags = LinkFlags::Up;
        up.header.change_mask = LinkFlags::Up;
        let mut own = AddressMessage::default();
        own.header.family = AddressFamily::Inet;
        own.header.prefix_len = 30;
        own.header.index = up.header.index;
        own.attributes =
            vec![AddressAttribute::Local(address.into()), AddressAttribute::Address(address.into())];
        let requests = vec![
            Request::new(RouteNetlinkMessage::SetLink(up)),
            Request::with(RouteNetlinkMessage::NewAddress(own), flags),
        ];
        commit(&pod, requests)?;
    }
    Ok(())
}

/// Gives a bare veth pair of the local scenario the MTU of a wire.
pub(crate) fn set_mtu(lab: &Lab, plain: &Plain, mtu: u32) -> Result<(), Error> {
    for pod in ["client", "endpoint"] {
        let pod = lab.namespace(pod)?;
        let mut link = LinkMessage::default();
        link.header.index = index(&pod, plain)?;
        link.attributes.push(LinkAttribute::Mtu(mtu));
        commit(&pod, vec![Request::new(RouteNetlinkMessage::SetLink(link))])?;
    }
    Ok(())
}

fn index(pod: &Namespace, plain: &Plain) -> Result<u32, Error> {
    let seen = Seen::of(pod)?;
    let link = seen.links.iter().find(|link| link.name == plain.interface);
    link.map(|link| link.index).ok_or_else(|| Error::Client(format!("has no interface {}", plain.interface)))
}

/// A node's address in the plan of the lab.
fn underlay_ip(lab: &Lab, node: &str) -> Option<Ipv4Addr> {
    let cable = lab.plan.cables.iter().find(|cable| cable.b.bridged && cable.a.namespace == node)?;
    cable.a.addresses.iter().find_map(|net| match net {
        IpNet::V4(net) => Some(Ipv4Net::addr(net)),
        IpNet::V6(_) => None,
    })
}

fn commit(ns: &Namespace, requests: Vec<Request<RouteNetlinkMessage>>) -> Result<(), Error> {
    let failed = || Error::kernel("set up a plain device");
    let refused = Socket::<Route>::open_in(ns).and_then(|mut socket| socket.commit(requests));
    refused.map_err(failed())?.into_iter().next().map_or(Ok(()), |at| {
        let what = "create or change a link".to_owned();
        Err(failed()(nsm_kernel::Error::Refused { what, source: at.refusal }))
    })
}
