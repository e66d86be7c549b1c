//! What the traffic of a wire notices when something under it breaks: a ping every millisecond from the client, to
//! whichever of two endpoints serves, across each fault; many times, because what matters is the worst.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use nsm_lab::network::Seen;
use nsm_lab::process::Supervisor;
use nsm_lab::scenario::{Fault, FaultPing};
use nsm_lab::{Lab, Plan, Scenario, Struck};

use crate::{Error, Options, Row, Standing, Target, Times, Topology, Value};

/// The endpoints, and the address at which each serves: there is room for one wire.
const ENDPOINTS: [(&str, Ipv4Addr); 2] =
    [("server-a", Ipv4Addr::new(172, 16, 1, 100)), ("server-b", Ipv4Addr::new(172, 16, 1, 102))];
/// Bound of waiting for anything.
const WITHIN: Duration = Duration::from_secs(30);
/// How long a node stays cut off: longer than it may take until another one serves.
const CUT: Duration = Duration::from_secs(3);
/// How long a wire stands before something happens to it: one that falls sooner is asked for in growing pauses.
const STANDS: Duration = Duration::from_millis(1200);
/// How often it is looked whether the wire has moved.
const LOOK: Duration = Duration::from_millis(2);

fn scenario(topology: Topology, name: &str) -> String {
    let nodes = match topology {
        Topology::Local => ["node1", "node1"],
        Topology::TwoNodes => ["node2", "node3"],
    };
    let mut text = format!(
        "name: {name}\n\
         networkServices:\n\
         - apiVersion: networkservicemesh.io/v1\n  \
           kind: NetworkService\n  \
           metadata: {{name: heal}}\n\
         nodes: [node1, node2, node3]\n\
         pods:\n\
         - {{name: client, node: node1, annotations: {{networkservicemesh.io: kernel://heal/nsm-1}}}}\n"
    );
    for ((pod, address), node) in ENDPOINTS.iter().zip(nodes) {
        text += &format!(
            "- {{name: {pod}, node: {node}, endpoint: {{services: [heal], labels: {{app: {pod}}}, cidrPrefix: [{address}/31]}}}}\n"
        );
    }
    text
}

/// The network service, which leads to one of the endpoints or to any.
fn service(leads_to: Option<&str>) -> String {
    let spec = leads_to
        .map(|pod| format!("spec:\n  matches:\n  - routes:\n    - destination_selector: {{app: {pod}}}\n"));
    format!(
        "apiVersion: networkservicemesh.io/v1\nkind: NetworkService\nmetadata: {{name: heal}}\n{}",
        spec.unwrap_or_default()
    )
}

/// Everything about one topology, in a lab that is gone afterwards.
pub(crate) fn measure(
    options: &Options,
    topology: Topology,
    exe: &Path,
    supervisor: &Supervisor,
    rows: &mut Vec<Row>,
    progress: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    let name = format!("{}-heal-{}", options.lab, if topology == Topology::Local { "local" } else { "far" });
    let path = Path::new("nsm bench heal");
    let plan = Plan::new(&Scenario::parse(&scenario(topology, &name), path)?);
    progress(&format!("{topology}: building lab {name}"));
    let lab = Standing(Lab::build(plan, path, exe, supervisor.clone(), &mut |_| {})?);
    let heal = Heal { lab: &lab.0, topology, times: options.times };
    progress(&format!("{topology}: the endpoint's pod goes, {} times", heal.times));
    rows.push(heal.pod_gone()?);
    progress(&format!("{topology}: the endpoint's process is killed, {} times", heal.times));
    rows.extend(heal.process_gone()?);
    for (id, processes) in heal.daemons() {
        progress(&format!("{topology}: {} killed, {} times", processes.join(", "), heal.times));
        rows.push(heal.daemons_killed(id, &processes)?);
    }
    progress(&format!("{topology}: the network service leads elsewhere, {} times", heal.times));
    rows.extend(heal.service_changed()?);
    if topology == Topology::TwoNodes {
        progress(&format!("{topology}: the endpoint's node is cut off, {} times", heal.times));
        rows.push(heal.node_cut()?);
    }
    drop(lab);
    let left = nsm_lab::leftovers(&name);
    rows.push(
        Row::new(topology, "heal.left", "objects left by the lab of faults", Value::count(left.len()))
            .target(Target::none_of(left.len()))
            .note(left.join("; ")),
    );
    Ok(())
}

struct Heal<'a> {
    lab: &'a Lab,
    topology: Topology,
    times: usize,
}

impl Heal<'_> {
    /// Which endpoint has the client's wire: its routes tell.
    fn serving(&self) -> Result<Option<&'static str>, Error> {
        let seen = Seen::of(&*self.lab.namespace("client")?)?;
        let leads_to = |address: &Ipv4Addr| {
            let mut routes = seen.routes.iter().filter(|route| route.interface == "nsm-1");
            routes.any(|route| route.to.addr() == IpAddr::V4(*address))
        };
        Ok(ENDPOINTS.iter().find(|(_, address)| leads_to(address)).map(|(pod, _)| *pod))
    }

    /// Echo requests that have reached a pod so far (RFC 4293, `icmpStatsInMsgs` by kind): its own kernel counts them.
    fn received(&self, pod: &str) -> Result<u64, Error> {
        let read = || std::fs::read_to_string("/proc/thread-self/net/snmp");
        let text = self.lab.namespace(pod)?.run(read).map_err(Error::kernel(format!("enter {pod}")))?;
        let text = text.map_err(Error::system("read what its kernel has counted"))?;
        let mut rows = text.lines().filter_map(|line| line.strip_prefix("Icmp: ")).map(str::split_whitespace);
        let counted = rows.next().zip(rows.next()).and_then(|(names, mut counts)| {
            counts.nth(names.into_iter().position(|name| name == "InEchos")?)?.parse().ok()
        });
        let unknown = || std::io::Error::other("no count of echo requests");
        counted.ok_or_else(unknown).map_err(Error::system("read what its kernel has counted"))
    }

    /// The endpoint beside one that serves.
    fn other(server: &str) -> &'static str {
        ENDPOINTS.iter().map(|(pod, _)| *pod).find(|pod| *pod != server).expect("there are two")
    }

    /// The one that serves, once one has for a while.
    fn server(&self) -> Result<&'static str, Error> {
        let end = Instant::now() + WITHIN;
        while Instant::now() < end {
            if let Some(server) = self.serving()? {
                std::thread::sleep(STANDS);
                if self.serving()? == Some(server) {
                    return Ok(server);
                }
            }
            std::thread::sleep(LOOK);
        }
        Err(Error::Client("has no wire that stands, long after the last fault".into()))
    }

    fn fault(&self) -> Fault {
        let to = ENDPOINTS.iter().map(|(_, address)| IpAddr::V4(*address)).collect();
        let ping = Some(FaultPing { from: "client".into(), to });
        Fault { restart: true, ping, within: WITHIN, ..Fault::default() }
    }

    fn strike(&self, fault: &Fault) -> Result<Struck, Error> {
        Ok(self.lab.strike(fault, &mut || true)?)
    }

    fn pod_gone(&self) -> Result<Row, Error> {
        let mut silences = Vec::new();
        for _ in 0..self.times {
            let remove = Some(self.server()?.to_owned());
            silences.push(self.strike(&Fault { remove, ..self.fault() })?.silence);
        }
        let times = Times::of(silences);
        Ok(Row::new(self.topology, "heal.pod", "endpoint's pod gone: without an answer", Value::Times(times))
            .target(Target::times(&times, 50, 200))
            .note("the longest time between two pings of one each millisecond that were answered, by the old endpoint or by the new one; the pod goes with its namespace, killed, and is made again"))
    }

    fn process_gone(&self) -> Result<[Row; 2], Error> {
        let (mut moved, mut lost) = (Vec::new(), 0);
        for _ in 0..self.times {
            let server = self.server()?;
            let kill = vec![server.to_owned()];
            let other = Self::other(server);
            let before = self.received(other)?;
            let began = Instant::now();
            let mut at = None;
            let mut look = || {
                let moved = self.serving().ok().flatten() == Some(other);
                let receives = || self.received(other).is_ok_and(|now| now > before);
                at = at.or_else(|| (moved && receives()).then(|| began.elapsed()));
                at.is_some()
            };
            let struck = self.lab.strike(&Fault { kill, restart: false, ..self.fault() }, &mut look)?;
            lost += struck.lost;
            // Those that did not move within the bound count with it.
            moved.push(at.unwrap_or(WITHIN));
            self.lab.start(server)?;
            self.lab.supervisor.wait_ready(&[server], WITHIN)?;
        }
        let times = Times::of(moved);
        let reached = times.max / 1e6;
        Ok([
            Row::new(self.topology, "heal.process", "endpoint's process killed: until another receives packets", Value::Times(times))
                .target(Target::at_most(reached, 1.0, " s each"))
                .note("from before the pings begin, 200 ms before the kill, until the client's routes lead to the other endpoint and its kernel has counted an echo request; the first one's process stays away"),
            Row::new(self.topology, "heal.process.lost", "… and pings lost", Value::count(lost as usize))
                .target(Target::none_of(lost as usize))
                .note(format!("of one each millisecond, {} times together", self.times)),
        ])
    }

    fn service_changed(&self) -> Result<[Row; 2], Error> {
        let (mut moved, mut lost) = (Vec::new(), Vec::new());
        for _ in 0..self.times {
            let server = self.server()?;
            let other = Self::other(server);
            let mut changed = None;
            let mut at = None;
            let mut look = || {
                let began = *changed.get_or_insert_with(Instant::now);
                if at.is_none() && self.serving().ok().flatten() == Some(other) {
                    at = Some(began.elapsed());
                }
                at.is_some()
            };
            let fault = Fault { apply: Some(service(Some(other))), ..self.fault() };
            lost.push(self.lab.strike(&fault, &mut look)?.lost);
            moved.push(at.unwrap_or(WITHIN));
        }
        // What is measured after this may go to either again.
        self.lab.apply(&service(None))?;
        let times = Times::of(moved);
        let all = lost.iter().sum::<u64>() as usize;
        Ok([
            Row::new(self.topology, "heal.service", "matches of the network service changed: until the other serves", Value::Times(times))
                .target(Target::at_most(times.max / 1e3, 200.0, " ms each"))
                .note("from when the file that the registry follows was written until the client's routes lead to the other endpoint"),
            Row::new(self.topology, "heal.service.lost", "… and pings lost", Value::count(all))
                .target(Target::none_of(all))
                .note(format!(
                    "of one each millisecond, {} times together; at most {} at once",
                    self.times,
                    lost.iter().max().copied().unwrap_or_default()
                )),
        ])
    }

    fn daemons(&self) -> Vec<(&'static str, Vec<String>)> {
        let all = self.lab.plan.processes.iter().map(|process| process.name.clone());
        let pods: Vec<&str> = self.lab.plan.pods.iter().map(|pod| pod.pod.as_str()).collect();
        let all = all.filter(|name| !pods.contains(&name.as_str())).collect();
        let one = |name: &str| vec![name.to_owned()];
        vec![
            ("identity", one("identity")),
            ("registry", one("registry")),
            ("manager", one("node1/manager")),
            ("forwarder", one("node1/forwarder")),
            ("all", all),
        ]
    }

    fn daemons_killed(&self, id: &str, kill: &[String]) -> Result<Row, Error> {
        let (mut lost, mut hurt, mut silence) = (0, 0, Duration::ZERO);
        for _ in 0..self.times {
            self.server()?;
            let struck = self.strike(&Fault { kill: kill.to_vec(), ..self.fault() })?;
            lost += struck.lost;
            hurt += usize::from(struck.lost > 0);
            silence = silence.max(struck.silence);
        }
        let what = match id {
            "all" => "all daemons killed together: pings lost".to_owned(),
            _ => format!("{} killed: pings lost", kill.join(", ")),
        };
        Ok(Row::new(self.topology, format!("heal.{id}"), what, Value::count(lost as usize))
            .target(Target::none_of(lost as usize))
            .note(format!(
                "{} times, and made again; in {hurt} of them any was lost, and the longest without an answer was {:.0} ms",
                self.times,
                silence.as_secs_f64() * 1e3
            )))
    }

    fn node_cut(&self) -> Result<Row, Error> {
        let mut silences = Vec::new();
        for _ in 0..self.times {
            let server = self.server()?;
            let node = self.lab.plan.pods.iter().find(|pod| pod.pod == server).map(|pod| pod.node.clone());
            silences.push(self.strike(&Fault { cut: node, lasts: CUT, ..self.fault() })?.silence);
        }
        let times = Times::of(silences);
        Ok(Row::new(
            self.topology,
            "heal.cut",
            "endpoint's node cut off: without an answer",
            Value::Times(times),
        )
        .target(Target::at_most(times.max / 1e6, 1.0, " s each"))
        .note(format!("its cable leads nowhere for {CUT:?}, and nobody is told")))
    }
}
