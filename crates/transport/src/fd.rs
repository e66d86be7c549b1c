//! File descriptors that ride on a Unix stream, below TLS (`control-plane.md` section 12).
//!
//! ```text
//!   handler  --- FdTable::send ---> queue ---.            .--> kept (a multiset by dev, ino) --- take ---> handler
//!   TLS bytes ------------------------ poll_write ~~~~> poll_read ---------------------------> TLS bytes
//! ```
//!
//! Descriptors are attached to bytes that had to be sent anyway; the stream of bytes is not changed. They are
//! identified by device and inode alone. Calls in flight may each send the same file, so every arrival is kept and every
//! [`FdTable::take`] removes one. One may arrive before its message or after it; one that nobody takes is closed after
//! [`GRACE`], because a descriptor of a network namespace keeps the namespace alive.
//!
//! Peers are not trusted. Only namespaces and descriptors opened `O_PATH` are kept, which is all that is ever sent:
//! closing others can take as long as their file system (FUSE) or socket (`SO_LINGER`) wants, and a pod must not be able
//! to stop a node's threads.

use std::{
    collections::VecDeque,
    fmt, io,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    sync::{Arc, LazyLock, Weak, mpsc},
    task::{Context, Poll, ready},
    time::Duration,
};

use nsm_identity::FileId;
use parking_lot::Mutex;
use rustix::{
    cmsg_space,
    fs::OFlags,
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
    sync::oneshot,
    time::{Instant, Sleep, sleep},
};
use tracing::{debug, warn};

/// Most descriptors in one `sendmsg`: the room that upstream's receivers have.
pub const MAX_FDS_PER_WRITE: usize = 64;
/// Most descriptors in one message that the kernel lets a peer send (`SCM_MAX_FD`, `include/net/scm.h`): with this room
/// none is cut off.
const MAX_FDS_PER_READ: usize = 253;
/// How long a descriptor that nobody takes is kept.
pub const GRACE: Duration = Duration::from_secs(2);
/// Most descriptors kept of one peer; beyond it the oldest goes.
pub const MAX_KEPT: usize = 4096;
/// The same of a peer that is not authenticated yet, and of what was not fit to keep: what one message may carry.
const MAX_KEPT_OF_STRANGER: usize = MAX_FDS_PER_WRITE;
/// Most descriptors that are not fit to keep that one connection may bring.
const MAX_UNFIT: usize = 64;
/// The kernel counts descriptors in flight per user; when the peer reads too slowly, sending pauses this long.
const TOO_MANY_IN_FLIGHT: Duration = Duration::from_millis(5);

/// The descriptors of one connection: those received and not yet taken, and those to send.
#[derive(Clone)]
pub struct FdTable(Arc<Mutex<State>>);

/// Why [`FdTable::take`] returned nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FdError {
    /// The peer named a file and did not send it in time.
    #[error("descriptor inode://{}/{} did not arrive in time; the peer must send it on this connection", .0.dev, .0.ino)]
    Late(FileId),
    /// It came, and is neither a namespace nor opened `O_PATH`.
    #[error("descriptor inode://{}/{} is neither a namespace nor opened O_PATH: the peer must send one that is", .0.dev, .0.ino)]
    Unfit(FileId),
    /// The connection ended first.
    #[error("the connection closed before descriptor inode://{}/{} arrived", .0.dev, .0.ino)]
    Closed(FileId),
}

/// A Unix stream that carries descriptors beside its bytes.
pub struct FdStream {
    socket: UnixStream,
    fds: FdTable,
    /// Set while the kernel refuses more descriptors in flight.
    pause: Option<Pin<Box<Sleep>>>,
}

#[derive(Default)]
struct State {
    /// In the order of arrival.
    kept: VecDeque<Kept>,
    waiting: VecDeque<(FileId, oneshot::Sender<Result<OwnedFd, FdError>>)>,
    /// The last that came and were not fit to keep, to tell who asks for them.
    unfit: VecDeque<FileId>,
    /// How many there were.
    unfit_so_far: usize,
    queued: VecDeque<Arc<OwnedFd>>,
    /// How many were queued so far.
    sent: usize,
    /// The peer is authenticated; until then it gets little room.
    trusted: bool,
    /// A task is closing what nobody takes.
    sweeping: bool,
    closed: bool,
}

struct Kept {
    id: FileId,
    fd: OwnedFd,
    until: Instant,
}

impl FdTable {
    fn new() -> Self {
        Self(Arc::default())
    }

    /// Queues a descriptor: it travels with the next bytes written, so a call or an answer that is written after this
    /// never overtakes it. Files that are only named, such as sockets and namespaces, are best opened `O_PATH`.
    pub fn send(&self, fd: impl Into<Arc<OwnedFd>>) {
        let mut state = self.0.lock();
        if !state.closed {
            state.queued.push_back(fd.into());
            state.sent += 1;
        }
    }

    /// How many descriptors were sent so far, those that still wait for bytes to travel with included.
    pub fn sent(&self) -> usize {
        self.0.lock().sent
    }

    /// Removes one received descriptor of this file, waiting for it until `deadline`.
    ///
    /// # Errors
    /// It did not come, or the connection closed.
    pub async fn take(&self, id: FileId, deadline: Instant) -> Result<OwnedFd, FdError> {
        let arrival = {
            let mut state = self.0.lock();
            if let Some(at) = state.kept.iter().position(|kept| kept.id == id)
                && let Some(kept) = state.kept.remove(at)
            {
                return Ok(kept.fd);
            }
            if let Some(at) = state.unfit.iter().position(|unfit| *unfit == id) {
                state.unfit.remove(at);
                return Err(FdError::Unfit(id));
            }
            if state.closed {
                return Err(FdError::Closed(id));
            }
            state.waiting.retain(|(_, taker)| !taker.is_closed());
            let (taker, arrival) = oneshot::channel();
            state.waiting.push_back((id, taker));
            arrival
        };
        match tokio::time::timeout_at(deadline, arrival).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(FdError::Closed(id)),
            Err(_) => Err(FdError::Late(id)),
        }
    }

    /// How many received descriptors nobody has taken yet.
    pub fn kept(&self) -> usize {
        self.0.lock().kept.len()
    }

    /// The peer is authenticated: from now on [`MAX_KEPT`] of its descriptors are kept, and not only those of one message.
    pub fn trust(&self) {
        self.0.lock().trusted = true;
    }

    fn received(&self, fd: OwnedFd) {
        let id = match FileId::of(&fd) {
            Ok(id) => id,
            Err(reason) => {
                debug!(%reason, "a received descriptor cannot be identified");
                return close_aside(fd);
            }
        };
        let fit = is_fit(&fd, id);
        let mut arrival = Ok(fd);
        if !fit {
            debug!(
                dev = id.dev,
                ino = id.ino,
                "a peer sent a descriptor that is no namespace and not O_PATH"
            );
            if let Ok(fd) = std::mem::replace(&mut arrival, Err(FdError::Unfit(id))) {
                close_aside(fd);
            }
        }
        let mut state = self.0.lock();
        while let Some(at) = state.waiting.iter().position(|(wanted, _)| *wanted == id) {
            let Some((_, taker)) = state.waiting.remove(at) else { break };
            match taker.send(arrival) {
                Ok(()) => return,
                // That taker has given up.
                Err(back) => arrival = back,
            }
        }
        let Ok(fd) = arrival else {
            if state.unfit.len() == MAX_KEPT_OF_STRANGER {
                state.unfit.pop_front();
            }
            state.unfit_so_far += 1;
            return state.unfit.push_back(id);
        };
        let limit = if state.trusted { MAX_KEPT } else { MAX_KEPT_OF_STRANGER };
        if state.kept.len() >= limit {
            warn!(limit, "a peer sends descriptors that nobody takes; the oldest is closed");
            state.kept.pop_front();
        }
        state.kept.push_back(Kept { id, fd, until: Instant::now() + GRACE });
        if !state.sweeping {
            state.sweeping = true;
            tokio::spawn(sweep(Arc::downgrade(&self.0)));
        }
    }

    pub(crate) fn close(&self) {
        let mut state = self.0.lock();
        let (kept, queued) = (std::mem::take(&mut state.kept), std::mem::take(&mut state.queued));
        state.waiting.clear();
        state.closed = true;
        drop(state);
        // Closing may take time; not under the lock.
        drop((kept, queued));
    }

    /// A table of a connection without a socket.
    #[cfg(feature = "sim")]
    pub(crate) fn simulated() -> Self {
        let table = Self::new();
        table.trust();
        table
    }

    /// What is queued here arrives there.
    #[cfg(feature = "sim")]
    pub(crate) fn carry_to(&self, to: &Self) {
        loop {
            let (batch, more) = self.next_batch();
            batch.iter().filter_map(|fd| fd.as_fd().try_clone_to_owned().ok()).for_each(|fd| to.received(fd));
            if !more {
                return;
            }
        }
    }

    /// What the next write takes along, and whether more than that is queued.
    fn next_batch(&self) -> (Vec<Arc<OwnedFd>>, bool) {
        let mut state = self.0.lock();
        let count = state.queued.len().min(MAX_FDS_PER_WRITE);
        (state.queued.drain(..count).collect(), !state.queued.is_empty())
    }

    fn put_back(&self, batch: Vec<Arc<OwnedFd>>) {
        let mut state = self.0.lock();
        if !state.closed {
            batch.into_iter().rev().for_each(|fd| state.queued.push_front(fd));
        }
    }
}

/// Is it a namespace, or opened `O_PATH`? Then closing it does nothing that could wait.
fn is_fit(fd: &OwnedFd, id: FileId) -> bool {
    // All namespaces are files of one file system of the kernel's.
    static NAMESPACES: LazyLock<Option<u64>> =
        LazyLock::new(|| FileId::of_path("/proc/self/ns/net").ok().map(|id| id.dev));
    Some(id.dev) == *NAMESPACES || rustix::fs::fcntl_getfl(fd).is_ok_and(|flags| flags.contains(OFlags::PATH))
}

/// Closes what may take its time where nothing else waits: on a thread of its own, for all connections. What hangs there
/// holds up only its like.
fn close_aside(fd: OwnedFd) {
    static CLOSER: LazyLock<Option<mpsc::Sender<OwnedFd>>> = LazyLock::new(|| {
        let (sender, unfit) = mpsc::channel::<OwnedFd>();
        let close = move || unfit.into_iter().for_each(drop);
        std::thread::Builder::new().name("closer".into()).spawn(close).ok().map(|_| sender)
    });
    // Of a socket with unsent data the last close waits for as long as its sender has set.
    let _ = rustix::net::sockopt::set_socket_linger(&fd, None);
    match &*CLOSER {
        Some(closer) => drop(closer.send(fd)),
        None => drop(fd),
    }
}

/// Closes what nobody takes; ends when nothing is left or the connection is gone.
async fn sweep(state: Weak<Mutex<State>>) {
    loop {
        let next = {
            let Some(state) = state.upgrade() else { return };
            let mut state = state.lock();
            let now = Instant::now();
            while state.kept.front().is_some_and(|kept| kept.until <= now) {
                state.kept.pop_front();
            }
            match state.kept.front() {
                Some(kept) => kept.until,
                None => {
                    state.sweeping = false;
                    return;
                }
            }
        };
        tokio::time::sleep_until(next).await;
    }
}

impl FdStream {
    /// Wraps a socket. All its bytes must pass through the wrapper from the first on: a plain read would lose
    /// descriptors.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, fds: FdTable::new(), pause: None }
    }

    /// The descriptors that ride on this stream.
    pub fn fds(&self) -> &FdTable {
        &self.fds
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let Some(first) = bufs.iter().find(|buf| !buf.is_empty()) else { return Poll::Ready(Ok(0)) };
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            ready!(self.socket.poll_write_ready(cx))?;
            let (batch, more) = self.fds.next_batch();
            // More than one message can carry: a byte takes the first of them, so that the caller's next write, of the
            // same message, takes the others.
            let byte = [IoSlice::new(&first[..1])];
            let bufs = if more { &byte[..] } else { bufs };
            let result = self.socket.try_io(Interest::WRITABLE, || Ok(send(&self.socket, bufs, &batch)?));
            match result {
                Ok(sent) => return Poll::Ready(Ok(sent)),
                Err(e) => {
                    self.fds.put_back(batch);
                    if e.raw_os_error() == Some(Errno::TOOMANYREFS.raw_os_error()) {
                        self.pause = Some(Box::pin(sleep(TOO_MANY_IN_FLIGHT)));
                    } else if e.kind() != io::ErrorKind::WouldBlock && e.kind() != io::ErrorKind::Interrupted
                    {
                        return Poll::Ready(Err(e));
                    }
                }
            }
        }
    }
}

fn send(socket: &UnixStream, bufs: &[IoSlice<'_>], batch: &[Arc<OwnedFd>]) -> rustix::io::Result<usize> {
    let fds: Vec<_> = batch.iter().map(|fd| fd.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS_PER_WRITE))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(Errno::INVAL);
    }
    sendmsg(socket, bufs, &mut control, SendFlags::NOSIGNAL)
}

impl AsyncRead for FdStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.socket.poll_read_ready(cx))?;
            let result = self.socket.try_io(Interest::READABLE, || {
                let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS_PER_READ))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let mut iov = [IoSliceMut::new(buf.initialize_unfilled())];
                let message = recvmsg(&self.socket, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC)?;
                for part in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(fds) = part {
                        fds.for_each(|fd| self.fds.received(fd));
                    }
                }
                if message.flags.contains(ReturnFlags::CTRUNC) {
                    warn!("descriptors of a peer were lost: is the limit of open files (ulimit -n) reached?");
                }
                Ok(message.bytes)
            });
            match result {
                Ok(0) if buf.remaining() > 0 => {
                    // No byte will follow, so no descriptor will.
                    self.fds.0.lock().waiting.clear();
                    return Poll::Ready(Ok(()));
                }
                // Nobody sends these by mistake, and each costs a descriptor until it is closed.
                Ok(_) if self.fds.0.lock().unfit_so_far > MAX_UNFIT => {
                    return Poll::Ready(Err(io::Error::other(
                        "the peer sends descriptors that are neither namespaces nor opened O_PATH",
                    )));
                }
                Ok(read) => {
                    buf.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }
}

impl AsyncWrite for FdStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_send(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // `sendmsg` takes at most IOV_MAX (1024) slices.
        self.poll_send(cx, &bufs[..bufs.len().min(1024)])
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

impl Drop for FdStream {
    fn drop(&mut self) {
        self.fds.close();
    }
}

impl fmt::Debug for FdTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.lock();
        f.debug_struct("FdTable")
            .field("kept", &state.kept.len())
            .field("waiting", &state.waiting.len())
            .field("queued", &state.queued.len())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for FdStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FdStream").field("fds", &self.fds).finish_non_exhaustive()
    }
}
