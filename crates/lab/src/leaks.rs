//! What is in the kernel and in `/tmp` now, so that a snapshot after the tests can be compared with one before.
//!
//! A snapshot is lines of text in named lists, so that comparing is a difference of sets and a difference is readable
//! as it stands. It covers every network namespace that a process is in or that has a name; what only a descriptor
//! holds cannot be found from outside. Nothing is created, entered namespaces are only read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, ExpressionAttribute, ListAttribute, NfTablesMessage, RuleAttribute,
    RuleMessage, TableAttribute, TableMessage,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use nsm_kernel::netlink::Socket;
use nsm_kernel::netns::{NAMED, Namespace};
use nsm_kernel::nft::Netfilter;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::lab::pids;
use crate::network::Seen;
use crate::process::ProcessId;

/// Every process that has this variable in its environment counts as ours.
pub const MARK: &str = "NSM_TEST_RUN";

/// What clusters of tests call their cgroups and bridges, and where they have their files (`tests/kube/`).
const CLUSTERS: (&str, &str) = ("nsmk", "/var/tmp/nsm-kube-");

/// The machine as far as tests of networks could change it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// Namespaces: `host`, the name under `/run/netns`, or `net:[inode]`.
    pub namespaces: BTreeMap<String, Lists>,
    /// Mounts, processes of ours, temporary files, cgroups.
    pub machine: Lists,
}

/// Lists by their names: `links`, `routes`, `processes`.
pub type Lists = BTreeMap<String, BTreeSet<String>>;

/// Sysctls of a namespace that network code of ours could touch, below `/proc/sys/net`; `*` is any interface.
const SYSCTLS: &[&str] = &[
    "bridge/bridge-nf-call-arptables",
    "bridge/bridge-nf-call-ip6tables",
    "bridge/bridge-nf-call-iptables",
    "bridge/bridge-nf-filter-pppoe-tagged",
    "bridge/bridge-nf-filter-vlan-tagged",
    "core/rmem_max",
    "core/wmem_max",
    "ipv4/conf/*/accept_local",
    "ipv4/conf/*/arp_announce",
    "ipv4/conf/*/arp_ignore",
    "ipv4/conf/*/arp_notify",
    "ipv4/conf/*/forwarding",
    "ipv4/conf/*/proxy_arp",
    "ipv4/conf/*/rp_filter",
    "ipv4/conf/*/send_redirects",
    "ipv4/fib_multipath_hash_policy",
    "ipv4/fwmark_reflect",
    "ipv4/ip_forward",
    "ipv4/ip_nonlocal_bind",
    "ipv4/ip_unprivileged_port_start",
    "ipv4/ping_group_range",
    "ipv6/bindv6only",
    "ipv6/conf/*/accept_dad",
    "ipv6/conf/*/accept_ra",
    "ipv6/conf/*/addr_gen_mode",
    "ipv6/conf/*/autoconf",
    "ipv6/conf/*/disable_ipv6",
    "ipv6/conf/*/forwarding",
    "ipv6/conf/*/proxy_ndp",
    "ipv6/ip_nonlocal_bind",
    "netfilter/nf_conntrack_max",
];

// === impl Snapshot ===

impl Snapshot {
    /// Looks at everything.
    ///
    /// # Errors
    ///
    /// If not even the caller's own namespace can be read. A namespace that vanishes meanwhile, or that we may not
    /// enter, is left out.
    pub fn take() -> Result<Self, Error> {
        let own = Namespace::current().map_err(Error::kernel("open the own network namespace"))?;
        let mut namespaces = BTreeMap::from([("host".to_owned(), contents(&own)?)]);
        let mut known = BTreeSet::from([(own.id().dev, own.id().ino)]);
        for name in Namespace::list_named().unwrap_or_default() {
            if let Ok(namespace) = Namespace::named(&name)
                && known.insert((namespace.id().dev, namespace.id().ino))
            {
                let lists = contents(&namespace).unwrap_or_else(|error| unreadable(&error));
                namespaces.insert(name, lists);
            }
        }
        for pid in pids() {
            let path = format!("/proc/{pid}/ns/net");
            let Ok(stat) = fs::metadata(&path) else { continue };
            if known.insert((stat.dev(), stat.ino()))
                && let Ok(namespace) = Namespace::open(&path)
            {
                let lists = contents(&namespace).unwrap_or_else(|error| unreadable(&error));
                namespaces.insert(format!("net:[{}] of {}", stat.ino(), describe(pid)), lists);
            }
        }
        let machine = Lists::from([
            ("cgroups".into(), cgroups()),
            ("mounts".into(), mounts()),
            ("processes".into(), processes()),
            ("temporary files".into(), files()),
        ]);
        Ok(Self { namespaces, machine })
    }

    /// Reads one that was written as JSON.
    ///
    /// # Errors
    ///
    /// [`Error::Read`] for a file that is not there or not a snapshot.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let failed = |source: io::Error| Error::Read { path: path.to_owned(), source };
        let text = fs::read(path).map_err(failed)?;
        serde_json::from_slice(&text).map_err(|error| failed(error.into()))
    }
}

/// Differences, one line each: `left behind, link: host: veth0 …`, `gone, …`.
#[must_use]
pub fn compare(before: &Snapshot, after: &Snapshot) -> Vec<String> {
    let mut differences = Vec::new();
    let names: BTreeSet<_> = before.namespaces.keys().chain(after.namespaces.keys()).collect();
    for name in names {
        match (before.namespaces.get(name), after.namespaces.get(name)) {
            (Some(before), Some(after)) => differ(&format!("{name}: "), before, after, &mut differences),
            (None, _) => differences.push(format!("left behind, namespace: {name}")),
            (_, None) => differences.push(format!("gone, namespace: {name}")),
        }
    }
    differ("", &before.machine, &after.machine, &mut differences);
    differences
}

// === private helpers ===

fn differ(place: &str, before: &Lists, after: &Lists, differences: &mut Vec<String>) {
    let none = BTreeSet::new();
    let kinds: BTreeSet<_> = before.keys().chain(after.keys()).collect();
    for kind in kinds {
        let (before, after) = (before.get(kind).unwrap_or(&none), after.get(kind).unwrap_or(&none));
        differences
            .extend(after.difference(before).map(|line| format!("left behind, {kind}: {place}{line}")));
        differences.extend(before.difference(after).map(|line| format!("gone, {kind}: {place}{line}")));
    }
}

fn unreadable(error: &Error) -> Lists {
    Lists::from([("unreadable".into(), BTreeSet::from([error.chain()]))])
}

/// What one namespace holds.
fn contents(namespace: &Namespace) -> Result<Lists, Error> {
    let seen = Seen::of(namespace)?;
    let links = seen.links.iter().map(|link| {
        let names = link.altnames.join(" ");
        let alias = &link.alias;
        format!(
            "{}: {} {} up={} mtu={} alias={alias:?} {names}",
            link.index, link.name, link.kind, link.up, link.mtu
        )
    });
    let addresses = seen.addresses.iter().map(|address| format!("{} {}", address.interface, address.address));
    let routes = seen.routes.iter().map(|route| {
        let via = route.via.map(|via| format!(" via {via}")).unwrap_or_default();
        format!("{}{via} dev {} table {} {}", route.to, route.interface, route.table, route.kind)
    });
    let mut lists = Lists::from([
        ("links".into(), links.collect()),
        ("addresses".into(), addresses.collect()),
        ("routes".into(), routes.collect()),
        ("rules".into(), seen.rules.into_iter().collect()),
        ("nftables".into(), nftables(namespace)?),
    ]);
    let inside = || (sysctls(), sockets());
    let (sysctls, sockets) = namespace.run(inside).map_err(Error::kernel("enter a namespace"))?;
    lists.insert("sysctls".into(), sysctls);
    lists.insert("sockets".into(), sockets);
    Ok(lists)
}

/// Tables, chains, rules, without counters: those of a firewall that was there before may count.
fn nftables(namespace: &Namespace) -> Result<BTreeSet<String>, Error> {
    let failed = || Error::kernel("read nftables");
    let mut socket = Socket::<Netfilter>::open_in(namespace).map_err(failed())?;
    let mut lines = BTreeSet::new();
    let questions = [
        NfTablesMessage::GetTable(TableMessage { attributes: Vec::new() }),
        NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() }),
        NfTablesMessage::GetRule(RuleMessage { attributes: Vec::new() }),
    ];
    for question in questions {
        let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
        let answers = match socket.dump(NetfilterMessage::new(header, question)) {
            Ok(answers) => answers,
            // A kernel without nf_tables, or a user who may not ask: then there is nothing of ours either.
            Err(nsm_kernel::netlink::Attempt::Refused(_)) => break,
            Err(attempt) => return Err(failed()(attempt.during("list nftables"))),
        };
        for answer in answers {
            let family = answer.header.family;
            if let NetfilterMessageInner::NfTables(message) = answer.inner {
                lines.extend(nftables_line(&message).map(|line| format!("{family:?} {line}")));
            }
        }
    }
    Ok(lines)
}

fn nftables_line(message: &NfTablesMessage) -> Option<String> {
    let line: Vec<String> = match message {
        NfTablesMessage::NewTable(table) => table
            .attributes
            .iter()
            .filter_map(|attribute| match attribute {
                TableAttribute::Name(name) => Some(format!("table {name}")),
                _ => None,
            })
            .collect(),
        NfTablesMessage::NewChain(chain) => chain
            .attributes
            .iter()
            .filter_map(|attribute| match attribute {
                ChainAttribute::Table(table) => Some(format!("table {table}")),
                ChainAttribute::Name(name) => Some(format!("chain {name}")),
                ChainAttribute::Type(kind) => Some(format!("type {kind}")),
                ChainAttribute::Hook(hook) => Some(format!("{hook:?}")),
                ChainAttribute::Policy(policy) => Some(format!("policy {policy}")),
                // Counts its rules, also those whose expressions are not understood here.
                ChainAttribute::Use(count) => Some(format!("{count} rules")),
                _ => None,
            })
            .collect(),
        NfTablesMessage::NewRule(rule) => rule
            .attributes
            .iter()
            .filter_map(|attribute| match attribute {
                RuleAttribute::Table(table) => Some(format!("table {table}")),
                RuleAttribute::Chain(chain) => Some(format!("chain {chain}")),
                RuleAttribute::Handle(handle) => Some(format!("rule {handle}")),
                RuleAttribute::Expressions(list) => Some(expressions(list)),
                _ => None,
            })
            .collect(),
        _ => return None,
    };
    Some(line.join(" "))
}

fn expressions(list: &[ListAttribute<ExpressionAttribute>]) -> String {
    let names = list.iter().filter_map(|item| match item {
        ListAttribute::Element(attributes) => attributes.iter().find_map(|attribute| match attribute {
            ExpressionAttribute::Name(name) => Some(name.as_str()),
            _ => None,
        }),
        _ => None,
    });
    names.collect::<Vec<_>>().join(" ")
}

/// In the calling thread's namespace.
fn sysctls() -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    let mut read = |key: &str| {
        if let Ok(value) = fs::read_to_string(format!("/proc/sys/net/{key}")) {
            let value = value.split_whitespace().collect::<Vec<_>>().join(" ");
            lines.insert(format!("net.{} = {value}", key.replace('/', ".")));
        }
    };
    for key in SYSCTLS {
        match key.split_once('*') {
            None => read(key),
            Some((directory, name)) => {
                for entry in
                    fs::read_dir(format!("/proc/sys/net/{directory}")).into_iter().flatten().flatten()
                {
                    read(&format!("{directory}{}{name}", entry.file_name().to_string_lossy()));
                }
            }
        }
    }
    lines
}

/// In the calling thread's namespace: who listens, and who has an address of its own choice.
fn sockets() -> BTreeSet<String> {
    // `/proc/net` is the main thread's; only this path is the calling thread's.
    let table = |name: &str| fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
    let ephemeral = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ephemeral = ephemeral.split_whitespace().filter_map(|port| port.parse::<u16>().ok());
    let ephemeral = ephemeral.next().unwrap_or(u16::MAX)..=ephemeral.next().unwrap_or(u16::MAX);
    let mut lines = BTreeSet::new();
    for name in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6"] {
        for line in table(name).lines().skip(1) {
            let mut fields = line.split_whitespace().skip(1);
            let (Some(local), Some(_), Some(state)) = (fields.next(), fields.next(), fields.next()) else {
                continue;
            };
            let port = local.rsplit_once(':').and_then(|(_, port)| u16::from_str_radix(port, 16).ok());
            let listens = state == "0A"; // TCP_LISTEN of net/tcp_states.h
            // UDP sockets with a port of the kernel's choice belong to name look-ups and come and go.
            let chosen = !name.starts_with("tcp") && port.is_some_and(|port| !ephemeral.contains(&port));
            if listens || chosen {
                lines.insert(format!("{name} {local} (port {})", port.unwrap_or_default()));
            }
        }
    }
    for line in table("unix").lines().skip(1) {
        let fields: Vec<_> = line.split_whitespace().collect();
        // Flags: __SO_ACCEPTCON of linux/net.h; the path is the eighth field, if there is one.
        if let [_, _, _, flags, kind, _, _, path] = fields.as_slice()
            && (*flags == "00010000" || *kind == "0002")
        {
            lines.insert(format!("unix {path}"));
        }
    }
    lines
}

fn mounts() -> BTreeSet<String> {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    let ours = table.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let kind = right.split(' ').next()?;
        let mut fields = left.split(' ').skip(3);
        let (root, place) = (fields.next()?, fields.next()?);
        let ours = kind == "nsfs" || place.starts_with("/run/nsm") || place.starts_with(CLUSTERS.1);
        ours.then(|| format!("{place} ({kind} {root})"))
    });
    ours.collect()
}

/// Those that clusters of tests make, of each controller or of all.
fn cgroups() -> BTreeSet<String> {
    let below = |directory: &Path| {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let entries = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let top = below(Path::new("/sys/fs/cgroup"));
    let all = top.iter().cloned().chain(top.iter().flat_map(|controller| below(controller)));
    let ours = all
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(CLUSTERS.0)));
    ours.map(|path| path.display().to_string()).collect()
}

/// Programs of this project and what they started, but neither this process nor those that wait for it.
fn processes() -> BTreeSet<String> {
    let parent = |pid: u32| -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    let own = std::process::id();
    let waiting: BTreeSet<u32> = std::iter::successors(Some(own), |pid| parent(*pid)).collect();
    let is_ours = |pid: u32| {
        let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let exe = exe.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let marked = environment.split(|byte| *byte == 0).any(|pair| pair.starts_with(MARK.as_bytes()));
        // The kernel appends " (deleted)" when the file was replaced.
        marked || exe == "nsm" || exe.starts_with("nsm ")
    };
    let alive = |pid: &u32| ProcessId::of(*pid).is_some();
    pids()
        .filter(|pid| !waiting.contains(pid))
        .filter(alive)
        .filter(|pid| is_ours(*pid))
        .map(describe)
        .collect()
}

fn describe(pid: u32) -> String {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let command = String::from_utf8_lossy(&command).replace('\0', " ");
    format!("process {pid} ({})", command.trim())
}

fn files() -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    let mut walk = vec![Path::new("/run/nsm").to_owned(), Path::new(NAMED).to_owned()];
    while let Some(directory) = walk.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            lines.insert(entry.path().display().to_string());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                walk.push(entry.path());
            }
        }
    }
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        // The second is the prefix of the tempfile crate.
        if name.starts_with("nsm") || name.starts_with(".tmp") {
            lines.insert(entry.path().display().to_string());
        }
    }
    for entry in fs::read_dir("/var/tmp").into_iter().flatten().flatten() {
        lines.extend(Some(entry.path().display().to_string()).filter(|path| path.starts_with(CLUSTERS.1)));
    }
    lines
}
