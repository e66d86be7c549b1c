//! Runs seeds, each in a process of its own, and tells what came of them.

use std::{
    io::{self, Write as _},
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use nsm_sim::Options;

/// Whole meshes in virtual time, from seeds
#[derive(Debug, Clone, Parser)]
#[command(name = "nsm-sim")]
struct Args {
    /// How many seeds to run
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first of them
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// One seed, in this process
    #[arg(long)]
    seed: Option<u64>,
    /// Write what happens to the standard error; RUST_LOG tells what the programs log beside it
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Nothing goes wrong
    #[arg(long)]
    calm: bool,
    /// How many seeds run at once; as many as there are processors unless told
    #[arg(long)]
    jobs: Option<usize>,
    /// Plant this bug and run seeds until it is found; each in turn if empty. With --seed: run that with the bug
    #[arg(long, value_name = "BUG")]
    planted: Option<String>,
}

/// How long a seed may take of our time.
const LONGEST: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(io::stderr(), "nsm-sim: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    match (args.seed, &args.planted) {
        (Some(seed), _) => one(seed, args),
        (None, None) => all(args),
        (None, Some(bug)) => find(bug, args),
    }
}

/// One seed, here.
fn one(seed: u64, args: &Args) -> Result<bool> {
    if args.trace {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(io::stderr).init();
    }
    if let Some(bug) = &args.planted {
        plant(bug)?;
    }
    let outcome = nsm_sim::run(seed, Options { calm: args.calm, trace: args.trace })?;
    writeln!(io::stdout(), "{outcome}")?;
    Ok(outcome.violations.is_empty())
}

#[cfg(feature = "planted")]
fn plant(bug: &str) -> Result<()> {
    nsm_api::planted::plant(bug).map_err(anyhow::Error::msg)
}

#[cfg(not(feature = "planted"))]
fn plant(bug: &str) -> Result<()> {
    bail!("{bug:?} cannot be planted: this was built without the feature `planted`")
}

/// What a process says of its seed.
struct Said {
    seed: u64,
    good: bool,
    text: String,
    simulated: Duration,
    certificates_expired: u64,
}

/// A seed in a process of its own: programs have global state, and some of it is in what happens.
struct Running {
    seed: u64,
    since: Instant,
    child: Child,
}

impl Running {
    fn start(seed: u64, args: &Args) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe().context("this program")?);
        command.args(["--seed", &seed.to_string()]).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.args(args.calm.then_some("--calm"));
        if let Some(bug) = &args.planted {
            command.args(["--planted", bug]);
        }
        let child = command.spawn().context("a process for a seed")?;
        Ok(Self { seed, since: Instant::now(), child })
    }

    fn is_over(&mut self) -> Result<bool> {
        Ok(self.child.try_wait().context("a seed")?.is_some() || self.since.elapsed() > LONGEST)
    }

    fn end(mut self) -> Result<Said> {
        let hangs = self.child.try_wait().context("a seed")?.is_none();
        if hangs {
            self.child.kill().context("end a seed")?;
        }
        let said = self.child.wait_with_output().context("a seed")?;
        let mut text = String::from_utf8_lossy(&said.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&said.stderr));
        if hangs {
            text.push_str("it does not end\n");
        }
        let number = |after: &str| -> u64 {
            let rest = text.split_once(after).and_then(|(_, rest)| rest.split_ascii_whitespace().next());
            rest.and_then(|number| number.parse().ok()).unwrap_or_default()
        };
        let simulated = Duration::from_millis(number("simulated "));
        let certificates_expired = number("certificates expired ");
        Ok(Said { seed: self.seed, good: said.status.success(), text, simulated, certificates_expired })
    }
}

/// Runs seeds until `enough` says so.
fn each(args: &Args, mut enough: impl FnMut(Said) -> Result<bool>) -> Result<()> {
    let jobs = args.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let mut seeds = args.from..args.from.saturating_add(args.seeds);
    let mut running: Vec<Running> = Vec::new();
    let mut stop = false;
    loop {
        while !stop && running.len() < jobs {
            let Some(seed) = seeds.next() else { break };
            running.push(Running::start(seed, args)?);
        }
        if running.is_empty() {
            return Ok(());
        }
        let mut at = 0;
        while at < running.len() {
            if running[at].is_over()? {
                let said = running.swap_remove(at).end()?;
                stop = stop || enough(said)?;
            } else {
                at += 1;
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn all(args: &Args) -> Result<bool> {
    let (begin, mut out) = (Instant::now(), io::stdout());
    let (mut failed, mut simulated) = (Vec::new(), Duration::ZERO);
    let (mut expired, mut with_expired) = (0, 0);
    each(args, |said| {
        simulated += said.simulated;
        expired += said.certificates_expired;
        with_expired += u64::from(said.certificates_expired > 0);
        if !said.good {
            failed.push(said.seed);
            let calm = if args.calm { " --calm" } else { "" };
            writeln!(out, "FAILED {}  again: cargo xtask sim --seed {}{calm} --trace", said.text, said.seed)?;
        }
        Ok(false)
    })?;
    failed.sort_unstable();
    let (hours, used) = (simulated.as_secs_f64() / 3600.0, used());
    writeln!(
        out,
        "{} seeds, {} failed {failed:?}; {hours:.1} mesh-hours in {:.1} CPU-seconds ({:.1} s): {:.1} mesh-hours per CPU-minute",
        args.seeds,
        failed.len(),
        used.as_secs_f64(),
        begin.elapsed().as_secs_f64(),
        hours / (used.as_secs_f64() / 60.0).max(1e-9),
    )?;
    writeln!(
        out,
        "{expired} certificates expired, in {with_expired} seeds, because no others were given out"
    )?;
    Ok(failed.is_empty())
}

/// Plants each bug and says by which seed and invariant it is found: one that holds without the bug.
fn find(bug: &str, args: &Args) -> Result<bool> {
    let mut out = io::stdout();
    let bugs: Vec<&str> = match bug {
        "" => nsm_api::planted::BUGS.to_vec(),
        bug => vec![bug],
    };
    let mut all = true;
    for bug in bugs {
        let mut found = None;
        let planted = Args { planted: Some(bug.to_owned()), ..args.clone() };
        let healthy = Args { planted: None, ..args.clone() };
        each(&planted, |said| {
            if said.text.starts_with("nsm-sim: ") {
                bail!("{}", said.text);
            }
            if found.is_none() && !said.good && Running::start(said.seed, &healthy)?.wait()?.good {
                found = Some(said);
            }
            Ok(found.is_some())
        })?;
        match found {
            Some(said) => write!(out, "{bug}: found\n  {}", said.text)?,
            None => {
                writeln!(out, "{bug}: NOT FOUND by {} seeds from {}", args.seeds, args.from)?;
                all = false;
            }
        }
    }
    Ok(all)
}

impl Running {
    fn wait(mut self) -> Result<Said> {
        while !self.is_over()? {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.end()
    }
}

/// The processor time of the seeds so far.
fn used() -> Duration {
    // Fields 16 and 17 of proc_pid_stat(5), in ticks; the name before may hold blanks.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    let ticks =
        fields.split_ascii_whitespace().skip(13).take(2).filter_map(|field| field.parse::<u64>().ok());
    Duration::from_secs_f64(ticks.sum::<u64>() as f64 / rustix::param::clock_ticks_per_second() as f64)
}
