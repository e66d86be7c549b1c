//! The program with upstream's roles, for tests and benchmarks: built from `interop/` when it is needed.
//!
//! It is a Go program. What Go compiles once it keeps: the cache is beside cargo's target directory, outside of the
//! checkout, so that only the first build on a machine takes long (about 45 s); later ones see in a moment that nothing
//! has changed. The program is `interop/upstream` in the target directory itself.
//!
//! [`Module`] is that way of building for any Go module of this project; `nsm-cluster` builds its Kubernetes by it.

use std::{
    ffi::OsStr,
    fmt,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Names a program that is used instead of building one.
pub const OVERRIDE: &str = "NSM_UPSTREAM_PEER";

/// The root of this project. Cargo says at run time where that is; what was true at compile time is not where a build
/// directory serves several checkouts.
#[must_use]
pub fn checkout() -> PathBuf {
    let said = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let package = said.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")));
    package.ancestors().find(|at| at.join("Cargo.lock").is_file()).unwrap_or(&package).to_owned()
}

const UPSTREAM: Module = Module { source: "interop", programs: "interop" };

/// Why there is no program.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// Go is not installed.
    NoGo,
    /// [`OVERRIDE`] names no file.
    NoSuchFile(PathBuf),
    /// A directory or file that the build needs cannot be made.
    Files(PathBuf, io::Error),
    /// Go says why it does not compile, or what it cannot download.
    Build {
        /// The module, below the project's root.
        module: &'static str,
        /// What Go said.
        said: String,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoGo => {
                f.write_str("Go is not installed; its `go` must be in PATH or in /usr/local/go/bin")
            }
            Self::NoSuchFile(path) => write!(f, "{OVERRIDE} names {}, which is no file", path.display()),
            Self::Files(path, error) => write!(f, "{}: {error}", path.display()),
            Self::Build { module, said } => {
                write!(
                    f,
                    "`go build` in {module}/ failed (it needs its modules, or a proxy to get them from):\n{said}"
                )
            }
        }
    }
}

impl std::error::Error for Error {}

/// The program, for the test of that name; `None` where Go is missing, which is said as tests say it.
///
/// # Panics
/// If Go is there and the program cannot be built: then what it would have tested is not known to work.
#[must_use]
#[allow(clippy::print_stdout, reason = "a test that cannot run says so")]
pub fn program(test: &str) -> Option<PathBuf> {
    match build() {
        Ok(path) => Some(path),
        Err(Error::NoGo) => {
            println!("SKIPPED {test}: {}", Error::NoGo);
            None
        }
        Err(error) => panic!("{test}: {error}"),
    }
}

/// Builds the program, if anything changed, and tells where it is.
///
/// # Errors
/// Without Go, or if it does not compile.
pub fn build() -> Result<PathBuf, Error> {
    if let Some(path) = std::env::var_os(OVERRIDE).map(PathBuf::from) {
        return if path.is_file() { Ok(path) } else { Err(Error::NoSuchFile(path)) };
    }
    UPSTREAM.build(".", "upstream", "")
}

/// A Go module of this project, whose programs tests run.
#[derive(Debug)]
pub struct Module {
    /// Where it is, below the project's root.
    pub source: &'static str,
    /// The directory below cargo's target directory that its programs go to.
    pub programs: &'static str,
}

impl Module {
    /// Where a program of it is once it is built.
    ///
    /// # Errors
    /// This process is no program in a target directory of cargo.
    pub fn program(&self, name: &str) -> Result<PathBuf, Error> {
        let target = target().map_err(|e| Error::Files("/proc/self/exe".into(), e))?;
        Ok(target.join(self.programs).join(name))
    }

    /// Builds a package as a static program, if anything changed; `stamp` is for the linker (`-X …`).
    ///
    /// # Errors
    /// Without Go, or if it does not compile.
    pub fn build(&self, package: &str, name: &str, stamp: &str) -> Result<PathBuf, Error> {
        let program = self.program(name)?;
        let directory = program.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(directory).map_err(|e| Error::Files(directory.to_owned(), e))?;
        // Many tests ask at the same time.
        let path = directory.join("lock");
        let lock = File::create(&path).and_then(|lock| lock.lock().map(|()| lock));
        let _lock = lock.map_err(|e| Error::Files(path, e))?;
        let flags = ["build", "-trimpath", "-buildvcs=false", &format!("-ldflags=-s -w {stamp}"), "-o"];
        self.go(flags.map(OsStr::new).into_iter().chain([program.as_os_str(), package.as_ref()]))?;
        Ok(program)
    }

    /// Runs Go in the module and returns what it printed.
    ///
    /// # Errors
    /// Without Go, or if it fails.
    pub fn go(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<String, Error> {
        let go = go().ok_or(Error::NoGo)?;
        let mut command = Command::new(&go);
        command
            .args(args)
            .current_dir(checkout().join(self.source))
            // What is pinned is what is built, and nothing is linked that the machine may not have.
            .envs([("GOFLAGS", "-mod=readonly"), ("GOTOOLCHAIN", "local"), ("CGO_ENABLED", "0")])
            .stdin(Stdio::null());
        if std::env::var_os("GOCACHE").is_none() {
            let target = target().map_err(|e| Error::Files("/proc/self/exe".into(), e))?;
            command.env("GOCACHE", cache(&target));
        }
        let output = command.output().map_err(|e| Error::Files(go, e))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(Error::Build { module: self.source, said });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn go() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates = std::env::split_paths(&path).chain([PathBuf::from("/usr/local/go/bin")]);
    candidates.find_map(|directory| Some(directory.join("go")).filter(|go| go.is_file()))
}

/// Cargo's target directory, which this program is in: the directory above that of the profile, which cargo keeps its
/// fingerprints in.
fn target() -> io::Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let profile = exe.ancestors().find(|directory| directory.join(".fingerprint").is_dir());
    profile.and_then(Path::parent).map(Path::to_owned).ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, "this program is in no target directory of cargo")
    })
}

/// Beside the target directory, which is one per machine; within it where beside it is the checkout.
fn cache(target: &Path) -> PathBuf {
    match target.parent().filter(|parent| !parent.join("Cargo.toml").exists()) {
        Some(beside) => beside.join("go-build"),
        None => target.join("go-build"),
    }
}

#[cfg(test)]
#[allow(clippy::expect_used, clippy::print_stdout)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn it_is_built_once_and_says_what_it_offers() {
        let Some(path) = program("it_is_built_once_and_says_what_it_offers") else { return };
        // Go touches what is up to date; a new one would be another file, or cut under the feet of who runs it.
        let file = |path: &Path| fs::metadata(path).map(|meta| (meta.ino(), meta.len())).expect("a file");
        let built = file(&path);
        let output = Command::new(&path).output().expect("start");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            !output.status.success() && said.contains("registry, manager, forwarder, endpoint"),
            "{said}"
        );
        assert_eq!(build().expect("again"), path);
        assert_eq!(file(&path), built);
    }

    #[test]
    fn the_cache_is_outside_of_the_checkout() {
        let checkout = checkout();
        assert_eq!(cache(&checkout.join("target")), checkout.join("target/go-build"));
        assert_eq!(cache(Path::new("/var/cache/nsm/target")), Path::new("/var/cache/nsm/go-build"));
    }

    #[test]
    fn errors_say_what_to_do() {
        let texts = [
            Error::NoGo.to_string(),
            Error::NoSuchFile("/nowhere".into()).to_string(),
            Error::Build { module: "interop", said: "undefined: x".into() }.to_string(),
        ];
        for (text, word) in texts.iter().zip(["/usr/local/go/bin", OVERRIDE, "undefined: x"]) {
            assert!(text.contains(word), "{text}");
        }
    }
}
