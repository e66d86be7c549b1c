//! Figures as data, and how they are told: a table for people, JSON for machines, files for later.

use std::fmt::{self, Write as _};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nsm_lab::Format;
use nsm_lab::report::{plain_table, render};
use serde::Serialize;

use crate::{Error, Options, Topology};

/// All of one run.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Results {
    /// Where it ran.
    pub machine: Machine,
    /// How much was measured.
    pub amounts: Amounts,
    /// The figures.
    pub rows: Vec<Row>,
}

/// What figures depend on besides the program.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Machine {
    /// When the run began (RFC 3339).
    pub date: String,
    /// Processors that this process may use.
    pub cores: usize,
    /// Their kind, from `/proc/cpuinfo`.
    pub cpu: String,
    /// All of its memory, in MiB.
    pub memory_mib: u64,
    /// Kernel release.
    pub kernel: String,
    /// Load of the last minute when the run began: work of others that the figures contain.
    pub load: String,
    /// `release` or `debug`.
    pub build: &'static str,
    /// Version of `nsm`.
    pub version: &'static str,
    /// The commit that it was built from, as whoever built it says; `-dirty`: and from changes to that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
}

/// How much was measured.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Amounts {
    /// Wires of a set-up row.
    pub wires: usize,
    /// Pairs of a comparison.
    pub pairs: usize,
    /// Milliseconds of one measurement of throughput.
    pub throughput_millis: u128,
    /// Pings of one measurement of latency.
    pub pings: usize,
    /// How often each fault happened.
    pub times: usize,
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    /// Where client and endpoint are.
    pub topology: Topology,
    /// Stable, for machines: `setup.16`.
    pub id: String,
    /// For people.
    pub what: String,
    /// What was measured.
    pub value: Value,
    /// What it should be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// More about it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// What is to be reached.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Target {
    /// In words.
    pub wanted: String,
    /// Whether it is reached.
    pub reached: bool,
}

/// A figure.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Value {
    /// Many measurements of the same time.
    Times(Times),
    /// One number.
    #[serde(rename_all = "camelCase")]
    Number {
        /// The number.
        value: f64,
        /// Its unit; empty for counts.
        unit: &'static str,
    },
    /// A wire beside a bare device, measured in turns; or, for control, another bare device.
    #[serde(rename_all = "camelCase")]
    Beside {
        /// What stands beside the bare device.
        what: &'static str,
        /// Each measurement of it.
        measured: Vec<f64>,
        /// The measurement of the bare device that belongs to it.
        bare: Vec<f64>,
        /// Unit of both.
        unit: &'static str,
        /// Median of the quotients measured ÷ bare.
        ratio: f64,
        /// Smallest and largest quotient.
        spread: (f64, f64),
    },
    /// Memory of a process, in KiB.
    #[serde(rename_all = "camelCase")]
    Memory {
        /// Resident before the first wire.
        idle: u64,
        /// Of that not backed by files: heap and stacks; the rest is mostly the program itself, which all share.
        idle_own: u64,
        /// Resident with all wires.
        loaded: u64,
        /// Difference for each wire.
        per_wire: f64,
    },
    /// Something that was not measured here.
    Quoted(&'static str),
}

/// The distribution of a time, in microseconds.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Times {
    /// How many measurements.
    pub count: usize,
    /// The median.
    pub p50: f64,
    /// Nine of ten are not above it.
    pub p90: f64,
    /// 99 of 100 are not above it.
    pub p99: f64,
    /// The longest.
    pub max: f64,
    /// The average.
    pub mean: f64,
}

// === impl Times ===

impl Times {
    /// Of measurements, in any order; all zero if there are none.
    #[must_use]
    pub fn of(times: impl IntoIterator<Item = Duration>) -> Self {
        let mut micros: Vec<f64> = times.into_iter().map(|time| time.as_secs_f64() * 1e6).collect();
        micros.sort_by(f64::total_cmp);
        // Nearest rank: a value that was measured.
        let rank = |part: f64| {
            let rank = (part * micros.len() as f64).ceil() as usize;
            micros.get(rank.saturating_sub(1)).copied().unwrap_or_default()
        };
        Self {
            count: micros.len(),
            p50: rank(0.5),
            p90: rank(0.9),
            p99: rank(0.99),
            max: rank(1.0),
            mean: micros.iter().sum::<f64>() / micros.len().max(1) as f64,
        }
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scale, unit) = if self.p50 < 1000.0 { (1.0, "µs") } else { (1e-3, "ms") };
        let [p50, p90, p99, max] = [self.p50, self.p90, self.p99, self.max].map(|micros| micros * scale);
        write!(f, "p50 {p50:.1}  p90 {p90:.1}  p99 {p99:.1}  max {max:.1} {unit}")
    }
}

// === impl Value ===

impl Value {
    pub(crate) fn count(number: usize) -> Self {
        Self::Number { value: number as f64, unit: "" }
    }

    /// Compares what was measured in turns; the lists are of the same length.
    pub(crate) fn beside(what: &'static str, measured: Vec<f64>, bare: Vec<f64>, unit: &'static str) -> Self {
        let mut quotients: Vec<f64> = measured.iter().zip(&bare).map(|(one, bare)| one / bare).collect();
        quotients.sort_by(f64::total_cmp);
        let at = |index: usize| quotients.get(index).copied().unwrap_or(f64::NAN);
        let spread = (at(0), at(quotients.len().saturating_sub(1)));
        Self::Beside { what, measured, bare, unit, ratio: median(&quotients), spread }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |kib: u64| kib as f64 / 1024.0;
        match self {
            Self::Times(times) => times.fmt(f),
            Self::Number { value, unit: "" } => write!(f, "{value:.0}"),
            Self::Number { value, unit } => write!(f, "{value:.1} {unit}"),
            Self::Beside { what, measured, bare, unit, ratio, spread: (least, most) } => {
                let (measured, bare) = (median(measured), median(bare));
                write!(f, "{ratio:.3} ({least:.3}–{most:.3})  {what} {measured:.2}, bare {bare:.2} {unit}",)
            }
            Self::Memory { idle, idle_own, loaded, per_wire } => write!(
                f,
                "idle {:.1} MiB (own {:.1})  with wires {:.1} MiB, {per_wire:.1} KiB a wire",
                mib(*idle),
                mib(*idle_own),
                mib(*loaded)
            ),
            Self::Quoted(text) => f.write_str(text),
        }
    }
}

// === impl Target ===

impl Target {
    /// p50 and p99, in milliseconds.
    pub(crate) fn times(times: &Times, p50: u32, p99: u32) -> Self {
        let reached = times.p50 <= f64::from(p50) * 1e3 && times.p99 <= f64::from(p99) * 1e3;
        Self { wanted: format!("p50 ≤ {p50}, p99 ≤ {p99} ms"), reached }
    }

    pub(crate) fn at_least(value: f64, wanted: f64, unit: &str) -> Self {
        Self { wanted: format!("≥ {wanted}{unit}"), reached: value >= wanted }
    }

    pub(crate) fn at_most(value: f64, wanted: f64, unit: &str) -> Self {
        Self { wanted: format!("≤ {wanted}{unit}"), reached: value <= wanted }
    }

    pub(crate) fn none_of(count: usize) -> Self {
        Self { wanted: "0".into(), reached: count == 0 }
    }
}

// === impl Row ===

impl Row {
    pub(crate) fn new(
        topology: Topology,
        id: impl Into<String>,
        what: impl Into<String>,
        value: Value,
    ) -> Self {
        Self { topology, id: id.into(), what: what.into(), value, target: None, note: String::new() }
    }

    pub(crate) fn target(mut self, target: Target) -> Self {
        self.target = Some(target);
        self
    }

    pub(crate) fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }
}

// === impl Results ===

impl Results {
    pub(crate) fn of_this_machine(options: &Options) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: String, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_once(':').map_or("", |(_, value)| value.trim()).to_owned()
        };
        let memory = field(read("/proc/meminfo"), "MemTotal");
        Self {
            machine: Machine {
                date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
                cores: std::thread::available_parallelism().map_or(1, usize::from),
                cpu: field(read("/proc/cpuinfo"), "model name"),
                memory_mib: memory.split(' ').next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0)
                    / 1024,
                kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
                load: read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned(),
                build: if is_debug() { "debug" } else { "release" },
                version: env!("CARGO_PKG_VERSION"),
                commit: options.commit.clone(),
            },
            amounts: Amounts {
                wires: options.wires,
                pairs: options.pairs,
                throughput_millis: options.duration.as_millis(),
                pings: options.pings,
                times: options.times,
            },
            rows: Vec::new(),
        }
    }

    /// The row with that id.
    #[must_use]
    pub fn row(&self, topology: Topology, id: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.topology == topology && row.id == id)
    }

    /// Everything, for people.
    #[must_use]
    pub fn text(&self, format: Format) -> String {
        let Machine { date, cores, cpu, memory_mib, kernel, load, build, version, commit } = &self.machine;
        let commit = commit.as_ref().map(|id| format!(" of {id}")).unwrap_or_default();
        let mut text = format!(
            "nsm {version} ({build} build{commit}) on {cores} × {cpu}, {memory_mib} MiB, Linux {kernel}\n\
             {date}, load {load} at the beginning\n\n"
        );
        let mut table = plain_table(["", "where", "what", "measured", "target"]);
        let mut notes = String::new();
        for row in &self.rows {
            let mark = match &row.target {
                Some(target) if target.reached => "ok",
                Some(_) => "MISSED",
                None => "",
            };
            let wanted = row.target.as_ref().map_or("", |target| &target.wanted);
            table.add_row([mark, &row.topology.to_string(), &row.what, &row.value.to_string(), wanted]);
            if !row.note.is_empty() {
                let _ = writeln!(notes, "  {}, {}: {}", row.topology, row.what, row.note);
            }
        }
        text += &render(&table, format);
        if !notes.is_empty() {
            let _ = write!(text, "\n\nnotes\n{}", notes.trim_end());
        }
        if is_debug() {
            text += "\n\n";
            text += &format.bad("This is a debug build: these are not results.");
        }
        text + "\n"
    }

    /// Everything, for machines.
    #[must_use]
    pub fn json(&self) -> String {
        // These types always serialise.
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// Writes both forms as `<directory>/<date>-<name>.json` and `.txt`.
    ///
    /// # Errors
    ///
    /// A directory that cannot be made or written.
    pub fn save(&self, directory: &Path, name: &str) -> Result<[PathBuf; 2], Error> {
        let failed = || Error::system(format!("write results to {}", directory.display()));
        fs::create_dir_all(directory).map_err(failed())?;
        let date = self.machine.date.split('T').next().unwrap_or_default();
        let path = |ending: &str| directory.join(format!("{date}-{name}.{ending}"));
        let (json, text) = (path("json"), path("txt"));
        fs::write(&json, self.json()).map_err(failed())?;
        fs::write(&text, self.text(Format::Text { colour: false })).map_err(failed())?;
        Ok([json, text])
    }
}

/// Whether figures of this program are none that anybody should quote.
#[must_use]
pub const fn is_debug() -> bool {
    cfg!(debug_assertions)
}

// === private helpers ===

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.get(middle) {
        None => f64::NAN,
        Some(upper) if values.len() % 2 == 1 => *upper,
        Some(upper) => (upper + values[middle - 1]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let times = Times::of((1..=200).rev().map(Duration::from_millis));
        assert_eq!([times.p50, times.p90, times.p99, times.max], [100e3, 180e3, 198e3, 200e3]);
        assert_eq!(times.to_string(), "p50 100.0  p90 180.0  p99 198.0  max 200.0 ms");
        let none = Times::of([]);
        assert_eq!((none.count, none.p99, none.mean), (0, 0.0, 0.0));
    }

    #[test]
    fn what_counts_is_the_median_of_the_quotients() {
        // Both get slower in the middle of the run: the quotients do not see it.
        let value = Value::beside("wire", vec![10.0, 5.0, 9.0, 2.0], vec![10.0, 5.0, 10.0, 4.0], "Gbit/s");
        let Value::Beside { ratio, spread, .. } = value else { panic!("{value}") };
        assert_eq!((ratio, spread), (0.95, (0.5, 1.0)));
    }

    #[test]
    fn targets_say_whether_they_are_reached() {
        let times = Times::of([Duration::from_millis(10)]);
        assert!(Target::times(&times, 10, 40).reached);
        assert!(!Target::times(&times, 9, 40).reached);
        assert!(!Target::at_least(0.96, 0.97, "").reached);
        assert_eq!(Target::at_most(1.0, 15.0, " MiB").wanted, "≤ 15 MiB");
    }
}
