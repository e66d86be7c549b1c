//! What the tests share: a node and two pods as namespaces without names, which end with the test however it ends.
#![allow(dead_code, reason = "each test program uses a part")]

use std::net::{IpAddr, UdpSocket};
use std::process::{Child, Command};
use std::time::Duration;

use ipnet::IpNet;
use nsm_kernel::netns::Namespace;
use nsm_kernel::plan::{EndPlan, IpContext, Side, Vxlan, WirePlan};
use nsm_kernel::{Applied, Kernel, Nsids};

/// A node with two pods.
pub(crate) struct Node {
    pub(crate) ns: Namespace,
    pub(crate) client: Namespace,
    pub(crate) endpoint: Namespace,
    pub(crate) kernel: Kernel,
}

/// The test's namespaces, or `None` with a word why it cannot run.
pub(crate) fn node(test: &str) -> Option<Node> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED {test}: network namespaces need root");
        return None;
    }
    let ns = Namespace::unnamed().unwrap();
    let kernel = Kernel::new(ns.try_clone().unwrap()).unwrap();
    Some(Node { ns, client: Namespace::unnamed().unwrap(), endpoint: Namespace::unnamed().unwrap(), kernel })
}

impl Node {
    pub(crate) fn known(&self) -> [&Namespace; 2] {
        [&self.client, &self.endpoint]
    }

    /// A veth wire with the addresses and routes of a point-to-point pair.
    pub(crate) fn veth(&self, id: &str, ifname: &str) -> WirePlan {
        let context = context();
        let near = EndPlan::new(Side::Near, self.client.id(), ifname, id).with_context(Side::Near, &context);
        let far = EndPlan::new(Side::Far, self.endpoint.id(), ifname, id).with_context(Side::Far, &context);
        WirePlan::veth(id, near.unwrap(), far.unwrap())
    }

    pub(crate) fn vxlan(&self, id: &str, ifname: &str, vni: u32) -> WirePlan {
        let end = EndPlan::new(Side::Near, self.client.id(), ifname, id).with_context(Side::Near, &context());
        WirePlan::vxlan(id, tunnel(vni), Side::Near, end.unwrap())
    }
}

pub(crate) fn tunnel(vni: u32) -> Vxlan {
    Vxlan {
        vni,
        local: "192.0.2.1".parse().unwrap(),
        remote: "192.0.2.2".parse().unwrap(),
        port: 4789,
        remote_port: 4789,
    }
}

pub(crate) fn context() -> IpContext {
    IpContext {
        src_addrs: vec!["172.16.1.3/32".into(), "2001:db8::3/128".into()],
        dst_addrs: vec!["172.16.1.2/32".into(), "2001:db8::2/128".into()],
        mtu: 9000,
        ..IpContext::default()
    }
}

pub(crate) fn nsids(applied: &nsm_kernel::Applied) -> Nsids {
    Nsids { near: applied.near.map(|end| end.nsid), far: applied.far.map(|end| end.nsid) }
}

/// Runs a program inside a namespace and returns what it prints; it has to succeed.
pub(crate) fn output(ns: &Namespace, command: &str) -> String {
    let mut words = command.split_whitespace();
    let output = ns.run(|| Command::new(words.next().unwrap()).args(words).output()).unwrap().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Whether a program succeeds inside a namespace.
pub(crate) fn succeeds(ns: &Namespace, command: &str) -> bool {
    let mut words = command.split_whitespace();
    ns.run(|| Command::new(words.next().unwrap()).args(words).output()).unwrap().unwrap().status.success()
}

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// Whether a datagram from one namespace reaches that address in the other, and the answer comes back.
pub(crate) fn reaches(from: &Namespace, to: &Namespace, address: &str) -> bool {
    let address: IpAddr = address.parse().unwrap();
    let wait = Some(Duration::from_secs(2));
    let server = to.run(|| UdpSocket::bind((address, 0))).unwrap().unwrap();
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let client = from.run(|| UdpSocket::bind(any)).unwrap().unwrap();
    server.set_read_timeout(wait).unwrap();
    client.set_read_timeout(wait).unwrap();
    let mut buffer = [0; 4];
    client.send_to(b"ping", server.local_addr().unwrap()).is_ok()
        && server.recv_from(&mut buffer).and_then(|(_, peer)| server.send_to(b"pong", peer)).is_ok()
        && client.recv_from(&mut buffer).is_ok()
        && &buffer == b"pong"
}

/// The wire from the client to an interface of a function, which gets no addresses.
pub(crate) fn near_wire(
    node: &Node,
    function: &Namespace,
    client_if: &str,
    function_if: &str,
) -> (WirePlan, Applied) {
    let id = format!("{client_if}-{function_if}");
    let end = EndPlan::new(Side::Near, node.client.id(), client_if, &id);
    let near = end.with_context(Side::Near, &context()).unwrap();
    made(node, WirePlan::veth(&id, near, bare(Side::Far, function, function_if)), &[&node.client, function])
}

/// The wire from an interface of a function to the endpoint.
pub(crate) fn far_wire(
    node: &Node,
    function: &Namespace,
    function_if: &str,
    endpoint_if: &str,
) -> (WirePlan, Applied) {
    let id = format!("{function_if}-{endpoint_if}");
    let end = EndPlan::new(Side::Far, node.endpoint.id(), endpoint_if, &id);
    let far = end.with_context(Side::Far, &context()).unwrap();
    made(node, WirePlan::veth(&id, bare(Side::Near, function, function_if), far), &[function, &node.endpoint])
}

pub(crate) fn bare(side: Side, function: &Namespace, ifname: &str) -> EndPlan {
    let mut end = EndPlan::new(side, function.id(), ifname, ifname);
    end.mtu = Some(9000);
    end
}

pub(crate) fn made(node: &Node, plan: WirePlan, known: &[&Namespace]) -> (WirePlan, Applied) {
    let applied = node.kernel.apply(&plan, known).unwrap();
    (plan, applied)
}

/// A process that lives in a namespace, as a pod has one.
pub(crate) struct Pod(Child);

impl Pod {
    pub(crate) fn start(ns: &Namespace) -> Self {
        Self(ns.run(|| Command::new("sleep").arg("600").spawn()).unwrap().unwrap())
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a test on a thread with mounts of its own, and an own empty file system at `/run`, so that it neither sees nor
/// leaves anything of the machine's.
pub(crate) fn with_private_run(test: impl FnOnce() + Send) {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    use rustix::thread::UnshareFlags;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            #[expect(deprecated, reason = "its successor is unsafe, for a flag that is not used here")]
            rustix::thread::unshare(UnshareFlags::FS | UnshareFlags::NEWNS).unwrap();
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), Some(c"size=64k,mode=755")).unwrap();
            test();
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}
