//! The server by itself: what it answers, what it refuses, and the certificate that it shows.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::{fs, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use nsm_transport::https::Shown;
use nsm_webhook::{
    keeper::{Found, Keeper, Origin},
    server::{Hook, serve},
    settings::Settings,
};
use rcgen::{CertificateParams, KeyPair};
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinHandle,
    time::sleep,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

struct Server {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<()>,
    kept: JoinHandle<()>,
    files: tempfile::TempDir,
}

/// Writes a new certificate, and returns it.
fn certificate(directory: &Path) -> CertificateDer<'static> {
    let key = KeyPair::generate().unwrap();
    let made = CertificateParams::new(vec!["hook.example".into()]).unwrap().self_signed(&key).unwrap();
    fs::write(directory.join("key.pem"), key.serialize_pem()).unwrap();
    fs::write(directory.join("cert.pem"), made.pem()).unwrap();
    made.der().clone()
}

impl Server {
    async fn start() -> Self {
        let files = tempfile::tempdir().unwrap();
        certificate(files.path());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (shown, found) = (Arc::new(Shown::own()), Arc::<Found>::default());
        let settings = Settings { images: vec!["cmd-nsc".parse().unwrap()], ..Settings::default() };
        let hook = Hook::new(settings, None, Arc::clone(&shown), Arc::clone(&found));
        let origin = Origin::Files {
            certificate: files.path().join("cert.pem"),
            key: files.path().join("key.pem"),
            bundle: None,
        };
        let keeper =
            Keeper { cluster: None, configuration: None, home: None, names: vec![], origin, found, shown };
        let kept = tokio::spawn(keeper.run());
        let (stop, stopped) = oneshot::channel();
        let served = tokio::spawn(serve(listener, hook, async { drop(stopped.await) }));
        Self { address, stop: Some(stop), served, kept, files }
    }

    /// A connection to a server that shows the certificate of the files.
    async fn connect(&self) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.files.path().join("cert.pem")).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config =
            ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(roots).with_no_client_auth();
        let stream = TcpStream::connect(self.address).await?;
        let name = ServerName::try_from("hook.example").unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    }

    /// Waits for the keeper.
    async fn connected(&self) -> TlsStream<TcpStream> {
        for _ in 0..600 {
            if let Ok(stream) = self.connect().await {
                return stream;
            }
            sleep(Duration::from_millis(50)).await;
        }
        panic!("no connection");
    }

    async fn say(&self, request: &[u8]) -> String {
        let mut stream = self.connected().await;
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        // It may be closed while we write.
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    async fn post(&self, body: &str) -> String {
        let head = format!(
            "POST /mutate?timeout=10s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        self.say((head + body).as_bytes()).await
    }
}

#[tokio::test]
async fn questions_are_answered_and_what_is_none_is_refused() {
    let server = Server::start().await;
    let get =
        |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").into_bytes();
    assert!(server.say(&get("/ready")).await.starts_with("HTTP/1.1 200"));
    assert!(server.say(&get("/mutate")).await.starts_with("HTTP/1.1 405"));
    assert!(server.say(&get("/etc/passwd")).await.starts_with("HTTP/1.1 404"));
    assert!(server.say(b"\0\0\0").await.starts_with("HTTP/1.1 400"));

    let review = r#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"7","operation":"CREATE",
        "kind":{"group":"","version":"v1","kind":"Pod"},"namespace":"a","object":{"metadata":{"annotations":
        {"networkservicemesh.io":"kernel://a/x"}},"spec":{"containers":[]}}}}"#;
    let answer = server.post(review).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("application/json"), "{answer}");
    assert!(
        answer.contains("\"allowed\":true") && answer.contains("\"patchType\":\"JSONPatch\""),
        "{answer}"
    );
    let answer = server.post("{}").await;
    assert!(
        answer.starts_with("HTTP/1.1 400") && answer.contains("expected \"admission.k8s.io/v1\""),
        "{answer}"
    );
    let head = format!("POST /mutate HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", 100 * 1024 * 1024);
    let answer = server.say(head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("at most 8388608 bytes"), "{answer}");
}

#[tokio::test]
async fn one_address_has_so_many_connections_and_others_come_when_they_end() {
    let server = Server::start().await;
    let mut held = vec![server.connected().await];
    while held.len() < 128 {
        held.push(server.connect().await.unwrap());
    }
    assert!(server.connect().await.is_err(), "one too many");
    held.pop();
    server.connected().await;
}

#[tokio::test]
async fn a_certificate_that_changes_is_shown_and_a_bad_one_is_not() {
    let server = Server::start().await;
    server.connected().await;
    certificate(server.files.path());
    server.connected().await;
    // The connection that is made trusts only what is in the file: this one keeps its last good certificate.
    let good = fs::read(server.files.path().join("cert.pem")).unwrap();
    fs::write(server.files.path().join("key.pem"), "nonsense").unwrap();
    fs::write(server.files.path().join("cert.pem"), &good).unwrap();
    server.connected().await;
}

#[tokio::test]
async fn who_is_there_at_the_end_is_let_go() {
    let mut server = Server::start().await;
    let idle = server.connected().await;
    drop(server.stop.take());
    (&mut server.served).await.unwrap();
    assert!(server.connect().await.is_err());
    drop(idle);
    server.kept.abort();
}
