//! What a person got wrong before anything runs: every role ends at once, says what was wrong and what is expected.

use std::{
    fs,
    io::Read as _,
    os::unix::process::CommandExt as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nsm_kernel::netns::Namespace;

use crate::common::program_for_everybody;
use crate::harness::{Mesh, NSM, PATIENCE, may_not};

/// Runs `nsm` with nothing in its environment but this; its exit status and what it says.
fn nsm(environment: &[(&str, &str)], args: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(NSM);
    command.args(args).env_clear().envs(environment.iter().copied());
    run(&mut command)
}

/// Runs a program that has to end by itself.
fn run(command: &mut Command) -> (Option<i32>, String) {
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("start");
    let end = Instant::now() + PATIENCE;
    let status = loop {
        match child.try_wait().expect("wait") {
            Some(status) => break status.code(),
            None if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
            None => {
                child.kill().expect("it lives");
                child.wait().expect("it ends");
                break None;
            }
        }
    };
    let mut said = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut said).expect("read");
    (status, said)
}

fn says(environment: &[(&str, &str)], args: &[&str], status: i32, texts: &[&str]) {
    let (code, said) = nsm(environment, args);
    assert_eq!(code, Some(status), "{args:?} {environment:?}: {said}");
    for text in texts {
        assert!(said.contains(text), "{args:?} {environment:?}: {text:?} is not in {said:?}");
    }
}

/// The usage of the program is wrong.
const USAGE: i32 = 2;
/// The rest of the world is not as the program needs it.
const FAILED: i32 = 1;

#[test]
fn a_wrong_flag_or_variable_is_refused_with_what_is_expected() {
    let url = "expected unix:///path/to/socket or tcp://host:port";
    let wire = "expected MECHANISM://SERVICE[@DOMAIN][/INTERFACE][?LABEL=VALUE&…], for example kernel://my-service/nsm0?app=web";
    let prefix = "expected ADDRESS/LENGTH, for example 172.16.1.0/24 or 2001:db8::/64";
    let time = "expected for example 750ms, 15s or 10m";
    let level = "expected off, error, warn, info, debug, trace, or a filter such as info,nsm_mesh=debug";
    for (args, status, texts) in [
        // Flags.
        (
            &["manager", "--listen-on", "ftp://x"][..],
            USAGE,
            &["--listen-on", "\"ftp://x\" has an unknown scheme", url][..],
        ),
        (
            &["manager", "--excluded-prefixes", "10.0.0.0/99"],
            USAGE,
            &["'10.0.0.0/99'", "--excluded-prefixes", prefix],
        ),
        (
            &["manager", "--namespace-delegates", "joe"],
            USAGE,
            &["\"joe\" is not a SPIFFE ID", "must start with spiffe://"],
        ),
        (&["manager", "--dial-timeout", "soon"], USAGE, &["'soon'", "--dial-timeout", time]),
        (&["forwarder", "--tunnel-ip", "10.0.0.300"], USAGE, &["'10.0.0.300'", "--tunnel-ip"]),
        (&["forwarder", "--vxlan-port", "70000"], USAGE, &["70000 is not in 0..=65535"]),
        (
            &["client", "--connect-to", "http://x"],
            USAGE,
            &["--connect-to", "\"http://x\" has an unknown scheme", url],
        ),
        (&["client", "--max-token-lifetime", "3parsecs"], USAGE, &["unknown time unit \"parsecs\"", time]),
        (&["client", "--labels", "red"], USAGE, &["\"red\" is not KEY:VALUE"]),
        (&["client", "--log-level", "loud"], FAILED, &["log level \"loud\"", level]),
        (&["client", "--log-level", "info,=,"], FAILED, &["log level \"info,=,\"", level]),
        (&["client", "--colour"], USAGE, &["unexpected argument '--colour'", "Usage: nsm client"]),
        (
            &["endpoint", "--cidr-prefix", "10.0.0.0"],
            USAGE,
            &["\"10.0.0.0\" is not ADDRESS/LENGTH", "[172.16.1.0/24,172.16.2.0/24],2001:db8::/64"],
        ),
        (&["endpoint", "--routes", "10.0.0.0/x"], USAGE, &["'10.0.0.0/x'", "--routes", prefix]),
        (
            &["endpoint", "--payload", "carrier-pigeon"],
            USAGE,
            &["'carrier-pigeon'", "[possible values: ETHERNET, IP]"],
        ),
        (&["endpoint", "--register-service", "maybe"], USAGE, &["[possible values: true, false]"]),
        (
            &["endpoint", "--dns-configs", "[{\"dns_server_ips\": [\"here\"]}]"],
            USAGE,
            &["--dns-configs", "here", "expected JSON such as"],
        ),
        (
            &["client", "--awareness-groups", "[kernel://a"],
            USAGE,
            &[
                "--awareness-groups",
                "a bracket is not closed",
                "[kernel://a/nsm-1,kernel://b/nsm-2],[kernel://c]",
            ],
        ),
        (&["ipam", "--prefix", "10.0.0.0"], USAGE, &["'10.0.0.0'", "--prefix", prefix]),
        (
            &["ipam", "--prefix", "10.0.0.0/16", "--client-prefix-len", "8"],
            FAILED,
            &["10.0.0.0/16 has no /8 in it; expected a length from 16 to 32"],
        ),
        (&["identity"], USAGE, &["required", "--config <FILE>"]),
        (&["frobnicate"], USAGE, &["unrecognized subcommand 'frobnicate'"]),
        // What to ask for.
        (
            &["client", "--network-services", "kernel:/x"],
            FAILED,
            &["network service \"kernel:/x\": it has no MECHANISM://", wire],
        ),
        (
            &["client", "--network-services", "kernel://a/nsm0,,kernel://b"],
            FAILED,
            &["it is empty (a trailing or doubled comma?)", wire],
        ),
        (
            &["client", "--network-services", "kernel://a/a-name-of-16-byt"],
            FAILED,
            &["the interface name \"a-name-of-16-byt\" has 16 bytes; Linux takes at most 15"],
        ),
        (
            &["client", "--network-services", "kernel://a/nsm0, kernel://b c/nsm1"],
            FAILED,
            &[
                "network service \" kernel://b c/nsm1\" (item 2 of 2) at character 12: invalid character ' '",
                wire,
            ],
        ),
        (
            &["client", "--network-services", ""],
            FAILED,
            &["there is nothing to ask for: NSM_NETWORK_SERVICES (--network-services) is empty", wire],
        ),
        (&["client", "--init", "--once"], USAGE, &["'--init' cannot be used with '--once'"]),
        (
            &["client", "--liveness-check-interval", "0s"],
            USAGE,
            &["--liveness-check-interval", "it is zero; expected"],
        ),
        (&["client", "--liveness-check-enabled", "maybe"], USAGE, &["[possible values: true, false]"]),
    ] {
        says(&[("SPIFFE_ENDPOINT_SOCKET", "unix:///nowhere")], args, status, texts);
    }
    // The same from the environment, where it is named like the variable's flag.
    for (variable, value, role, status, texts) in [
        ("NSM_LISTEN_ON", "nonsense", "manager", USAGE, &["nonsense", url][..]),
        (
            "NSM_REGISTRY_URL",
            "nonsense",
            "manager",
            FAILED,
            &["NSM_REGISTRY_URL", "\"nonsense\" names no port", url],
        ),
        ("NSM_CONNECT_TO", "nonsense", "forwarder", USAGE, &["nonsense", url]),
        ("NSM_TUNNEL_IP", "none", "forwarder", USAGE, &["'none'", "--tunnel-ip"]),
        ("NSM_CIDR_PREFIX", "[10.0.0.0/8", "endpoint", USAGE, &["[10.0.0.0/8"]),
        ("NSM_REQUEST_TIMEOUT", "5", "client", USAGE, &["--request-timeout", time]),
        (
            "NSM_NETWORK_SERVICES",
            "secure",
            "client",
            FAILED,
            &["network service \"secure\": it has no MECHANISM://", wire],
        ),
    ] {
        let environment = [(variable, value), ("SPIFFE_ENDPOINT_SOCKET", "unix:///nowhere")];
        says(&environment, &[role], status, texts);
    }
}

#[test]
fn without_an_identity_nothing_starts() {
    let set = "set SPIFFE_ENDPOINT_SOCKET=unix:///path/to/socket";
    let directory = tempfile::tempdir().expect("directory");
    let socket = format!("unix://{}/m.sock", directory.path().display());
    for role in [
        &["client", "--network-services", "kernel://a/nsm0"][..],
        &["endpoint"],
        &["registry"],
        &["manager", "--listen-on", &socket],
    ] {
        says(&[], role, FAILED, &["no identity", "SPIFFE_ENDPOINT_SOCKET is not set", set]);
    }
    let tcp = [("SPIFFE_ENDPOINT_SOCKET", "tcp://10.0.0.1:80")];
    says(
        &tcp,
        &["endpoint"],
        FAILED,
        &["\"tcp://10.0.0.1:80\"", "only unix: sockets can attest their callers", set],
    );
}

#[test]
fn a_wrong_file_is_refused_with_the_place_in_it() {
    let directory = tempfile::tempdir().expect("directory");
    let head = "apiVersion: networkservicemesh.io/v1\nkind: NetworkService\nmetadata: {name: x}\n";
    for (role, flag, text, texts) in [
        (
            "registry",
            "--network-services",
            "apiVersion: networkservicemesh.io/v7\nkind: NetworkService\nmetadata: {name: x}\n".to_owned(),
            &["document 1, line 1, apiVersion: expected networkservicemesh.io/v1 or networkservicemesh.io/v1alpha1, found \"networkservicemesh.io/v7\""][..],
        ),
        (
            "registry",
            "--network-services",
            format!("{head}spec: {{matchez: []}}\n"),
            &["document 1, line 4, spec.matchez: unknown field; expected name, payload, matches"],
        ),
        (
            "registry",
            "--network-services",
            format!("{head}spec:\n  matches:\n  - routes:\n    - destination_selector: {{app: \"{{{{ if .x }}}}\"}}\n"),
            &["line 7, spec.matches[0].routes[0].destination_selector.app: template \"{{ if .x }}\" is not supported", "{{.key}}"],
        ),
        ("registry", "--network-services", "kind: [".into(), &["line 1"]),
        ("identity", "--config", "trustDomain: X y\nsockets: []\n".into(), &[":1: \"X y\" is not a SPIFFE ID or trust domain"]),
        ("identity", "--config", "trustDomain: x\nsockets: []\n".into(), &[":1: sockets: at least one, or nobody can ask"]),
        (
            "identity",
            "--config",
            "trustDomain: x\nsockets: [{path: /run/x, node: n}]\nentries:\n- {spiffeId: spiffe://y/z, selectors: {uid: 0}}\n".into(),
            &[":4: entries[0].spiffeId: spiffe://y/z is no workload in trust domain x"],
        ),
        (
            "identity",
            "--config",
            "trustDomain: x\nsockets: [{path: /run/x, node: n}]\nentries:\n- {spiffeId: spiffe://x/z, selectors: {}}\n".into(),
            &[":4: entries[0].selectors: none: every process would get this identity"],
        ),
    ] {
        let path = directory.path().join("file.yaml");
        fs::write(&path, text).expect("write");
        let path = path.to_string_lossy().into_owned();
        says(&[], &[role, flag, &path], FAILED, &[texts, &[&path]].concat());
        says(&[], &[role, flag, "/nowhere.yaml"], FAILED, &["/nowhere.yaml", "No such file or directory"]);
    }
    // Files that need not be there.
    for (role, flag, text, texts) in [
        (
            "manager",
            "--excluded-prefixes-file",
            "prefixes: [10.0.0.0/33]",
            &["NSM_EXCLUDED_PREFIXES_FILE", "\"10.0.0.0/33\" is not a prefix", "expected YAML such as"][..],
        ),
        (
            "endpoint",
            "--pbr-config-path",
            "- {proto: tcp}",
            &["NSM_PBR_CONFIG_PATH", "\"tcp\" is not an IP protocol number", "expected a YAML list of"],
        ),
        ("ipam", "--state-file", "rubbish", &["the leases in", "cannot be read", "one prefix a line"]),
    ] {
        let path = directory.path().join("file.yaml");
        fs::write(&path, text).expect("write");
        let path = path.to_string_lossy().into_owned();
        says(&[], &[role, flag, &path], FAILED, &[texts, &[&path]].concat());
        says(&[], &[role, flag, "/nowhere.yaml"], FAILED, &["no identity"]);
    }
}

#[test]
fn a_firewall_without_rules_does_not_start() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("acl.yaml").to_string_lossy().into_owned();
    let none = "it does not start without rules";
    let environment = [("SPIFFE_ENDPOINT_SOCKET", "unix:///nowhere"), ("NSM_ACL_CONFIG_PATH", path.as_str())];
    let refused = |texts: &[&str]| {
        says(&environment, &["firewall", "--service-name", "s"], FAILED, &[texts, &[&path]].concat());
    };
    refused(&[
        "cannot read the firewall's rules",
        none,
        "(NSM_ACL_CONFIG_PATH)",
        "No such file or directory",
    ]);
    for empty in ["", "{}", "aclRules: {}"] {
        fs::write(&path, empty).expect("write");
        refused(&["there is no rule in it", none, "to let everything pass write 'aclRules: {"]);
    }
    fs::write(&path, "aclRules:\n  web: \"action=reflect,tcplowport=eighty\"\n").expect("write");
    refused(&["line 2, rule \"web\", tcpupport: it is missing; expected it beside tcplowport"]);
}

#[test]
fn a_second_daemon_on_the_same_socket_is_refused_and_the_first_goes_on() {
    let pods = "\
- {name: a, node: node1}
- {name: gw, node: node1, endpoint: {services: [plain], cidrPrefix: [172.16.1.2/31]}}
";
    let Some(mesh) = Mesh::up("a_second_daemon_on_the_same_socket_is_refused_and_the_first_goes_on", pods)
    else {
        return;
    };
    let (manager, forwarder, gw) = (mesh.url("nsm.io.sock"), mesh.url("forwarder.sock"), mesh.url("gw.sock"));
    let config = mesh.lab.plan.paths().identity_config().to_string_lossy().into_owned();
    let state = mesh.lab.plan.paths().root.join("second").to_string_lossy().into_owned();
    for (socket, args) in [
        (
            &manager,
            &[
                "manager",
                "--name",
                "second",
                "--listen-on",
                &manager,
                "--registry-url",
                "tcp://10.255.0.1:5002",
            ][..],
        ),
        (&gw, &["endpoint", "--name", "second", "--connect-to", &manager, "--listen-on", &gw]),
        (
            &forwarder,
            &[
                "forwarder",
                "--name",
                "second",
                "--connect-to",
                &manager,
                "--listen-on",
                &forwarder,
                "--state-dir",
                &state,
                "--tunnel-ip",
                "127.0.0.1",
            ],
        ),
        (&mesh.url("identity.sock"), &["identity", "--config", &config]),
    ] {
        mesh.start("second", "a", args);
        let (how, said) = mesh.ended("second");
        assert_eq!(how, "exit status 1", "{args:?}: {said}");
        let path = socket.strip_prefix("unix://").expect("a Unix socket");
        let line = said.lines().rfind(|line| line.starts_with("nsm: ")).unwrap_or_else(|| panic!("{said}"));
        assert!(
            line.contains(&format!("somebody listens at {path} already: a second daemon")),
            "{args:?}: {line}"
        );
    }
    mesh.client("first", "a", "kernel://plain/nsm0", &[]);
    mesh.ready(&["first"]);
    mesh.end("first", rustix::process::Signal::TERM);
    mesh.nothing_is_left(&["a", "gw"]);
}

#[test]
fn a_forwarder_says_what_it_lacks_before_it_waits_for_anything() {
    let test = "a_forwarder_says_what_it_lacks_before_it_waits_for_anything";
    if may_not(test) {
        return;
    }
    let namespace = Namespace::unnamed().expect("a namespace");
    let directory = tempfile::tempdir().expect("directory");
    let state = directory.path().join("state").to_string_lossy().into_owned();
    let program = program_for_everybody(directory.path());
    let forwarder = |args: &[&str], nobody: bool| {
        let mut command = Command::new(&program);
        command.arg("forwarder").args(args).env_clear().env("NSM_STATE_DIR", &state);
        if nobody {
            command.uid(65534).gid(65534);
        }
        let (status, said) = namespace.run(|| run(&mut command)).expect("enter");
        assert_eq!(status, Some(FAILED), "{said}");
        said
    };
    let said = forwarder(&["--tunnel-ip", "192.0.2.77"], false);
    for text in [
        "no device of this node has a tunnel address in 192.0.2.77/32",
        "hint: set NSM_TUNNEL_IP to an address of the node's uplink",
    ] {
        assert!(said.contains(text), "{text:?} is not in {said:?}");
    }
    let said = forwarder(&[], false);
    assert!(said.contains("this node has no default route to take the tunnel address from"), "{said}");
    assert!(said.contains("hint: set NSM_TUNNEL_IP"), "{said}");
    fs::write(directory.path().join("file"), "").expect("write");
    let file = directory.path().join("file").to_string_lossy().into_owned();
    let said = forwarder(&["--tunnel-ip", "127.0.0.1", "--state-dir", &file], false);
    assert!(
        said.contains(&format!("plan store: cannot open {file}; is the state directory writable")),
        "{said}"
    );

    fs::remove_dir_all(&state).expect("remove");
    let said = forwarder(&["--tunnel-ip", "127.0.0.1"], true);
    assert!(said.contains("the forwarder needs CAP_NET_ADMIN and CAP_SYS_ADMIN"), "{said}");
}
