//! What a person reads, and what a machine reads.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use comfy_table::{ContentArrangement, Table};
use comfy_table::{LineStyle, TableStyle};
use serde::Serialize;

use crate::expect::Outcome;
use crate::holder::Event;
use crate::lab::State;
use crate::logs::Logged;
use crate::process::Condition;

/// How a run is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Lines and tables.
    Text {
        /// With colours.
        colour: bool,
    },
    /// One JSON document at the end.
    Json,
}

/// The result of one scenario.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The lab's name.
    pub lab: String,
    /// How long it took until everything was ready, in milliseconds; nothing if it never was.
    pub up_millis: Option<u64>,
    /// How long it took to remove everything, in milliseconds.
    pub down_millis: Option<u64>,
    /// The expectations.
    pub expectations: Vec<Outcome>,
    /// How many expectations the file has.
    pub expected: usize,
    /// What went wrong besides expectations.
    pub errors: Vec<String>,
    /// What was left behind.
    pub leftovers: Vec<String>,
}

// === impl Format ===

impl Format {
    /// Colours on terminals, unless `NO_COLOR` is set (no-color.org).
    #[must_use]
    pub fn text() -> Self {
        let colour =
            io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self::Text { colour }
    }

    /// The text in the colour of this SGR code, where colours are wanted.
    #[must_use]
    pub fn paint(self, text: &str, code: &str) -> String {
        match self {
            Self::Text { colour: true } => format!("\x1b[{code}m{text}\x1b[0m"),
            _ => text.to_owned(),
        }
    }

    /// As good news.
    #[must_use]
    pub fn good(self, text: &str) -> String {
        self.paint(text, "32")
    }

    /// As bad news.
    #[must_use]
    pub fn bad(self, text: &str) -> String {
        self.paint(text, "31;1")
    }
}

// === impl Report ===

impl Report {
    /// Every expectation was checked and held, nothing failed, nothing is left.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.errors.is_empty()
            && self.leftovers.is_empty()
            && self.expectations.len() == self.expected
            && self.expectations.iter().all(|outcome| outcome.held)
    }

    /// Takes an event in, and says it at once if that is wanted.
    pub(crate) fn take(&mut self, event: Event, format: Format, out: &mut dyn Write) -> io::Result<()> {
        let text = match event {
            Event::Progress { at, text } => line(at, &text),
            Event::Up { at, processes } => {
                self.up_millis = Some(at);
                line(at, &format!("up: {processes} processes"))
            }
            Event::Checked(outcome) => {
                self.expectations.push(outcome);
                return Ok(());
            }
            Event::AllChecked => format!("{}\n", self.table(format)),
            Event::Failed { error } | Event::Refused { error } => {
                let text = format!("{} {error}\n", format.bad("error:"));
                self.errors.push(error);
                text
            }
            Event::Down { took, leftovers } => {
                self.down_millis = Some(took);
                self.leftovers = leftovers;
                let left = match self.leftovers.as_slice() {
                    [] => "nothing left behind".to_owned(),
                    left => format.bad(&format!("left behind: {}", left.join(", "))),
                };
                format!("down in {:.3} s, {left}\n", took as f64 / 1e3)
            }
        };
        match format {
            Format::Text { .. } => out.write_all(text.as_bytes()).and_then(|()| out.flush()),
            Format::Json => Ok(()),
        }
    }

    /// The expectations with their measured values.
    #[must_use]
    pub fn table(&self, format: Format) -> String {
        let mut table = plain_table(["", "expectation", "measured", "took"]);
        for outcome in &self.expectations {
            let mark = if outcome.held { "ok" } else { "FAILED" };
            let took = format!("{:.3} s", outcome.millis as f64 / 1e3);
            // One line each, so that it is known below which of them its logs belong.
            table.add_row([mark, &one_line(&outcome.expectation), &one_line(&outcome.measured), &took]);
        }
        let rendered = render(&table, format);
        let mut lines = rendered.lines();
        let header = lines.by_ref().take(rendered.lines().count().saturating_sub(self.expectations.len()));
        let mut text: Vec<_> = header.map(str::to_owned).collect();
        for (line, outcome) in lines.zip(&self.expectations) {
            text.push(line.to_owned());
            text.extend(outcome.logs.iter().flat_map(logged));
        }
        text.join("\n")
    }
}

/// The last line of a run.
#[must_use]
pub(crate) fn summary(reports: &[Report], format: Format) -> String {
    let held = |report: &Report| report.expectations.iter().filter(|outcome| outcome.held).count();
    let (expected, held): (usize, usize) =
        (reports.iter().map(|report| report.expected).sum(), reports.iter().map(held).sum());
    let left: usize = reports.iter().map(|report| report.leftovers.len()).sum();
    let bad: Vec<_> =
        reports.iter().filter(|report| !report.is_good()).map(|report| report.lab.as_str()).collect();
    let mut text =
        format!("{} scenarios, {held} of {expected} expectations held, {left} objects left", reports.len());
    if bad.is_empty() {
        let _ = write!(text, ": {}", format.good("good"));
    } else {
        let _ = write!(text, ": {}", format.bad(&format!("FAILED: {}", bad.join(", "))));
    }
    text
}

/// The state of a lab, for `status`.
#[must_use]
pub(crate) fn status(state: &State, format: Format) -> String {
    let alive = state.holder.is_alive();
    let held = if alive {
        format!("held by process {}", state.holder.pid)
    } else {
        format.bad("its holder is dead")
    };
    let text = format!("lab {} ({}), {held}\n", state.lab, state.file.display());
    let mut table = plain_table(["", "namespace", "process", "pid", "condition"]);
    for (name, node) in &state.namespaces {
        let full = format!("{}.{name}", state.lab);
        let full = node.as_ref().map_or_else(|| full.clone(), |node| format!("{full} (on {node})"));
        let processes: Vec<_> = state.processes.iter().filter(|process| process.namespace == *name).collect();
        if processes.is_empty() {
            table.add_row(["", &full, "", "", ""]);
        }
        for process in processes {
            let condition = match &process.condition {
                Condition::Ended(how) => format!("ended: {how}"),
                _ if !process.id.is_alive() => "dead".to_owned(),
                Condition::Starting(status) => format!("starting {status}"),
                Condition::Ready => "ready".to_owned(),
            };
            let mark = if condition == "ready" { "ok" } else { "FAILED" };
            let mark = if condition.starts_with("starting") { "" } else { mark };
            table.add_row([mark, &full, &process.name, &process.id.pid.to_string(), &condition]);
        }
    }
    text + &render(&table, format) + "\n"
}

// === private helpers ===

/// The lines of one process, below the row that they are about.
fn logged(logged: &Logged) -> Vec<String> {
    let title = format!("        {} logged since then:", logged.process);
    std::iter::once(title).chain(logged.lines.iter().map(|line| format!("          {line}"))).collect()
}

fn one_line(text: &str) -> String {
    text.lines().map(str::trim).collect::<Vec<_>>().join("; ")
}

fn line(at: u64, text: &str) -> String {
    format!("{:>8.3} s  {text}\n", at as f64 / 1e3)
}

/// A table with a header and no lines but the one below it.
#[must_use]
pub fn plain_table(header: impl IntoIterator<Item = &'static str>) -> Table {
    let mut table = Table::new();
    let style = TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));
    table.load_style(style).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.into_iter().collect::<Vec<_>>());
    table
}

/// A table as text; rows whose first cell is `ok`, `FAILED` or `MISSED` have it in colour, where there is any.
#[must_use]
pub fn render(table: &Table, format: Format) -> String {
    // Colours come after the widths: escape codes have none.
    let paint = |line: String| match line.trim_start().split(' ').next() {
        Some("ok") => line.replacen("ok", &format.good("ok"), 1),
        Some(word @ ("FAILED" | "MISSED")) => line.replacen(word, &format.bad(word), 1),
        _ => line,
    };
    table.lines().map(|line| paint(line).trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}
