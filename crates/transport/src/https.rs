//! HTTPS/1.1 for those who have no identity of the mesh: API servers, and nodes that ask for identities. Bounded in time
//! and connections; what bodies may be is for the routes to say.

use std::{
    collections::HashMap, convert::Infallible, future::Future, net::IpAddr, sync::Arc, time::Duration,
};

use arc_swap::ArcSwapOption;
use axum::body::Body;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use nsm_identity::Source;
use parking_lot::Mutex;
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tower::Service;
use tracing::{debug, info, warn};

/// How long a handshake may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an idle connection stays: API servers keep theirs.
const IDLE: Duration = Duration::from_secs(90);
/// Connections at a time, and those from one address.
const CONNECTIONS: (usize, usize) = (1024, 128);
/// How long connections have to end.
const DRAIN: Duration = Duration::from_secs(5);

/// The certificate that the server shows, whatever it is by then.
#[derive(Debug)]
pub struct Shown {
    own: ArcSwapOption<CertifiedKey>,
    svid: Option<Source>,
}

impl Shown {
    /// One that is put.
    #[must_use]
    pub fn own() -> Self {
        Self { own: ArcSwapOption::empty(), svid: None }
    }

    /// The X.509-SVID of the moment.
    #[must_use]
    pub fn svid(source: Source) -> Self {
        Self { own: ArcSwapOption::empty(), svid: Some(source) }
    }

    /// Shows another one from now on.
    pub fn put(&self, key: CertifiedKey) {
        self.own.store(Some(Arc::new(key)));
    }

    /// There is one.
    pub fn is_there(&self) -> bool {
        self.svid.is_some() || self.own.load().is_some()
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        match &self.svid {
            Some(source) => source.current().server_config().cert_resolver.resolve(hello),
            None => self.own.load_full(),
        }
    }
}

/// Serves until `shutdown` is done; then what was begun may end.
///
/// # Errors
/// TLS cannot be set up.
pub async fn serve<S>(
    listener: TcpListener,
    shown: &Arc<Shown>,
    routes: S,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), rustls::Error>
where
    S: Service<Request<Incoming>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let tls = tls(shown)?;
    let (stop, stopped) = watch::channel(());
    let (mut connections, census) = (JoinSet::new(), Census::default());
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, address)) => {
                    let Some(counted) = census.enter(address.ip(), connections.len()) else {
                        debug!(%address, "too many connections: one is closed");
                        continue;
                    };
                    let connection = connection(stream, tls.clone(), routes.clone(), stopped.clone());
                    connections.spawn(async move {
                        let _counted = counted;
                        if let Err(reason) = connection.await {
                            debug!(%address, reason, "a connection ended");
                        }
                    });
                }
                // Out of descriptors, most likely: must neither end nor spin the loop.
                Err(error) => {
                    warn!(%error, "cannot accept a connection");
                    sleep(Duration::from_millis(20)).await;
                }
            },
        }
    }
    drop((listener, stop));
    let drained = async { while connections.join_next().await.is_some() {} };
    if timeout(DRAIN, drained).await.is_err() {
        info!(connections = connections.len(), "requests did not end in time");
    }
    Ok(())
}

fn tls(shown: &Arc<Shown>) -> Result<TlsAcceptor, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::clone(shown) as Arc<dyn ResolvesServerCert>);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // A resumed session would show an old certificate.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn connection<S>(
    stream: TcpStream,
    tls: TlsAcceptor,
    routes: S,
    mut stopped: watch::Receiver<()>,
) -> Result<(), String>
where
    S: Service<Request<Incoming>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    // Answers are small and waited for.
    let _ = stream.set_nodelay(true);
    let stream = timeout(PATIENCE, tls.accept(stream)).await.map_err(|_| "no handshake in time")?;
    let stream = TokioIo::new(stream.map_err(|e| e.to_string())?);
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(IDLE).max_buf_size(64 * 1024);
    let connection = http.serve_connection(stream, TowerToHyperService::new(routes));
    tokio::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return ended.map_err(|e| e.to_string()),
        _ = stopped.changed() => connection.as_mut().graceful_shutdown(),
    }
    connection.await.map_err(|e| e.to_string())
}

/// How many connections each address has.
#[derive(Debug, Clone, Default)]
struct Census(Arc<Mutex<HashMap<IpAddr, usize>>>);

#[derive(Debug)]
struct Counted(Census, IpAddr);

impl Census {
    fn enter(&self, address: IpAddr, all: usize) -> Option<Counted> {
        let mut census = self.0.lock();
        let count = census.get(&address).copied().unwrap_or_default();
        if all >= CONNECTIONS.0 || count >= CONNECTIONS.1 {
            return None;
        }
        census.insert(address, count + 1);
        Some(Counted(self.clone(), address))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut census = self.0.0.lock();
        if let Some(count) = census.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                census.remove(&self.1);
            }
        }
    }
}
