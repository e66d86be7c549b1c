//! Container images, written without a container daemon: for `cargo xtask image`, and for tests that run them.
//!
//! One layer, which holds the static program, links to it under the names of upstream's programs, and what it is made of
//! (SPDX). Over it one image for each name, which differ in what they run and as whom. The same program gives the same
//! bytes: everything is sorted, and nothing has a time.

#[path = "../../nsm/src/programs.rs"]
mod programs;

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use programs::{INSIDE, PROGRAMS};

/// Nobody whom any distribution knows.
const NOBODY: &str = "65532:65532";
/// Nothing here happened at a time.
const NO_TIME: &str = "1970-01-01T00:00:00Z";

/// What all images have in common: one layer.
#[derive(Debug, Clone)]
pub struct Contents {
    /// `nsm`.
    pub program: Vec<u8>,
    /// Other files that it needs, by their paths: none, where it is static ([`libraries`]).
    pub libraries: BTreeMap<String, Vec<u8>>,
    /// What it is made of.
    pub sbom: String,
}

/// An image that was written.
#[derive(Debug, Clone)]
pub struct Written {
    /// With its tag.
    pub name: String,
    /// Of its manifest.
    pub digest: String,
}

/// Writes `nsm.tar`, as `docker load` and `ctr images import` take it, and the OCI layout `oci/` into a directory: an image
/// for `nsm` and for each name of [`PROGRAMS`].
///
/// # Errors
/// A file cannot be written.
pub fn write(output: &Path, contents: &Contents, tag: &str) -> Result<Vec<Written>> {
    let layer = layer(contents)?;
    let images = images(&layer, tag);
    archives(output, &layer, &images)?;
    let written = |image: &Made| Written { name: image.name.clone(), digest: image.manifest.digest() };
    Ok(images.iter().map(written).collect())
}

/// The files that a program needs which is not static, as its dynamic linker finds them here: for tests, whose images are
/// run where they are made.
///
/// # Errors
/// `ldd` cannot be run, or a file cannot be read.
pub fn libraries(program: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let said = Command::new("ldd").arg(program).output().context("start ldd")?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    // `NAME => PATH (ADDRESS)`, or for the linker itself `PATH (ADDRESS)`.
    let paths = said.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    let file = |path: &str| {
        Ok((path.trim_start_matches('/').to_owned(), fs::read(path).with_context(|| path.to_owned())?))
    };
    paths.map(file).collect()
}

/// Bytes that are named by what they are.
struct Blob(Vec<u8>);

impl Blob {
    fn json(value: &Value) -> Self {
        Self(value.to_string().into_bytes())
    }

    fn hex(&self) -> String {
        Sha256::digest(&self.0).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn digest(&self) -> String {
        format!("sha256:{}", self.hex())
    }

    fn described(&self, media_type: &str) -> Value {
        json!({ "mediaType": media_type, "digest": self.digest(), "size": self.0.len() })
    }
}

/// An image over the layer.
struct Made {
    name: String,
    config: Blob,
    manifest: Blob,
}

/// The dynamic linker that a program asks for (`PT_INTERP` of ELF64, little-endian).
#[must_use]
pub fn interpreter(elf: &[u8]) -> Option<String> {
    let number = |at: usize, bytes: usize| -> Option<usize> {
        let bytes = elf.get(at..at.checked_add(bytes)?)?;
        bytes
            .iter()
            .rev()
            .try_fold(0_usize, |number, byte| number.checked_mul(256)?.checked_add(usize::from(*byte)))
    };
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    let headers = (0..count).filter_map(|i| table.checked_add(i * size).filter(|at| *at <= elf.len()));
    let at = headers.into_iter().find(|at| number(*at, 4) == Some(3))?;
    let (offset, length) = (number(at + 8, 8)?, number(at + 32, 8)?);
    let name = elf.get(offset..offset.checked_add(length)?)?;
    Some(String::from_utf8_lossy(name).trim_end_matches('\0').to_owned())
}

/// A tar archive without anything that differs from machine to machine.
struct Archive(tar::Builder<Vec<u8>>);

impl Archive {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn header(kind: tar::EntryType, mode: u32, size: usize) -> tar::Header {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size as u64);
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        header
    }

    fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        let mut header = Self::header(tar::EntryType::Directory, mode, 0);
        self.0.append_data(&mut header, format!("{path}/"), &[][..]).context("write a directory")
    }

    fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        let mut header = Self::header(tar::EntryType::Regular, mode, bytes.len());
        self.0.append_data(&mut header, path, bytes).with_context(|| format!("write {path}"))
    }

    fn link(&mut self, path: &str, to: &str) -> Result<()> {
        let mut header = Self::header(tar::EntryType::Link, 0o755, 0);
        self.0.append_link(&mut header, path, to).with_context(|| format!("write {path}"))
    }

    fn bytes(self) -> Result<Vec<u8>> {
        self.0.into_inner().context("end an archive")
    }
}

/// The files of all images.
fn layer(contents: &Contents) -> Result<Blob> {
    let mut archive = Archive::new();
    archive.directory("bin", 0o755)?;
    archive.file("bin/nsm", 0o755, &contents.program)?;
    let mut names: Vec<_> = PROGRAMS.iter().chain(&INSIDE).map(|program| program.name).collect();
    names.sort_unstable();
    for name in names {
        archive.link(&format!("bin/{name}"), "bin/nsm")?;
    }
    archive.directory("etc", 0o755)?;
    let users = "root:x:0:0:root:/:/bin/nsm\nnonroot:x:65532:65532:nonroot:/:/bin/nsm\n";
    archive.file("etc/group", 0o644, b"root:x:0:\nnonroot:x:65532:\n")?;
    archive.file("etc/passwd", 0o644, users.as_bytes())?;
    for (path, bytes) in &contents.libraries {
        archive.file(path, 0o755, bytes)?;
    }
    archive.directory("tmp", 0o1777)?;
    for directory in ["usr", "usr/share", "usr/share/sbom"] {
        archive.directory(directory, 0o755)?;
    }
    archive.file("usr/share/sbom/nsm.spdx.json", 0o644, contents.sbom.as_bytes())?;
    archive.bytes().map(Blob)
}

/// `nsm`, and upstream's names for its roles.
fn images(layer: &Blob, tag: &str) -> Vec<Made> {
    let upstreams = PROGRAMS.iter().map(|program| (program.name, if program.root { "0:0" } else { NOBODY }));
    std::iter::once(("nsm", NOBODY))
        .chain(upstreams)
        .map(|(name, user)| {
            let config = Blob::json(&json!({
                "architecture": if env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" },
                "os": "linux",
                "created": NO_TIME,
                "config": {
                    "User": user,
                    "Env": ["PATH=/bin"],
                    "Entrypoint": [format!("/bin/{name}")],
                    "WorkingDir": "/",
                    "Labels": { "org.opencontainers.image.title": name, "org.opencontainers.image.licenses": "Apache-2.0" },
                },
                "rootfs": { "type": "layers", "diff_ids": [layer.digest()] },
                "history": [{ "created": NO_TIME, "created_by": "cargo xtask image" }],
            }));
            let manifest = Blob::json(&json!({
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": config.described("application/vnd.oci.image.config.v1+json"),
                "layers": [layer.described("application/vnd.oci.image.layer.v1.tar")],
            }));
            Made { name: format!("{name}:{tag}"), config, manifest }
        })
        .collect()
}

/// The archive and the layout.
fn archives(output: &Path, layer: &Blob, images: &[Made]) -> Result<()> {
    let put =
        |path: PathBuf, bytes: &[u8]| fs::write(&path, bytes).with_context(|| path.display().to_string());
    let oci = output.join("oci");
    if oci.exists() {
        fs::remove_dir_all(&oci).with_context(|| oci.display().to_string())?;
    }
    let blobs = oci.join("blobs/sha256");
    fs::create_dir_all(&blobs).with_context(|| blobs.display().to_string())?;
    let all = images.iter().flat_map(|image| [&image.config, &image.manifest]).chain([layer]);
    for blob in all {
        put(blobs.join(blob.hex()), &blob.0)?;
    }
    let named = images.iter().map(|image| {
        let mut described = image.manifest.described("application/vnd.oci.image.manifest.v1+json");
        described["annotations"] = json!({ "org.opencontainers.image.ref.name": image.name });
        described
    });
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index =
        json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": named.collect::<Vec<_>>() });
    put(oci.join("index.json"), index.to_string().as_bytes())?;
    put(oci.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?;

    let mut archive = Archive::new();
    let layer_file = format!("{}.tar", layer.hex());
    let mut files: BTreeMap<String, &[u8]> =
        images.iter().map(|image| (format!("{}.json", image.config.hex()), &image.config.0[..])).collect();
    files.insert(layer_file.clone(), &layer.0);
    let manifest = images.iter().map(|image| {
        json!({
            "Config": format!("{}.json", image.config.hex()),
            "RepoTags": [image.name],
            "Layers": [layer_file],
        })
    });
    let manifest = Value::from(manifest.collect::<Vec<_>>()).to_string();
    files.insert("manifest.json".into(), manifest.as_bytes());
    for (path, bytes) in files {
        archive.file(&path, 0o644, bytes)?;
    }
    put(output.join("nsm.tar"), &archive.bytes()?)
}

/// What the program is made of, as SPDX 2.3: the crates that are linked into it, as `Cargo.lock` pins them.
/// `dependencies` has one a line: `NAME vVERSION|LICENCE`, as cargo tree writes them.
///
/// # Errors
/// A line is of another form, or not in the lock.
pub fn sbom(lock: &str, dependencies: &str) -> Result<String> {
    let mut checksums = BTreeMap::new();
    for package in lock.split("[[package]]").skip(1) {
        let field = |name: &str| {
            let line = package.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(" = \""));
            line.and_then(|rest| rest.strip_suffix('"')).map(str::to_owned)
        };
        if let (Some(name), Some(version)) = (field("name"), field("version")) {
            checksums.insert((name, version), field("checksum"));
        }
    }
    let mut crates = BTreeMap::new();
    for line in dependencies.lines().map(|line| line.trim_end_matches(" (*)")).filter(|line| !line.is_empty())
    {
        let (package, licence) = line.split_once('|').unwrap_or((line, ""));
        let mut words = package.split(' ');
        let (Some(name), Some(version)) = (words.next(), words.next().and_then(|v| v.strip_prefix('v')))
        else {
            bail!("cargo tree says {line:?}; expected NAME vVERSION|LICENCE");
        };
        let key = (name.to_owned(), version.to_owned());
        let Some(checksum) = checksums.get(&key) else { bail!("{name} {version} is not in Cargo.lock") };
        crates.insert(key, (licence.replace('/', " OR "), checksum));
    }
    let id = |name: &str, version: &str| {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
        format!("SPDXRef-{name}-{version}").chars().map(plain).collect::<String>()
    };
    let packages = crates.iter().map(|((name, version), (licence, checksum))| {
        let mut package = json!({
            "SPDXID": id(name, version),
            "name": name,
            "versionInfo": version,
            "downloadLocation": "NOASSERTION",
            "filesAnalyzed": false,
            "licenseConcluded": "NOASSERTION",
            "licenseDeclared": if licence.is_empty() { "NOASSERTION" } else { licence },
            "copyrightText": "NOASSERTION",
        });
        // What has a checksum comes from the registry.
        if let Some(checksum) = checksum {
            package["checksums"] = json!([{ "algorithm": "SHA256", "checksumValue": checksum }]);
            package["externalRefs"] = json!([{
                "referenceCategory": "PACKAGE-MANAGER",
                "referenceType": "purl",
                "referenceLocator": format!("pkg:cargo/{name}@{version}"),
            }]);
        }
        package
    });
    let Some((program, version)) = crates.keys().find(|(name, _)| name == "nsm") else {
        bail!("cargo tree does not name nsm itself");
    };
    let program = id(program, version);
    let uses = crates.keys().map(|(name, version)| id(name, version)).filter(|other| *other != program);
    let uses = uses.map(|other| {
        json!({ "spdxElementId": program, "relationshipType": "DEPENDS_ON", "relatedSpdxElement": other })
    });
    let describes = json!({
        "spdxElementId": "SPDXRef-DOCUMENT", "relationshipType": "DESCRIBES", "relatedSpdxElement": program,
    });
    let document = json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": "nsm",
        "documentNamespace": format!("https://spdx.org/spdxdocs/nsm-{}", Blob(lock.as_bytes().to_vec()).hex()),
        "creationInfo": { "created": NO_TIME, "creators": ["Tool: cargo xtask image"] },
        "packages": packages.collect::<Vec<_>>(),
        "relationships": std::iter::once(describes.clone()).chain(uses).collect::<Vec<_>>(),
    });
    serde_json::to_string_pretty(&document).context("write the SBOM")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_told_from_a_static_one() {
        let ours = fs::read("/proc/self/exe").expect("this program");
        assert!(interpreter(&ours).is_some_and(|linker| linker.contains("ld-linux")), "tests are dynamic");
        for bad in [&b""[..], b"\x7fELF", &ours[..64], &[0xff; 200]] {
            assert_eq!(interpreter(bad), None);
        }
    }

    #[test]
    fn what_is_not_pinned_is_no_part_of_a_program() {
        let lock = "version = 4\n\n[[package]]\nname = \"nsm\"\nversion = \"0.1.0\"\n\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\nchecksum = \"00ff\"\n";
        let said = |dependencies: &str| sbom(lock, dependencies).map_err(|e| e.to_string());
        let good: Value = serde_json::from_str(
            &said("nsm v0.1.0 (/x)|Apache-2.0\na v1.0.0|MIT/Apache-2.0\na v1.0.0|MIT/Apache-2.0 (*)\n")
                .expect("good"),
        )
        .expect("JSON");
        assert_eq!(good["packages"][0]["licenseDeclared"], "MIT OR Apache-2.0");
        assert_eq!(good["packages"][0]["checksums"][0]["checksumValue"], "00ff");
        assert_eq!(good["packages"][1]["checksums"], Value::Null);
        assert_eq!(good["relationships"][1]["relatedSpdxElement"], "SPDXRef-a-1.0.0");
        assert!(said("b v1.0.0|MIT").is_err_and(|e| e == "b 1.0.0 is not in Cargo.lock"));
        assert!(said("a v1.0.0|MIT").is_err_and(|e| e == "cargo tree does not name nsm itself"));
        assert!(said("nonsense").is_err_and(|e| e.contains("expected NAME vVERSION|LICENCE")));
    }
}
