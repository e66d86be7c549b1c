//! What all roles share: log, identity, signals, readiness.

use std::{
    future::Future, io::IsTerminal as _, net::IpAddr, os::unix::net::UnixDatagram, path::Path, sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use clap::Args;
use ipnet::IpNet;
use nsm_identity::{Source, SpiffeId};
use nsm_kernel::resident::Program;
use nsm_mesh::{Inspector, inspect::Served, metrics::Metrics};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tracing_subscriber::{
    EnvFilter, Layer as _, filter::filter_fn, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

use crate::telemetry::{Exported, Telemetry};

/// Flags of every role.
#[derive(Debug, Clone, Args)]
pub(crate) struct Common {
    /// What to log: error, warn, info, debug, trace, or a filter such as `info,nsm_mesh=debug`
    #[arg(long, env = "NSM_LOG_LEVEL", default_value = "info", hide_env_values = true)]
    pub(crate) log_level: String,
    /// How log lines look
    #[arg(long, env = "NSM_LOG_FORMAT", default_value = "text", value_name = "text|json", value_parser = ["text", "json"], hide_possible_values = true, hide_env_values = true)]
    pub(crate) log_format: String,
    /// Directory of the socket by which root and this process's user look at it (`nsm get`, `explain`, `check`, `log`);
    /// empty: none
    #[arg(
        long,
        env = "NSM_INTROSPECT_DIR",
        default_value = "/run/nsm/introspect",
        value_name = "DIR",
        hide_env_values = true
    )]
    pub(crate) introspect_dir: String,
    /// Let root, and this process's user, of other containers look at it by that socket too, where they have its
    /// directory mounted; by default only those of its own container and of the node
    #[arg(
        long,
        env = "NSM_INTROSPECT_CONTAINERS",
        default_value_t = false,
        action = clap::ArgAction::Set,
        hide_env_values = true
    )]
    pub(crate) introspect_containers: bool,
    /// SPIFFE IDs that may look at this process over mTLS, where it serves others; by default none
    #[arg(
        long,
        env = "NSM_INTROSPECT_READERS",
        value_delimiter = ',',
        value_name = "SPIFFE_ID",
        hide_env_values = true
    )]
    pub(crate) introspect_readers: Vec<SpiffeId>,
    #[command(flatten)]
    pub(crate) telemetry: Telemetry,
    #[arg(skip)]
    inspector: Arc<Inspector>,
    // Flags are read before there are other threads.
    #[arg(skip = Arc::new(Program::at_start()))]
    program: Arc<Program>,
}

/// By then programs that start together have met, with handshakes whose code is seldom needed again.
const MET: Duration = Duration::from_secs(3);

/// What the process tells of itself while its role starts.
#[derive(Debug, Clone)]
pub(crate) struct Process(Arc<Inspector>, Arc<Program>);

impl Common {
    /// This process, for its role.
    pub(crate) fn process(&self) -> Process {
        Process(Arc::clone(&self.inspector), Arc::clone(&self.program))
    }
}

impl Process {
    /// Waits for an identity; says so, because without one nothing else happens.
    pub(crate) async fn identity(&self) -> Result<Source> {
        notify("STATUS=waiting for an identity");
        self.0.status("waiting for an identity");
        let source = Source::from_env().await.context("no identity")?;
        self.0.identity(&source);
        self.0.status("has an identity, starting");
        Ok(source)
    }

    /// Everything is there.
    pub(crate) fn ready(&self) {
        self.0.status("");
        let program = Arc::clone(&self.1);
        tokio::spawn(async move {
            tokio::time::sleep(MET).await;
            program.let_go();
        });
        notify("READY=1");
    }

    /// What it waits for.
    pub(crate) fn waits(&self, status: &str) {
        self.0.status(status);
        notify(&format!("STATUS={status}"));
    }

    /// Whoever asks this process asks him.
    pub(crate) fn inspector(&self) -> &Arc<Inspector> {
        &self.0
    }
}

/// Metrics, for the roles that serve connections.
#[derive(Debug, Clone, Args)]
pub(crate) struct Measured {
    /// Where to serve metrics in Prometheus' form, at /metrics, for example 127.0.0.1:8081; without it nowhere
    #[arg(long, env = "NSM_PROMETHEUS_LISTEN_ON", value_name = "HOST:PORT")]
    prometheus_listen_on: Option<String>,
    /// As upstream's: `true` serves metrics at :8081, where nothing else is said
    #[arg(long, env = "PROMETHEUS", value_name = "true|false", hide_env_values = true)]
    prometheus: Option<String>,
}

impl Measured {
    /// The metrics of a role, served from now on where that is wanted.
    pub(crate) async fn start(&self, process: &Process) -> Result<Arc<Metrics>> {
        let metrics = Arc::new(Metrics::of(Arc::clone(&process.0)));
        let upstreams = self.prometheus.as_deref() == Some("true");
        let Some(address) = self.prometheus_listen_on.as_deref().or(upstreams.then_some(":8081")) else {
            return Ok(metrics);
        };
        let every = address.starts_with(':').then(|| format!("[::]{address}"));
        let listener = tokio::net::TcpListener::bind(every.as_deref().unwrap_or(address))
            .await
            .with_context(|| format!("metrics cannot be served at {address:?} (NSM_PROMETHEUS_LISTEN_ON)"))?;
        let served = Arc::clone(&metrics);
        let text = [("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")];
        let page = axum::routing::get(async move || {
            let page = tokio::task::spawn_blocking(move || served.text()).await;
            (text, page.unwrap_or_default())
        });
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

/// An address, or a prefix that it is in.
pub(crate) fn address_or_prefix(text: &str) -> Result<IpNet, String> {
    text.parse::<IpAddr>().map(IpNet::from).or_else(|_| text.parse::<IpNet>()).map_err(|_| {
        format!("{text:?} is neither an address nor a prefix; expected for example 10.0.0.1 or 10.0.0.0/24")
    })
}

/// Runs a role until it ends or a signal comes.
pub(crate) fn run(
    common: &Common,
    role: &str,
    name: &str,
    serve: impl Future<Output = Result<()>>,
) -> Result<()> {
    common.inspector.name(role, name);
    common.inspector.readers(common.introspect_readers.iter().cloned());
    // One thread for everything that does not block: a request is a few short steps that wait for each other, and to
    // wake another thread for each costs more than the steps. What blocks (the kernel, files) has threads beside it.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the runtime cannot start")?;
    let inside = runtime.enter();
    let exported = common.telemetry.start(name)?;
    if let Some(exported) = exported.as_ref().filter(|_| role == "manager" || role == "node") {
        exported.count_segments(&common.inspector);
    }
    let log = Log::start(common, exported.as_ref())?;
    // Every wire needs descriptors; the usual soft limit is meant for programs that use select(2).
    if let Err(error) = nsm_transport::raise_descriptor_limit() {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
    log.follow_signals()?;
    let told = Arc::clone(&log);
    common.inspector.log(Box::new(move |filter| told.set(filter)));
    let _looked_at = serve_owner(common, role, name);
    drop(inside);
    let served = runtime.block_on(serve);
    if let Some(exported) = exported {
        // On another thread: this one carries what is sent.
        let flushed = runtime.block_on(runtime.spawn_blocking(move || exported.flush()));
        flushed.context("what was measured last cannot be sent")?;
    }
    // What still blocks then, a look-up of a name for example, ends with the process.
    runtime.shutdown_timeout(Duration::from_secs(2));
    served
}

/// The socket by which the owner looks at this process. Nothing of the mesh depends on it: without it, it goes on.
fn serve_owner(common: &Common, role: &str, name: &str) -> Option<Served> {
    let directory = Some(&common.introspect_dir).filter(|directory| !directory.is_empty())?;
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-._".contains(c) { c } else { '_' };
    // A socket's path has at most 107 bytes.
    let name: String = name.chars().map(plain).take(48).collect();
    let serve = |file: String| {
        common.inspector.serve_owner(&Path::new(directory).join(file), common.introspect_containers)
    };
    let served = match serve(format!("{role}-{name}.sock")) {
        // Names of workloads may be those of others of this node.
        Err(nsm_identity::Error::SocketInUse(_)) => {
            serve(format!("{role}-{name}-{}.sock", std::process::id()))
        }
        served => served,
    };
    let explained = |e: &nsm_identity::Error| nsm_identity::explain(e);
    served
        .inspect_err(
            |e| tracing::warn!(error = %explained(e), "nobody can look at this process (NSM_INTROSPECT_DIR)"),
        )
        .ok()
}

/// What is logged, changed while the process runs.
struct Log {
    change: Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>,
    first: String,
    inspector: Arc<Inspector>,
}

impl Log {
    fn start(common: &Common, exported: Option<&Exported>) -> Result<Arc<Self>> {
        let first = filter(&common.log_level).ok_or_else(|| anyhow!(bad_level(&common.log_level)))?;
        let text = first.to_string();
        let (filter, handle) = tracing_subscriber::reload::Layer::new(first);
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let lines = match common.log_format.as_str() {
            "json" => lines.json().boxed(),
            _ => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        };
        // The client library of Kubernetes logs an error for each try; what it means is ours to say, once.
        let lines = lines.with_filter(filter_fn(|event| {
            !event.target().starts_with("kube_client") || *event.level() > tracing::Level::INFO
        }));
        let spans = exported.map(Exported::layer);
        tracing_subscriber::registry().with(filter).with(lines).with(spans).init();
        common.inspector.log_level(&text);
        let change = Box::new(move |filter| handle.reload(filter).map_err(|e| e.to_string()));
        Ok(Arc::new(Self { change, first: text, inspector: Arc::clone(&common.inspector) }))
    }

    /// Sets a level or filter; empty: that of the start. Answers with what it is.
    fn set(&self, level: &str) -> Result<String, String> {
        let level = if level.is_empty() { &self.first } else { level };
        let filter = filter(level).ok_or_else(|| bad_level(level))?;
        let text = filter.to_string();
        (self.change)(filter)?;
        self.inspector.log_level(&text);
        tracing::warn!(level = text, "the log level was changed");
        Ok(text)
    }

    /// As upstream: USR1 logs everything, USR2 what was logged at the start (spec/kubernetes.md 2).
    fn follow_signals(self: &Arc<Self>) -> Result<()> {
        for (kind, level) in [(SignalKind::user_defined1(), "trace"), (SignalKind::user_defined2(), "")] {
            let (mut signals, log) = (signal(kind).context("signals cannot be caught")?, Arc::clone(self));
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    if let Err(error) = log.set(level) {
                        tracing::warn!(error, "the log level stays as it is");
                    }
                }
            });
        }
        Ok(())
    }
}

fn bad_level(level: &str) -> String {
    format!(
        "log level {level:?}: expected off, error, warn, info, debug, trace, or a filter such as info,nsm_mesh=debug"
    )
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
