//! What `cargo xtask image` writes, read again: as archive, as OCI layout, by others' tools, and run.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

use std::{
    collections::BTreeMap,
    env, fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// Any file does for a program here.
const PROGRAM: &[u8] = b"not a program";

fn pack(directory: &Path, tag: &str) {
    let program = directory.join("program");
    fs::write(&program, PROGRAM).unwrap();
    let output = directory.join("image");
    let mut xtask = Command::new(env!("CARGO_BIN_EXE_xtask"));
    xtask.args(["image", "--tag", tag, "--binary"]).arg(&program).arg("--output").arg(&output);
    let said = xtask.output().unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
}

/// The files of an archive, in order.
fn files(archive: &[u8]) -> Vec<(String, tar::Header, Vec<u8>)> {
    let mut archive = tar::Archive::new(archive);
    archive
        .entries()
        .unwrap()
        .map(|entry| {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            (entry.path().unwrap().display().to_string(), entry.header().clone(), bytes)
        })
        .collect()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

#[test]
fn an_archive_has_an_image_for_each_name_and_every_digest_is_right() {
    let directory = tempfile::tempdir().unwrap();
    pack(directory.path(), "dev");
    let archive = files(&fs::read(directory.path().join("image/nsm.tar")).unwrap());
    let blobs: BTreeMap<_, _> = archive.iter().map(|(path, _, bytes)| (path.as_str(), bytes)).collect();
    let manifest = json(blobs["manifest.json"]);
    let mut entrypoints = Vec::new();
    for image in manifest.as_array().unwrap() {
        let (config, layers) = (image["Config"].as_str().unwrap(), image["Layers"].as_array().unwrap());
        assert_eq!(config, format!("{}.json", sha256(blobs[config])));
        let layer = blobs[layers[0].as_str().unwrap()];
        let config = json(blobs[config]);
        assert_eq!(config["rootfs"]["diff_ids"], serde_json::json!([format!("sha256:{}", sha256(layer))]));
        entrypoints.push((
            image["RepoTags"][0].as_str().unwrap().to_owned(),
            config["config"]["Entrypoint"][0].as_str().unwrap().to_owned(),
            config["config"]["User"].as_str().unwrap().to_owned(),
        ));
    }
    let row = |name: &str, user: &str| (format!("{name}:dev"), format!("/bin/{name}"), user.to_owned());
    assert_eq!(
        entrypoints[..3],
        [row("nsm", "65532:65532"), row("cmd-nsmgr", "0:0"), row("cmd-forwarder-vpp", "0:0")]
    );
    assert!(entrypoints.contains(&row("cmd-registry-memory", "65532:65532")), "{entrypoints:?}");

    // The layer: one program, links to it, no shell, nothing that tells of a machine or a time.
    let layer = files(blobs[manifest[0]["Layers"][0].as_str().unwrap()]);
    let program = layer.iter().find(|(path, ..)| path == "bin/nsm").unwrap();
    assert_eq!((program.2.as_slice(), program.1.mode().unwrap()), (PROGRAM, 0o755));
    for (tag, entrypoint, _) in &entrypoints {
        let (_, header, bytes) =
            layer.iter().find(|(path, ..)| format!("/{path}") == *entrypoint).expect(tag);
        let linked = header.link_name().unwrap().map(|to| to.display().to_string());
        assert!(linked.as_deref() == Some("bin/nsm") || bytes == PROGRAM, "{tag}");
    }
    assert!(layer.iter().any(|(path, ..)| path == "bin/grpc-health-probe"));
    for (path, header, _) in &layer {
        let id = (header.uid().unwrap(), header.gid().unwrap(), header.mtime().unwrap());
        assert_eq!(id, (0, 0, 0), "{path}");
        assert!(!path.ends_with("/sh") && !path.contains("busybox"), "{path}");
    }
    let sbom = json(&layer.iter().find(|(path, ..)| path.ends_with("nsm.spdx.json")).unwrap().2);
    let packages = sbom["packages"].as_array().unwrap();
    let named = |name: &str| packages.iter().find(|package| package["name"] == name);
    assert!(named("nsm").is_some() && named("proptest").is_none(), "what is linked, and not what tests use");
    let tokio = named("tokio").unwrap();
    assert_eq!(tokio["licenseDeclared"], "MIT");
    assert_eq!(tokio["checksums"][0]["checksumValue"].as_str().unwrap().len(), 64);
}

#[test]
fn an_oci_layout_says_the_same() {
    let directory = tempfile::tempdir().unwrap();
    pack(directory.path(), "dev");
    let oci = directory.path().join("image/oci");
    assert_eq!(json(&fs::read(oci.join("oci-layout")).unwrap())["imageLayoutVersion"], "1.0.0");
    let blob = |described: &Value| {
        let digest = described["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
        let bytes = fs::read(oci.join("blobs/sha256").join(digest)).unwrap();
        assert_eq!(
            (sha256(&bytes).as_str(), bytes.len() as u64),
            (digest, described["size"].as_u64().unwrap())
        );
        bytes
    };
    let index = json(&fs::read(oci.join("index.json")).unwrap());
    for described in index["manifests"].as_array().unwrap() {
        let manifest = json(&blob(described));
        let name = described["annotations"]["org.opencontainers.image.ref.name"].as_str().unwrap();
        let config = json(&blob(&manifest["config"]));
        let program = config["config"]["Entrypoint"][0].as_str().unwrap();
        assert_eq!(format!("/bin/{}", name.strip_suffix(":dev").unwrap()), program);
        assert_eq!(files(&blob(&manifest["layers"][0]))[1].2, PROGRAM);
    }
}

#[test]
fn the_same_program_gives_the_same_bytes() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    pack(one.path(), "dev");
    pack(other.path(), "dev");
    let archive = |directory: &Path| fs::read(directory.join("image/nsm.tar")).unwrap();
    assert!(archive(one.path()) == archive(other.path()));
    // Again into the same place: nothing of the image before is left.
    fs::write(one.path().join("image/oci/blobs/sha256/stray"), "").unwrap();
    pack(one.path(), "v2");
    assert!(archive(one.path()) != archive(other.path()), "the names differ");
    assert!(!one.path().join("image/oci/blobs/sha256/stray").exists());
}

fn tool(program: &str, args: &[&str]) -> Option<Output> {
    Command::new(program).args(args).output().ok()
}

#[test]
fn others_tools_read_the_layout() {
    let directory = tempfile::tempdir().unwrap();
    pack(directory.path(), "dev");
    let image = directory.path().join("image");
    let oci = format!("oci:{}:cmd-nsmgr:dev", image.join("oci").display());
    let archive = format!("docker-archive:{}:nsm:dev", image.join("nsm.tar").display());
    let Some(said) = tool("skopeo", &["inspect", "--config", &oci]) else {
        println!("SKIPPED others_tools_read_the_layout: skopeo is not installed");
        return;
    };
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    assert_eq!(json(&said.stdout)["config"]["Entrypoint"][0], "/bin/cmd-nsmgr");
    let said = tool("skopeo", &["inspect", "--config", &archive]).unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    assert_eq!(json(&said.stdout)["config"]["User"], "65532:65532");
}

/// The image as it was last built, unpacked into an empty directory: the program needs nothing else.
#[test]
fn the_program_starts_where_there_is_nothing_else() {
    let test = "the_program_starts_where_there_is_nothing_else";
    // xtask/… is in PROFILE/deps of cargo's target directory.
    let target = env::current_exe().unwrap().ancestors().nth(3).map(PathBuf::from).unwrap();
    let Ok(archive) = fs::read(target.join("image/nsm.tar")) else {
        println!("SKIPPED {test}: there is no image; `cargo xtask image` builds it in some ten minutes");
        return;
    };
    let root = tempfile::tempdir().unwrap();
    let layer = files(&archive).into_iter().find(|(path, ..)| path.ends_with(".tar")).unwrap().2;
    tar::Archive::new(&layer[..]).unpack(root.path()).unwrap();
    let run = |program: &str, args: &[&str]| {
        let all = [&[root.path().to_str().unwrap(), program], args].concat();
        tool("/usr/sbin/chroot", &all).expect("chroot")
    };
    let said = run("/bin/nsm", &["--version"]);
    if String::from_utf8_lossy(&said.stderr).contains("Operation not permitted") {
        println!("SKIPPED {test}: chroot(2) needs root");
        return;
    }
    assert!(String::from_utf8_lossy(&said.stdout).starts_with("nsm 0."), "{said:?}");
    let said = run("/bin/cmd-nsc-init", &["--help"]);
    assert!(String::from_utf8_lossy(&said.stdout).contains("--init"), "{said:?}");
}
