//! Who a caller is, by what the kernel says of its process, and which entries fit it.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{
    id::SpiffeId,
    unix::{FileId, UnixPeer},
};

/// What must hold of a process for an entry to apply; all that are given must.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selectors {
    /// Network namespace: a name under `/run/netns`, or a path.
    pub netns: Option<String>,
    /// Effective user id when it connected.
    pub uid: Option<u32>,
    /// Effective group id when it connected.
    pub gid: Option<u32>,
    /// The program: the very file at this path, as the CA sees it. The name alone would prove nothing, because in a
    /// mount namespace of their own anybody can run their own file under any name. A process that still runs the
    /// file which an upgrade replaced fits if that one belonged to the same user.
    pub exe: Option<PathBuf>,
    /// The control group, or one above it.
    pub cgroup: Option<String>,
    /// The process id.
    pub pid: Option<u32>,
    /// Field 22 of `/proc/PID/stat`, clock ticks since boot: with `pid` it names one process for ever.
    pub pid_start: Option<u64>,
}

/// One line of the CA's configuration: processes that fit get this ID.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Entry {
    /// The identity.
    pub spiffe_id: SpiffeId,
    /// Only for callers on this node's socket.
    pub node: Option<String>,
    /// Which processes.
    pub selectors: Selectors,
}

/// What is known of a caller. What could not be read (another user's process) is `None` and fits no selector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Facts {
    node: String,
    pid: u32,
    uid: u32,
    gid: u32,
    start: u64,
    exe: Option<Exe>,
    cgroups: Vec<String>,
    netns: Option<FileId>,
}

/// The file that a process executes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Exe {
    /// As `/proc/PID/exe` names it.
    path: PathBuf,
    file: FileId,
    owner: u32,
    /// Has it no name any more?
    deleted: bool,
}

impl Exe {
    fn of(proc: &Path) -> io::Result<Self> {
        let link = proc.join("exe");
        let path = fs::read_link(&link)?;
        let meta = fs::metadata(&link)?;
        let file = FileId { dev: meta.dev(), ino: meta.ino() };
        Ok(Self { path, file, owner: meta.uid(), deleted: meta.nlink() == 0 })
    }

    fn is(&self, wanted: &Path) -> bool {
        let Ok(meta) = fs::metadata(wanted) else { return false };
        let file = FileId { dev: meta.dev(), ino: meta.ino() };
        let replaced = || {
            let name = self.path.as_os_str().as_bytes().strip_suffix(b" (deleted)");
            let canonical = fs::canonicalize(wanted).ok();
            name.is_some() && canonical.as_ref().map(|path| path.as_os_str().as_bytes()) == name
        };
        self.file == file || self.deleted && self.owner == meta.uid() && replaced()
    }
}

impl Selectors {
    /// How many are given.
    pub(crate) fn count(&self) -> usize {
        [
            self.netns.is_some(),
            self.uid.is_some(),
            self.gid.is_some(),
            self.exe.is_some(),
            self.cgroup.is_some(),
            self.pid.is_some(),
            self.pid_start.is_some(),
        ]
        .into_iter()
        .filter(|given| *given)
        .count()
    }

    fn fit(&self, facts: &Facts) -> bool {
        fn given<T: PartialEq>(wanted: &Option<T>, found: Option<&T>) -> bool {
            wanted.as_ref().is_none_or(|wanted| found == Some(wanted))
        }
        given(&self.uid, Some(&facts.uid))
            && given(&self.gid, Some(&facts.gid))
            && given(&self.pid, Some(&facts.pid))
            && given(&self.pid_start, Some(&facts.start))
            && self.exe.as_ref().is_none_or(|wanted| facts.exe.as_ref().is_some_and(|exe| exe.is(wanted)))
            && self
                .cgroup
                .as_ref()
                .is_none_or(|wanted| facts.cgroups.iter().any(|group| is_below(group, wanted)))
            && self.netns.as_ref().is_none_or(|netns| {
                // Looked up each time: the namespace of this name may be a new one.
                facts.netns.is_some() && FileId::of_path(netns_path(netns)).ok() == facts.netns
            })
    }
}

impl Facts {
    /// Asks the kernel.
    ///
    /// # Errors
    /// The process has exited.
    pub(crate) fn of(peer: &UnixPeer, node: &str) -> io::Result<Self> {
        peer.facts(|pid, proc| {
            Ok(Self {
                node: node.into(),
                pid,
                uid: peer.uid(),
                gid: peer.gid(),
                start: start_time(&fs::read_to_string(proc.join("stat"))?)
                    .ok_or_else(|| io::Error::other("/proc/PID/stat has an unknown form"))?,
                exe: Exe::of(proc).ok(),
                cgroups: cgroups(&fs::read_to_string(proc.join("cgroup")).unwrap_or_default()),
                netns: FileId::of_path(proc.join("ns/net")).ok(),
            })
        })
    }

    /// The IDs of the entries that fit, the most specific first: more selectors (a node counts as one) before fewer,
    /// then the order of the file. Each ID once.
    pub(crate) fn identities<'a>(&self, entries: impl IntoIterator<Item = &'a Entry>) -> Vec<SpiffeId> {
        let node_fits = |entry: &Entry| entry.node.as_ref().is_none_or(|node| *node == self.node);
        let mut fitting: Vec<_> = entries
            .into_iter()
            .filter(|entry: &&Entry| node_fits(entry) && entry.selectors.fit(self))
            .collect();
        fitting.sort_by_key(|entry| {
            std::cmp::Reverse(entry.selectors.count() + usize::from(entry.node.is_some()))
        });
        let mut seen = BTreeSet::new();
        fitting
            .into_iter()
            .map(|entry| entry.spiffe_id.clone())
            .filter(|id| seen.insert(id.clone()))
            .collect()
    }
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {}, pidStart {}, uid {}, gid {}", self.pid, self.start, self.uid, self.gid)?;
        match &self.exe {
            Some(exe) => write!(f, ", exe {}", exe.path.display())?,
            None => write!(f, ", exe unreadable")?,
        }
        write!(f, ", cgroup {}", self.cgroups.first().map_or("unreadable", String::as_str))?;
        match self.netns {
            Some(id) => write!(f, ", netns {}:{}", id.dev, id.ino)?,
            None => write!(f, ", netns unreadable")?,
        }
        write!(f, ", on the socket of node {}", self.node)
    }
}

fn netns_path(netns: &str) -> PathBuf {
    if netns.contains('/') { netns.into() } else { Path::new("/run/netns").join(netns) }
}

fn is_below(group: &str, wanted: &str) -> bool {
    let wanted = wanted.trim_end_matches('/');
    group.strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The paths of `/proc/PID/cgroup`: `hierarchy:controllers:path` per line, `proc(5)`. The unified one comes first.
fn cgroups(text: &str) -> Vec<String> {
    let mut lines: Vec<_> =
        text.lines().filter_map(|line| line.splitn(3, ':').nth(2).map(|p| (line, p))).collect();
    lines.sort_by_key(|(line, _)| !line.starts_with("0::"));
    lines.into_iter().map(|(_, path)| path.to_owned()).collect()
}

/// Field 22 of `/proc/PID/stat`; field 2, the name, may contain spaces and parentheses.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            node: "node1".into(),
            pid: 7,
            uid: 0,
            gid: 0,
            start: 99,
            exe: Some(Exe::of(Path::new("/proc/self")).unwrap()),
            cgroups: vec!["/lab/pod1/box".into()],
            netns: Some(FileId { dev: 4, ino: 1 }),
        }
    }

    fn entry(id: &str, node: Option<&str>, selectors: Selectors) -> Entry {
        Entry {
            spiffe_id: format!("spiffe://lab/{id}").parse().unwrap(),
            node: node.map(Into::into),
            selectors,
        }
    }

    #[test]
    fn stat_with_a_hostile_name() {
        let stat = "12 (a) R 1 (b)) S 1 12 12 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 8 9";
        assert_eq!(start_time(stat), Some(4711));
        assert_eq!(start_time("12 (x"), None);
        assert_eq!(start_time(""), None);
        let own = fs::read_to_string("/proc/self/stat").unwrap();
        assert!(start_time(&own).is_some());
    }

    #[test]
    fn cgroup_is_the_group_or_one_above() {
        assert_eq!(cgroups("1:name=x:/a:b\n0::/c\n"), ["/c", "/a:b"]);
        assert!(is_below("/lab/pod1/box", "/lab/pod1"));
        assert!(is_below("/lab/pod1", "/lab/pod1/"));
        assert!(is_below("/anything", "/"));
        assert!(!is_below("/lab/pod11", "/lab/pod1"));
    }

    #[test]
    fn the_most_specific_entry_comes_first_and_all_selectors_must_hold() {
        let uid = || Selectors { uid: Some(0), ..Selectors::default() };
        let exe = || Selectors { uid: Some(0), exe: Some("/proc/self/exe".into()), ..Selectors::default() };
        let entries = [
            entry("uid", None, uid()),
            entry("exe", None, exe()),
            entry("node", Some("node1"), uid()),
            entry("exe", Some("node1"), exe()),
            entry("other-node", Some("node2"), uid()),
            entry("wrong-exe", None, Selectors { exe: Some("/bin/sh".into()), ..uid() }),
            entry("wrong-uid", None, Selectors { uid: Some(1), ..exe() }),
            entry("no-such-netns", None, Selectors { netns: Some("nsm.none".into()), ..uid() }),
        ];
        let ids: Vec<_> = facts().identities(&entries).iter().map(|id| id.path().to_owned()).collect();
        assert_eq!(ids, ["/exe", "/node", "/uid"]);
    }

    #[test]
    fn a_program_is_a_file_and_not_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nsm");
        let running = |path: &Path| {
            let meta = fs::metadata(path).unwrap();
            let file = FileId { dev: meta.dev(), ino: meta.ino() };
            Exe { path: path.into(), file, owner: meta.uid(), deleted: false }
        };
        let fits = |exe: &Exe| exe.is(&path);
        fs::write(&path, "one").unwrap();
        let exe = running(&path);
        assert!(fits(&exe));
        // Another file under the same name, as in another mount namespace.
        fs::write(dir.path().join("other"), "two").unwrap();
        assert!(!fits(&Exe { path: path.clone(), ..running(&dir.path().join("other")) }));
        // Replaced by an upgrade: the running one has no name any more.
        fs::rename(dir.path().join("other"), &path).unwrap();
        let name = format!("{} (deleted)", path.canonicalize().unwrap().display());
        let old = Exe { path: name.into(), deleted: true, ..exe };
        assert!(fits(&old));
        assert!(!fits(&Exe { owner: old.owner + 1, ..old.clone() }), "the file of another user");
        assert!(!fits(&Exe { deleted: false, ..old.clone() }), "a file that is only called so");
        assert!(!fits(&Exe { path: "/somewhere/else (deleted)".into(), ..old.clone() }));
        fs::remove_file(&path).unwrap();
        assert!(!fits(&old), "nothing to compare with");
    }

    #[test]
    fn unreadable_facts_fit_no_selector() {
        let blind = Facts { exe: None, netns: None, cgroups: vec![], ..facts() };
        for selectors in [
            Selectors { exe: Some("/usr/bin/nsm".into()), ..Selectors::default() },
            Selectors { netns: Some("/proc/self/ns/nothing".into()), ..Selectors::default() },
            Selectors { netns: Some("/proc/self/ns/net".into()), ..Selectors::default() },
            Selectors { cgroup: Some("/".into()), ..Selectors::default() },
        ] {
            assert!(blind.identities(&[entry("x", None, selectors)]).is_empty());
        }
    }
}
