//! What a wire costs, measured beside what the kernel alone can do, in one run on one machine.
//!
//! ```text
//!   nsm bench ─ holds a lab: identity, registry, managers, forwarders, endpoint, all real, all mTLS
//!       │ orders                        ┌ <lab>.client ─────┐            ┌ <lab>.endpoint ─┐
//!       ├──────▶ nsm bench client ──────│ Request … ping    │═══ wire ═══│                 │
//!       └─ threads with sockets in both │ TCP, ping         │─── bare ───│                 │
//!                                       └───────────────────┘            └─────────────────┘
//! ```
//!
//! Figures depend on the machine and on what else it does; what may not depend on it is that all wires come up and that
//! nothing is left. Whatever is compared is measured in turns, wire and bare, and what counts is the median of the
//! quotients of each pair.

mod bare;
mod client;
mod error;
mod figures;
mod heal;
mod interop;
mod many;
mod setup;
mod traffic;

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, Instant};

use nsm_lab::leaks::{self, Snapshot};
use nsm_lab::process::Supervisor;
use nsm_lab::{Lab, Plan, Scenario};
use serde::Serialize;

pub use client::{ClientOptions, client};
pub use error::Error;
pub use figures::{Amounts, Machine, Results, Row, Target, Times, Value, is_debug};
pub use interop::beside_upstream;

/// The network service that is asked for.
const SERVICE: &str = "bench";
/// A pod that gets its first wire is prepared for it once and for all: everybody may ping there.
const PREPARED: &str = "net.ipv4.ping_group_range";
/// How long the kernel and the mesh may take to let go of wires that were closed, and for each of them; links are deleted
/// in the background.
const SETTLE: Duration = Duration::from_secs(10);
/// See [`SETTLE`].
const SETTLE_EACH: Duration = Duration::from_millis(50);

/// Where client and endpoint are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Topology {
    /// On one node: a veth pair.
    Local,
    /// On two: VXLAN over the underlay.
    TwoNodes,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Measure {
    /// Wires asked for and closed: time, rate, memory, handshakes, leftovers.
    Setup,
    /// One TCP stream over a wire beside the bare kernel devices, each direction.
    Throughput,
    /// Pings over a wire beside the bare kernel devices.
    Latency,
    /// Pings over a wire while something under it breaks, in a lab of its own.
    Heal,
}

/// What to measure, and how much of it.
#[derive(Debug, Clone)]
pub struct Options {
    /// Each gets a lab of its own.
    pub topologies: BTreeSet<Topology>,
    /// In the order of [`Measure`].
    pub measures: BTreeSet<Measure>,
    /// How many wires a row of [`Measure::Setup`] has.
    pub wires: usize,
    /// From how many pods they are asked for, in turns.
    pub clients: usize,
    /// How many endpoints share them.
    pub endpoints: usize,
    /// How many wires are asked for at a time; a row for each.
    pub concurrency: Vec<usize>,
    /// How many rounds of measurements, wire and bare, are compared.
    pub pairs: usize,
    /// How long one measurement of throughput takes.
    pub duration: Duration,
    /// How many pings one measurement of latency has.
    pub pings: usize,
    /// How often each fault of [`Measure::Heal`] happens.
    pub times: usize,
    /// The commit that the program was built from, where whoever built it tells.
    pub commit: Option<String>,
    /// Prefix of the labs' names: two runs beside each other need two.
    pub lab: String,
    /// All daemons of a node in one process: `nsm node`.
    pub together: bool,
}

/// Handshakes are counted in the logs.
const LOG_LEVEL: &str = "info,nsm_transport::pool=debug";

/// A lab that comes down whatever happens.
struct Standing(Lab);

// === impl Topology ===

impl Topology {
    fn scenario(self, name: &str, together: bool, clients: usize, endpoints: usize) -> String {
        let daemons = if together { "together" } else { "separate" };
        let (nodes, far, cables) = match self {
            // The bare pairs stand beside the wire, in the same pods.
            Self::Local => ("node1", "node1", bare::CABLES),
            Self::TwoNodes => ("node1, node2", "node2", ""),
        };
        let clients: String = (0..clients.max(1))
            .map(|number| format!("- {{name: {}, node: node1}}\n", client::pod(number)))
            .collect();
        let endpoint = |number: usize| {
            let (name, net) = match number {
                0 => ("endpoint".to_owned(), 200),
                _ => (format!("endpoint-{}", number + 1), number),
            };
            format!(
                "- {{name: {name}, node: {far}, \
                 endpoint: {{services: [{SERVICE}], cidrPrefix: [10.{net}.0.0/16]}}}}\n"
            )
        };
        let endpoints: String = (0..endpoints.max(1)).map(endpoint).collect();
        format!(
            "name: {name}\n\
             networkServices:\n\
             - apiVersion: networkservicemesh.io/v1\n  \
               kind: NetworkService\n  \
               metadata: {{name: {SERVICE}}}\n  \
               spec: {{payload: IP}}\n\
             nodes: [{nodes}]\n\
             daemons: {daemons}\n\
             pods:\n\
             {clients}\
             {endpoints}\
             {cables}"
        )
    }
}

impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::TwoNodes => "two nodes",
        })
    }
}

impl FromStr for Topology {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "local" => Ok(Self::Local),
            "two-nodes" => Ok(Self::TwoNodes),
            _ => Err(format!("{text:?} is neither local nor two-nodes")),
        }
    }
}

// === impl Standing ===

impl Drop for Standing {
    fn drop(&mut self) {
        self.0.down();
    }
}

/// Measures; `progress` hears what is being done. `exe` is the `nsm` that is measured.
///
/// Signals end it in good order, so it can be called once in the life of a process.
///
/// What was measured comes back also where something cannot be measured or a signal ends it, with that error; nothing is
/// left of the lab then.
pub fn run(options: &Options, exe: &Path, progress: &mut dyn FnMut(&str)) -> (Results, Result<(), Error>) {
    let mut results = Results::of_this_machine(options);
    let ended = run_into(&mut results.rows, options, exe, progress);
    (results, ended)
}

// === private helpers ===

fn run_into(
    rows: &mut Vec<Row>,
    options: &Options,
    exe: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    let supervisor = Supervisor::default();
    let signalled = supervisor.clone();
    nsm_lab::on_signals(move |name| signalled.stop(name))?;
    for topology in &options.topologies {
        if options.measures.iter().any(|measure| *measure != Measure::Heal) {
            measure(options, *topology, exe, &supervisor, rows, progress)?;
        }
        if options.measures.contains(&Measure::Heal) {
            if options.times > 0 {
                heal::measure(options, *topology, exe, &supervisor, rows, progress)?;
            }
            for probes in [true, false] {
                many::measure(options, *topology, probes, exe, &supervisor, rows, progress)?;
            }
        }
    }
    Ok(())
}

/// Everything about one topology, in a lab that is gone afterwards.
fn measure(
    options: &Options,
    topology: Topology,
    exe: &Path,
    supervisor: &Supervisor,
    rows: &mut Vec<Row>,
    progress: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    let name = match topology {
        Topology::Local => format!("{}-local", options.lab),
        Topology::TwoNodes => format!("{}-two-nodes", options.lab),
    };
    let before = Snapshot::take()?;
    let path = Path::new("nsm bench");
    let mut plan = Plan::new(&Scenario::parse(
        &topology.scenario(&name, options.together, options.clients, options.endpoints),
        path,
    )?);
    for process in &mut plan.processes {
        process.env.insert("NSM_LOG_LEVEL".into(), LOG_LEVEL.into());
    }
    progress(&format!("{topology}: building lab {name}"));
    let lab = Lab::build(plan, path, exe, supervisor.clone(), &mut |_| {})?;
    let lab = Standing(lab);
    measure_in(options, topology, &lab.0, exe, rows, progress)?;
    drop(lab);

    // Others work on this machine too: only what bears the lab's name is certainly ours.
    let mut left = nsm_lab::leftovers(&name);
    left.extend(leaks::compare(&before, &Snapshot::take()?).into_iter().filter(|line| line.contains(&name)));
    rows.push(
        Row::new(topology, "left.lab", "objects left by the lab", Value::count(left.len()))
            .target(Target::none_of(left.len()))
            .note(left.join("; ")),
    );
    Ok(())
}

fn measure_in(
    options: &Options,
    topology: Topology,
    lab: &Lab,
    exe: &Path,
    rows: &mut Vec<Row>,
    progress: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    let mut workers = client::Workers::start(lab, exe, options.clients, false)?;
    if options.measures.contains(&Measure::Setup) {
        setup::measure(options, topology, lab, &mut workers, rows, progress)?;
    }
    let traffic: Vec<_> = options
        .measures
        .iter()
        .copied()
        .filter(|measure| !matches!(measure, Measure::Setup | Measure::Heal))
        .collect();
    if !traffic.is_empty() {
        traffic::measure(options, topology, &traffic, lab, workers.first(), rows, progress)?;
    }
    Ok(())
}

/// Waits until the machine is as it was, as far as it bears the lab's name; what is different after all.
fn settle(lab: &Lab, before: &Snapshot, wires: usize) -> Result<Vec<String>, Error> {
    let end = Instant::now() + SETTLE + SETTLE_EACH * u32::try_from(wires).unwrap_or(u32::MAX);
    let mut pause = Duration::from_millis(20);
    loop {
        let mut left = leaks::compare(before, &Snapshot::take()?);
        left.retain(|line| line.contains(&lab.plan.lab) && !line.contains(PREPARED));
        if left.is_empty() || Instant::now() >= end {
            return Ok(left);
        }
        lab.supervisor.check()?;
        std::thread::sleep(pause);
        // To look takes the longer the more is left, and keeps the kernel from deleting it.
        pause = (2 * pause).min(Duration::from_secs(1));
    }
}
