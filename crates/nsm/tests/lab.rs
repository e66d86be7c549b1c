//! `nsm lab` as a person uses it, with the real program: labs of one node with plain cables between pods, so that
//! only the lab itself is on trial.
#![allow(clippy::print_stdout, reason = "a test that cannot run says so")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

const NSM: &str = env!("CARGO_BIN_EXE_nsm");
/// An ordinary user: nobody.
const NOBODY: u32 = 65534;

/// Two pods on a cable, one of which serves; everything that needs no wire.
const SCENARIO: &str = "\
name: NAME
nodes: [node1]
pods:
- {name: shell, node: node1}
- {name: web, node: node1, serve: [80]}
cables:
- - {pod: shell, interface: eth0, addresses: [10.1.0.1/24, 'fd01::1/64']}
  - {pod: web, interface: eth0, addresses: [10.1.0.2/24, 'fd01::2/64']}
expect:
- ping: {from: shell, to: 10.1.0.2}
- ping: {from: shell, to: 'fd01::2', count: 3}
- http: {from: shell, url: 'http://10.1.0.2/', body: web at 10.1.0.2}
- http: {from: shell, url: 'http://[fd01::2]/x', status: 200}
- tcp: {from: shell, to: '10.1.0.2:80', is: open}
- interface: {pod: shell, name: eth0}
- interface: {pod: shell, name: eth1, is: gone}
- address: {pod: web, interface: eth0, address: 10.1.0.2/24}
- route: {pod: shell, to: 10.1.0.0/24, interface: eth0}
- ping: {from: shell, to: 10.1.0.9, count: 1, is: unanswered}
- lookup: {pod: shell, to: 10.1.0.2, protocol: tcp, port: 80, interface: eth0, table: 254}
- lookup: {pod: shell, to: 'fd01::2', from: 'fd01::1', protocol: udp, sourcePort: 53, interface: eth0, table: 254}
- fault: {kill: node1/manager, restart: true, ping: {from: shell, to: 10.1.0.2}}
- fault: {kill: node1/manager, ping: {from: shell, to: 10.1.0.2}, lost: 0, silence: 5s}
- fault: {start: node1/manager, ping: {from: shell, to: 10.1.0.2}}
";

/// A scenario file whose lab is gone when the test is, whatever happened.
struct Lab {
    name: String,
    directory: tempfile::TempDir,
    user: Option<u32>,
    program: PathBuf,
}

impl Lab {
    fn new(name: &str, scenario: &str) -> Self {
        let name = format!("t{}-{name}", std::process::id());
        let directory = tempfile::Builder::new().prefix("nsm-test-").tempdir().expect("directory");
        let lab = Self { name, directory, user: None, program: NSM.into() };
        fs::write(lab.file(), scenario.replace("NAME", &lab.name)).expect("write");
        lab
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("scenario.yaml")
    }

    fn nsm(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("lab").args(args).stdin(Stdio::null()).env_remove("XDG_RUNTIME_DIR");
        if let Some(uid) = self.user {
            command.uid(uid).gid(uid);
        }
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.nsm(args).output().expect("start nsm")
    }

    fn up(&self) {
        let output = self.run(&["up", &self.file().to_string_lossy()]);
        assert!(output.status.success(), "{}", text(&output));
    }

    fn state(&self) -> serde_json::Value {
        let output = self.run(&["status", &self.name, "--json"]);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&output)))
    }

    fn holder(&self) -> Pid {
        let pid = self.state()["holder"]["pid"].as_i64().expect("a pid");
        Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("not 0")
    }

    /// Kills the holder. That takes the kernel a moment, and a lab with a holder runs.
    fn kill_holder(&self) {
        let holder = self.holder();
        kill_process(holder, Signal::KILL).expect("it lives");
        let end = Instant::now() + Duration::from_secs(20);
        let stat = format!("/proc/{}/stat", holder.as_raw_nonzero());
        while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(Instant::now() < end, "the holder does not die");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Everything that can be seen of the lab from outside.
    fn traces(&self) -> Vec<String> {
        let mut traces = Vec::new();
        for directory in ["/run/netns", "/run/nsm/lab", &format!("/tmp/nsm-{NOBODY}")] {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().starts_with(&self.name) {
                    traces.push(entry.path().display().to_string());
                }
            }
        }
        for entry in fs::read_dir("/proc").expect("proc").flatten() {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            if command.contains(&format!("/run/nsm/lab/{}/", self.name))
                || command.contains("lab hold") && command.contains(&*self.file().to_string_lossy())
            {
                traces.push(format!("{}: {command}", entry.path().display()));
            }
        }
        traces
    }

    /// The kernel may take a moment to let go of what was killed.
    fn gone(&self, why: &str) {
        let end = Instant::now() + Duration::from_secs(20);
        while !self.traces().is_empty() {
            assert!(Instant::now() < end, "{why}: {:#?}", self.traces());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.traces().is_empty() {
            println!("cleaning up: {}", text(&self.run(&["down", &self.name])));
        }
    }
}

/// A child that does not outlive its test.
struct Front(Child);

impl Drop for Front {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn may_not(test: &str) -> bool {
    let skip = !rustix::process::geteuid().is_root();
    if skip {
        println!("SKIPPED {test}: needs root to make network namespaces");
    }
    skip
}

/// Reads lines until one contains `word`.
fn read_until(front: &mut Front, word: &str) {
    let stdout = front.0.stdout.take().expect("piped");
    let mut lines = BufReader::new(stdout).lines();
    let found = lines.by_ref().map_while(Result::ok).any(|line| line.contains(word));
    assert!(found, "never said {word:?}");
    // The rest is still read, so that nobody waits for a full pipe.
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
}

fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
    kill_process(pid, signal).expect("it lives");
}

#[test]
fn a_run_measures_every_kind_of_expectation_and_leaves_nothing() {
    if may_not("a_run_measures_every_kind_of_expectation_and_leaves_nothing") {
        return;
    }
    let lab = Lab::new("run", SCENARIO);
    let output = lab.run(&["run", "--json", &lab.file().to_string_lossy()]);
    let reports: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&output)));
    let expectations = reports[0]["expectations"].as_array().expect("expectations");
    assert_eq!(expectations.len(), 15);
    for outcome in expectations {
        assert_eq!(outcome["held"], true, "{outcome:#}");
        assert_ne!(outcome["measured"], "", "{outcome:#}");
    }
    assert!(output.status.success());
    lab.gone("after a run");
}

#[test]
fn an_expectation_that_does_not_hold_is_shown_and_is_the_exit_status() {
    if may_not("an_expectation_that_does_not_hold_is_shown_and_is_the_exit_status") {
        return;
    }
    let scenario = SCENARIO.split("expect:").next().expect("head").to_owned()
        + "expect:
- tcp: {from: shell, to: '10.1.0.2:81', is: blocked}
- ping: {from: shell, to: 10.1.0.3, within: 100ms}
- tcp: {from: shell, to: '10.1.0.3:80', is: blocked, listensIn: shell, within: 100ms}
- ping: {from: shell, to: 10.1.0.2, is: unanswered}
- lookup: {pod: shell, to: 10.1.0.2, protocol: tcp, interface: eth1, table: 1, within: 100ms}
- lookup: {pod: shell, to: 192.0.2.1, protocol: udp, interface: eth0, table: 254, within: 100ms}
";
    let lab = Lab::new("fails", &scenario);
    let output = lab.run(&["run", &lab.file().to_string_lossy()]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("answered, not silent: Connection refused"), "closed is not blocked: {said}");
    assert!(said.contains("0 of 5 answered"), "{said}");
    assert!(said.contains("nothing listens in shell either"), "{said}");
    assert!(said.contains("5 of 5 answered"), "somebody answers: {said}");
    assert!(said.contains("10.1.0.2 dev eth0 table 254"), "{said}");
    assert!(said.contains("look up the route to 192.0.2.1") && said.contains("unreachable"), "{said}");
    assert!(said.trim_end().ends_with(&format!("FAILED: {}", lab.name)), "{said}");
    lab.gone("after a failed run");
}

#[test]
fn below_a_fault_that_failed_stands_what_the_processes_logged_since() {
    if may_not("below_a_fault_that_failed_stands_what_the_processes_logged_since") {
        return;
    }
    let scenario = SCENARIO.split("expect:").next().expect("head").to_owned()
        + "expect:
- fault: {kill: node1/manager, restart: true, within: 100ms, ping: {from: shell, to: 10.1.0.3}}
- ping: {from: shell, to: 10.1.0.2}
";
    let lab = Lab::new("logs", &scenario);
    let said = text(&lab.run(&["run", &lab.file().to_string_lossy()]));
    let rows: Vec<_> = said.lines().skip_while(|line| !line.contains("FAILED")).collect();
    let place =
        |what: &str| rows.iter().position(|line| line.contains(what)).unwrap_or_else(|| panic!("{said}"));
    let (title, next) = (place("node1/manager logged since then:"), place("shell pings 10.1.0.2 (5 times)"));
    assert!(title == 1 && next > title + 1, "between the two rows: {said}");
    let output = lab.run(&["run", "--json", &lab.file().to_string_lossy()]);
    let reports: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&output)));
    let outcomes = &reports[0]["expectations"];
    assert_eq!(outcomes[0]["held"], false);
    assert_eq!(outcomes[0]["logs"][0]["process"], "node1/manager", "{outcomes:#}");
    assert!(outcomes[1].get("logs").is_none(), "{outcomes:#}");
    lab.gone("after a failed fault");
}

#[test]
fn a_lab_that_is_kept_says_how_to_end_it() {
    if may_not("a_lab_that_is_kept_says_how_to_end_it") {
        return;
    }
    let lab = Lab::new("kept", SCENARIO);
    let ran = lab.run(&["run", "--keep", &lab.file().to_string_lossy()]);
    assert!(ran.status.success(), "{}", text(&ran));
    let says = format!("`nsm lab down {}` ends it", lab.name);
    assert!(text(&ran).trim_end().ends_with(&says), "{}", text(&ran));
    let down = lab.run(&["down", &lab.name]);
    assert!(down.status.success(), "{}", text(&down));
    lab.gone("down");
}

#[test]
fn a_lab_that_stays_is_looked_into_refused_twice_and_ended() {
    if may_not("a_lab_that_stays_is_looked_into_refused_twice_and_ended") {
        return;
    }
    let lab = Lab::new("up", SCENARIO);
    lab.up();
    let second = lab.run(&["up", &lab.file().to_string_lossy()]);
    assert!(!second.status.success());
    assert!(text(&second).contains(&format!(
        "lab {} already runs (process {})",
        lab.name,
        lab.holder().as_raw_pid()
    )));
    let state = lab.state();
    for process in state["processes"].as_array().expect("processes") {
        assert_eq!(process["condition"], "ready", "{process:#}");
    }
    let pod = format!("{}.shell", lab.name);
    let inside = lab.run(&["exec", &pod, "--", "sh", "-c", "cat /proc/thread-self/net/dev; exit 7"]);
    assert_eq!(inside.status.code(), Some(7), "{}", text(&inside));
    assert!(text(&inside).contains("eth0"));
    let nowhere = lab.run(&["exec", &format!("{}.nowhere", lab.name), "--", "true"]);
    assert!(text(&nowhere).contains("there are"), "{}", text(&nowhere));
    let status = lab.run(&["status", &lab.name]);
    assert!(text(&status).contains("node1/forwarder") && status.status.success());
    let down = lab.run(&["down", &lab.name]);
    assert!(down.status.success() && text(&down).contains("nothing left behind"), "{}", text(&down));
    lab.gone("after down");
    assert!(!lab.run(&["down", &lab.name]).status.success(), "there is nothing to end any more");
}

#[test]
fn what_a_killed_lab_left_is_removed_by_down_and_by_up() {
    if may_not("what_a_killed_lab_left_is_removed_by_down_and_by_up") {
        return;
    }
    let lab = Lab::new("killed", SCENARIO);
    lab.up();
    lab.kill_holder();
    let traces = lab.traces();
    assert!(traces.iter().any(|trace| trace.contains("nsm manager")), "its processes live on: {traces:#?}");
    let down = lab.run(&["down", &lab.name]);
    assert!(down.status.success(), "{}", text(&down));
    lab.gone("after down");

    lab.up();
    let first = lab.state()["processes"].clone();
    lab.kill_holder();
    lab.up();
    let second = lab.state()["processes"].clone();
    assert_ne!(first, second, "all processes are new");
    assert!(lab.run(&["down", &lab.name]).status.success());
    lab.gone("after the second down");
}

#[test]
fn a_run_that_is_ended_or_killed_takes_its_lab_along() {
    if may_not("a_run_that_is_ended_or_killed_takes_its_lab_along") {
        return;
    }
    let scenario = SCENARIO.split("expect:").next().expect("head").to_owned()
        + "expect: [{interface: {pod: shell, name: never, within: 60s}}]\n";
    for how in [Signal::INT, Signal::TERM, Signal::KILL] {
        let lab = Lab::new(&format!("signal{}", how.as_raw()), &scenario);
        let child =
            lab.nsm(&["run", &lab.file().to_string_lossy()]).stdout(Stdio::piped()).spawn().expect("start");
        let mut front = Front(child);
        read_until(&mut front, "up:");
        signal(front.0.id(), how);
        let status = front.0.wait().expect("it ends");
        assert!(!status.success());
        if how != Signal::KILL {
            assert_eq!(lab.traces(), [""; 0], "ended in good order, so nothing is left when it returns");
        }
        lab.gone(&format!("after signal {}", how.as_raw()));
    }
}

#[test]
fn a_holder_that_is_killed_is_swept_up_by_its_run() {
    if may_not("a_holder_that_is_killed_is_swept_up_by_its_run") {
        return;
    }
    let scenario = SCENARIO.split("expect:").next().expect("head").to_owned()
        + "expect: [{interface: {pod: shell, name: never, within: 60s}}]\n";
    let lab = Lab::new("holder", &scenario);
    let child =
        lab.nsm(&["run", &lab.file().to_string_lossy()]).stdout(Stdio::piped()).spawn().expect("start");
    let mut front = Front(child);
    read_until(&mut front, "up:");
    kill_process(lab.holder(), Signal::KILL).expect("it lives");
    assert!(!front.0.wait().expect("it ends").success());
    assert_eq!(lab.traces(), [""; 0]);
}

#[test]
fn a_process_that_cannot_start_is_named_with_the_end_of_its_log() {
    if may_not("a_process_that_cannot_start_is_named_with_the_end_of_its_log") {
        return;
    }
    let scenario = SCENARIO.replace(
        "cables:",
        "- {name: fw, node: node1, firewall: {service: s, labels: {app: fw}, aclConfig: 'aclRules: {x: y'}}\ncables:",
    );
    let lab = Lab::new("broken", &scenario);
    let output = lab.run(&["run", &lab.file().to_string_lossy()]);
    let said = text(&output);
    assert!(!output.status.success());
    assert!(said.contains("error: fw ended with exit status 1"), "{said}");
    assert!(said.contains("fw.acl.yaml"), "the end of its log names the file: {said}");
    assert!(said.contains("nothing left behind"), "{said}");
    lab.gone("after a lab that could not be built");
}

#[test]
fn an_ordinary_user_gets_the_same() {
    let test = "an_ordinary_user_gets_the_same";
    if may_not(test) {
        return;
    }
    let mut lab = Lab::new("user", SCENARIO);
    lab.user = Some(NOBODY);
    lab.program = common::program_for_everybody(lab.directory.path());
    let mut unshare = Command::new("unshare");
    match unshare.args(["--user", "--net", "true"]).uid(NOBODY).gid(NOBODY).output() {
        Ok(output) if output.status.success() => {}
        _ => return println!("SKIPPED {test}: this kernel gives ordinary users no user namespaces"),
    }
    let run = lab.run(&["run", &lab.file().to_string_lossy()]);
    assert!(run.status.success(), "{}", text(&run));
    lab.gone("after a run");

    lab.up();
    let pod = format!("{}.shell", lab.name);
    let inside = lab.run(&["exec", &pod, "--", "sh", "-c", "cat /proc/thread-self/net/dev; exit 7"]);
    assert_eq!(inside.status.code(), Some(7), "{}", text(&inside));
    assert!(text(&inside).contains("eth0"));
    assert!(!lab.run(&["up", &lab.file().to_string_lossy()]).status.success(), "a second one is refused");
    assert!(!Path::new("/run/netns").join(&pod).exists(), "nothing of it is outside");
    let mut get = Command::new(&lab.program);
    get.args(["get", "processes", "-o", "json", "--lab", &lab.name]).env_remove("XDG_RUNTIME_DIR");
    let told = get.uid(NOBODY).gid(NOBODY).stdin(Stdio::null()).output().expect("start nsm");
    assert!(
        told.status.success() && text(&told).contains("\"name\": \"forwarder-node1\""),
        "{}",
        text(&told)
    );
    let down = lab.run(&["down", &lab.name]);
    assert!(down.status.success(), "{}", text(&down));
    lab.gone("after down");

    lab.up();
    kill_process(lab.holder(), Signal::KILL).expect("it lives");
    let down = lab.run(&["down", &lab.name]);
    assert!(down.status.success(), "{}", text(&down));
    lab.gone("after down of a killed one");
}

#[test]
fn a_wrong_file_is_refused_before_anything_is_made() {
    let lab = Lab::new("wrong", &SCENARIO.replace("from: shell, to: 10.1.0.2}", "from: shel, to: 10.1.0.2}"));
    for command in ["plan", "up", "run"] {
        let output = lab.run(&[command, &lab.file().to_string_lossy()]);
        assert!(!output.status.success());
        let said = text(&output);
        assert!(
            said.contains("scenario.yaml:10: expect[0].ping.from: no pod \"shel\" (pods: shell, web)"),
            "{said}"
        );
    }
    assert_eq!(lab.traces(), [""; 0]);
}
