//! `nsm lab`: a mesh on one machine, as commands.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use nsm_lab::leaks::{self, Snapshot};
use nsm_lab::{Chaos, Format, Front, Hold};

/// A mesh on one machine: nodes and pods as network namespaces, the real programs in them.
///
/// A scenario file says what exists and what must hold; `scenarios/` of the source has examples. Every node and pod is
/// a named namespace `<lab>.<name>`, so `ip netns exec`, ping, curl and tcpdump work as usual. Works as root, and as
/// an ordinary user where the kernel allows user namespaces.
#[derive(Debug, Args)]
pub(crate) struct Lab {
    #[command(subcommand)]
    command: Command,
    /// Machine-readable output.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print what `up` would make, and make nothing.
    Plan {
        /// The scenario file.
        file: PathBuf,
        #[command(flatten)]
        name: Name,
    },
    /// Build a lab and leave it running.
    Up {
        /// The scenario file.
        file: PathBuf,
        #[command(flatten)]
        name: Name,
    },
    /// Build labs one after the other, check what they expect, take them down; status 0 if everything held.
    Run {
        /// The scenario files.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Leave the lab running after the checks.
        #[arg(long)]
        keep: bool,
        #[command(flatten)]
        name: Name,
    },
    /// Build a lab, break things in it round after round, and see that it mends itself each time; then take it down.
    Chaos {
        /// The scenario file.
        file: PathBuf,
        /// What is broken is drawn from this number; without it, from the clock.
        #[arg(long)]
        seed: Option<u64>,
        /// How many rounds; ten if it is not told how long either.
        #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
        rounds: Option<u64>,
        /// No round begins after so many minutes.
        #[arg(long)]
        minutes: Option<f64>,
        /// The first round: to do again what failed.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
        from: u64,
        /// How long the mesh may take to mend itself after a round.
        #[arg(long, default_value = "30s", value_parser = crate::common::duration)]
        within: Duration,
        /// Print what would be broken, and make nothing.
        #[arg(long)]
        plan: bool,
        #[command(flatten)]
        name: Name,
    },
    /// Show the namespaces and processes of labs.
    Status {
        /// Only this lab.
        lab: Option<String>,
    },
    /// Run a command in a pod or node: `nsm lab exec client -- ping 172.16.1.2`.
    Exec {
        /// The pod's or node's name, with its lab's if there are several: `secure-intranet.client`.
        pod: String,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// End a lab and remove everything of it, also what a killed one left.
    Down {
        /// The lab's name; not needed if there is only one.
        lab: Option<String>,
    },
    /// Print what is in the kernel now, as JSON.
    #[command(hide = true)]
    Snapshot,
    /// Print what the second snapshot has more or less than the first; status 1 if there is anything.
    #[command(hide = true)]
    Compare {
        /// Taken before.
        before: PathBuf,
        /// Taken after.
        after: PathBuf,
    },
    /// Hold a lab (started by `up` and `run`).
    #[command(hide = true)]
    Hold {
        /// The scenario file.
        file: PathBuf,
        #[command(flatten)]
        name: Name,
        /// Check what the file expects.
        #[arg(long)]
        expect: bool,
        /// Stay up afterwards.
        #[arg(long)]
        stay: bool,
        /// Break things instead: as JSON.
        #[arg(long, value_parser = chaos)]
        chaos: Option<Chaos>,
    },
}

#[derive(Debug, Args)]
struct Name {
    /// Another name for the lab than the file's.
    #[arg(long)]
    name: Option<String>,
}

/// Runs a command; must be called before any thread of a runtime is started.
pub(crate) fn run(lab: Lab) -> anyhow::Result<ExitCode> {
    let exe = PathBuf::from("/proc/self/exe");
    let format = if lab.json { Format::Json } else { Format::text() };
    let front =
        |name: Option<Name>| Front { exe: exe.clone(), name: name.and_then(|name| name.name), format };
    let mut out = io::stdout().lock();
    let good = match lab.command {
        Command::Plan { file, name } => {
            let plan = front(Some(name)).plan(&file)?;
            write!(out, "{plan}").context("write the plan")?;
            true
        }
        Command::Up { file, name } => front(Some(name)).up(&file, &mut out)?,
        Command::Run { files, keep, name } => front(Some(name)).run(&files, keep, &mut out)?,
        Command::Chaos { file, seed, rounds, minutes, from, within, plan, name } => {
            let lasts = minutes.map(|minutes| Duration::try_from_secs_f64(minutes * 60.0)).transpose();
            let lasts = lasts.context("--minutes: expected a number of minutes, 0 or more")?;
            let rounds = rounds.unwrap_or(if lasts.is_some() && !plan { u64::MAX } else { 10 });
            let chaos = Chaos { seed: seed.unwrap_or_else(by_the_clock), from, rounds, lasts, within };
            let front = front(Some(name));
            match plan {
                true => {
                    let lines = front.plan_chaos(&file, &chaos)?;
                    writeln!(out, "seed {}", chaos.seed).context("write the plan")?;
                    lines.iter().try_for_each(|line| writeln!(out, "{line}")).context("write the plan")?;
                    true
                }
                false => front.chaos(&file, &chaos, &mut out)?,
            }
        }
        Command::Status { lab } => front(None).status(lab.as_deref(), &mut out)?,
        Command::Exec { pod, command } => {
            let status = front(None).exec(&pod, &command)?;
            return Ok(ExitCode::from(u8::try_from(status).unwrap_or(1)));
        }
        Command::Down { lab } => front(None).down(lab.as_deref(), &mut out)?,
        Command::Snapshot => {
            serde_json::to_writer_pretty(&mut out, &Snapshot::take()?)?;
            writeln!(out)?;
            true
        }
        Command::Compare { before, after } => {
            let differences = leaks::compare(&Snapshot::load(&before)?, &Snapshot::load(&after)?);
            differences.iter().try_for_each(|line| writeln!(out, "{line}"))?;
            differences.is_empty()
        }
        Command::Hold { file, name, expect, stay, chaos } => {
            // The holder speaks through this stdout itself.
            drop(out);
            nsm_lab::hold(&Hold { file, name: name.name, expect, stay, chaos }, &exe)?
        }
    };
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn chaos(json: &str) -> Result<Chaos, String> {
    serde_json::from_str(json).map_err(|error| error.to_string())
}

/// Small enough to be told to somebody.
fn by_the_clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64 % 1_000_000)
}
