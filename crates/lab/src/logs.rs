//! What the processes of a lab have logged since some moment: why something went wrong is there, if anywhere.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::lab::Lab;

/// Lines that are shown of one process.
const LINES: usize = 12;
/// So much of the end of a log is looked at, and so much of one line is shown.
const BYTES: u64 = 64 * 1024;
const LONGEST: usize = 400;

/// The last lines that one process logged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Logged {
    /// Its name in the plan.
    pub process: String,
    /// Oldest first.
    pub lines: Vec<String>,
}

/// A moment in the logs of a lab.
#[derive(Debug)]
pub(crate) struct Since(Vec<(String, PathBuf, u64)>);

impl Since {
    /// Now.
    pub(crate) fn now(lab: &Lab) -> Self {
        let at = lab.plan.paths();
        let logs = lab.plan.processes.iter().map(|process| {
            let path = at.log(&process.name);
            (process.name.clone(), path.clone(), length(&path))
        });
        Self(logs.collect())
    }

    /// What was logged since then by each process that has logged anything, `first`'s before the others'.
    pub(crate) fn told(&self, first: &str) -> Vec<Logged> {
        let mut logs: Vec<_> = self.0.iter().collect();
        logs.sort_by_key(|(process, ..)| process != first);
        let read = logs.into_iter().filter_map(|(process, path, from)| {
            let lines = last_lines(path, *from).ok()?;
            (!lines.is_empty()).then(|| Logged { process: process.clone(), lines })
        });
        read.collect()
    }
}

/// A log that is not there yet has no lines.
fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// The last lines after this place.
fn last_lines(path: &Path, from: u64) -> io::Result<Vec<String>> {
    let mut file = File::open(path)?;
    let from = from.max(file.metadata()?.len().saturating_sub(BYTES));
    file.seek(SeekFrom::Start(from))?;
    let mut text = Vec::new();
    file.take(BYTES).read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(LINES)..].iter().map(|line| clip(line)).collect())
}

fn clip(line: &str) -> String {
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_came_since_is_told_the_last_lines_and_the_first_process_first() {
        let directory = tempfile::tempdir().expect("directory");
        let at = |name: &str| directory.path().join(name);
        fs::write(at("registry"), "long ago\n").expect("write");
        fs::write(at("client"), "long ago\n").expect("write");
        fs::write(at("quiet"), "long ago\n").expect("write");
        let names = ["registry", "client", "quiet", "absent"];
        let since = Since(names.map(|name| (name.to_owned(), at(name), length(&at(name)))).into());
        assert_eq!(since.told("client"), []);
        fs::write(at("registry"), "long ago\nforgets\n").expect("write");
        let many: String = (0..40).map(|line| format!("line {line} {}\n", "é".repeat(500))).collect();
        fs::write(at("client"), format!("long ago\n{many}")).expect("write");
        fs::write(at("absent"), "is there now\n").expect("write");
        let told = since.told("client");
        let processes: Vec<_> = told.iter().map(|logged| logged.process.as_str()).collect();
        assert_eq!(processes, ["client", "registry", "absent"]);
        assert_eq!(told[0].lines.len(), LINES);
        assert!(told[0].lines[LINES - 1].starts_with("line 39 é") && told[0].lines[0].starts_with("line 28"));
        assert_eq!(told[0].lines[0].chars().count(), LONGEST + 1);
        assert_eq!(told[1].lines, ["forgets"]);
        assert_eq!(told[2].lines, ["is there now"]);
    }
}
