//! The prefix server: hands out parts of one prefix to endpoints that share a network over several nodes
//! (spec/control-plane.md 11.9). It is upstream's protocol, package `ipam`; upstream's server is `cmd-ipam-vl3`.
//!
//! [`Prefixes`] decides, purely. What is allocated on a stream lasts as long as the stream. Beyond upstream it is then
//! kept for a while for whoever names it, because its holder comes back after a lost connection or a restart of this
//! server, which remembers leases in a file; only when nothing else is free it goes to another.
//!
//! The file is for the next process, not for the next boot: with the machine go the streams of all holders, who ask for
//! their prefixes by name again. So it is renamed into place and never synced.

use std::{
    collections::BTreeMap,
    fs,
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt as _};
use ipnet::IpNet;
use nsm_api::{
    limits::MAX_ITEMS,
    pb::ipam::{
        PrefixRequest, PrefixResponse, Type,
        ipam_server::{Ipam, IpamServer},
    },
};
use nsm_identity::{Source, SpiffeId, explain};
use nsm_mesh::{Error, Result};
use nsm_transport::{Census, Guard, ListenUrl, MAX_MESSAGE, Peer, Refusal, Server};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// The name of the service, for gRPC health.
pub const SERVICES: [&str; 1] = ["ipam.IPAM"];

/// How long a prefix is kept for its holder after its stream has ended.
const GRACE: Duration = Duration::from_secs(60);
/// Prefixes that one identity may hold, on all its streams together; endpoints hold one.
const MOST_OF_ONE: usize = 64;

/// What is free of a prefix and what is not.
#[derive(Debug)]
pub struct Prefixes {
    whole: IpNet,
    length: u8,
    leases: BTreeMap<IpNet, Holder>,
}

/// A stream, and whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asker {
    /// Its number.
    pub stream: u64,
    /// Who has opened it.
    pub id: SpiffeId,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Holder {
    /// The stream that it was allocated on.
    Stream(Asker),
    /// Nobody, but until then its last holder may come back, who is not known after a restart.
    Away(Instant, Option<SpiffeId>),
}

impl Holder {
    fn is(&self, stream: u64) -> bool {
        matches!(self, Self::Stream(asker) if asker.stream == stream)
    }

    fn id(&self) -> Option<&SpiffeId> {
        match self {
            Self::Stream(asker) => Some(&asker.id),
            Self::Away(_, id) => id.as_ref(),
        }
    }
}

/// Why nothing could be allocated, or not be set up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "each variant is its sentence")]
pub enum Refused {
    #[error("no /{length} is free in {whole}: {held} are held, {excluded} prefixes are excluded")]
    Exhausted { whole: IpNet, length: u8, held: usize, excluded: usize },
    #[error("{0} holds {MOST_OF_ONE} prefixes, the most that one identity may hold")]
    TooMany(SpiffeId),
    #[error("{whole} has no /{length} in it; expected a length from {} to {}", whole.prefix_len(), whole.max_prefix_len())]
    Length { whole: IpNet, length: u8 },
}

impl Prefixes {
    /// All of `whole` is free; it goes out in parts of this length.
    ///
    /// # Errors
    /// [`Refused::Length`].
    pub fn new(whole: IpNet, length: u8) -> Result<Self, Refused> {
        if !(whole.prefix_len()..=whole.max_prefix_len()).contains(&length) {
            return Err(Refused::Length { whole, length });
        }
        Ok(Self { whole: whole.trunc(), length, leases: BTreeMap::new() })
    }

    /// Takes over what an earlier process had handed out.
    pub fn recover(&mut self, leases: impl IntoIterator<Item = IpNet>, now: Instant) {
        for prefix in leases.into_iter().map(|p| p.trunc()) {
            if self.whole.contains(&prefix) && !self.leases.keys().any(|held| overlap(held, &prefix)) {
                self.leases.insert(prefix, Holder::Away(now + GRACE, None));
            }
        }
    }

    /// What is handed out, or kept for its last holder.
    pub fn leases(&self) -> impl Iterator<Item = &IpNet> {
        self.leases.keys()
    }

    /// Allocates a prefix to a stream: the wanted one if nobody holds any of it, else the lowest that is free and
    /// overlaps nothing excluded.
    ///
    /// # Errors
    /// [`Refused::Exhausted`], [`Refused::TooMany`].
    pub fn allocate(
        &mut self,
        asker: &Asker,
        wanted: Option<IpNet>,
        excluded: &[IpNet],
        now: Instant,
    ) -> Result<IpNet, Refused> {
        self.leases.retain(|_, holder| !matches!(holder, Holder::Away(until, _) if *until <= now));
        // Nobody had more than a part, so nobody gets more back.
        let wanted = wanted.map(|p| p.trunc()).filter(|p| {
            self.whole.contains(p)
                && p.prefix_len() >= self.length
                && !excluded.iter().any(|net| overlap(net, p))
                && !self.leases.iter().any(|(held, by)| {
                    overlap(held, p) && (matches!(by, Holder::Stream(_)) || !p.contains(held))
                })
        });
        let prefix = wanted
            .or_else(|| self.lowest(excluded, |_| true))
            // Better another than nobody: as upstream, where nothing is kept for anybody.
            .or_else(|| self.lowest(excluded, |by| matches!(by, Holder::Stream(_))))
            .ok_or(Refused::Exhausted {
                whole: self.whole,
                length: self.length,
                held: self.leases.len(),
                excluded: excluded.len(),
            })?;
        // What is kept for it counts too: streams that come and go would take what is kept for others.
        let its = |(held, by): &(&IpNet, &Holder)| by.id() == Some(&asker.id) && !overlap(held, &prefix);
        if self.leases.iter().filter(its).count() >= MOST_OF_ONE {
            return Err(Refused::TooMany(asker.id.clone()));
        }
        self.leases.retain(|held, _| !overlap(held, &prefix));
        self.leases.insert(prefix, Holder::Stream(asker.clone()));
        Ok(prefix)
    }

    /// Frees a prefix that was allocated on this stream. Whether it was.
    pub fn free(&mut self, stream: u64, prefix: IpNet) -> bool {
        let prefix = prefix.trunc();
        let its = self.leases.get(&prefix).is_some_and(|holder| holder.is(stream));
        if its {
            self.leases.remove(&prefix);
        }
        its
    }

    /// The stream has ended.
    pub fn end(&mut self, stream: u64, now: Instant) {
        for holder in self.leases.values_mut().filter(|holder| holder.is(stream)) {
            *holder = Holder::Away(now + GRACE, holder.id().cloned());
        }
    }

    /// The lowest part that overlaps nothing excluded and no lease of a holder that counts.
    fn lowest(&self, excluded: &[IpNet], counts: impl Fn(&Holder) -> bool) -> Option<IpNet> {
        let held = self.leases.iter().filter(|(_, by)| counts(by)).map(|(net, _)| net);
        let mut taken: Vec<(u128, u128)> =
            held.chain(excluded.iter().filter(|net| is_v4(net) == is_v4(&self.whole))).map(bounds).collect();
        taken.sort_unstable();
        let (mut at, end) = bounds(&self.whole);
        let last = (1u128 << (self.whole.max_prefix_len() - self.length).min(127)) - 1;
        let last = if self.length == 0 && !is_v4(&self.whole) { u128::MAX } else { last };
        for (first, to) in taken {
            if to < at {
                continue;
            }
            if first > at.checked_add(last)? {
                break;
            }
            // The next part begins where the mask says.
            at = to.checked_add(1)?.checked_add(last)? & !last;
        }
        (at.checked_add(last)? <= end).then(|| net(at, self.length, is_v4(&self.whole))).flatten()
    }
}

fn is_v4(net: &IpNet) -> bool {
    matches!(net, IpNet::V4(_))
}

fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

/// First and last address as numbers.
fn bounds(net: &IpNet) -> (u128, u128) {
    let number = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => u128::from(ip),
    };
    (number(net.network()), number(net.broadcast()))
}

fn net(first: u128, length: u8, v4: bool) -> Option<IpNet> {
    let address = match v4 {
        true => IpAddr::V4(Ipv4Addr::from(u32::try_from(first).ok()?)),
        false => IpAddr::V6(Ipv6Addr::from(first)),
    };
    IpNet::new(address, length).ok()
}

/// What a prefix server is told from outside.
#[derive(Debug, Clone)]
pub struct PrefixServerConfig {
    /// Where to listen.
    pub listen_on: Vec<ListenUrl>,
    /// What is handed out in parts.
    pub prefix: IpNet,
    /// Mask length of the parts.
    pub client_prefix_length: u8,
    /// Where leases are kept for the next process; `None`: nowhere.
    pub state_file: Option<PathBuf>,
    /// What endpoints may use of it.
    pub guard: Guard,
}

impl PrefixServerConfig {
    /// Whether a server can be made of it: needs no identity yet.
    ///
    /// # Errors
    /// A prefix without such parts, a state file that cannot be read.
    pub fn check(&self) -> Result<()> {
        Leases::open(self).map(drop)
    }
}

/// A prefix server whose sockets are bound.
pub struct PrefixServer {
    server: Server,
    leases: Leases,
}

impl std::fmt::Debug for PrefixServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PrefixServer").field("leases", &self.leases).finish_non_exhaustive()
    }
}

impl PrefixServer {
    /// Reads what an earlier process has left, and binds.
    ///
    /// # Errors
    /// A prefix without such parts, a state file that cannot be read, a socket that cannot be bound.
    pub async fn bind(config: PrefixServerConfig, source: Source) -> Result<Self> {
        let leases = Leases::open(&config)?;
        let server =
            Server::bind(source, &config.listen_on).await.map_err(|e| Error::unavailable(explain(&e)))?;
        let server = server.guarded(&config.guard);
        tracing::info!(prefix = %config.prefix, length = config.client_prefix_length, "handing out prefixes");
        Ok(Self { server, leases })
    }

    /// Where it listens.
    #[must_use]
    pub fn urls(&self) -> Vec<ListenUrl> {
        self.server.urls()
    }

    /// Serves until `shutdown` is done.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) {
        let mut routes = tonic::service::RoutesBuilder::default();
        let (stop, stopped) = tokio::sync::watch::channel(());
        let leases = Leases { stopped: Some(stopped), ..self.leases };
        routes.add_service(IpamServer::new(leases).max_decoding_message_size(MAX_MESSAGE));
        let shutdown = async {
            shutdown.await;
            drop(stop);
        };
        self.server.serve(routes.routes(), &SERVICES, shutdown).await;
    }
}

/// The leases, in memory and on the disk.
#[derive(Debug, Clone)]
struct Leases {
    prefixes: Arc<Mutex<Prefixes>>,
    file: Option<Arc<LeaseFile>>,
    streams: Arc<AtomicU64>,
    /// Open streams of each identity.
    census: Census,
    most_streams: usize,
    /// Ends with the server, and streams with it.
    stopped: Option<tokio::sync::watch::Receiver<()>>,
}

impl Leases {
    fn open(config: &PrefixServerConfig) -> Result<Self> {
        let mut prefixes = Prefixes::new(config.prefix, config.client_prefix_length)
            .map_err(|e| Error::invalid(e.to_string()))?;
        if let Some(file) = &config.state_file {
            let failed = |e: &dyn std::fmt::Display| {
                Error::invalid(format!("the leases in {} cannot be read: {e}", file.display()))
                    .hint("it holds one prefix a line; remove it to begin anew")
            };
            let text = match fs::read_to_string(file) {
                Ok(text) => text,
                Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
                Err(e) => return Err(failed(&e)),
            };
            let leases: Vec<IpNet> =
                text.lines().map(str::parse).collect::<Result<_, _>>().map_err(|e| failed(&e))?;
            prefixes.recover(leases, Instant::now());
        }
        Ok(Self {
            prefixes: Arc::new(Mutex::new(prefixes)),
            file: config
                .state_file
                .clone()
                .map(|path| Arc::new(LeaseFile { path, writing: Mutex::default() })),
            streams: Arc::default(),
            census: Census::default(),
            most_streams: config.guard.limits.watches_of_one,
            stopped: None,
        })
    }

    /// Writes what is held now, on a thread that may wait for a disk.
    async fn save(&self) {
        let Some(file) = self.file.clone() else { return };
        let prefixes = Arc::clone(&self.prefixes);
        let saved = tokio::task::spawn_blocking(move || file.write(&prefixes)).await;
        if let Err(error) = saved.map_err(io::Error::other).and_then(|saved| saved) {
            // Only a restart would miss it, and then it is asked for by name.
            tracing::warn!(%error, "the leases could not be written");
        }
    }

    fn answer(&self, asker: &Asker, request: &PrefixRequest) -> Result<Option<PrefixResponse>, Status> {
        let mut prefixes = self.prefixes.lock();
        let stream = asker.stream;
        Ok(match request.r#type() {
            Type::Allocate => {
                if request.exclude_prefixes.len() > MAX_ITEMS {
                    return Err(Status::invalid_argument(format!(
                        "{} prefixes are to be excluded; at most {MAX_ITEMS} are accepted",
                        request.exclude_prefixes.len()
                    )));
                }
                // What cannot be read excludes nothing, as upstream has it.
                let excluded: Vec<IpNet> =
                    request.exclude_prefixes.iter().filter_map(|text| text.parse().ok()).collect();
                let wanted = request.prefix.parse().ok();
                let prefix = prefixes
                    .allocate(asker, wanted, &excluded, Instant::now())
                    .map_err(|e| Status::resource_exhausted(e.to_string()))?;
                tracing::info!(stream, %prefix, "allocated");
                let exclude_prefixes = request.exclude_prefixes.clone();
                Some(PrefixResponse { prefix: prefix.to_string(), exclude_prefixes })
            }
            Type::Delete => {
                let freed = request.prefix.parse().is_ok_and(|prefix| prefixes.free(stream, prefix));
                tracing::info!(stream, prefix = ?request.prefix, freed, "given back");
                None
            }
            Type::Undefined => {
                return Err(Status::invalid_argument(format!(
                    "the request is of type {}; expected 1 (ALLOCATE) or 2 (DELETE)",
                    request.r#type
                )));
            }
        })
    }
}

/// The file of the leases. The next process reads it.
#[derive(Debug)]
struct LeaseFile {
    path: PathBuf,
    /// One writer at a time, and each writes what is held when its turn comes: the last one all.
    writing: Mutex<()>,
}

impl LeaseFile {
    /// Writes beside the file and renames: a crash leaves the old one or the new one.
    fn write(&self, prefixes: &Mutex<Prefixes>) -> io::Result<()> {
        let _turn = self.writing.lock();
        let text: String = prefixes.lock().leases().map(|prefix| format!("{prefix}\n")).collect();
        let mut beside = self.path.clone().into_os_string();
        beside.push(".new");
        fs::write(&beside, text)?;
        fs::rename(&beside, &self.path)
    }
}

/// Keeps what was allocated on a stream until it ends.
struct OpenStream {
    leases: Leases,
    asker: Asker,
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.leases.prefixes.lock().end(self.asker.stream, Instant::now());
    }
}

#[tonic::async_trait]
impl Ipam for Leases {
    type ManagePrefixesStream = Pin<Box<dyn Stream<Item = Result<PrefixResponse, Status>> + Send>>;

    async fn manage_prefixes(
        &self,
        request: Request<Streaming<PrefixRequest>>,
    ) -> Result<Response<Self::ManagePrefixesStream>, Status> {
        let peer = Peer::of(&request)?.id().clone();
        let counted = self.census.enter(&peer, self.most_streams).ok_or_else(|| {
            let text =
                format!("{peer} has {} streams open, the most that one identity may have", self.most_streams);
            Refusal("watches").mark(Status::resource_exhausted(text))
        })?;
        let asker = Asker { stream: self.streams.fetch_add(1, Ordering::Relaxed), id: peer };
        let stream = OpenStream { leases: self.clone(), asker };
        let mut stopped = self.stopped.clone();
        let mut requests = request.into_inner();
        // One answer at a time: who does not read is not read from.
        let (tell, answers) = mpsc::channel(1);
        tokio::spawn(async move {
            let _counted = counted;
            let serve = async {
                while let Some(Ok(request)) = requests.next().await {
                    let answer = stream.leases.answer(&stream.asker, &request);
                    if answer.is_ok() {
                        stream.leases.save().await;
                    }
                    match answer {
                        Ok(None) => {}
                        Ok(Some(answer)) => {
                            if tell.send(Ok(answer)).await.is_err() {
                                return;
                            }
                        }
                        Err(status) => {
                            tracing::info!(peer = %stream.asker.id, %status, "request for a prefix refused");
                            let _ = tell.send(Err(status)).await;
                            return;
                        }
                    }
                }
            };
            let stop = async {
                match &mut stopped {
                    Some(stopped) => drop(stopped.changed().await),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = serve => {}
                () = stop => {}
                () = tell.closed() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn p(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    /// A stream, each of somebody else.
    fn of(stream: u64) -> Asker {
        Asker { stream, id: format!("spiffe://test.lab/{stream}").parse().unwrap() }
    }

    fn pool(whole: &str, length: u8) -> Prefixes {
        Prefixes::new(p(whole), length).unwrap()
    }

    #[test]
    fn the_lowest_free_part_and_the_wanted_one_where_it_is_free() {
        let now = Instant::now();
        let mut pool = pool("172.16.0.0/16", 24);
        let mut take = |stream, wanted: &str, excluded: &[&str]| {
            let excluded: Vec<_> = excluded.iter().map(|text| p(text)).collect();
            pool.allocate(&of(stream), wanted.parse().ok(), &excluded, now).unwrap().to_string()
        };
        assert_eq!(take(1, "", &[]), "172.16.0.0/24");
        assert_eq!(take(2, "", &[]), "172.16.1.0/24");
        assert_eq!(take(3, "172.16.9.0/24", &[]), "172.16.9.0/24");
        assert_eq!(take(4, "172.16.9.0/24", &[]), "172.16.2.0/24", "somebody has it");
        assert_eq!(take(5, "10.0.0.0/24", &[]), "172.16.3.0/24", "not ours");
        assert_eq!(take(6, "172.16.0.0/16", &[]), "172.16.4.0/24", "more than a part");
        assert_eq!(take(7, "", &["172.16.5.7/32", "172.16.6.0/23", "fd00::/8"]), "172.16.8.0/24");
        assert_eq!(take(8, "172.16.20.0/24", &["172.16.20.0/22"]), "172.16.5.0/24");
    }

    #[test]
    fn a_prefix_is_kept_for_its_holder_unless_nothing_else_is_free() {
        let now = Instant::now();
        let mut pool = pool("10.0.0.0/23", 24);
        let a = pool.allocate(&of(1), None, &[], now).unwrap();
        pool.end(1, now);
        let b = pool.allocate(&of(2), None, &[], now).unwrap();
        assert_ne!(a, b, "its holder may come back");
        assert_eq!(pool.allocate(&of(3), Some(a), &[], now), Ok(a), "and does");
        assert!(matches!(pool.allocate(&of(4), None, &[], now), Err(Refused::Exhausted { held: 2, .. })));
        pool.end(3, now);
        assert_eq!(pool.allocate(&of(4), None, &[], now), Ok(a), "better than to refuse");
        assert!(!pool.free(2, a), "it is another's");
        assert!(pool.free(2, b) && !pool.free(2, b));
        pool.end(4, now);
        assert_eq!(pool.allocate(&of(5), None, &[], now + GRACE), Ok(a), "long enough");
    }

    #[test]
    fn an_identity_holds_no_more_on_many_streams_than_on_one() {
        let now = Instant::now();
        let mut pool = pool("10.0.0.0/16", 24);
        let greedy = |stream| Asker { stream, ..of(0) };
        let held: Vec<_> =
            (0..64).map(|stream| pool.allocate(&greedy(stream), None, &[], now).unwrap()).collect();
        let refused = pool.allocate(&greedy(64), None, &[], now).unwrap_err();
        assert_eq!(refused, Refused::TooMany(of(0).id));
        pool.allocate(&of(99), None, &[], now).unwrap();
        // Streams that end give nothing back at once; whoever comes back for it gets it.
        (0..64).for_each(|stream| pool.end(stream, now));
        assert_eq!(pool.allocate(&greedy(65), None, &[], now), Err(Refused::TooMany(of(0).id)));
        assert_eq!(pool.allocate(&greedy(65), Some(held[3]), &[], now), Ok(held[3]));
        assert!(pool.free(65, held[3]));
        pool.allocate(&greedy(66), None, &[], now).unwrap();
        pool.allocate(&greedy(67), None, &[], now + GRACE).unwrap();
    }

    #[test]
    fn what_an_earlier_process_handed_out_is_kept_for_its_holders() {
        let now = Instant::now();
        let mut pool = pool("2001:db8::/64", 112);
        pool.recover(["2001:db8::/112", "2001:db8::1:0/112", "2001:db8::/112", "fd00::/112"].map(p), now);
        assert_eq!(pool.leases().count(), 2);
        assert_eq!(pool.allocate(&of(1), None, &[], now).unwrap(), p("2001:db8::2:0/112"));
        assert_eq!(
            pool.allocate(&of(2), Some(p("2001:db8::1:0/112")), &[], now).unwrap(),
            p("2001:db8::1:0/112")
        );
    }

    #[test]
    fn lengths_that_do_not_fit_are_named() {
        for (whole, length) in [("10.0.0.0/16", 8), ("10.0.0.0/16", 33), ("fd00::/64", 48)] {
            let error = Prefixes::new(p(whole), length).unwrap_err().to_string();
            assert!(error.contains(whole) && error.contains("expected a length"), "{error}");
        }
        let mut everything = pool("0.0.0.0/0", 0);
        assert_eq!(everything.allocate(&of(1), None, &[], Instant::now()).unwrap(), p("0.0.0.0/0"));
        let mut everything = pool("::/0", 0);
        assert_eq!(everything.allocate(&of(1), None, &[], Instant::now()).unwrap(), p("::/0"));
        let mut one = pool("255.255.255.255/32", 32);
        one.allocate(&of(1), None, &[], Instant::now()).unwrap();
        assert!(one.allocate(&of(1), None, &[], Instant::now()).is_err());
    }

    proptest::proptest! {
        /// No two holders overlap, nothing excluded is handed out, and all is handed out before anybody is refused.
        #[test]
        fn prefixes_never_overlap(
            ops in proptest::collection::vec((0u64..6, 0u8..4, 0u32..64, 28u8..33), 0..60),
        ) {
            let now = Instant::now();
            let mut pool = pool("10.0.0.0/26", 29);
            let mut live: Vec<(u64, IpNet)> = Vec::new();
            for (stream, op, host, length) in ops {
                let some = IpNet::new(Ipv4Addr::from(0x0a00_0000 + host).into(), length).unwrap().trunc();
                match op {
                    0 | 3 => {
                        let excluded: &[IpNet] = if op == 0 { &[] } else { &[some] };
                        let taken = |part: &IpNet, live: &[(u64, IpNet)]| {
                            live.iter().map(|(_, held)| held).chain(excluded).any(|net| overlap(net, part))
                        };
                        match pool.allocate(&of(stream), Some(some), excluded, now) {
                            Ok(got) => {
                                proptest::prop_assert!(!taken(&got, &live));
                                live.push((stream, got));
                            }
                            Err(_) => {
                                let parts = p("10.0.0.0/26").subnets(29).unwrap();
                                proptest::prop_assert!(parts.into_iter().all(|part| taken(&part, &live)));
                            }
                        }
                    }
                    1 => {
                        if let Some(at) = live.iter().position(|(s, _)| *s == stream) {
                            proptest::prop_assert!(pool.free(stream, live.remove(at).1));
                        }
                    }
                    _ => {
                        pool.end(stream, now);
                        live.retain(|(s, _)| *s != stream);
                    }
                }
            }
        }
    }
}
