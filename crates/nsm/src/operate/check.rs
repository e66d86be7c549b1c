//! `nsm check`: is this node fit, is this mesh healthy, and what to do. Facts are gathered first and judged by a pure
//! function, so that every verdict can be made to happen.

use std::{
    borrow::Cow,
    fs, io,
    net::{IpAddr, UdpSocket},
    path::Path,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use clap::Args;
use nsm_identity::{ENDPOINT_VARIABLE, Source, explain};
use nsm_kernel::{
    Kernel,
    netns::Namespace,
    plan::{EndPlan, Side, Vxlan, WirePlan, vxlan_overhead},
};
use nsm_lab::{
    Format,
    report::{plain_table, render},
};
use nsm_mesh::inspect;
use serde::{Deserialize, Serialize};

use super::{At, Mesh, Seen, View, age, get, left, put, without_controls};

/// Failures older than this are history.
const LATELY: Duration = Duration::from_secs(300);
/// An identity that ends sooner is not being renewed: issuers renew at half of its life.
const SOON: Duration = Duration::from_secs(4);
/// IPv6 needs this much of every link (RFC 8200 section 5).
const LEAST_MTU: u32 = 1280;

/// Says whether this node is fit for a mesh, whether the mesh is healthy, and what to do
///
/// It changes nothing: what it tries, it tries in network namespaces of its own that are gone when it ends. Of a cluster
/// it asks all nodes. Status 0: all is well, warnings included; 1: something fails.
#[derive(Debug, Args)]
pub(crate) struct Check {
    /// For programs
    #[arg(long)]
    json: bool,
    /// Only the node, not the mesh
    #[arg(long, conflicts_with = "mesh")]
    node: bool,
    /// Only the mesh, not the node
    #[arg(long)]
    mesh: bool,
    #[command(flatten)]
    at: At,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Warn,
    Fail,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Finding {
    level: Level,
    /// Stable, for programs.
    check: Cow<'static, str>,
    what: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    hint: String,
}

impl Finding {
    fn ok(check: &'static str, what: impl Into<String>) -> Self {
        Self { level: Level::Ok, check: check.into(), what: what.into(), hint: String::new() }
    }

    fn warn(check: &'static str, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { level: Level::Warn, check: check.into(), what: what.into(), hint: hint.into() }
    }

    fn fail(check: &'static str, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { level: Level::Fail, check: check.into(), what: what.into(), hint: hint.into() }
    }
}

impl Check {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        if self.node && !self.at.is_cluster() {
            return At::run_alone(self.check(Mesh::Sockets(Vec::new())));
        }
        self.at.run(async |mesh| self.check(mesh).await)
    }

    async fn check(&self, mesh: Mesh) -> Result<ExitCode> {
        let mut findings = Vec::new();
        match &mesh {
            _ if self.mesh => {}
            Mesh::Cluster(cluster) => {
                for (node, said) in cluster.on_nodes(&["check", "--node", "--json"]).await? {
                    findings.extend(judge_node(&node, said));
                }
            }
            Mesh::Sockets(_) => {
                // Namespaces are entered on threads of their own; nothing here waits for the runtime.
                findings.extend(NodeFacts::gather().judge());
                findings.push(own_identity().await);
            }
        }
        if !self.node {
            findings.extend(judge_mesh(&mesh.view(&[], true).await?, SystemTime::now()));
        }
        let worst = findings.iter().map(|finding| finding.level).max();
        match self.json {
            true => put(&(serde_json::to_string_pretty(&findings)? + "\n"))?,
            false => put(&text(&findings))?,
        }
        Ok(if worst == Some(Level::Fail) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

fn text(findings: &[Finding]) -> String {
    let mut table = plain_table(["", "check", "found"]);
    for finding in findings {
        let mark = match finding.level {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "FAILED",
        };
        table.add_row([mark, &finding.check, &finding.what]);
        if !finding.hint.is_empty() {
            table.add_row(["", "", &format!("  do: {}", finding.hint)]);
        }
    }
    render(&table, Format::text()) + "\n"
}

/// What a node of a cluster said of itself: one line where all is well.
fn judge_node(node: &str, said: Result<String>) -> Vec<Finding> {
    let found = said.and_then(|said| Ok(serde_json::from_str::<Vec<Finding>>(&said)?));
    let found = match found {
        Ok(found) => found,
        Err(error) => {
            let hint = "kubectl describe and kubectl logs of its pod say more";
            return vec![Finding::fail("node", format!("{node} was not asked: {error:#}"), hint)];
        }
    };
    let fit = found.iter().all(|finding| finding.level != Level::Fail);
    let well = found.iter().filter(|finding| finding.level == Level::Ok).count();
    let fit =
        fit.then(|| Finding::ok("node", format!("{node} is fit: {well} of {} checks are well", found.len())));
    let bad = found.into_iter().filter(|finding| finding.level != Level::Ok);
    let bad = bad.map(|finding| Finding {
        what: format!("{node}: {}", without_controls(&finding.what)),
        hint: without_controls(&finding.hint),
        check: without_controls(&finding.check).into(),
        ..finding
    });
    fit.into_iter().chain(bad).collect()
}

// === the node ===

/// What can be found out of this node.
#[derive(Debug, Clone)]
struct NodeFacts {
    /// `CapEff` has CAP_NET_ADMIN and CAP_SYS_ADMIN.
    privileged: bool,
    /// Why no wire of this kind could be made; empty: it could.
    veth: String,
    vxlan: String,
    /// Why a file cannot be made there; empty: it can.
    run_dir: String,
    /// The address that tunnels would start from, its device and that one's MTU; or why there is none.
    uplink: Result<(IpAddr, String, u32), String>,
    bridge_filter: bool,
    user_namespaces: bool,
    /// Hard limit of open files; `None`: no limit.
    files: Option<u64>,
}

impl NodeFacts {
    fn gather() -> Self {
        Self {
            privileged: nsm_lab::is_privileged(),
            veth: why(try_wire(false)),
            vxlan: why(try_wire(true)),
            run_dir: try_write(Path::new("/run/nsm")).err().map(|e| e.to_string()).unwrap_or_default(),
            uplink: uplink(),
            bridge_filter: nsm_kernel::join::check_bridge_filter().is_ok(),
            user_namespaces: user_namespaces(),
            files: rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum,
        }
    }

    fn judge(&self) -> Vec<Finding> {
        let mut found = vec![match self.privileged {
            true => Finding::ok("capabilities", "CAP_NET_ADMIN and CAP_SYS_ADMIN"),
            false => Finding::fail(
                "capabilities",
                "this process lacks CAP_NET_ADMIN or CAP_SYS_ADMIN, which a forwarder needs",
                "run as root, or give the forwarder's container both capabilities",
            ),
        }];
        for (check, module, problem) in [("veth", "veth", &self.veth), ("vxlan", "vxlan", &self.vxlan)] {
            found.push(match problem.is_empty() {
                true => Finding::ok(check, "a wire was made and removed"),
                // Of somebody without rights nothing is learnt about the kernel.
                false if !self.privileged => {
                    Finding::warn(check, format!("not tried: {problem}"), "run as root to know")
                }
                false => Finding::fail(
                    check,
                    format!("the kernel makes no such wire: {problem}"),
                    format!("modprobe {module}, or use a kernel with CONFIG_{}", module.to_uppercase()),
                ),
            });
        }
        found.push(match self.run_dir.is_empty() {
            true => Finding::ok("/run/nsm", "writable"),
            false => Finding::fail(
                "/run/nsm",
                format!("no file can be made there: {}", self.run_dir),
                "run as root, mount a writable /run/nsm, or set NSM_STATE_DIR and NSM_INTROSPECT_DIR",
            ),
        });
        found.push(match &self.uplink {
            Err(why) => Finding::warn(
                "uplink",
                why.clone(),
                "wires to other nodes need one: set NSM_TUNNEL_IP to an address of this node",
            ),
            Ok((ip, device, mtu)) => {
                let overhead = vxlan_overhead(*ip);
                let left = mtu.saturating_sub(overhead);
                let sum = format!("{device} with {ip}: MTU {mtu} - {overhead} of VXLAN = {left} for wires");
                match left >= LEAST_MTU {
                    true => Finding::ok("uplink", sum),
                    false => Finding::fail(
                        "uplink",
                        format!("{sum}, IPv6 needs {LEAST_MTU}"),
                        format!("raise the MTU of {device} to {} or more", LEAST_MTU + overhead),
                    ),
                }
            }
        });
        found.push(match self.bridge_filter {
            true => Finding::ok("bridge-nf", "bridged packets can be filtered"),
            false => Finding::warn(
                "bridge-nf",
                "the kernel cannot pass bridged IP packets to netfilter: a firewall between ETHERNET wires will not start",
                "modprobe br_netfilter",
            ),
        });
        found.push(match self.user_namespaces {
            true => Finding::ok("user-namespaces", "ordinary users can run labs"),
            false => Finding::warn(
                "user-namespaces",
                "user namespaces are switched off: labs need root",
                "sysctl user.max_user_namespaces=10000 (and kernel.unprivileged_userns_clone=1 where there is one)",
            ),
        });
        found.push(match self.files {
            Some(files) if files < 16_384 => Finding::warn(
                "open-files",
                format!("at most {files} open files in a process; many wires need more"),
                "LimitNOFILE=1048576 in the unit, or ulimit -Hn",
            ),
            files => {
                Finding::ok("open-files", files.map_or("no limit".into(), |files| format!("up to {files}")))
            }
        });
        found
    }
}

fn why<T>(made: Result<T, nsm_kernel::Error>) -> String {
    made.err().map(|e| explain(&e)).unwrap_or_default()
}

/// Makes a wire between two namespaces that nobody else knows; the kernel removes both when this returns.
fn try_wire(tunnel: bool) -> Result<(), nsm_kernel::Error> {
    let (node, near, far) = (Namespace::unnamed()?, Namespace::unnamed()?, Namespace::unnamed()?);
    let kernel = Kernel::new(node.try_clone()?)?;
    let end = |side, ns: &Namespace| EndPlan::new(side, ns.id(), "nsm-check", "check");
    let plan = match tunnel {
        false => WirePlan::veth("check", end(Side::Near, &near), end(Side::Far, &far)),
        true => {
            // TEST-NET-1 (RFC 5737): nothing is ever sent.
            let ip = |last| IpAddr::from([192, 0, 2, last]);
            let vxlan = Vxlan { vni: 1, local: ip(1), remote: ip(2), port: 4789, remote_port: 4789 };
            WirePlan::vxlan("check", vxlan, Side::Near, end(Side::Near, &near))
        }
    };
    kernel.apply(&plan, &[&near, &far]).map(drop)
}

fn try_write(directory: &Path) -> io::Result<()> {
    // What does not exist is made by the first daemon, where it may.
    let there = directory.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    let path = there.join(format!(".nsm-check-{}", std::process::id()));
    fs::File::create_new(&path)?;
    fs::remove_file(path)
}

fn uplink() -> Result<(IpAddr, String, u32), String> {
    // TEST-NET-3 (RFC 5737): only the route towards it is looked up, nothing is sent.
    let look = || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect("203.0.113.1:9")?;
        socket.local_addr()
    };
    let within = match std::env::var("NSM_TUNNEL_IP").ok().filter(|text| !text.is_empty()) {
        Some(text) => crate::common::address_or_prefix(&text).map_err(|e| format!("NSM_TUNNEL_IP: {e}"))?,
        None => look()
            .map_err(|e: io::Error| format!("there is no default route to take a tunnel address from: {e}"))?
            .ip()
            .into(),
    };
    let kernel = Namespace::current().and_then(Kernel::new).map_err(|e| explain(&e))?;
    let device = kernel.uplink(within).map_err(|e| explain(&e))?;
    let device = device.ok_or_else(|| format!("no device of this node has a tunnel address in {within}"))?;
    Ok((device.ip, device.ifname, device.mtu))
}

fn user_namespaces() -> bool {
    let number = |path: &str| fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    number("/proc/sys/user/max_user_namespaces") != Some(0)
        && number("/proc/sys/kernel/unprivileged_userns_clone") != Some(0)
}

/// Whether the Workload API gives this process an identity, where it is said where that is.
async fn own_identity() -> Finding {
    const CHECK: &str = "workload-api";
    let Ok(endpoint) = std::env::var(ENDPOINT_VARIABLE) else {
        return Finding::ok(CHECK, format!("{ENDPOINT_VARIABLE} is not set here, so not asked"));
    };
    let asked = tokio::time::timeout(Duration::from_secs(5), Source::fetch_once(&endpoint)).await;
    let no = |why: String| {
        let hint = "is `nsm identity` or the SPIRE agent running, is its socket mounted here, has it an entry for this process?";
        Finding::fail(CHECK, why, hint)
    };
    match asked {
        Err(_) => no(format!("{endpoint} does not answer within 5s")),
        Ok(Err(error)) => no(explain(&error)),
        Ok(Ok(identity)) => {
            let left = left(inspect::millis(identity.svid().not_after()), SystemTime::now());
            Finding::ok(CHECK, format!("this process is {}, for another {left}", identity.id()))
        }
    }
}

// === the mesh ===

fn judge_mesh(view: &View, now: SystemTime) -> Vec<Finding> {
    let mut found = Vec::new();
    for silent in &view.silent {
        found.push(match silent.stale {
            true => Finding::warn(
                "process",
                format!("{}: {}", silent.url, silent.why),
                "it was killed: start it again, or remove the socket file",
            ),
            false if view.of_cluster => Finding::fail(
                "pod",
                format!("{}: {}", silent.url, silent.why),
                "kubectl describe and kubectl logs of it say more",
            ),
            false => Finding::fail(
                "process",
                format!("{}: {}", silent.url, silent.why),
                "a process that hangs is ended and started again; its wires stay. Without rights, run this as root",
            ),
        });
    }
    if view.seen.is_empty() {
        found.push(Finding::warn(
            "mesh",
            "no process of nsm is found here",
            "start one; or ask those of a lab with --lab, those of another node with --at",
        ));
        return found;
    }
    view.seen.iter().for_each(|seen| judge_process(&mut found, seen, now));
    judge_roles(&mut found, view);
    judge_wires(&mut found, view);
    judge_connections(&mut found, view, now);
    found
}

fn judge_process(found: &mut Vec<Finding>, seen: &Seen, now: SystemTime) {
    let p = &seen.process;
    let who = format!("{} ({})", p.name, p.role);
    let status = p.status.as_str();
    found.push(match (p.ready, status) {
        (true, _) => Finding::ok("process", format!("{who} is ready")),
        (false, "waiting for an identity") => Finding::fail(
            "process",
            format!("{who} waits for an identity since {}", age(p.since, now)),
            "is the Workload API served at its SPIFFE_ENDPOINT_SOCKET, with an entry for this process? Its log says why",
        ),
        (false, status) => Finding::fail(
            "process",
            format!("{who} is not ready since {}: {status}", age(p.since, now)),
            "`nsm get failures` and its log say what it waits for",
        ),
    });
    if p.svid_expires > 0 {
        let soon = inspect::millis(now + SOON);
        found.push(match p.svid_expires > soon {
            true => Finding::ok(
                "identity",
                format!("{who}: {} for another {}", p.spiffe_id, left(p.svid_expires, now)),
            ),
            false => Finding::fail(
                "identity",
                format!("{who}: the SVID of {} is not renewed: {}", p.spiffe_id, left(p.svid_expires, now)),
                "is the Workload API running? Wires stand; new requests and refreshes fail until it is back",
            ),
        });
    }
    for neighbour in &p.neighbours {
        found.push(match neighbour.problem.is_empty() {
            true => {
                Finding::ok("neighbour", format!("{who} reaches its {} at {}", neighbour.role, neighbour.url))
            }
            false => Finding::fail(
                "neighbour",
                format!(
                    "{who} does not reach its {} at {}: {}",
                    neighbour.role, neighbour.url, neighbour.problem
                ),
                match neighbour.role.as_str() {
                    "registry" => "is the registry running, and NSM_REGISTRY_URL right?",
                    _ => "is the manager of this node running, and NSM_CONNECT_TO right?",
                },
            ),
        });
    }
    if p.panics > 0 {
        found.push(Finding::warn(
            "panics",
            format!("{who} has contained {} panics", p.panics),
            "a bug: please report it with the log of this process",
        ));
    }
}

fn judge_roles(found: &mut Vec<Finding>, view: &View) {
    for manager in view.seen.iter().filter(|seen| seen.process.role == "manager" && seen.process.ready) {
        if !manager.endpoints.iter().any(|endpoint| endpoint.forwarder) {
            found.push(Finding::fail(
                "forwarder",
                format!("{} has no forwarder: no wire can be made on its node", manager.process.name),
                "start `nsm forwarder` with NSM_CONNECT_TO at this manager, in the manager's network namespace",
            ));
        }
    }
}

fn judge_wires(found: &mut Vec<Finding>, view: &View) {
    for seen in view.seen.iter().filter(|seen| seen.process.role == "forwarder" || !seen.wires.is_empty()) {
        let who = &seen.process.name;
        let before = found.len();
        for wire in &seen.wires {
            if wire.orphan {
                let ends = wire.near.iter().chain(&wire.far).map(|end| end.interface.as_str());
                found.push(Finding::fail(
                    "orphans",
                    format!(
                        "{who}: interface {} belongs to connection {}, which nobody knows",
                        ends.collect::<String>(),
                        wire.connection
                    ),
                    "remove it with `ip link delete` in its pod; if it comes back, please report it",
                ));
            } else if !wire.differences.is_empty() || !matches!(get::state(wire), "up" | "unclaimed") {
                let what = if wire.differences.is_empty() {
                    get::state(wire).to_owned()
                } else {
                    wire.differences.join("; ")
                };
                found.push(Finding::fail(
                    "wires",
                    format!("{who}: the wire of {} is not as planned: {what}", wire.client),
                    "the client's next refresh puts it right; if somebody changes it again and again, find out who",
                ));
            }
        }
        if found.len() == before {
            found.push(Finding::ok(
                "wires",
                format!("{who}: {} wires are as planned, no orphans", seen.wires.len()),
            ));
        }
    }
}

fn judge_connections(found: &mut Vec<Finding>, view: &View, now: SystemTime) {
    let wired = view.wired();
    let down: Vec<_> =
        wired.iter().filter(|wired| wired.hops.iter().any(|(_, c)| c.state == "DOWN")).collect();
    for wired in &down {
        let c = wired.front();
        found.push(Finding::fail(
            "connections",
            format!("{} to {} is down", c.hops[0].id, c.service),
            format!("nsm explain {}", c.hops[0].id),
        ));
    }
    if down.is_empty() {
        found.push(Finding::ok("connections", format!("{} up", wired.len())));
    }
    let late = inspect::millis(now).saturating_sub(i64::try_from(LATELY.as_millis()).unwrap_or(i64::MAX));
    let mut failures: Vec<_> =
        view.seen.iter().flat_map(|seen| &seen.failures).filter(|failure| failure.last >= late).collect();
    // Every hop remembers the same failure; the one nearest to the client says which hop it was.
    failures.sort_by(|a, b| (&a.client, &a.service, b.last).cmp(&(&b.client, &b.service, a.last)));
    failures.dedup_by(|a, b| (&a.client, &a.service) == (&b.client, &b.service));
    for f in failures {
        let hint = if f.hint.is_empty() { format!("nsm explain {}", f.client) } else { f.hint.clone() };
        let what = format!("{} for {} failed {} ago: {}", f.client, f.service, age(f.last, now), f.text);
        found.push(Finding::warn("requests", what, hint));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit() -> NodeFacts {
        NodeFacts {
            privileged: true,
            veth: String::new(),
            vxlan: String::new(),
            run_dir: String::new(),
            uplink: Ok((IpAddr::from([192, 0, 2, 1]), "eth0".into(), 1500)),
            bridge_filter: true,
            user_namespaces: true,
            files: None,
        }
    }

    /// The findings of a node with one thing wrong that are not good.
    fn wrong(change: impl FnOnce(&mut NodeFacts)) -> Vec<(Level, &'static str)> {
        let mut facts = fit();
        change(&mut facts);
        let bad = facts.judge().into_iter().filter(|finding| finding.level != Level::Ok);
        bad.inspect(|finding| assert!(!finding.hint.is_empty(), "{finding:?}"))
            .map(|finding| match finding.check {
                Cow::Borrowed(check) => (finding.level, check),
                Cow::Owned(check) => panic!("{check} is of another node"),
            })
            .collect()
    }

    #[test]
    fn each_thing_that_is_wrong_with_a_node_has_its_line() {
        use Level::{Fail, Warn};
        assert_eq!(wrong(|_| {}), []);
        assert_eq!(wrong(|f| f.privileged = false), [(Fail, "capabilities")]);
        assert_eq!(wrong(|f| f.veth = "not supported".into()), [(Fail, "veth")]);
        assert_eq!(wrong(|f| f.vxlan = "not supported".into()), [(Fail, "vxlan")]);
        assert_eq!(
            wrong(|f| (f.privileged, f.vxlan) = (false, "not permitted".into())),
            [(Fail, "capabilities"), (Warn, "vxlan")]
        );
        assert_eq!(wrong(|f| f.run_dir = "read-only".into()), [(Fail, "/run/nsm")]);
        assert_eq!(wrong(|f| f.uplink = Err("no route".into())), [(Warn, "uplink")]);
        let ip = IpAddr::from([192, 0, 2, 1]);
        let least = LEAST_MTU + vxlan_overhead(ip);
        assert_eq!(wrong(|f| f.uplink = Ok((ip, "eth0".into(), least))), []);
        assert_eq!(wrong(|f| f.uplink = Ok((ip, "eth0".into(), least - 1))), [(Fail, "uplink")]);
        assert_eq!(wrong(|f| f.bridge_filter = false), [(Warn, "bridge-nf")]);
        assert_eq!(wrong(|f| f.user_namespaces = false), [(Warn, "user-namespaces")]);
        assert_eq!(wrong(|f| f.files = Some(1024)), [(Warn, "open-files")]);
    }

    #[test]
    fn panics_are_told() {
        let process = nsm_api::pb::introspect::Process { panics: 1, ready: true, ..Default::default() };
        let view = View { seen: vec![Seen { process, ..Seen::default() }], ..View::default() };
        let found = judge_mesh(&view, SystemTime::now());
        assert!(found.iter().any(|f| f.level == Level::Warn && f.check == "panics"), "{found:?}");
    }

    #[test]
    fn a_node_of_a_cluster_takes_one_line_and_one_for_each_thing_that_is_wrong() {
        let told = |facts: NodeFacts| serde_json::to_string(&facts.judge()).unwrap_or_default();
        let lines = |said| {
            judge_node("node1", said).into_iter().map(|f| (f.level, f.what, f.hint)).collect::<Vec<_>>()
        };
        let fit_lines = lines(Ok(told(fit())));
        assert_eq!(fit_lines.len(), 1, "{fit_lines:?}");
        assert_eq!((fit_lines[0].0, &fit_lines[0].1[..16]), (Level::Ok, "node1 is fit: 8 "));
        let warned = lines(Ok(told(NodeFacts { user_namespaces: false, ..fit() })));
        assert_eq!(warned.iter().map(|line| line.0).collect::<Vec<_>>(), [Level::Ok, Level::Warn]);
        let bad = lines(Ok(told(NodeFacts { veth: "not\x1b[2J supported".into(), ..fit() })));
        assert_eq!(bad.len(), 1, "{bad:?}");
        assert!(bad[0].1.starts_with("node1: the kernel makes no such wire: not [2J"), "{bad:?}");
        for said in [Ok("error: unrecognized".to_owned()), Err(anyhow::anyhow!("no such container"))] {
            let not_asked = lines(said);
            assert!(not_asked.len() == 1 && not_asked[0].0 == Level::Fail, "{not_asked:?}");
            assert!(not_asked[0].1.starts_with("node1 was not asked: "), "{not_asked:?}");
        }
    }
}
