//! The chain runner: a role is a list of elements, and each connection walks it.
//!
//! A request goes down the list and the connection comes back up; what an element acquires it leases in the
//! connection's [`Scope`]. The runner
//!
//! 1. serialises the requests of one connection and runs different connections in parallel;
//! 2. is all or nothing: what a failed request acquired is released, newest first;
//! 3. is not abandoned when the caller leaves: tonic drops a handler's future when its client cancels, so
//!    the chain runs in a task of its own;
//! 4. contains panics: the request fails, its leases are released, the process lives;
//! 5. names every element in spans and metrics.

use std::{
    collections::HashMap,
    fmt,
    panic::AssertUnwindSafe,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use futures::FutureExt as _;
use nsm_api::{
    limits,
    path::{self, Asker},
    pb::{
        connection::{Connection, State},
        introspect::Decision,
        networkservice::NetworkServiceRequest,
    },
    planted,
};
use nsm_identity::clock;
use nsm_identity::{SpiffeId, Token, token};
use nsm_transport::Peer;
use parking_lot::Mutex;
use tokio::{
    sync::{Mutex as AsyncMutex, oneshot, watch},
    task::AbortHandle,
    time::Instant,
};
use tracing::Instrument as _;

use crate::{
    error::{Error, Result},
    fds::Fds,
    hop::NextHop,
    inspect::{Asked, Trail},
    metrics::Metrics,
    scope::{Reason, Release, Scope},
};

/// The deadline of a request whose caller named none: upstream's clients give 15 s.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(15);

/// The least that one of several tries gets: less than that, and a busy machine would look like a dead one.
const LEAST_TRY: Duration = Duration::from_secs(1);

/// One step of a control-plane chain.
#[async_trait]
pub trait Element: Send + Sync + fmt::Debug {
    /// Short and stable: it names the span and the metric.
    fn name(&self) -> &'static str;

    /// Whether the caller may do this to the connection, a Request and a Close alike. Asked of every element, in order,
    /// before anything is acquired or released; what it writes into the connection goes on with it.
    ///
    /// # Errors
    /// Why not.
    async fn admit(&self, _cx: &mut Context<'_>, _conn: &mut Connection) -> Result<()> {
        Ok(())
    }

    /// Handles a request: before `next` on the way down, after it on the way up.
    ///
    /// # Errors
    /// Its own, or that of an element further down.
    async fn request(
        &self,
        cx: &mut Context<'_>,
        request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        next.request(cx, request).await
    }

    /// Handles the Close of a connection that this process does not remember, for instance after its restart:
    /// finds what can be found by the connection alone. Leases are empty then.
    async fn close_forgotten(&self, cx: &mut Context<'_>, conn: Connection, next: Next<'_>) -> Result<()> {
        next.close_forgotten(cx, conn).await
    }
}

/// A role: its elements in order.
pub type Chain = Arc<[Arc<dyn Element>]>;

/// Writes a role as the list that it is.
#[macro_export]
macro_rules! chain {
    [$($element:expr),* $(,)?] => {{
        let elements: Vec<std::sync::Arc<dyn $crate::chain::Element>> = vec![$(std::sync::Arc::new($element)),*];
        $crate::chain::Chain::from(elements)
    }};
}

/// The rest of the chain.
#[derive(Clone, Copy)]
pub struct Next<'a> {
    rest: &'a [Arc<dyn Element>],
    metrics: &'a Metrics,
}

impl fmt::Debug for Next<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.rest.iter().map(|e| e.name())).finish()
    }
}

impl Next<'_> {
    /// Goes on. An element that tries several candidates calls this once for each. The end of the list
    /// answers with the connection as it stands: an endpoint is a chain that ends here.
    ///
    /// # Errors
    /// Whatever an element further down says.
    pub async fn request(self, cx: &mut Context<'_>, request: NetworkServiceRequest) -> Result<Connection> {
        let Some((element, rest)) = self.rest.split_first() else {
            return request.connection.ok_or_else(|| limits::Malformed::NoConnection.into());
        };
        let span = tracing::debug_span!("element", name = element.name());
        let begin = Instant::now();
        let next = Next { rest, metrics: self.metrics };
        let result = element.request(cx, request, next).instrument(span).await;
        self.metrics.element(element.name(), begin.elapsed(), result.is_ok());
        result
    }

    /// Goes on with a Close, see [`Element::close_forgotten`].
    ///
    /// # Errors
    /// Whatever an element further down says.
    pub async fn close_forgotten(self, cx: &mut Context<'_>, conn: Connection) -> Result<()> {
        let Some((element, rest)) = self.rest.split_first() else { return Ok(()) };
        element.close_forgotten(cx, conn, Next { rest, metrics: self.metrics }).await
    }
}

/// What an element may see besides its own fields.
#[derive(Debug)]
pub struct Context<'c> {
    /// This hop's name in the path.
    pub me: &'c str,
    /// Who asks; `None` for what this process asks itself.
    pub caller: Option<Caller>,
    /// Until when the answer has to be there.
    pub deadline: Instant,
    /// Whether anybody waits for the answer.
    pub asker: Waiting,
    /// Whether this process has answered the connection before; else one before it may have.
    pub known: bool,
    /// The files that the messages refer to by `inode://`.
    pub fds: Fds,
    /// Where the request goes next, once an element knows.
    pub next_hop: Option<NextHop>,
    /// Which candidates there were, and what became of each: for whoever asks why.
    pub trail: Trail,
    /// What is done once the request is over, and all elements have made what they make.
    pub afterwards: Afterwards,
    /// What the connection holds.
    pub scope: &'c mut Scope,
}

/// What is begun when a request is over, whatever came of it. It is given what the connection holds then, and whether the
/// connection stands: it does not where the request was to establish it, and has failed.
#[derive(Default)]
pub struct Afterwards(Vec<Then>);

type Then = Box<dyn FnOnce(&mut Scope, bool) + Send + Sync>;

impl Afterwards {
    /// After what is to come before it.
    pub fn push(&mut self, then: impl FnOnce(&mut Scope, bool) + Send + Sync + 'static) {
        self.0.push(Box::new(then));
    }

    fn begin(self, held: &mut Held) {
        self.0.into_iter().for_each(|then| then(&mut held.scope, held.established));
    }
}

impl fmt::Debug for Afterwards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Afterwards").field(&self.0.len()).finish()
    }
}

impl Context<'_> {
    /// Until when the next of `tries` candidates may take: an equal share of what is left, so that one that is frozen
    /// leaves time for the others; at least a second, and never beyond the deadline.
    #[must_use]
    pub fn share(&self, tries: usize) -> Instant {
        share(self.deadline, Instant::now(), tries)
    }
}

fn share(deadline: Instant, now: Instant, tries: usize) -> Instant {
    let left = deadline.saturating_duration_since(now);
    let tries = u32::try_from(tries).unwrap_or(u32::MAX).max(1);
    deadline.min(now + (left / tries).max(LEAST_TRY))
}

/// Whether whoever asked still waits for the answer. What was begun here is finished or undone all the same; but nobody
/// waits for others on behalf of one who has left: he may stand in our queue already, with what he wants instead.
#[derive(Debug, Clone, Default)]
pub struct Waiting(Option<watch::Receiver<()>>);

impl Waiting {
    fn new() -> (watch::Sender<()>, Self) {
        let (stays, left) = watch::channel(());
        (stays, Self(Some(left)))
    }

    /// Whether he has left.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.as_ref().is_some_and(|left| left.has_changed().is_err())
    }

    /// Waits for what others answer, for as long as he does.
    ///
    /// # Errors
    /// Theirs, or that he has left.
    pub async fn on<T>(&self, others: impl Future<Output = Result<T>>) -> Result<T> {
        let Some(mut left) = self.0.clone() else { return others.await };
        tokio::select! {
            biased;
            answer = others => answer,
            // Nothing is ever sent: the sender is dropped.
            _ = left.changed() => Err(Error::new(tonic::Code::Cancelled, "whoever asked has left")),
        }
    }
}

/// Who calls, and the token that came with the call.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The other end of the connection.
    pub peer: Peer,
    /// What it says it may do, as it was sent: unverified.
    pub token: Option<Token>,
}

/// One call, as it arrived.
#[derive(Debug, Clone, Default)]
pub struct Call {
    /// Who calls; `None` inside this process.
    pub caller: Option<Caller>,
    /// Until when; `None`: the default.
    pub deadline: Option<Instant>,
    /// The files that came with it.
    pub fds: Fds,
}

/// What a Request is answered with.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// The connection.
    pub connection: Connection,
    /// The files that its mechanism refers to.
    pub fds: Fds,
}

/// Goes with the answer that established a connection. Dropped unsigned, it undoes the connection, unless that was
/// asked for again meanwhile: its caller has left without learning what it got, and nobody would ever close it.
#[derive(Debug)]
pub struct Receipt {
    connections: Weak<Connections>,
    id: String,
    /// Which answer it goes with.
    answers: u64,
    signed: AtomicBool,
}

impl Receipt {
    /// The answer is with its caller.
    pub fn sign(&self) {
        self.signed.store(true, Ordering::Relaxed);
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        if self.signed.load(Ordering::Relaxed) {
            return;
        }
        let (Some(connections), Ok(runtime)) =
            (self.connections.upgrade(), tokio::runtime::Handle::try_current())
        else {
            return; // the process ends
        };
        let (id, answers) = (std::mem::take(&mut self.id), self.answers);
        runtime.spawn(async move { connections.undo(&id, answers).await });
    }
}

/// Every connection of one role.
#[derive(Debug)]
pub struct Connections {
    me: String,
    chain: Chain,
    table: Mutex<HashMap<String, Arc<Entry>>>,
    forgotten: Forgotten,
    metrics: Arc<Metrics>,
    expiry: bool,
}

/// Closes under way of connections that are not in the table (any more), by id. Nobody queues behind them, and they may take
/// long: where such a connection went has to be found out. So one that is asked for again ends them, or they would come late
/// somewhere and end what was just established.
#[derive(Debug, Default)]
struct Forgotten(Mutex<HashMap<String, Vec<Ended>>>);

/// Ends a Close when it is dropped, and hears of that.
#[derive(Debug)]
struct Ended {
    end: oneshot::Sender<()>,
    over: oneshot::Receiver<()>,
}

impl Forgotten {
    /// Begins to close what may not be in the table: to be looked up after this, as a connection that comes back is in the
    /// table before it asks who closes it.
    fn begin<'a>(&'a self, id: &'a str) -> Closing<'a> {
        let ((end, back), (_over, over)) = (oneshot::channel(), oneshot::channel());
        self.0.lock().entry(id.to_owned()).or_default().push(Ended { end, over });
        Closing { among: self, id, back, _over }
    }

    /// It has come back. Returns when nobody closes it any more.
    async fn back(&self, id: &str) {
        let closes = {
            let mut closes = self.0.lock();
            if closes.is_empty() { None } else { closes.remove(id) }
        };
        for Ended { end, over } in closes.into_iter().flatten() {
            drop(end);
            let _ = over.await;
        }
    }
}

/// One of the closes of a connection.
struct Closing<'a> {
    among: &'a Forgotten,
    id: &'a str,
    back: oneshot::Receiver<()>,
    _over: oneshot::Sender<()>,
}

impl Closing<'_> {
    /// Closes, unless the connection comes back meanwhile.
    async fn unless_back(mut self, close: impl Future<Output = Result<()>>) -> Result<()> {
        tokio::select! {
            biased;
            _ = &mut self.back => Ok(()),
            closed = close => closed,
        }
    }
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.back.close();
        let mut closes = self.among.0.lock();
        let Some(others) = closes.get_mut(self.id) else { return };
        others.retain(|other| !other.end.is_closed());
        if others.is_empty() {
            closes.remove(self.id);
        }
    }
}

/// One connection: everything about it is behind one lock, which is the queue of its requests.
#[derive(Debug, Default)]
struct Entry {
    /// Whose it is; set with the first request, never changed.
    owner: OnceLock<Owner>,
    /// Not behind the queue: whoever asks shall hear of a connection whose request hangs.
    note: Mutex<Option<Note>>,
    held: AsyncMutex<Held>,
}

/// Whose a connection is: of the caller that established it, for the client and over the hops that it came from. Ids
/// stand in the path, where others see them; whoever else names one gets a connection of his own.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Owner {
    caller: SpiffeId,
    /// The subject of the client's token: the first segment's.
    client: String,
    /// Names and ids of the hops before this one.
    hops: Vec<(String, String)>,
}

impl Owner {
    /// Of a request whose path has this hop as its current segment.
    fn of(caller: &SpiffeId, conn: &Connection) -> Self {
        let before = &path::segments(conn)[..path::index(conn)];
        let client = match before {
            // The caller is the client; its token is about to be written into the path.
            [] | [_] => caller.to_string(),
            [first, ..] => token::claims(&first.token).map(|claims| claims.subject).unwrap_or_default(),
        };
        let hops = before.iter().map(|segment| (segment.name.clone(), segment.id.clone())).collect();
        Self { caller: caller.clone(), client, hops }
    }
}

/// What is remembered of a connection for those who ask, besides the connection itself.
#[derive(Debug, Clone)]
pub struct Note {
    /// When it was first answered by this process.
    pub since: SystemTime,
    /// When it was last answered.
    pub refreshed: SystemTime,
    /// How often it was answered.
    pub answers: u64,
    /// Who was chosen and why, when last somebody was.
    pub decisions: Box<[Decision]>,
}

#[derive(Debug, Default)]
struct Held {
    /// Set under the lock when the entry leaves the table: whoever waited for the lock starts afresh.
    closed: bool,
    scope: Scope,
    /// Whether a request has succeeded.
    established: bool,
    expiry: Option<AbortHandle>,
    /// Counts answers: a timer that fires while a refresh is under way is out of date, and so is a lost receipt.
    answers: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(timer) = self.expiry.take() {
            timer.abort();
        }
    }
}

impl Connections {
    /// A role that serves others: a connection ends when the first token of the hops before it expires
    /// (spec/control-plane.md 5.3, where only the last of them counts: a wire would outlive its dead client).
    pub fn serving(me: impl Into<String>, chain: Chain, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            me: me.into(),
            chain,
            table: Mutex::default(),
            forgotten: Forgotten::default(),
            metrics,
            expiry: true,
        })
    }

    /// A role that only asks: an edge client.
    pub fn asking(me: impl Into<String>, chain: Chain, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            me: me.into(),
            chain,
            table: Mutex::default(),
            forgotten: Forgotten::default(),
            metrics,
            expiry: false,
        })
    }

    /// This hop's name in the path.
    #[must_use]
    pub fn me(&self) -> &str {
        &self.me
    }

    /// The names of the chain's elements, in order.
    pub fn elements(&self) -> impl Iterator<Item = &'static str> {
        self.chain.iter().map(|e| e.name())
    }

    /// The metrics of this role.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// How many connections there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.lock().len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The ids of all connections at this hop.
    #[must_use]
    pub fn ids(&self) -> Vec<String> {
        self.table.lock().keys().cloned().collect()
    }

    /// What is remembered of a connection for those who ask; of one that was never answered, nothing but now.
    pub(crate) fn note(&self, id: &str) -> Note {
        let note = self.table.lock().get(id).and_then(|entry| entry.note.lock().clone());
        note.unwrap_or_else(|| Note {
            since: clock::now(),
            refreshed: clock::now(),
            answers: 0,
            decisions: Box::default(),
        })
    }

    /// Serves a Request: checks it, makes this hop the current segment, runs the chain, and gives the answer
    /// the asker's index and id.
    ///
    /// # Errors
    /// A malformed request, a path that lies, or what an element says; nothing that this request acquired is
    /// left then.
    pub async fn request(self: &Arc<Self>, call: Call, request: NetworkServiceRequest) -> Result<Answer> {
        let (answer, receipt) = self.answer(call, request).await?;
        if let Some(receipt) = receipt {
            receipt.sign();
        }
        Ok(answer)
    }

    /// As [`Connections::request`], for a caller that may be gone before the answer is with it: an answer that
    /// established the connection comes with a receipt.
    ///
    /// # Errors
    /// As [`Connections::request`].
    pub async fn answer(
        self: &Arc<Self>,
        call: Call,
        mut request: NetworkServiceRequest,
    ) -> Result<(Answer, Option<Receipt>)> {
        limits::check_request(&request).map_err(|e| Error::from(e).at(&self.me))?;
        let conn = request.connection.get_or_insert_default();
        let asker = path::step(conn, &self.me, new_id).map_err(|e| Error::from(e).at(&self.me))?;
        let owner = call.caller.as_ref().map(|caller| Owner::of(caller.peer.id(), conn));
        if let Some(owner) = &owner
            && self.is_of_another(&conn.id, owner)
        {
            tracing::info!(connection = %conn.id, caller = %owner.caller, "named by somebody else; a new connection begins");
            path::begin_anew(conn, new_id());
        }
        let id = conn.id.clone();
        let (mut answer, receipt) = self.run(id, owner, call, request).await.map_err(|e| e.at(&self.me))?;
        path::restore(&mut answer.connection, asker).map_err(|e| Error::from(e).at(&self.me))?;
        Ok((answer, receipt))
    }

    fn is_of_another(&self, id: &str, owner: &Owner) -> bool {
        self.table.lock().get(id).is_some_and(|entry| entry.owner.get().is_some_and(|is| is != owner))
    }

    async fn run(
        self: &Arc<Self>,
        id: String,
        owner: Option<Owner>,
        call: Call,
        request: NetworkServiceRequest,
    ) -> Result<(Answer, Option<Receipt>)> {
        let this = Arc::clone(self);
        let deadline = call.deadline.unwrap_or_else(|| Instant::now() + DEFAULT_DEADLINE);
        // Upstream's name of a request's span, and its attributes (spec/kubernetes.md 7.3).
        let span = match nsm_transport::is_traced() {
            true => tracing::info_span!(
                "request", hop = %self.me, connection = %id, id = %id, r#type = "networkService",
                otel.status_code = tracing::field::Empty,
                otel.name = %format_args!("[id: {id}] [type: networkService] [method: Request]"),
            ),
            false => tracing::info_span!("request", hop = %self.me, connection = %id),
        };
        let (give, answer) = oneshot::channel();
        // Dropped with the caller's future.
        let (_stays, waiting) = Waiting::new();
        tokio::spawn(
            async move {
                loop {
                    let entry = Arc::clone(this.table.lock().entry(id.clone()).or_default());
                    if let Some(owner) = &owner
                        && entry.owner.get_or_init(|| owner.clone()) != owner
                    {
                        let _ = give.send(Err(Error::new(
                            tonic::Code::Aborted,
                            "two callers began a connection of the same id at once; try again",
                        )));
                        return;
                    }
                    this.forgotten.back(&id).await;
                    let mut held = entry.held.lock().await;
                    if held.closed {
                        continue;
                    }
                    if give.is_closed() || Instant::now() >= deadline {
                        // It waited behind others for so long that nobody waits for it any more.
                        if !held.established {
                            this.forget(&id, &entry, &mut held);
                        }
                        let late =
                            Error::new(tonic::Code::DeadlineExceeded, "earlier requests took too long");
                        let _ = give.send(Err(late));
                        return;
                    }
                    // What the process before us has established stands whether this caller hears of it or not; what is
                    // asked for with another endpoint has ended what stood.
                    let conn = request.connection.as_ref();
                    let reselects = conn.is_some_and(|conn| conn.state() == State::ReselectRequested);
                    let fresh = reselects || !held.established && !conn.is_some_and(path::goes_on);
                    let result =
                        this.run_held(&id, &entry, &mut held, (call, waiting), deadline, request).await;
                    let answers = held.answers;
                    drop(held);
                    let result = result.map(|answer| {
                        let connections = Arc::downgrade(&this);
                        let receipt = || Receipt { connections, id, answers, signed: AtomicBool::new(false) };
                        (answer, fresh.then(receipt))
                    });
                    // Whoever has left does not take the receipt, and it comes back unsigned.
                    let _ = give.send(result);
                    return;
                }
            }
            .instrument(span),
        );
        // The runner contains the chain's panics itself; a lost answer is the runtime's end.
        answer.await.unwrap_or_else(|_| Err(Error::new(tonic::Code::Cancelled, "the process ends")))
    }

    async fn run_held(
        self: &Arc<Self>,
        id: &str,
        entry: &Arc<Entry>,
        held: &mut Held,
        (call, asker): (Call, Waiting),
        deadline: Instant,
        request: NetworkServiceRequest,
    ) -> Result<Answer> {
        let mut request = request;
        let mut mark = held.scope.mark();
        let asked = self.asked(&call, request.connection.as_ref());
        let known = held.established;
        let mut cx = Context { asker, known, ..self.context(call, deadline, &mut held.scope) };
        let begin = Instant::now();
        // Not cut off at the deadline: an element in the middle of making something must come to its lease.
        // What waits for others (dialling, look-ups, descriptors) is bounded by the deadline itself, and by the caller's stay.
        let mut lives = None;
        let run = AssertUnwindSafe(async {
            let conn = request.connection.get_or_insert_default();
            for element in self.chain.iter() {
                element.admit(&mut cx, conn).await?;
            }
            // As they were checked and made a moment ago: by when there is an answer the clock may have been set.
            let own = path::current(conn).and_then(|own| own.expires.as_ref()).map(path::from_timestamp);
            let before = path::expiry_before_us(conn);
            let first = before.map(|before| own.map_or(before, |own| own.min(before)));
            lives = first.map(|at| Instant::now() + at.duration_since(clock::now()).unwrap_or_default());
            if conn.state() == State::ReselectRequested && held.established {
                let anew = Some(Mutex::default());
                let release = Release { reason: Reason::Reselect, deadline, close: Some(conn.clone()), anew };
                cx.scope.unwind(&release).await;
                cx.afterwards = release.anew.map(Mutex::into_inner).unwrap_or_default();
                held.established = false;
                mark = cx.scope.mark();
            }
            Next { rest: &self.chain, metrics: &self.metrics }.request(&mut cx, request).await
        });
        let result = run.catch_unwind().await;
        let (fds, trail, afterwards) = (cx.fds, cx.trail, cx.afterwards);
        let result = result.unwrap_or_else(|_| {
            self.metrics.panicked();
            Err(Error::internal("a panic was contained; the request was undone")
                .hint("this is a bug: please report it with the log of this process"))
        });
        self.metrics.request(begin.elapsed(), result.is_ok());
        match result {
            Ok(mut answer) => {
                answer.set_state(State::Up);
                note_answer(&mut entry.note.lock(), &trail);
                self.metrics.inspector().answered(&answer);
                held.established = true;
                self.arm(id, entry, held, &answer, lives);
                afterwards.begin(held);
                Ok(Answer { connection: answer, fds })
            }
            Err(error) => {
                tracing::Span::current().record("otel.status_code", "ERROR");
                self.metrics.inspector().failures().note(asked, &error, &trail, clock::now());
                if !planted::is("a failed request keeps what it took") {
                    held.scope.unwind_to(mark, &Release::now(Reason::Failed)).await;
                }
                afterwards.begin(held);
                if !held.established {
                    self.forget(id, entry, held);
                }
                Err(error)
            }
        }
    }

    fn asked(&self, call: &Call, conn: Option<&Connection>) -> Asked {
        let first = conn.and_then(|conn| path::segments(conn).first());
        Asked {
            hop: self.me.clone(),
            client: first.map(|first| first.name.clone()).unwrap_or_default(),
            connection: first.map(|first| first.id.clone()).unwrap_or_default(),
            service: conn.map(|conn| conn.network_service.clone()).unwrap_or_default(),
            caller: call.caller.as_ref().map(|caller| caller.peer.id().to_string()).unwrap_or_default(),
        }
    }

    /// Serves a Close: makes this hop current and releases what the connection holds. The answer does not
    /// depend on whether it was known: whoever closes wants it gone.
    ///
    /// # Errors
    /// A path that lies, or what could not be released; this hop has forgotten the connection all the same.
    pub async fn close(self: &Arc<Self>, call: Call, mut conn: Connection) -> Result<()> {
        limits::check_connection(&conn).map_err(|e| Error::from(e).at(&self.me))?;
        let Asker(_) = path::step(&mut conn, &self.me, new_id).map_err(|e| Error::from(e).at(&self.me))?;
        let this = Arc::clone(self);
        let task = tokio::spawn(async move {
            let deadline = call.deadline.unwrap_or_else(|| Instant::now() + Release::TIME);
            let run = AssertUnwindSafe(this.close_admitted(call, deadline, conn)).catch_unwind();
            run.await.unwrap_or_else(|_| {
                this.metrics.panicked();
                Err(Error::internal("a panic was contained"))
            })
        });
        let result =
            task.await.unwrap_or_else(|_| Err(Error::new(tonic::Code::Cancelled, "the process ends")));
        result.map_err(|e| e.at(&self.me))
    }

    async fn close_admitted(&self, call: Call, deadline: Instant, mut conn: Connection) -> Result<()> {
        let owner = call.caller.as_ref().map(|caller| Owner::of(caller.peer.id(), &conn));
        if owner.as_ref().is_some_and(|owner| self.is_of_another(&conn.id, owner)) {
            // To this caller the id names nothing; what it names is not his to close, here or further on.
            return Ok(());
        }
        if let Some(id) = owner.and_then(|owner| self.unanswered(&conn.id, &owner)) {
            if let Some(own) = path::current_mut(&mut conn) {
                own.id.clone_from(&id);
            }
            conn.id = id;
        }
        let id = conn.id.clone();
        let closing = self.forgotten.begin(&id);
        let entry = self.table.lock().get(&id).cloned();
        if let Some(entry) = entry {
            drop(closing);
            let mut held = entry.held.lock().await;
            if held.closed {
                // By whoever was before us in the queue; what has begun since is another one.
                return Ok(());
            }
            let mut cx = self.context(call, deadline, &mut held.scope);
            for element in self.chain.iter() {
                element.admit(&mut cx, &mut conn).await?;
            }
            let reason = match conn.state() {
                State::ReselectRequested => Reason::Reselect,
                _ => Reason::Closed,
            };
            let release = Release { reason, deadline, close: Some(conn), anew: None };
            let errors = self.release_all(&id, &entry, &mut held, &release).await;
            return errors.into_iter().next().map_or(Ok(()), Err);
        }
        let mut nothing = Scope::default();
        let close = async {
            let mut cx = self.context(call, deadline, &mut nothing);
            for element in self.chain.iter() {
                element.admit(&mut cx, &mut conn).await?;
            }
            Next { rest: &self.chain, metrics: &self.metrics }.close_forgotten(&mut cx, conn).await
        };
        closing.unless_back(close).await
    }

    /// Who closes without ever having heard our id has left before the answer came, and means what he asked for: that
    /// is known by the hops before us.
    fn unanswered(&self, id: &str, owner: &Owner) -> Option<String> {
        let table = self.table.lock();
        if table.contains_key(id) {
            return None;
        }
        let his = |entry: &Entry| entry.owner.get().is_some_and(|is| is == owner);
        table.iter().find(|(_, entry)| his(entry)).map(|(id, _)| id.clone())
    }

    fn context<'c>(&'c self, call: Call, deadline: Instant, scope: &'c mut Scope) -> Context<'c> {
        Context {
            me: &self.me,
            caller: call.caller,
            deadline,
            asker: Waiting::default(),
            known: false,
            fds: call.fds,
            next_hop: None,
            trail: Trail::default(),
            afterwards: Afterwards::default(),
            scope,
        }
    }

    /// Ends a connection from the inside: expiry, a namespace that is gone, shutdown.
    pub async fn drop_connection(self: &Arc<Self>, id: &str, reason: Reason) -> Vec<Error> {
        self.drop_connection_unless(id, reason, || false).await
    }

    /// The same, unless it has been made anew since the reason was found: that is asked when no request of it is under way.
    pub async fn drop_connection_unless(
        self: &Arc<Self>,
        id: &str,
        reason: Reason,
        is_anew: impl FnOnce() -> bool + Send,
    ) -> Vec<Error> {
        let Some(entry) = self.table.lock().get(id).cloned() else { return Vec::new() };
        let mut held = entry.held.lock().await;
        if held.closed || is_anew() {
            return Vec::new();
        }
        self.release_all(id, &entry, &mut held, &Release::now(reason)).await
    }

    /// Does something about a connection while no request of it is under way; `None`: it has ended.
    pub async fn between_requests<T>(&self, id: &str, work: impl Future<Output = T> + Send) -> Option<T> {
        let entry = self.table.lock().get(id).cloned()?;
        let held = entry.held.lock().await;
        if held.closed { None } else { Some(work.await) }
    }

    /// Does something where there is no connection with this id, before one can begin.
    pub fn unless_known(&self, id: &str, then: impl FnOnce()) {
        let table = self.table.lock();
        if !table.contains_key(id) {
            then();
        }
    }

    /// Undoes a connection whose caller does not know of it; a later answer proves that it does.
    async fn undo(&self, id: &str, answers: u64) {
        let Some(entry) = self.table.lock().get(id).cloned() else { return };
        let mut held = entry.held.lock().await;
        if held.closed || held.answers != answers || planted::is("nobody undoes what its caller has left") {
            return;
        }
        tracing::info!(hop = %self.me, connection = %id, "the caller left mid-request; undone");
        held.scope.unwind(&Release::now(Reason::Failed)).await;
        self.forget(id, &entry, &mut held);
    }

    async fn release_all(
        &self,
        id: &str,
        entry: &Arc<Entry>,
        held: &mut Held,
        release: &Release,
    ) -> Vec<Error> {
        tracing::debug!(hop = %self.me, connection = id, reason = ?release.reason, "connection ends");
        let errors = held.scope.unwind(release).await;
        self.forget(id, entry, held);
        self.metrics.ended(release.reason);
        errors
    }

    fn forget(&self, id: &str, entry: &Arc<Entry>, held: &mut Held) {
        held.closed = true;
        held.established = false;
        self.metrics.inspector().ended(id);
        if let Some(timer) = held.expiry.take() {
            timer.abort();
        }
        let mut table = self.table.lock();
        if table.get(id).is_some_and(|there| Arc::ptr_eq(there, entry)) {
            table.remove(id);
        }
    }

    /// Starts the clock of the connection anew.
    ///
    /// `lives`: until when, by the tokens of the hops before us and our own; without one before us it has no end. A clock
    /// that was set back while they were on their way makes those live for hours; who keeps the connection refreshes it before
    /// any token of its path expires, ours included.
    fn arm(
        self: &Arc<Self>,
        id: &str,
        entry: &Arc<Entry>,
        held: &mut Held,
        answer: &Connection,
        lives: Option<Instant>,
    ) {
        held.answers += 1;
        if !self.expiry || planted::is("nothing expires") {
            return;
        }
        if let Some(timer) = held.expiry.take() {
            timer.abort();
        }
        let Some(lives) = lives else { return };
        let expires = path::expiry_before_us(answer).unwrap_or_else(clock::now);
        let (this, id, entry, answers) =
            (Arc::downgrade(self), id.to_owned(), Arc::downgrade(entry), held.answers);
        let timer = tokio::spawn(async move {
            if planted::is("garbage is collected by the wall clock") {
                while clock::now() < expires {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            } else {
                tokio::time::sleep_until(lives).await;
            }
            // A task of its own: ending the connection aborts this timer.
            tokio::spawn(async move {
                let (Some(this), Some(entry)) = (this.upgrade(), entry.upgrade()) else { return };
                let mut held = entry.held.lock().await;
                if !held.closed && held.answers == answers {
                    this.release_all(&id, &entry, &mut held, &Release::now(Reason::Expired)).await;
                }
            });
        });
        held.expiry = Some(timer.abort_handle());
    }
}

/// A refresh that decided nothing keeps what was decided before.
fn note_answer(note: &mut Option<Note>, trail: &Trail) {
    let now = clock::now();
    let before = note.take();
    let decisions = match &before {
        Some(before) if trail.is_empty() => before.decisions.clone(),
        _ => trail.kept(),
    };
    *note = Some(Note {
        since: before.as_ref().map_or(now, |before| before.since),
        refreshed: now,
        answers: before.map_or(0, |before| before.answers) + 1,
        decisions,
    });
}

/// A fresh connection id.
#[must_use]
pub fn new_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_share_what_is_left_of_the_deadline() {
        let now = Instant::now();
        let after = |secs| now + Duration::from_secs(secs);
        assert_eq!(share(after(15), now, 3), after(5));
        assert_eq!(share(after(15), now, 1), after(15), "the last one gets the rest");
        assert_eq!(share(after(15), now, 1000), after(1), "a moment is no try");
        assert_eq!(share(now, after(3), 2), now, "never beyond the deadline");
        assert_eq!(share(after(15), now, 0), after(15));
    }

    fn seen_by(hop: &str, caller: &str, before: &[(&str, &str)]) -> Owner {
        let mut conn = Connection { id: before[0].1.into(), ..Connection::default() };
        let mut ids = before.iter().map(|(_, id)| (*id).to_owned()).skip(1).chain(["own".to_owned()]);
        for name in before.iter().map(|(name, _)| *name).chain([hop]) {
            path::step(&mut conn, name, || ids.next().unwrap()).unwrap();
        }
        Owner::of(&caller.parse().unwrap(), &conn)
    }

    #[test]
    fn a_connection_is_its_callers_its_clients_and_its_hops() {
        let client = &[("nsc", "nsc-0")];
        let established = seen_by("mgr", "spiffe://t/a", client);
        assert_eq!(established, seen_by("mgr", "spiffe://t/a", client), "a refresh");
        assert_ne!(
            established,
            seen_by("mgr", "spiffe://t/b", client),
            "another workload that copies the path"
        );
        assert_ne!(
            established,
            seen_by("mgr", "spiffe://t/a", &[("nsc", "nsc-1")]),
            "another connection of the client"
        );
        let behind = &[("nsc", "nsc-0"), ("mgr", "u1")];
        let established = seen_by("fwd", "spiffe://t/mgr", behind);
        assert_eq!(established, seen_by("fwd", "spiffe://t/mgr", behind));
        assert_ne!(
            established,
            seen_by("fwd", "spiffe://t/mgr", &[("evil", "x"), ("mgr", "u9")]),
            "through the same manager"
        );
        assert_ne!(established, seen_by("fwd", "spiffe://t/evil", behind), "past the manager");
    }
}
