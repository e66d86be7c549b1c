//! Many wires of one endpoint that goes, and what all of them asking at once does to the programs that they ask.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nsm_kernel::netns::Namespace;
use nsm_lab::process::Supervisor;
use nsm_lab::{Lab, Plan, Scenario};
use rustix::process::Signal;

use crate::client::Workers;
use crate::{Error, Options, Row, Standing, Target, Times, Topology, Value};

/// The endpoint that goes, and the one that is there for when it does.
const ENDPOINTS: [&str; 2] = ["endpoint", "endpoint-2"];
/// Whose calls are counted, and where each tells them: its namespace, and a port of it.
const COUNTED: [(&str, &str, u16); 2] = [("registry", "node1", 9102), ("node1/manager", "node1", 9101)];
/// How often the counters are read.
const LOOK: Duration = Duration::from_millis(100);
/// Bound of waiting for a process.
const WITHIN: Duration = Duration::from_secs(30);

/// Everything about one topology, in a lab that is gone afterwards.
pub(crate) fn measure(
    options: &Options,
    topology: Topology,
    probes: bool,
    exe: &Path,
    supervisor: &Supervisor,
    rows: &mut Vec<Row>,
    progress: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    let (id, which) = if probes {
        ("heal.many", "probed wires")
    } else {
        ("heal.many.unprobed", "wires that nobody probes")
    };
    let name = format!("{}-many-{}", options.lab, if topology == Topology::Local { "local" } else { "far" });
    let path = Path::new("nsm bench heal");
    let scenario = topology.scenario(&name, options.together, options.clients, ENDPOINTS.len());
    let mut plan = Plan::new(&Scenario::parse(&scenario, path)?);
    for (process, _, port) in COUNTED {
        let process = plan.processes.iter_mut().filter(|planned| planned.name == process);
        process
            .for_each(|p| drop(p.env.insert("NSM_PROMETHEUS_LISTEN_ON".into(), format!("127.0.0.1:{port}"))));
    }
    progress(&format!("{topology}: building lab {name}"));
    let lab = Standing(Lab::build(plan, path, exe, supervisor.clone(), &mut |_| {})?);
    let lab = &lab.0;
    let [first, second] = ENDPOINTS;
    let mut workers = Workers::start(lab, exe, options.clients, probes)?;
    // Nobody goes to the second before the first is gone.
    lab.supervisor.end(second, Signal::TERM, WITHIN)?;
    progress(&format!("{topology}: {} {which} of one endpoint, which goes with its pod", options.wires));
    workers.open(lab, options.wires, 16)?;
    lab.start(second)?;
    lab.supervisor.wait_ready(&[second], WITHIN)?;

    let loads =
        COUNTED.map(|(_, namespace, port)| Ok::<_, Error>(Load::watch(lab.namespace(namespace)?, port)));
    let (began, left) = workers.leave(lab, first, || {
        lab.supervisor.end(first, Signal::KILL, WITHIN)?;
        Ok(lab.remove_namespace(first)?)
    })?;
    let times = Times::of(left.at.iter().map(|at| at.saturating_sub(began)));
    let what = format!("one endpoint of {} {which} gone: until each has another", options.wires);
    rows.push(
        Row::new(topology, id, what, Value::Times(times))
            .target(Target::at_most(times.max / 1e6, 3.0, " s each"))
            .note(format!("of {} clients, from the kill on", options.clients)),
    );
    let failed = left.failed.len();
    rows.push(
        Row::new(topology, format!("{id}.lost"), "  that carry no packet afterwards", Value::count(failed))
            .target(Target::none_of(failed))
            .note(left.failed.first().cloned().unwrap_or_default()),
    );
    for ((process, ..), load) in COUNTED.iter().zip(loads) {
        let peak = load?.peak();
        let calls: Vec<_> = peak.iter().map(|(method, calls)| format!("{method} {calls}")).collect();
        let value = Value::Number { value: peak.values().sum::<u64>() as f64, unit: "calls/s" };
        let what = format!("  peak load of {process}");
        rows.push(
            Row::new(topology, format!("{id}.load.{process}"), what, value)
                .note(format!("in the second in which it was asked most: {}", calls.join(", "))),
        );
    }
    workers.close(lab)?;
    Ok(())
}

/// Calls by method.
type Calls = BTreeMap<String, u64>;

/// Reads the counters of a program until it is asked for the peak.
struct Load {
    over: Arc<AtomicBool>,
    watching: thread::JoinHandle<Calls>,
}

impl Load {
    fn watch(namespace: Arc<Namespace>, port: u16) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&over);
        let watching = thread::spawn(move || {
            let (mut last, mut peak) = (VecDeque::<(Instant, Calls)>::new(), Calls::new());
            while !until.load(Ordering::Relaxed) {
                if let Some(now) = calls(&namespace, port) {
                    last.retain(|(at, _)| at.elapsed() <= Duration::from_secs(1));
                    let since = last.front().map_or(&now, |(_, calls)| calls);
                    let more = |(method, calls): (&String, &u64)| {
                        (method.clone(), calls - since.get(method).copied().unwrap_or_default())
                    };
                    let rate: Calls = now.iter().map(more).collect();
                    if rate.values().sum::<u64>() > peak.values().sum() {
                        peak = rate;
                    }
                    last.push_back((Instant::now(), now));
                }
                thread::sleep(LOOK);
            }
            peak
        });
        Self { over, watching }
    }

    fn peak(self) -> Calls {
        self.over.store(true, Ordering::Relaxed);
        self.watching.join().unwrap_or_default()
    }
}

/// What a program's metrics say of its calls.
fn calls(namespace: &Namespace, port: u16) -> Option<Calls> {
    let get = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map(|_| text)
    };
    let text = namespace.run(get).ok()?.ok()?;
    let calls = text.lines().filter_map(|line| {
        let (method, count) = line.strip_prefix("nsm_calls_total{method=\"")?.split_once("\"} ")?;
        Some((method.to_owned(), count.parse().ok()?))
    });
    Some(calls.collect())
}
