//! The pod of a process, by its control groups: kubelets put every container below a group named after its pod's UID.
//!
//! The names are those of Kubernetes' container manager, with the driver `cgroupfs` or `systemd`:
//!
//! ```text
//! /kubepods/burstable/pod0e2b6c1e-3f1a-4c52-9d4f-0123456789ab/CONTAINER
//! /kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0e2b6c1e_3f1a_4c52_9d4f_0123456789ab.slice/cri-containerd-…
//! ```
//!
//! Below its own group a process may make others and name them as it likes, so the first group of such a name counts.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The UID that the API server gave a pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PodUid(String);

/// Why a process is in no pod.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoPod {
    /// Not a container of a kubelet.
    #[error("it belongs to no pod (control group {0}); processes of the node itself get no identity")]
    Outside(String),
    /// That is no kubelet's work.
    #[error("its control groups are those of two pods, {0} and {1}")]
    Two(PodUid, PodUid),
}

/// A text that is no UID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no UID of a pod; expected for example 0e2b6c1e-3f1a-4c52-9d4f-0123456789ab")]
pub struct NoUid(String);

/// Tells pods by control groups as the agent sees them.
#[derive(Debug, Clone)]
pub struct Pods {
    /// The agent's own pod, where the agent sees its own container as the root of all groups (cgroup v2, a cgroup
    /// namespace of its own): others of this pod then stand beside it, without the pod's name.
    own: Option<PodUid>,
}

impl Pods {
    /// For an agent in the pod of this UID, with these control groups (`/proc/self/cgroup`).
    #[must_use]
    pub fn new(own: Option<PodUid>, own_groups: &str) -> Self {
        Self { own: own.filter(|_| named(own_groups).ok().flatten().is_none()) }
    }

    /// The pod of a process with these control groups (`/proc/PID/cgroup`).
    ///
    /// # Errors
    /// It is in none.
    pub fn of(&self, groups: &str) -> Result<PodUid, NoPod> {
        if let Some(pod) = named(groups)? {
            return Ok(pod);
        }
        let paths: Vec<_> = paths(groups).collect();
        // Within the agent's container, or within one beside it.
        let beside = |path: &&str| {
            let up = path.split('/').filter(|part| *part == "..").count();
            up == 0 || up == 1 && path.starts_with("/../")
        };
        match &self.own {
            Some(own) if !paths.is_empty() && paths.iter().all(beside) => Ok(own.clone()),
            _ => Err(NoPod::Outside(
                paths.iter().max_by_key(|path| path.len()).unwrap_or(&"unknown").to_string(),
            )),
        }
    }
}

/// The pod that control groups name.
fn named(groups: &str) -> Result<Option<PodUid>, NoPod> {
    let mut found: Option<PodUid> = None;
    for path in paths(groups) {
        match (&found, path.split('/').find_map(uid_of)) {
            (Some(one), Some(other)) if *one != other => return Err(NoPod::Two(one.clone(), other)),
            (None, Some(pod)) => found = Some(pod),
            _ => {}
        }
    }
    Ok(found)
}

/// `hierarchy:controllers:path` a line, `cgroups(7)`.
fn paths(groups: &str) -> impl Iterator<Item = &str> {
    groups.lines().filter_map(|line| line.splitn(3, ':').nth(2))
}

/// The UID in a group's name.
fn uid_of(group: &str) -> Option<PodUid> {
    let uid = match group.strip_suffix(".slice") {
        Some(slice) => slice
            .rsplit_once("-pod")
            .filter(|(before, _)| before.starts_with("kubepods"))?
            .1
            .replace('_', "-"),
        None => group.strip_prefix("pod")?.to_owned(),
    };
    PodUid::try_from(uid).ok()
}

impl PodUid {
    /// As the API server writes it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for PodUid {
    type Error = NoUid;

    fn try_from(text: String) -> Result<Self, NoUid> {
        let parts = [8, 4, 4, 4, 12];
        let good = text.split('-').map(str::len).eq(parts)
            && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'-'));
        if good { Ok(Self(text)) } else { Err(NoUid(text.chars().take(80).collect())) }
    }
}

impl From<PodUid> for String {
    fn from(uid: PodUid) -> Self {
        uid.0
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0e2b6c1e-3f1a-4c52-9d4f-0123456789ab";
    const OTHER: &str = "aaaaaaaa-3f1a-4c52-9d4f-0123456789ab";

    fn uid(text: &str) -> PodUid {
        PodUid::try_from(text.to_owned()).unwrap()
    }

    #[test]
    fn kubelets_of_both_drivers_and_both_versions_of_control_groups_name_pods() {
        let pods = Pods::new(None, "0::/system.slice/ssh.service\n");
        let slice = UID.replace('-', "_");
        for groups in [
            format!("0::/kubepods/besteffort/pod{UID}/abc"),
            // Guaranteed.
            format!("0::/kubepods/pod{UID}/abc"),
            format!("0::/kubepods.slice/kubepods-pod{slice}.slice/cri-containerd-abc.scope"),
            format!(
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{slice}.slice/crio-abc.scope"
            ),
            // As an agent in a cgroup namespace of its own sees others.
            format!("0::/../../../burstable/pod{UID}/abc"),
            format!(
                "9:name=systemd:/\n4:memory:/node1/kubepods/besteffort/pod{UID}/abc\n1:cpu:/node1/kubepods/besteffort/pod{UID}/abc\n0::/"
            ),
            // What a process makes below its own group counts for nothing.
            format!("0::/kubepods/besteffort/pod{UID}/abc/pod{OTHER}/x"),
        ] {
            assert_eq!(pods.of(&groups), Ok(uid(UID)), "{groups}");
        }
    }

    #[test]
    fn who_is_in_no_pod_is_told_so() {
        let pods = Pods::new(Some(uid(UID)), &format!("0::/kubepods/pod{UID}/abc"));
        for groups in [
            "0::/system.slice/ssh.service",
            "0::/",
            "",
            "nonsense",
            "0::/kubepods/besteffort/podX/abc",
            &format!("0::/user.slice/x-pod{}.slice/y", UID.replace('-', "_")),
            &format!("0::/kubepods/pod{}/abc", UID.to_uppercase()),
        ] {
            assert!(matches!(pods.of(groups), Err(NoPod::Outside(_))), "{groups}");
        }
        let said = pods.of("0::/system.slice/ssh.service").unwrap_err().to_string();
        assert!(said.contains("/system.slice/ssh.service") && said.contains("no pod"), "{said}");
        let two = format!("2:cpu:/kubepods/pod{UID}/a\n1:memory:/kubepods/pod{OTHER}/a\n");
        assert_eq!(pods.of(&two), Err(NoPod::Two(uid(UID), uid(OTHER))));
    }

    #[test]
    fn an_agent_that_sees_itself_as_the_root_knows_its_own_pod() {
        let pods = Pods::new(Some(uid(UID)), "0::/\n");
        for own in ["0::/", "0::/below", "0::/../cri-containerd-abc.scope", "0::/../abc/below"] {
            assert_eq!(pods.of(own), Ok(uid(UID)), "{own}");
        }
        assert_eq!(pods.of(&format!("0::/../../pod{OTHER}/abc")), Ok(uid(OTHER)));
        for outside in ["0::/../../../system.slice/ssh.service", "0::/../..", "0::/x/../../y", ""] {
            assert!(matches!(pods.of(outside), Err(NoPod::Outside(_))), "{outside}");
        }
    }
}
