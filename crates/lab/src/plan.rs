//! From a scenario to what has to exist: namespaces, cables, files, processes. Pure data; nothing is touched here.
//!
//! ```text
//!   <lab>.underlay   br0 ──┬── node1 ┄┄ eth0   <lab>.node1   manager, forwarder (and the registry)
//!   (identity)             └── node2 ┄┄ eth0   <lab>.node2   manager, forwarder
//!                                               <lab>.<pod>   one program of the mesh, HTTP servers
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use ipnet::{IpNet, Ipv4Net};
use serde::Serialize;

use crate::scenario::{CableEnd, Daemons, Pod, Scenario};

/// Directory of all labs; a lab has `<ROOT>/<lab>/`.
pub const ROOT: &str = "/run/nsm/lab";
/// Where a program of ours reads how wrong its clock is (`nsm_identity::clock::OFFSET_FILE`).
const CLOCK: &str = "NSM_TEST_CLOCK_OFFSET_FILE";
/// What programs of ours keep while the machine runs.
pub(crate) const RUN: &str = "/run/nsm";
/// What stands between the documents of a YAML file.
pub(crate) const BETWEEN: &str = "---\n";
/// TCP port of managers (`spec/registry.md` 9).
const MANAGER_PORT: u16 = 5001;
/// TCP port of the registry (`spec/registry.md` 9).
const REGISTRY_PORT: u16 = 5002;
/// The underlay's network: node n has address n.
const UNDERLAY: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 255, 0, 0), 24);

/// All that `up` makes.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The lab's name.
    pub lab: String,
    /// Name of the bridge in the underlay's namespace.
    pub bridge: String,
    /// Namespaces without the lab's prefix: `underlay`, nodes, pods.
    pub namespaces: Vec<String>,
    /// Cables: of the nodes to the underlay, and those of the scenario.
    pub cables: Vec<Cable>,
    /// Sysctls per namespace.
    pub sysctls: Vec<Sysctl>,
    /// Files below the lab's directory.
    pub files: Vec<PlannedFile>,
    /// Programs in the order in which they may start.
    pub processes: Vec<Process>,
    /// HTTP servers of the lab itself.
    pub servers: Vec<Server>,
    /// DNS servers of the lab itself.
    pub dns_servers: Vec<DnsServer>,
    /// Who gets which SPIFFE ID besides the daemons (which are known by their pids).
    pub pods: Vec<PodEntry>,
    /// How long certificates live, as `nsm identity` reads it (`20s`); without it: its default.
    pub svid_ttl: Option<String>,
}

/// A veth pair made straight into two namespaces.
#[derive(Debug, Clone)]
pub struct Cable {
    /// The first end.
    pub a: End,
    /// The other end.
    pub b: End,
}

/// One end of a [`Cable`].
#[derive(Debug, Clone)]
pub struct End {
    /// Namespace without the lab's prefix.
    pub namespace: String,
    /// Interface name.
    pub interface: String,
    /// Addresses.
    pub addresses: Vec<IpNet>,
    /// Routes: destination, gateway.
    pub routes: Vec<(IpNet, Option<IpAddr>)>,
    /// Whether it is a port of the underlay's bridge.
    pub bridged: bool,
}

/// A sysctl of one namespace.
#[derive(Debug, Clone)]
pub struct Sysctl {
    /// Namespace without the lab's prefix.
    pub namespace: String,
    /// With dots: `net.ipv4.ip_forward`.
    pub key: String,
    /// What is written.
    pub value: String,
}

/// A file that a process reads.
#[derive(Debug, Clone)]
pub struct PlannedFile {
    /// Absolute.
    pub path: PathBuf,
    /// Its text.
    pub content: String,
}

/// One process, `nsm` as a rule.
#[derive(Debug, Clone)]
pub struct Process {
    /// `registry`, `node1/manager`, `client`.
    pub name: String,
    /// Namespace without the lab's prefix.
    pub namespace: String,
    /// Its program, where that is not the lab's `nsm`: one that takes the same arguments.
    pub exe: Option<PathBuf>,
    /// Arguments of `nsm`.
    pub args: Vec<String>,
    /// Environment on top of the lab's own.
    pub env: BTreeMap<String, String>,
    /// Processes that must be ready first.
    pub after: Vec<String>,
    /// How identity recognises it.
    pub attested: Attested,
    /// Whether it takes part in the mesh as a client, which is ended before all others.
    pub client: bool,
}

/// How the identity process recognises a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attested {
    /// It serves identities itself.
    No,
    /// By pid and start time: several daemons share a node's namespace. Contains node and SPIFFE ID.
    ByPid {
        /// Through which node's socket.
        node: String,
        /// What it gets.
        spiffe_id: String,
    },
    /// By its pod's namespace, see [`PodEntry`].
    ByNamespace,
}

/// The SPIFFE ID of whatever runs in a pod's namespace.
#[derive(Debug, Clone)]
pub struct PodEntry {
    /// The pod.
    pub pod: String,
    /// Its node.
    pub node: String,
    /// What it gets.
    pub spiffe_id: String,
}

/// The lab's small HTTP server in a pod.
#[derive(Debug, Clone)]
pub struct Server {
    /// The pod.
    pub pod: String,
    /// Where it listens, on all addresses of both families.
    pub ports: Vec<u16>,
}

/// The lab's small DNS server in a pod.
#[derive(Debug, Clone)]
pub struct DnsServer {
    /// The pod.
    pub pod: String,
    /// What it knows.
    pub names: BTreeMap<String, Vec<IpAddr>>,
}

// === impl Plan ===

impl Plan {
    /// Plans a scenario.
    #[must_use]
    pub fn new(scenario: &Scenario) -> Self {
        let lab = &scenario.name;
        let at = Paths::new(lab);
        let node_ip = |index: usize| {
            let bits = u32::from(UNDERLAY.network()) + index as u32 + 1;
            IpAddr::V4(Ipv4Addr::from(bits))
        };
        let registry = format!("tcp://{}:{REGISTRY_PORT}", node_ip(0));
        let trust_domain = format!("{lab}.lab");

        let mut cables = Vec::new();
        let mut processes = vec![Process {
            name: "identity".into(),
            namespace: "underlay".into(),
            exe: None,
            args: strings(&["identity", "--config", &at.identity_config().to_string_lossy()]),
            env: at.clock_of("identity").into(),
            after: Vec::new(),
            attested: Attested::No,
            client: false,
        }];
        let daemon = |name: &str, node: &str, args: Vec<String>, after: Vec<String>| Process {
            name: name.into(),
            namespace: node.into(),
            exe: None,
            args,
            env: at.environment(node),
            after,
            attested: Attested::ByPid {
                node: node.into(),
                spiffe_id: format!("spiffe://{trust_domain}/{name}"),
            },
            client: false,
        };
        let mut files = Vec::new();
        let mut services = Vec::new();
        if !scenario.network_services.is_empty() {
            let path = at.network_services();
            services = strings(&["--network-services", &path.to_string_lossy()]);
            files.push(PlannedFile { path, content: scenario.network_services.join(BETWEEN) });
        }
        if let (Some(first), Daemons::Separate) = (scenario.nodes.first(), scenario.daemons) {
            let args = strings(&["registry", "--name", "registry", "--listen-on", &registry]);
            processes.push(daemon(
                "registry",
                first,
                [args, services.clone()].concat(),
                strings(&["identity"]),
            ));
        }
        for (index, node) in scenario.nodes.iter().enumerate() {
            let ip = node_ip(index);
            cables.push(Cable {
                a: End {
                    namespace: node.clone(),
                    interface: "eth0".into(),
                    addresses: vec![IpNet::new_assert(ip, UNDERLAY.prefix_len())],
                    routes: Vec::new(),
                    bridged: false,
                },
                b: End {
                    namespace: "underlay".into(),
                    interface: format!("port{}", index + 1),
                    addresses: Vec::new(),
                    routes: Vec::new(),
                    bridged: true,
                },
            });
            let manager_socket = at.url(node, "nsm.io.sock");
            let listen = format!("{manager_socket},tcp://{ip}:{MANAGER_PORT}");
            let (manager_name, forwarder_name) = (format!("manager-{node}"), format!("forwarder-{node}"));
            let managing = strings(&["--name", &manager_name, "--listen-on", &listen]);
            let cluster = strings(&["--registry-url", &registry]);
            let state = at.disk(node);
            let forwarding =
                strings(&["--tunnel-ip", &ip.to_string(), "--state-dir", &state.to_string_lossy()]);
            match (scenario.daemons, &scenario.daemons.of(node)[..]) {
                (Daemons::Separate, [manager, forwarder]) => {
                    let args = [strings(&["manager"]), managing, cluster].concat();
                    processes.push(daemon(manager, node, args, strings(&["registry"])));
                    let socket = at.url(node, "forwarder.sock");
                    let args = ["forwarder", "--name", &forwarder_name, "--connect-to", &manager_socket];
                    let args = [&args[..], &["--listen-on", &socket]].concat();
                    let args = [strings(&args), forwarding].concat();
                    processes.push(daemon(forwarder, node, args, vec![manager.clone()]));
                }
                (_, names) => {
                    let mut args = [strings(&["node"]), managing, forwarding].concat();
                    args.extend(strings(&["--forwarder-name", &forwarder_name]));
                    let after = if index == 0 {
                        args.extend(strings(&["--registry-listen-on", &registry]));
                        args.append(&mut services);
                        "identity".to_owned()
                    } else {
                        args.extend(cluster);
                        scenario.daemons.of(&scenario.nodes[0]).concat()
                    };
                    processes.push(daemon(&names.concat(), node, args, vec![after]));
                }
            }
        }

        // Serving pods wait for their own node only; clients wait for everybody, because discovery does not wait
        // for endpoints to appear (spec/registry.md 6.2).
        let (clients, others): (Vec<_>, Vec<_>) =
            scenario.pods.iter().partition(|pod| pod.wanted_services().is_some());
        for pod in others {
            let after = scenario.daemons.of(&pod.node).pop().into_iter().collect();
            processes.extend(pod_process(pod, &at, after, &mut files));
        }
        let everybody: Vec<String> = processes.iter().map(|process| process.name.clone()).collect();
        for pod in clients {
            processes.extend(pod_process(pod, &at, everybody.clone(), &mut files));
        }

        let planned_end = |end: &CableEnd| End {
            namespace: end.pod.clone(),
            interface: end.interface.clone(),
            addresses: end.addresses.clone(),
            routes: end.routes.iter().map(|route| (route.to, route.via)).collect(),
            bridged: false,
        };
        cables.extend(scenario.cables.iter().map(|[a, b]| Cable { a: planned_end(a), b: planned_end(b) }));
        let pods = || scenario.pods.iter();
        Self {
            lab: lab.clone(),
            bridge: "br0".into(),
            namespaces: std::iter::once("underlay".to_owned())
                .chain(scenario.nodes.iter().cloned())
                .chain(pods().map(|pod| pod.name.clone()))
                .collect(),
            cables,
            sysctls: pods()
                .flat_map(|pod| {
                    pod.sysctls.iter().map(|(key, value)| Sysctl {
                        namespace: pod.name.clone(),
                        key: key.clone(),
                        value: value.clone(),
                    })
                })
                .collect(),
            files,
            processes,
            servers: pods()
                .filter(|pod| !pod.serve.is_empty())
                .map(|pod| Server { pod: pod.name.clone(), ports: pod.serve.clone() })
                .collect(),
            dns_servers: pods()
                .filter(|pod| !pod.dns.is_empty())
                .map(|pod| DnsServer { pod: pod.name.clone(), names: pod.dns.clone() })
                .collect(),
            pods: pods()
                .map(|pod| PodEntry {
                    pod: pod.name.clone(),
                    node: pod.node.clone(),
                    spiffe_id: format!("spiffe://{trust_domain}/pod/{}", pod.name),
                })
                .collect(),
            svid_ttl: None,
        }
    }

    /// Where the lab keeps its files.
    #[must_use]
    pub fn paths(&self) -> Paths {
        Paths::new(&self.lab)
    }

    /// The nodes that daemons run on.
    pub(crate) fn nodes(&self) -> BTreeSet<&str> {
        let daemons = self.processes.iter().filter_map(|process| match &process.attested {
            Attested::ByPid { node, .. } => Some(node.as_str()),
            _ => None,
        });
        daemons.collect()
    }

    /// Full name of a namespace: `<lab>.<name>`.
    #[must_use]
    pub fn namespace(&self, name: &str) -> String {
        format!("{}.{name}", self.lab)
    }

    /// The identity process' configuration, given the daemons that run: name → (pid, start time in ticks).
    #[must_use]
    pub fn identity_config(&self, running: &BTreeMap<String, (u32, u64)>) -> String {
        let at = self.paths();
        let nodes = self.cables.iter().filter(|cable| cable.b.bridged).map(|cable| &cable.a.namespace);
        let sockets =
            nodes.map(|node| Socket { path: at.node(node).join("identity.sock"), node: node.clone() });
        let daemons = self.processes.iter().filter_map(|process| {
            let Attested::ByPid { node, spiffe_id } = &process.attested else { return None };
            let (pid, start) = running.get(&process.name)?;
            let selectors = Selectors { pid: Some(*pid), pid_start: Some(*start), netns: None };
            Some(Entry { spiffe_id: spiffe_id.clone(), node: node.clone(), selectors })
        });
        let pods = self.pods.iter().map(|pod| Entry {
            spiffe_id: pod.spiffe_id.clone(),
            node: pod.node.clone(),
            selectors: Selectors { netns: Some(self.namespace(&pod.pod)), ..Selectors::default() },
        });
        let config = IdentityConfig {
            trust_domain: format!("{}.lab", self.lab),
            // A restart keeps the root that everybody trusts.
            state_dir: at.ca(),
            svid_ttl: self.svid_ttl.clone(),
            sockets: sockets.collect(),
            entries: daemons.chain(pods).collect(),
        };
        // JSON is YAML, and these types always serialise.
        serde_json::to_string_pretty(&config).unwrap_or_default()
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "lab {}", self.lab)?;
        writeln!(f, "namespaces")?;
        for name in &self.namespaces {
            writeln!(f, "  {}", self.namespace(name))?;
        }
        writeln!(f, "cables")?;
        for cable in &self.cables {
            writeln!(f, "  {} -- {}", End::describe(&cable.a), End::describe(&cable.b))?;
        }
        for sysctl in &self.sysctls {
            writeln!(f, "  {}: {} = {}", sysctl.namespace, sysctl.key, sysctl.value)?;
        }
        writeln!(f, "files")?;
        for file in &self.files {
            writeln!(f, "  {}", file.path.display())?;
        }
        writeln!(f, "  {}", self.paths().identity_config().display())?;
        writeln!(f, "processes")?;
        for process in &self.processes {
            let program = process.exe.as_deref().unwrap_or(Path::new("nsm")).display();
            writeln!(f, "  {} in {}: {program} {}", process.name, process.namespace, process.args.join(" "))?;
            if !process.after.is_empty() {
                writeln!(f, "    after {}", process.after.join(", "))?;
            }
        }
        for server in &self.servers {
            let ports: Vec<_> = server.ports.iter().map(u16::to_string).collect();
            writeln!(f, "  HTTP server in {}: {}", server.pod, ports.join(", "))?;
        }
        for server in &self.dns_servers {
            let names: Vec<_> = server.names.keys().map(String::as_str).collect();
            writeln!(f, "  DNS server in {}: {}", server.pod, names.join(", "))?;
        }
        Ok(())
    }
}

impl End {
    fn describe(&self) -> String {
        let mut text = format!("{}:{}", self.namespace, self.interface);
        for address in &self.addresses {
            let _ = write!(text, " {address}");
        }
        for (to, via) in &self.routes {
            let _ = write!(text, " [{to}");
            if let Some(via) = via {
                let _ = write!(text, " via {via}");
            }
            text.push(']');
        }
        text
    }
}

/// Where a lab keeps its files.
#[derive(Debug, Clone)]
pub struct Paths {
    /// `/run/nsm/lab/<lab>`.
    pub root: PathBuf,
}

impl Paths {
    /// Of the lab with that name.
    #[must_use]
    pub fn new(lab: &str) -> Self {
        Self { root: Path::new(ROOT).join(lab) }
    }

    /// What identity keeps: its CA.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.root.join("identity")
    }

    /// Sockets and state of a node's daemons.
    #[must_use]
    pub fn node(&self, node: &str) -> PathBuf {
        self.root.join(node)
    }

    /// What a node's forwarder keeps: a file system of its own, so that it can be full.
    #[must_use]
    pub fn disk(&self, node: &str) -> PathBuf {
        self.node(node).join("forwarder")
    }

    /// By how many seconds the clock is wrong that the programs of a node read, or `identity`; without the file it is
    /// right.
    #[must_use]
    pub fn clock(&self, of: &str) -> PathBuf {
        self.root.join(format!("{of}.clock"))
    }

    /// The sockets by which processes are looked at.
    #[must_use]
    pub fn introspect(&self) -> PathBuf {
        self.root.join("introspect")
    }

    /// What a process writes to stdout and stderr.
    #[must_use]
    pub fn log(&self, process: &str) -> PathBuf {
        self.root.join("logs").join(format!("{}.log", process.replace('/', ".")))
    }

    /// The resolv.conf of a client's pod.
    #[must_use]
    pub fn resolv_conf(&self, pod: &str) -> PathBuf {
        self.root.join(format!("{pod}.resolv.conf"))
    }

    /// Where a process says that it is ready.
    #[must_use]
    pub fn notify(&self, process: &str) -> PathBuf {
        self.root.join("notify").join(process.replace('/', "."))
    }

    /// The NetworkService resources that the registry follows, [`BETWEEN`] each other.
    #[must_use]
    pub fn network_services(&self) -> PathBuf {
        self.root.join("network-services.yaml")
    }

    /// The lab's own record, see [`crate::State`].
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.root.join("state.json")
    }

    /// See [`Plan::identity_config`].
    #[must_use]
    pub fn identity_config(&self) -> PathBuf {
        self.root.join("identity.yaml")
    }

    /// What all programs of a node get, also those in its pods.
    fn environment(&self, node: &str) -> BTreeMap<String, String> {
        let identity = ("SPIFFE_ENDPOINT_SOCKET".into(), self.url(node, "identity.sock"));
        [identity].into_iter().chain(self.clock_of(node)).collect()
    }

    fn clock_of(&self, of: &str) -> [(String, String); 1] {
        [(CLOCK.into(), self.clock(of).to_string_lossy().into_owned())]
    }

    fn url(&self, node: &str, socket: &str) -> String {
        format!("unix://{}", self.node(node).join(socket).display())
    }
}

// === private helpers ===

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct IdentityConfig {
    trust_domain: String,
    state_dir: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    svid_ttl: Option<String>,
    sockets: Vec<Socket>,
    entries: Vec<Entry>,
}

#[derive(Serialize)]
struct Socket {
    path: PathBuf,
    node: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    spiffe_id: String,
    node: String,
    selectors: Selectors,
}

#[derive(Serialize, Default)]
#[serde(rename_all = "camelCase")]
struct Selectors {
    #[serde(skip_serializing_if = "Option::is_none")]
    netns: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid_start: Option<u64>,
}

/// The program of a pod, if it has one.
fn pod_process(pod: &Pod, at: &Paths, after: Vec<String>, files: &mut Vec<PlannedFile>) -> Option<Process> {
    let mut args = strings(&["--name", &pod.name, "--connect-to", &at.url(&pod.node, "nsm.io.sock")]);
    let role = if let Some(services) = pod.wanted_services() {
        args.extend(["--network-services".into(), services]);
        // Pods share the mounts of the node; what is written to /etc/resolv.conf would be written to the node's.
        let path = at.resolv_conf(&pod.name);
        args.extend(strings(&["--resolv-conf", &path.to_string_lossy()]));
        files.push(PlannedFile { path, content: pod.resolv_conf.clone() });
        "client"
    } else if let Some(endpoint) = &pod.endpoint {
        args.extend(["--service-names".into(), endpoint.services.join(",")]);
        args.extend(labels(&endpoint.labels));
        args.extend(["--cidr-prefix".into(), list(&endpoint.cidr_prefix)]);
        if !endpoint.routes.is_empty() {
            args.extend(["--routes".into(), list(&endpoint.routes)]);
        }
        if !endpoint.dns_configs.is_empty() {
            // These types always serialise.
            let configs = serde_json::to_string(&endpoint.dns_configs).unwrap_or_default();
            args.extend(["--dns-configs".into(), configs]);
        }
        if !endpoint.policies.is_empty() {
            let path = at.root.join(format!("{}.policies.yaml", pod.name));
            args.extend(strings(&["--pbr-config-path", &path.to_string_lossy()]));
            files.push(PlannedFile { path, content: endpoint.policies.clone() });
        }
        args.extend(strings(&["--register-service", "false"]));
        "endpoint"
    } else if let Some(firewall) = &pod.firewall {
        let path = at.root.join(format!("{}.acl.yaml", pod.name));
        args.extend(strings(&["--service-name", &firewall.service]));
        args.extend(labels(&firewall.labels));
        args.extend(strings(&["--acl-config-path", &path.to_string_lossy()]));
        files.push(PlannedFile { path, content: firewall.acl_config.clone() });
        "firewall"
    } else {
        let passthrough = pod.passthrough.as_ref()?;
        args.extend(strings(&["--service-name", &passthrough.service]));
        args.extend(labels(&passthrough.labels));
        "passthrough"
    };
    if role != "client" {
        // The path of its default is gone as soon as it listens; by this one people look into it.
        args.extend(["--listen-on".into(), at.url(&pod.node, &format!("{}.sock", pod.name))]);
    }
    args.insert(0, role.into());
    let mut env = pod.env.clone();
    env.extend(at.environment(&pod.node));
    Some(Process {
        name: pod.name.clone(),
        namespace: pod.name.clone(),
        exe: None,
        args,
        env,
        after,
        attested: Attested::ByNamespace,
        client: role == "client",
    })
}

/// `--labels a:1,b:2`, upstream's form of a map in the environment.
fn labels(labels: &BTreeMap<String, String>) -> Vec<String> {
    let pairs: Vec<_> = labels.iter().map(|(key, value)| format!("{key}:{value}")).collect();
    if pairs.is_empty() { Vec::new() } else { vec!["--labels".into(), pairs.join(",")] }
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(",")
}

fn strings(items: &[&str]) -> Vec<String> {
    items.iter().map(|&item| item.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(file: &str) -> Plan {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios").join(file);
        Plan::new(&Scenario::load(&path).expect("a scenario of ours is good"))
    }

    fn position(plan: &Plan, name: &str) -> usize {
        plan.processes.iter().position(|process| process.name == name).expect("planned")
    }

    #[test]
    fn every_scenario_of_ours_can_be_planned() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios");
        for entry in std::fs::read_dir(directory).expect("scenarios") {
            let path = entry.expect("entry").path();
            let scenario = Scenario::load(&path).expect("good");
            assert_eq!(path.file_stem().and_then(|stem| stem.to_str()), Some(scenario.name.as_str()));
            assert!(!scenario.expect.is_empty(), "{} expects nothing", scenario.name);
            assert!(!Plan::new(&scenario).processes.is_empty());
        }
    }

    #[test]
    fn a_process_starts_after_those_it_needs_and_clients_after_everybody() {
        let plan = planned("secure-intranet.yaml");
        for (index, process) in plan.processes.iter().enumerate() {
            for before in &process.after {
                assert!(position(&plan, before) < index, "{} waits for {before}", process.name);
            }
        }
        let client = &plan.processes[position(&plan, "client")];
        assert_eq!(client.after.len(), plan.processes.len() - 1);
        assert!(client.client);
        // Nodes do not wait for each other, nor functions of the chain.
        assert_eq!(plan.processes[position(&plan, "node2/manager")].after, ["registry"]);
        assert_eq!(plan.processes[position(&plan, "passthrough-1")].after, ["node2/forwarder"]);
    }

    #[test]
    fn nodes_hang_on_the_underlay_and_pods_do_not() {
        let plan = planned("vpn-gateway.yaml");
        let bridged: Vec<_> = plan.cables.iter().filter(|cable| cable.b.bridged).collect();
        assert_eq!(
            bridged.iter().map(|cable| cable.a.namespace.as_str()).collect::<Vec<_>>(),
            ["node1", "node2"]
        );
        assert_eq!(bridged[1].a.addresses, ["10.255.0.2/24".parse().expect("prefix")]);
        let cable = plan.cables.last().expect("the scenario's own");
        assert_eq!((cable.a.namespace.as_str(), cable.b.namespace.as_str()), ("gateway", "intranet"));
        assert_eq!(plan.namespaces, ["underlay", "node1", "node2", "client", "gateway", "intranet"]);
        assert!(plan.to_string().contains("HTTP server in intranet: 80"));
    }

    #[test]
    fn flags_are_those_of_the_roles() {
        let plan = planned("vpn-gateway.yaml");
        let gateway = &plan.processes[position(&plan, "gateway")];
        let args = gateway.args.join(" ");
        assert!(
            args.starts_with("endpoint --name gateway --connect-to unix:///run/nsm/lab/vpn-gateway/node2/"),
            "{args}"
        );
        assert!(
            args.contains("--cidr-prefix 172.16.1.2/31 --routes 10.10.0.0/24 --register-service false"),
            "{args}"
        );
        assert_eq!(
            gateway.env["SPIFFE_ENDPOINT_SOCKET"],
            "unix:///run/nsm/lab/vpn-gateway/node2/identity.sock"
        );
    }

    #[test]
    fn identities_follow_the_processes_that_run() {
        let plan = planned("kernel2kernel.yaml");
        let entries = |running: &[(&str, u32)]| -> Vec<serde_json::Value> {
            let running = running.iter().map(|(name, pid)| ((*name).to_owned(), (*pid, 7))).collect();
            let config: serde_json::Value =
                serde_json::from_str(&plan.identity_config(&running)).expect("JSON");
            config["entries"].as_array().expect("entries").clone()
        };
        // Pods are known by their namespaces from the start.
        assert_eq!(entries(&[]).len(), 2);
        let with = entries(&[("node1/manager", 4711), ("identity", 1), ("client", 2)]);
        assert_eq!(with.len(), 3, "neither identity itself nor pods are known by pid");
        assert_eq!(with[0]["spiffeId"], "spiffe://kernel2kernel.lab/node1/manager");
        assert_eq!(with[0]["selectors"], serde_json::json!({"pid": 4711, "pidStart": 7}));
        assert_eq!(with[1]["selectors"], serde_json::json!({"netns": "kernel2kernel.client"}));
    }
}
