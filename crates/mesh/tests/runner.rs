//! The promises of the chain runner, each made to break.
#![allow(clippy::unwrap_used, reason = "a test program")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use nsm_api::{
    path,
    pb::{
        connection::{Connection, PathSegment, State},
        networkservice::NetworkServiceRequest,
    },
};
use nsm_mesh::{
    Call, Connections, Context, Element, Error, Lease, Next, Reason, Release, Result, chain, metrics::Metrics,
};
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};

/// What happened, in order.
type Log = Arc<Mutex<Vec<String>>>;

#[derive(Debug)]
struct Acquire {
    what: &'static str,
    log: Log,
}

#[derive(Debug)]
struct Acquired(&'static str, Log);

#[async_trait]
impl Lease for Acquired {
    fn name(&self) -> &'static str {
        self.0
    }

    async fn release(self: Box<Self>, cx: &Release) -> Result<()> {
        self.1.lock().push(format!("-{} {:?}", self.0, cx.reason));
        Ok(())
    }
}

#[async_trait]
impl Element for Acquire {
    fn name(&self) -> &'static str {
        self.what
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        self.log.lock().push(format!("+{}", self.what));
        cx.scope.lease(Acquired(self.what, Arc::clone(&self.log)));
        next.request(cx, request).await
    }
}

/// The end of the chain, as the test wants it.
#[derive(Debug)]
struct End {
    calls: AtomicUsize,
    at_once: AtomicUsize,
    most_at_once: AtomicUsize,
    mode: Mutex<Mode>,
    go: Semaphore,
    entered: Notify,
}

impl Default for End {
    fn default() -> Self {
        Self {
            calls: AtomicUsize::new(0),
            at_once: AtomicUsize::new(0),
            most_at_once: AtomicUsize::new(0),
            mode: Mutex::default(),
            go: Semaphore::new(0),
            entered: Notify::new(),
        }
    }
}

#[derive(Debug, Default, Clone, Copy, PartialEq)]
enum Mode {
    #[default]
    Answer,
    Refuse,
    Panic,
    Wait,
    /// For somebody else who never answers.
    Hang,
}

#[derive(Debug)]
struct Ending(Arc<End>);

#[async_trait]
impl Element for Ending {
    fn name(&self) -> &'static str {
        "end"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let end = &self.0;
        end.calls.fetch_add(1, Ordering::SeqCst);
        let now = end.at_once.fetch_add(1, Ordering::SeqCst) + 1;
        end.most_at_once.fetch_max(now, Ordering::SeqCst);
        let hangs = *end.mode.lock() == Mode::Hang;
        end.entered.notify_one();
        if hangs {
            cx.asker.on::<()>(std::future::pending()).await?;
        }
        tokio::task::yield_now().await;
        let mode = *end.mode.lock();
        if mode == Mode::Wait {
            end.go.acquire().await.unwrap().forget();
        }
        end.at_once.fetch_sub(1, Ordering::SeqCst);
        match mode {
            Mode::Refuse => Err(Error::denied("not today")),
            Mode::Panic => panic!("a bug"),
            Mode::Answer | Mode::Wait | Mode::Hang => next.request(cx, request).await,
        }
    }
}

fn role(log: &Log, end: &Arc<End>) -> Arc<Connections> {
    let acquire = |what| Acquire { what, log: Arc::clone(log) };
    let chain = chain![acquire("a"), acquire("b"), Ending(Arc::clone(end))];
    Connections::serving("hop", chain, Arc::new(Metrics::default()))
}

fn request(id: &str) -> NetworkServiceRequest {
    let mut conn = Connection { id: id.into(), network_service: "svc".into(), ..Connection::default() };
    path::step(&mut conn, "client", || id.into()).unwrap();
    NetworkServiceRequest { connection: Some(conn), ..NetworkServiceRequest::default() }
}

fn take(log: &Log) -> Vec<String> {
    std::mem::take(&mut *log.lock())
}

#[tokio::test]
async fn what_a_failed_request_acquired_is_released_newest_first() {
    let (log, end) = (Log::default(), Arc::new(End::default()));
    let role = role(&log, &end);
    *end.mode.lock() = Mode::Refuse;
    let error = role.request(Call::default(), request("c")).await.unwrap_err();
    assert_eq!(error.to_string(), "hop: not today");
    assert_eq!(take(&log), ["+a", "+b", "-b Failed", "-a Failed"]);
    assert!(role.is_empty());
}

#[tokio::test]
async fn a_failed_refresh_keeps_the_connection_and_a_close_releases_it() {
    let (log, end) = (Log::default(), Arc::new(End::default()));
    let role = role(&log, &end);
    let answer = role.request(Call::default(), request("c")).await.unwrap().connection;
    assert_eq!((answer.id.as_str(), path::index(&answer), answer.state()), ("c", 0, State::Up));
    take(&log);
    *end.mode.lock() = Mode::Refuse;
    let again = NetworkServiceRequest { connection: Some(answer.clone()), ..request("c") };
    role.request(Call::default(), again).await.unwrap_err();
    assert_eq!(take(&log), ["+a", "+b", "-b Failed", "-a Failed"], "only what the refresh acquired");
    assert_eq!(role.len(), 1);
    role.close(Call::default(), answer).await.unwrap();
    assert_eq!(take(&log), ["-b Closed", "-a Closed"]);
    assert!(role.is_empty());
}

#[tokio::test]
async fn a_panic_fails_its_request_and_nothing_else() {
    let (log, end) = (Log::default(), Arc::new(End::default()));
    let role = role(&log, &end);
    *end.mode.lock() = Mode::Panic;
    let error = role.request(Call::default(), request("c")).await.unwrap_err();
    assert_eq!(error.code, tonic::Code::Internal);
    assert_eq!(take(&log), ["+a", "+b", "-b Failed", "-a Failed"]);
    assert_eq!(role.metrics().panics(), 1);
    *end.mode.lock() = Mode::Answer;
    role.request(Call::default(), request("c")).await.unwrap();
    assert!(role.metrics().text().contains("nsm_panics_total 1"));
}

#[tokio::test]
async fn one_connection_is_served_in_turn_and_many_in_parallel() {
    let (log, end) = (Log::default(), Arc::new(End::default()));
    let role = role(&log, &end);
    let same: Vec<_> = (0..20).map(|_| role.request(Call::default(), request("c"))).collect();
    futures::future::join_all(same).await;
    // The path of each names hop anew, so it is one connection only if the id says so.
    let first = role.request(Call::default(), request("c")).await.unwrap().connection;
    end.most_at_once.store(0, Ordering::SeqCst);
    let refreshes: Vec<_> = (0..20)
        .map(|_| NetworkServiceRequest { connection: Some(first.clone()), ..request("c") })
        .map(|request| role.request(Call::default(), request))
        .collect();
    futures::future::join_all(refreshes).await;
    assert_eq!(end.most_at_once.load(Ordering::SeqCst), 1);

    *end.mode.lock() = Mode::Wait;
    let two: Vec<_> = ["x", "y"]
        .map(|id| {
            tokio::spawn({
                let role = Arc::clone(&role);
                async move { role.request(Call::default(), request(id)).await.map(drop) }
            })
        })
        .into();
    while end.at_once.load(Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
    end.go.add_permits(2);
    for task in two {
        task.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_caller_that_leaves_mid_request_leaves_nothing() {
    let (log, end) = (Log::default(), Arc::new(End::default()));
    let role = role(&log, &end);
    *end.mode.lock() = Mode::Wait;
    let caller = tokio::spawn({
        let role = Arc::clone(&role);
        async move { role.request(Call::default(), request("c")).await.map(drop) }
    });
    end.entered.notified().await;
    caller.abort();
    let _ = caller.await;
    end.go.add_permits(1);
    while !role.is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(take(&log), ["+a", "+b", "-b Failed", "-a Failed"]);
}

/// He asks again, for what he wants instead, and would stand behind himself.
#[tokio::test]
async fn nobody_waits_for_others_for_a_caller_that_has_left() {
    let (log, end) = (Log::default(), Arc::new(End::default()));
    let role = role(&log, &end);
    let mut asked = request("c");
    let path = asked.connection.as_mut().unwrap().path.as_mut().unwrap();
    path.path_segments.push(PathSegment { name: "hop".into(), id: "h".into(), ..PathSegment::default() });
    *end.mode.lock() = Mode::Hang;
    let caller = tokio::spawn({
        let (role, asked) = (Arc::clone(&role), asked.clone());
        async move { role.request(Call::default(), asked).await.map(drop) }
    });
    end.entered.notified().await;
    *end.mode.lock() = Mode::Answer;
    caller.abort();
    role.request(Call::default(), asked).await.unwrap();
    assert_eq!(take(&log), ["+a", "+b", "-b Failed", "-a Failed", "+a", "+b"]);
}

/// A hop that was restarted holds the wire of the process before it, and packets pass.
#[tokio::test]
async fn what_stood_before_a_caller_that_leaves_mid_request_stands_afterwards() {
    for (state, stays) in [(State::Up, true), (State::Down, true), (State::ReselectRequested, false)] {
        let (log, end) = (Log::default(), Arc::new(End::default()));
        let before = role(&Log::default(), &Arc::default());
        let mut conn = before.request(Call::default(), request("c")).await.unwrap().connection;
        let behind = PathSegment { name: "nse".into(), id: "e".into(), ..PathSegment::default() };
        conn.path.as_mut().unwrap().path_segments.push(behind);
        conn.set_state(state);
        let role = role(&log, &end);
        *end.mode.lock() = Mode::Wait;
        let caller = tokio::spawn({
            let role = Arc::clone(&role);
            let again = NetworkServiceRequest { connection: Some(conn), ..request("c") };
            async move { role.request(Call::default(), again).await.map(drop) }
        });
        end.entered.notified().await;
        caller.abort();
        let _ = caller.await;
        end.go.add_permits(1);
        // Tasks of one thread take turns: after so many of them what is undone is undone.
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        assert_eq!(!role.is_empty(), stays, "{state:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_ends_when_the_token_before_it_expires() {
    let (log, end) = (Log::default(), Arc::new(End::default()));
    let role = role(&log, &end);
    let mut request = request("c");
    let path = request.connection.as_mut().unwrap().path.as_mut().unwrap();
    path.path_segments[0].expires = Some(path::to_timestamp(SystemTime::now() + Duration::from_secs(60)));
    role.request(Call::default(), request).await.unwrap();
    take(&log);
    tokio::time::sleep(Duration::from_secs(50)).await;
    assert_eq!(role.len(), 1);
    while !role.is_empty() {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(take(&log), ["-b Expired", "-a Expired"]);
}

#[tokio::test]
async fn reselection_closes_the_old_connection_first() {
    let (log, end) = (Log::default(), Arc::new(End::default()));
    let role = role(&log, &end);
    let mut conn = role.request(Call::default(), request("c")).await.unwrap().connection;
    take(&log);
    conn.set_state(State::ReselectRequested);
    let again = NetworkServiceRequest { connection: Some(conn), ..request("c") };
    let answer = role.request(Call::default(), again).await.unwrap().connection;
    assert_eq!(take(&log), ["-b Reselect", "-a Reselect", "+a", "+b"]);
    assert_eq!(answer.state(), State::Up);
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused_before_anything_is_acquired() {
    let (log, end) = (Log::default(), Arc::new(End::default()));
    let role = role(&log, &end);
    type Spoil = Box<dyn Fn(&mut Connection)>;
    let bad: Vec<(&str, Spoil)> = vec![
        ("names no network service", Box::new(|c| c.network_service.clear())),
        ("Path.Index+1", Box::new(|c| c.path.as_mut().unwrap().index = 7)),
        ("should be equal", Box::new(|c| c.id = "somebody else".into())),
        ("labels", Box::new(|c| c.labels = (0..100_000).map(|i| (i.to_string(), String::new())).collect())),
    ];
    for (says, spoil) in bad {
        let mut request = request("c");
        spoil(request.connection.as_mut().unwrap());
        let error = role.request(Call::default(), request).await.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let error = role.request(Call::default(), NetworkServiceRequest::default()).await.unwrap_err();
    assert!(error.to_string().contains("no connection"), "{error}");
    // No path at all: upstream's first hop makes one.
    let bare = Connection { network_service: "svc".into(), ..Connection::default() };
    let bare = NetworkServiceRequest { connection: Some(bare), ..NetworkServiceRequest::default() };
    assert!(role.request(Call::default(), bare).await.is_ok());
    assert_eq!(end.calls.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn closing_what_nobody_remembers_succeeds() {
    let (log, end) = (Log::default(), Arc::new(End::default()));
    let role = role(&log, &end);
    role.close(Call::default(), request("c").connection.unwrap()).await.unwrap();
    assert!(take(&log).is_empty());
    let errors = role.drop_connection("c", Reason::Gone).await;
    assert!(errors.is_empty());
}

/// The pod of its endpoint was gone, and a request that has found another one is under way.
#[tokio::test]
async fn what_is_made_anew_meanwhile_does_not_end_for_what_was_gone_before() {
    for is_anew in [true, false] {
        let (log, end) = (Log::default(), Arc::new(End::default()));
        let role = role(&log, &end);
        let answer = role.request(Call::default(), request("c")).await.unwrap().connection;
        *end.mode.lock() = Mode::Wait;
        let asks_again = {
            let (role, again) = (Arc::clone(&role), request("c"));
            let again = NetworkServiceRequest { connection: Some(answer), ..again };
            tokio::spawn(async move { role.request(Call::default(), again).await })
        };
        while end.calls.load(Ordering::SeqCst) < 2 {
            tokio::task::yield_now().await;
        }
        let looked = Arc::new(AtomicUsize::new(0));
        let gone = {
            let (role, id, looked) = (Arc::clone(&role), role.ids().remove(0), Arc::clone(&looked));
            let is_anew = move || {
                looked.fetch_add(1, Ordering::SeqCst);
                is_anew
            };
            tokio::spawn(async move { role.drop_connection_unless(&id, Reason::Gone, is_anew).await })
        };
        for _ in 0..64 {
            tokio::task::yield_now().await;
        }
        assert_eq!(looked.load(Ordering::SeqCst), 0, "a request is under way");
        end.go.add_permits(1);
        asks_again.await.unwrap().unwrap();
        assert!(gone.await.unwrap().is_empty());
        assert_eq!((looked.load(Ordering::SeqCst), role.len()), (1, usize::from(is_anew)));
    }
}

/// Finds out slowly where a forgotten connection went.
#[derive(Debug)]
struct SlowToFind {
    looking: Notify,
    found: Semaphore,
}

#[derive(Debug)]
struct Finding(Arc<SlowToFind>, Log);

#[async_trait]
impl Element for Finding {
    fn name(&self) -> &'static str {
        "finding"
    }

    async fn close_forgotten(&self, cx: &mut Context<'_>, conn: Connection, next: Next<'_>) -> Result<()> {
        self.0.looking.notify_one();
        self.0.found.acquire().await.unwrap().forget();
        self.1.lock().push(format!("closed {}", path::segments(&conn)[0].id));
        next.close_forgotten(cx, conn).await
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        next.request(cx, request).await
    }
}

#[tokio::test]
async fn what_is_asked_for_again_is_not_closed_any_more() {
    let (log, slow) =
        (Log::default(), Arc::new(SlowToFind { looking: Notify::new(), found: Semaphore::new(0) }));
    let chain = chain![Finding(Arc::clone(&slow), Arc::clone(&log))];
    let role = Connections::serving("hop", chain, Arc::<Metrics>::default());
    // Their paths name this hop, which remembers them no more.
    let mut forgotten = Vec::new();
    for id in ["back", "away"] {
        let answer = role.request(Call::default(), request(id)).await.unwrap().connection;
        role.close(Call::default(), answer.clone()).await.unwrap();
        forgotten.push(answer);
    }
    let [back, away] = &forgotten[..] else { unreachable!() };
    // One of them twice, as by a hop that tries again.
    let mut closes = Vec::new();
    for conn in [back, away, back] {
        let (role, conn) = (Arc::clone(&role), conn.clone());
        closes.push(tokio::spawn(async move { role.close(Call::default(), conn).await }));
        slow.looking.notified().await;
    }
    let again = NetworkServiceRequest { connection: Some(back.clone()), ..request("") };
    role.request(Call::default(), again).await.unwrap();
    slow.found.add_permits(3);
    for close in closes {
        close.await.unwrap().unwrap();
    }
    assert_eq!(take(&log), ["closed away"]);
    assert_eq!(role.len(), 1, "a late Close is not of what has come since");
    role.close(Call::default(), back.clone()).await.unwrap();
    assert_eq!((role.len(), take(&log).len()), (0, 0));
    role.close(Call::default(), back.clone()).await.unwrap();
    assert_eq!(take(&log), ["closed back"]);
}
