//! The few system calls that no safe wrapper offers. Everything `unsafe` of this crate is here.
#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, size_of_val, zeroed};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::thread::UnshareFlags;

/// `NS_GET_NSTYPE` of `linux/nsfs.h`: which kind of namespace a descriptor refers to.
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;

/// Puts the calling thread into a network namespace of its own.
pub(crate) fn unshare_net() -> rustix::io::Result<()> {
    // SAFETY: the one danger of `unshare` is a separate descriptor table (CLONE_FILES), which is not asked for.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
}

/// Unmaps the pages of a mapping; what is needed of them comes back from its file.
pub(crate) fn let_go(unchanged: Range<usize>) -> io::Result<()> {
    // SAFETY: `unchanged` is a private mapping of a file, not writable, without a page that is a copy of our own: all its
    // pages are as the file has them. What is unmapped is mapped again with the same contents when it is next touched.
    let done = unsafe { libc::madvise(unchanged.start as *mut _, unchanged.len(), libc::MADV_DONTNEED) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether `fd` refers to a network namespace.
pub(crate) fn is_network_namespace(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: the descriptor is open while it is borrowed; this request takes no argument and writes no memory.
    unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) == libc::CLONE_NEWNET }
}

/// One datagram of a netlink socket that listens to all namespaces (`NETLINK_LISTEN_ALL_NSID`): its true length,
/// which may exceed the buffer, and the id of the namespace it comes from (`None`: the socket's own).
pub(crate) fn receive_with_nsid(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Option<i32>)> {
    // Aligned as a `cmsghdr` must be, with room for more than the one control message that comes.
    let mut control = [0u64; 8];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: `msghdr` is a C structure of integers and pointers, for which all zeroes is a valid value.
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of::<[u64; 8]>();
    // SAFETY: `header` points at `part` and `control`, both alive and exclusively ours until the call returns,
    // with their true sizes; the descriptor is open while it is borrowed.
    let length = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, libc::MSG_TRUNC) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    let mut nsid = None;
    // SAFETY: the kernel filled `header` and `control`; the CMSG macros stay inside `msg_controllen`.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !message.is_null() {
        // SAFETY: not null, so it points at a control message inside `control`, which is aligned for it.
        let found = unsafe { *message };
        if found.cmsg_level == libc::SOL_NETLINK && found.cmsg_type == libc::NETLINK_LISTEN_ALL_NSID {
            // SAFETY: the payload of this type is one int (`netlink_cmsg_listen_all_nsid`); no alignment is assumed.
            nsid = Some(unsafe { libc::CMSG_DATA(message).cast::<i32>().read_unaligned() });
        }
        // SAFETY: `message` came from these macros and this header.
        message = unsafe { libc::CMSG_NXTHDR(&raw const header, message) };
    }
    Ok((length, nsid))
}

/// Lets only netlink messages of these types into a socket; the others cost neither a wake-up nor room.
pub(crate) fn only_messages(fd: BorrowedFd<'_>, kinds: [u16; 2]) -> io::Result<()> {
    let instruction = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // The type is at offset 4 in the machine's byte order; this load takes it for the network's.
    let [first, second] = kinds.map(|kind| u32::from(kind.to_be()));
    let mut program = [
        instruction(0x28, 0, 0, 4),        // ldh [4]
        instruction(0x15, 1, 0, first),    // jeq first, accept
        instruction(0x15, 0, 1, second),   // jeq second, accept, drop
        instruction(0x06, 0, 0, u32::MAX), // accept: ret all of it
        instruction(0x06, 0, 0, 0),        // drop: ret nothing
    ];
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let filter = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    let size = libc::socklen_t::try_from(size_of_val(&filter)).map_err(io::Error::other)?;
    // SAFETY: the kernel copies `size` bytes of `filter` and `len` instructions it points at, all alive and
    // initialised until the call returns; the descriptor is open while it is borrowed.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
