//! Names for a client: nothing happens until a wire brings DNS servers. Then the forwarder listens and `resolv.conf`
//! points to it, until the client ends.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
};

use tokio::sync::Mutex;

use crate::{
    config::{Config, OWN},
    resolv::{self, ResolvConf},
    serve::Server,
};

/// What a client is told from outside.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where to listen.
    pub listen_on: SocketAddr,
    /// What to point there; `None`: `/etc/resolv.conf`, if it is a mount of its own.
    pub resolv_conf: Option<PathBuf>,
}

/// The names of a pod.
#[derive(Debug)]
pub struct Names {
    options: Options,
    /// `None`: no wire has brought DNS servers yet, or it could not be begun.
    server: Mutex<Option<Server>>,
    /// It could not be begun, and that was said: each refresh tries again.
    told: AtomicBool,
}

/// Why names cannot be served.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(
        "{0} cannot be listened on for DNS: {1}; names of services are not resolved (NSM_LOCAL_DNS_SERVER_ADDRESS)"
    )]
    Listen(SocketAddr, std::io::Error),
    #[error(
        "resolv.conf cannot name a port: DNS is served at {0}, but programs ask port 53; expected NSM_LOCAL_DNS_SERVER_ADDRESS with port 53"
    )]
    Port(SocketAddr),
    #[error(transparent)]
    ResolvConf(#[from] resolv::Error),
}

impl Names {
    /// Puts back what a killed predecessor left.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let names = Self { options, server: Mutex::default(), told: AtomicBool::new(false) };
        match names.file().and_then(|file| file.restore()) {
            Ok(true) => tracing::info!("resolv.conf is as it was before an earlier client was killed"),
            Ok(false) => {}
            // Said again, louder, when it is needed.
            Err(error) => tracing::debug!(%error, "resolv.conf"),
        }
        names
    }

    /// What a wire brought, instead of what it brought before. What cannot be done is logged: a wire without names is
    /// better than none.
    pub async fn set(&self, id: &str, configs: Vec<Config>) {
        let mut server = self.server.lock().await;
        if server.is_none() && configs.iter().any(|config| !config.servers.is_empty()) {
            match self.begin().await {
                Ok(begun) => *server = Some(begun),
                Err(error) if !self.told.swap(true, Ordering::Relaxed) => tracing::error!(%error, "no DNS"),
                Err(error) => tracing::debug!(%error, "still no DNS"),
            }
        }
        if let Some(server) = &*server {
            server.set(id, configs);
        }
    }

    /// Puts `resolv.conf` back and stops serving.
    pub async fn stop(&self) {
        // In this order: whoever asks meanwhile is answered by one or the other.
        if let Some(server) = self.server.lock().await.take() {
            if let Err(error) = self.file().and_then(|file| file.restore()) {
                tracing::error!(%error, "resolv.conf stays as it is; the next start of a client puts it back");
            }
            drop(server);
        }
    }

    fn file(&self) -> Result<ResolvConf, resolv::Error> {
        self.options.resolv_conf.clone().map_or_else(ResolvConf::of_this_pod, |path| Ok(ResolvConf::at(path)))
    }

    async fn begin(&self) -> Result<Server, Error> {
        let address = self.options.listen_on;
        let server = Server::bind(address).await.map_err(|error| Error::Listen(address, error))?;
        if server.address().port() != 53 {
            return Err(Error::Port(server.address()));
        }
        let own = self.file()?.take_over(address.ip())?;
        tracing::info!(%address, servers = own.servers.len(), "names are served; resolv.conf points here");
        server.set(OWN, vec![own]);
        Ok(server)
    }
}
