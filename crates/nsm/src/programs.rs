//! Upstream's programs that this one takes the place of, by the names of their images. The image (`cargo xtask image`) has
//! a link of each name, and is tagged with it; whoever is called by one of these names has its role.
#![allow(dead_code, reason = "nsm reads roles, xtask, which includes this file, whom the image runs as")]

/// One of upstream's programs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Program {
    /// As its image is named; `/bin/NAME` in ours.
    pub(crate) name: &'static str,
    /// What `nsm` is told instead.
    pub(crate) role: &'static [&'static str],
    /// Whether upstream's manifests, which do not say as whom it runs, need it to be root: for the node's network, for
    /// sockets on the node, for port 443, for port 53 and resolv.conf.
    pub(crate) root: bool,
}

const fn program(name: &'static str, role: &'static [&'static str], root: bool) -> Program {
    Program { name, role, root }
}

/// All of them.
pub(crate) const PROGRAMS: [Program; 12] = [
    program("cmd-nsmgr", &["manager"], true),
    program("cmd-forwarder-vpp", &["forwarder"], true),
    program("cmd-registry-memory", &["registry"], false),
    program("cmd-registry-k8s", &["registry", "--store", "kubernetes"], false),
    program("cmd-nsc", &["client"], true),
    program("cmd-nsc-init", &["client", "--init"], true),
    program("cmd-nse-icmp-responder", &["endpoint"], false),
    program("cmd-nse-firewall-vpp", &["firewall"], false),
    program("cmd-ipam-vl3", &["ipam"], false),
    program("cmd-admission-webhook-k8s", &["webhook"], true),
    program("cmd-map-ip-k8s", &["map-ip"], false),
    program("cmd-cluster-info-k8s", &["cluster-info"], false),
];

/// Programs inside of upstream's images that manifests name.
pub(crate) const INSIDE: [Program; 3] = [
    program("nsmgr", &["manager"], true),
    program("forwarder", &["forwarder"], true),
    program("grpc-health-probe", &["probe"], false),
];
