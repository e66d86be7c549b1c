//! One lab: building it from its plan, its record for other processes, and removing it whatever became of it.
//!
//! Removing needs no memory of building: everything of a lab is found by its name (namespaces `<lab>.…`, the processes
//! in them, the directory), so the next `up` or `down` clears what a killed lab left.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nsm_api::resource;
use nsm_kernel::netns::Namespace;
use parking_lot::Mutex;
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::disk;
use crate::dns::DnsServer;
use crate::network;
use crate::plan::{Attested, BETWEEN, Paths, Plan, Process, ROOT};
use crate::process::{Condition, ProcessId, Program, Supervisor};
use crate::serve::HttpServer;

/// How long a process may take to become ready.
const READY: Duration = Duration::from_secs(15);
/// How long processes may take to end when asked to, before they are killed.
const GRACE: Duration = Duration::from_secs(3);
/// How long the kernel may take to end what was killed.
const KILLED: Duration = Duration::from_secs(5);

/// The record of a lab that runs, `/run/nsm/lab/<lab>/state.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// The lab's name.
    pub lab: String,
    /// The scenario file.
    pub file: PathBuf,
    /// The process that watches over it.
    pub holder: ProcessId,
    /// When it was begun, in seconds since 1970.
    pub since: u64,
    /// Its namespaces without the lab's prefix; pods with their node.
    pub namespaces: Vec<(String, Option<String>)>,
    /// Its processes.
    pub processes: Vec<ProcessState>,
}

/// A process in a [`State`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessState {
    /// Its name in the plan.
    pub name: String,
    /// Its namespace without the lab's prefix.
    pub namespace: String,
    /// Which process it is.
    #[serde(flatten)]
    pub id: ProcessId,
    /// What is known of it.
    pub condition: Condition,
}

/// A lab that stands, for whoever wants to do more to it than a scenario can say: tests of the mesh.
/// It stays until [`Lab::down`].
#[derive(Debug)]
pub struct Lab {
    /// What it was built from.
    pub plan: Plan,
    /// Its processes.
    pub supervisor: Supervisor,
    file: PathBuf,
    exe: PathBuf,
    namespaces: Mutex<BTreeMap<String, Arc<Namespace>>>,
    /// With the pods that they are in.
    servers: Mutex<Vec<(String, HttpServer)>>,
    dns_servers: Mutex<Vec<(String, DnsServer)>>,
    since: u64,
    /// One writes what identity shall know at a time.
    telling: Mutex<()>,
    /// Held while this process lives; the kernel lets go of it whatever kills us.
    _lock: OwnedFd,
}

// === impl State ===

impl State {
    /// Whether its holder and all its processes run and are ready.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        let well = |process: &ProcessState| process.condition == Condition::Ready && process.id.is_alive();
        self.holder.is_alive() && self.processes.iter().all(well)
    }

    /// Reads the record of a lab.
    ///
    /// # Errors
    ///
    /// [`Error::NotThere`] if there is none, [`Error::Read`] if it is not readable.
    pub fn load(lab: &str) -> Result<Self, Error> {
        let path = Paths::new(lab).state();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NotThere(format!(
                    "no lab {lab} runs here; `nsm lab status` lists those that do"
                )));
            }
            Err(source) => return Err(Error::Read { path, source }),
        };
        serde_json::from_slice(&text).map_err(|error| Error::Read { path, source: error.into() })
    }

    /// Names of all labs that run or left something here.
    #[must_use]
    pub fn labs() -> BTreeSet<String> {
        let directories = fs::read_dir(ROOT).into_iter().flatten().flatten();
        directories.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }
}

// === impl Lab ===

impl Lab {
    /// Builds everything and waits until it is ready; `progress` hears of each step.
    ///
    /// On failure nothing is left: what was made is removed before this returns.
    ///
    /// # Errors
    ///
    /// [`Error::Running`] if there is one of that name, or whatever could not be made or did not become ready.
    pub fn build(
        plan: Plan,
        file: &Path,
        exe: &Path,
        supervisor: Supervisor,
        progress: &mut dyn FnMut(String),
    ) -> Result<Self, Error> {
        let lock = lock(&plan.lab)?;
        // A killed predecessor of that name: nothing of it may be mistaken for ours.
        let names = namespaces_of(&plan.lab)?;
        if !names.is_empty() {
            progress(format!("removing what a killed lab left: {} namespaces", names.len()));
        }
        sweep_kernel(&plan.lab)?;
        disk::remove(&plan.paths())?;
        empty(&plan.paths().root)?;
        let lab = Self {
            plan,
            supervisor,
            file: file.to_owned(),
            exe: exe.to_owned(),
            namespaces: Mutex::default(),
            servers: Mutex::default(),
            dns_servers: Mutex::default(),
            since: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            telling: Mutex::default(),
            _lock: lock,
        };
        let built =
            lab.write_state().and_then(|()| lab.lay_out(progress)).and_then(|()| lab.start_all(progress));
        match built {
            Ok(()) => Ok(lab),
            Err(error) => {
                lab.down();
                Err(error)
            }
        }
    }

    /// A namespace by its name in the scenario.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchPod`].
    pub fn namespace(&self, name: &str) -> Result<Arc<Namespace>, Error> {
        let namespaces = self.namespaces.lock();
        namespaces.get(name).cloned().ok_or_else(|| Error::NoSuchPod {
            lab: self.plan.lab.clone(),
            name: name.to_owned(),
            known: namespaces.keys().cloned().collect(),
        })
    }

    /// Lets go of a pod's namespace and takes its name away; it ends when its last process does.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn remove_namespace(&self, pod: &str) -> Result<(), Error> {
        self.servers.lock().retain(|(of, _)| of != pod);
        self.dns_servers.lock().retain(|(of, _)| of != pod);
        self.namespaces.lock().remove(pod);
        let removed = Namespace::delete_named(&self.plan.namespace(pod));
        removed.map(drop).map_err(Error::kernel(format!("remove namespace {pod}")))
    }

    /// Makes the namespace of a pod again that was removed, with all of its own but cables and processes.
    ///
    /// # Errors
    ///
    /// As when the lab is built.
    pub fn restore_namespace(&self, pod: &str) -> Result<(), Error> {
        let made = Namespace::create_named(&self.plan.namespace(pod));
        let made = Arc::new(made.map_err(Error::kernel(format!("make namespace {pod}")))?);
        network::connect(&BTreeMap::from([(pod.to_owned(), made.clone())]), &self.plan.bridge, &[])?;
        self.namespaces.lock().insert(pod.to_owned(), made);
        self.furnish(&|of| of == pod, &mut |_| {})
    }

    /// Puts a NetworkService resource in place of that of the same name, in the file that the registry follows.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or written.
    pub fn apply(&self, service: &str) -> Result<(), Error> {
        let path = self.plan.paths().network_services();
        let text = fs::read_to_string(&path).map_err(Error::files("read", &path))?;
        let name = |text: &str| resource::parse(text).ok()?.services.pop().map(|service| service.name);
        let others = text.split(BETWEEN).filter(|other| name(other) != name(service));
        let all: Vec<_> = others.chain([service]).map(|text| format!("{}\n", text.trim_end())).collect();
        write_atomically(&path, all.join(BETWEEN).as_bytes())
    }

    /// Starts a process of the plan, for the first time or again.
    ///
    /// # Errors
    ///
    /// A process that the plan does not have, or that the system does not start.
    pub fn start(&self, name: &str) -> Result<(), Error> {
        let process = self
            .plan
            .processes
            .iter()
            .find(|process| process.name == name)
            .ok_or_else(|| Error::NotThere(format!("the plan has no process {name}")))?;
        let at = self.plan.paths();
        let mut env = process.env.clone();
        let introspect = at.introspect().to_string_lossy().into_owned();
        env.entry("NSM_INTROSPECT_DIR".into()).or_insert(introspect);
        for key in ["PATH", "NSM_LOG_LEVEL", "RUST_BACKTRACE"] {
            if let Ok(value) = std::env::var(key) {
                env.entry(key.into()).or_insert(value);
            }
        }
        let program = Program {
            name: name.to_owned(),
            exe: process.exe.clone().unwrap_or_else(|| self.exe.clone()),
            args: process.args.clone(),
            env,
            log: at.log(name),
            notify: at.notify(name),
        };
        self.supervisor.start(&program, &*self.namespace(&process.namespace)?)?;
        if process.attested != Attested::ByNamespace {
            self.write_identity_config()?;
        }
        Ok(())
    }

    /// How many tasks each process that tells of itself has under way, by pid.
    pub(crate) fn tasks(&self) -> BTreeMap<u32, u64> {
        #[derive(serde::Deserialize)]
        struct Told {
            pid: u32,
            tasks: u64,
        }
        let mut get = Command::new(&self.exe);
        get.arg0("nsm").args(["get", "processes", "--output", "json"]);
        get.env("NSM_INTROSPECT_DIR", self.plan.paths().introspect()).stdin(Stdio::null());
        let told = get.output().map(|output| output.stdout).unwrap_or_default();
        let told: Vec<Told> = serde_json::from_slice(&told).unwrap_or_default();
        told.into_iter().map(|process| (process.pid, process.tasks)).collect()
    }

    /// Records what is known, for `status`, `exec` and `down`.
    pub(crate) fn write_state(&self) -> Result<(), Error> {
        let path = self.plan.paths().state();
        let namespace_of = |name: &str| {
            let process = self.plan.processes.iter().find(|process| process.name == name);
            process.map(|process| process.namespace.clone()).unwrap_or_default()
        };
        let node_of = |name: &str| {
            let pod = self.plan.pods.iter().find(|pod| pod.pod == name);
            pod.map(|pod| pod.node.clone())
        };
        let own = ProcessId::own()
            .ok_or_else(|| Error::system("read /proc/self/stat", io::Error::from(io::ErrorKind::NotFound)))?;
        let state = State {
            lab: self.plan.lab.clone(),
            file: self.file.clone(),
            holder: own,
            since: self.since,
            namespaces: self.plan.namespaces.iter().map(|name| (name.clone(), node_of(name))).collect(),
            processes: self
                .supervisor
                .processes()
                .into_iter()
                .map(|(name, id, condition)| ProcessState {
                    namespace: namespace_of(&name),
                    name,
                    id,
                    condition,
                })
                .collect(),
        };
        let text =
            serde_json::to_vec_pretty(&state).map_err(|error| Error::files("write", &path)(error.into()))?;
        write_atomically(&path, &text)
    }

    /// Ends all processes, clients first because they close their wires, then removes everything.
    /// Returns what could not be removed.
    pub fn down(&self) -> Vec<String> {
        self.servers.lock().clear();
        self.dns_servers.lock().clear();
        let names = |client: bool| -> Vec<&str> {
            let of_kind = self.plan.processes.iter().filter(|process| process.client == client);
            of_kind.map(|process| process.name.as_str()).collect()
        };
        for group in [names(true), names(false)] {
            self.supervisor.end_all(&group, Signal::TERM);
            if self.supervisor.wait_end(&group, GRACE).is_err() {
                self.supervisor.end_all(&group, Signal::KILL);
                // What the kernel does not end now, the sweep reports.
                let _ = self.supervisor.wait_end(&group, KILLED);
            }
        }
        match sweep_kernel(&self.plan.lab).and_then(|()| remove_directory(&self.plan.lab)) {
            Ok(()) => leftovers(&self.plan.lab),
            Err(error) => {
                let mut left = vec![error.chain()];
                left.extend(leftovers(&self.plan.lab));
                left
            }
        }
    }

    /// Namespaces, cables, sysctls, files.
    fn lay_out(&self, progress: &mut dyn FnMut(String)) -> Result<(), Error> {
        let at = self.plan.paths();
        let nodes = self.plan.nodes().into_iter();
        for name in nodes.chain(["logs", "notify"]) {
            let path = at.root.join(name);
            fs::create_dir_all(&path).map_err(Error::files("make directory", path))?;
        }
        disk::make(&self.plan)?;
        let began = Instant::now();
        let plan = &self.plan;
        let made = thread::scope(|scope| {
            let threads: Vec<_> = plan
                .namespaces
                .iter()
                .map(|name| {
                    let full = plan.namespace(name);
                    (name, scope.spawn(move || Namespace::create_named(&full)))
                })
                .collect();
            threads.into_iter().map(|(name, thread)| (name.clone(), thread.join())).collect::<Vec<_>>()
        });
        for (name, made) in made {
            let made =
                made.map_err(|_| Error::system("make namespaces", io::Error::other("a thread panicked")))?;
            let namespace = made.map_err(Error::kernel(format!("make namespace {name}")))?;
            self.namespaces.lock().insert(name, Arc::new(namespace));
        }
        network::connect(&self.namespaces.lock(), &self.plan.bridge, &self.plan.cables)?;
        let (pods, cables) = (self.plan.pods.len(), self.plan.cables.len());
        let nodes = self.plan.namespaces.len() - pods - 1;
        progress(format!(
            "{nodes} nodes, {pods} pods: {} namespaces and {cables} cables in {}",
            self.plan.namespaces.len(),
            crate::expect::ms(began.elapsed())
        ));
        for file in &self.plan.files {
            fs::write(&file.path, &file.content).map_err(Error::files("write", &file.path))?;
        }
        self.furnish(&|_| true, progress)?;
        self.write_identity_config()
    }

    /// Sysctls and servers of the namespaces that are meant.
    fn furnish(&self, of: &dyn Fn(&str) -> bool, progress: &mut dyn FnMut(String)) -> Result<(), Error> {
        for sysctl in self.plan.sysctls.iter().filter(|sysctl| of(&sysctl.namespace)) {
            self.namespace(&sysctl.namespace)?
                .set_sysctl(&sysctl.key.replace('.', "/"), &sysctl.value)
                .map_err(Error::kernel(format!("set {} in {}", sysctl.key, sysctl.namespace)))?;
        }
        for server in self.plan.servers.iter().filter(|server| of(&server.pod)) {
            let started = HttpServer::start(&*self.namespace(&server.pod)?, &server.pod, &server.ports)?;
            self.servers.lock().push((server.pod.clone(), started));
            progress(format!("{} serves HTTP on {:?}", server.pod, server.ports));
        }
        for server in self.plan.dns_servers.iter().filter(|server| of(&server.pod)) {
            let started =
                DnsServer::start(&*self.namespace(&server.pod)?, &server.pod, server.names.clone())?;
            self.dns_servers.lock().push((server.pod.clone(), started));
            progress(format!("{} serves DNS: {} names", server.pod, server.names.len()));
        }
        Ok(())
    }

    /// Starts each process as soon as those it needs are ready.
    fn start_all(&self, progress: &mut dyn FnMut(String)) -> Result<(), Error> {
        let mut waiting: Vec<&Process> = self.plan.processes.iter().collect();
        let mut announced = BTreeSet::new();
        while announced.len() < self.plan.processes.len() {
            let ready = self.supervisor.ready();
            let new: Vec<_> = ready.difference(&announced).cloned().collect();
            if !new.is_empty() {
                progress(format!("ready: {}", new.join(", ")));
                announced.extend(new);
            }
            let (now, later): (Vec<_>, Vec<_>) = waiting
                .into_iter()
                .partition(|process| process.after.iter().all(|name| ready.contains(name)));
            waiting = later;
            for process in now {
                self.start(&process.name)?;
            }
            let pending: Vec<_> = self
                .plan
                .processes
                .iter()
                .map(|process| process.name.as_str())
                .filter(|name| {
                    !announced.contains(*name) && !waiting.iter().any(|process| process.name == **name)
                })
                .collect();
            if !pending.is_empty() {
                self.supervisor.wait_any_ready(&pending, READY)?;
            }
        }
        Ok(())
    }

    /// Tells identity which daemons run now, and who else is who: after a daemon was started by other means than
    /// [`Lab::start`].
    ///
    /// # Errors
    ///
    /// A file that cannot be written.
    pub fn write_identity_config(&self) -> Result<(), Error> {
        let _telling = self.telling.lock();
        let alive =
            self.supervisor.processes().into_iter().filter(|(_, _, c)| !matches!(c, Condition::Ended(_)));
        let running = alive.map(|(name, id, _)| (name, (id.pid, id.start))).collect();
        write_atomically(&self.plan.paths().identity_config(), self.plan.identity_config(&running).as_bytes())
    }
}

/// Ends a lab and removes everything of it, also if its holder was killed; returns what could not be removed.
///
/// # Errors
///
/// What the kernel says when a namespace or a file cannot be removed.
pub fn remove(lab: &str) -> Result<Vec<String>, Error> {
    if let Ok(state) = State::load(lab)
        && state.holder.is_alive()
    {
        state.holder.signal(Signal::TERM);
        // It ends its processes itself: both groups may use their grace.
        if !gone_within(&[state.holder], GRACE * 2 + KILLED) {
            state.holder.signal(Signal::KILL);
            gone_within(&[state.holder], KILLED);
        }
    }
    sweep_kernel(lab)?;
    remove_directory(lab)?;
    Ok(leftovers(lab))
}

/// Everything that a lab of that name has here.
#[must_use]
pub fn leftovers(lab: &str) -> Vec<String> {
    let mut left = Vec::new();
    for name in namespaces_of(lab).unwrap_or_default() {
        left.push(format!("namespace {name}"));
    }
    left.extend(processes_in(lab).iter().map(|id| format!("process {}", id.pid)));
    let root = Paths::new(lab).root;
    if root.exists() {
        left.push(format!("directory {}", root.display()));
    }
    left
}

// === private helpers ===

/// The lab's directory, locked: one holder at a time, and none that has to be believed by a pid in a file.
fn lock(lab: &str) -> Result<OwnedFd, Error> {
    let root = Paths::new(lab).root;
    loop {
        fs::create_dir_all(&root).map_err(Error::files("make directory", &root))?;
        let failed = |errno: rustix::io::Errno| Error::files("lock", &root)(errno.into());
        let directory = match rustix::fs::open(&root, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(directory) => directory,
            Err(rustix::io::Errno::NOENT) => continue, // removed in between by one that just ended
            Err(errno) => return Err(failed(errno)),
        };
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let pid = State::load(lab).map_or(0, |state| state.holder.pid);
                return Err(Error::Running { lab: lab.to_owned(), pid });
            }
            Err(errno) => return Err(failed(errno)),
        }
        // Whoever held it before may have removed the directory that we opened.
        let ours = rustix::fs::fstat(&directory).map_err(failed)?;
        if fs::metadata(&root).is_ok_and(|there| there.ino() == ours.st_ino) {
            return Ok(directory);
        }
    }
}

fn empty(root: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(root).map_err(Error::files("list", root))?.flatten() {
        let path = entry.path();
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let removed = if is_directory { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(Error::files("remove", path))?;
    }
    Ok(())
}

fn remove_directory(lab: &str) -> Result<(), Error> {
    let paths = Paths::new(lab);
    disk::remove(&paths)?;
    let root = paths.root;
    match fs::remove_dir_all(&root) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(Error::files("remove", root)(error));
        }
        _ => {}
    }
    // Those above stay if they hold anything else.
    let _ = fs::remove_dir(ROOT);
    let _ = Path::new(ROOT).parent().map(fs::remove_dir);
    Ok(())
}

/// Processes in the lab's namespaces, then the namespaces.
fn sweep_kernel(lab: &str) -> Result<(), Error> {
    for signal in [Signal::TERM, Signal::KILL] {
        let processes = processes_in(lab);
        for process in &processes {
            process.signal(signal);
        }
        if gone_within(&processes, GRACE) {
            break;
        }
    }
    let names = namespaces_of(lab)?;
    for name in &names {
        Namespace::delete_named(name).map_err(Error::kernel(format!("remove namespace {name}")))?;
    }
    Ok(())
}

fn namespaces_of(lab: &str) -> Result<Vec<String>, Error> {
    let prefix = format!("{lab}.");
    let names = Namespace::list_named().map_err(Error::kernel("list namespaces"))?;
    Ok(names.into_iter().filter(|name| name.starts_with(&prefix)).collect())
}

/// Every process that is in one of the lab's namespaces: ours, and shells and dumps that somebody runs in there.
fn processes_in(lab: &str) -> Vec<ProcessId> {
    let names = namespaces_of(lab).unwrap_or_default();
    let ids: BTreeSet<_> = names
        .iter()
        .filter_map(|name| Namespace::named(name).ok())
        .map(|namespace| (namespace.id().dev, namespace.id().ino))
        .collect();
    let inside = pids().filter(|pid| *pid != std::process::id()).filter(|pid| {
        !ids.is_empty()
            && fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|stat| ids.contains(&(stat.dev(), stat.ino())))
    });
    let mut processes: Vec<_> = inside.filter_map(ProcessId::of).collect();
    // Somebody may have taken the name of a namespace away; the record still knows who ran there.
    let recorded = State::load(lab).into_iter().flat_map(|state| state.processes).map(|process| process.id);
    processes.extend(recorded.filter(ProcessId::is_alive));
    processes
}

/// All pids that can be seen.
pub(crate) fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn gone_within(processes: &[ProcessId], within: Duration) -> bool {
    let end = Instant::now() + within;
    while processes.iter().any(ProcessId::is_alive) {
        if Instant::now() >= end {
            return false;
        }
        thread::sleep(Duration::from_millis(2));
    }
    true
}

pub(crate) fn write_atomically(path: &Path, text: &[u8]) -> Result<(), Error> {
    // Its own, whoever else writes this file now, or one that is called alike.
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    let mut new = path.as_os_str().to_owned();
    new.push(format!(".{}.new", WRITTEN.fetch_add(1, Ordering::Relaxed)));
    let new = PathBuf::from(new);
    let written = File::create(&new).and_then(|mut file| io::Write::write_all(&mut file, text));
    let renamed = written.and_then(|()| fs::rename(&new, path)).inspect_err(|_| drop(fs::remove_file(&new)));
    renamed.map_err(Error::files("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_called_alike_are_written_side_by_side() {
        let directory = tempfile::tempdir().unwrap();
        thread::scope(|scope| {
            for name in ["identity.yaml", "identity.clock", "identity.clock"] {
                let path = directory.path().join(name);
                scope.spawn(move || {
                    for _ in 0..200 {
                        write_atomically(&path, name.as_bytes()).unwrap();
                        assert_eq!(fs::read_to_string(&path).unwrap(), name);
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }
}
