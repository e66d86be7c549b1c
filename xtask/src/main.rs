//! The project's own commands: `cargo xtask demo`, `cargo xtask test`, `cargo xtask bench`, `cargo xtask image`.
//!
//! Small on purpose: it is built before anything else, and everything that knows the mesh is in `nsm` itself.

mod fuzz;
mod image;

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;

/// Set for tests, so that leak snapshots recognise every process that a test started (`nsm_lab::leaks::MARK`).
const MARK: (&str, &str) = ("NSM_TEST_RUN", "1");

/// Programs with the Debian packages they are in.
const PACKAGES: [(&str, &str); 4] = [
    // A compiler for the C and assembler parts of the crypto library; Rust's own linker driver is the same program.
    ("cc", "build-essential"),
    // Tests read the kernel back with the system's own programs, so that ours is not judge in its own cause.
    ("ip", "iproute2"),
    ("nft", "nftables"),
    // Shows that a restarted forwarder writes nothing.
    ("strace", "strace"),
];

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Build nsm and run the secure-intranet chain on this machine
    Demo {
        /// Further arguments of `nsm lab run`, for example --keep
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Format, lints, all tests including those on the real kernel, doc tests
    Test {
        /// Also the slow tests that are ignored otherwise
        #[arg(long)]
        all: bool,
    },
    /// Install the system packages that the others need, or say what to type
    Packages,
    /// The Kubernetes that tests run (tests/kube/)
    #[command(subcommand)]
    Kube(Kube),
    /// Write container images: nsm.tar for `docker load` and `ctr images import`, and an OCI layout
    Image(image::Image),
    /// Write deploy/ anew: the kustomize base and the Helm chart that `nsm install` makes
    Deploy,
    /// Run whole meshes in virtual time, from seeds: arguments are those of `nsm-sim`
    Sim {
        /// Plant each bug, or that of this name, and run seeds until it is found
        #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "", value_name = "BUG")]
        planted: Option<String>,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    Fuzz(fuzz::Fuzz),
    /// Run threads that share memory in every order of what they do; LOOM_MAX_PREEMPTIONS=N: with more interruptions
    Loom,
    /// Build nsm and measure: arguments are those of `nsm bench`
    Bench {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

#[derive(clap::Subcommand)]
enum Kube {
    /// Build it, and install the system packages that its nodes need; the first time takes some ten minutes
    Build,
    /// Run a cluster until the end of the input (Ctrl-D) or Ctrl-C, and say how to reach it
    Up {
        /// How many nodes
        #[arg(long, default_value_t = 2)]
        nodes: u32,
    },
    /// End what is left of clusters whose owners were killed
    Down,
    /// Whether it is built, and where
    Status,
}

fn main() -> ExitCode {
    let done = match Task::parse() {
        Task::Demo { args } => demo(&args),
        Task::Test { all } => test(all),
        Task::Packages => install(&PACKAGES),
        Task::Kube(what) => kube(&what),
        Task::Image(image) => image.make(),
        Task::Deploy => deploy(),
        Task::Sim { planted, args } => sim(planted.as_deref(), &args),
        Task::Fuzz(fuzz) => fuzz.run(),
        Task::Loom => every_order(),
        Task::Bench { args } => bench(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(args: &[String]) -> Result<()> {
    install(&PACKAGES[..1])?;
    let scenario = root().join("scenarios/secure-intranet.yaml");
    nsm(&["lab", "run", &scenario.to_string_lossy()], args)
}

/// Results tell of which commit they are: of the tree that is built now.
fn bench(args: &[String]) -> Result<()> {
    let describe = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"];
    let commit = Command::new("git").args(describe).current_dir(root()).output();
    // A tree without its history is measured all the same.
    let commit = commit.ok().filter(|said| said.status.success()).map(|said| said.stdout);
    let commit = commit.map(|id| String::from_utf8_lossy(&id).trim().to_owned());
    let told: Vec<_> = commit.iter().flat_map(|id| ["--commit", id]).collect();
    let mut args = args.to_vec();
    if args.iter().any(|arg| arg == "interop") && !args.iter().any(|arg| arg.starts_with("--upstream")) {
        let upstream = nsm_upstream::build()?;
        args.extend(["--upstream".to_owned(), upstream.to_string_lossy().into_owned()]);
    }
    nsm(&[&["bench"], &told[..]].concat(), &args)
}

/// Bugs are compiled in only where one is to be planted.
fn sim(planted: Option<&str>, args: &[String]) -> Result<()> {
    let mut command = cargo(&["run", "--quiet", "--profile", "sim", "--package", "nsm-sim"]);
    if planted.is_some() {
        command.args(["--features", "planted"]);
    }
    command.arg("--");
    if let Some(bug) = planted {
        command.args(["--planted", bug]);
    }
    let status = command.args(args).status().context("start cargo")?;
    if !status.success() {
        bail!("the simulation ended with {status}");
    }
    Ok(())
}

/// A feature, and no `--cfg` for all: so of what is built already only the crate itself is built anew.
fn every_order() -> Result<()> {
    let tests = ["test", "--package", "nsm-kernel", "--lib", "--features", "nsm-kernel/loom", "orders::"];
    let status = cargo(&tests).status().context("start cargo")?;
    if !status.success() {
        bail!("in some order of their steps threads do not do what they should");
    }
    Ok(())
}

fn deploy() -> Result<()> {
    for (format, directory) in [("kustomize", "deploy/kustomize"), ("helm", "deploy/helm/nsm")] {
        let directory = root().join(directory);
        if directory.exists() {
            fs::remove_dir_all(&directory).with_context(|| directory.display().to_string())?;
        }
        let mut run =
            cargo(&["run", "--quiet", "--package", "nsm", "--", "install", "--format", format, "--output"]);
        let status = run.arg(&directory).status().context("start cargo")?;
        if !status.success() {
            bail!("nsm install --format {format} ended with {status}");
        }
    }
    Ok(())
}

fn kube(what: &Kube) -> Result<()> {
    let mut out = io::stdout();
    let say = |out: &mut io::Stdout, text: &str| writeln!(out, "{text}").context("write");
    match what {
        Kube::Build => {
            let program = nsm_cluster::build()?;
            // Last: an API server alone needs none of them.
            install(&nsm_cluster::PACKAGES)?;
            say(&mut out, &program.display().to_string())
        }
        Kube::Status => say(&mut out, &nsm_cluster::program()?.display().to_string()),
        Kube::Down => say(&mut out, nsm_cluster::clean(nsm_cluster::program()?)?.trim_end()),
        Kube::Up { nodes } => {
            install(&nsm_cluster::PACKAGES)?;
            let program = nsm_cluster::build()?;
            let cluster = nsm_cluster::Cluster::start(&program, *nodes)?;
            let kubeconfig = cluster.kubeconfig();
            say(&mut out, &format!("export KUBECONFIG={}", kubeconfig.display()))?;
            say(&mut out, &format!("alias kubectl='{} kubectl'", program.display()))?;
            // Ctrl-C ends this process, and with it the cluster.
            io::copy(&mut io::stdin(), &mut io::sink()).context("read").map(drop)
        }
    }
}

fn test(all: bool) -> Result<()> {
    install(&PACKAGES)?;
    let mut stages = Stages::default();
    stages.run("format", cargo(&["fmt", "--all", "--check"]))?;
    let clippy = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
    stages.run("lints", cargo(&clippy))?;
    // Without Go, the tests that need it say so themselves.
    stages.built("upstream", || match nsm_upstream::build() {
        Ok(_) | Err(nsm_upstream::Error::NoGo) => Ok(()),
        Err(error) => Err(error.into()),
    });
    if all {
        stages.built("kubernetes", || {
            nsm_cluster::build()?;
            install(&nsm_cluster::PACKAGES)
        });
    }
    stages.run("build", cargo(&["test", "--workspace", "--no-run", "--quiet"]))?;
    let ignored: &[&str] = if all { &["--include-ignored"] } else { &[] };
    // Doc tests in the same call: a call of their own selects other features, and builds half of it again.
    let tests = ["test", "--workspace", "--no-fail-fast", "--", "--show-output"];
    stages.run_tests("tests", cargo(&[&tests, ignored].concat()))?;
    stages.report()
}

/// Builds `nsm` for real and runs it; its exit status is ours.
fn nsm(command: &[&str], args: &[String]) -> Result<()> {
    let mut cargo = cargo(&["run", "--release", "--package", "nsm", "--"]);
    let status = cargo.args(command).args(args).status().context("start cargo")?;
    if !status.success() {
        bail!("nsm {} ended with {status}", command.join(" "));
    }
    Ok(())
}

/// Installs what is missing of `(program, Debian package)`, as root; otherwise says what to type, and stops.
fn install(needed: &[(&str, &'static str)]) -> Result<()> {
    let packages = missing(needed);
    if packages.is_empty() {
        return Ok(());
    }
    let line = format!("apt-get install --yes --no-install-recommends {}", packages.join(" "));
    if fs::metadata("/proc/self").context("who runs this")?.uid() != 0 {
        bail!("system packages are missing; install them with\n\n    sudo {line}\n");
    }
    eprintln!("xtask: installing {} ({line})", packages.join(", "));
    let apt = |args: &str| {
        let mut command = Command::new("apt-get");
        command.args(args.split(' ').skip(1)).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
        command.stdout(Stdio::null()).status().context("start apt-get: is this Debian or Ubuntu?")
    };
    // A fresh machine has no list of packages yet.
    if !(apt(&line)?.success() || apt("apt-get update")?.success() && apt(&line)?.success()) {
        bail!("apt-get could not install {}", packages.join(", "));
    }
    match missing(needed)[..] {
        [] => Ok(()),
        ref packages => bail!(
            "apt-get says that {} is installed, but its program is neither in PATH nor in /usr/sbin; try\n\n    \
             apt-get install --reinstall {0}\n",
            packages.join(" ")
        ),
    }
}

/// The packages whose programs are not here.
fn missing(needed: &[(&str, &'static str)]) -> Vec<&'static str> {
    needed.iter().filter(|(program, _)| !exists(program)).map(|(_, package)| *package).collect()
}

fn exists(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(system).any(|directory| directory.join(program).is_file())
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root()).env(MARK.0, MARK.1).stdin(Stdio::null());
    // Those that `cargo run` set for us are not for the crates that we build.
    for (key, _) in env::vars_os() {
        if key.to_string_lossy().starts_with("CARGO_PKG_") || key == "CARGO_MANIFEST_DIR" {
            command.env_remove(key);
        }
    }
    command
}

/// What was run, how long it took, how it went, and which tests said that they cannot run here.
#[derive(Default)]
struct Stages {
    done: Vec<(&'static str, Duration, bool)>,
    skipped: BTreeMap<String, String>,
}

impl Stages {
    /// Runs a stage; the next ones run also if it fails, so that one run shows everything.
    fn run(&mut self, name: &'static str, mut command: Command) -> Result<()> {
        eprintln!("== {name}");
        let began = Instant::now();
        let status = command.status().with_context(|| format!("start {command:?}"))?;
        self.done.push((name, began.elapsed(), status.success()));
        Ok(())
    }

    /// Builds a program before the tests that need it, so that none of them waits for it.
    fn built(&mut self, name: &'static str, build: impl FnOnce() -> Result<()>) {
        eprintln!("== {name}");
        let began = Instant::now();
        let built = build().inspect_err(|error| eprintln!("{error:#}")).is_ok();
        self.done.push((name, began.elapsed(), built));
    }

    /// Runs tests, passing on what is worth reading and collecting the `SKIPPED test: why` lines.
    fn run_tests(&mut self, name: &'static str, mut command: Command) -> Result<()> {
        eprintln!("== {name}");
        let began = Instant::now();
        let mut child =
            command.stdout(Stdio::piped()).spawn().with_context(|| format!("start {command:?}"))?;
        // The output of tests that passed, which is asked for only to find the skipped ones.
        let mut passed = false;
        let mut out = io::stdout().lock();
        for line in child.stdout.take().into_iter().flat_map(|stdout| BufReader::new(stdout).lines()) {
            let line = line.context("read the output of the tests")?;
            if let Some((test, why)) = line.strip_prefix("SKIPPED ").and_then(|rest| rest.split_once(": ")) {
                self.skipped.insert(test.to_owned(), why.to_owned());
            }
            match line.as_str() {
                "successes:" => passed = true,
                "failures:" => passed = false,
                line if line.starts_with("test result:") => passed = false,
                _ => {}
            }
            if !passed && !line.is_empty() {
                writeln!(out, "{line}").context("write")?;
            }
        }
        let status = child.wait().context("wait for the tests")?;
        self.done.push((name, began.elapsed(), status.success()));
        Ok(())
    }

    fn report(self) -> Result<()> {
        if !self.skipped.is_empty() {
            eprintln!("\ncould not run on this machine:");
            for (test, why) in &self.skipped {
                eprintln!("  {test}: {why}");
            }
        }
        eprintln!("\n{:<12} {:>8}", "stage", "minutes");
        for (name, time, good) in &self.done {
            let mark = if *good { "" } else { "  FAILED" };
            eprintln!("{name:<12} {:>8.2}{mark}", time.as_secs_f64() / 60.0);
        }
        let failed: Vec<_> = self.done.iter().filter(|(_, _, good)| !good).map(|(name, ..)| *name).collect();
        if !failed.is_empty() {
            bail!("failed: {}", failed.join(", "));
        }
        Ok(())
    }
}
