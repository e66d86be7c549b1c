//! Kernel settings of a network namespace. `/proc/sys/net` shows those of the namespace of the thread that looks, so
//! [`get`] and [`set`] belong inside [`Namespace::run`]; the methods of [`Namespace`] do that.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::netns::Namespace;

/// Reads a setting, for instance `net/ipv4/ip_forward`; `None` if the kernel has no such setting (a host without IPv6,
/// an interface that is gone).
pub fn get(key: &str) -> Result<Option<String>> {
    match fs::read_to_string(path(key)?) {
        Ok(text) => Ok(Some(text.trim_end().to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Sysctl { key: key.into(), source }),
    }
}

/// Writes a setting, unless it has that value already. Whether it was written.
///
/// # Errors
/// Also if there is no such setting.
pub fn set(key: &str, value: &str) -> Result<bool> {
    let same = |text: &str| text.split_whitespace().eq(value.split_whitespace());
    if get(key)?.as_deref().is_some_and(same) {
        return Ok(false);
    }
    // Without O_CREAT and O_TRUNC: a mistaken key must not become a file.
    let write = || {
        let mut file = fs::OpenOptions::new().write(true).open(path(key).map_err(io::Error::other)?)?;
        io::Write::write_all(&mut file, value.as_bytes())
    };
    write().map_err(|source| Error::Sysctl { key: key.into(), source })?;
    Ok(true)
}

impl Namespace {
    /// [`get`] inside this namespace.
    pub fn sysctl(&self, key: &str) -> Result<Option<String>> {
        self.run(|| get(key))?
    }

    /// [`set`] inside this namespace.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<bool> {
        self.run(|| set(key, value))?
    }
}

/// Slashes separate, so that interface names may contain dots; nothing leads out of the directory.
fn path(key: &str) -> Result<PathBuf> {
    if key.split('/').any(|part| matches!(part, "" | "." | "..") || part.contains('\0')) {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "a key reads like net/ipv4/ip_forward");
        return Err(Error::Sysctl { key: key.into(), source });
    }
    Ok(PathBuf::from("/proc/sys").join(key))
}
