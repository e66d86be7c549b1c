//! The API ring: etcd and an API server in one process.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    net::{Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with, sockopt};
use tempfile::TempDir;

use crate::Error;

/// An API server and its etcd. They end, and their files go, when this is dropped or its process dies.
#[derive(Debug)]
pub struct ApiServer {
    // Holds the other end of its standard input, whose closing ends it.
    process: Option<Child>,
    program: PathBuf,
    // Bound but not listening: nobody else gets the port, also while the server is killed.
    _port: OwnedFd,
    port: u16,
    directory: TempDir,
}

impl ApiServer {
    /// Starts one and returns when it serves.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(program: &Path) -> Result<Self, Error> {
        // Short, because a socket of etcd is in it.
        let directory = tempfile::Builder::new().prefix("nsm-kube-").tempdir();
        let directory = directory.map_err(Error::system("make a directory"))?;
        let (reserved, port) =
            reserve().map_err(|error| Error::system("reserve a port of loopback")(error.into()))?;
        let mut server =
            Self { process: None, program: program.to_owned(), _port: reserved, port, directory };
        server.go_on()?;
        Ok(server)
    }

    /// Kills it, as a crash would. Its address and its data stay.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // A process that has ended already can do nothing more.
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Starts it again after [`ApiServer::kill`], at its address and with its data, and returns when it serves.
    ///
    /// # Errors
    /// It does not start.
    pub fn go_on(&mut self) -> Result<(), Error> {
        self.kill();
        let path = self.directory.path().join("log");
        let log = File::options().create(true).append(true).open(&path);
        let log = log.map_err(Error::system(path.display().to_string()))?;
        let mut process = Command::new(&self.program)
            .arg("api-ring")
            .arg(self.directory.path())
            .arg(self.port.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(Error::system(format!("start {}", self.program.display())))?;
        let mut said = String::new();
        // Not taken out: it would be closed, and who writes to a closed one is killed.
        let read = process.stdout.as_mut().map(|stdout| BufReader::new(stdout).read_line(&mut said));
        self.process = Some(process);
        read.transpose().map_err(Error::system("read from the API server"))?;
        if said.trim() == "ready" {
            return Ok(());
        }
        self.kill();
        Err(Error::Ended { component: "the API server", log: tail(&path) })
    }

    /// The kubeconfig of somebody who may do everything.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("pki/admin.conf")
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// Runs kubectl with all rights and returns what it printed.
    ///
    /// # Panics
    /// With what it said, if it fails.
    #[must_use]
    pub fn kubectl(&self, args: &[&str]) -> String {
        let output = self.kubectl_command().args(args).output().unwrap_or_else(|e| panic!("kubectl: {e}"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {}: {said}", args.join(" "));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// kubectl with all rights, for those who write to it or want it to fail.
    #[must_use]
    pub fn kubectl_command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("kubectl").env("KUBECONFIG", self.kubeconfig()).stdin(Stdio::null());
        command
    }

    /// Applies a manifest (`kubectl apply --server-side`).
    ///
    /// # Panics
    /// With what kubectl said, if it is refused.
    pub fn apply(&self, manifest: &str) {
        let path = self.directory.path().join("manifest.yaml");
        fs::write(&path, manifest).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let path = path.to_string_lossy();
        let _said = self.kubectl(&["apply", "--server-side", "--force-conflicts", "--filename", &path]);
    }

    /// Applies custom resource definitions and returns when their resources are served.
    ///
    /// # Panics
    /// With what kubectl said, if one is refused, or if they are not served within a minute.
    pub fn install(&self, definitions: &[&str]) {
        definitions.iter().for_each(|definition| self.apply(definition));
        let _met = self.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"]);
        // Established is said a moment before requests are served.
        let names = self.kubectl(&["get", "crd", "--output=jsonpath={.items[*].metadata.name}"]);
        let end = Instant::now() + Duration::from_secs(60);
        for name in names.split_whitespace() {
            while !self.kubectl_command().args(["get", name]).output().is_ok_and(|got| got.status.success()) {
                assert!(Instant::now() < end, "{name} are not served");
                sleep(Duration::from_millis(20));
            }
        }
    }

    /// The kubeconfig of a service account, which is made if it is not there: it may do what RBAC lets it.
    ///
    /// # Panics
    /// If there is no such namespace.
    #[must_use]
    pub fn kubeconfig_of(&self, namespace: &str, account: &str) -> PathBuf {
        self.apply(&format!(
            "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {account}, namespace: {namespace}}}\n"
        ));
        let token = self.kubectl(&["create", "token", account, "--namespace", namespace, "--duration=24h"]);
        let path = self.directory.path().join(format!("{namespace}.{account}.conf"));
        fs::copy(self.kubeconfig(), &path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let config = |args: &[&str]| {
            let mut command = self.kubectl_command();
            let done = command.arg("config").args(args).env("KUBECONFIG", &path).output();
            assert!(done.is_ok_and(|done| done.status.success()), "kubectl config {args:?}");
        };
        config(&["set-credentials", account, &format!("--token={}", token.trim())]);
        config(&["set-context", "--current", &format!("--user={account}"), "--namespace", namespace]);
        path
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It removes its files and ends; what it does not, the directory's own end does.
            drop(process.stdin.take());
            let _ = process.wait();
        }
    }
}

/// A port of loopback that nobody else can have; who says `SO_REUSEPORT` and is the same user may listen there.
fn reserve() -> rustix::io::Result<(OwnedFd, u16)> {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    bind(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    let address = SocketAddr::try_from(getsockname(&socket)?)?;
    Ok((socket, address.port()))
}

fn tail(path: &Path) -> String {
    let log = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
