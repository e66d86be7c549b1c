//! The cluster ring: a control plane on this machine, and nodes of their own on its bridge.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    ops::Deref,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use crate::{Error, Kubectl, api::tail};

/// What it is run by.
const SCRIPTS: &str = "tests/kube";

/// Programs that nodes run, with the Debian packages they are in.
pub const PACKAGES: [(&str, &str); 5] = [
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    ("iptables", "iptables"),
    ("/bin/busybox", "busybox-static"),
];

/// A cluster with nodes. It ends, and leaves nothing, when this is dropped or its process dies.
///
/// A node is a tree of processes in namespaces of its own (mounts, network, processes, host name), with its own `/run`
/// and `/var/lib/kubelet`. Images are not pulled: [`Cluster::load`] brings them, `testbed.local/busybox:1` is there.
#[derive(Debug)]
pub struct Cluster {
    kubectl: Kubectl,
    nodes: u32,
    // Runs `cluster.sh`, which takes all down when its standard input closes.
    supervisor: Child,
}

impl Cluster {
    /// Starts one and returns when all nodes are ready.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(program: &Path, nodes: u32) -> Result<Self, Error> {
        let programs = program.parent().unwrap_or(Path::new("/"));
        let log = programs.join(format!("cluster-{}.log", std::process::id()));
        let stderr = File::create(&log).map_err(Error::system(log.display().to_string()))?;
        let mut supervisor = script("cluster.sh", programs);
        supervisor
            .env("NODES", nodes.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr);
        // What a terminal sends to a test is not for it: it has to clean up.
        supervisor.process_group(0);
        let mut supervisor = supervisor.spawn().map_err(Error::system("start cluster.sh"))?;
        let mut said = String::new();
        let read = supervisor.stdout.as_mut().map(|stdout| BufReader::new(stdout).read_line(&mut said));
        let read = read.transpose().map_err(Error::system("read from cluster.sh"));
        let state = said.trim().strip_prefix("ready ").map(PathBuf::from);
        // Owned from here on: whatever is wrong, it is taken down.
        let kubectl = Kubectl { program: program.to_owned(), directory: state.clone().unwrap_or_default() };
        let cluster = Self { kubectl, nodes, supervisor };
        read?;
        let ready = state.ok_or_else(|| Error::Ended { component: "the cluster", log: tail(&log) }).map(drop);
        // It says no more.
        let _ = fs::remove_file(&log);
        ready.map(|()| cluster)
    }

    /// How many nodes there are: `node1`, `node2` and so on.
    #[must_use]
    pub fn nodes(&self) -> u32 {
        self.nodes
    }

    /// Where its files are; `node1/` is what node 1 has as its own directories.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.kubectl.directory
    }

    /// A node's first process, whose namespaces are the node's.
    ///
    /// # Panics
    /// If there is no such node.
    #[must_use]
    pub fn pid(&self, node: u32) -> u32 {
        let path = self.directory().join(format!("node{node}/pid"));
        let pid = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        pid.trim().parse().unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    /// A program in a node.
    #[must_use]
    pub fn in_node(&self, node: u32, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args([
            "--target",
            &self.pid(node).to_string(),
            "--mount",
            "--net",
            "--pid",
            "--uts",
            "--ipc",
        ]);
        command.args(["--", program]).stdin(Stdio::null());
        command
    }

    /// Imports an archive of images (of `docker save`, or an OCI layout) on every node.
    ///
    /// # Panics
    /// With what `ctr` said, if it cannot be imported.
    pub fn load(&self, archive: &Path) {
        for node in 1..=self.nodes {
            let mut import = self.in_node(node, "ctr");
            import.args(["--namespace", "k8s.io", "images", "import", "-"]);
            let archive = File::open(archive).unwrap_or_else(|e| panic!("{}: {e}", archive.display()));
            done("import an image", import.stdin(archive).output());
        }
    }

    /// Cuts a node's power.
    ///
    /// # Panics
    /// If there is no such node.
    pub fn cut(&self, node: u32) {
        done("kill a node", Command::new("kill").args(["-9", &self.pid(node).to_string()]).output());
    }

    /// Starts a node again after [`Cluster::cut`], with the disk that it had.
    ///
    /// # Panics
    /// With what was said, if it does not start.
    pub fn boot(&self, node: u32) {
        let slot = self.directory().to_string_lossy().rsplit('-').next().unwrap_or_default().to_owned();
        let programs = self.kubectl.program.parent().unwrap_or(Path::new("/"));
        let mut boot = script("node-up.sh", programs);
        boot.arg(node.to_string()).env("STATE", self.directory()).env("SLOT", slot);
        done("boot a node", boot.env("NODES", self.nodes.to_string()).output());
    }
}

impl Deref for Cluster {
    type Target = Kubectl;

    fn deref(&self) -> &Kubectl {
        &self.kubectl
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.supervisor.stdin.take());
        let _ = self.supervisor.wait();
    }
}

/// Ends what clusters left whose supervisors were killed, and tells of which.
///
/// # Errors
/// The script cannot be started, or fails.
pub fn clean(program: &Path) -> Result<String, Error> {
    let mut command = script("cluster.sh", program.parent().unwrap_or(Path::new("/")));
    let output = command.arg("clean").output().map_err(Error::system("start cluster.sh"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Error::Ended {
        component: "cluster.sh clean",
        log: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// What a cluster needs that is not here.
pub(crate) fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("its nodes need root".into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories: Vec<_> = std::env::split_paths(&path).chain(["/usr/sbin".into()]).collect();
    let here = |program: &str| directories.iter().any(|directory| directory.join(program).is_file());
    let missing: Vec<_> =
        PACKAGES.iter().filter(|(program, _)| !here(program)).map(|(_, package)| *package).collect();
    (!missing.is_empty()).then(|| {
        format!(
            "Debian packages are missing: {}; `cargo xtask kube build` as root installs them",
            missing.join(", ")
        )
    })
}

fn script(name: &str, programs: &Path) -> Command {
    let mut command = Command::new(nsm_upstream::checkout().join(SCRIPTS).join(name));
    command.env("BIN", programs).stdin(Stdio::null());
    command
}

fn done(what: &str, output: std::io::Result<Output>) {
    let output = output.unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
}
