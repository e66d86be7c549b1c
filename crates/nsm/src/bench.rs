//! `nsm bench`: what a wire costs on this machine.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command as Program, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use nsm_bench::{ClientOptions, Measure, Options, Topology};
use nsm_lab::Format;
use nsm_transport::DialUrl;

use crate::common::{self, Common, duration};

/// What a wire costs on this machine, beside what the kernel alone can do.
///
/// Builds a lab with the real programs and mutual TLS, measures in it, and removes it. Without a command everything is
/// measured, which takes two to three minutes. Figures are only worth something from a release build on an idle
/// machine: `cargo xtask bench`.
#[derive(Debug, Args)]
pub(crate) struct Bench {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    amounts: Amounts,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Wires asked for and closed: time, rate, memory, handshakes, leftovers
    Setup,
    /// One TCP stream over a wire, beside a bare veth pair or a hand-made VXLAN
    Throughput,
    /// Pings over a wire, beside a bare veth pair or a hand-made VXLAN
    Latency,
    /// Pings over a wire while something under it breaks: pods, processes, daemons, nodes
    Heal,
    /// Ours beside upstream's programs: the same roles and counts, both in one run (`cargo xtask bench interop` builds
    /// upstream's)
    Interop {
        /// The program with upstream's roles, built from interop/
        #[arg(long, env = "NSM_UPSTREAM_PEER", value_name = "FILE")]
        upstream: PathBuf,
    },
    /// Ask for wires and ping through them, as ordered on stdin (started by the others in the client's pod)
    #[command(hide = true)]
    Client {
        /// The manager of the node
        #[arg(long)]
        connect_to: DialUrl,
        /// Probe wires, as clients do it
        #[arg(long)]
        probes: bool,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Debug, Args)]
struct Amounts {
    /// local, two-nodes or both
    #[arg(long, global = true, default_value = "both", value_parser = topologies)]
    topology: Topologies,
    /// How many wires to ask for
    #[arg(long, global = true, default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..=20_000))]
    wires: u16,
    /// From how many pods to ask for them, in turns
    #[arg(long, global = true, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=200))]
    clients: u16,
    /// How many endpoints share them
    #[arg(long, global = true, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=199))]
    endpoints: u16,
    /// How many wires to ask for at a time; each is a row of its own
    #[arg(long, global = true, value_delimiter = ',', default_value = "1,16")]
    concurrency: Vec<usize>,
    /// Measure `nsm node`: manager, forwarder and registry of a node in one process
    #[arg(long, global = true)]
    together: bool,
    /// How many times wire and bare device are compared, in turns, and the bare device with its equal: that is noise
    #[arg(long, global = true, default_value_t = 7)]
    pairs: usize,
    /// How long one measurement of throughput takes
    #[arg(long, global = true, default_value = "1s", value_parser = duration)]
    duration: Duration,
    /// How many pings one measurement of latency has
    #[arg(long, global = true, default_value_t = 5000)]
    pings: usize,
    /// How often each fault of one wire happens; 0: only the fall of many at once (heal)
    #[arg(long, global = true, default_value_t = 30)]
    times: u16,
    /// Machine-readable output
    #[arg(long, global = true)]
    json: bool,
    /// Write the results to bench/results/<date>-<name>.json and .txt
    #[arg(long, global = true, value_name = "NAME", num_args = 0..=1, default_missing_value = "bench")]
    save: Option<String>,
    /// The commit that this program was built from, for the results; `cargo xtask bench` tells it
    #[arg(long, global = true, value_name = "ID")]
    commit: Option<String>,
    /// Prefix of the labs' names: runs beside each other need different ones
    #[arg(long, global = true, default_value = "bench", hide = true)]
    lab: String,
}

#[derive(Debug, Clone)]
struct Topologies(BTreeSet<Topology>);

fn topologies(text: &str) -> Result<Topologies, String> {
    let both = [Topology::Local, Topology::TwoNodes];
    let chosen = if text == "both" { both.into() } else { BTreeSet::from([text.parse()?]) };
    Ok(Topologies(chosen))
}

/// Runs a command; must be called before any thread of a runtime is started.
pub(crate) fn run(bench: Bench) -> Result<ExitCode> {
    let all = BTreeSet::from([Measure::Setup, Measure::Throughput, Measure::Latency]);
    let mut upstream = None;
    let measures = match bench.command {
        Some(Command::Client { connect_to, probes, common }) => {
            common::run(&common.clone(), "bench", "bench", async {
                let source = nsm_identity::Source::from_env().await.context("no identity")?;
                Ok(nsm_bench::client(ClientOptions { connect_to, probes }, source).await?)
            })?;
            return Ok(ExitCode::SUCCESS);
        }
        Some(Command::Interop { upstream: program }) => {
            upstream = Some(program);
            BTreeSet::new()
        }
        Some(Command::Setup) => BTreeSet::from([Measure::Setup]),
        Some(Command::Throughput) => BTreeSet::from([Measure::Throughput]),
        Some(Command::Latency) => BTreeSet::from([Measure::Latency]),
        Some(Command::Heal) => BTreeSet::from([Measure::Heal]),
        None => all,
    };
    if bench.amounts.save.is_some() && nsm_bench::is_debug() {
        bail!(
            "this is a debug build, its figures are no results; `cargo xtask bench` measures a release build"
        );
    }
    let exe = PathBuf::from("/proc/self/exe");
    if !nsm_lab::is_privileged() {
        return confined(&exe);
    }
    nsm_lab::settle_in()?;
    nsm_lab::run_in_memory()?;
    measure(bench.amounts, measures, upstream.as_deref(), &exe)
}

fn measure(
    amounts: Amounts,
    measures: BTreeSet<Measure>,
    upstream: Option<&Path>,
    exe: &Path,
) -> Result<ExitCode> {
    let options = Options {
        topologies: amounts.topology.0,
        measures,
        wires: amounts.wires.into(),
        clients: amounts.clients.into(),
        endpoints: amounts.endpoints.into(),
        concurrency: amounts.concurrency,
        pairs: amounts.pairs,
        duration: amounts.duration,
        pings: amounts.pings,
        times: amounts.times.into(),
        commit: amounts.commit,
        lab: amounts.lab,
        together: amounts.together,
    };
    // Results go to stdout, what is being done to stderr.
    let mut progress = |text: &str| {
        let _ = writeln!(io::stderr(), "{text}");
    };
    let (results, ended) = match upstream {
        Some(upstream) => (nsm_bench::beside_upstream(&options, exe, upstream, &mut progress)?, Ok(())),
        None => nsm_bench::run(&options, exe, &mut progress),
    };
    if results.rows.is_empty() {
        ended?;
        return Ok(ExitCode::SUCCESS);
    }
    let text = if amounts.json { results.json() } else { results.text(Format::text()) };
    io::stdout().lock().write_all(text.as_bytes()).context("write the results")?;
    ended.context("not everything was measured")?;
    if let Some(name) = amounts.save {
        let directory = PathBuf::from("bench/results");
        for path in results.save(&directory, &name)? {
            progress(&format!("written: {}", path.display()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// An ordinary user is root in namespaces of his own: the same command once more, in there.
fn confined(exe: &std::path::Path) -> Result<ExitCode> {
    let mut command = Program::new(exe);
    command.args(std::env::args_os().skip(1));
    nsm_lab::start_confined(&mut command);
    let status =
        command.status().context("no privileges, and none in a user namespace either: run it as root")?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}
