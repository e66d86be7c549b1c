//! What all roles share: log, identity, signals, readiness.

use std::{future::Future, io::IsTerminal as _, os::unix::net::UnixDatagram, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use clap::Args;
use ipnet::IpNet;
use nsm_mesh::metrics::Metrics;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tracing_subscriber::EnvFilter;

/// Flags of every role.
#[derive(Debug, Clone, Args)]
pub(crate) struct Common {
    /// What to log: error, warn, info, debug, trace, or a filter such as `info,nsm_mesh=debug`
    #[arg(long, env = "NSM_LOG_LEVEL", default_value = "info", hide_env_values = true)]
    pub(crate) log_level: String,
    /// Log lines as JSON
    #[arg(long, env = "NSM_LOG_JSON")]
    pub(crate) log_json: bool,
}

/// Metrics, for the roles that serve connections.
#[derive(Debug, Clone, Args)]
pub(crate) struct Measured {
    /// Where to serve metrics in Prometheus' form, at /metrics, for example 127.0.0.1:8081; without it nowhere
    #[arg(long, env = "NSM_PROMETHEUS_LISTEN_ON", value_name = "HOST:PORT")]
    prometheus_listen_on: Option<String>,
}

impl Measured {
    /// The metrics of a role, served from now on where that is wanted.
    pub(crate) async fn start(&self) -> Result<Arc<Metrics>> {
        let metrics = Arc::new(Metrics::default());
        let Some(address) = &self.prometheus_listen_on else { return Ok(metrics) };
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .with_context(|| format!("metrics cannot be served at {address:?} (NSM_PROMETHEUS_LISTEN_ON)"))?;
        let served = Arc::clone(&metrics);
        let text = [("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")];
        let page = axum::routing::get(move || async move { (text, served.text()) });
        let routes = axum::Router::new().route("/metrics", page);
        tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, routes).await {
                tracing::error!(%error, "metrics are not served any more");
            }
        });
        Ok(metrics)
    }
}

/// How long tokens live, for the roles that make them.
#[derive(Debug, Clone, Args)]
pub(crate) struct Tokens {
    /// How long the tokens that we sign live; a wire whose client is dead goes when they expire
    #[arg(long, env = "NSM_MAX_TOKEN_LIFETIME", default_value = "10m", value_parser = duration)]
    pub(crate) max_token_lifetime: Duration,
}

/// A duration as upstream writes it: `750ms`, `10m`, `1h30m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|e| format!("{e}; expected for example 750ms, 15s or 10m"))
}

/// A duration that is not zero.
pub(crate) fn positive_duration(text: &str) -> Result<Duration, String> {
    duration(text).and_then(|time| match time.is_zero() {
        true => Err("it is zero; expected for example 200ms or 1s".into()),
        false => Ok(time),
    })
}

/// `key:value` pairs of an environment list.
pub(crate) fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once(':').or_else(|| text.split_once('=')) {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err(format!("{text:?} is not KEY:VALUE")),
    }
}

/// A prefix: the library's own error does not say what one looks like.
pub(crate) fn prefix(text: &str) -> Result<IpNet, String> {
    text.parse().map_err(|_| "expected ADDRESS/LENGTH, for example 172.16.1.0/24 or 2001:db8::/64".to_owned())
}

/// Runs a role until it ends or a signal comes.
pub(crate) fn run(common: &Common, role: impl Future<Output = Result<()>>) -> Result<()> {
    let filter = filter(&common.log_level)
        .ok_or_else(|| anyhow!("log level {:?}: expected off, error, warn, info, debug, trace, or a filter such as info,nsm_mesh=debug", common.log_level))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if common.log_json {
        log.json().init();
    } else {
        log.with_ansi(std::io::stderr().is_terminal()).init();
    }
    // Every wire needs descriptors; the usual soft limit is meant for programs that use select(2).
    if let Err(error) = nsm_transport::raise_descriptor_limit() {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the runtime cannot start")?
        .block_on(role)
}

/// A single word is a level: the filter's own grammar would take it for a module that nobody has.
fn filter(level: &str) -> Option<EnvFilter> {
    let level = normal_level(level);
    let word = !level.contains(['=', ',', '[', ':']);
    if word && level.parse::<tracing::level_filters::LevelFilter>().is_err() {
        return None;
    }
    EnvFilter::try_new(level).ok()
}

/// Upstream's words for levels, in any case, are taken too.
fn normal_level(level: &str) -> String {
    match level.to_ascii_lowercase().as_str() {
        "warning" => "warn".into(),
        "fatal" | "panic" => "error".into(),
        lower => lower.into(),
    }
}

/// INT, TERM, HUP and QUIT end a role in good order, as they end every upstream program.
#[derive(Debug, Clone)]
pub(crate) struct Shutdown(watch::Receiver<bool>);

impl Shutdown {
    /// Catches the signals from now on.
    pub(crate) fn on_signals() -> Result<Self> {
        Self::on([SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()])
    }

    /// Catches only these: for a role that a hangup tells something else.
    pub(crate) fn on(kinds: impl IntoIterator<Item = SignalKind>) -> Result<Self> {
        let (tell, told) = watch::channel(false);
        for kind in kinds {
            let (mut signals, tell) = (signal(kind).context("signals cannot be caught")?, tell.clone());
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    tell.send_replace(true);
                }
            });
        }
        Ok(Self(told))
    }

    /// Returns when a signal has come.
    pub(crate) async fn wait(mut self) {
        // The senders live as long as the runtime.
        let _ = self.0.wait_for(|ended| *ended).await;
    }
}

/// Tells the service manager something (sd_notify(3)): `READY=1`, `STATUS=…`. Without one nothing happens.
pub(crate) fn notify(message: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = UnixDatagram::unbound().and_then(|socket| socket.send_to(message.as_bytes(), &path));
    if let Err(error) = sent {
        tracing::debug!(%error, "the service manager cannot be told");
    }
}
