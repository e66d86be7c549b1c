//! The API ring: etcd and an API server in one process.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    net::{Ipv4Addr, SocketAddr},
    ops::Deref,
    os::fd::OwnedFd,
    path::Path,
    process::{Child, Command, Stdio},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with, sockopt};
use tempfile::TempDir;

use crate::{Error, Kubectl};

/// An API server and its etcd. They end, and their files go, when this is dropped or its process dies.
#[derive(Debug)]
pub struct ApiServer {
    // Holds the other end of its standard input, whose closing ends it.
    process: Option<Child>,
    kubectl: Kubectl,
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
        let kubectl = Kubectl { program: program.to_owned(), directory: directory.path().to_owned() };
        let mut server = Self { process: None, kubectl, _port: reserved, port, directory };
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
        let mut process = Command::new(&self.kubectl.program)
            .arg("api-ring")
            .arg(self.directory.path())
            .arg(self.port.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(Error::system(format!("start {}", self.kubectl.program.display())))?;
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

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }
}

impl Deref for ApiServer {
    type Target = Kubectl;

    fn deref(&self) -> &Kubectl {
        &self.kubectl
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

pub(crate) fn tail(path: &Path) -> String {
    let log = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
