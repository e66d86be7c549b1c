//! What a process holds: that it does not grow is what a long run is for.

use std::collections::BTreeMap;
use std::fs;

use crate::lab::Lab;
use crate::process::{Condition, ProcessId};

/// What may be more at the end than at most in the first rounds of a process: what comes with connections that are just
/// being made, and memory that an allocator keeps.
const MORE_FDS: u64 = 16;
const MORE_THREADS: u64 = 8;
/// Half as many again, and so many: a Close that nobody hears is tried again for a while.
const MORE_TASKS: u64 = 32;
/// Half as much again, and so many KiB. What is mapped from the program itself is not counted: it comes as it is run.
const MORE_RSS: u64 = 8 * 1024;

/// What one process holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Weight {
    fds: u64,
    threads: u64,
    /// 0 of a process that does not tell.
    tasks: u64,
    rss_kib: u64,
}

/// So many rounds a process has to warm up: whoever is just ready has not yet heard from all its neighbours.
const WARM: u64 = 3;

/// The most that each process held in its first rounds.
#[derive(Debug, Default)]
pub(crate) struct Weights(BTreeMap<String, (ProcessId, u64, Weight)>);

impl Weight {
    fn of(pid: u32, tasks: &BTreeMap<u32, u64>) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let number = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_whitespace().next()?.parse().ok()
        };
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64;
        let tasks = tasks.get(&pid).copied().unwrap_or_default();
        Some(Self { fds, threads: number("Threads:")?, tasks, rss_kib: number("RssAnon:")? })
    }

    fn most(self, other: Self) -> Self {
        Self {
            fds: self.fds.max(other.fds),
            threads: self.threads.max(other.threads),
            tasks: self.tasks.max(other.tasks),
            rss_kib: self.rss_kib.max(other.rss_kib),
        }
    }

    /// What of it is more than it may be.
    fn too_much(self, before: Self) -> Vec<String> {
        let bounds = [
            ("descriptors", before.fds, self.fds, before.fds + MORE_FDS),
            ("threads", before.threads, self.threads, before.threads + MORE_THREADS),
            ("tasks", before.tasks, self.tasks, before.tasks * 3 / 2 + MORE_TASKS),
            ("KiB of memory", before.rss_kib, self.rss_kib, before.rss_kib * 3 / 2 + MORE_RSS),
        ];
        let grown = bounds.into_iter().filter(|(.., now, most)| now > most);
        grown.map(|(what, before, now, most)| format!("{before} → {now} {what}, at most {most}")).collect()
    }
}

impl Weights {
    /// Weighs those that are new or warming up.
    pub(crate) fn note(&mut self, lab: &Lab) {
        let tasks = lab.tasks();
        for (name, id) in ready(lab) {
            let Some(now) = Weight::of(id.pid, &tasks) else { continue };
            match self.0.get_mut(&name).filter(|(before, ..)| *before == id) {
                Some((_, rounds, most)) => {
                    *rounds += 1;
                    if *rounds <= WARM {
                        *most = most.most(now);
                    }
                }
                None => _ = self.0.insert(name, (id, 1, now)),
            }
        }
    }

    /// How those have grown that were warm; `Err`: one has too much.
    pub(crate) fn compare(&self, lab: &Lab) -> Result<String, String> {
        let (mut lived, mut most, mut bad) = (0, Weight::default(), Vec::new());
        let tasks = lab.tasks();
        if tasks.is_empty() {
            return Err("no process tells how many tasks it has".to_owned());
        }
        for (name, id) in ready(lab) {
            let Some((_, _, before)) =
                self.0.get(&name).filter(|(was, rounds, _)| *was == id && *rounds > WARM)
            else {
                continue;
            };
            let Some(now) = Weight::of(id.pid, &tasks) else { continue };
            lived += 1;
            most.fds = most.fds.max(now.fds.saturating_sub(before.fds));
            most.threads = most.threads.max(now.threads.saturating_sub(before.threads));
            most.tasks = most.tasks.max(now.tasks.saturating_sub(before.tasks));
            most.rss_kib = most.rss_kib.max(now.rss_kib.saturating_sub(before.rss_kib));
            bad.extend(now.too_much(*before).into_iter().map(|what| format!("{name}: {what}")));
        }
        match bad.as_slice() {
            [] => Ok(format!(
                "{lived} processes lived through more than {WARM} rounds; at most {} descriptors, {} threads, {} tasks, {} KiB more",
                most.fds, most.threads, most.tasks, most.rss_kib
            )),
            _ => Err(bad.join("; ")),
        }
    }
}

fn ready(lab: &Lab) -> impl Iterator<Item = (String, ProcessId)> {
    let all = lab.supervisor.processes().into_iter();
    all.filter(|(.., condition)| *condition == Condition::Ready).map(|(name, id, _)| (name, id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_grows_without_end_is_told_and_what_comes_and_goes_is_not() {
        let before = Weight { fds: 30, threads: 4, tasks: 40, rss_kib: 20_000 };
        assert_eq!(Weight { fds: 46, threads: 12, tasks: 92, rss_kib: 38_000 }.too_much(before), [""; 0]);
        assert_eq!(Weight::default().too_much(before), [""; 0]);
        assert_eq!(
            Weight { fds: 47, threads: 13, tasks: 93, rss_kib: 50_000 }.too_much(before),
            [
                "30 → 47 descriptors, at most 46",
                "4 → 13 threads, at most 12",
                "40 → 93 tasks, at most 92",
                "20000 → 50000 KiB of memory, at most 38192"
            ]
        );
    }

    #[test]
    fn this_process_has_a_weight() {
        let own = Weight::of(std::process::id(), &[(std::process::id(), 7)].into()).expect("we live");
        assert!(own.fds > 2 && own.threads > 0 && own.tasks == 7 && own.rss_kib > 100, "{own:?}");
        assert_eq!(Weight::of(0, &BTreeMap::new()), None);
    }
}
