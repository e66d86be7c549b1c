//! Being root where one is not: a user namespace with its own mounts and network, for a lab of an ordinary user.
//!
//! The holder of the lab is started inside; everything else (`exec`, `status`, `down`) starts again as a child that
//! enters the holder's namespaces. Inside, the code is the same as root's. What lies outside is one small file that
//! names the holder, because `/run` inside is a file system of its own.
//!
//! Everything `unsafe` of it is here.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Mode, OFlags, statfs};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{Pid, PidfdFlags, getegid, geteuid, pidfd_open};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces, unshare_unsafe};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::lab::pids;
use crate::process::ProcessId;

/// Set for processes that already are where they have to be; says also that `/run` has to be made.
const INSIDE: &str = "NSM_LAB_INSIDE";
/// `CAP_NET_ADMIN` and `CAP_SYS_ADMIN` of `linux/capability.h`.
const NEEDED: u64 = 1 << 12 | 1 << 21;

/// `TMPFS_MAGIC` of `linux/magic.h`.
const TMPFS: rustix::fs::FsWord = 0x0102_1994;

/// Where the holder of a user's lab is found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The holder.
    pub(crate) holder: ProcessId,
    /// Inode of its user namespace: its other processes are found by it when it was killed.
    pub(crate) user_namespace: u64,
}

/// Whether this process may make and configure network namespaces as it is.
#[must_use]
pub fn is_privileged() -> bool {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|caps| caps & NEEDED == NEEDED)
}

/// Whether this process was started inside by one outside.
pub(crate) fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Prepares a command to start in new user, mount and network namespaces, as root there.
pub fn start_confined(command: &mut Command) {
    // Everything is prepared here: after the fork only system calls are allowed.
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let (uid_map, gid_map) = (format!("0 {uid} 1\n"), format!("0 {gid} 1\n"));
    command.env(INSIDE, "new");
    let enter = move || {
        let flags = UnshareFlags::NEWUSER | UnshareFlags::NEWNS | UnshareFlags::NEWNET;
        // SAFETY: the danger of `unshare` is a separate descriptor table (CLONE_FILES), which is not asked for.
        unsafe { unshare_unsafe(flags) }?;
        // Without this the kernel refuses a gid map of an ordinary user (man 7 user_namespaces).
        write_file(c"/proc/self/setgroups", b"deny")?;
        write_file(c"/proc/self/uid_map", uid_map.as_bytes())?;
        write_file(c"/proc/self/gid_map", gid_map.as_bytes())?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only (unshare, open, write, close); it neither
    // allocates nor takes a lock, and what it borrows it owns.
    unsafe { command.pre_exec(enter) };
}

/// Prepares a command to start in the user, mount and network namespaces of a process.
pub(crate) fn start_beside(command: &mut Command, process: ProcessId) -> Result<(), Error> {
    let failed = |error: io::Error| Error::system(format!("enter the lab's process {}", process.pid), error);
    let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| failed(e.into()))?;
    command.env(INSIDE, "beside");
    let enter = move || {
        let kinds = ThreadNameSpaceType::USER | ThreadNameSpaceType::MOUNT | ThreadNameSpaceType::NETWORK;
        Ok(move_into_thread_name_spaces(pidfd.as_fd(), kinds)?)
    };
    // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(enter) };
    Ok(())
}

/// Prepares a command of the user: it does not hear of what was done to get inside.
pub(crate) fn leave_no_mark(command: &mut Command) {
    command.env_remove(INSIDE);
}

/// First thing of a holder: inside new namespaces, `/run` becomes its own; elsewhere nothing happens.
///
/// # Errors
///
/// What the kernel says of the mounts.
pub fn settle_in() -> Result<(), Error> {
    if std::env::var(INSIDE).as_deref() != Ok("new") {
        return Ok(());
    }
    // What is mounted outside later may appear inside, but never the other way round.
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(|error| Error::system("make the mounts private", error))?;
    mount("lab", "/run", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=0755")
        .map_err(|error| Error::system("mount a file system of the lab's own at /run", error))
}

/// Gives this process, and what it will start, a `/run/nsm` in memory where the machine's is not: `/run` is everywhere a
/// file system in memory, but on some test machines, and what is measured there would be their disk. To be called before
/// there are other threads; the mount ends with the last process that sees it.
///
/// # Errors
///
/// What the kernel says of the mounts.
pub fn run_in_memory() -> Result<(), Error> {
    let path = crate::plan::RUN;
    fs::create_dir_all(path).map_err(Error::files("make directory", path))?;
    let failed = |error: rustix::io::Errno| Error::system("mount a file system in memory at /run/nsm", error);
    if statfs(path).map_err(failed)?.f_type == TMPFS {
        return Ok(());
    }
    // SAFETY: the danger of `unshare` is a separate descriptor table (CLONE_FILES), which is not asked for.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.map_err(failed)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).map_err(failed)?;
    mount("nsm", path, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=0755").map_err(failed)
}

// === the file outside ===

impl Record {
    /// Of a holder that was just started confined.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let holder = ProcessId::of(pid)?;
        let user_namespace = fs::metadata(format!("/proc/{pid}/ns/user")).ok()?.ino();
        Some(Self { holder, user_namespace })
    }

    /// All labs of this user, by name.
    pub(crate) fn all() -> BTreeMap<String, Self> {
        let files = directory().ok().and_then(|path| fs::read_dir(path).ok());
        let files = files.into_iter().flatten().flatten().filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?.strip_suffix(".json")?.to_owned();
            Some((name, serde_json::from_slice(&fs::read(entry.path()).ok()?).ok()?))
        });
        files.collect()
    }

    pub(crate) fn save(&self, lab: &str) -> Result<(), Error> {
        let path = directory()?.join(format!("{lab}.json"));
        let text = serde_json::to_vec(self).map_err(|error| Error::files("write", &path)(error.into()))?;
        fs::write(&path, text).map_err(Error::files("write", &path))
    }

    pub(crate) fn forget(lab: &str) -> Result<(), Error> {
        let directory = directory()?;
        let path = directory.join(format!("{lab}.json"));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::files("remove", path)(error));
            }
            _ => {}
        }
        // It stays if it holds another lab.
        let _ = fs::remove_dir(directory);
        Ok(())
    }

    /// The holder, or, if that was killed, any process that is still in its user namespace.
    pub(crate) fn anybody(&self) -> Option<ProcessId> {
        if self.holder.is_alive() {
            return Some(self.holder);
        }
        let inside = |pid: &u32| {
            fs::metadata(format!("/proc/{pid}/ns/user")).is_ok_and(|stat| stat.ino() == self.user_namespace)
        };
        pids().filter(inside).find_map(ProcessId::of)
    }
}

// === private helpers ===

fn write_file(path: &CStr, bytes: &[u8]) -> rustix::io::Result<()> {
    let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, bytes).map(drop)
}

/// A directory that only this user can write.
fn directory() -> Result<PathBuf, Error> {
    let uid = geteuid().as_raw();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| owned(path, uid));
    let path = runtime.map_or_else(|| PathBuf::from(format!("/tmp/nsm-{uid}")), |path| path.join("nsm"));
    match fs::DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::files("make directory", path)(error));
        }
        _ => {}
    }
    // In /tmp somebody else could have been faster.
    if !owned(&path, uid) {
        return Err(Error::files("use", path)(io::Error::from(io::ErrorKind::PermissionDenied)));
    }
    Ok(path)
}

fn owned(path: &Path, uid: u32) -> bool {
    fs::symlink_metadata(path).is_ok_and(|stat| stat.is_dir() && stat.uid() == uid)
}
