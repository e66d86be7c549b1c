//! The commands of `nsm lab`: what the program at the terminal does. The work is in the holder.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Arc;

use nsm_kernel::netns::Namespace;
use parking_lot::Mutex;

use crate::Error;
use crate::chaos::{Chaos, Plan as ChaosPlan};
use crate::confine::{self, Record};
use crate::holder::{DETACH, Event, on_signals};
use crate::lab::{self, State};
use crate::plan::{Paths, Plan};
use crate::report::{self, Format, Report};
use crate::scenario::Scenario;

/// What `nsm lab` needs to know of its surroundings.
#[derive(Debug, Clone)]
pub struct Front {
    /// The program that the lab's processes run, and that has the `lab` subcommand.
    pub exe: PathBuf,
    /// Another name for the lab than the file's.
    pub name: Option<String>,
    /// How results are told.
    pub format: Format,
}

/// What a caller of [`Front::run`] wants besides the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Aim {
    /// Build and leave.
    Up,
    /// Build, check, take down.
    Run,
    /// Build, check, leave.
    RunAndKeep,
}

// === impl Front ===

impl Front {
    /// `nsm lab plan FILE`: what `up` would make.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or is wrong.
    pub fn plan(&self, file: &Path) -> Result<Plan, Error> {
        Ok(Plan::new(&self.load(file)?))
    }

    /// `nsm lab up FILE`: builds a lab that stays; `true` if it stands.
    ///
    /// # Errors
    ///
    /// A wrong file, no privileges, a holder that cannot be started.
    pub fn up(&self, file: &Path, out: &mut dyn Write) -> Result<bool, Error> {
        let report = self.start(file, Aim::Up, None, &Interrupt::listen()?, out)?;
        let good = report.errors.is_empty() && report.up_millis.is_some();
        if good && self.format != Format::Json {
            writeln!(out, "{}", stands(&report.lab)).map_err(|e| Error::system("write", e))?;
        }
        Ok(good)
    }

    /// `nsm lab run FILE…`: each lab is built, checked and taken down; `true` if everything held.
    ///
    /// # Errors
    ///
    /// As [`Front::up`].
    pub fn run(&self, files: &[PathBuf], keep: bool, out: &mut dyn Write) -> Result<bool, Error> {
        let aim = if keep { Aim::RunAndKeep } else { Aim::Run };
        // All are read before the first is built: a typing error costs no time.
        files.iter().try_for_each(|file| self.load(file).map(drop))?;
        let interrupt = Interrupt::listen()?;
        let mut reports = Vec::new();
        for file in files {
            reports.push(self.start(file, aim, None, &interrupt, out)?);
            if interrupt.0.lock().happened {
                break;
            }
        }
        let text = match self.format {
            Format::Json => serde_json::to_string_pretty(&reports).unwrap_or_default(),
            Format::Text { .. } => report::summary(&reports, self.format),
        };
        writeln!(out, "{text}").map_err(|e| Error::system("write", e))?;
        let kept = reports.iter().filter(|report| report.up_millis.is_some() && report.down_millis.is_none());
        for report in kept.filter(|_| self.format != Format::Json) {
            writeln!(out, "{}", stands(&report.lab)).map_err(|e| Error::system("write", e))?;
        }
        Ok(reports.iter().all(Report::is_good))
    }

    /// `nsm lab chaos FILE`: the lab is built, broken round after round, and taken down; `true` if it mended itself each
    /// time, and nothing grew and nothing is left.
    ///
    /// # Errors
    ///
    /// As [`Front::up`].
    pub fn chaos(&self, file: &Path, chaos: &Chaos, out: &mut dyn Write) -> Result<bool, Error> {
        let report = self.start(file, Aim::Run, Some(chaos), &Interrupt::listen()?, out)?;
        let text = match self.format {
            Format::Json => {
                #[derive(serde::Serialize)]
                struct Run<'a> {
                    chaos: &'a Chaos,
                    #[serde(flatten)]
                    report: &'a Report,
                }
                serde_json::to_string_pretty(&Run { chaos, report: &report }).unwrap_or_default()
            }
            Format::Text { .. } => {
                format!(
                    "seed {}: {}",
                    chaos.seed,
                    report::summary(std::slice::from_ref(&report), self.format)
                )
            }
        };
        writeln!(out, "{text}").map_err(|e| Error::system("write", e))?;
        Ok(report.is_good())
    }

    /// `nsm lab chaos FILE --plan`: what would be broken, a line for each round.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or is wrong.
    pub fn plan_chaos(&self, file: &Path, chaos: &Chaos) -> Result<Vec<String>, Error> {
        let plan = ChaosPlan::new(&self.load(file)?, chaos.seed);
        Ok(chaos.rounds(&plan).map(|round| round.to_string()).collect())
    }

    /// `nsm lab status [LAB]`; `true` if all is well.
    ///
    /// # Errors
    ///
    /// [`Error::NotThere`] if the lab that was asked for is not there.
    pub fn status(&self, lab: Option<&str>, out: &mut dyn Write) -> Result<bool, Error> {
        let labs = match lab {
            Some(lab) => BTreeSet::from([lab.to_owned()]),
            None => self.labs(),
        };
        if labs.is_empty() {
            writeln!(out, "no lab runs here").map_err(|e| Error::system("write", e))?;
        }
        let mut good = true;
        for lab in labs {
            if self.is_outside() {
                good &= self.beside(&lab, &["status", &lab])?.success();
                continue;
            }
            let state = State::load(&lab);
            good &= state.as_ref().is_ok_and(State::is_healthy);
            let text = match (state, self.format) {
                (Ok(state), Format::Json) => serde_json::to_string_pretty(&state).unwrap_or_default() + "\n",
                (Ok(state), format) => report::status(&state, format),
                (Err(error), _) if lab::leftovers(&lab).is_empty() => return Err(error),
                (Err(_), format) => {
                    let left = lab::leftovers(&lab).join(", ");
                    format.bad(&format!(
                        "lab {lab} was killed and left {left}; `nsm lab down {lab}` removes it\n"
                    ))
                }
            };
            out.write_all(text.as_bytes()).map_err(|e| Error::system("write", e))?;
        }
        Ok(good)
    }

    /// `nsm lab exec POD -- CMD`: becomes the command, in the namespace of a pod or node.
    ///
    /// `pod` is `client` or, if several labs have one, `secure-intranet.client`. Returns only on failure, or, for a
    /// lab of an ordinary user, with the command's exit status.
    ///
    /// # Errors
    ///
    /// No such pod, no such program.
    pub fn exec(&self, pod: &str, command: &[String]) -> Result<i32, Error> {
        let labs = self.labs();
        if self.is_outside() {
            let of_lab =
                |lab: &&String| pod.strip_prefix(lab.as_str()).is_some_and(|rest| rest.starts_with('.'));
            let lab = match (labs.iter().find(of_lab), labs.first()) {
                (Some(lab), _) => lab,
                (None, Some(lab)) if labs.len() == 1 => lab,
                (None, None) => return Err(Error::NotThere("no lab of yours runs here".into())),
                (None, Some(lab)) => {
                    return Err(Error::NotThere(format!(
                        "several labs run here: say which, as in {lab}.{pod}"
                    )));
                }
            };
            let args: Vec<&str> =
                ["exec", pod, "--"].into_iter().chain(command.iter().map(String::as_str)).collect();
            let status = self.beside(lab, &args)?;
            return Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
        }
        let found = find_pod(&labs, pod)?;
        let (program, args) =
            command.split_first().ok_or_else(|| Error::NotThere("no command given".into()))?;
        let mut command = Command::new(program);
        command.args(args);
        confine::leave_no_mark(&mut command);
        if let Some(node) = &found.node {
            let at = Paths::new(&found.lab).node(node);
            command.env("SPIFFE_ENDPOINT_SOCKET", format!("unix://{}", at.join("identity.sock").display()));
            command.env("NSM_INTROSPECT_DIR", Paths::new(&found.lab).introspect());
            command.env("NSM_CONNECT_TO", format!("unix://{}", at.join("nsm.io.sock").display()));
        }
        let namespace = format!("{}.{}", found.lab, found.name);
        let namespace = Namespace::named(&namespace).map_err(Error::kernel(format!("open {namespace}")))?;
        // The thread that executes becomes the process: pid, terminal and exit status are the command's own.
        let error = namespace.run(|| command.exec()).map_err(Error::kernel("enter the pod"))?;
        Err(Error::system(format!("start {program}"), error))
    }

    /// `nsm lab down [LAB]`: ends a lab, or removes what a killed one left; without a name the only one there is.
    ///
    /// # Errors
    ///
    /// [`Error::NotThere`] if there is none or it is not clear which; what the kernel says if something stays.
    pub fn down(&self, lab: Option<&str>, out: &mut dyn Write) -> Result<bool, Error> {
        let lab = match lab {
            Some(lab) => lab.to_owned(),
            None => {
                let mut labs = self.labs().into_iter();
                match (labs.next(), labs.next()) {
                    (Some(lab), None) => lab,
                    (None, _) => return Err(Error::NotThere("no lab runs here".into())),
                    (Some(a), Some(b)) => {
                        return Err(Error::NotThere(format!(
                            "several labs run here ({a}, {b}, …): say which"
                        )));
                    }
                }
            }
        };
        if self.is_outside() {
            let good = self.beside(&lab, &["down", &lab])?.success();
            if good {
                Record::forget(&lab)?;
            }
            return Ok(good);
        }
        if State::load(&lab).is_err() && lab::leftovers(&lab).is_empty() {
            return Err(Error::NotThere(format!("no lab {lab} runs here, and nothing of one is left")));
        }
        let left = lab::remove(&lab)?;
        let text = match left.as_slice() {
            [] => format!("lab {lab} is down, nothing left behind\n"),
            left => self.format.bad(&format!("lab {lab} left behind: {}\n", left.join(", "))),
        };
        out.write_all(text.as_bytes()).map_err(|e| Error::system("write", e))?;
        Ok(left.is_empty())
    }

    /// Names of the labs that can be looked at from here.
    #[must_use]
    pub fn names(&self) -> BTreeSet<String> {
        self.labs()
    }

    /// For a lab of an ordinary user: runs this program with these arguments where the lab is, and returns its exit
    /// status. `None`: there is nothing to enter, the lab's files are here.
    ///
    /// # Errors
    ///
    /// [`Error::NotThere`] if the lab's processes are dead.
    pub fn inside(&self, lab: &str, args: &[String]) -> Result<Option<i32>, Error> {
        if !self.is_outside() {
            return Ok(None);
        }
        let process = Record::all().remove(lab).and_then(|record| record.anybody());
        let process = process.ok_or_else(|| Error::NotThere(format!("no lab {lab} of yours runs here")))?;
        let mut command = Command::new(&self.exe);
        confine::start_beside(command.arg0("nsm").args(args), process)?;
        let status = command.status().map_err(|e| Error::system("start inside the lab", e))?;
        Ok(Some(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))))
    }

    fn load(&self, file: &Path) -> Result<Scenario, Error> {
        let mut scenario = Scenario::load(file)?;
        if let Some(name) = &self.name {
            scenario.rename(name)?;
        }
        Ok(scenario)
    }

    /// Whether labs of this user are in namespaces that this process is not in.
    fn is_outside(&self) -> bool {
        !confine::is_privileged() && !confine::is_inside()
    }

    /// Labs of this machine that we can do something with.
    fn labs(&self) -> BTreeSet<String> {
        if self.is_outside() { Record::all().into_keys().collect() } else { State::labs() }
    }

    /// Runs this program, with other arguments, in the namespaces of a user's lab.
    fn beside(&self, lab: &str, args: &[&str]) -> Result<ExitStatus, Error> {
        let Some(record) = Record::all().remove(lab) else {
            return Err(Error::NotThere(format!("no lab {lab} of yours runs here")));
        };
        let Some(process) = record.anybody() else {
            // Its processes are dead, so the kernel has taken its namespaces and mounts away already.
            Record::forget(lab)?;
            return Err(Error::NotThere(format!("lab {lab} was killed; nothing of it is left")));
        };
        let mut command = Command::new(&self.exe);
        command.arg0("nsm").arg("lab");
        if self.format == Format::Json {
            command.arg("--json");
        }
        confine::start_beside(command.args(args), process)?;
        command.status().map_err(|e| Error::system("start inside the lab", e))
    }

    /// Starts a holder and listens to it until its work is done.
    fn start(
        &self,
        file: &Path,
        aim: Aim,
        chaos: Option<&Chaos>,
        interrupt: &Interrupt,
        out: &mut dyn Write,
    ) -> Result<Report, Error> {
        let scenario = self.load(file)?;
        let mut report = Report {
            lab: scenario.name.clone(),
            expected: match (aim, chaos) {
                (Aim::Up, _) => 0,
                (_, Some(_)) => 1,
                (_, None) => scenario.expect.len(),
            },
            ..Report::default()
        };
        let confined = !confine::is_privileged();
        if confined && let Some(record) = Record::all().get(&scenario.name) {
            match record.anybody() {
                Some(process) if process == record.holder => {
                    return Err(Error::Running { lab: scenario.name, pid: process.pid });
                }
                // Killed: its processes go before new ones come.
                _ => self.down(Some(&scenario.name), out).map(drop).or_else(|error| match error {
                    Error::NotThere(_) => Ok(()),
                    error => Err(error),
                })?,
            }
        }
        if let Format::Text { .. } = self.format {
            let text = format!("lab {} ({})\n", scenario.name, file.display());
            out.write_all(text.as_bytes()).map_err(|e| Error::system("write", e))?;
        }
        let mut child = self.spawn(file, aim, chaos, confined)?;
        if confined && let Some(record) = Record::of(child.id()) {
            record.save(&scenario.name)?;
        }
        interrupt.closes(child.stdin.take());

        let mut down = false;
        let mut detached = false;
        for line in child.stdout.take().into_iter().flat_map(|stdout| BufReader::new(stdout).lines()) {
            let Ok(line) = line else { break };
            let Ok(event) = serde_json::from_str::<Event>(&line) else {
                report.errors.push(format!("the holder says: {line}"));
                continue;
            };
            let leave = match event {
                Event::Up { .. } => aim == Aim::Up,
                Event::AllChecked => aim == Aim::RunAndKeep,
                _ => false,
            };
            down |= matches!(event, Event::Down { .. } | Event::Refused { .. });
            if chaos.is_some() && event == Event::AllChecked {
                // How many rounds fit into its time is known only now.
                report.expected = report.expectations.len().max(1);
            }
            report.take(event, self.format, out).map_err(|e| Error::system("write", e))?;
            if leave && let Some(mut control) = interrupt.take() {
                detached = writeln!(control, "{DETACH}").is_ok();
                break;
            }
        }
        if detached {
            return Ok(report);
        }
        let status = child.wait().map_err(|e| Error::system("wait for the holder", e))?;
        if !down {
            report.errors.push(Error::HolderGone(format!(" ({status})")).to_string());
            // Killed, or it could not even begin: what it left is found by name, unless that is another one's.
            if confined {
                let _ = self.down(Some(&report.lab), out);
            } else if !State::load(&report.lab).is_ok_and(|state| state.holder.is_alive()) {
                report.leftovers = lab::remove(&report.lab)?;
            }
        }
        if confined {
            Record::forget(&report.lab)?;
        }
        Ok(report)
    }

    fn spawn(&self, file: &Path, aim: Aim, chaos: Option<&Chaos>, confined: bool) -> Result<Child, Error> {
        // The holder's directory is /: it must not keep a file system busy.
        let file = fs::canonicalize(file).map_err(Error::files("find", file))?;
        let mut command = Command::new(&self.exe);
        command.arg0("nsm").args(["lab", "hold"]).arg(file);
        if let Some(name) = &self.name {
            command.args(["--name", name]);
        }
        if aim != Aim::Up {
            command.arg("--expect");
        }
        if let Some(chaos) = chaos {
            command.arg("--chaos").arg(serde_json::to_string(chaos).unwrap_or_default());
        }
        if aim != Aim::Run {
            command.arg("--stay");
        }
        command.current_dir("/").process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        if aim != Aim::Run {
            // A lab that stays must not hold somebody's terminal or pipe.
            command.stderr(Stdio::null());
        }
        if confined {
            confine::start_confined(&mut command);
        }
        command.spawn().map_err(|error| {
            if confined { Error::NoPrivileges(error) } else { Error::system("start the holder", error) }
        })
    }
}

// === private helpers ===

/// Ctrl-C and SIGTERM, for the holder that runs just now: it hears of them by the end of its stdin.
#[derive(Clone)]
struct Interrupt(Arc<Mutex<Interrupted>>);

#[derive(Default)]
struct Interrupted {
    happened: bool,
    control: Option<ChildStdin>,
}

impl Interrupt {
    fn listen() -> Result<Self, Error> {
        let interrupt = Self(Arc::default());
        let heard = interrupt.clone();
        on_signals(move |_| {
            let mut state = heard.0.lock();
            state.happened = true;
            state.control = None;
        })?;
        Ok(interrupt)
    }

    fn closes(&self, control: Option<ChildStdin>) {
        let mut state = self.0.lock();
        state.control = control.filter(|_| !state.happened);
    }

    fn take(&self) -> Option<ChildStdin> {
        self.0.lock().control.take()
    }
}

struct FoundPod {
    lab: String,
    name: String,
    node: Option<String>,
}

fn find_pod(labs: &BTreeSet<String>, pod: &str) -> Result<FoundPod, Error> {
    let mut found = Vec::new();
    let mut known = Vec::new();
    for state in labs.iter().filter_map(|lab| State::load(lab).ok()) {
        for (name, node) in state.namespaces {
            let full = format!("{}.{name}", state.lab);
            if pod == name || pod == full {
                found.push(FoundPod { lab: state.lab.clone(), name, node });
            }
            known.push(full);
        }
    }
    match (found.pop(), found.pop()) {
        (Some(one), None) => Ok(one),
        (None, _) if known.is_empty() => Err(Error::NotThere("no lab runs here".into())),
        (None, _) => Err(Error::NotThere(format!("no pod {pod}; there are {}", known.join(", ")))),
        (Some(a), Some(b)) => {
            Err(Error::NotThere(format!("{}.{pod} and {}.{pod} exist: say which", a.lab, b.lab)))
        }
    }
}

/// What whoever has left a lab running is told.
fn stands(lab: &str) -> String {
    format!("lab {lab} stands: `nsm lab exec POD -- CMD` looks inside, `nsm lab down {lab}` ends it")
}
