//! `nsm lab`: a mesh on one machine, as commands.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use nsm_lab::leaks::{self, Snapshot};
use nsm_lab::{Format, Front, Hold};

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
        Command::Hold { file, name, expect, stay } => {
            // The holder speaks through this stdout itself.
            drop(out);
            nsm_lab::hold(&Hold { file, name: name.name, expect, stay }, &exe)?
        }
    };
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
