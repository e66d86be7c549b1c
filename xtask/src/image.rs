//! `cargo xtask image`: builds the program and has images made of it (`crates/image`).

use std::{
    collections::BTreeMap,
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use nsm_image::{Contents, interpreter, sbom, write};

/// What to make images of, and where.
#[derive(Debug, clap::Args)]
pub(crate) struct Image {
    /// Pack this program instead of building nsm: statically linked, for the machine's own architecture
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Where nsm.tar and oci/ go; by default image/ in cargo's target directory
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// What stands behind the colon of the images' names
    #[arg(long, default_value = "dev")]
    tag: String,
}

impl Image {
    pub(crate) fn make(&self) -> Result<()> {
        let target =
            env::var_os("CARGO_TARGET_DIR").map_or_else(|| super::root().join("target"), PathBuf::from);
        let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
        let program = match &self.binary {
            Some(path) => read(path)?,
            None => {
                let program = read(&build(&target)?)?;
                if let Some(interpreter) = interpreter(&program) {
                    bail!("the program wants {interpreter}, which the image does not have: it is not static");
                }
                program
            }
        };
        let output = self.output.clone().unwrap_or_else(|| target.join("image"));
        let bytes = program.len();
        let sbom = sbom(&lock()?, &dependencies()?)?;
        let images = write(&output, &Contents { program, libraries: BTreeMap::new(), sbom }, &self.tag)?;
        let mut out = std::io::stdout().lock();
        for image in &images {
            writeln!(out, "{:<36} {}", image.name, image.digest).context("write")?;
        }
        writeln!(out, "{}: the program has {bytes} bytes", output.display()).context("write")
    }
}

/// Builds `nsm` without a dynamic linker, in a directory of its own: other flags are other artefacts.
fn build(target: &Path) -> Result<PathBuf> {
    let triple = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let directory = target.join("static");
    // With --target, so that the flags are not for build scripts and macros.
    let status = super::cargo(&["build", "--release", "--locked", "--package", "nsm", "--target", &triple])
        .env("CARGO_TARGET_DIR", &directory)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .status()
        .context("start cargo")?;
    if !status.success() {
        bail!("cargo build ended with {status}");
    }
    Ok(directory.join(triple).join("release/nsm"))
}

fn lock() -> Result<String> {
    let path = super::root().join("Cargo.lock");
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// What is linked into the program, one crate a line: `name version|licence`.
fn dependencies() -> Result<String> {
    let format = ["--prefix", "none", "--format", "{p}|{l}"];
    let tree = ["tree", "--locked", "--package", "nsm", "--edges", "normal"];
    let said = super::cargo(&[&tree[..], &format].concat()).output().context("start cargo tree")?;
    if !said.status.success() {
        bail!("cargo tree ended with {}: {}", said.status, String::from_utf8_lossy(&said.stderr));
    }
    String::from_utf8(said.stdout).context("read cargo tree")
}
