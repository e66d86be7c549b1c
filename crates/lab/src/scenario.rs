//! The scenario file: nodes, pods, NetworkService resources as a cluster would get them, and what must hold.
//!
//! Parsing validates: a [`Scenario`] that exists names only things that exist. Errors carry file, line and field.
//!
//! ```
//! let text = "
//! name: tiny
//! nodes: [node1]
//! networkServices:
//! - apiVersion: networkservicemesh.io/v1
//!   kind: NetworkService
//!   metadata: {name: web}
//! pods:
//! - {name: client, node: node1, annotations: {networkservicemesh.io: kernel://web/nsm0}}
//! - {name: server, node: node1, endpoint: {services: [web], cidrPrefix: [172.16.1.2/31]}, serve: [80]}
//! expect:
//! - ping: {from: client, to: 172.16.1.2}
//! ";
//! let scenario = nsm_lab::Scenario::parse(text, "tiny.yaml".as_ref())?;
//! assert_eq!(scenario.pods.len(), 2);
//! # Ok::<(), nsm_lab::Error>(())
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;
use nsm_api::nsurl::NsUrl;
use nsm_api::resource;
use serde::de::{Error as _, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};
use serde_saphyr::Spanned;

use crate::Error;

/// The annotation that makes a pod a client (`spec/kubernetes.md` 1.1).
pub const ANNOTATION: &str = "networkservicemesh.io";
/// The same in v0.2 (`spec/kubernetes.md` 1.8); its interface defaults to `nsm0`.
pub const LEGACY_ANNOTATION: &str = "ns.networkservicemesh.io";
/// How long an expectation may take to come true when it says nothing else.
pub const WITHIN: Duration = Duration::from_secs(5);
/// How long a blocked port must stay silent when the expectation says nothing else.
pub const SILENCE: Duration = Duration::from_secs(1);

/// How long a fault lasts that ends by itself and says nothing else.
pub const LASTS: Duration = Duration::from_secs(1);

/// Addresses of the underlay, a /24.
const MAX_NODES: usize = 254;

/// A parsed and checked scenario file.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// The lab's name: prefix of its namespaces, directory under `/run/nsm/lab`, and with `.lab` its trust domain.
    pub name: String,
    /// NetworkService resources, as text, exactly as the file has them.
    pub network_services: Vec<String>,
    /// Names of the nodes; the first one runs the registry.
    pub nodes: Vec<String>,
    /// How the daemons of a node are divided into processes.
    pub daemons: Daemons,
    /// The pods in the order of the file.
    pub pods: Vec<Pod>,
    /// Plain cables between pods (not network service wires): what lies behind a gateway.
    pub cables: Vec<[CableEnd; 2]>,
    /// What must hold, checked in this order.
    pub expect: Vec<Expectation>,
    /// What is valid but may not mean what its author thinks.
    pub warnings: Vec<String>,
}

/// How the daemons of a node are divided into processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Daemons {
    /// Each role is a process: `registry`, `node1/manager`, `node1/forwarder`, …
    #[default]
    Separate,
    /// All of a node are one (`nsm node`): `node1/node`, …; the first one is the registry too.
    Together,
}

impl Daemons {
    /// The names of the processes of a node, in the order in which they start.
    #[must_use]
    pub fn of(self, node: &str) -> Vec<String> {
        match self {
            Self::Separate => vec![format!("{node}/manager"), format!("{node}/forwarder")],
            Self::Together => vec![format!("{node}/node")],
        }
    }
}

/// A pod: a network namespace on a node, at most one program of the mesh, and servers.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pod {
    /// Its namespace is `<lab>.<name>`.
    pub name: String,
    /// The node whose manager and identity socket it uses.
    pub node: String,
    /// As on a Kubernetes pod: `networkservicemesh.io: kernel://service/nsm0` makes it a client.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// Serves network services, ends wires, owns addresses.
    pub endpoint: Option<Endpoint>,
    /// A network function that filters.
    pub firewall: Option<Firewall>,
    /// A network function that passes everything on.
    pub passthrough: Option<Passthrough>,
    /// More environment for its program, as in a pod's `env`.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Ports on which the lab's small HTTP server listens in this pod.
    #[serde(default)]
    pub serve: Vec<u16>,
    /// Names and their addresses, which a small DNS server in this pod knows: it answers on port 53 of all addresses.
    #[serde(default)]
    pub dns: BTreeMap<String, Vec<IpAddr>>,
    /// A client's `resolv.conf` before it has wires, as text; empty without this. Programs of the lab read it where the
    /// client rewrites it: in the lab's directory, as `POD.resolv.conf`.
    #[serde(default)]
    pub resolv_conf: String,
    /// Network sysctls of the pod, as in a pod's `securityContext.sysctls`: `net.ipv4.ip_forward: "1"`.
    #[serde(default)]
    pub sysctls: BTreeMap<String, String>,
}

/// `nsm endpoint`'s part of a pod.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Endpoint {
    /// Names of the network services it serves.
    pub services: Vec<String>,
    /// Its labels, for the services' selectors.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Address pools, one pair of addresses from each (`NSM_CIDR_PREFIX`).
    pub cidr_prefix: Vec<IpNet>,
    /// Networks behind the endpoint, told to every client as `src_routes` (`NSM_ROUTES`).
    #[serde(default)]
    pub routes: Vec<IpNet>,
    /// What clients are told of DNS (`NSM_DNS_CONFIGS`), spelled as there.
    #[serde(default)]
    pub dns_configs: Vec<DnsConfig>,
    /// Its clients' policy routes, as text (`policies: |`), in the form of the file that `NSM_PBR_CONFIG_PATH` names.
    #[serde(default)]
    pub policies: String,
}

/// A part of [`Endpoint::dns_configs`].
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DnsConfig {
    /// Whom to ask.
    pub dns_server_ips: Vec<IpAddr>,
    /// What names are searched with.
    #[serde(default)]
    pub search_domains: Vec<String>,
}

/// `nsm firewall`'s part of a pod.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Firewall {
    /// The network service that it is a link of.
    pub service: String,
    /// Its labels: selected by them, and asking with them for the next link.
    pub labels: BTreeMap<String, String>,
    /// The rules file, as text (`aclConfig: |`), in either syntax of `spec/data-plane.md` 5.4.
    pub acl_config: String,
}

/// `nsm passthrough`'s part of a pod.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Passthrough {
    /// The network service that it is a link of.
    pub service: String,
    /// Its labels: selected by them, and asking with them for the next link.
    pub labels: BTreeMap<String, String>,
}

/// One end of a plain cable.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CableEnd {
    /// The pod it is plugged into.
    pub pod: String,
    /// The interface's name there.
    pub interface: String,
    /// Addresses of the interface.
    #[serde(default)]
    pub addresses: Vec<IpNet>,
    /// Routes through this interface.
    #[serde(default)]
    pub routes: Vec<CableRoute>,
}

/// A route of a [`CableEnd`].
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CableRoute {
    /// Destination.
    pub to: IpNet,
    /// The gateway; without one the destination is on the link.
    pub via: Option<IpAddr>,
}

/// Something that must hold, or (a fault) that is done while something must hold.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Expectation {
    /// Every echo request is answered, or none.
    Ping(Ping),
    /// A TCP port opens, or stays silent.
    Tcp(Tcp),
    /// A page is served.
    Http(Http),
    /// A name has an address, or none.
    Dns(Dns),
    /// A route is there, or not.
    Route(Route),
    /// An interface is there, or not.
    Interface(Interface),
    /// An address is there, or not.
    Address(Address),
    /// Packets of a kind go some way.
    Lookup(Lookup),
    /// Something is broken, perhaps mended, and packets are counted meanwhile.
    Fault(Box<Fault>),
}

/// See [`Expectation::Ping`].
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ping {
    /// The pod that asks.
    pub from: String,
    /// The address asked.
    pub to: IpAddr,
    /// How many requests must be answered in a row.
    #[serde(default = "five")]
    pub count: u32,
    /// `answered` (the default) or `unanswered`: not one of them is, or none can even be sent.
    #[serde(default)]
    pub is: Echoed,
    /// How long it may take until they are; without, not one may be lost: a wire that is up carries packets.
    #[serde(default, deserialize_with = "some_duration")]
    pub within: Option<Duration>,
}

/// What becomes of echo requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub enum Echoed {
    /// Answers come.
    #[default]
    Answered,
    /// None comes.
    Unanswered,
}

/// See [`Expectation::Tcp`].
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Tcp {
    /// The pod that connects.
    pub from: String,
    /// Address and port.
    pub to: SocketAddr,
    /// `open` or `blocked`.
    pub is: PortState,
    /// For `blocked`: the pod in which the port must be seen listening, so that silence proves a filter.
    pub listens_in: Option<String>,
    /// Bound; for `blocked` the length of the silence.
    #[serde(default, deserialize_with = "some_duration")]
    pub within: Option<Duration>,
}

/// What a port is expected to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PortState {
    /// Connects.
    Open,
    /// Neither connects nor refuses: packets vanish.
    Blocked,
}

/// See [`Expectation::Http`].
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Http {
    /// The pod that asks.
    pub from: String,
    /// `http://ADDRESS[:PORT]/path`; an IPv6 address stands in brackets.
    pub url: Url,
    /// Expected status code.
    #[serde(default = "ok")]
    pub status: u16,
    /// Text that the body must contain.
    pub body: Option<String>,
    /// Bound.
    #[serde(default = "within", deserialize_with = "duration")]
    pub within: Duration,
}

/// See [`Expectation::Dns`].
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Dns {
    /// The client's pod, whose resolv.conf says whom to ask.
    pub from: String,
    /// The name, as a program would write it: without a final dot the resolver's search domains count.
    pub name: String,
    /// What it is expected to be; without this: that there is no such name.
    pub address: Option<IpAddr>,
    /// Ask by TCP.
    #[serde(default)]
    pub tcp: bool,
    /// Bound.
    #[serde(default = "within", deserialize_with = "duration")]
    pub within: Duration,
}

/// Whether a kernel object is expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub enum Presence {
    /// It is there.
    #[default]
    Present,
    /// It is not there (any more).
    Gone,
}

/// See [`Expectation::Route`].
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Route {
    /// In which pod.
    pub pod: String,
    /// Its destination.
    pub to: IpNet,
    /// Its gateway, if it matters.
    pub via: Option<IpAddr>,
    /// Its interface, if it matters.
    pub interface: Option<String>,
    /// `present` (the default) or `gone`.
    #[serde(default)]
    pub is: Presence,
    /// Bound.
    #[serde(default = "within", deserialize_with = "duration")]
    pub within: Duration,
}

/// See [`Expectation::Interface`].
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Interface {
    /// In which pod.
    pub pod: String,
    /// Its name.
    pub name: String,
    /// Its MTU in bytes, if that matters.
    pub mtu: Option<u32>,
    /// `present` (the default) or `gone`.
    #[serde(default)]
    pub is: Presence,
    /// Bound.
    #[serde(default = "within", deserialize_with = "duration")]
    pub within: Duration,
}

/// See [`Expectation::Address`].
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Address {
    /// In which pod.
    pub pod: String,
    /// On which interface.
    pub interface: String,
    /// With its prefix length.
    pub address: IpNet,
    /// `present` (the default) or `gone`.
    #[serde(default)]
    pub is: Presence,
    /// Bound.
    #[serde(default = "within", deserialize_with = "duration")]
    pub within: Duration,
}

/// See [`Expectation::Lookup`]: which way the kernel would send such a packet (`ip route get`).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Lookup {
    /// In which pod.
    pub pod: String,
    /// Where the packet is sent.
    pub to: IpAddr,
    /// Its source address, if the sender has chosen one.
    pub from: Option<IpAddr>,
    /// Its protocol.
    pub protocol: Transport,
    /// The port that it comes from, if that matters.
    pub source_port: Option<u16>,
    /// The port that it goes to, if that matters.
    pub port: Option<u16>,
    /// The gateway that it is given to; without this: none.
    pub via: Option<IpAddr>,
    /// The interface that it leaves by.
    pub interface: String,
    /// The routing table that says so.
    pub table: u32,
    /// Bound.
    #[serde(default = "within", deserialize_with = "duration")]
    pub within: Duration,
}

/// A protocol above IP that has ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// See [`Expectation::Fault`]. At least one thing happens; several happen in the order of the fields.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Fault {
    /// Processes that are ended together: `identity`, `registry`, `NODE/manager`, `NODE/forwarder`, or pods' names; one
    /// or a list.
    #[serde(deserialize_with = "one_or_more")]
    pub kill: Vec<String>,
    /// `KILL` (the default) or `TERM`.
    pub signal: FaultSignal,
    /// A pod that goes, its namespace and its process with it.
    pub remove: Option<String>,
    /// Make what was killed or removed again, and wait until it is ready.
    pub restart: bool,
    /// Identity, which is killed and made again, has another CA then.
    pub new_ca: bool,
    /// Processes, and pods with their namespaces, that are made again after a fault before this one ended them; one or a
    /// list.
    #[serde(deserialize_with = "one_or_more")]
    pub start: Vec<String>,
    /// Processes that stand still for a while; one or a list.
    #[serde(deserialize_with = "one_or_more")]
    pub freeze: Vec<String>,
    /// A node that nobody reaches for a while, nor it them: its packets get lost without a word.
    pub cut: Option<String>,
    /// An interface that is set down; nobody but the mesh sets it up again.
    pub down: Option<Link>,
    /// A node whose packets get lost or late for a while, in both directions.
    pub impair: Option<Impairment>,
    /// A clock that is wrong for a while, and then right again.
    pub clock: Option<Shift>,
    /// A node whose disk is full for a while: nothing more can be written where its forwarder keeps its plans.
    pub full: Option<String>,
    /// A NetworkService resource, as text (`apply: |`), in place of that of the same name.
    pub apply: Option<String>,
    /// How long `freeze`, `cut`, `impair`, `clock` and `full` last.
    #[serde(rename = "for", deserialize_with = "duration")]
    pub lasts: Duration,
    /// A ping every millisecond from before the fault until everything is well again.
    pub ping: Option<FaultPing>,
    /// How many of those may stay unanswered: none, without this and without `silence`.
    pub lost: Option<u64>,
    /// The longest time in which none may be answered.
    #[serde(deserialize_with = "some_duration")]
    pub silence: Option<Duration>,
    /// Bound for dying, being ready again and, with `ping`, answers in a row.
    #[serde(deserialize_with = "duration")]
    pub within: Duration,
}

/// An interface of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Link {
    /// The pod.
    pub pod: String,
    /// The interface's name.
    pub interface: String,
}

/// What becomes of the packets of a node's cable.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Impairment {
    /// The node.
    pub node: String,
    /// So many of a hundred get lost.
    #[serde(default)]
    pub loss: u8,
    /// Each is late by half of this up to all of it: they overtake each other.
    #[serde(default, deserialize_with = "duration")]
    pub delay: Duration,
}

/// A clock that is wrong: what the programs read that see a node's, never the machine's own.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Shift {
    /// A node, with the pods on it, or `identity`.
    pub of: String,
    /// Ahead by so much; behind, if it is negative.
    pub seconds: i64,
}

/// How a process is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
pub enum FaultSignal {
    /// Without warning.
    #[default]
    KILL,
    /// Asked to end.
    TERM,
}

/// The ping that runs across a [`Fault`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FaultPing {
    /// The pod that asks.
    pub from: String,
    /// The addresses asked, one or a list: any of them may answer.
    #[serde(deserialize_with = "one_or_more")]
    pub to: Vec<IpAddr>,
}

/// `http://ADDRESS[:PORT]/path`: the little that a probe in a namespace without DNS needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    /// Address and port.
    pub address: SocketAddr,
    /// Begins with a slash.
    pub path: String,
}

// === impl Fault ===

impl Default for Fault {
    fn default() -> Self {
        Self {
            kill: Vec::new(),
            signal: FaultSignal::KILL,
            remove: None,
            restart: false,
            new_ca: false,
            start: Vec::new(),
            freeze: Vec::new(),
            cut: None,
            down: None,
            impair: None,
            clock: None,
            full: None,
            apply: None,
            lasts: LASTS,
            ping: None,
            lost: None,
            silence: None,
            within: WITHIN,
        }
    }
}

impl Fault {
    /// Whether anything happens.
    pub(crate) fn is_some(&self) -> bool {
        !self.kill.is_empty()
            || self.remove.is_some()
            || !self.start.is_empty()
            || self.down.is_some()
            || self.apply.is_some()
            || self.lasts_a_while()
    }

    /// Whether some of it goes on for `lasts`.
    pub(crate) fn lasts_a_while(&self) -> bool {
        !self.freeze.is_empty()
            || self.cut.is_some()
            || self.impair.is_some()
            || self.clock.is_some()
            || self.full.is_some()
    }
}

/// What happens, without what is expected.
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.signal {
            FaultSignal::KILL => "killed",
            FaultSignal::TERM => "ended",
        };
        let lasts = humantime::format_duration(self.lasts);
        let mut happens = Vec::new();
        if !self.kill.is_empty() {
            happens.push(format!("{} {how}", self.kill.join(", ")));
        }
        happens.extend(self.remove.iter().map(|pod| format!("{pod} removed")));
        if self.restart {
            happens.push(if self.new_ca { "made again with another CA" } else { "made again" }.to_owned());
        }
        if !self.start.is_empty() {
            happens.push(format!("{} there again", self.start.join(", ")));
        }
        if !self.freeze.is_empty() {
            happens.push(format!("{} frozen for {lasts}", self.freeze.join(", ")));
        }
        happens.extend(self.cut.iter().map(|node| format!("{node} cut off for {lasts}")));
        happens.extend(self.impair.iter().map(|Impairment { node, loss, delay }| {
            let delay = humantime::format_duration(*delay);
            format!("{node} loses {loss} % and delays by up to {delay} for {lasts}")
        }));
        happens.extend(self.clock.iter().map(|Shift { of, seconds }| {
            let by = humantime::format_duration(Duration::from_secs(seconds.unsigned_abs()));
            let way = if *seconds < 0 { "behind" } else { "ahead" };
            format!("the clock of {of} {by} {way} for {lasts}")
        }));
        happens.extend(self.full.iter().map(|node| format!("the disk of {node} full for {lasts}")));
        happens.extend(self.down.iter().map(|link| format!("{} of {} set down", link.interface, link.pod)));
        let service = |text| resource::parse(text).ok()?.services.pop();
        let applied = self.apply.as_deref().and_then(service);
        happens.extend(applied.map(|service| format!("network service {} changed", service.name)));
        f.write_str(&happens.join(", "))
    }
}

// === impl Scenario ===

impl Scenario {
    /// Reads and checks a file.
    ///
    /// # Errors
    ///
    /// [`Error::Read`], or [`Error::Scenario`] with line and field.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Checks the text of a file; `path` is for messages.
    ///
    /// # Errors
    ///
    /// [`Error::Scenario`] with line and field.
    pub fn parse(text: &str, path: &Path) -> Result<Self, Error> {
        let fail = |line: u64, message: String| Error::Scenario { path: path.to_owned(), line, message };
        let file: File = serde_saphyr::from_str(text).map_err(|error| {
            let line = error.location().map_or(0, |at| at.line());
            let field = line.checked_sub(1).and_then(|n| text.lines().nth(n as usize)).unwrap_or_default();
            fail(
                line,
                format!("{}\n    {}", without_place(&error.without_snippet().to_string()), field.trim()),
            )
        })?;
        let lines = Lines::of(&file);
        let mut scenario = file.into_scenario(text).map_err(|(line, message)| fail(line, message))?;
        scenario.check_services(&lines).map_err(|(line, message)| fail(line, message))?;
        scenario.check(&lines).map_err(|(line, message)| fail(line, message))?;
        Ok(scenario)
    }

    /// Gives the lab another name than the file's.
    ///
    /// # Errors
    ///
    /// [`Error::NotThere`] if it is no name.
    pub fn rename(&mut self, name: &str) -> Result<(), Error> {
        valid_name("--name", name).map_err(Error::NotThere)?;
        name.clone_into(&mut self.name);
        Ok(())
    }

    /// The pod of that name.
    #[must_use]
    pub fn pod(&self, name: &str) -> Option<&Pod> {
        self.pods.iter().find(|pod| pod.name == name)
    }

    /// Reads the resources as the registry will, so that a mistake is known before anything is made.
    fn check_services(&mut self, lines: &Lines) -> Result<(), (u64, String)> {
        let mut names = BTreeSet::new();
        for (i, text) in self.network_services.iter().enumerate() {
            let place = |place: &resource::Place, what: &str| {
                let dot = if place.field.is_empty() { "" } else { "." };
                let message = format!("networkServices[{i}]{dot}{}: {what}", place.field);
                (lines.services[i] + place.line.saturating_sub(1), message)
            };
            let file = resource::parse(text).map_err(|e| place(&e.place, &e.problem.to_string()))?;
            for warning in file.warnings {
                let (line, message) = place(&warning.place, &warning.text);
                self.warnings.push(format!("line {line}: {message}"));
            }
            for service in file.services {
                if !names.insert(service.name.clone()) {
                    let message =
                        format!("networkServices[{i}].metadata.name: {:?} is used twice", service.name);
                    return Err((lines.services[i], message));
                }
            }
        }
        Ok(())
    }

    fn check(&self, lines: &Lines) -> Result<(), (u64, String)> {
        valid_name("name", &self.name).map_err(|message| (1, message))?;
        if self.nodes.is_empty() {
            return Err((1, "nodes: a mesh needs at least one node".into()));
        }
        if self.nodes.len() > MAX_NODES {
            return Err((1, format!("nodes: the underlay has room for {MAX_NODES}")));
        }
        let mut seen = BTreeSet::from(["underlay"]);
        for node in &self.nodes {
            valid_name("nodes", node).map_err(|message| (1, message))?;
            if !seen.insert(node) {
                return Err((1, format!("nodes: {node:?} is used twice (\"underlay\" is the lab's own)")));
            }
        }
        for (i, pod) in self.pods.iter().enumerate() {
            let at = |field: &str, message: String| (lines.pods[i], format!("pods[{i}].{field}: {message}"));
            valid_name("name", &pod.name)
                .map_err(|message| (lines.pods[i], format!("pods[{i}].{message}")))?;
            if !seen.insert(&pod.name) {
                return Err(at("name", format!("{:?} is used twice", pod.name)));
            }
            if !self.nodes.contains(&pod.node) {
                return Err(at("node", format!("no node {:?} (nodes: {})", pod.node, self.nodes.join(", "))));
            }
            let roles = [
                (pod.annotations.contains_key(ANNOTATION), ANNOTATION),
                (pod.annotations.contains_key(LEGACY_ANNOTATION), LEGACY_ANNOTATION),
                (pod.endpoint.is_some(), "endpoint"),
                (pod.firewall.is_some(), "firewall"),
                (pod.passthrough.is_some(), "passthrough"),
            ];
            let roles: Vec<_> = roles.into_iter().filter_map(|(is, name)| is.then_some(name)).collect();
            if roles.len() > 1 {
                return Err(at(
                    "name",
                    format!("a pod runs one program of the mesh, this one says {}", roles.join(" and ")),
                ));
            }
            if pod.endpoint.as_ref().is_some_and(|endpoint| endpoint.cidr_prefix.is_empty()) {
                return Err(at(
                    "endpoint.cidrPrefix",
                    "needs at least one prefix, for example 172.16.1.2/31".into(),
                ));
            }
            if let Some(wanted) = pod.wanted_services() {
                let urls =
                    NsUrl::parse_list(&wanted).map_err(|error| at("annotations", error.to_string()))?;
                if urls.is_empty() {
                    return Err(at(
                        "annotations",
                        "asks for nothing; expected kernel://SERVICE/INTERFACE".into(),
                    ));
                }
            }
            if let Some(key) =
                pod.sysctls.keys().find(|key| !key.starts_with("net.") || key.contains(['/', ' ']))
            {
                return Err(at("sysctls", format!("{key:?} is not a sysctl of a network namespace (net.…)")));
            }
        }
        let pod_exists = |field: &str, name: &str| match self.pod(name) {
            Some(_) => Ok(()),
            None => Err(format!(
                "{field}: no pod {name:?} (pods: {})",
                self.pods.iter().map(|pod| pod.name.as_str()).collect::<Vec<_>>().join(", ")
            )),
        };
        for (i, ends) in self.cables.iter().enumerate() {
            for end in ends {
                pod_exists("pod", &end.pod)
                    .and_then(|()| valid_interface(&end.interface))
                    .map_err(|message| (lines.cables[i], format!("cables[{i}].{message}")))?;
            }
        }
        let processes = self.processes();
        let services = self.network_services.iter().filter_map(|text| resource::parse(text).ok());
        let services: Vec<_> = services.flat_map(|file| file.services).map(|service| service.name).collect();
        for (i, expectation) in self.expect.iter().enumerate() {
            let pods: Vec<(&str, &str)> = match expectation {
                Expectation::Ping(ping) => vec![("ping.from", &ping.from)],
                Expectation::Tcp(tcp) => std::iter::once(("tcp.from", tcp.from.as_str()))
                    .chain(tcp.listens_in.iter().map(|pod| ("tcp.listensIn", pod.as_str())))
                    .collect(),
                Expectation::Http(http) => vec![("http.from", &http.from)],
                Expectation::Dns(dns) => {
                    if self.pod(&dns.from).is_some_and(|pod| pod.wanted_services().is_none()) {
                        let message = format!(
                            "expect[{i}].dns.from: {:?} is no client, so it has no resolv.conf of its own",
                            dns.from
                        );
                        return Err((lines.expect[i], message));
                    }
                    vec![("dns.from", &dns.from)]
                }
                Expectation::Route(route) => vec![("route.pod", &route.pod)],
                Expectation::Interface(interface) => vec![("interface.pod", &interface.pod)],
                Expectation::Address(address) => vec![("address.pod", &address.pod)],
                Expectation::Lookup(lookup) => vec![("lookup.pod", &lookup.pod)],
                Expectation::Fault(fault) => {
                    let wrong = |message: String| (lines.expect[i], format!("expect[{i}].fault{message}"));
                    if !fault.is_some() {
                        let expected = ": nothing happens; expected kill, remove, start, freeze, cut, impair, clock, full, down or apply";
                        return Err(wrong(expected.to_owned()));
                    }
                    let named = |field, names: &[String]| {
                        let unknown = names.iter().find(|name| !processes.contains(*name));
                        unknown.map_or(Ok(()), |name| {
                            let known: Vec<_> = processes.iter().map(String::as_str).collect();
                            let known = known.join(", ");
                            Err(wrong(format!(".{field}: no process {name:?} (processes: {known})")))
                        })
                    };
                    named("kill", &fault.kill)?;
                    if fault.new_ca && !(fault.restart && fault.kill.iter().any(|name| name == "identity")) {
                        let expected =
                            ".newCa: only identity has a CA; expected kill: identity, restart: true";
                        return Err(wrong(expected.to_owned()));
                    }
                    named("start", &fault.start)?;
                    named("freeze", &fault.freeze)?;
                    let impair = fault.impair.as_ref();
                    let nodes = [
                        ("cut", fault.cut.as_ref()),
                        ("impair.node", impair.map(|impairment| &impairment.node)),
                        ("clock.of", fault.clock.as_ref().map(|shift| &shift.of)),
                        ("full", fault.full.as_ref()),
                    ];
                    for (field, node) in nodes {
                        // Identity is on no node, and has a clock.
                        let has_clock = |node: &str| field == "clock.of" && node == "identity";
                        if let Some(node) = node.filter(|node| !self.nodes.contains(node) && !has_clock(node))
                        {
                            let known = self.nodes.join(", ");
                            return Err(wrong(format!(".{field}: no node {node:?} (nodes: {known})")));
                        }
                    }
                    if let Some(loss) = impair.map(|impairment| impairment.loss).filter(|loss| *loss > 100) {
                        return Err(wrong(format!(".impair.loss: {loss} of a hundred; expected 0 to 100")));
                    }
                    if let Some(text) = &fault.apply {
                        let applied = resource::parse(text).map_err(|e| wrong(format!(".apply: {e}")))?;
                        match &applied.services[..] {
                            [service] if services.contains(&service.name) => {}
                            _ => {
                                let known = services.join(", ");
                                return Err(wrong(format!(
                                    ".apply: expected one resource of a network service that there is ({known})"
                                )));
                            }
                        }
                    }
                    let cabled = |pod: &&String| self.cables.iter().flatten().any(|end| end.pod == **pod);
                    if let Some(pod) = fault.remove.as_ref().filter(cabled) {
                        return Err(wrong(format!(".remove: {pod} has a cable, which would go for good")));
                    }
                    let down = fault.down.iter().map(|link| ("fault.down.pod", link.pod.as_str()));
                    let ping = fault.ping.iter().map(|ping| ("fault.ping.from", ping.from.as_str()));
                    let remove = fault.remove.iter().map(|pod| ("fault.remove", pod.as_str()));
                    down.chain(ping).chain(remove).collect()
                }
            };
            for (field, pod) in pods {
                pod_exists(field, pod)
                    .map_err(|message| (lines.expect[i], format!("expect[{i}].{message}")))?;
            }
        }
        Ok(())
    }

    /// Names of the processes that a fault can name.
    fn processes(&self) -> BTreeSet<String> {
        let registry = (self.daemons == Daemons::Separate).then_some("registry");
        let alone = ["identity"].into_iter().chain(registry).map(str::to_owned);
        let daemons = self.nodes.iter().flat_map(|node| self.daemons.of(node));
        let pods = self.pods.iter().filter(|pod| pod.has_program()).map(|pod| pod.name.clone());
        alone.chain(daemons).chain(pods).collect()
    }
}

impl Pod {
    /// The network services that its annotation asks for, in the form of `NSM_NETWORK_SERVICES`.
    #[must_use]
    pub fn wanted_services(&self) -> Option<String> {
        if let Some(value) = self.annotations.get(ANNOTATION) {
            return Some(value.clone());
        }
        let legacy = self.annotations.get(LEGACY_ANNOTATION)?;
        let urls = legacy.split(',').map(|item| {
            let (path, query) = item.trim().split_once('?').unwrap_or((item.trim(), ""));
            let interface = if path.contains('/') { "" } else { "/nsm0" };
            let query = if query.is_empty() { String::new() } else { format!("?{query}") };
            format!("kernel://{path}{interface}{query}")
        });
        Some(urls.collect::<Vec<_>>().join(","))
    }

    pub(crate) fn has_program(&self) -> bool {
        self.wanted_services().is_some()
            || self.endpoint.is_some()
            || self.firewall.is_some()
            || self.passthrough.is_some()
    }
}

impl fmt::Display for Expectation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let no = |presence: &Presence, article: &'static str| match presence {
            Presence::Present => article,
            Presence::Gone => "no ",
        };
        match self {
            Self::Ping(Ping { from, to, count, is: Echoed::Answered, .. }) => {
                write!(f, "{from} pings {to} ({count} times)")
            }
            Self::Ping(Ping { from, to, count, .. }) => {
                write!(f, "nobody answers {from} that pings {to} ({count} times)")
            }
            Self::Tcp(Tcp { from, to, is: PortState::Open, .. }) => write!(f, "{from} connects to {to}"),
            Self::Tcp(Tcp { from, to, listens_in: Some(_), .. }) => {
                write!(f, "{to} is blocked for {from} although it listens")
            }
            Self::Tcp(Tcp { from, to, .. }) => write!(f, "{to} is blocked for {from}"),
            Self::Http(http) => write!(f, "{} GETs {}", http.from, http.url),
            Self::Dns(Dns { from, name, address, tcp, .. }) => {
                let how = if *tcp { " by TCP" } else { "" };
                match address {
                    Some(address) => write!(f, "{from} resolves {name} to {address}{how}"),
                    None => write!(f, "{from} finds no {name}{how}"),
                }
            }
            Self::Route(route) => {
                write!(f, "{} has {}route to {}", route.pod, no(&route.is, "a "), route.to)?;
                route.via.iter().try_for_each(|via| write!(f, " via {via}"))?;
                route.interface.iter().try_for_each(|interface| write!(f, " dev {interface}"))
            }
            Self::Interface(i) => {
                write!(f, "{} has {}interface {}", i.pod, no(&i.is, ""), i.name)?;
                i.mtu.iter().try_for_each(|mtu| write!(f, " with MTU {mtu}"))
            }
            Self::Address(a) => write!(f, "{} has {}{} on {}", a.pod, no(&a.is, ""), a.address, a.interface),
            Self::Lookup(lookup) => lookup.fmt(f),
            Self::Fault(fault) => {
                write!(f, "{fault}")?;
                let Some(ping) = &fault.ping else { return Ok(()) };
                let to: Vec<_> = ping.to.iter().map(IpAddr::to_string).collect();
                write!(f, ", {} pings {}", ping.from, to.join(" or "))
            }
        }
    }
}

/// The question, and the expected answer.
impl fmt::Display for Lookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Transport::Tcp => "TCP",
            Transport::Udp => "UDP",
        };
        write!(f, "{} sends {protocol} to {}", self.pod, self.to)?;
        self.port.iter().try_for_each(|port| write!(f, " port {port}"))?;
        self.from.iter().try_for_each(|from| write!(f, " from {from}"))?;
        self.source_port.iter().try_for_each(|port| write!(f, " port {port}"))?;
        f.write_str(",")?;
        self.via.iter().try_for_each(|via| write!(f, " via {via}"))?;
        write!(f, " dev {} table {}", self.interface, self.table)
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.address, self.path)
    }
}

impl<'de> Deserialize<'de> for Url {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_url(&text).ok_or_else(|| {
            D::Error::custom(format!("url: {text:?} is not http://ADDRESS[:PORT]/path (no DNS here)"))
        })
    }
}

// === private helpers ===

/// The file as serde sees it; positions are kept for what is checked afterwards.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    name: String,
    #[serde(default)]
    network_services: Vec<Spanned<IgnoredAny>>,
    nodes: Vec<String>,
    #[serde(default)]
    daemons: Daemons,
    #[serde(default)]
    pods: Vec<Spanned<Pod>>,
    #[serde(default)]
    cables: Vec<Spanned<[CableEnd; 2]>>,
    #[serde(default)]
    expect: Vec<Spanned<Expectation>>,
}

/// Where the items of the lists stand in the file.
struct Lines {
    services: Vec<u64>,
    pods: Vec<u64>,
    cables: Vec<u64>,
    expect: Vec<u64>,
}

impl Lines {
    fn of(file: &File) -> Self {
        Self {
            services: file.network_services.iter().map(|item| item.referenced.line()).collect(),
            pods: file.pods.iter().map(|item| item.referenced.line()).collect(),
            cables: file.cables.iter().map(|item| item.referenced.line()).collect(),
            expect: file.expect.iter().map(|item| item.referenced.line()).collect(),
        }
    }
}

impl File {
    fn into_scenario(self, text: &str) -> Result<Scenario, (u64, String)> {
        let documents = self.network_services.iter().enumerate().map(|(i, item)| {
            let (line, column) = (item.referenced.line(), item.referenced.column());
            block(text, line, column).ok_or_else(|| {
                (line, format!("networkServices[{i}]: write the resource as a block (one key per line), as in a manifest"))
            })
        });
        Ok(Scenario {
            network_services: documents.collect::<Result<_, _>>()?,
            name: self.name,
            nodes: self.nodes,
            daemons: self.daemons,
            pods: self.pods.into_iter().map(|item| item.value).collect(),
            cables: self.cables.into_iter().map(|item| item.value).collect(),
            expect: self.expect.into_iter().map(|item| item.value).collect(),
            warnings: Vec::new(),
        })
    }
}

/// The text of the block mapping that begins at a position, moved to the left margin: a document of its own,
/// byte for byte what a person would have applied to a cluster.
fn block(text: &str, line: u64, column: u64) -> Option<String> {
    let indent = usize::try_from(column).ok()?.checked_sub(1)?;
    let mut lines = text.lines().skip(usize::try_from(line).ok()?.checked_sub(1)?);
    let first = lines.next()?.get(indent..)?;
    if first.starts_with('{') {
        return None;
    }
    let mut document = format!("{first}\n");
    for line in lines {
        let blank = line.trim().is_empty();
        let comment = line.trim_start().starts_with('#');
        let inside = line.len() - line.trim_start().len() >= indent;
        if !blank && !comment && !inside {
            break;
        }
        document.push_str(if inside { line.get(indent..).unwrap_or_default() } else { line.trim() });
        document.push('\n');
    }
    document.truncate(document.trim_end().len());
    document.push('\n');
    Some(document)
}

/// The library puts its own "line 4 column 10" before the message; ours stands before the file's name already.
fn without_place(message: &str) -> &str {
    let message = message.strip_prefix("error: ").unwrap_or(message);
    match message.strip_prefix("line ") {
        Some(rest) => rest.split_once(": ").map_or(message, |(_, rest)| rest),
        None => message,
    }
}

/// Names become namespaces, file names and host names in SPIFFE IDs.
fn valid_name(field: &str, name: &str) -> Result<(), String> {
    let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let good = name.len() <= 40
        && name.starts_with(letters)
        && name.ends_with(letters)
        && name.chars().all(|c| letters(c) || c == '-');
    if good {
        Ok(())
    } else {
        Err(format!("{field}: {name:?} is not a name of at most 40 letters a-z, digits and inner hyphens"))
    }
}

/// The kernel's `dev_valid_name`, without the colon that only old aliases had.
fn valid_interface(name: &str) -> Result<(), String> {
    let good = !name.is_empty()
        && name.len() <= 15
        && !matches!(name, "." | "..")
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
    if good {
        Ok(())
    } else {
        Err(format!("interface: {name:?} is not an interface name (1 to 15 bytes, no slash, colon or blank)"))
    }
}

fn parse_url(text: &str) -> Option<Url> {
    let rest = text.strip_prefix("http://")?;
    let (authority, path) = match rest.find('/') {
        Some(slash) => rest.split_at(slash),
        None => (rest, "/"),
    };
    let address = authority.parse().ok().or_else(|| {
        let host = authority.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(authority);
        host.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, 80))
    })?;
    Some(Url { address, path: path.to_owned() })
}

fn five() -> u32 {
    5
}

fn ok() -> u16 {
    200
}

fn within() -> Duration {
    WITHIN
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text)
        .map_err(|error| D::Error::custom(format!("{text:?} is not a duration such as 500ms or 5s: {error}")))
}

/// One thing, or a list of such.
fn one_or_more<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMore<T> {
        One(T),
        More(Vec<T>),
    }
    Ok(match OneOrMore::deserialize(deserializer)? {
        OneOrMore::One(one) => vec![one],
        OneOrMore::More(more) => more,
    })
}

fn some_duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    duration(deserializer).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
name: x
nodes: [node1, node2]
networkServices:
# the old spelling
- apiVersion: networkservicemesh.io/v1alpha1
  kind: NetworkService
  metadata: {name: web}
  spec:
    payload: IP
    matches:
    - match:
      route: # comment
      - destination:
        destinationSelector: {app: b, version: \"1.10\"}

# about the second
- apiVersion: networkservicemesh.io/v1
  kind: NetworkService
  metadata: {name: other}
pods:
- {name: client, node: node1, annotations: {networkservicemesh.io: kernel://web/nsm0}}
- name: fw
  node: node2
  firewall:
    service: web
    labels: {app: firewall}
    aclConfig: |
      aclRules:
        \"B\": \"action=deny\"
        \"A\": \"action=reflect,icmptype=8\"
expect:
- ping: {from: client, to: 172.16.1.2, within: 300ms}
- fault: {kill: node2/manager, restart: true, ping: {from: client, to: 172.16.1.2}}
";

    fn error(text: &str) -> String {
        Scenario::parse(text, Path::new("a.yaml")).expect_err("must be refused").to_string()
    }

    #[test]
    fn resources_stay_as_they_are_written() {
        let scenario = Scenario::parse(GOOD, Path::new("a.yaml")).expect("good");
        assert_eq!(scenario.network_services.len(), 2);
        assert!(
            scenario.network_services[0].starts_with("apiVersion: networkservicemesh.io/v1alpha1\nkind: ")
        );
        assert!(
            scenario.network_services[0]
                .contains("- match:\n    route: # comment\n    - destination:\n      dest")
        );
        assert_eq!(
            scenario.network_services[1],
            "apiVersion: networkservicemesh.io/v1\nkind: NetworkService\nmetadata: {name: other}\n"
        );
        let acl = &scenario.pods[1].firewall.as_ref().expect("firewall").acl_config;
        assert!(acl.find("\"B\"") < acl.find("\"A\""), "the order of rules is their meaning");
    }

    #[test]
    fn errors_name_file_line_field_and_what_is_expected() {
        let unknown =
            error(&GOOD.replace("from: client, to: 172.16.1.2, w", "frm: client, to: 172.16.1.2, w"));
        assert!(unknown.starts_with("a.yaml:32: unknown field `frm`, expected one of from, to"), "{unknown}");
        let pod = error(&GOOD.replace("- ping: {from: client", "- ping: {from: clinet"));
        assert_eq!(pod, "a.yaml:32: expect[0].ping.from: no pod \"clinet\" (pods: client, fw)");
        let node = error(&GOOD.replace("node: node2", "node: node3"));
        assert_eq!(node, "a.yaml:22: pods[1].node: no node \"node3\" (nodes: node1, node2)");
        let process = error(&GOOD.replace("kill: node2/manager", "kill: node2/mangler"));
        assert!(
            process.starts_with("a.yaml:33: expect[1].fault.kill: no process \"node2/mangler\""),
            "{process}"
        );
        let other =
            "apply: '{apiVersion: networkservicemesh.io/v1, kind: NetworkService, metadata: {name: webb}}'";
        let ca =
            error(&GOOD.replace("kill: node2/manager, restart", "kill: node2/manager, newCa: true, restart"));
        assert_eq!(
            ca,
            "a.yaml:33: expect[1].fault.newCa: only identity has a CA; expected kill: identity, restart: true"
        );
        let start = error(&GOOD.replace("kill: node2/manager, restart: true", "start: clinet"));
        assert!(start.starts_with("a.yaml:33: expect[1].fault.start: no process \"clinet\""), "{start}");
        let applied = error(&GOOD.replace("kill: node2/manager, restart: true", other));
        assert!(
            applied.starts_with("a.yaml:33: expect[1].fault.apply: ") && applied.ends_with("(web, other)"),
            "{applied}"
        );
        let dns =
            GOOD.replace("- ping: {from: client", "- dns: {from: fw, name: web}\n- ping: {from: client");
        assert_eq!(
            error(&dns),
            "a.yaml:32: expect[0].dns.from: \"fw\" is no client, so it has no resolv.conf of its own"
        );
        let duration = error(&GOOD.replace("300ms", "soon"));
        assert!(
            duration.contains("a.yaml:32:") && duration.contains("not a duration such as 500ms"),
            "{duration}"
        );
        let address = error(&GOOD.replace("to: 172.16.1.2, within", "to: 172.16.1, within"));
        assert!(address.contains("a.yaml:32:") && address.contains("to: 172.16.1"), "{address}");
        let kind = error(&GOOD.replace("- ping:", "- pong:"));
        assert!(kind.contains("unknown variant `pong`, expected one of ping, tcp"), "{kind}");
        let service = error(&GOOD.replace("destinationSelector", "destinationSelecter"));
        assert!(
            service.starts_with("a.yaml:14: networkServices[0].spec.matches[0].route[0].dest"),
            "{service}"
        );
        let twice = error(&GOOD.replace("{name: other}", "{name: web}"));
        assert_eq!(twice, "a.yaml:17: networkServices[1].metadata.name: \"web\" is used twice");
        let annotation = error(&GOOD.replace("kernel://web/nsm0", "web/nsm0"));
        assert!(
            annotation.starts_with("a.yaml:21: pods[0].annotations: network service \"web/nsm0\""),
            "{annotation}"
        );
        assert!(error("name: Bad_Name\nnodes: [a]\n").contains("name: \"Bad_Name\" is not a name"));
        assert!(error("name: x\nnodes: []\n").contains("at least one node"));
        assert!(error("name: x\nnodes: [underlay]\n").contains("\"underlay\" is used twice"));
        assert!(error("name: [\n").contains("a.yaml:1:"));
        assert!(error("").contains("a.yaml"));
    }

    #[test]
    fn a_resource_in_flow_style_is_refused_with_a_hint() {
        let flow = error("name: x\nnodes: [a]\nnetworkServices:\n- {apiVersion: v1}\n");
        assert_eq!(
            flow,
            "a.yaml:4: networkServices[0]: write the resource as a block (one key per line), as in a manifest"
        );
    }

    #[test]
    fn the_old_annotation_is_translated() {
        let mut pod = Scenario::parse(GOOD, Path::new("a.yaml")).expect("good").pods.remove(0);
        pod.annotations = BTreeMap::from([(LEGACY_ANNOTATION.into(), "web, other/eth7?app=x".into())]);
        assert_eq!(pod.wanted_services().as_deref(), Some("kernel://web/nsm0,kernel://other/eth7?app=x"));
    }

    #[test]
    fn urls() {
        let url = parse_url("http://172.16.1.2:8080/x?y").expect("good");
        assert_eq!((url.address.port(), url.path.as_str()), (8080, "/x?y"));
        assert_eq!(parse_url("http://[2001:db8::]").expect("good").address.port(), 80);
        assert_eq!(parse_url("https://172.16.1.2/"), None);
        assert_eq!(parse_url("http://example.org/"), None);
    }
}
