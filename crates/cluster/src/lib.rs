//! A real Kubernetes for tests, built from `tests/kube/`: the *API ring* is etcd and an API server, the *cluster ring*
//! has nodes that run pods.
//!
//! A test that needs an API server asks for one, and has it to itself:
//!
//! ```no_run
//! # fn pods_are_listed() {
//! let Some(server) = nsm_cluster::api_server("pods_are_listed") else { return };
//! let pods = server.kubectl(&["get", "pods", "--all-namespaces", "--output=name"]);
//! assert_eq!(pods, "");
//! // For a program or a client library: KUBECONFIG, with all rights.
//! println!("{}", server.kubeconfig().display());
//! # }
//! ```
//!
//! It listens on a port of loopback that is its own, and it and its files go with the value, also when the test panics
//! or is killed. No controllers run beside it: nobody makes the service account `default` of a namespace, collects
//! garbage, or turns a Deployment into pods.
//!
//! [`cluster`] is the same with controllers, DNS and two nodes; it needs root and takes some fifteen seconds.
//!
//! The first build takes eight minutes of a processor, so that no test starts it: `cargo xtask kube build` and
//! `cargo xtask test --all` do. Where that has not been done, tests say `SKIPPED`. What Go compiled is kept beside
//! cargo's target directory (`nsm_upstream`).

mod api;
mod kubectl;
mod ring;

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use nsm_upstream::Module;

pub use api::ApiServer;
pub use kubectl::Kubectl;
pub use ring::{Cluster, PACKAGES, clean};

const MODULE: Module = Module { source: "tests/kube", programs: "kube" };

/// Every component of Kubernetes in one program.
const PROGRAM: &str = "kube-testbed";

/// Why there is no Kubernetes.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// It is not built.
    NotBuilt,
    /// Something is missing that its nodes need.
    Missing(String),
    /// It cannot be built.
    Build(nsm_upstream::Error),
    /// A file, a port or a process that it needs.
    System {
        /// What was done.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A component ended instead of getting ready.
    Ended {
        /// Which.
        component: &'static str,
        /// The end of its log.
        log: String,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotBuilt => f.write_str(
                "the Kubernetes of tests/kube/ is not built; `cargo xtask kube build` builds it, the first time in \
                 some ten minutes",
            ),
            Self::Missing(what) => f.write_str(what),
            Self::Build(error) => error.fmt(f),
            Self::System { what, source } => write!(f, "{what}: {source}"),
            Self::Ended { component, log } => {
                write!(f, "{component} ended before it was ready; the end of its log:\n{log}")
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Build(error) => Some(error),
            Self::System { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl Error {
    fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        |source| Self::System { what, source }
    }
}

/// An API server for the test of that name; `None` where Kubernetes is not built, which is said as tests say it.
///
/// # Panics
/// If it is built and does not start: then what it would have tested is not known to work.
#[must_use]
pub fn api_server(test: &str) -> Option<ApiServer> {
    or_skip(test, program().and_then(ApiServer::start))
}

/// A cluster with two nodes for the test of that name; `None` where it cannot run, which is said as tests say it.
///
/// # Panics
/// If it is built and does not start.
#[must_use]
pub fn cluster(test: &str) -> Option<Cluster> {
    let needed = ring::missing().map_or(Ok(()), |what| Err(Error::Missing(what)));
    let started = program().and_then(|program| needed.and_then(|()| Cluster::start(program, 2)));
    or_skip(test, started)
}

#[allow(clippy::print_stdout, reason = "a test that cannot run says so")]
fn or_skip<C>(test: &str, started: Result<C, Error>) -> Option<C> {
    match started {
        Ok(cluster) => Some(cluster),
        Err(Error::Build(nsm_upstream::Error::NoGo)) => {
            println!("SKIPPED {test}: {}", Error::NotBuilt);
            None
        }
        Err(error @ (Error::NotBuilt | Error::Missing(_))) => {
            println!("SKIPPED {test}: {error}");
            None
        }
        Err(error) => panic!("{test}: {error}"),
    }
}

/// Builds everything, if anything changed, and tells where the program is. The first time takes minutes.
///
/// # Errors
/// Without Go, or if it does not compile.
pub fn build() -> Result<PathBuf, Error> {
    // Clients compare versions, and a program without one calls itself v0.0.0-master.
    let version =
        MODULE.go(["list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes"]).map_err(Error::Build)?;
    let version = version.trim();
    let mut parts = version.trim_start_matches('v').split('.');
    let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let package = "k8s.io/component-base/version";
    let stamp = format!(
        "-X {package}.gitVersion={version} -X {package}.gitMajor={major} -X {package}.gitMinor={minor} \
         -X {package}.gitTreeState=clean"
    );
    for name in ["pause", "coredns"] {
        MODULE.build(&format!("./{name}"), name, "").map_err(Error::Build)?;
    }
    // The last one: who finds it finds all.
    MODULE.build(".", PROGRAM, &stamp).map_err(Error::Build)
}

/// The program, if it was ever built; as its sources are now.
///
/// # Errors
/// [`Error::NotBuilt`], or it does not compile any more.
pub fn program() -> Result<&'static Path, Error> {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    if let Some(program) = BUILT.get() {
        return Ok(program);
    }
    if !MODULE.program(PROGRAM).map_err(Error::Build)?.is_file() {
        return Err(Error::NotBuilt);
    }
    let program = build()?;
    Ok(BUILT.get_or_init(|| program))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_to_do() {
        let ended = Error::Ended { component: "the API server", log: "bind: address already in use".into() };
        let system = Error::system("start /nowhere")(io::ErrorKind::NotFound.into());
        let said = [Error::NotBuilt, ended, system].map(|error| error.to_string());
        for (said, word) in said.iter().zip(["cargo xtask kube build", "already in use", "start /nowhere"]) {
            assert!(said.contains(word), "{said}");
        }
    }
}
