//! The process that holds a lab: it builds it, watches it, checks the expectations, and takes it down.
//!
//! `nsm lab run` and `nsm lab up` start it as a child in a session of its own, hear [`Event`]s from its stdout (one
//! JSON object per line), and hold the pipe of its stdin. When that pipe closes, because the front end wants the end
//! or was killed, the lab comes down; after the line `detach` it no longer cares.
//!
//! ```text
//!   nsm lab run ──stdin: open = go on──▶ nsm lab hold ──▶ identity, registry, managers, forwarders, pods
//!               ◀──stdout: events──────
//! ```

use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::chaos::{self, Chaos};
use crate::expect::{self, Outcome};
use crate::lab::Lab;
use crate::plan::Plan;
use crate::process::Supervisor;
use crate::scenario::Scenario;
use crate::{Error, confine};

/// The line by which a front end takes its leave without ending the lab.
pub(crate) const DETACH: &str = "detach";

/// What a holder is to do.
#[derive(Debug, Clone)]
pub struct Hold {
    /// The scenario file.
    pub file: PathBuf,
    /// Another name for the lab than the file's.
    pub name: Option<String>,
    /// Check the expectations when everything is up.
    pub expect: bool,
    /// Come down after the expectations, or stay.
    pub stay: bool,
    /// Instead of checking expectations: break things.
    pub chaos: Option<Chaos>,
}

/// What a holder tells its front end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Event {
    /// A step of building.
    Progress {
        /// Milliseconds since the beginning.
        at: u64,
        /// What was done.
        text: String,
    },
    /// Everything is ready.
    Up {
        /// Milliseconds since the beginning.
        at: u64,
        /// How many processes run.
        processes: usize,
    },
    /// One expectation was checked.
    Checked(Outcome),
    /// All expectations were checked.
    AllChecked,
    /// The lab could not be built, or something died or was interrupted.
    Failed {
        /// The error with its causes.
        error: String,
    },
    /// Another lab of this name runs; nothing was made.
    Refused {
        /// The error.
        error: String,
    },
    /// Everything was taken down.
    Down {
        /// How long that took, in milliseconds.
        took: u64,
        /// What could not be removed.
        leftovers: Vec<String>,
    },
}

/// Something that the holder reacts to.
enum Note {
    Checked(Outcome),
    AllChecked,
    /// Some process changed.
    Changed,
    Stop,
}

/// The life of a holder; `true` if nothing failed and nothing was left.
///
/// # Errors
///
/// Only what happens before there is anything to report with: an unreadable file, no threads.
pub fn hold(options: &Hold, exe: &Path) -> Result<bool, Error> {
    confine::settle_in()?;
    let began = Instant::now();
    let at = || began.elapsed().as_millis() as u64;
    let mut scenario = Scenario::load(&options.file)?;
    if let Some(name) = &options.name {
        scenario.rename(name)?;
    }
    let plan = Plan::new(&scenario);
    let supervisor = Supervisor::default();
    let (notes, inbox) = mpsc::channel();
    end_on_signals(&supervisor, &notes)?;
    end_with_front_end(&supervisor, &notes)?;

    for warning in &scenario.warnings {
        emit(&Event::Progress { at: at(), text: format!("note: {warning}") });
    }
    let mut progress = |text| emit(&Event::Progress { at: at(), text });
    let lab = match Lab::build(plan, &options.file, exe, supervisor.clone(), &mut progress) {
        Ok(lab) => Arc::new(lab),
        // The first lab's things are nothing that this one left.
        Err(error @ Error::Running { .. }) => {
            emit(&Event::Refused { error: error.chain() });
            return Ok(false);
        }
        Err(error) => {
            emit(&Event::Failed { error: error.chain() });
            emit(&Event::Down { took: 0, leftovers: crate::leftovers(&scenario.name) });
            return Ok(false);
        }
    };
    lab.write_state()?;
    emit(&Event::Up { at: at(), processes: lab.plan.processes.len() });
    tell_changes(&supervisor, &notes)?;
    match &options.chaos {
        Some(chaos) => play_all(lab.clone(), scenario, chaos.clone(), notes)?,
        None if options.expect => check_all(lab.clone(), scenario, notes)?,
        None => {}
    }

    let mut good = true;
    let mut told = false;
    for note in inbox {
        match note {
            Note::Checked(outcome) => {
                good &= outcome.held;
                if options.chaos.is_some() {
                    let how = if outcome.held { "" } else { "FAILED: " };
                    let text = format!("{how}{} — {}", outcome.expectation, outcome.measured);
                    emit(&Event::Progress { at: at(), text });
                }
                emit(&Event::Checked(outcome));
            }
            Note::AllChecked => {
                emit(&Event::AllChecked);
                if !options.stay {
                    break;
                }
            }
            Note::Changed => {
                lab.write_state()?;
                // A lab that stays is there to be looked at, also when something in it died.
                if let Err(error) = supervisor.check()
                    && !std::mem::replace(&mut told, true)
                {
                    good = false;
                    emit(&Event::Failed { error: error.chain() });
                }
            }
            Note::Stop => {
                if let Err(error @ Error::Interrupted(_)) = supervisor.check()
                    && !options.stay
                {
                    good = false;
                    emit(&Event::Failed { error: error.chain() });
                }
                break;
            }
        }
    }
    let ending = Instant::now();
    let leftovers = lab.down();
    good &= leftovers.is_empty();
    emit(&Event::Down { took: ending.elapsed().as_millis() as u64, leftovers });
    Ok(good)
}

/// Calls `react` with the name of the signal whenever SIGINT, SIGTERM or SIGHUP arrives.
///
/// # Errors
///
/// If no thread can be started.
pub fn on_signals(react: impl Fn(&str) + Send + 'static) -> Result<(), Error> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |error| Error::system("listen to signals", error);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(failed)?;
    let mut kinds = {
        // Signals are caught from here on, before anything is made that would have to be removed.
        let _inside = runtime.enter();
        let caught = |kind| signal(kind).map_err(failed);
        (caught(SignalKind::interrupt())?, caught(SignalKind::terminate())?, caught(SignalKind::hangup())?)
    };
    let listen = move || {
        runtime.block_on(async {
            loop {
                let name = tokio::select! {
                    _ = kinds.0.recv() => "SIGINT",
                    _ = kinds.1.recv() => "SIGTERM",
                    _ = kinds.2.recv() => "SIGHUP",
                };
                react(name);
            }
        });
    };
    thread::Builder::new().name("signals".into()).spawn(listen).map_err(failed)?;
    Ok(())
}

// === private helpers ===

/// A front end that is gone hears nothing; the lab goes on or down all the same.
fn emit(event: &Event) {
    let mut line = serde_json::to_vec(event).unwrap_or_default();
    line.push(b'\n');
    let _ = io::stdout().lock().write_all(&line);
}

fn end_on_signals(supervisor: &Supervisor, notes: &Sender<Note>) -> Result<(), Error> {
    let (supervisor, notes) = (supervisor.clone(), notes.clone());
    on_signals(move |name| {
        supervisor.stop(name);
        let _ = notes.send(Note::Stop);
    })
}

fn end_with_front_end(supervisor: &Supervisor, notes: &Sender<Note>) -> Result<(), Error> {
    let (supervisor, notes) = (supervisor.clone(), notes.clone());
    let listen = move || {
        for line in io::stdin().lock().lines() {
            if line.is_ok_and(|line| line == DETACH) {
                return;
            }
        }
        supervisor.stop("the program that asked for it is gone");
        let _ = notes.send(Note::Stop);
    };
    thread::Builder::new()
        .name("front-end".into())
        .spawn(listen)
        .map_err(|e| Error::system("start a thread", e))?;
    Ok(())
}

fn tell_changes(supervisor: &Supervisor, notes: &Sender<Note>) -> Result<(), Error> {
    let (supervisor, notes) = (supervisor.clone(), notes.clone());
    let listen = move || {
        let mut seen = 0;
        loop {
            seen = supervisor.wait_change(seen);
            if notes.send(Note::Changed).is_err() {
                return;
            }
        }
    };
    thread::Builder::new()
        .name("changes".into())
        .spawn(listen)
        .map_err(|e| Error::system("start a thread", e))?;
    Ok(())
}

fn play_all(lab: Arc<Lab>, scenario: Scenario, chaos: Chaos, notes: Sender<Note>) -> Result<(), Error> {
    let work = move || {
        chaos::run(&lab, &scenario, &chaos, &mut |outcome| notes.send(Note::Checked(outcome)).is_ok());
        let _ = notes.send(Note::AllChecked);
    };
    thread::Builder::new()
        .name("chaos".into())
        .spawn(work)
        .map_err(|e| Error::system("start a thread", e))?;
    Ok(())
}

fn check_all(lab: Arc<Lab>, scenario: Scenario, notes: Sender<Note>) -> Result<(), Error> {
    let work = move || {
        for expectation in &scenario.expect {
            if notes.send(Note::Checked(expect::check(&lab, expectation))).is_err() {
                return;
            }
        }
        let _ = notes.send(Note::AllChecked);
    };
    thread::Builder::new()
        .name("expect".into())
        .spawn(work)
        .map_err(|e| Error::system("start a thread", e))?;
    Ok(())
}
