//! `nsm bench` as a person uses it, with few wires and tiny durations: that everything comes up and that nothing is
//! left, never how long it takes.
#![allow(clippy::print_stdout, reason = "a test that cannot run says so")]

use std::fs;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const NSM: &str = env!("CARGO_BIN_EXE_nsm");

fn bench(lab: &str, args: &[&str]) -> Command {
    let mut command = Command::new(NSM);
    command.arg("bench").args(args).args(["--lab", lab, "--json"]).stdin(Stdio::null());
    command
}

fn name(what: &str) -> String {
    format!("t{}-{what}", std::process::id())
}

fn may_not(test: &str) -> bool {
    let skip = !nsm_lab::is_privileged();
    if skip {
        println!("SKIPPED {test}: needs CAP_SYS_ADMIN and CAP_NET_ADMIN for network namespaces");
    }
    skip
}

fn text(output: &Output) -> String {
    let both = [&output.stdout, &output.stderr];
    both.map(|bytes| String::from_utf8_lossy(bytes).into_owned()).join("\n")
}

/// Namespaces and directories of labs with that prefix.
fn traces(lab: &str) -> Vec<String> {
    let directories = ["/run/netns", "/run/nsm/lab"].into_iter();
    let entries = directories.flat_map(|directory| fs::read_dir(directory).into_iter().flatten().flatten());
    let paths = entries.map(|entry| entry.path().display().to_string());
    paths.filter(|path| path.contains(lab)).collect()
}

fn row<'r>(results: &'r Value, topology: &str, id: &str) -> &'r Value {
    let rows = results["rows"].as_array().expect("rows");
    let found = rows.iter().find(|row| row["topology"] == topology && row["id"] == id);
    found.unwrap_or_else(|| panic!("no row {id} of {topology}: {results:#}"))
}

fn number(results: &Value, topology: &str, id: &str) -> f64 {
    row(results, topology, id)["value"]["number"]["value"].as_f64().expect("a number")
}

#[test]
fn all_wires_come_up_and_nothing_is_left() {
    if may_not("all_wires_come_up_and_nothing_is_left") {
        return;
    }
    let lab = name("few");
    let amounts =
        ["--wires", "5", "--concurrency", "1,3", "--pairs", "2", "--duration", "20ms", "--pings", "10"];
    let amounts = [&amounts[..], &["--commit", "0123abc-dirty"]].concat();
    let output = bench(&lab, &amounts).output().expect("start nsm");
    assert!(output.status.success(), "{}", text(&output));
    let results: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(results["machine"]["commit"], "0123abc-dirty");
    for topology in ["local", "two-nodes"] {
        for id in ["setup.1", "setup.3", "request.3", "close.1", "close.3", "kernel.ping"] {
            let times = &row(&results, topology, id)["value"]["times"];
            assert_eq!(times["count"], 5, "{topology} {id}: {times}");
        }
        for id in ["left.wires", "left.lab", "handshakes"] {
            assert_eq!(number(&results, topology, id), 0.0, "{}", row(&results, topology, id));
        }
        // The count of handshakes is one that sees them: the daemons cannot have met without.
        let note = row(&results, topology, "handshakes")["note"].as_str().expect("a note").to_owned();
        assert!(!note.contains("; 0 before"), "{note}");
        for id in ["throughput.up", "throughput.down", "latency.mean", "latency.p50", "latency.p99"] {
            let [wire, control] = [id.to_owned(), format!("{id}.control")]
                .map(|id| row(&results, topology, &id)["value"]["beside"].clone());
            assert_eq!((&wire["what"], &control["what"]), (&"wire".into(), &"its equal".into()));
            assert_eq!(wire["bare"], control["bare"], "beside the same measurements");
            assert_ne!(wire["measured"], control["measured"]);
            for list in [&wire["measured"], &control["measured"], &wire["bare"]] {
                let figures = list.as_array().expect("figures");
                assert_eq!(figures.len(), 2, "{id}");
                assert!(figures.iter().all(|figure| figure.as_f64() > Some(0.0)), "{id}: {list}");
            }
        }
        assert!(number(&results, topology, "rate.1") > 0.0);
        let memory = &row(&results, topology, "memory.node1/forwarder")["value"]["memory"];
        assert!(memory["idle"].as_u64() > Some(0), "{memory}");
    }
    assert!(row(&results, "two-nodes", "memory.node2/manager")["target"].is_object());
    assert_eq!(traces(&lab), Vec::<String>::new());
}

#[test]
fn what_traffic_notices_of_faults_is_measured() {
    if may_not("what_traffic_notices_of_faults_is_measured") {
        return;
    }
    let lab = name("heal");
    let output = bench(&lab, &["heal", "--times", "1", "--wires", "12", "--clients", "3"])
        .output()
        .expect("start nsm");
    assert!(output.status.success(), "{}", text(&output));
    let results: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(results["amounts"]["times"], 1);
    for topology in ["local", "two-nodes"] {
        for id in ["heal.pod", "heal.process", "heal.service"] {
            let times = &row(&results, topology, id)["value"]["times"];
            assert_eq!(times["count"], 1, "{topology} {id}: {times}");
            assert!(times["max"].as_f64() > Some(0.0), "{topology} {id}: {times}");
        }
        for id in ["process.lost", "service.lost", "identity", "registry", "manager", "forwarder", "all"] {
            let row = row(&results, topology, &format!("heal.{id}"));
            assert!(row["target"].is_object() && row["value"]["number"].is_object(), "{row}");
        }
        assert_eq!(number(&results, topology, "heal.left"), 0.0);
        assert_eq!(row(&results, topology, "heal.many")["value"]["times"]["count"], 12);
        assert_eq!(number(&results, topology, "heal.many.lost"), 0.0);
        // The count is one that sees calls: each wire was asked for again.
        assert!(number(&results, topology, "heal.many.load.node1/manager") > 0.0);
        assert!(row(&results, topology, "heal.many.load.registry").is_object());
    }
    assert_eq!(row(&results, "two-nodes", "heal.cut")["value"]["times"]["count"], 1);
    assert_eq!(traces(&lab), Vec::<String>::new());
}

#[test]
fn ours_and_upstreams_programs_are_measured_in_one_run() {
    let test = "ours_and_upstreams_programs_are_measured_in_one_run";
    if may_not(test) {
        return;
    }
    let Some(upstream) = nsm_upstream::program(test) else { return };
    let lab = name("beside");
    let args = ["interop", "--wires", "4", "--upstream", &upstream.to_string_lossy()];
    let output = bench(&lab, &args).output().expect("start nsm");
    assert!(output.status.success(), "{}", text(&output));
    let results: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    for id in ["request.ours", "request.upstream", "close.ours", "close.upstream"] {
        let times = &row(&results, "local", &format!("interop.{id}"))["value"]["times"];
        assert_eq!(times["count"], 4, "{id}: {times}");
    }
    assert!(number(&results, "local", "interop.ratio") > 0.0);
    assert_eq!(traces(&lab), Vec::<String>::new());
    // What is no program of upstream's is said to be none.
    let args = ["interop", "--wires", "1", "--upstream", "/bin/true"];
    let output = bench(&lab, &args).output().expect("start nsm");
    assert!(!output.status.success(), "{}", text(&output));
    assert_eq!(traces(&lab), Vec::<String>::new());
}

#[test]
fn an_interrupted_run_removes_everything() {
    if may_not("an_interrupted_run_removes_everything") {
        return;
    }
    let lab = name("stop");
    let command = &mut bench(&lab, &["setup", "--topology", "local", "--wires", "400"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start nsm");
    // In the middle of it: the forwarder keeps a plan for each wire that stands.
    // As it sees it itself: it may have mounts of its own.
    let plans = format!("/proc/{}/root/run/nsm/lab/{lab}-local/node1/forwarder", child.id());
    let end = Instant::now() + Duration::from_secs(60);
    let standing = || fs::read_dir(&plans).map_or(0, Iterator::count) > 3;
    while !standing() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    let stood = standing();
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid")).expect("not 0");
    kill_process(pid, Signal::INT).expect("signal");
    let output = child.wait_with_output().expect("ends");
    assert!(stood, "{}", text(&output));
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("interrupted: SIGINT"), "{}", text(&output));
    assert_eq!(traces(&lab), Vec::<String>::new());
}

#[test]
fn figures_of_a_debug_build_are_not_saved() {
    if !cfg!(debug_assertions) {
        println!("SKIPPED figures_of_a_debug_build_are_not_saved: this is a release build");
        return;
    }
    let output = bench(&name("debug"), &["setup", "--save"]).output().expect("start nsm");
    assert!(!output.status.success());
    assert!(text(&output).contains("this is a debug build"), "{}", text(&output));
}
