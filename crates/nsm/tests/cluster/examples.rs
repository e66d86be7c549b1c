//! The folders of `examples/kubernetes`: what their READMEs say is typed, and prints what stands there.

use std::{
    ffi::OsString,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use crate::{Mesh, plugin::Plugin, until};

/// What somebody types, and what he reads then, where that is told: `…` is whatever it is.
#[derive(Debug, PartialEq)]
struct Typed {
    command: String,
    prints: String,
}

/// What stands in the blocks of a README that are called `console`.
fn typed(readme: &str) -> Vec<Typed> {
    let mut all: Vec<Typed> = Vec::new();
    let mut console = false;
    for line in readme.lines() {
        match (line.strip_prefix("```"), line.strip_prefix("$ "), all.last_mut()) {
            (Some(kind), ..) => console = kind == "console",
            (None, Some(command), _) if console => {
                all.push(Typed { command: command.into(), prints: String::new() });
            }
            (None, None, Some(last)) if console => {
                last.prints.push_str(line);
                last.prints.push('\n');
            }
            _ => {}
        }
    }
    all
}

/// Whether this was printed, however many blanks were between its words.
fn is_like(printed: &str, expected: &str) -> bool {
    let plain = |text: &str| {
        let lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
        lines.collect::<Vec<_>>().join("\n")
    };
    let (printed, expected) = (plain(printed), plain(expected));
    let mut parts = expected.split('…');
    let Some(mut rest) = parts.next().and_then(|first| printed.strip_prefix(first)) else { return false };
    for part in parts.map(str::trim) {
        match rest.split_once(part) {
            Some((_, after)) => rest = after,
            None => return false,
        }
    }
    expected.is_empty() || expected.ends_with('…') || rest.trim().is_empty()
}

/// A shell in a folder, with kubectl before the cluster and `nsm`.
struct Shell<'m> {
    mesh: &'m Mesh,
    path: OsString,
    _programs: Plugin,
}

impl Shell<'_> {
    fn new(mesh: &Mesh) -> Shell<'_> {
        let programs = Plugin::new((*mesh.cluster).clone());
        symlink(env!("CARGO_BIN_EXE_nsm"), programs.directory().join("nsm")).unwrap();
        let path = [programs.directory().as_os_str(), ":/usr/sbin:/usr/bin:/sbin:/bin".as_ref()];
        Shell { mesh, path: path.into_iter().collect(), _programs: programs }
    }

    fn types(&self, folder: &Path, Typed { command, prints }: &Typed) {
        let began = Instant::now();
        let mut shell = Command::new("timeout");
        shell.args(["300", "sh", "-c", command]).current_dir(folder);
        shell.env("PATH", &self.path).env("KUBECONFIG", self.mesh.cluster.kubeconfig());
        let done = shell.output().unwrap();
        let (said, complained) =
            (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        println!("{:6.1?} {}: $ {command}", began.elapsed(), folder.display());
        assert!(done.status.success(), "{}: $ {command}\n{said}{complained}", folder.display());
        assert!(
            is_like(&said, prints),
            "{}: $ {command}\nprints:\n{said}and should:\n{prints}",
            folder.display()
        );
    }
}

#[test]
fn what_the_examples_say_is_so() {
    let Some(mesh) = Mesh::start("what_the_examples_say_is_so") else { return };
    // What people have from elsewhere.
    for node in 1..=mesh.cluster.nodes() {
        let tag = ["ctr", "--namespace", "k8s.io", "images", "tag", "--force", "testbed.local/busybox:1"];
        let _said = mesh.in_node(node, &[&tag[..], &["docker.io/library/busybox:1"]].concat());
    }
    let shell = Shell::new(&mesh);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/kubernetes");
    let read = |folder: &Path| typed(&fs::read_to_string(folder.join("README.md")).unwrap());
    let mut folders: Vec<PathBuf> = root.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.retain(|path| path.is_dir());
    folders.sort();
    let index = fs::read_to_string(root.join("README.md")).unwrap();
    for folder in &folders {
        let name = folder.file_name().unwrap().to_string_lossy();
        assert!(index.contains(&format!("[{name}]({name}/)")), "{name} is in the list");
    }
    for typed in read(&root) {
        shell.types(&root, &typed);
    }
    // The API server learns the webhook's certificate a moment after the webhook is ready.
    until("annotated workloads are taken", || {
        let mut create = mesh.cluster.kubectl_command();
        create.args(["run", "probe", "--image=busybox:1", "--dry-run=server"]);
        create.args(["--annotations=networkservicemesh.io=kernel://any/nsm-1"]);
        create.output().unwrap().status.success()
    });
    for folder in &folders {
        for typed in read(folder) {
            shell.types(folder, &typed);
        }
        mesh.no_wires();
    }
}

#[test]
fn what_is_printed_is_compared() {
    let read = typed("# x\n```console\n$ a\n1 …\n…\n3\n$ b\n```\n$ c\n```\n$ d\n```\n");
    let is = |command: &str, prints: &str| Typed { command: command.into(), prints: prints.into() };
    assert_eq!(read, [is("a", "1 …\n…\n3\n"), is("b", "")]);
    assert!(
        is_like("1    2\n7\n8\n3\n", &read[0].prints) && is_like("anything", "") && is_like("12\n", "1…\n")
    );
    for printed in ["2\n3\n", "1 2\n7\n", "1 2\n3\n4\n", "1 \n3 3\n"] {
        assert!(!is_like(printed, &read[0].prints), "{printed}");
    }
}
