//! Unix sockets: who is at the other end, and a socket path of our own.
//!
//! The kernel remembers who connected (or, seen from the client, who listened). A pid can be reused once its
//! process is gone, so the peer is pinned by a pidfd: facts read from `/proc/PID` count only if the process is still
//! alive *after* they were read.
//!
//! A peer in a PID namespace that ours does not contain has no pid here: the kernel shows 0. Its pidfd still tells
//! its namespaces (Linux 6.11), so it is a peer as others are, but for what needs `/proc`: attestation.

use std::{
    fmt,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{
        AtFlags, FileType, FlockOperation, Mode, OFlags, RawMode, StatxFlags, chmod, fchmod, flock, fstat,
        makedev, open, statx,
    },
    io::Errno,
};

use crate::{Error, readable::readable};

/// Inode of the PID namespace that the machine starts with, `include/linux/proc_ns.h`.
const PROC_PID_INIT_INO: u64 = 0xEFFF_FFFC;
/// How long others may hold the lock of a socket's directory: a daemon that binds needs a moment.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// The process at the other end of a Unix socket, pinned. When connecting it is the one that listens.
#[derive(Debug, Clone)]
pub struct UnixPeer {
    /// `None`: in a PID namespace that is not visible here.
    pid: Option<u32>,
    uid: u32,
    gid: u32,
    /// `None` on kernels before 6.5 that show no pid either.
    pidfd: Option<Arc<OwnedFd>>,
    /// What stands for the network namespace of a simulated process.
    #[cfg(feature = "sim")]
    netns: Option<Arc<OwnedFd>>,
}

/// A namespace, or any file, by the numbers `stat` gives for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// Device number, `st_dev`.
    pub dev: u64,
    /// Inode number, `st_ino`.
    pub ino: u64,
}

/// A listening Unix socket; its file is removed when this is dropped, unless somebody else replaced it.
#[derive(Debug)]
pub struct UnixSocket {
    listener: std::os::unix::net::UnixListener,
    path: PathBuf,
    id: FileId,
    /// Whether the directory goes with the last socket in it.
    last_one_out: bool,
}

impl UnixPeer {
    /// Reads the peer's credentials (`SO_PEERCRED`) and pins it (`SO_PEERPIDFD`, Linux 6.5; `pidfd_open` before).
    ///
    /// # Errors
    /// Not a Unix stream socket, or the peer is already gone.
    pub fn of(socket: impl AsFd) -> io::Result<Self> {
        let socket = socket.as_fd();
        let (pid, uid, gid) = peer_pidfd::credentials(socket)?;
        let pidfd = match (peer_pidfd::open(socket), pid) {
            // Before Linux 6.5: a window remains between the peer's connect and this call.
            (Err(e), Some(pid)) if e.raw_os_error() == Some(libc::ENOPROTOOPT) => Some(open_pidfd(pid)?),
            (Err(e), None) if e.raw_os_error() == Some(libc::ENOPROTOOPT) => None,
            (pidfd, _) => Some(pidfd?),
        };
        Ok(Self {
            pid,
            uid,
            gid,
            pidfd: pidfd.map(Arc::new),
            #[cfg(feature = "sim")]
            netns: None,
        })
    }

    /// A process of a simulation, in the network namespace that this file stands for.
    #[cfg(feature = "sim")]
    #[must_use]
    pub fn simulated(pid: u32, netns: Arc<OwnedFd>) -> Self {
        Self { pid: Some(pid), uid: 0, gid: 0, pidfd: None, netns: Some(netns) }
    }

    /// The process id, valid while [`UnixPeer::is_alive`]; `None` for a peer in a PID namespace that is not visible here.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// The effective user id it had when it connected, as the user namespace here has it.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// The effective group id it had when it connected.
    pub fn gid(&self) -> u32 {
        self.gid
    }

    /// Has the process not exited yet, as far as is known?
    pub fn is_alive(&self) -> bool {
        let Some(pidfd) = &self.pidfd else { return true };
        let mut fds = [PollFd::new(&**pidfd, PollFlags::IN)];
        loop {
            return match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
                Err(Errno::INTR) => continue,
                result => result == Ok(0),
            };
        }
    }

    /// Waits until the process has exited.
    ///
    /// # Errors
    /// It cannot be waited for: nothing pins it.
    pub async fn ended(&self) -> io::Result<()> {
        let pidfd = self.pidfd.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        // A descriptor can be waited for once, and this one is everybody's.
        let exit = readable(pidfd.try_clone()?)?;
        exit.readable().await.map(drop)
    }

    /// The peer's network namespace, as it is now.
    ///
    /// # Errors
    /// The peer has exited, or may not be inspected.
    pub fn netns(&self) -> io::Result<OwnedFd> {
        #[cfg(feature = "sim")]
        if let Some(netns) = &self.netns {
            return netns.try_clone();
        }
        self.namespace(libc::PIDFD_GET_NET_NAMESPACE, "net")
    }

    /// Device and inode of the network namespace that the peer is in.
    ///
    /// # Errors
    /// The peer is gone, or may not be looked at.
    pub fn netns_id(&self) -> io::Result<FileId> {
        self.netns().and_then(FileId::of)
    }

    /// Whether it is in a container that we are not in: its PID namespace is neither ours nor the node's first one.
    ///
    /// # Errors
    /// The peer is gone, or nothing shows it: that takes Linux 6.11, and the right to look at it.
    pub fn is_contained(&self) -> io::Result<bool> {
        if self.pid.is_some() {
            // Ours or one below ours: it has a number in each on the way down, which everybody may read.
            let numbers = self.facts(|_, proc| {
                let status = fs::read_to_string(proc.join("status"))?;
                let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
                Ok(numbers.map_or(0, |numbers| numbers.split_ascii_whitespace().count()))
            })?;
            return Ok(numbers != 1);
        }
        let own = self.namespace(libc::PIDFD_GET_PID_NAMESPACE, "pid").and_then(FileId::of)?;
        Ok(own.ino != PROC_PID_INIT_INO)
    }

    /// What `/proc/PID/cgroup` says of it, as it is seen from here (`cgroups(7)`).
    ///
    /// # Errors
    /// The peer is gone, or not visible here.
    pub fn control_groups(&self) -> io::Result<String> {
        self.facts(|_, proc| fs::read_to_string(proc.join("cgroup")))
    }

    fn namespace(&self, which: libc::Ioctl, name: &str) -> io::Result<OwnedFd> {
        match self.pidfd.as_ref().map(|pidfd| peer_pidfd::namespace(pidfd.as_fd(), which)) {
            Some(Err(e)) if e.raw_os_error() == Some(libc::ESRCH) => Err(self.gone()),
            // Before Linux 6.11.
            Some(Err(e)) if e.raw_os_error() == Some(libc::ENOTTY) => self.of_proc(name),
            None => self.of_proc(name),
            Some(answer) => answer,
        }
    }

    fn of_proc(&self, name: &str) -> io::Result<OwnedFd> {
        self.facts(|_, proc| File::open(proc.join("ns").join(name)).map(OwnedFd::from))
    }

    /// Reads facts below `/proc/PID`, and makes sure that they were this process's.
    pub(crate) fn facts<T>(&self, read: impl FnOnce(u32, &Path) -> io::Result<T>) -> io::Result<T> {
        let pid = self.pid.ok_or_else(|| {
            io::Error::other(
                "the process is in a PID namespace that is not visible here; what has to look at it must run in the \
                 node's PID namespace (hostPID: true), or on Linux 6.11 where namespaces are enough",
            )
        })?;
        let facts = read(pid, Path::new(&format!("/proc/{pid}")));
        if self.is_alive() { facts } else { Err(self.gone()) }
    }

    fn gone(&self) -> io::Error {
        io::Error::new(io::ErrorKind::NotFound, format!("the peer, {self}, has exited"))
    }
}

/// `process 7`, or that it is not visible here.
impl fmt::Display for UnixPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "process {pid}"),
            None => f.write_str("a process in another PID namespace"),
        }
    }
}

impl FileId {
    /// Of what a path leads to.
    ///
    /// # Errors
    /// Those of `stat`.
    pub fn of_path(path: impl AsRef<Path>) -> io::Result<Self> {
        let meta = fs::metadata(path)?;
        Ok(Self { dev: meta.dev(), ino: meta.ino() })
    }

    /// Of an open file. Never waits for a file system, whoever runs it: a descriptor may come from anybody.
    ///
    /// # Errors
    /// Those of `statx`.
    pub fn of(file: impl AsFd) -> io::Result<Self> {
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = statx(file, c"", flags, StatxFlags::INO)?;
        Ok(Self { dev: makedev(stat.stx_dev_major, stat.stx_dev_minor), ino: stat.stx_ino })
    }
}

impl UnixSocket {
    /// Binds and listens at `path`: makes the directory, replaces the file of a dead daemon, refuses a live one.
    /// The file gets mode 0777 (`control-plane.md` 14.4): who may do what is decided by attestation and mTLS.
    ///
    /// # Errors
    /// [`Error::SocketInUse`] for a second daemon, [`Error::Socket`] for everything else, also for a directory whose lock
    /// somebody else holds for more than 2 s.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        Self::bind_as(path, 0o777, false)
    }

    /// As [`UnixSocket::bind`], with mode 0600 from its first moment; the directory is removed with the last socket in it.
    ///
    /// # Errors
    /// Those of [`UnixSocket::bind`].
    pub fn bind_private(path: &Path) -> Result<Self, Error> {
        Self::bind_as(path, 0o600, true)
    }

    fn bind_as(path: &Path, mode: RawMode, last_one_out: bool) -> Result<Self, Error> {
        let failed = |what| move |source| Error::Socket { path: path.into(), what, source };
        // Two daemons that start at once must not both find the old file dead and remove each other's.
        let _lock = lock_directory(directory(path)).map_err(failed("lock the directory of"))?;
        match try_connect(path) {
            // A listener whose backlog is full is alive, too.
            Ok(()) | Err(Errno::AGAIN) => return Err(Error::SocketInUse(path.into())),
            Err(Errno::NOENT) => {}
            Err(e @ Errno::CONNREFUSED) => {
                let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
                if !is_socket {
                    return Err(failed("replace what is no socket at")(e.into()));
                }
                fs::remove_file(path).map_err(failed("remove the stale"))?;
            }
            Err(e) => return Err(failed("check who listens at")(e.into())),
        }
        let (listener, id) = listen(path, mode).map_err(failed("bind"))?;
        Ok(Self { listener, path: path.into(), id, last_one_out })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A listener for the runtime, for as long as this lives.
    ///
    /// # Errors
    /// No runtime, or no descriptor left.
    pub fn listener(&self) -> io::Result<tokio::net::UnixListener> {
        tokio::net::UnixListener::from_std(self.listener.try_clone()?)
    }
}

impl Drop for UnixSocket {
    /// Nobody is left to tell if something fails.
    fn drop(&mut self) {
        if FileId::of_path(&self.path).is_ok_and(|id| id == self.id) {
            let _ = fs::remove_file(&self.path);
        }
        let directory = directory(&self.path);
        // Under its lock: who is about to bind in it holds that. It may be another by now, which somebody else has made
        // and locked. The kernel removes no directory that is not empty.
        if self.last_one_out
            && let Ok(lock) = File::open(directory)
            && lock_within(&lock, directory, Duration::from_millis(100)).is_ok()
            && still_at(directory, &lock).is_ok_and(|still| still)
        {
            let _ = fs::remove_dir(directory);
        }
    }
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes the directory and locks it; one that goes meanwhile, with the last socket in it, is made again.
fn lock_directory(directory: &Path) -> io::Result<File> {
    loop {
        fs::create_dir_all(directory)?;
        let lock = match File::open(directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            lock => lock?,
        };
        lock_within(&lock, directory, LOCK_PATIENCE)?;
        if still_at(directory, &lock)? {
            return Ok(lock);
        }
    }
}

/// Whether the directory of that name is the one that is open.
fn still_at(directory: &Path, open: &File) -> io::Result<bool> {
    Ok(FileId::of_path(directory).ok() == Some(FileId::of(open)?))
}

/// Listens, and sets the mode of the file by descriptors only: who else may write in the directory could put a link to
/// another file under the name at any moment.
fn listen(path: &Path, mode: RawMode) -> io::Result<(std::os::unix::net::UnixListener, FileId)> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // The file is made with this mode, less what the umask takes.
    fchmod(&socket, Mode::from_raw_mode(mode))?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    // As many callers may wait as the system allows.
    listen(&socket, -1)?;
    let file = open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let stat = fstat(&file)?;
    let own = rustix::process::geteuid().as_raw();
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket || stat.st_uid != own {
        return Err(io::Error::other("somebody has put another file in its place"));
    }
    if stat.st_mode & 0o777 != mode {
        chmod(format!("/proc/self/fd/{}", file.as_raw_fd()), Mode::from_raw_mode(mode))?;
    }
    Ok((socket.into(), FileId::of(&file)?))
}

/// Locks a directory. Whoever may read it can hold its lock: nobody waits for that for ever.
fn lock_within(lock: &File, dir: &Path, patience: Duration) -> io::Result<()> {
    let until = Instant::now() + patience;
    loop {
        match flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() < until => {
                thread::sleep(Duration::from_millis(20));
            }
            Err(Errno::AGAIN) => {
                return Err(io::Error::other(format!(
                    "another process has held the lock of {dir} for {patience:?}; `lslocks` names it: end it, or keep \
                     others from reading the directory",
                    dir = dir.display(),
                )));
            }
            locked => return Ok(locked?),
        }
    }
}

/// Without waiting, also for one that never accepts.
fn try_connect(path: &Path) -> Result<(), Errno> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &address)
}

fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("the kernel names an impossible peer"))?;
    Ok(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?)
}

/// `SO_PEERCRED` as plain numbers (rustix' type cannot say "pid 0") and `SO_PEERPIDFD`, which rustix lacks.
#[allow(unsafe_code)]
mod peer_pidfd {
    use std::{
        io, mem,
        os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    };

    /// `include/uapi/asm-generic/socket.h`, since Linux 6.5.
    const SO_PEERPIDFD: libc::c_int = 77;

    pub(super) fn credentials(socket: BorrowedFd<'_>) -> io::Result<(Option<u32>, u32, u32)> {
        let mut cred = libc::ucred { pid: 0, uid: 0, gid: 0 };
        // SAFETY: `ucred` is plain integers, which any bytes are valid for.
        unsafe { get(socket, libc::SO_PEERCRED, &mut cred)? };
        Ok((u32::try_from(cred.pid).ok().filter(|pid| *pid != 0), cred.uid, cred.gid))
    }

    /// A namespace of a process: `PIDFD_GET_*_NAMESPACE`, since Linux 6.11.
    pub(super) fn namespace(pidfd: BorrowedFd<'_>, which: libc::Ioctl) -> io::Result<OwnedFd> {
        // SAFETY: these commands take no argument and write no memory.
        let fd = unsafe { libc::ioctl(pidfd.as_raw_fd(), which, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor (close-on-exec) for us; nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    pub(super) fn open(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        let mut fd: libc::c_int = -1;
        // SAFETY: an integer, which any bytes are valid for.
        unsafe { get(socket, SO_PEERPIDFD, &mut fd)? };
        if fd < 0 {
            return Err(io::Error::other("the kernel gave no pidfd"));
        }
        // SAFETY: the kernel has just made this descriptor (close-on-exec) for us; nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// # Safety
    /// Any bytes must be a valid `T`.
    unsafe fn get<T>(socket: BorrowedFd<'_>, option: libc::c_int, value: &mut T) -> io::Result<()> {
        let size = mem::size_of::<T>();
        let mut len = libc::socklen_t::try_from(size).map_err(io::Error::other)?;
        // SAFETY: value and length are valid for writes of `len` bytes, and the kernel writes no more than that.
        let rc = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                std::ptr::from_mut(value).cast(),
                &raw mut len,
            )
        };
        if rc != 0 {
            return Err(io::Error::last_os_error());
        }
        if usize::try_from(len).is_ok_and(|len| len == size) {
            Ok(())
        } else {
            Err(io::Error::other("the kernel answered with another size"))
        }
    }
}
