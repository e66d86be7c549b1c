//! One leak of each kind is planted, in a namespace, a directory and a process of the test's own, and the comparison
//! of snapshots names each of them; afterwards it finds nothing.

#![allow(clippy::print_stdout, reason = "a test that cannot run says so")]

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nsm_kernel::netlink::{Request, Route, Socket};
use nsm_kernel::netns::Namespace;
use nsm_lab::leaks::{MARK, Snapshot, compare};
use rustix::net::{AddressFamily as Domain, SendFlags, SocketFlags, SocketType, netlink, send, socket_with};

/// A namespace that goes when the test does.
struct Planted(String);

impl Planted {
    fn new(what: &str) -> Self {
        let name = format!("nsm-leak-{what}-{}", std::process::id());
        Namespace::create_named(&name).expect("make a namespace");
        Self(name)
    }

    fn open(&self) -> Namespace {
        Namespace::named(&self.0).expect("open it")
    }

    fn socket(&self) -> Socket<Route> {
        Socket::open_in(&self.open()).expect("netlink")
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        let _ = Namespace::delete_named(&self.0);
    }
}

/// A process that goes when the test does.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn may_not(test: &str) -> bool {
    let skip = !rustix::process::geteuid().is_root();
    if skip {
        println!("SKIPPED {test}: needs root to make network namespaces");
    }
    skip
}

fn make(socket: &mut Socket<Route>, message: RouteNetlinkMessage) {
    socket.request(Request::with(message, NLM_F_CREATE | NLM_F_EXCL)).expect("the kernel takes it");
}

/// Differences that name our namespace, or anything outside of namespaces that names `word`.
fn found(before: &Snapshot, word: &str) -> Vec<String> {
    let after = Snapshot::take().expect("snapshot");
    compare(before, &after).into_iter().filter(|line| line.contains(word)).collect()
}

#[track_caller]
fn one(before: &Snapshot, word: &str, kind: &str, detail: &str) {
    let lines = found(before, word);
    let hit =
        lines.iter().any(|line| line.starts_with(&format!("left behind, {kind}: ")) && line.contains(detail));
    assert!(hit, "a planted {kind} ({detail}) is not among {lines:#?}");
}

#[test]
fn a_link_an_address_a_route_and_a_rule() {
    if may_not("a_link_an_address_a_route_and_a_rule") {
        return;
    }
    let planted = Planted::new("net");
    let before = Snapshot::take().expect("snapshot");
    assert_eq!(found(&before, &planted.0), [""; 0]);

    let mut socket = planted.socket();
    let mut link = LinkMessage::default();
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes.push(LinkAttribute::IfName("lost0".into()));
    link.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]));
    make(&mut socket, RouteNetlinkMessage::NewLink(link));
    one(&before, &planted.0, "links", "lost0 bridge up=true");

    let mut address = AddressMessage::default();
    address.header.family = AddressFamily::Inet;
    address.header.prefix_len = 24;
    address.header.index = 2;
    address.attributes.push(AddressAttribute::Local([192, 0, 2, 7].into()));
    make(&mut socket, RouteNetlinkMessage::NewAddress(address));
    one(&before, &planted.0, "addresses", "lost0 192.0.2.7/24");

    let mut route = RouteMessage::default();
    route.header.address_family = AddressFamily::Inet;
    route.header.destination_prefix_length = 24;
    route.header.table = 77;
    route.header.protocol = RouteProtocol::Static;
    route.header.scope = RouteScope::Link;
    route.header.kind = RouteType::Unicast;
    route.attributes.push(RouteAttribute::Destination(std::net::IpAddr::from([198, 51, 100, 0]).into()));
    route.attributes.push(RouteAttribute::Oif(2));
    make(&mut socket, RouteNetlinkMessage::NewRoute(route));
    one(&before, &planted.0, "routes", "198.51.100.0/24 dev lost0 table 77");

    let mut rule = RuleMessage::default();
    rule.header.family = AddressFamily::Inet;
    rule.header.action = RuleAction::ToTable;
    rule.header.table = 77;
    rule.attributes.push(RuleAttribute::Priority(4711));
    make(&mut socket, RouteNetlinkMessage::NewRule(rule));
    one(&before, &planted.0, "rules", "4711");
}

#[test]
fn a_table_of_nftables() {
    if may_not("a_table_of_nftables") {
        return;
    }
    let planted = Planted::new("nft");
    let before = Snapshot::take().expect("snapshot");
    let made = planted.open().run(|| new_nft_table(b"lost\0\0\0\0")).expect("enter");
    match made {
        Ok(()) => one(&before, &planted.0, "nftables", "table lost"),
        Err(error) => println!("SKIPPED a_table_of_nftables: this kernel has no nf_tables: {error}"),
    }
}

#[test]
fn a_sysctl_and_sockets() {
    if may_not("a_sysctl_and_sockets") {
        return;
    }
    let planted = Planted::new("sock");
    let before = Snapshot::take().expect("snapshot");
    let directory = tempfile::Builder::new().prefix("nsm-leak-").tempdir().expect("directory");
    let unix = directory.path().join("lost.sock");
    let sockets = planted
        .open()
        .run(|| {
            fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("sysctl");
            let tcp = TcpListener::bind("127.0.0.1:4711").expect("listen");
            let udp = std::net::UdpSocket::bind("127.0.0.1:4712").expect("bind");
            (tcp, udp, UnixListener::bind(&unix).expect("listen"))
        })
        .expect("enter");
    one(&before, &planted.0, "sysctls", "net.ipv4.ip_forward = 1");
    one(&before, &planted.0, "sockets", "(port 4711)");
    one(&before, &planted.0, "sockets", "(port 4712)");
    one(&before, &planted.0, "sockets", "lost.sock");
    one(&before, "nsm-leak-", "temporary files", &directory.path().display().to_string());
    drop(sockets);
}

#[test]
fn a_namespace_its_mount_and_a_process() {
    if may_not("a_namespace_its_mount_and_a_process") {
        return;
    }
    let before = Snapshot::take().expect("snapshot");
    let planted = Planted::new("ns");
    let mut command = Command::new("sleep");
    command.arg("4711").env(MARK, "1").stdin(Stdio::null());
    let process = planted.open().run(|| command.spawn()).expect("enter").map(Running).expect("start");
    // The exec is over when the file is sleep's.
    let pid = process.0.id();
    let end = Instant::now() + Duration::from_secs(10);
    while !fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(b"sleep")) {
        assert!(Instant::now() < end, "sleep never began");
        std::thread::yield_now();
    }
    one(&before, &planted.0, "namespace", &planted.0);
    one(&before, &planted.0, "mounts", &planted.0);
    one(&before, &format!("process {pid} "), "processes", "sleep 4711");

    // The name goes, the process stays: its namespace is found all the same.
    let name = planted.0.clone();
    drop(planted);
    one(&before, &format!("process {pid} "), "namespace", "net:[");
    drop(process);
    assert_eq!(found(&before, &name), [""; 0]);
    assert_eq!(found(&before, &format!("process {pid} ")), [""; 0]);
}

#[test]
fn what_a_cluster_of_tests_makes() {
    if may_not("what_a_cluster_of_tests_makes") {
        return;
    }
    // Of the first controller, or of all where there is one hierarchy.
    let root = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"].into_iter().find(|root| Path::new(root).is_dir());
    let name = format!("leak-{}", std::process::id());
    let group = Path::new(root.expect("cgroups")).join(format!("nsmk{name}"));
    let directory = Path::new("/var/tmp").join(format!("nsm-kube-{name}"));
    let before = Snapshot::take().expect("snapshot");
    fs::create_dir(&directory).expect("a directory");
    let made = fs::create_dir(&group);
    let (files, groups) = (found(&before, "nsm-kube-"), found(&before, "nsmk"));
    fs::remove_dir(&directory).expect("remove it");
    assert_eq!(files, [format!("left behind, temporary files: {}", directory.display())]);
    if made.is_err() {
        println!("SKIPPED what_a_cluster_of_tests_makes: no cgroup can be made here");
        return;
    }
    fs::remove_dir(&group).expect("remove it");
    assert!(groups.contains(&format!("left behind, cgroups: {}", group.display())), "{groups:?}");
    assert_eq!(found(&before, &name), [""; 0]);
}

#[test]
fn a_file_that_is_no_snapshot() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("x.json");
    fs::write(&path, "{").expect("write");
    assert!(Snapshot::load(&path).expect_err("no JSON").to_string().starts_with("cannot read /"));
}

/// One table of family inet, in the smallest possible batch (`nfnetlink.h`, `nf_tables.h`).
fn new_nft_table(name: &[u8; 8]) -> io::Result<()> {
    let message = |kind: u16, flags: u16, sequence: u32, body: &[u8]| {
        let mut bytes = Vec::new();
        bytes.extend((16 + body.len() as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((flags | 1).to_ne_bytes()); // NLM_F_REQUEST
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        bytes
    };
    let nf_tables = [0, 0, 0, 10]; // family, version, subsystem in network order
    let mut table = vec![1, 0, 0, 0]; // NFPROTO_INET
    table.extend(12u16.to_ne_bytes());
    table.extend(1u16.to_ne_bytes()); // NFTA_TABLE_NAME
    table.extend(name);
    let batch = [
        message(0x10, 0, 1, &nf_tables),          // NFNL_MSG_BATCH_BEGIN
        message(10 << 8, 0x400 | 0x4, 2, &table), // NFT_MSG_NEWTABLE, NLM_F_CREATE | NLM_F_ACK
        message(0x11, 0, 3, &nf_tables),          // NFNL_MSG_BATCH_END
    ]
    .concat();
    let socket =
        socket_with(Domain::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER))?;
    send(socket.as_fd(), &batch, SendFlags::empty())?;
    let mut answer = [0u8; 256];
    let (length, _) = rustix::net::recv(socket.as_fd(), &mut answer[..], rustix::net::RecvFlags::empty())?;
    match answer[..length].get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}
