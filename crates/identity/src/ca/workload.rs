//! The SPIFFE Workload API on a Unix socket, for whoever decides what its callers are given: an [`Issuer`].
//!
//! Callers are known by their processes (`SO_PEERCRED`, pinned by pidfd). What one process may have open is bounded.

use std::{
    collections::HashMap,
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use crate::clock;
use rustls_pki_types::CertificateDer;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{mpsc, watch},
};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, transport::server::Connected};
use tracing::{debug, info, warn};

use crate::{
    Seldom, Svid, TrustDomain, UnixPeer,
    pb::{
        self,
        spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer},
    },
    source::SECURITY_HEADER,
};

/// Connections of one process, and on one socket: a workload that leaks them does not use up those of all.
const MAX_OF_ONE: usize = 64;
const MAX_CONNECTIONS: usize = 4096;
/// Calls at a time on one connection; a source makes two or three.
const MAX_STREAMS: u32 = 64;
/// Bytes of a request, and of its headers: the requests are empty.
const MAX_MESSAGE: u16 = 16 * 1024;

/// What a caller is given.
#[derive(Debug, Clone)]
pub struct Issued {
    /// Its identities; the first is the one to use.
    pub svids: Vec<Svid>,
    /// Their trust domain.
    pub domain: TrustDomain,
    /// Whom to trust for that.
    pub roots: Vec<CertificateDer<'static>>,
    /// When there shall be others.
    pub renew: Renewal,
}

/// When somebody is given another SVID: after a time, and when the clock has jumped. What is valid is valid by the clock:
/// what was issued before a jump may be out of date after it, or not valid yet.
#[derive(Debug, Clone, Copy)]
pub struct Renewal {
    set: tokio::time::Instant,
    by_the_clock: SystemTime,
    after: Duration,
}

/// How often the clock is looked at.
const LOOK: Duration = Duration::from_secs(5);
/// By how much the clock may be off what has passed. Certificates are issued as if some minutes ago, and a clock that is
/// slewed is off by less than a thousandth.
const JUMP: Duration = Duration::from_secs(60);

impl Renewal {
    /// In so long from now.
    #[must_use]
    pub fn after(time: Duration) -> Self {
        Self { set: tokio::time::Instant::now(), by_the_clock: clock::now(), after: time }
    }

    /// Whether it is time.
    #[must_use]
    pub fn is_due(&self) -> bool {
        let passed = self.set.elapsed();
        passed >= self.after || jumped(self.by_the_clock, passed, clock::now())
    }

    /// Returns when it is.
    pub async fn due(&self) {
        while !self.is_due() {
            let left = self.after.saturating_sub(self.set.elapsed());
            tokio::time::sleep(left.min(LOOK)).await;
        }
    }
}

/// Whether the clock tells another time than follows from what has passed.
fn jumped(then: SystemTime, passed: Duration, now: SystemTime) -> bool {
    let expected = then + passed;
    now.duration_since(expected).unwrap_or_else(|earlier| earlier.duration()) > JUMP
}

/// Decides what callers are given.
#[tonic::async_trait]
pub trait Issuer: Send + Sync + 'static {
    /// What a caller is given first, or, waiting for it, after what it was `given`. May be dropped while it waits.
    ///
    /// # Errors
    /// It gets nothing, or nothing any more: what it is told.
    async fn next(&self, peer: &UnixPeer, given: Option<&Issued>) -> Result<Issued, Status>;
}

/// Serves the Workload API until `shutdown` is done; then its streams end.
///
/// # Errors
/// The server broke.
pub async fn serve(
    listener: UnixListener,
    issuer: Arc<dyn Issuer>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    let crowd = Crowd::default();
    let callers = futures::stream::unfold((listener, crowd), |(listener, crowd)| async move {
        loop {
            match listener.accept().await {
                // A caller that has gone already cannot be attested, and needs nothing.
                Ok((stream, _)) => match UnixPeer::of(&stream) {
                    Ok(peer) => match crowd.enter(peer.pid()) {
                        Some(counted) => {
                            let caller = Caller { stream, peer, _counted: counted };
                            return Some((Ok::<_, io::Error>(caller), (listener, crowd)));
                        }
                        None => {
                            if let Some(untold) = crowd.told.turn(Instant::now()) {
                                warn!(%peer, uid = peer.uid(), untold, "too many connections: one is closed");
                            }
                        }
                    },
                    Err(reason) => debug!(%reason, "a caller without a process"),
                },
                Err(reason) => {
                    // Out of descriptors, most likely: others will close some.
                    warn!(%reason, "cannot accept");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    });
    let (stop, stopped) = watch::channel(());
    let api = WorkloadApi { issuer, stopped };
    tonic::transport::Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(u32::from(MAX_MESSAGE))
        .add_service(SpiffeWorkloadApiServer::new(api).max_decoding_message_size(usize::from(MAX_MESSAGE)))
        .serve_with_incoming_shutdown(callers, async move {
            shutdown.await;
            drop(stop);
        })
        .await
}

/// What a caller is told of whom the kernel says nothing.
pub fn unattested(peer: &UnixPeer, reason: &io::Error) -> Status {
    if peer.pid().is_none() {
        info!(uid = peer.uid(), %reason, "a caller cannot be attested");
    }
    Status::permission_denied(format!("no identity issued: {reason}"))
}

struct WorkloadApi {
    issuer: Arc<dyn Issuer>,
    stopped: watch::Receiver<()>,
}

impl WorkloadApi {
    /// Answers now and again whenever there is something else, until the caller leaves or is denied.
    async fn stream<T: Send + 'static>(
        &self,
        request: &Request<impl Sized>,
        answer: impl Fn(&Issued) -> T + Send + Sync + 'static,
    ) -> Result<Response<Answers<T>>, Status> {
        if request.metadata().get(SECURITY_HEADER).is_none_or(|value| value != "true") {
            return Err(Status::invalid_argument("the metadata workload.spiffe.io: true is missing"));
        }
        let peer = request.extensions().get::<UnixPeer>().cloned();
        let peer = peer.ok_or_else(|| Status::internal("a caller without a socket"))?;
        let mut given = self.issuer.next(&peer, None).await?;
        let (issuer, mut stopped) = (self.issuer.clone(), self.stopped.clone());
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            while sender.send(Ok(answer(&given))).await.is_ok() {
                debug!(%peer, ids = ?given.svids.iter().map(Svid::id).collect::<Vec<_>>(), "issued");
                let next = tokio::select! {
                    next = issuer.next(&peer, Some(&given)) => next,
                    () = sender.closed() => return,
                    _ = stopped.changed() => return,
                };
                match next {
                    Ok(next) => given = next,
                    Err(status) => {
                        let _ = sender.send(Err(status)).await;
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn joined(certificates: &[CertificateDer<'_>]) -> Vec<u8> {
    certificates.iter().flat_map(|certificate| certificate.iter().copied()).collect()
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for WorkloadApi {
    type FetchX509SVIDStream = Answers<pb::X509svidResponse>;
    type FetchX509BundlesStream = Answers<pb::X509BundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<pb::X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        self.stream(&request, |issued| {
            let svid = |svid: &Svid| pb::X509svid {
                spiffe_id: svid.id().to_string(),
                x509_svid: joined(svid.chain()),
                x509_svid_key: svid.key().secret_pkcs8_der().to_vec(),
                bundle: joined(&issued.roots),
                hint: String::new(),
            };
            pb::X509svidResponse { svids: issued.svids.iter().map(svid).collect(), ..Default::default() }
        })
        .await
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<pb::X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        self.stream(&request, |issued| {
            let bundles = [(issued.domain.id().to_string(), joined(&issued.roots))];
            pb::X509BundlesResponse { crl: Vec::new(), bundles: bundles.into() }
        })
        .await
    }
}

/// A connection together with the process that made it.
struct Caller {
    stream: UnixStream,
    peer: UnixPeer,
    _counted: Counted,
}

/// The connections of a socket, by process; those that are not visible are one.
#[derive(Debug, Clone, Default)]
struct Crowd {
    of: Arc<Mutex<HashMap<Option<u32>, usize>>>,
    told: Arc<Seldom>,
}

impl Crowd {
    /// Counts one for as long as what is returned lives; `None` beyond the bounds.
    fn enter(&self, pid: Option<u32>) -> Option<Counted> {
        let mut crowd = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        let (all, its) = (crowd.values().sum::<usize>(), crowd.get(&pid).copied().unwrap_or_default());
        if all >= MAX_CONNECTIONS || its >= MAX_OF_ONE {
            return None;
        }
        crowd.insert(pid, its + 1);
        Some(Counted { crowd: self.clone(), pid })
    }
}

struct Counted {
    crowd: Crowd,
    pid: Option<u32>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut crowd = self.crowd.of.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(its) = crowd.get_mut(&self.pid) {
            *its -= 1;
            if *its == 0 {
                crowd.remove(&self.pid);
            }
        }
    }
}

impl Connected for Caller {
    type ConnectInfo = UnixPeer;
    fn connect_info(&self) -> UnixPeer {
        self.peer.clone()
    }
}

impl tokio::io::AsyncRead for Caller {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl tokio::io::AsyncWrite for Caller {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_jumps_is_noticed_and_one_that_is_slewed_is_not() {
        let (then, hours) =
            (SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 30), Duration::from_secs(36_000));
        assert!(!jumped(then, hours, then + hours));
        assert!(
            !jumped(then, hours, then + hours + hours / 2000)
                && !jumped(then, hours, then + hours - hours / 2000)
        );
        for jump in [Duration::from_secs(61), Duration::from_secs(7200)] {
            assert!(jumped(then, hours, then + hours + jump) && jumped(then, hours, then + hours - jump));
        }
    }
}
