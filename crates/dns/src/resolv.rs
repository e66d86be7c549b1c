//! `resolv.conf`: read by the rules of resolvers (resolv.conf(5)), pointed to the local forwarder, and restored.
//!
//! The file may be a mount of its own, shared by the containers of a pod, so it is written in place. What was in it
//! stays in it as comments, in upstream's form: whoever comes after a killed client, ours or upstream's, finds it. At no
//! moment is the original only in memory: one write puts the new text over the old one, then the rest is cut off.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _},
    net::IpAddr,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

use crate::config::{self, Config};

/// The first line of a file that was taken over.
const MARK: &str = "# modified";
/// Bytes of a file that is taken for a resolv.conf.
const MAX: u64 = 64 << 10;

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing failed.
    #[error(
        "{path} cannot be {what}: {source}; names of services are not resolved (NSM_RESOLV_CONF names the file, NSM_LOCAL_DNS_SERVER_ENABLED=false leaves it alone)"
    )]
    Io {
        /// Which file.
        path: PathBuf,
        /// `read` or `written`.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It is no resolv.conf.
    #[error(
        "{0} is no resolv.conf: it has more than {MAX} bytes or is not text; expected lines such as `nameserver 10.96.0.10`"
    )]
    Strange(PathBuf),
    /// Nothing says that it is this pod's.
    #[error(
        "{0} is no mount of its own, so it may be the node's, where what this pod resolves would hold for everybody; expected a file mounted over it, as containers have it, or NSM_RESOLV_CONF naming the file; names of services are not resolved"
    )]
    OfTheNode(PathBuf),
}

/// A `resolv.conf`.
#[derive(Debug, Clone)]
pub struct ResolvConf {
    path: PathBuf,
}

impl ResolvConf {
    /// The one at a path that somebody chose.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// `/etc/resolv.conf`, if it is this pod's: container runtimes mount one over it, and so does `ip netns exec`.
    ///
    /// # Errors
    /// [`Error::OfTheNode`].
    pub fn of_this_pod() -> Result<Self, Error> {
        let path = PathBuf::from("/etc/resolv.conf");
        if is_mount(&path) { Ok(Self { path }) } else { Err(Error::OfTheNode(path)) }
    }

    /// Puts back what was there before it was taken over, by a predecessor that was killed too; says whether it was. Only
    /// what bears the mark is touched: a person's file may look like the unmarked form.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub fn restore(&self) -> Result<bool, Error> {
        let text = self.read()?;
        match original(&text).filter(|_| text.starts_with(MARK)) {
            Some(original) => self.write(&text, &original).map(|()| true),
            None => Ok(false),
        }
    }

    /// Points it to `server`; returns what it said before.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub fn take_over(&self, server: IpAddr) -> Result<Config, Error> {
        let found = self.read()?;
        let text = original(&found).unwrap_or_else(|| found.clone());
        let config = configured(&text);
        self.write(&found, &taken_over(&text, server))?;
        Ok(config)
    }

    fn read(&self) -> Result<String, Error> {
        let failed = |source| Error::Io { path: self.path.clone(), what: "read", source };
        let mut bytes = Vec::new();
        File::open(&self.path).and_then(|f| f.take(MAX + 1).read_to_end(&mut bytes)).map_err(failed)?;
        let fits = bytes.len() as u64 <= MAX;
        String::from_utf8(bytes).ok().filter(|_| fits).ok_or_else(|| Error::Strange(self.path.clone()))
    }

    fn write(&self, old: &str, text: &str) -> Result<(), Error> {
        write_in_place(&self.path, old, text).map_err(|source| Error::Io {
            path: self.path.clone(),
            what: "written",
            source,
        })
    }
}

/// What it configures.
#[must_use]
pub fn configured(text: &str) -> Config {
    let mut config = Config::default();
    for (keyword, mut values) in directives(text) {
        match keyword {
            "nameserver" => config.servers.extend(values.next().and_then(config::server)),
            // The last of them counts.
            "search" | "domain" => config.search = values.filter_map(config::domain).collect(),
            _ => {}
        }
    }
    config
}

/// The text that points to `server` and has `text` in its comments. Search domains are the server's affair from now on.
#[must_use]
pub fn taken_over(text: &str, server: IpAddr) -> String {
    let mut new = MARK.to_owned();
    for line in text.split('\n') {
        new.push_str("\n#");
        new.push_str(line);
    }
    new.push_str("\n\n");
    for line in text.lines() {
        if directives(line).any(|(keyword, _)| !["nameserver", "search", "domain"].contains(&keyword)) {
            new.push_str(line);
            new.push('\n');
        }
    }
    new.push_str(&format!("nameserver {server}\n"));
    new
}

/// What was there before it was taken over, if it was: marked, or, as newer upstream has it, with name servers in its
/// comments and only this machine beside them.
#[must_use]
pub fn original(text: &str) -> Option<String> {
    let marked = text.strip_prefix(MARK).and_then(|rest| rest.strip_prefix('\n'));
    let block = marked.unwrap_or(text);
    let lines = block.split('\n').map_while(|line| line.strip_prefix('#'));
    let original = lines.collect::<Vec<_>>().join("\n");
    if marked.is_some() {
        return Some(original);
    }
    let now = configured(text).servers;
    let only_us = !now.is_empty() && now.iter().all(|server| server.ip().is_loopback());
    (only_us && !configured(&original).servers.is_empty()).then_some(original)
}

fn directives(text: &str) -> impl Iterator<Item = (&str, std::str::SplitWhitespace<'_>)> {
    text.lines().filter(|line| !line.starts_with(['#', ';'])).filter_map(|line| {
        let mut words = line.split_whitespace();
        Some((words.next()?, words))
    })
}

/// One write, then the cut: whoever is killed in between leaves empty lines. Without room for the new text the old one
/// stays: room is made first where the file system can, and what was written half is undone where it cannot.
fn write_in_place(path: &Path, old: &str, text: &str) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(bytes.len().max(old.len()), b'\n');
    let room = fallocate(&file, FallocateFlags::KEEP_SIZE, 0, bytes.len() as u64);
    // Not every file system can, and those that cannot may still have room.
    if let Err(full @ (Errno::NOSPC | Errno::DQUOT)) = room {
        return Err(full.into());
    }
    let written = file.write_all_at(&bytes, 0).and_then(|()| file.set_len(text.len() as u64));
    if written.is_err() {
        // It had its room before. That it could not be written is told in any case.
        let _ = file.write_all_at(old.as_bytes(), 0).and_then(|()| file.set_len(old.len() as u64));
    }
    written
}

fn is_mount(path: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // Mount points are told without symbolic links.
    let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    mounts.lines().any(|line| line.split(' ').nth(4).map(Path::new) == Some(&target))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    const POD: &str = "search default.svc.cluster.local svc.cluster.local\nnameserver\t10.96.0.10\nnameserver 10.96.0.11\n; old\noptions ndots:5\n";
    const LOCAL: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[test]
    fn without_room_the_file_stays_as_it_is() {
        let tested = std::thread::spawn(|| {
            #[allow(deprecated)] // Only this thread's mounts change.
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNS).ok()?;
            use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private).ok()?;
            let dir = tempfile::tempdir().unwrap();
            // Two pages: the text fits into one, and its new form does not into what another file leaves.
            mount("none", dir.path(), "tmpfs", MountFlags::empty(), Some(c"size=8k")).ok()?;
            std::fs::write(dir.path().join("other"), "x").unwrap();
            let path = dir.path().join("resolv.conf");
            let text = format!("{POD}#{:x<1$}\n", "", 4090 - POD.len());
            std::fs::write(&path, &text).unwrap();
            let error = ResolvConf::at(&path).take_over(LOCAL).unwrap_err();
            let left = std::fs::read_to_string(&path).unwrap();
            std::fs::remove_file(dir.path().join("other")).unwrap();
            ResolvConf::at(&path).take_over(LOCAL).unwrap();
            ResolvConf::at(&path).restore().unwrap();
            let restored = std::fs::read_to_string(&path).unwrap();
            rustix::mount::unmount(dir.path(), rustix::mount::UnmountFlags::empty()).unwrap();
            Some((error, text, left, restored))
        });
        let Some((error, text, left, restored)) = tested.join().unwrap() else {
            println!("SKIPPED without_room_the_file_stays_as_it_is: needs root to mount");
            return;
        };
        assert!(error.to_string().contains("cannot be written"), "{error}");
        assert_eq!((&left, &restored), (&text, &text));
    }

    #[test]
    fn the_text_is_as_upstream_writes_it() {
        assert_eq!(
            taken_over(POD, LOCAL),
            "# modified\n#search default.svc.cluster.local svc.cluster.local\n#nameserver\t10.96.0.10\n#nameserver 10.96.0.11\n#; old\n#options ndots:5\n#\n\noptions ndots:5\nnameserver 127.0.0.1\n"
        );
    }

    #[test]
    fn resolvers_rules_hold() {
        let config = configured(POD);
        assert_eq!(config.servers.len(), 2, "several servers, and tabs");
        assert_eq!(config.search.len(), 2);
        let last = configured(
            "domain a.example\nsearch b.example c.example\n# nameserver 1.1.1.1\nnameserver nonsense\n",
        );
        assert_eq!((last.servers.len(), last.search.len()), (0, 2));
        assert_eq!(last.search[0].to_string(), "b.example.");
        assert_eq!(configured(&taken_over(POD, LOCAL)).servers, ["127.0.0.1:53".parse().unwrap()]);
    }

    #[test]
    fn what_upstream_left_is_recovered() {
        // Without the mark: what upstream writes today.
        let left = "#nameserver 10.96.0.10\n#search a.example\n\nnameserver 127.0.0.1\n";
        assert_eq!(original(left).unwrap(), "nameserver 10.96.0.10\nsearch a.example");
        assert_eq!(original(POD), None);
        assert_eq!(
            original("# nameserver 1.2.3.4 is broken\nnameserver 10.0.0.1\n"),
            None,
            "a person's comment"
        );
        assert_eq!(original(""), None);
    }

    #[test]
    fn a_file_is_written_in_place_and_restored() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("resolv.conf");
        std::fs::write(&path, POD).unwrap();
        let inode = std::fs::metadata(&path).unwrap().ino();
        let file = ResolvConf::at(&path);
        assert!(!file.restore().unwrap(), "nothing to restore");
        let first = file.take_over(LOCAL).unwrap();
        let taken = std::fs::read_to_string(&path).unwrap();
        // A killed one's successor takes over what is taken over.
        assert_eq!(file.take_over(LOCAL).unwrap(), first);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), taken);
        assert!(file.restore().unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), POD);
        assert_eq!(std::fs::metadata(&path).unwrap().ino(), inode);
    }

    #[test]
    fn what_cannot_be_used_is_said() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("resolv.conf");
        let file = ResolvConf::at(&path);
        let error = file.restore().unwrap_err().to_string();
        assert!(error.contains("resolv.conf cannot be read: No such file"), "{error}");
        assert!(error.contains("NSM_LOCAL_DNS_SERVER_ENABLED=false leaves it alone"), "{error}");
        std::fs::write(&path, vec![b'x'; 70_000]).unwrap();
        assert!(
            file.take_over(LOCAL)
                .unwrap_err()
                .to_string()
                .contains("is no resolv.conf: it has more than 65536")
        );
        std::fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(file.take_over(LOCAL).is_err());
    }

    proptest::proptest! {
        #[test]
        fn every_text_comes_back(text in "([ -~\\t]{0,30}\n){0,6}[ -~]{0,10}") {
            proptest::prop_assert_eq!(original(&taken_over(&text, LOCAL)).unwrap(), text);
        }

        #[test]
        fn nothing_panics(text: String) {
            let _ = (configured(&text), original(&text));
        }
    }
}
