//! What Kubernetes runs and asks besides the roles' own work: probes under upstream's name, and the webhook with an SVID.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use nsm_identity::{Leaf, Source, ca::Ca};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinHandle,
    time::sleep,
};
use tokio_rustls::TlsConnector;

struct Role(Child);

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn role(directory: &Path, args: &[&str]) -> Role {
    let role = Command::new(env!("CARGO_BIN_EXE_nsm"))
        .args(args)
        .env("SPIFFE_ENDPOINT_SOCKET", format!("unix://{}/id.sock", directory.display()))
        .env("NSM_INTROSPECT_DIR", "")
        .env("KUBECONFIG", directory.join("none"))
        .env_remove("KUBERNETES_SERVICE_HOST")
        .stderr(Stdio::null())
        .spawn();
    Role(role.unwrap())
}

/// An authority that knows whoever this test runs as.
fn authority(directory: &Path) -> JoinHandle<()> {
    let uid = rustix::process::geteuid().as_raw();
    let config = format!(
        "trustDomain: test.lab\nsockets:\n- {{path: {}/id.sock, node: here}}\nentries:\n- {{spiffeId: spiffe://test.lab/me, node: here, selectors: {{uid: {uid}}}}}\n",
        directory.display()
    );
    fs::write(directory.join("ca.yaml"), config).unwrap();
    let ca = Ca::start(&directory.join("ca.yaml")).unwrap();
    tokio::spawn(async move { ca.serve(std::future::pending()).await.unwrap() })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_probe_under_upstreams_name_says_whether_a_server_serves() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let program = path.join("grpc-health-probe");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_nsm"), &program).unwrap();
    let url = format!("unix://{}/registry.sock", path.display());
    let probe = async || -> Output {
        let mut probe = tokio::process::Command::new(&program);
        probe.args(["-spiffe", &format!("-addr={url}")]);
        probe.env("SPIFFE_ENDPOINT_SOCKET", format!("unix://{}/id.sock", path.display()));
        probe.output().await.unwrap()
    };
    let said = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();

    let nobody = probe().await;
    assert!(!nobody.status.success() && said(&nobody).contains("no identity within 1s"), "{nobody:?}");
    let issuing = authority(path);
    let absent = probe().await;
    assert!(
        !absent.status.success() && said(&absent).contains("registry.sock does not serve: "),
        "{absent:?}"
    );
    let registry = role(path, &["registry", "--listen-on", &url]);
    let mut tries = 0;
    while !probe().await.status.success() {
        tries += 1;
        assert!(tries < 300, "{}", said(&probe().await));
        sleep(Duration::from_millis(100)).await;
    }
    drop(registry);
    assert!(!probe().await.status.success());
    issuing.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_webhook_as_upstreams_shows_its_svid() {
    let directory = tempfile::tempdir().unwrap();
    let issuing = authority(directory.path());
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let _webhook =
        role(directory.path(), &["webhook", "--listen-on", &address, "--container-images", "a/cmd-nsc"]);
    let source = Source::open(&format!("unix://{}/id.sock", directory.path().display())).await.unwrap();
    let mut config = (**source.current().client_config()).clone();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let mut stream = None;
    for _ in 0..300 {
        if let Ok(connected) = TcpStream::connect(&address).await {
            stream = connector.connect("hook.example".try_into().unwrap(), connected).await.ok();
            if stream.is_some() {
                break;
            }
        }
        sleep(Duration::from_millis(100)).await;
    }
    let mut stream = stream.expect("a connection");
    let shown = stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned();
    assert_eq!(Leaf::parse(shown).unwrap().id().as_str(), "spiffe://test.lab/me");
    stream.write_all(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    issuing.abort();
}

#[test]
fn a_webhook_says_what_is_wrong_with_its_settings() {
    for (args, says) in [
        (&["--webhook-mode", "none"][..], "possible values: spire, selfregister"),
        (&["--envs", "A"], "\"A\" is not NAME=VALUE (NSM_ENVS)"),
        (&["--sidecar-limits-cpu", "much"], "\"much\" is no quantity"),
        (&["--annotation", "a b"], "\"a b\" is no key of an annotation"),
        (&["--container-images", "a/B"], "would make a container named \"B\""),
        (
            &["--init-container-images", "nsm", "--container-images", "nsm"],
            "two containers would be named \"nsm\"",
        ),
        (&["--cert-file-path", "/x"], "one is given; expected both or none"),
        (
            &["--webhook-mode", "selfregister", "--cert-file-path", "/x", "--key-file-path", "/y"],
            "needs --ca-bundle-file-path",
        ),
        (&["--listen-on", "nowhere"], "cannot listen on \"nowhere\" (NSM_LISTEN_ON)"),
        (
            &["--webhook-mode", "selfregister", "--listen-on", "127.0.0.1:0"],
            "there is no way to an API server: neither KUBECONFIG nor a service account's files",
        ),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_nsm"))
            .arg("webhook")
            .args(args)
            .env("NSM_INTROSPECT_DIR", "")
            .env("KUBECONFIG", "/nowhere/none")
            .env_remove("KUBERNETES_SERVICE_HOST")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(says), "{args:?}: {said}");
    }
}
