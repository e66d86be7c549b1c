//! The last element of a chain that goes on elsewhere: hands the request to the next hop, remembers how to
//! close there, and follows what the next hop tells of its connections.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use futures::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use nsm_api::{
    limits,
    mechanism::{InodeUrl, key},
    path,
    pb::{
        connection::{
            Connection, ConnectionEvent, MonitorScopeSelector, PathSegment, State,
            monitor_connection_client::MonitorConnectionClient,
        },
        networkservice::{NetworkServiceRequest, network_service_client::NetworkServiceClient},
    },
    planted,
};
use nsm_identity::clock;
use nsm_identity::policy::Check;
use nsm_transport::{Connection as Channel, FileId, Peer, Pool};
use parking_lot::Mutex;
use tokio::{sync::oneshot, task::JoinHandle, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, metadata::MetadataValue};

use crate::{
    auth::{self, OwnNamespace},
    chain::{Caller, Context, Element, Next},
    error::{Error, Result},
    fds::{self, Fds},
    hop::{NextHop, Place, Way},
    inside::Inside,
    monitor::{self, Hub, UNASKED, Viewer},
    refresh,
    scope::{Lease, Reason, Release, Scope},
    signers,
};

/// How long before its own deadline a hop stops waiting, at most: time for an answer to come back on a busy machine.
const LONGEST_MARGIN: std::time::Duration = std::time::Duration::from_millis(300);

/// How long connecting for events may take: the neighbour has just been reached, and nobody waits for this.
const FOLLOWING: std::time::Duration = std::time::Duration::from_secs(15);

/// Connections of a lost neighbour that are told to be down at once, and the pause until others are: as many as a node
/// makes wires meanwhile.
const AT_ONCE: usize = 16;
const PAUSE: std::time::Duration = std::time::Duration::from_millis(16);

/// Hands requests to the next hop that an element above has set.
#[derive(Debug)]
pub struct Dial {
    pool: Pool,
    follower: Arc<Follower>,
    parting: Parting,
    silent: Silent,
    dial_timeout: std::time::Duration,
    check_answers: bool,
    own_namespace: Option<OwnNamespace>,
}

impl Dial {
    /// Over this pool, for the hop called `me`, telling `hub` what the next hops tell.
    #[must_use]
    pub fn new(pool: Pool, me: &str, hub: Arc<Hub>, dial_timeout: std::time::Duration) -> Self {
        let follower = Arc::new(Follower {
            me: me.into(),
            hub,
            pool: pool.clone(),
            streams: Mutex::default(),
            opened: AtomicU64::default(),
        });
        let silent = Silent::default();
        let parting = Parting { left: Arc::default(), silent: silent.clone() };
        Self { pool, follower, parting, silent, dial_timeout, check_answers: false, own_namespace: None }
    }

    /// Which neighbours do not answer: to be asked after those that do.
    #[must_use]
    pub fn silent(&self) -> Silent {
        self.silent.clone()
    }

    /// Tells hops that a connection has left them, where this process does not remember that it was there.
    #[must_use]
    pub fn farewells(&self) -> Farewells {
        let (pool, dial_timeout) = (self.pool.clone(), self.dial_timeout);
        Farewells { pool, dial_timeout, parting: self.parting.clone() }
    }

    /// Also checks the tokens of every answer, as edge clients do.
    #[must_use]
    pub fn checking_answers(mut self) -> Self {
        self.check_answers = true;
        self
    }

    /// Accepts a namespace in an answer only if it is the answering process's own.
    #[must_use]
    pub fn guarding_namespaces(mut self, guard: OwnNamespace) -> Self {
        self.own_namespace = Some(guard);
        self
    }

    /// Says what is told to a hop that a connection leaves, but for the connection.
    fn farewell(&self, target: &NextHop) -> Farewell {
        Farewell {
            pool: self.pool.clone(),
            target: target.clone(),
            conn: Connection::default(),
            theirs: None,
            dial_timeout: self.dial_timeout,
        }
    }

    async fn reach(&self, target: &NextHop, deadline: Instant) -> Result<Reached> {
        reach(&self.pool, target, self.dial_timeout, deadline)
            .await
            .map_err(|e| Error::unavailable(format!("the next hop {target} cannot be reached: {e}")))
    }

    async fn call(
        &self,
        cx: &mut Context<'_>,
        target: &NextHop,
        mut request: NetworkServiceRequest,
    ) -> Result<(Connection, StreamId)> {
        let (began, asker) = (Instant::now(), cx.asker.clone());
        let is_slow = || began.elapsed() > FAREWELL;
        let reached = asker.on(self.reach(target, cx.deadline)).await;
        let hop = reached.inspect_err(|_| {
            if is_slow() {
                self.silent.note(target);
            }
        })?;
        let conn = request.connection.get_or_insert_default();
        let left = self.parting.over(target, &conn.id, cx.deadline).await;
        let before = cx.scope.get::<Dialed>().map(|before| &before.farewell);
        let before = before.filter(|before| before.target.is_at(target)).map(|before| &before.conn);
        // Whoever asks may have left before our last answer, and not know what the connection is called there.
        if let Some(known) = before.or(left.as_ref()) {
            path::go_on_as(conn, known);
        }
        let stands = before.is_some() || left.is_none() && target.may_know(conn);
        let asked = conn.clone();
        // Before the call: what happens to the connection right after the answer must not be missed.
        let stream = self.follower.follow(target, &asked.id);
        let result = asker.on(Box::pin(self.exchange(cx, target, &hop, &asked, request))).await;
        match &result {
            Err(error) if error.hop.is_none() && error.code == Code::DeadlineExceeded => {
                self.silent.note(target)
            }
            Err(_) if asker.is_over() => {
                if is_slow() {
                    self.silent.note(target);
                }
            }
            _ => self.silent.answered(target),
        }
        // Whoever answered may have made something, also when the answer was lost or is of no use: it undoes that when
        // it is told to close. What stood there before this request is not ours to decide about, whether we remember that or
        // the path does: who has been restarted asks for wires through which packets pass.
        let made =
            |e: &Error| e.hop.is_none() || e.code == Code::DeadlineExceeded || e.code == Code::Cancelled;
        if !stands && result.is_err() {
            self.follower.leave(target, &asked.id);
        }
        if !stands && result.as_ref().is_err_and(|e| made(e) || e.code == Code::Unavailable) {
            let mut farewell = Farewell { conn: asked, theirs: None, ..self.farewell(target) };
            // It ends, whatever it was asked for.
            farewell.conn.set_state(State::Up);
            let until = Instant::now() + Release::TIME;
            if asker.is_over() {
                // He closes next, perhaps, and ends then, and with him whatever goes on by itself.
                let _ = self.parting.see_off(farewell, until).await;
            } else {
                let close = farewell.clone();
                self.parting.begin(farewell, async move { hop.close(close.conn, None, until).await });
            }
        }
        result.map(|answer| (answer, stream))
    }

    /// One call, and everything about its answer that is checked before it is believed.
    async fn exchange(
        &self,
        cx: &mut Context<'_>,
        target: &NextHop,
        hop: &Reached,
        asked: &Connection,
        request: NetworkServiceRequest,
    ) -> Result<Connection> {
        tracing::debug!(next = %target, connection = asked.id, "asking the next hop");
        let mut answer = hop.request(cx, target, request).await?;
        let useless =
            |e: String| Error::new(Code::Unknown, format!("the answer of {target} is of no use: {e}"));
        limits::check_connection(&answer).map_err(|e| useless(e.to_string()))?;
        path::graft(&mut answer, asked).map_err(|e| useless(e.to_string()))?;
        let peer = hop.peer();
        let refuse = self.check_answers && self.pool.policies().makes(Check::HopsSigned);
        signers::learn(&mut answer, peer.identity(), refuse, clock::now())
            .map_err(|denial| Error::denied(format!("the answer of {} is refused: {denial}", peer.id())))?;
        signers::answered_by(peer, &answer);
        if self.check_answers {
            auth::check_answer(&answer, self.pool.policies(), peer, clock::now())?;
        }
        self.receive(cx, peer, &answer).await?;
        if let Some(Caller { peer: caller, .. }) = &cx.caller {
            auth::sign_for_caller(&mut answer, caller, peer)?;
        }
        Ok(answer)
    }
}

impl Dial {
    /// Fetches the file that an answer refers to, if we did not send it ourselves.
    async fn receive(&self, cx: &mut Context<'_>, peer: &Peer, answer: &Connection) -> Result<()> {
        let named = answer.mechanism.as_ref().and_then(|m| m.inode().ok().flatten());
        let unknown =
            answer.mechanism.as_ref().filter(|_| named.is_some_and(|url| cx.fds.get(url).is_none()));
        let mut received = Fds::default();
        received.receive(peer, unknown, cx.deadline).await?;
        if let Some(guard) = &self.own_namespace {
            // What is named counts, not what came: an answer may name a namespace that we hold for somebody else.
            guard.check(peer, named)?;
        }
        cx.fds.extend(received);
        Ok(())
    }
}

#[async_trait]
impl Element for Dial {
    fn name(&self) -> &'static str {
        "dial"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        request: NetworkServiceRequest,
        _: Next<'_>,
    ) -> Result<Connection> {
        let target = cx.next_hop.clone().ok_or_else(|| Error::internal("no element chose a next hop"))?;
        let sent: Vec<_> = fds::mechanisms(&request).filter_map(|m| m.inode().ok().flatten()).collect();
        let (answer, stream) = self.call(cx, &target, request).await?;
        let theirs = inode(&answer).filter(|url| !sent.contains(url));
        if cx.scope.get::<Dialed>().is_some_and(|old| !old.farewell.target.is_at(&target))
            && let Some(old) = cx.scope.take::<Dialed>()
        {
            // The connection has moved to another hop; the old one may be dead, and nobody waits for it. What it still tells
            // is not about this connection any more. But it carries its packets until the elements above have made the way
            // to the new one.
            self.follower.leave(&old.farewell.target, &old.farewell.conn.id);
            cx.afterwards.push(move |scope, stands| match dialed(scope) {
                Some(hop) if hop.is_at(&old.farewell.target) => {}
                // An element above could not go on from there: what stood before does.
                None if stands => {
                    old.follower.stay(&old.farewell.target, &old.farewell.conn.id, old.stream);
                    scope.lease(*old);
                }
                _ => old.parting.close(old.farewell),
            });
        }
        let farewell = Farewell { conn: answer.clone(), theirs, ..self.farewell(&target) };
        match cx.scope.get_mut::<Dialed>() {
            Some(dialed) => {
                if dialed.farewell.target != target {
                    self.follower.leave(&dialed.farewell.target, &farewell.conn.id);
                }
                (dialed.farewell, dialed.stream) = (farewell, stream);
            }
            None => {
                let (follower, parting) = (Arc::clone(&self.follower), self.parting.clone());
                cx.scope.lease(Dialed { follower, parting, farewell, stream });
            }
        }
        Ok(answer)
    }

    async fn close_forgotten(&self, cx: &mut Context<'_>, conn: Connection, _: Next<'_>) -> Result<()> {
        // Nobody above found out where it went: what is there ends with its token.
        let Some(target) = cx.next_hop.clone() else { return Ok(()) };
        let farewell = Farewell { theirs: inode(&conn), conn, ..self.farewell(&target) };
        self.parting.see_off(farewell, cx.deadline).await
    }
}

/// A next hop that can be asked now.
enum Reached {
    /// Over this channel.
    Channel(Channel),
    /// In this process, as this peer.
    Inside(Arc<Inside>, Peer),
}

async fn reach(
    pool: &Pool,
    target: &NextHop,
    dial_timeout: std::time::Duration,
    deadline: Instant,
) -> std::result::Result<Reached, nsm_transport::DialError> {
    match target.way() {
        Way::Inside(hop) => Ok(Reached::Inside(Arc::clone(hop), hop.peer())),
        Way::Dial(target) => {
            let left = deadline.saturating_duration_since(Instant::now());
            pool.get(target.clone(), dial_timeout.min(left)).await.map(Reached::Channel)
        }
    }
}

impl Reached {
    fn peer(&self) -> &Peer {
        match self {
            Self::Channel(channel) => channel.peer(),
            Self::Inside(_, peer) => peer,
        }
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        target: &NextHop,
        mut request: NetworkServiceRequest,
    ) -> Result<Connection> {
        // Who waits for us shall hear from us which hop was silent. So we stop waiting before our time is over, and
        // the next hop is told a time that makes it stop before us.
        let left = cx.deadline.saturating_duration_since(Instant::now());
        let margin = (left / 10).min(LONGEST_MARGIN);
        let channel = match self {
            Self::Channel(channel) => channel,
            Self::Inside(hop, peer) => {
                let deadline = cx.deadline.checked_sub(margin / 2).unwrap_or(cx.deadline);
                let answer = hop.request(peer, cx.fds.clone(), deadline, request).await?;
                cx.fds.extend(answer.fds);
                return Ok(answer.connection);
            }
        };
        for mechanism in fds::mechanisms(&request) {
            cx.fds.send(channel.peer(), mechanism);
        }
        if let Some(conn) = &mut request.connection {
            signers::to_next(conn, channel.peer());
        }
        let mut call = tonic::Request::new(request);
        call.set_timeout(left.saturating_sub(margin / 2));
        let until = cx.deadline.checked_sub(margin).unwrap_or(cx.deadline);
        match tokio::time::timeout_at(until, NetworkServiceClient::new(channel.clone()).request(call)).await {
            Ok(answer) => {
                // Whatever it complains of: it may have forgotten what it was told.
                let answer = answer.inspect_err(|_| channel.peer().told().clear());
                Ok(answer?.into_inner())
            }
            Err(_) => Err(Error::new(
                Code::DeadlineExceeded,
                format!("{target} ({}) did not answer in time", channel.peer().id()),
            )),
        }
    }

    /// Closes there; `theirs` is the file that the connection names and that did not come from us.
    async fn close(self, mut conn: Connection, theirs: Option<InodeUrl>, deadline: Instant) -> Result<()> {
        let channel = match self {
            Self::Channel(channel) => channel,
            Self::Inside(hop, peer) => return hop.close(&peer, deadline, conn).await,
        };
        if let Some(named) = theirs {
            accompany(&mut conn, named, &channel);
        }
        signers::to_next(&mut conn, channel.peer());
        let mut call = tonic::Request::new(conn);
        call.set_timeout(deadline.saturating_duration_since(Instant::now()));
        match tokio::time::timeout_at(deadline, NetworkServiceClient::new(channel).close(call)).await {
            Ok(answer) => answer.map(drop).map_err(Error::from),
            Err(_) => Err(Error::new(Code::DeadlineExceeded, "the next hop did not close in time")),
        }
    }
}

type Events = BoxStream<'static, Result<Arc<ConnectionEvent>, tonic::Status>>;

/// The next hop that has state for a connection, by what the connection holds.
#[must_use]
pub fn dialed(scope: &Scope) -> Option<&NextHop> {
    scope.get::<Dialed>().map(|dialed| &dialed.farewell.target)
}

/// The next hop has state for this connection.
#[derive(Debug)]
struct Dialed {
    follower: Arc<Follower>,
    parting: Parting,
    farewell: Farewell,
    /// The events that were followed when it answered: as long as they go on, it remembers.
    stream: StreamId,
}

#[async_trait]
impl Lease for Dialed {
    fn name(&self) -> &'static str {
        "dial"
    }

    async fn release(mut self: Box<Self>, cx: &Release) -> Result<()> {
        let remembers = self.follower.follows(&self.farewell.target, self.stream);
        self.follower.leave(&self.farewell.target, &self.farewell.conn.id);
        if cx.reason == Reason::Expired || planted::is("a close is not handed on") {
            // Each hop has its own clock, and an expired path is refused anyway (section 18, defect 8).
            return Ok(());
        }
        if let Some(fresh) = &cx.close {
            freshen(&mut self.farewell.conn, fresh);
        }
        if cx.reason == Reason::Reselect {
            self.farewell.conn.set_state(State::ReselectRequested);
        }
        if let (Some(anew), true) = (&cx.anew, remembers) {
            let (parting, farewell) = (self.parting, self.farewell);
            let left = parting.hold_back(farewell);
            anew.lock().push(move |_, _| parting.tell_held_back(left));
            return Ok(());
        }
        self.parting.see_off(self.farewell, cx.deadline).await
    }
}

/// What a hop has to be told that a connection leaves.
#[derive(Debug, Clone)]
struct Farewell {
    pool: Pool,
    target: NextHop,
    /// As the next hop answered: own index and id.
    conn: Connection,
    /// The file that it names and that did not come from us.
    theirs: Option<InodeUrl>,
    dial_timeout: std::time::Duration,
}

impl Farewell {
    /// Tells it.
    async fn say(self, deadline: Instant) -> Result<()> {
        let Self { pool, target, conn, theirs, dial_timeout } = self;
        let target = target.now();
        let hop = reach(&pool, &target, dial_timeout, deadline)
            .await
            .map_err(|e| Error::unavailable(format!("{target} cannot be told to close: {e}")))?;
        hop.close(conn, theirs, deadline).await
    }

    /// How long it makes sense: then its tokens are over, and so is what it would end.
    fn lasts(&self) -> std::time::Duration {
        let until_us = path::segments(&self.conn).iter().take(path::index(&self.conn) + 1);
        let expires = until_us.filter_map(|segment| segment.expires.as_ref()).map(path::from_timestamp).min();
        let left = expires.and_then(|at| at.duration_since(clock::now()).ok());
        left.unwrap_or_default().min(LONGEST_FAREWELL)
    }
}

/// The file that a connection's mechanism names.
fn inode(conn: &Connection) -> Option<InodeUrl> {
    conn.mechanism.as_ref()?.inode().ok()?
}

/// Sends the descriptor of the file that a Close names, if it is what the next hop named itself: its own namespace. An
/// upstream endpoint waits for it, until the deadline, before it gives anything back, and no descriptor is kept here.
/// What we cannot send is not named.
fn accompany(conn: &mut Connection, named: InodeUrl, channel: &Channel) {
    let own = channel.peer().unix().and_then(|unix| unix.netns().ok());
    let own = own.filter(|fd| FileId::of(fd).is_ok_and(|id| (id.dev, id.ino) == (named.dev, named.ino)));
    match (own, &mut conn.mechanism) {
        (Some(fd), _) => drop(channel.send_fd(fd)),
        (None, Some(mechanism)) => drop(mechanism.parameters.remove(key::INODE_URL)),
        (None, None) => {}
    }
}

/// Takes the segments up to the own one from a Close message: their tokens are newer than the remembered.
fn freshen(conn: &mut Connection, fresh: &Connection) {
    let own = path::index(conn);
    let (Some(path), new) = (&mut conn.path, path::segments(fresh)) else { return };
    for (old, new) in path.path_segments.iter_mut().zip(new).take(own + 1) {
        if (&old.name, &old.id) == (&new.name, &new.id) {
            old.clone_from(new);
        }
    }
}

/// Tells hops that a connection has left them.
#[derive(Debug, Clone)]
pub struct Farewells {
    pool: Pool,
    dial_timeout: std::time::Duration,
    parting: Parting,
}

impl Farewells {
    /// Whether nobody is left at present.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.parting.left.lock().is_empty()
    }

    /// Since when the connection of this id (ours) has left this hop, or the endpoint behind it that it is called by, if that
    /// is still to hear of it.
    #[must_use]
    pub fn left_since(&self, hop: &NextHop, id: &str) -> Option<Instant> {
        let left = self.parting.left.lock();
        let ((place, _), (since, _)) = left.get_key_value(&left_by(hop, id))?;
        place.0.may_be(hop).then_some(*since)
    }

    /// Closes there what the path names behind us; nobody waits for it.
    pub fn say(&self, hop: NextHop, conn: Connection) {
        let (pool, dial_timeout) = (self.pool.clone(), self.dial_timeout);
        let theirs = inode(&conn);
        self.parting.close(Farewell { pool, target: hop, conn, theirs, dial_timeout });
    }
}

/// Closes at hops that a connection has left, for which nobody waits, until it is asked for there again: a Close that
/// comes late would end what was just established. A hop that cannot be told is told later, or it would keep what it holds
/// for the connection, its address first of all, for as long as its tokens live: nobody else would get that.
#[derive(Debug, Clone)]
struct Parting {
    left: Arc<Mutex<HashMap<Left, (Instant, Leaving)>>>,
    silent: Silent,
}

/// A hop, and our id of the connection that has left it.
type Left = (Place, String);

fn left_by(hop: &NextHop, id: &str) -> Left {
    (Place(hop.clone()), id.to_owned())
}

/// How far a Close has come.
#[derive(Debug)]
enum Leaving {
    /// The connection is being asked for with another endpoint. A hop that remembers it needs no Close before such a Request,
    /// which ends what was; one to which the Request does not go is told afterwards.
    HeldBack(Farewell),
    /// Under way, or between two tries.
    Told {
        /// What ends.
        conn: Connection,
        task: JoinHandle<()>,
        /// Dropped: no other try begins.
        goes_on: oneshot::Sender<()>,
    },
}

/// How long a Close may hold up the next Request of its connection: a hop that lives has closed by then, and the Close is
/// taken back from one that does not answer.
const LONGEST_PARTING: std::time::Duration = std::time::Duration::from_secs(1);

/// How long a Close is waited for: whoever goes on to another hop shall not wait for a node that is gone. What lives has
/// closed by then, and what is slow is told all the same.
const FAREWELL: std::time::Duration = std::time::Duration::from_millis(150);

/// How long a hop is told again and again that cannot be told, however long tokens live.
const LONGEST_FAREWELL: std::time::Duration = std::time::Duration::from_secs(3600);

/// So many of the first and shortest pauses are left out: who makes a thousand wires anew has better things to do.
const SLOWLY: u32 = 3;

/// So many Closes are tried again at once; the others end with the tokens of their connections.
const MAX_LEAVING: usize = 4096;

impl Parting {
    /// Closes, and waits a moment for it. Where the connection is about to be asked for with another endpoint nobody waits:
    /// if it is here that it is asked for again, the Request does.
    async fn see_off(&self, farewell: Farewell, deadline: Instant) -> Result<()> {
        if farewell.conn.state() == State::ReselectRequested {
            let close = farewell.clone().say(deadline);
            self.begin(farewell, close);
            return Ok(());
        }
        let is_gone = !farewell.target.may_come_back();
        let mut close = Box::pin(farewell.clone().say(deadline));
        match tokio::time::timeout(FAREWELL, &mut close).await {
            Ok(Err(error)) if error.code == Code::Unavailable && is_untold(&error) && is_gone => {
                tracing::debug!(from = %farewell.target, %error, "who is gone has nothing left to close");
                Ok(())
            }
            Ok(Err(error)) if is_untold(&error) => {
                let is_ours = error.code == Code::Aborted || farewell.target.lasts();
                self.begin(farewell, std::future::ready(Err(error.clone())));
                // It is ours now to tell: nobody else tries.
                if is_ours { Ok(()) } else { Err(error) }
            }
            Ok(closed) => closed,
            Err(_) => {
                let (from, id) = (&farewell.target, &farewell.conn.id);
                tracing::debug!(%from, connection = id, "it is slow to close; nobody waits for that");
                self.silent.note(from);
                self.begin(farewell, close);
                Ok(())
            }
        }
    }

    /// Closes; nobody waits for it.
    fn close(&self, farewell: Farewell) {
        let close = farewell.clone().say(Instant::now() + Release::TIME);
        self.begin(farewell, close);
    }

    /// Goes on with a Close, and tries again what its hop could not be told.
    fn begin(&self, farewell: Farewell, close: impl Future<Output = Result<()>> + Send + 'static) {
        let (this, key) = (self.clone(), left_by(&farewell.target, &farewell.conn.id));
        let (goes_on, mut back) = oneshot::channel();
        let mut partings = self.left.lock();
        let retries = partings.len() < MAX_LEAVING && farewell.target.may_come_back();
        let (done, conn) = (key.clone(), farewell.conn.clone());
        let task = tokio::spawn(async move {
            let until = Instant::now() + if retries { farewell.lasts() } else { Default::default() };
            let mut close = Box::pin(close);
            let mut closed = match tokio::time::timeout(FAREWELL, &mut close).await {
                Ok(closed) => closed,
                Err(_) => {
                    this.silent.note(&done.0.0);
                    close.await
                }
            };
            for attempt in 0_u32.. {
                let Err(error) = &closed else { break };
                tracing::debug!(from = %done.0.0, connection = done.1, %error, "not closed there");
                let pause = refresh::backoff(attempt.saturating_add(SLOWLY), rand::random());
                if !is_untold(error) || Instant::now() + pause >= until {
                    break;
                }
                if tokio::time::timeout(pause, &mut back).await.is_ok() {
                    break;
                }
                closed = farewell.clone().say(Instant::now() + Release::TIME).await;
            }
            if closed.is_ok() {
                this.silent.answered(&done.0.0);
            }
            let mut partings = this.left.lock();
            if let Some((_, Leaving::Told { task, .. })) = partings.get(&done)
                && task.id() == tokio::task::id()
            {
                partings.remove(&done);
            }
        });
        // The same Close from before this connection came back there in vain is this one's now.
        let told = (Instant::now(), Leaving::Told { conn, task, goes_on });
        if let Some((_, Leaving::Told { task: before, .. })) = partings.insert(key, told) {
            before.abort();
        }
    }

    /// Until the request is over that may go there.
    fn hold_back(&self, farewell: Farewell) -> Left {
        let key = left_by(&farewell.target, &farewell.conn.id);
        let held_back = (Instant::now(), Leaving::HeldBack(farewell));
        if let Some((_, Leaving::Told { task: before, .. })) = self.left.lock().insert(key.clone(), held_back)
        {
            before.abort();
        }
        key
    }

    /// That request is over: closes, if it did not go there.
    fn tell_held_back(&self, left: Left) {
        let farewell = match self.left.lock().get(&left) {
            Some((_, Leaving::HeldBack(farewell))) => farewell.clone(),
            _ => return,
        };
        self.close(farewell);
    }

    /// Waits until the connection is closed there, if it is being closed; then tells as what it stood there.
    async fn over(&self, at: &NextHop, id: &str, deadline: Instant) -> Option<Connection> {
        if planted::is("nobody waits for a late close") {
            return None;
        }
        let leaving = {
            let mut partings = self.left.lock();
            if partings.is_empty() { None } else { partings.remove(&left_by(at, id)) }
        };
        let (conn, mut task, goes_on) = match leaving? {
            (_, Leaving::HeldBack(farewell)) => return Some(farewell.conn),
            (_, Leaving::Told { conn, task, goes_on }) => (conn, task, goes_on),
        };
        drop(goes_on);
        let until = deadline.min(Instant::now() + LONGEST_PARTING);
        if tokio::time::timeout_at(until, &mut task).await.is_err() {
            task.abort();
            // It is taken back now, not when its task comes to it: after the Request it would be of that.
            let _ = task.await;
        }
        Some(conn)
    }
}

/// Whether a hop that was to close has not heard of it, or does not know for now who is to hear of it. What cannot be told
/// behind it, it tells itself.
fn is_untold(error: &Error) -> bool {
    match error.code {
        Code::Unavailable | Code::DeadlineExceeded => error.hop.is_none(),
        code => code == Code::Aborted,
    }
}

/// Neighbours that did not answer a moment ago: a node that is cut off says nothing at all, and whoever asks it first
/// waits long.
#[derive(Debug, Clone, Default)]
pub struct Silent(Arc<Mutex<HashMap<NextHop, Instant>>>);

/// How long it is remembered that a neighbour did not answer, if nobody asks it meanwhile.
const SILENT: std::time::Duration = std::time::Duration::from_secs(10);
/// So many are remembered.
const MAX_SILENT: usize = 1024;

impl Silent {
    fn note(&self, hop: &NextHop) {
        let mut hops = self.0.lock();
        let now = Instant::now();
        if hops.len() >= MAX_SILENT {
            hops.retain(|_, until| *until > now);
        }
        if hops.len() < MAX_SILENT {
            hops.insert(hop.clone(), now + SILENT);
        }
    }

    fn answered(&self, hop: &NextHop) {
        let mut hops = self.0.lock();
        if !hops.is_empty() {
            hops.remove(hop);
        }
    }

    /// Whether all neighbours have answered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }

    /// Whether this neighbour did not answer a moment ago.
    #[must_use]
    pub fn is_silent(&self, hop: &NextHop) -> bool {
        self.0.lock().get(hop).is_some_and(|until| *until > Instant::now())
    }
}

/// One monitor stream per neighbour, however many connections go there.
#[derive(Debug)]
struct Follower {
    me: String,
    hub: Arc<Hub>,
    pool: Pool,
    streams: Mutex<Streams>,
    opened: AtomicU64,
}

/// Which of the streams that were opened.
type StreamId = u64;

/// The stream of each hop, and our connections that go there.
type Streams = HashMap<NextHop, (StreamId, BTreeSet<String>)>;

impl Follower {
    /// Follows the connection with this id (ours), which is about to be asked for there.
    fn follow(self: &Arc<Self>, target: &NextHop, id: &str) -> StreamId {
        let mut streams = self.streams.lock();
        self.hub.asks(id, target);
        if let Some((stream, ids)) = streams.get_mut(target) {
            ids.insert(id.to_owned());
            return *stream;
        }
        let opened = self.opened.fetch_add(1, Ordering::Relaxed);
        streams.insert(target.clone(), (opened, BTreeSet::from([id.to_owned()])));
        let (this, target) = (Arc::clone(self), target.clone());
        tokio::spawn(async move {
            if let Err(status) = this.stream(&target).await {
                tracing::info!(next = %target, %status, "the next hop's events ended");
            }
            lost(&this.hub, &this.streams, &target).await;
        });
        opened
    }

    /// Whether this stream still goes on.
    fn follows(&self, target: &NextHop, stream: StreamId) -> bool {
        self.streams.lock().get(target).is_some_and(|(is, _)| *is == stream)
    }

    /// What a neighbour tells of its connections.
    async fn events(
        &self,
        target: &NextHop,
        selector: MonitorScopeSelector,
    ) -> Result<Events, tonic::Status> {
        match target.way() {
            Way::Inside(hop) => {
                let asker = Viewer::Asker(hop.peer().id().clone());
                Ok(ReceiverStream::new(hop.hub().watch(selector, asker)?).map(Ok).boxed())
            }
            Way::Dial(target) => {
                let channel = self.pool.streams(target.clone(), FOLLOWING).await?;
                let mut call = tonic::Request::new(selector);
                call.metadata_mut().insert(UNASKED, MetadataValue::from_static("1"));
                let events = MonitorConnectionClient::new(channel).monitor_connections(call).await?;
                Ok(events.into_inner().map_ok(Arc::new).boxed())
            }
        }
    }

    async fn stream(&self, target: &NextHop) -> Result<(), tonic::Status> {
        let own = PathSegment { name: self.me.clone(), ..PathSegment::default() };
        let selector = MonitorScopeSelector { path_segments: vec![own], ..MonitorScopeSelector::default() };
        let mut events = self.events(target, selector).await?;
        while let Some(event) = events.try_next().await? {
            // A neighbour speaks for the connections that we have with it, and no others.
            let ours: BTreeSet<String> = {
                let streams = self.streams.lock();
                let Some((_, ids)) = streams.get(target) else { break };
                event
                    .connections
                    .values()
                    .flat_map(monitor::followable)
                    .filter(|id| ids.contains(*id))
                    .cloned()
                    .collect()
            };
            self.hub.followed(target, event, &ours);
        }
        Ok(())
    }

    /// Follows again what was left a moment ago, if that stream still goes on.
    fn stay(&self, target: &NextHop, id: &str, stream: StreamId) {
        if let Some((is, ids)) = self.streams.lock().get_mut(target)
            && *is == stream
        {
            ids.insert(id.to_owned());
        }
    }

    fn leave(&self, target: &NextHop, id: &str) {
        // The stream stays: the next connection to this neighbour finds it open.
        if let Some((_, ids)) = self.streams.lock().get_mut(target) {
            ids.remove(id);
        }
    }
}

/// Tells that a neighbour is lost. Of many connections not all at once: each is asked for elsewhere then.
async fn lost(hub: &Hub, streams: &Mutex<Streams>, target: &NextHop) {
    // Whoever asks there from now on finds no stream, and opens one.
    let (_, mut left) = streams.lock().remove(target).unwrap_or_default();
    loop {
        let rest = left.iter().nth(AT_ONCE).cloned().map(|first| left.split_off(&first));
        {
            let streams = streams.lock();
            left.retain(|id| !streams.values().any(|(_, ids)| ids.contains(id)));
            hub.lost(target, &left);
        }
        let Some(rest) = rest else { return };
        left = rest;
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use nsm_api::pb::connection::{Path, State};

    use super::*;

    fn conn(index: u32, tokens: &[&str]) -> Connection {
        let segment = |(i, token): (usize, &&str)| PathSegment {
            name: format!("hop{i}"),
            id: format!("id{i}"),
            token: (*token).into(),
            ..PathSegment::default()
        };
        Connection {
            path: Some(Path {
                unknown: None,
                index,
                path_segments: tokens.iter().enumerate().map(segment).collect(),
            }),
            ..Connection::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn of_many_connections_of_a_lost_hop_some_fall_at_a_time() {
        let hop = |url: &str| NextHop::from(url.parse::<nsm_transport::DialUrl>().expect("a URL"));
        let (gone, other, hub) = (hop("tcp://10.0.0.1:1"), hop("tcp://10.0.0.2:1"), Hub::default());
        let ids: BTreeSet<String> = (0..5 * AT_ONCE).map(|i| format!("id{i:03}")).collect();
        for id in &ids {
            hub.update(Connection { id: id.clone(), ..conn(0, &["t"]) }, None);
        }
        let fallen = || ids.iter().filter(|id| hub.get(id).expect("known").0.state() == State::Down).count();
        let streams = Mutex::new(Streams::from([(gone.clone(), (0, ids.clone()))]));
        let looking = async {
            let mut seen = Vec::new();
            tokio::time::sleep(PAUSE / 2).await;
            for round in 0..4 {
                seen.push(fallen());
                if round == 1 {
                    // These are elsewhere before they are told to go.
                    let last = ids.iter().skip(4 * AT_ONCE).cloned().collect();
                    streams.lock().insert(other.clone(), (1, last));
                }
                tokio::time::sleep(PAUSE).await;
            }
            seen
        };
        let ((), seen) = tokio::join!(lost(&hub, &streams, &gone), looking);
        assert_eq!(seen, [1, 2, 3, 4].map(|times| times * AT_ONCE));
        assert_eq!(fallen(), 4 * AT_ONCE);
    }

    /// Not yet registered again.
    #[derive(Debug)]
    struct Nobody;

    impl crate::hop::Holders for Nobody {
        fn now(&self, _: &str) -> Option<nsm_transport::DialTarget> {
            None
        }
    }

    #[tokio::test]
    async fn an_endpoint_whose_socket_is_dead_has_nothing_left_to_close() {
        use nsm_identity::{Source, ca::Authority};
        use nsm_transport::{DialTarget, PoolConfig};
        use rustix::fs::{CWD, Mode, OFlags, openat};

        let (directory, now) = (tempfile::tempdir().unwrap(), clock::now());
        let authority = Authority::new("test.lab".parse().unwrap(), now).unwrap();
        let id = "spiffe://test.lab/hop".parse().unwrap();
        let identity = authority.identity(&id, std::time::Duration::from_secs(60), now).unwrap();
        let pool = Pool::new(Source::fixed(identity), PoolConfig::default());
        let dial = Dial::new(pool, "hop", Arc::default(), FOLLOWING);
        let path = directory.path().join("endpoint.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let socket = openat(CWD, &path, OFlags::PATH, Mode::empty()).unwrap();
        let url: nsm_transport::DialUrl = format!("unix://{}", path.display()).parse().unwrap();
        let socket = NextHop::from(DialTarget::Socket(Arc::new(socket)));
        let forwarder = socket.clone().lasting("forwarder", Arc::new(Nobody));
        // Of a forwarder it is for us to tell whoever comes after it.
        for (target, fails, is_told_later) in
            [(socket, false, false), (forwarder, false, true), (NextHop::from(url), true, true)]
        {
            let farewell = Farewell { conn: conn(0, &["t"]), ..dial.farewell(&target) };
            let closed = dial.parting.see_off(farewell, Instant::now() + Release::TIME).await;
            assert_eq!(closed.is_err(), fails, "{target}: {closed:?}");
            assert_eq!(dial.farewells().left_since(&target, "").is_some(), is_told_later, "{target}");
        }
    }

    #[test]
    fn a_close_takes_the_fresh_tokens_of_the_hops_before() {
        let mut remembered = conn(1, &["old", "old", "old"]);
        freshen(&mut remembered, &conn(1, &["new", "new"]));
        let tokens: Vec<_> = path::segments(&remembered).iter().map(|s| s.token.as_str()).collect();
        assert_eq!(tokens, ["new", "new", "old"]);
    }
}
