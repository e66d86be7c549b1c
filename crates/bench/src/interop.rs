//! Ours beside upstream's programs: the same five roles, the same number of wires one after the other, in one run.
//!
//! Upstream's forwarder negotiates and makes no wire here, its data plane is another program; ours makes every wire in the
//! kernel. So the comparison is in upstream's favour.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nsm_lab::process::{Supervisor, tail};
use nsm_lab::{Lab, Plan, Scenario};
use serde::Deserialize;

use crate::client::Worker;
use crate::figures::Target;
use crate::{Error, Options, Results, Row, SERVICE, Standing, Times, Topology, Value};

/// Wires made before anything counts.
const WARM_UP: usize = 3;

/// What upstream's client prints at its end, in nanoseconds.
#[derive(Debug, Deserialize)]
struct Measured {
    #[serde(rename = "Request")]
    request: Vec<u64>,
    #[serde(rename = "Close")]
    close: Vec<u64>,
}

/// Measures both; `upstream` is the program of `interop/`, `exe` the `nsm` that is measured.
///
/// # Errors
///
/// As [`crate::run`].
pub fn beside_upstream(
    options: &Options,
    exe: &Path,
    upstream: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<Results, Error> {
    let supervisor = Supervisor::default();
    let signalled = supervisor.clone();
    nsm_lab::on_signals(move |name| signalled.stop(name))?;
    let mut results = Results::of_this_machine(options);
    let build = |name: &str, theirs: bool| -> Result<Standing, Error> {
        let path = Path::new("nsm bench interop");
        let name = format!("{}-{name}", options.lab);
        let text = Topology::Local.scenario(&name, false, 1, 1);
        let mut plan = Plan::new(&Scenario::parse(&text, path)?);
        for process in plan.processes.iter_mut().filter(|process| theirs && process.name != "identity") {
            process.exe = Some(upstream.to_owned());
        }
        Ok(Standing(Lab::build(plan, path, exe, supervisor.clone(), &mut |_| {})?))
    };

    progress(&format!("ours: {} wires, one after the other", options.wires));
    let lab = build("ours", false)?;
    let mut worker = Worker::start(&lab.0, exe, &crate::client::pod(0), false)?;
    worker.open(&lab.0, WARM_UP, 1)?;
    worker.close(&lab.0)?;
    let opened = worker.open(&lab.0, options.wires, 1)?;
    let closed = worker.close(&lab.0)?;
    let ours = Times::of(opened.made.iter().map(|made| made.request));
    let our_close = Times::of(closed.times);
    drop((worker, lab));

    progress(&format!("upstream's: {} wires, one after the other", options.wires));
    let lab = build("upstreams", true)?;
    ask_upstream(&lab.0, upstream, WARM_UP)?;
    let measured = ask_upstream(&lab.0, upstream, options.wires)?;
    let times = |nanos: Vec<u64>| Times::of(nanos.into_iter().map(Duration::from_nanos));
    let (theirs, their_close) = (times(measured.request), times(measured.close));
    drop(lab);

    let row = |id: &str, what: &str, value| Row::new(Topology::Local, id, what, value);
    let (ratio, unit) = (theirs.p50 / ours.p50, "times");
    results.rows.extend([
        row("interop.request.ours", "Request, ours, with the wire in the kernel", Value::Times(ours)),
        row("interop.request.upstream", "Request, upstream's, without a wire", Value::Times(theirs)),
        row("interop.ratio", "upstream's p50 / ours", Value::Number { value: ratio, unit })
            .target(Target::at_least(ratio, 20.0, " times")),
        row("interop.close.ours", "Close, ours", Value::Times(our_close)),
        row("interop.close.upstream", "Close, upstream's", Value::Times(their_close)),
    ]);
    Ok(results)
}

/// Has upstream's client make so many wires and close them.
fn ask_upstream(lab: &Lab, upstream: &Path, wires: usize) -> Result<Measured, Error> {
    let node = lab.plan.paths().node("node1");
    let socket = |name: &str| format!("unix://{}", node.join(name).display());
    let mut command = Command::new(upstream);
    command
        .args(["client", "--name", &format!("bench{wires}"), "--connect-to", &socket("nsm.io.sock")])
        .args(["--network-services", &format!("kernel://{SERVICE}/w"), "--count", &wires.to_string()])
        .env("SPIFFE_ENDPOINT_SOCKET", socket("identity.sock"))
        .stdin(Stdio::null());
    let output = lab
        .namespace("client")?
        .run(|| command.output())
        .map_err(Error::kernel("enter the client's pod"))?
        .map_err(Error::system("start upstream's client"))?;
    lab.supervisor.check()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let result = said.lines().find_map(|line| line.split_once("measured result="));
    result.and_then(|(_, json)| serde_json::from_str(json).ok()).ok_or_else(|| {
        let last = said.lines().last().unwrap_or_default();
        let manager = tail(&lab.plan.paths().log("node1/manager"));
        Error::Client(format!(
            "of upstream's ended with {}: {last}; the manager's log:\n{manager}",
            output.status
        ))
    })
}
