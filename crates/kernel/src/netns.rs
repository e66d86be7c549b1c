//! Network namespaces: held by a descriptor, identified by device and inode, entered by a thread of their own.
//!
//! Which namespace a thread is in is a property of the *thread*. So nothing here ever changes the namespace of the
//! caller, but for [travellers](crate::travellers): [`Namespace::run`] starts a thread that enters, runs one synchronous
//! closure and ends. A netlink socket
//! belongs for ever to the namespace it was opened in and may be used from anywhere afterwards.
//!
//! ```no_run
//! # fn main() -> nsm_kernel::Result<()> {
//! use nsm_kernel::netns::Namespace;
//! let pod = Namespace::named("secure-intranet.client")?;
//! let forwarding = pod.run(|| std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward"))?;
//! # Ok(()) }
//! ```

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags, UnmountFlags, mount_bind, mount_bind_recursive, mount_change, unmount,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::sys;
use crate::travellers::Visit;

/// Where `ip netns` keeps its named namespaces.
pub const NAMED: &str = "/run/netns";

/// The file system that namespaces are files of: `NSFS_MAGIC` of `linux/magic.h`.
const NSFS: rustix::fs::FsWord = 0x6e73_6673;

/// The identity of a namespace while anything holds it: device and inode of its nsfs file. On the wire this is
/// `inode://<dev>/<ino>` (data-plane 2.2). A number may be used again after its namespace is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NsId {
    /// `st_dev`, as the raw number.
    pub dev: u64,
    /// `st_ino`.
    pub ino: u64,
}

/// An open network namespace. It lives at least as long as this does, so hold it no longer than the work takes.
#[derive(Debug)]
pub struct Namespace {
    fd: OwnedFd,
    id: NsId,
}

// === impl NsId ===

impl fmt::Display for NsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.dev, self.ino)
    }
}

impl FromStr for NsId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split_once('/')
            .and_then(|(dev, ino)| Some(Self { dev: dev.parse().ok()?, ino: ino.parse().ok()? }))
            .ok_or_else(|| format!("{text:?} is not a namespace id like 4/4026532281"))
    }
}

// === impl Namespace ===

impl Namespace {
    /// The namespace of the calling thread.
    pub fn current() -> Result<Self> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// The namespace of a process.
    pub fn of_process(pid: u32) -> Result<Self> {
        Self::open(format!("/proc/{pid}/ns/net"))
    }

    /// The one that `ip netns add NAME` made.
    pub fn named(name: &str) -> Result<Self> {
        Self::open(named_path(name)?)
    }

    /// The namespace behind a file: `/proc/PID/ns/net`, a mount of it, or `/proc/PID/fd/N`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
            .map_err(|e| failed(format!("open network namespace {}", path.display()), e))?;
        Self::from_fd(fd).map_err(|e| match e {
            Error::NotANamespace(_) => Error::NotANamespace(path.display().to_string()),
            other => other,
        })
    }

    /// Takes over a descriptor, for instance one that came over a Unix socket. It may be opened `O_PATH`, as upstream's
    /// programs open what they send.
    ///
    /// # Errors
    /// [`Error::NotANamespace`] if it refers to anything else.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let fd = opened(fd)?;
        if !sys::is_network_namespace(fd.as_fd()) {
            return Err(Error::NotANamespace("the descriptor".into()));
        }
        let stat = rustix::fs::fstat(&fd).map_err(|e| failed("identify a network namespace".into(), e))?;
        Ok(Self { fd, id: NsId { dev: stat.st_dev, ino: stat.st_ino } })
    }

    /// A new namespace without a name, empty but for its loopback device. It dies with its last holder.
    pub fn unnamed() -> Result<Self> {
        on_a_thread(|| {
            sys::unshare_net().map_err(|e| failed("make a network namespace".into(), e))?;
            Self::current()
        })?
    }

    /// A new namespace with a name, as `ip netns add` makes it (a mount of its nsfs file under `/run/netns`), without
    /// a fork. It lives until [`Namespace::delete_named`], holders or not.
    pub fn create_named(name: &str) -> Result<Self> {
        let path = named_path(name)?;
        let make = |e| failed(format!("make network namespace {name}"), e);
        prepare_named().map_err(make)?;
        // The file is the place for the mount, and O_EXCL makes the name ours.
        let flags = OFlags::RDONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        drop(rustix::fs::open(&path, flags, Mode::empty()).map_err(make)?);
        let made = on_a_thread(|| {
            sys::unshare_net().map_err(make)?;
            mount_bind("/proc/thread-self/ns/net", &path).map_err(make)?;
            Self::current()
        });
        made.and_then(|made| made).inspect_err(|_| {
            let _ = unmount(&path, UnmountFlags::DETACH);
            let _ = fs::remove_file(&path);
        })
    }

    /// Takes the name away, as `ip netns del` does; the namespace dies when nothing else holds it.
    /// That there is no such name is no error: the answer is `false`.
    pub fn delete_named(name: &str) -> Result<bool> {
        let path = named_path(name)?;
        match unmount(&path, UnmountFlags::DETACH) {
            // Not a mount: what a creator left that was killed half-way. It still has a file.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(e) => return Err(failed(format!("unmount network namespace {name}"), e)),
        }
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(Error::Namespace { what: format!("remove {}", path.display()), source }),
        }
    }

    /// Names under `/run/netns`, sorted, also those whose namespace cannot be opened.
    pub fn list_named() -> Result<Vec<String>> {
        let entries = match fs::read_dir(NAMED) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(Error::Namespace { what: format!("list {NAMED}"), source }),
        };
        let mut names: Vec<_> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        Ok(names)
    }

    /// The namespace with that identity, if any process that we may look at or any nsfs mount refers to it.
    ///
    /// This reads all of `/proc`: it is for recovery, where the descriptor that came with a request is gone.
    pub fn find(id: NsId) -> Result<Option<Self>> {
        if let Some(found) = Self::open("/proc/thread-self/ns/net").ok().filter(|ns| ns.id == id) {
            return Ok(Some(found));
        }
        let mounted =
            mounted().unwrap_or_default().into_iter().filter(|(ino, _)| *ino == id.ino).map(|(_, path)| path);
        let processes =
            fs::read_dir("/proc").map_err(|source| Error::Namespace { what: "list /proc".into(), source })?;
        let processes = processes.flatten().map(|entry| entry.path()).filter(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.bytes().all(|b| b.is_ascii_digit()))
        });
        for path in mounted.chain(processes.map(|path| path.join("ns/net"))) {
            // A process may end, or be another user's, while we look: then it is not the one.
            let Ok(stat) = rustix::fs::stat(&path) else { continue };
            if stat.st_ino == id.ino
                && stat.st_dev == id.dev
                && let Ok(found) = Self::open(&path)
                && found.id == id
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Who this is.
    pub fn id(&self) -> NsId {
        self.id
    }

    /// A second handle of the same namespace.
    pub fn try_clone(&self) -> Result<Self> {
        let fd = self
            .fd
            .try_clone()
            .map_err(|source| Error::Namespace { what: format!("dup {}", self.id), source })?;
        Ok(Self { fd, id: self.id })
    }

    /// Runs a closure inside the namespace, on a thread that does nothing else and ends with it, so the caller's
    /// thread is never in a foreign namespace, whatever the closure does; a traveller's is, until the closure ends. A
    /// panic of the closure is the caller's.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        on_a_thread(|| self.enter().map(|()| work()))?
    }

    /// Moves the calling thread, which is one that ends soon or comes home.
    pub(crate) fn enter(&self) -> Result<()> {
        move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|e| failed(format!("enter network namespace {}", self.id), e))
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Namespace> for OwnedFd {
    fn from(ns: Namespace) -> Self {
        ns.fd
    }
}

// === private helpers ===

/// Does jobs, each in a namespace, one after the other until one fails, all on one thread that ends with them, or on
/// the traveller that calls. (A thread for each would wait for its turn on a busy machine each time.)
pub(crate) fn visit<'n, J: Send, T: Send>(
    jobs: impl IntoIterator<Item = (&'n Namespace, J)> + Send,
    mut work: impl FnMut(J) -> Result<T> + Send,
) -> Result<Vec<T>> {
    on_a_thread(|| jobs.into_iter().map(|(ns, job)| ns.enter().and_then(|()| work(job))).collect())?
}

fn failed(what: String, errno: Errno) -> Error {
    Error::Namespace { what, source: errno.into() }
}

fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    if let Some(_visit) = Visit::begin() {
        return Ok(work());
    }
    thread::scope(|scope| {
        let thread =
            thread::Builder::new().name("netns".into()).spawn_scoped(scope, work).map_err(|source| {
                Error::Namespace { what: "start a thread that enters a network namespace".into(), source }
            })?;
        thread.join().or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Only a plain file name may become a path under `/run/netns`.
fn named_path(name: &str) -> Result<PathBuf> {
    if name.is_empty() || name == "." || name == ".." || name.len() > 255 || name.contains(['/', '\0']) {
        return Err(Error::NotANamespace(format!("the name {name:?}")));
    }
    Ok(Path::new(NAMED).join(name))
}

/// As `ip netns`: a directory whose mounts are seen in other mount namespaces, and vanish there too when unmounted.
fn prepare_named() -> rustix::io::Result<()> {
    fs::create_dir_all(NAMED).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    let share = || mount_change(NAMED, MountPropagationFlags::SHARED | MountPropagationFlags::REC);
    match share() {
        Err(Errno::INVAL) => {
            mount_bind_recursive(NAMED, NAMED)?;
            share()
        }
        other => other,
    }
}

/// Inode and path of every nsfs file that is mounted somewhere, from `/proc/self/mountinfo` (man 5 proc): its root
/// reads `net:[4026532281]`.
fn mounted() -> io::Result<Vec<(u64, PathBuf)>> {
    let table = fs::read_to_string("/proc/thread-self/mountinfo")?;
    Ok(table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(3);
            let ino = fields.next()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()?;
            // Blanks and backslashes of the path are written as octal escapes.
            Some((ino, unescape(fields.next()?)))
        })
        .collect())
}

/// A descriptor that one can ask, for one that only names its file. Nothing but a namespace is opened for it: opening a
/// file of another kind could wait, or do something.
fn opened(fd: OwnedFd) -> Result<OwnedFd> {
    let identify = |e| failed("identify a network namespace".into(), e);
    let only_named = rustix::fs::fcntl_getfl(&fd).map_err(identify)?.contains(OFlags::PATH);
    if !only_named || rustix::fs::fstatfs(&fd).map_err(identify)?.f_type != NSFS {
        return Ok(fd);
    }
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| failed("open a network namespace that came by name only".into(), e))
}

fn unescape(field: &str) -> PathBuf {
    ["\\040", "\\011", "\\012", "\\134"]
        .into_iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(field.to_owned(), |text, (code, plain)| text.replace(code, plain))
        .into()
}
