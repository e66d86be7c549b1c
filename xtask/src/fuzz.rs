//! `cargo xtask fuzz`: libFuzzer on every decoder for a while, with stable Rust and nothing to install.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{cargo, root};

/// What tells libFuzzer where a program has been (`clang`'s `-fsanitize=fuzzer`, without its runtime), as rustc is asked
/// for it. Not the sanitizers: they need an unstable compiler, and there is little `unsafe` in what decodes.
const INSTRUMENTED: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares -Cllvm-args=-simplifycfg-branch-fold-threshold=0 -Ccodegen-units=1";

/// So many inputs at most, which a busy machine gets done too: or time would decide what is tried.
const SAME: &str = "-runs=100000";
/// Those that read YAML or Rego in several ways get fewer.
const SLOW: [&str; 4] = ["files", "kubernetes", "rego", "settings"];
const SAME_SLOW: &str = "-runs=25000";

/// Fuzz every decoder of what others send, for a while each
#[derive(clap::Args)]
pub(crate) struct Fuzz {
    /// How long each is fuzzed
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Begin with the corpora of the tree alone, and with the same chance each time: what is found here is found
    /// everywhere, and by nobody before something changes
    #[arg(long)]
    same: bool,
    /// Only these; see fuzz/fuzz_targets
    targets: Vec<String>,
}

impl Fuzz {
    pub(crate) fn run(&self) -> Result<()> {
        let known = targets()?;
        if let Some(unknown) = self.targets.iter().find(|target| !known.contains(target)) {
            bail!("no target {unknown:?} (targets: {})", known.join(", "));
        }
        let built = directory();
        let programs = build(&built)?;
        let found = built.join("corpus");
        let mut failed = Vec::new();
        for target in if self.targets.is_empty() { &known } else { &self.targets } {
            if !self.one(target, &programs.join(target), &built, &found.join(target))? {
                failed.push(target.as_str());
            }
        }
        if !failed.is_empty() {
            bail!(
                "{} failed; what is mended stays found by an input in fuzz/corpus/<target>/",
                failed.join(", ")
            );
        }
        Ok(())
    }

    /// Whether it found nothing. What is new to it is kept beside what is built: the next run goes on from there.
    fn one(&self, target: &str, program: &Path, built: &Path, found: &Path) -> Result<bool> {
        let log = built.join(format!("{target}.log"));
        let output = fs::File::create(&log).with_context(|| log.display().to_string())?;
        let mut artifacts: OsString = "-artifact_prefix=".into();
        artifacts.push(built.join(format!("{target}-")));
        let mut command = Command::new(program);
        command.arg(format!("-max_total_time={}", self.seconds)).args(["-rss_limit_mb=1024", "-timeout=10"]);
        command.args(["-max_len=8192", "-print_final_stats=1"]).arg(artifacts);
        // libFuzzer writes what is new to the first of its directories.
        let mut found = found.to_owned();
        if self.same {
            command.args(["-seed=1", if SLOW.contains(&target) { SAME_SLOW } else { SAME }]);
            found.set_file_name(format!("{target}.same"));
            let _ = fs::remove_dir_all(&found);
        }
        fs::create_dir_all(&found).with_context(|| found.display().to_string())?;
        command.arg(found).arg(root().join("fuzz/corpus").join(target));
        let began = Instant::now();
        let status = command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).status();
        let good = status.with_context(|| format!("start the fuzzer of {target}"))?.success();
        let text = String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
        let executed = text.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
        let (executed, took) = (executed.map_or("?", str::trim), began.elapsed().as_secs_f64());
        let verdict = if good { " ok " } else { "FAILED" };
        let mut out = io::stdout().lock();
        writeln!(out, "{verdict:<6} {target:<18} {executed:>10} inputs in {took:.0} s").context("write")?;
        if !good {
            // Where it panicked, which stands far before the end, and what libFuzzer says of the input there.
            let panicked = text.lines().skip_while(|line| !line.contains("panicked at"));
            let frame = |line: &&str| !line.trim_start().starts_with("at /rustc/");
            let tail: Vec<_> = text.lines().rev().take(12).collect();
            for line in panicked.filter(frame).take(20).chain(["[...]"]).chain(tail.into_iter().rev()) {
                let line: String = line.chars().take(200).collect();
                writeln!(out, "    {line}").context("write")?;
            }
        }
        Ok(good)
    }
}

/// Where the fuzzers are then.
fn build(built: &Path) -> Result<PathBuf> {
    let host = host()?;
    let mut command = cargo(&["build", "--quiet", "--locked", "--manifest-path", "fuzz/Cargo.toml"]);
    // With a target named, what runs while it is built is not instrumented.
    command.args(["--target", &host, "--target-dir"]).arg(built).env("RUSTFLAGS", INSTRUMENTED);
    let status = command.status().context("start cargo")?;
    if !status.success() {
        bail!("the fuzzers could not be built");
    }
    Ok(built.join(host).join("debug"))
}

fn host() -> Result<String> {
    let said = Command::new("rustc").arg("-vV").output().context("start rustc")?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let host = said.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc does not say what it runs on")
}

/// The names of all fuzzers.
fn targets() -> Result<Vec<String>> {
    let directory = root().join("fuzz/fuzz_targets");
    let entries = fs::read_dir(&directory).with_context(|| directory.display().to_string())?;
    let paths = entries.flatten().map(|entry| entry.path());
    let mut names: Vec<_> = paths.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    Ok(names)
}

/// Beside what else is built, and not among it: all of it is compiled in another way.
fn directory() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from).join("fuzz")
}
