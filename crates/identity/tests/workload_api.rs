//! The built-in CA and the source, over real sockets.

#![allow(clippy::unwrap_used)]

use std::{fs, path::Path, time::Duration};

use nsm_identity::{
    Source,
    ca::{Ca, Reloader},
};
use tempfile::TempDir;
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

/// A CA of its own directory, stopped and removed with the test.
struct Lab {
    dir: TempDir,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<()>,
    reloader: Reloader,
}

const PATIENCE: Duration = Duration::from_secs(20);

fn write_config(dir: &Path, head: &str, entries: &str) {
    let path = dir.display();
    let text = format!(
        "trustDomain: test.lab\n{head}\nsockets:\n- {{path: {path}/node1.sock, node: node1}}\n\
         - {{path: {path}/node2.sock, node: node2}}\nentries: {entries}\n"
    );
    // Like an editor: a reader never sees half a file.
    fs::write(dir.join("new.yaml"), text).unwrap();
    fs::rename(dir.join("new.yaml"), dir.join("ca.yaml")).unwrap();
}

impl Lab {
    fn start(head: &str, entries: &str) -> Self {
        let dir = TempDir::new().unwrap();
        write_config(dir.path(), head, entries);
        let ca = Ca::start(&dir.path().join("ca.yaml")).unwrap();
        let reloader = ca.reloader();
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(async move {
            ca.serve(async {
                let _ = stopped.await;
            })
            .await
            .unwrap();
        });
        Self { dir, stop: Some(stop), served, reloader }
    }

    fn endpoint(&self, node: &str) -> String {
        format!("unix://{}/{node}.sock", self.dir.path().display())
    }

    async fn source(&self, node: &str) -> Source {
        timeout(PATIENCE, Source::open(&self.endpoint(node))).await.unwrap().unwrap()
    }

    async fn stop(mut self) -> TempDir {
        self.stop.take().unwrap().send(()).unwrap();
        timeout(PATIENCE, self.served).await.unwrap().unwrap();
        self.dir
    }
}

/// Selects this very process.
fn me() -> String {
    format!("{{pid: {}, uid: {}}}", std::process::id(), rustix::process::geteuid().as_raw())
}

#[tokio::test]
async fn an_attested_caller_gets_an_svid_and_renewals() {
    let entries = format!("[{{spiffeId: 'spiffe://test.lab/me', selectors: {}}}]", me());
    let lab = Lab::start("svidTtl: 2s", &entries);
    let source = lab.source("node1").await;
    let first = source.current();
    assert_eq!(first.id().as_str(), "spiffe://test.lab/me");
    let second = timeout(PATIENCE, source.changed(&first)).await.unwrap();
    assert_eq!(second.id(), first.id());
    assert_ne!(second.svid().leaf(), first.svid().leaf(), "a renewal has a new certificate");
    let now = rustls_pki_types::UnixTime::now();
    second.bundles().verify(&second.svid().chain()[0], &[], now).unwrap();
    let dir = lab.stop().await;
    assert!(!dir.path().join("node1.sock").exists(), "the socket file goes with its daemon");
}

#[tokio::test]
async fn an_entry_that_comes_late_is_found() {
    let lab = Lab::start("entryWait: 20s", "[]");
    let endpoint = lab.endpoint("node1");
    let waiting = tokio::spawn(async move { Source::open(&endpoint).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!waiting.is_finished());
    write_config(
        lab.dir.path(),
        "entryWait: 20s",
        &format!("[{{spiffeId: 'spiffe://test.lab/late', selectors: {}}}]", me()),
    );
    let source = timeout(PATIENCE, waiting).await.unwrap().unwrap().unwrap();
    assert_eq!(source.current().id().path(), "/late");
    // And one that is changed later is followed on the same stream.
    let seen = source.current();
    write_config(
        lab.dir.path(),
        "",
        &format!("[{{spiffeId: 'spiffe://test.lab/changed', selectors: {}}}]", me()),
    );
    lab.reloader.reload();
    let seen = timeout(PATIENCE, source.changed(&seen)).await.unwrap();
    assert_eq!(seen.id().path(), "/changed");
    lab.stop().await;
}
