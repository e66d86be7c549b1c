//! Starting programs in namespaces and noticing at once what becomes of them.
//!
//! Each process has a thread of its own that sleeps on its pidfd and on its readiness socket (systemd's protocol,
//! `sd_notify(3)`), so a death or a `READY=1` is known when it happens. Everything that waits, waits on one condition
//! variable, and wakes up for what it waits for, for a death that nobody ordered, or for the order to stop.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nsm_kernel::netns::Namespace;
use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::Error;

/// Lines of a log that an error shows.
const TAIL: usize = 12;

/// What to start.
#[derive(Debug, Clone)]
pub struct Program {
    /// Its name towards people.
    pub name: String,
    /// The executable.
    pub exe: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// All of its environment.
    pub env: BTreeMap<String, String>,
    /// Where its stdout and stderr go; appended.
    pub log: PathBuf,
    /// Where its readiness socket is made.
    pub notify: PathBuf,
}

/// A process, told apart from later ones with the same pid by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The pid.
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`, in clock ticks since boot.
    pub start: u64,
}

/// What is known of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Condition {
    /// It runs but has not said that it is ready; its last `STATUS=`.
    Starting(String),
    /// It said `READY=1`.
    Ready,
    /// It ended: `exit status 1`, `signal 9`.
    Ended(String),
}

/// Starts, watches and ends processes. Clones are handles of the same.
#[derive(Debug, Clone, Default)]
pub struct Supervisor(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    table: Mutex<Table>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    processes: BTreeMap<String, Watched>,
    /// Why everything has to stop.
    stop: Option<String>,
    /// Counts changes, for whoever records them.
    changes: u64,
}

#[derive(Debug)]
struct Watched {
    id: ProcessId,
    pidfd: Arc<OwnedFd>,
    began: Instant,
    condition: Condition,
    /// Its end was ordered and is no failure.
    doomed: bool,
    log: PathBuf,
}

// === impl ProcessId ===

impl ProcessId {
    /// The process that has this pid now, if there is one that has not ended.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may contain blanks and parentheses itself (man 5 proc).
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?;
        let start = fields.nth(18)?.parse().ok()?;
        (!matches!(state, "Z" | "X")).then_some(Self { pid, start })
    }

    /// This process.
    #[must_use]
    pub fn own() -> Option<Self> {
        Self::of(std::process::id())
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }

    /// Sends a signal to this process and to no later one with the same pid.
    pub(crate) fn signal(&self, signal: Signal) {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return };
        // The descriptor pins the pid before the start time is compared.
        if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty())
            && self.is_alive()
        {
            let _ = pidfd_send_signal(pidfd, signal);
        }
    }
}

// === impl Supervisor ===

impl Supervisor {
    /// Starts a program in a namespace; a name may be used again when its process has ended.
    ///
    /// # Errors
    ///
    /// [`Error::System`] if it cannot be started, [`Error::Interrupted`] after [`Supervisor::stop`].
    pub fn start(&self, program: &Program, namespace: &Namespace) -> Result<ProcessId, Error> {
        self.check_stop()?;
        let (child, notify) = spawn(program, namespace)?;
        let name = program.name.clone();
        let failed = |source: io::Error| Error::system(format!("watch {name}"), source);
        let pid = Pid::from_child(&child);
        let pidfd = Arc::new(pidfd_open(pid, PidfdFlags::empty()).map_err(|e| failed(e.into()))?);
        // A child is a zombie until we reap it, so its pid and its stat file are certain.
        let start = start_time(child.id()).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        let id = ProcessId { pid: child.id(), start };
        let watched = Watched {
            id,
            pidfd: pidfd.clone(),
            began: Instant::now(),
            condition: Condition::Starting(String::new()),
            doomed: false,
            log: program.log.clone(),
        };
        self.change(|table| table.processes.insert(name.clone(), watched));
        let supervisor = self.clone();
        thread::Builder::new()
            .name("supervisor".into())
            .spawn(move || supervisor.watch(&name, id, child, &pidfd, &notify))
            .map_err(|e| Error::system("start a thread", e))?;
        Ok(id)
    }

    /// Waits until all of `names` are ready.
    ///
    /// # Errors
    ///
    /// [`Error::Died`] as soon as any process ends that should not, [`Error::NotReady`] after `within`,
    /// [`Error::Interrupted`].
    pub fn wait_ready(&self, names: &[&str], within: Duration) -> Result<(), Error> {
        self.wait(within, |table| {
            let unready = names.iter().find(|name| {
                table.processes.get(**name).is_none_or(|process| process.condition != Condition::Ready)
            });
            match unready {
                None => Ok(()),
                Some(name) => Err(not_ready(table, name, within)),
            }
        })
    }

    /// Waits until one of `names` is ready.
    pub(crate) fn wait_any_ready(&self, names: &[&str], within: Duration) -> Result<(), Error> {
        self.wait(within, |table| {
            let ready =
                |name: &&str| table.processes.get(*name).is_some_and(|p| p.condition == Condition::Ready);
            match names.first() {
                Some(first) if !names.iter().any(ready) => Err(not_ready(table, first, within)),
                _ => Ok(()),
            }
        })
    }

    /// Names of the processes that are ready.
    pub(crate) fn ready(&self) -> BTreeSet<String> {
        let table = self.0.table.lock();
        let ready = table.processes.iter().filter(|(_, process)| process.condition == Condition::Ready);
        ready.map(|(name, _)| name.clone()).collect()
    }

    /// Waits for the next change of anything, after the change that was counted as `seen`; returns the new count.
    pub(crate) fn wait_change(&self, seen: u64) -> u64 {
        let mut table = self.0.table.lock();
        while table.changes == seen {
            self.0.changed.wait(&mut table);
        }
        table.changes
    }

    /// The first process that ended without an order, or the order to stop.
    ///
    /// # Errors
    ///
    /// [`Error::Died`] or [`Error::Interrupted`].
    pub fn check(&self) -> Result<(), Error> {
        let table = self.0.table.lock();
        table.stop.clone().map_or(Ok(()), |reason| Err(Error::Interrupted(reason)))?;
        died(&table).map_or(Ok(()), Err)
    }

    /// Sends a signal that ends a process, whose end then is no failure, and waits for the end.
    ///
    /// # Errors
    ///
    /// [`Error::System`] if there is no such process or it outlives `within`.
    pub fn end(&self, name: &str, signal: Signal, within: Duration) -> Result<(), Error> {
        self.end_all(&[name], signal);
        self.wait_end(&[name], within)
    }

    /// Asks processes to end and does not wait; their ends are no failures.
    pub(crate) fn end_all(&self, names: &[&str], signal: Signal) {
        let mut table = self.0.table.lock();
        for name in names {
            if let Some(process) = table.processes.get_mut(*name) {
                process.doomed = true;
                if !matches!(process.condition, Condition::Ended(_)) {
                    let _ = pidfd_send_signal(&process.pidfd, signal);
                }
            }
        }
    }

    /// Sends processes a signal that ends none.
    pub(crate) fn signal_all(&self, names: &[&str], signal: Signal) {
        let table = self.0.table.lock();
        for process in names.iter().filter_map(|name| table.processes.get(*name)) {
            let _ = pidfd_send_signal(&process.pidfd, signal);
        }
    }

    /// Waits for the end of processes, also after [`Supervisor::stop`].
    pub(crate) fn wait_end(&self, names: &[&str], within: Duration) -> Result<(), Error> {
        let end = Instant::now() + within;
        let mut table = self.0.table.lock();
        loop {
            let alive = names.iter().find(|name| match table.processes.get(**name) {
                Some(process) => !matches!(process.condition, Condition::Ended(_)),
                None => false,
            });
            let Some(alive) = alive else { return Ok(()) };
            if self.0.changed.wait_until(&mut table, end).timed_out() {
                let timeout = io::Error::from(io::ErrorKind::TimedOut);
                return Err(Error::system(format!("end {alive} within {within:?}"), timeout));
            }
        }
    }

    /// Makes everything that waits give up; a second reason changes nothing.
    pub fn stop(&self, reason: &str) {
        self.change(|table| _ = table.stop.get_or_insert_with(|| reason.to_owned()));
    }

    /// Name, identity, condition of all processes that were started.
    #[must_use]
    pub fn processes(&self) -> Vec<(String, ProcessId, Condition)> {
        let table = self.0.table.lock();
        table.processes.iter().map(|(name, p)| (name.clone(), p.id, p.condition.clone())).collect()
    }

    fn check_stop(&self) -> Result<(), Error> {
        self.0.table.lock().stop.clone().map_or(Ok(()), |reason| Err(Error::Interrupted(reason)))
    }

    /// Waits until `done` says so, or for a failure, the order to stop, or the end of the time: then `done`'s error.
    fn wait(&self, within: Duration, done: impl Fn(&Table) -> Result<(), Error>) -> Result<(), Error> {
        let end = Instant::now() + within;
        let mut table = self.0.table.lock();
        loop {
            if let Some(reason) = &table.stop {
                return Err(Error::Interrupted(reason.clone()));
            }
            if let Some(error) = died(&table) {
                return Err(error);
            }
            match done(&table) {
                Err(_) if Instant::now() < end => _ = self.0.changed.wait_until(&mut table, end),
                other => return other,
            }
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut Table) -> T) -> T {
        let mut table = self.0.table.lock();
        table.changes += 1;
        let result = change(&mut table);
        self.0.changed.notify_all();
        result
    }

    /// The life of one process, from its start to its end.
    fn watch(&self, name: &str, id: ProcessId, mut child: Child, pidfd: &OwnedFd, notify: &UnixDatagram) {
        let set = |condition: Condition| {
            self.change(|table| {
                if let Some(process) = table.processes.get_mut(name)
                    && process.id == id
                {
                    process.condition = condition;
                }
            });
        };
        let mut ready = false;
        loop {
            let mut fds = [PollFd::new(pidfd, PollFlags::IN), PollFd::new(notify, PollFlags::IN)];
            let ended = match poll(&mut fds, None) {
                Ok(_) => !fds[0].revents().is_empty(),
                Err(Errno::INTR) => continue,
                // Not to be expected; its end will still be noticed.
                Err(_) => true,
            };
            let mut message = [0; 4096];
            while let Ok(length) = notify.recv(&mut message) {
                for line in String::from_utf8_lossy(&message[..length]).lines() {
                    match line.split_once('=') {
                        Some(("READY", "1")) => {
                            ready = true;
                            set(Condition::Ready);
                        }
                        Some(("STATUS", text)) if !ready => set(Condition::Starting(text.to_owned())),
                        _ => {}
                    }
                }
            }
            if ended {
                let how = child.wait().map_or_else(|error| error.to_string(), describe);
                set(Condition::Ended(how));
                return;
            }
        }
    }
}

/// The last lines of a file, indented; a word if there are none.
#[must_use]
pub fn tail(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    if lines.is_empty() {
        return format!("  ({} is empty)", path.display());
    }
    lines[lines.len().saturating_sub(TAIL)..]
        .iter()
        .map(|line| format!("  {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

// === private helpers ===

fn spawn(program: &Program, namespace: &Namespace) -> Result<(Child, UnixDatagram), Error> {
    let failed = |source: io::Error| Error::system(format!("start {}", program.name), source);
    let _ = fs::remove_file(&program.notify);
    let notify = UnixDatagram::bind(&program.notify).map_err(failed)?;
    notify.set_nonblocking(true).map_err(failed)?;
    let log = || -> io::Result<File> { OpenOptions::new().create(true).append(true).open(&program.log) };
    let mut command = Command::new(&program.exe);
    command
        .arg0("nsm")
        .args(&program.args)
        .env_clear()
        .envs(&program.env)
        .env("NOTIFY_SOCKET", &program.notify)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log().map_err(failed)?)
        .stderr(log().map_err(failed)?)
        // Ctrl-C at a terminal reaches the foreground group: ends are in our order, not the terminal's.
        .process_group(0);
    // A child inherits the namespace of the thread that starts it.
    let child = namespace
        .run(|| command.spawn())
        .map_err(Error::kernel(format!("enter the namespace of {}", program.name)))?
        .map_err(failed)?;
    Ok((child, notify))
}

fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

fn died(table: &Table) -> Option<Error> {
    table.processes.iter().find_map(|(name, process)| match &process.condition {
        Condition::Ended(how) if !process.doomed => Some(Error::Died {
            process: name.clone(),
            how: format!("ended with {how} ({:.1} s after its start)", process.began.elapsed().as_secs_f64()),
            log: tail(&process.log),
        }),
        _ => None,
    })
}

fn not_ready(table: &Table, name: &str, waited: Duration) -> Error {
    let process = table.processes.get(name);
    let status = match process.map(|process| &process.condition) {
        None => " (it was never started)".into(),
        Some(Condition::Starting(status)) if !status.is_empty() => format!(" (it says: {status})"),
        _ => String::new(),
    };
    let log = process.map(|process| tail(&process.log)).unwrap_or_default();
    Error::NotReady { process: name.to_owned(), waited, status, log }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A shell script, in the namespace of the test itself: only starting and watching are tried here.
    fn start(supervisor: &Supervisor, directory: &Path, name: &str, script: &str) -> ProcessId {
        let program = Program {
            name: name.into(),
            exe: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            env: BTreeMap::new(),
            log: directory.join(format!("{name}.log")),
            notify: directory.join(name),
        };
        match Namespace::current()
            .map_err(Error::kernel("open it"))
            .and_then(|here| supervisor.start(&program, &here))
        {
            Ok(id) => id,
            Err(error) => panic!("{}", error.chain()),
        }
    }

    /// Leaves nothing running, also when the test fails.
    struct Guard(Supervisor);

    impl Guard {
        fn new() -> (Self, Supervisor) {
            let supervisor = Supervisor::default();
            (Self(supervisor.clone()), supervisor)
        }
    }

    impl Drop for Guard {
        fn drop(&mut self) {
            let names: Vec<_> = self.0.processes().into_iter().map(|(name, ..)| name).collect();
            let names: Vec<_> = names.iter().map(String::as_str).collect();
            self.0.end_all(&names, Signal::KILL);
            let _ = self.0.wait_end(&names, LONG);
        }
    }

    /// Entering even one's own namespace needs CAP_SYS_ADMIN.
    fn may_not(test: &str) -> bool {
        let skip = !crate::confine::is_privileged();
        if skip {
            println!("SKIPPED {test}: needs CAP_SYS_ADMIN to enter a network namespace");
        }
        skip
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_death_is_noticed_and_named_with_the_end_of_the_log() {
        if may_not("a_death_is_noticed_and_named_with_the_end_of_the_log") {
            return;
        }
        let directory = tempfile::tempdir().expect("directory");
        let (_guard, supervisor) = Guard::new();
        let sleeper = start(&supervisor, directory.path(), "sleeper", "exec sleep 1000");
        start(&supervisor, directory.path(), "dier", "echo first; echo the disk is full >&2; exit 3");
        let error = supervisor.wait_ready(&["sleeper"], LONG).expect_err("one died");
        let text = error.to_string();
        assert!(text.starts_with("dier ended with exit status 3 ("), "{text}");
        assert!(text.ends_with("  first\n  the disk is full"), "{text}");
        // An end that was ordered is none that fails, and nothing of the first death is forgotten.
        supervisor.end("sleeper", Signal::KILL, LONG).expect("ends");
        assert!(!sleeper.is_alive());
        assert!(matches!(supervisor.check(), Err(Error::Died { process, .. }) if process == "dier"));
    }

    #[test]
    fn readiness_is_what_the_process_says() {
        if may_not("readiness_is_what_the_process_says") {
            return;
        }
        let directory = tempfile::tempdir().expect("directory");
        let (_guard, supervisor) = Guard::new();
        start(&supervisor, directory.path(), "slow", "exec sleep 1000");
        let say = |text: &str| {
            let socket = UnixDatagram::unbound().expect("socket");
            socket.send_to(text.as_bytes(), directory.path().join("slow")).expect("it listens");
        };
        say("STATUS=looking for the registry");
        let before = supervisor.wait_change(1);
        assert!(before > 1);
        let error = supervisor.wait_ready(&["slow"], Duration::ZERO).expect_err("not ready");
        assert!(error.to_string().contains("(it says: looking for the registry)"), "{error}");
        assert!(error.to_string().contains("slow.log is empty"), "{error}");
        say("READY=1\nSTATUS=fine");
        supervisor.wait_ready(&["slow"], LONG).expect("ready");
        assert_eq!(supervisor.ready(), BTreeSet::from(["slow".to_owned()]));
        supervisor.end("slow", Signal::TERM, LONG).expect("ends");
        supervisor.check().expect("its end was ordered");
        assert_eq!(supervisor.ready(), BTreeSet::new());
    }

    #[test]
    fn a_stop_wakes_what_waits_and_lets_nothing_start() {
        if may_not("a_stop_wakes_what_waits_and_lets_nothing_start") {
            return;
        }
        let directory = tempfile::tempdir().expect("directory");
        let (_guard, supervisor) = Guard::new();
        start(&supervisor, directory.path(), "slow", "exec sleep 1000");
        let waiting = supervisor.clone();
        let waiter = thread::spawn(move || waiting.wait_ready(&["slow"], LONG));
        supervisor.stop("SIGTERM");
        supervisor.stop("again");
        let error = waiter.join().expect("no panic").expect_err("stopped");
        assert_eq!(error.to_string(), "interrupted: SIGTERM");
        supervisor.end("slow", Signal::KILL, LONG).expect("ending still works");
        assert!(matches!(supervisor.check(), Err(Error::Interrupted(_))));
    }

    #[test]
    fn a_pid_is_not_a_process() {
        let own = ProcessId::own().expect("we live");
        assert!(own.is_alive());
        assert!(!ProcessId { start: own.start + 1, ..own }.is_alive(), "same pid, other start");
        assert_eq!(ProcessId::of(0), None);
    }
}
