//! The API ring serves, keeps its data over a crash, and goes with its owner.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use nsm_cluster::api_server;

/// Set for the process that is killed.
const OWNER: &str = "NSM_CLUSTER_TEST_OWNER";

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        sleep(Duration::from_millis(20));
    }
}

/// Processes that have this directory in their command line.
fn processes_of(directory: &Path) -> Vec<String> {
    let commands = fs::read_dir("/proc").unwrap().flatten();
    let commands = commands.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let commands = commands.map(|command| String::from_utf8_lossy(&command).replace('\0', " "));
    commands.filter(|command| command.contains(&*directory.to_string_lossy())).collect()
}

#[test]
fn each_has_its_own_data_which_outlives_a_crash() {
    let name = "each_has_its_own_data_which_outlives_a_crash";
    let Some(mut one) = api_server(name) else { return };
    let Some(other) = api_server(name) else { return };
    one.apply("{apiVersion: v1, kind: Namespace, metadata: {name: mine}}");
    let namespaces = ["get", "namespaces", "--output=name"];
    assert!(one.kubectl(&namespaces).contains("namespace/mine"));
    assert!(!other.kubectl(&namespaces).contains("namespace/mine"));

    let address = one.address();
    one.kill();
    let refused = one.kubectl_command().args(namespaces).output().unwrap();
    assert!(!refused.status.success(), "{refused:?}");
    one.go_on().unwrap();
    assert_eq!(one.address(), address);
    assert!(one.kubectl(&namespaces).contains("namespace/mine"));

    let directory = one.kubeconfig().parent().unwrap().parent().unwrap().to_owned();
    assert_eq!(processes_of(&directory).len(), 1);
    drop(one);
    assert!(!directory.exists() && processes_of(&directory).is_empty());
}

#[test]
fn a_service_account_may_what_rbac_lets_it() {
    let Some(server) = api_server("a_service_account_may_what_rbac_lets_it") else { return };
    let kubeconfig = server.kubeconfig_of("default", "reader");
    let get = |kind: &str| {
        let mut command = server.kubectl_command();
        let output = command.args(["get", kind]).env("KUBECONFIG", &kubeconfig).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (allowed, said) = get("configmaps");
    assert!(!allowed && said.contains("system:serviceaccount:default:reader"), "{said}");
    server.apply(
        "
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: reader, namespace: default}
rules: [{apiGroups: [''], resources: [configmaps], verbs: [get, list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: reader, namespace: default}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}
subjects: [{kind: ServiceAccount, name: reader, namespace: default}]
",
    );
    until("the role takes effect", || get("configmaps").0);
    let (allowed, said) = get("secrets");
    assert!(!allowed && said.contains("secrets is forbidden"), "{said}");
}

#[test]
fn it_goes_with_an_owner_that_is_killed() {
    let name = "it_goes_with_an_owner_that_is_killed";
    if std::env::var_os(OWNER).is_some() {
        let server = api_server(name).unwrap();
        println!("owner of {}", server.kubeconfig().display());
        sleep(Duration::from_secs(600));
    }
    // Says that it is skipped, where it is.
    if api_server(name).is_none() {
        return;
    }
    let mut owner: Child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(OWNER, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(owner.stdout.take().unwrap()).lines().map_while(Result::ok);
    let told = lines.filter_map(|line| line.split_once("owner of ").map(|(_, path)| path.to_owned())).next();
    let kubeconfig = told.unwrap();
    let directory = Path::new(&kubeconfig).parent().unwrap().parent().unwrap();
    assert_eq!(processes_of(directory).len(), 1);
    owner.kill().unwrap();
    owner.wait().unwrap();
    until("the API server is gone", || processes_of(directory).is_empty());
    assert!(!directory.exists());
}
