//! Unix sockets: who is at the other end, and a socket path of our own.
//!
//! The kernel remembers who connected (or, seen from the client, who listened). A pid can be reused once its
//! process is gone, so the peer is pinned by a pidfd: facts read from `/proc/PID` count only if the process is still
//! alive *after* they were read.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{AtFlags, FlockOperation, StatxFlags, flock, makedev, statx},
    io::Errno,
};

use crate::Error;

/// How long others may hold the lock of a socket's directory: a daemon that binds needs a moment.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// The process at the other end of a Unix socket, pinned. When connecting it is the one that listens.
#[derive(Debug, Clone)]
pub struct UnixPeer {
    pid: u32,
    uid: u32,
    gid: u32,
    pidfd: Arc<OwnedFd>,
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
}

impl UnixPeer {
    /// Reads the peer's credentials (`SO_PEERCRED`) and pins it (`SO_PEERPIDFD`, Linux 6.5; `pidfd_open` before).
    ///
    /// # Errors
    /// Not a Unix stream socket, the peer is already gone, or it lives in a PID namespace that is not visible here.
    pub fn of(socket: impl AsFd) -> io::Result<Self> {
        let socket = socket.as_fd();
        let (pid, uid, gid) = peer_pidfd::credentials(socket)?;
        if pid == 0 {
            return Err(io::Error::other("the peer's process is not visible in this PID namespace"));
        }
        let pidfd = match peer_pidfd::open(socket) {
            // Before Linux 6.5: a window remains between the peer's connect and this call.
            Err(e) if e.raw_os_error() == Some(libc::ENOPROTOOPT) => open_pidfd(pid)?,
            other => other?,
        };
        Ok(Self { pid, uid, gid, pidfd: Arc::new(pidfd) })
    }

    /// The process id, valid while [`UnixPeer::is_alive`].
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The effective user id it had when it connected.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// The effective group id it had when it connected.
    pub fn gid(&self) -> u32 {
        self.gid
    }

    /// Refers to the process even after its pid was reused; readable once it has exited.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Has the process not exited yet?
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&*self.pidfd, PollFlags::IN)];
        loop {
            return match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
                Err(Errno::INTR) => continue,
                result => result == Ok(0),
            };
        }
    }

    /// The peer's network namespace, as it is now.
    ///
    /// # Errors
    /// The peer has exited, or may not be inspected.
    pub fn netns(&self) -> io::Result<OwnedFd> {
        self.facts(|proc| std::fs::File::open(proc.join("ns/net")).map(OwnedFd::from))
    }

    /// Device and inode of the network namespace that the peer is in.
    ///
    /// # Errors
    /// The peer is gone, or may not be looked at.
    pub fn netns_id(&self) -> io::Result<FileId> {
        self.facts(|proc| FileId::of_path(proc.join("ns/net")))
    }

    /// Reads facts below `/proc/PID`, and makes sure that they were this process's.
    pub(crate) fn facts<T>(&self, read: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
        let facts = read(Path::new(&format!("/proc/{}", self.pid)));
        if !self.is_alive() {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("the peer, process {}, has exited", self.pid),
            ));
        }
        facts
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
        let failed = |what| move |source| Error::Socket { path: path.into(), what, source };
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        fs::create_dir_all(dir).map_err(failed("make the directory of"))?;
        // Two daemons that start at once must not both find the old file dead and remove each other's.
        let lock = File::open(dir).map_err(failed("open the directory of"))?;
        lock_within(&lock, dir, LOCK_PATIENCE).map_err(failed("lock the directory of"))?;
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
        let listener = std::os::unix::net::UnixListener::bind(path).map_err(failed("bind"))?;
        let socket = FileId::of_path(path).map(|id| Self { listener, path: path.into(), id });
        let socket = socket.map_err(failed("inspect"))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).map_err(failed("set the mode of"))?;
        socket.listener.set_nonblocking(true).map_err(failed("set up"))?;
        Ok(socket)
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
    fn drop(&mut self) {
        if FileId::of_path(&self.path).is_ok_and(|id| id == self.id) {
            // Nobody is left to tell if that fails.
            let _ = fs::remove_file(&self.path);
        }
    }
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

    pub(super) fn credentials(socket: BorrowedFd<'_>) -> io::Result<(u32, u32, u32)> {
        let mut cred = libc::ucred { pid: 0, uid: 0, gid: 0 };
        // SAFETY: `ucred` is plain integers, which any bytes are valid for.
        unsafe { get(socket, libc::SO_PEERCRED, &mut cred)? };
        Ok((u32::try_from(cred.pid).unwrap_or(0), cred.uid, cred.gid))
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
