//! The built-in CA and the source, over real sockets.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    io::BufRead as _,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime},
};

use nsm_identity::{
    Error, Source, UnixPeer, UnixSocket,
    ca::{Authority, Ca, CaError, Config, Reloader},
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

#[tokio::test]
async fn a_process_that_opens_connections_without_end_is_stopped() {
    use tokio::{io::AsyncReadExt as _, net::UnixStream};
    let entries = format!("[{{spiffeId: 'spiffe://test.lab/me', selectors: {}}}]", me());
    let lab = Lab::start("", &entries);
    let path = lab.dir.path().join("node1.sock");
    let mut open = Vec::new();
    for _ in 0..64 {
        let mut stream = UnixStream::connect(&path).await.unwrap();
        // The server's first frame: it is accepted.
        timeout(PATIENCE, stream.read_u8()).await.unwrap().unwrap();
        open.push(stream);
    }
    let mut more = UnixStream::connect(&path).await.unwrap();
    assert_eq!(timeout(PATIENCE, more.read(&mut [0])).await.unwrap().unwrap(), 0, "closed at once");
    drop(open);
    // They are let go of one after the other.
    while timeout(PATIENCE, Source::fetch_once(&lab.endpoint("node1"))).await.unwrap().is_err() {}
    lab.stop().await;
}

/// What the Workload API says to this process, asked once.
async fn refusal(lab: &Lab, node: &str) -> String {
    let error = timeout(PATIENCE, Source::fetch_once(&lab.endpoint(node))).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::WorkloadApi { .. }), "{error}");
    error.to_string()
}

#[tokio::test]
async fn who_fits_no_entry_is_denied_with_the_facts_seen() {
    let entries = format!(
        "[{{spiffeId: 'spiffe://test.lab/init', selectors: {{pid: 1}}}}, \
         {{spiffeId: 'spiffe://test.lab/other-uid', selectors: {{uid: 4242}}}}, \
         {{spiffeId: 'spiffe://test.lab/other-start', selectors: {{pid: {pid}, pidStart: 1}}}}, \
         {{spiffeId: 'spiffe://test.lab/node2', node: node2, selectors: {{pid: {pid}}}}}]",
        pid = std::process::id()
    );
    let lab = Lab::start("entryWait: 200ms", &entries);
    let text = refusal(&lab, "node1").await;
    let exe = std::env::current_exe().unwrap();
    for fact in [
        "no entry fits".to_owned(),
        format!("pid {}", std::process::id()),
        format!("exe {}", exe.display()),
        "netns 4:".to_owned(),
        "on the socket of node node1".to_owned(),
    ] {
        assert!(text.contains(&fact), "{fact}: {text}");
    }
    // The same process through the other node's socket is somebody.
    let source = lab.source("node2").await;
    assert_eq!(source.current().id().path(), "/node2");
    // And loses that as soon as the entry goes: the stream ends, and nothing new is issued.
    write_config(lab.dir.path(), "entryWait: 100ms", "[]");
    lab.reloader.reload();
    while Source::fetch_once(&lab.endpoint("node2")).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    lab.stop().await;
}

#[tokio::test]
async fn a_wrong_file_changes_nothing_and_is_explained() {
    let entries = format!("[{{spiffeId: 'spiffe://test.lab/me', selectors: {}}}]", me());
    let lab = Lab::start("entryWait: 100ms", &entries);
    fs::write(lab.dir.path().join("ca.yaml"), "trustDomain: [").unwrap();
    lab.reloader.reload();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(lab.source("node1").await.current().id().path(), "/me");
    lab.stop().await;
}

#[test]
fn configurations_are_checked_with_line_and_field() {
    let socket = "sockets: [{path: /s, node: n}]";
    let table = [
        ("trustDomain: lab".to_owned(), 1, "sockets"),
        (format!("trustDomain: LAB\n{socket}"), 1, "lower-case"),
        (format!("trustDomain: lab\n{socket}\nsvidTTL: 1h"), 3, "svidTTL"),
        (format!("trustDomain: lab\n{socket}\nsvidTtl: soon"), 3, "no duration"),
        (format!("trustDomain: lab\n{socket}\nsvidTtl: 1s"), 1, "svidTtl: at least"),
        ("trustDomain: lab\nsockets: []".to_owned(), 1, "sockets: at least one"),
        (
            "trustDomain: lab\nsockets:\n- {path: s, node: n}".to_owned(),
            3,
            "sockets[0].path: must be absolute",
        ),
        (
            "trustDomain: lab\nsockets:\n- {path: /s, node: n}\n- {path: /s, node: m}".to_owned(),
            4,
            "sockets[1].path: a second",
        ),
        (
            "trustDomain: lab\nsockets:\n- {path: /s, node: n}\n- {path: /t, node: n}".to_owned(),
            4,
            "sockets[1].node",
        ),
        (
            format!(
                "trustDomain: lab\n{socket}\nentries:\n- {{spiffeId: 'spiffe://x/y', selectors: {{pid: 1}}}}"
            ),
            4,
            "entries[0].spiffeId: spiffe://x/y is no workload in trust domain lab",
        ),
        (
            format!(
                "trustDomain: lab\n{socket}\nentries:\n- {{spiffeId: 'spiffe://lab', selectors: {{pid: 1}}}}"
            ),
            4,
            "entries[0].spiffeId",
        ),
        (
            format!("trustDomain: lab\n{socket}\nentries:\n- {{spiffeId: nobody, selectors: {{pid: 1}}}}"),
            4,
            "must start with spiffe://",
        ),
        (
            format!(
                "trustDomain: lab\n{socket}\nentries:\n- {{spiffeId: 'spiffe://lab/y', selectors: {{}}}}"
            ),
            4,
            "entries[0].selectors: none",
        ),
        (
            format!(
                "trustDomain: lab\n{socket}\nentries:\n- {{spiffeId: 'spiffe://lab/y', selectors: {{pidStart: 1}}}}"
            ),
            4,
            "pidStart: means nothing without pid",
        ),
        (
            format!(
                "trustDomain: lab\n{socket}\nentries:\n- {{spiffeId: 'spiffe://lab/y', node: m, selectors: {{pid: 1}}}}"
            ),
            4,
            "entries[0].node: no socket is node m's",
        ),
        (
            format!(
                "trustDomain: lab\n{socket}\nentries:\n- {{spiffeId: 'spiffe://lab/y', selectors: {{pod: x}}}}"
            ),
            4,
            "pod",
        ),
        (
            format!(
                "trustDomain: lab\n{socket}\nentries:\n- {{spiffeId: 'spiffe://lab/y', selectors: {{uid: -1}}}}"
            ),
            4,
            "",
        ),
    ];
    for (text, line, part) in table {
        let error = Config::parse(&text, Path::new("/etc/nsm/ca.yaml")).unwrap_err();
        let shown = error.to_string();
        assert!(shown.starts_with(&format!("/etc/nsm/ca.yaml:{line}: ")), "{text}\n=> {shown}");
        assert!(shown.contains(part), "{text}\n=> {shown}");
    }
    let error = Config::load(Path::new("/nonexistent/ca.yaml")).unwrap_err();
    assert!(matches!(error, CaError::Read { .. }), "{error}");
}

/// A gRPC call to the Workload API by hand.
async fn raw_call(lab: &Lab, method: &'static str, header: bool) -> tonic::Status {
    let channel =
        tonic::transport::Endpoint::from_shared(lab.endpoint("node1")).unwrap().connect().await.unwrap();
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let mut request = tonic::Request::new(());
    if header {
        request.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
    }
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(method);
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    grpc.server_streaming(request, path, codec).await.unwrap_err()
}

#[tokio::test]
async fn the_api_is_spoken_as_spiffe_says() {
    let entries = format!("[{{spiffeId: 'spiffe://test.lab/me', selectors: {}}}]", me());
    let lab = Lab::start("", &entries);
    for method in ["/SpiffeWorkloadAPI/FetchX509SVID", "/SpiffeWorkloadAPI/FetchX509Bundles"] {
        let status = raw_call(&lab, method, false).await;
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
    }
    for method in ["/SpiffeWorkloadAPI/FetchJWTSVID", "/SpiffeWorkloadAPI/FetchJWTBundles"] {
        let status = raw_call(&lab, method, true).await;
        assert_eq!(status.code(), tonic::Code::Unimplemented, "{status}");
    }
    lab.stop().await;
}

#[tokio::test]
async fn a_persisted_root_survives_a_restart_and_sources_reconnect() {
    let entries = format!("[{{spiffeId: 'spiffe://test.lab/me', selectors: {}}}]", me());
    let dir = TempDir::new().unwrap();
    let head = format!("svidTtl: 1h\nstateDir: {}/state", dir.path().display());
    write_config(dir.path(), &head, &entries);
    let file = dir.path().join("ca.yaml");
    let endpoint = format!("unix://{}/node1.sock", dir.path().display());
    let start = || {
        let ca = Ca::start(&file).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(async move {
            ca.serve(async {
                let _ = stopped.await;
            })
            .await
            .unwrap();
        });
        (stop, served)
    };
    let (stop, served) = start();
    let source = timeout(PATIENCE, Source::open(&endpoint)).await.unwrap().unwrap();
    let first = source.current();
    stop.send(()).unwrap();
    timeout(PATIENCE, served).await.unwrap().unwrap();
    let pem = dir.path().join("state/ca.pem");
    assert_eq!(fs::metadata(&pem).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(dir.path().join("state")).unwrap().permissions().mode() & 0o777, 0o700);

    let (stop, served) = start();
    let second = timeout(PATIENCE, source.changed(&first)).await.unwrap();
    // The new one's SVID is good for who still has the old one's root.
    let now = rustls_pki_types::UnixTime::now();
    first.bundles().verify(&second.svid().chain()[0], &[], now).unwrap();
    stop.send(()).unwrap();
    timeout(PATIENCE, served).await.unwrap().unwrap();
}

#[test]
fn a_state_that_cannot_be_used_is_explained() {
    let dir = TempDir::new().unwrap();
    let now = SystemTime::now();
    let open = |name: &str, domain: &str| {
        Authority::open(&dir.path().join(name), domain.parse().unwrap(), now).map(drop)
    };
    open("good", "test.lab").unwrap();
    open("good", "test.lab").unwrap();
    let pem = dir.path().join("good/ca.pem");

    let error = open("good", "other.lab").unwrap_err();
    assert!(matches!(error, CaError::OtherDomain { .. }), "{error}");

    fs::set_permissions(&pem, fs::Permissions::from_mode(0o644)).unwrap();
    let error = open("good", "test.lab").unwrap_err();
    assert!(matches!(error, CaError::Exposed(_)), "{error}");
    fs::set_permissions(&pem, fs::Permissions::from_mode(0o600)).unwrap();

    let text = fs::read_to_string(&pem).unwrap();
    let half = &text[..text.len() / 2];
    let foreign = {
        open("foreign", "test.lab").unwrap();
        let foreign = fs::read_to_string(dir.path().join("foreign/ca.pem")).unwrap();
        let key = foreign.find("-----BEGIN PRIVATE KEY").unwrap();
        format!("{}{}", &text[..text.find("-----BEGIN PRIVATE KEY").unwrap()], &foreign[key..])
    };
    for damaged in [half, "", "rubbish", &foreign] {
        fs::write(&pem, damaged).unwrap();
        let error = open("good", "test.lab").unwrap_err();
        assert!(matches!(error, CaError::Damaged { .. }), "{error}");
        assert!(!error.to_string().contains("PRIVATE"));
    }

    fs::write(dir.path().join("file"), "").unwrap();
    let error = open("file", "test.lab").unwrap_err();
    assert!(matches!(error, CaError::State { .. }), "{error}");
    let error = open("file/below", "test.lab").unwrap_err();
    assert!(matches!(error, CaError::State { .. }), "{error}");
}

#[tokio::test]
async fn a_second_daemon_is_refused_and_a_dead_ones_socket_replaced() {
    let lab = Lab::start("", "[]");
    let error = Ca::start(&lab.dir.path().join("ca.yaml")).unwrap_err();
    assert!(matches!(error, Error::SocketInUse(_)), "{error}");
    assert!(error.to_string().contains("second daemon"), "{error}");
    let path = lab.dir.path().join("node1.sock");
    assert!(path.exists(), "the refused one leaves the other's socket alone");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o777);
    let dir = lab.stop().await;

    // A killed daemon leaves its file.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let socket = UnixSocket::bind(&path).unwrap();
    UnixListener::bind(dir.path().join("node2.sock")).map(drop).unwrap();
    // Whoever replaced our file keeps it.
    fs::remove_file(&path).unwrap();
    fs::write(&path, "").unwrap();
    drop(socket);
    assert!(path.exists());
    let error = UnixSocket::bind(&path).unwrap_err();
    assert!(error.to_string().contains("no socket"), "a file is not replaced: {error}");
    let error = UnixSocket::bind(&path.join("below")).unwrap_err();
    assert!(matches!(error, Error::Socket { .. }), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "no lock or temporary file is left");
}

#[test]
fn a_private_socket_is_its_owners_and_its_directory_goes_with_the_last() {
    let dir = TempDir::new().unwrap();
    let directory = dir.path().join("private");
    let first = UnixSocket::bind_private(&directory.join("first.sock")).unwrap();
    assert_eq!(fs::metadata(first.path()).unwrap().permissions().mode() & 0o777, 0o600);
    let second = UnixSocket::bind_private(&directory.join("second.sock")).unwrap();
    drop(first);
    assert!(second.path().exists());
    drop(second);
    assert!(!directory.exists());
    // What others left there stays, and so does the directory of a socket for everybody.
    fs::create_dir(&directory).unwrap();
    drop(UnixSocket::bind(&directory.join("a.sock")).unwrap());
    fs::write(directory.join("file"), "").unwrap();
    drop(UnixSocket::bind_private(&directory.join("b.sock")).unwrap());
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
}

/// A daemon that starts while the last one leaves finds no directory, or makes it again.
#[test]
fn sockets_that_come_and_go_in_one_directory_do_not_disturb_each_other() {
    let dir = TempDir::new().unwrap();
    let directory = dir.path().join("private");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let path = directory.join(format!("{thread}.sock"));
            scope.spawn(move || {
                for _ in 0..50 {
                    let socket = UnixSocket::bind_private(&path).unwrap();
                    std::os::unix::net::UnixStream::connect(socket.path()).unwrap();
                }
            });
        }
    });
}

#[test]
fn a_lock_that_somebody_holds_stops_nobody_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let held = fs::File::open(dir.path()).unwrap();
    held.lock().unwrap();
    let error = UnixSocket::bind(&dir.path().join("a.sock")).unwrap_err();
    let said = nsm_identity::explain(&error);
    assert!(said.contains(&format!("the lock of {}", dir.path().display())), "{said}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is bound without the lock");
    held.unlock().unwrap();
    drop(UnixSocket::bind(&dir.path().join("a.sock")).unwrap());
}

#[tokio::test]
async fn addresses_of_the_api_are_checked() {
    for endpoint in ["", "tcp://127.0.0.1:1", "unix:relative", "/run/x.sock"] {
        let error = Source::open(endpoint).await.unwrap_err();
        assert!(matches!(error, Error::Endpoint { .. }), "{error}");
    }
    let error = Source::fetch_once("unix:///nonexistent.sock").await.unwrap_err();
    assert!(error.to_string().contains("No such file"), "{error}");
}

/// A process of its own, ended and reaped with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Not a test: what [`a_caller_in_another_network_namespace`] runs in a process of its own.
#[tokio::test]
async fn child_asks_who_it_is() {
    let Ok(endpoint) = std::env::var("NSM_TEST_CHILD_ENDPOINT") else { return };
    let answer = match Source::fetch_once(&endpoint).await {
        Ok(identity) => identity.id().to_string(),
        Err(error) => error.to_string(),
    };
    println!("\nANSWER {answer}");
}

/// Not a test: the authority of [`a_caller_that_the_authority_cannot_see_is_refused`].
#[tokio::test]
async fn child_serves_identities() {
    let Some(config) = std::env::var_os("NSM_TEST_CHILD_CONFIG") else { return };
    let ca = Ca::start(config.as_ref()).unwrap();
    println!("\nANSWER serving");
    ca.serve(std::future::pending()).await.unwrap();
}

#[tokio::test]
async fn a_caller_that_the_authority_cannot_see_is_refused() {
    let dir = TempDir::new().unwrap();
    write_config(dir.path(), "entryWait: 20s", "[{spiffeId: 'spiffe://test.lab/any', selectors: {uid: 0}}]");
    let child = Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "child_serves_identities", "--nocapture"])
        .env("NSM_TEST_CHILD_CONFIG", dir.path().join("ca.yaml"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = Process(child.unwrap());
    let mut lines = std::io::BufReader::new(child.0.stdout.take().unwrap()).lines();
    if !lines.any(|line| line.is_ok_and(|line| line == "ANSWER serving")) {
        println!("SKIPPED a_caller_that_the_authority_cannot_see_is_refused: no PID namespace (needs root)");
        return;
    }
    let endpoint = format!("unix://{}/node1.sock", dir.path().display());
    let error = timeout(PATIENCE, Source::fetch_once(&endpoint)).await.unwrap().unwrap_err().to_string();
    for said in ["no identity issued", "PID namespace that is not visible", "hostPID: true"] {
        assert!(error.contains(said), "{said}: {error}");
    }
}

#[tokio::test]
async fn a_caller_in_another_network_namespace() {
    // The thread keeps the namespace; nothing is mounted.
    let (send, receive) = std::sync::mpsc::channel();
    let (_keep, kept) = std::sync::mpsc::channel::<()>();
    let maker = std::thread::spawn(move || {
        #[allow(deprecated)] // Only this thread's network namespace changes.
        let made = rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET);
        send.send(made.map(|()| rustix::thread::gettid().as_raw_nonzero().get())).unwrap();
        let _ = kept.recv();
    });
    let Ok(tid) = receive.recv().unwrap() else {
        println!(
            "SKIPPED a_caller_in_another_network_namespace: cannot make a network namespace (needs root)"
        );
        return;
    };
    let netns = format!("/proc/{}/task/{tid}/ns/net", std::process::id());
    let entries = format!(
        "[{{spiffeId: 'spiffe://test.lab/pod', selectors: {{netns: '{netns}'}}}}, \
         {{spiffeId: 'spiffe://test.lab/host', selectors: {{netns: '/proc/{}/ns/net'}}}}]",
        std::process::id()
    );
    let lab = Lab::start("entryWait: 100ms", &entries);
    let ask = |inside: bool| {
        let (endpoint, netns) = (lab.endpoint("node1"), netns.clone());
        // On a thread of its own: a child starts in the namespace of the thread that made it.
        std::thread::spawn(move || {
            if inside {
                let netns = fs::File::open(netns).unwrap();
                let flags = rustix::thread::LinkNameSpaceType::Network;
                rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&netns), Some(flags))
                    .unwrap();
            }
            let child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "child_asks_who_it_is", "--nocapture"])
                .env("NSM_TEST_CHILD_ENDPOINT", endpoint)
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let mut child = Process(child);
            let mut text = String::new();
            std::io::Read::read_to_string(child.0.stdout.as_mut().unwrap(), &mut text).unwrap();
            text.lines().find_map(|line| line.strip_prefix("ANSWER ")).unwrap_or(&text).to_owned()
        })
    };
    let answer = |thread: std::thread::JoinHandle<String>| async {
        tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap()
    };
    assert_eq!(answer(ask(true)).await, "spiffe://test.lab/pod");
    assert_eq!(answer(ask(false)).await, "spiffe://test.lab/host");
    // An entry for the pod's namespace says nothing about others.
    let entries = format!("[{{spiffeId: 'spiffe://test.lab/pod', selectors: {{netns: '{netns}'}}}}]");
    write_config(lab.dir.path(), "entryWait: 100ms", &entries);
    lab.reloader.reload();
    let mut denied = answer(ask(false)).await;
    while denied == "spiffe://test.lab/host" {
        denied = answer(ask(false)).await;
    }
    assert!(denied.contains("no entry fits"), "{denied}");
    lab.stop().await;
    drop(_keep);
    maker.join().unwrap();
}

#[tokio::test]
async fn a_peer_that_exits_is_known_to_have_gone() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("s.sock");
    let socket = UnixSocket::bind(&path).unwrap();
    let listener = socket.listener().unwrap();
    let code = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.stdin.read()";
    let child = Command::new("python3").args(["-c", code]).arg(&path).stdin(Stdio::piped()).spawn();
    let Ok(child) = child else {
        println!("SKIPPED a_peer_that_exits_is_known_to_have_gone: no python3");
        return;
    };
    let mut child = Process(child);
    let (stream, _) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    let peer = UnixPeer::of(&stream).unwrap();
    assert_eq!(peer.pid(), Some(child.0.id()));
    assert!(peer.is_alive());
    peer.netns_id().unwrap();
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    assert!(!peer.is_alive());
    let error = peer.netns_id().unwrap_err();
    assert!(error.to_string().contains("has exited"), "{error}");
}
