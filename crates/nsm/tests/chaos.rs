//! `nsm lab chaos` as a person uses it: a short run of a fixed seed, its plan, and what it says when a mesh does not mend
//! itself.
#![allow(clippy::print_stdout, reason = "a test that cannot run says so")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn may_not(test: &str) -> bool {
    let skip = !rustix::process::geteuid().is_root();
    if skip {
        println!("SKIPPED {test}: needs root to make network namespaces");
    }
    skip
}

fn scenario() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios/chaos.yaml")
}

fn chaos(file: &Path, args: &[&str]) -> Output {
    let mut nsm = Command::new(env!("CARGO_BIN_EXE_nsm"));
    nsm.args(["lab", "chaos"]).arg(file).args(args).stdin(Stdio::null());
    nsm.output().expect("start nsm")
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_plan_is_printed_and_nothing_is_made() {
    let name = format!("t{}-plan", std::process::id());
    let plan = |more: &[&str]| {
        let output = chaos(&scenario(), &[&["--plan", "--name", &name], more].concat());
        assert!(output.status.success(), "{}", text(&output));
        text(&output)
    };
    let all = plan(&["--seed", "3"]);
    assert_eq!(all.lines().count(), 11, "the seed, and ten rounds if nothing else is said: {all}");
    assert_eq!(all.lines().next(), Some("seed 3"));
    let eighth = plan(&["--seed", "3", "--from", "8", "--rounds", "1"]);
    assert_eq!(eighth.lines().nth(1), all.lines().nth(8), "a round alone is the same");
    assert!(!Path::new("/run/nsm/lab").join(&name).exists());
}

#[test]
fn a_mesh_mends_itself_after_every_round() {
    if may_not("a_mesh_mends_itself_after_every_round") {
        return;
    }
    let name = format!("t{}-chaos", std::process::id());
    let output =
        chaos(&scenario(), &["--seed", "3", "--rounds", "8", "--minutes", "0.7", "--json", "--name", &name]);
    let run: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&output)));
    assert!(output.status.success(), "{run:#}");
    assert_eq!(run["chaos"]["seed"], 3);
    assert_eq!(run["leftovers"], serde_json::json!([]));
    let rows = run["expectations"].as_array().expect("rows");
    assert!(rows.len() >= 2 && rows.iter().all(|row| row["held"] == true), "{run:#}");
    let last = rows.last().expect("a row");
    assert_eq!(last["expectation"], "no process has grown");
    println!("{run:#}");
}

#[test]
fn a_round_that_fails_says_how_to_have_it_again() {
    if may_not("a_round_that_fails_says_how_to_have_it_again") {
        return;
    }
    let name = format!("t{}-deaf", std::process::id());
    let directory = tempfile::Builder::new().prefix("nsm-test-").tempdir().expect("directory");
    let file = directory.path().join("deaf.yaml");
    let deaf = "\
name: deaf
networkServices:
- apiVersion: networkservicemesh.io/v1
  kind: NetworkService
  metadata:
    name: web
nodes: [node1]
pods:
- {name: client, node: node1, annotations: {networkservicemesh.io: kernel://web/nsm-1}}
- name: server
  node: node1
  endpoint: {services: [web], cidrPrefix: [172.16.1.0/31]}
  sysctls: {net.ipv4.icmp_echo_ignore_all: '1'}
";
    fs::write(&file, deaf).expect("write");
    let output =
        chaos(&file, &["--seed", "5", "--from", "4", "--rounds", "3", "--within", "2s", "--name", &name]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("replay: --seed 5 --from 4 --rounds 1"), "{said}");
    assert!(said.contains("172.16.1.0 does not answer client over nsm-1"), "{said}");
    assert!(said.contains("client logged since then:") && said.contains("packets do not pass"), "{said}");
    assert!(said.contains("nothing left behind") && !said.contains("round 5"), "{said}");
}
