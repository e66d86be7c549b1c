//! What an operator asks: `nsm get`, `nsm explain`, `nsm check`, `nsm log`. Everything comes from the introspection
//! sockets of the processes (`nsm.introspect.v1`); this module finds and asks them, [`cluster`] those of a Kubernetes.

pub(crate) mod check;
pub(crate) mod cluster;
pub(crate) mod explain;
pub(crate) mod get;
pub(crate) mod log;
pub(crate) mod tell;

use std::{
    collections::BTreeMap,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use nsm_api::pb::introspect::{
    Connection, Endpoint, Failure, Kind, LogLevel, Process, Query, Service, Wire,
    introspect_client::IntrospectClient, item::What,
};
use nsm_identity::explain;
use nsm_lab::{Front, plan::Paths};
use nsm_mesh::inspect;
use nsm_transport::{DialUrl, Pool, PoolConfig};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use self::cluster::Cluster;

/// How long a process may take to tell all it knows.
const PATIENCE: Duration = Duration::from_secs(10);

/// Which processes are asked.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct At {
    /// The lab whose processes are asked; without it those of this node, or else those of the only lab that runs
    #[arg(long, value_name = "NAME")]
    lab: Option<String>,
    /// Processes to ask: unix:///path of an introspection socket, or tcp://host:port over mTLS, with an identity from
    /// SPIFFE_ENDPOINT_SOCKET that the process lists in NSM_INTROSPECT_READERS
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    at: Vec<DialUrl>,
    #[command(flatten)]
    cluster: Cluster,
}

/// One process, and what it told.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Seen {
    /// Where it was asked.
    pub(crate) url: String,
    /// The pod that it is in, where it is in one of a cluster.
    #[serde(skip)]
    pub(crate) pod: Option<cluster::Pod>,
    pub(crate) process: Process,
    pub(crate) connections: Vec<Connection>,
    pub(crate) failures: Vec<Failure>,
    pub(crate) services: Vec<Service>,
    pub(crate) endpoints: Vec<Endpoint>,
    pub(crate) wires: Vec<Wire>,
}

/// All that was told.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct View {
    pub(crate) seen: Vec<Seen>,
    /// Who did not tell, and why.
    pub(crate) silent: Vec<Silent>,
    /// By the pods of a cluster, in which workloads are not asked.
    #[serde(skip)]
    pub(crate) of_cluster: bool,
}

/// A socket without an answer.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Silent {
    pub(crate) url: String,
    pub(crate) why: String,
    /// Its process is gone.
    pub(crate) stale: bool,
}

/// Whom to ask.
#[derive(Debug, Clone)]
pub(crate) enum Mesh {
    Sockets(Vec<DialUrl>),
    Cluster(Cluster),
}

/// Where to ask, found.
enum Found {
    Mesh(Mesh),
    /// Asked elsewhere already: this is the exit status.
    Elsewhere(i32),
}

impl At {
    /// Runs a command on the processes; for a lab of an ordinary user, where the lab is.
    pub(crate) fn run(&self, command: impl AsyncFnOnce(Mesh) -> Result<ExitCode>) -> Result<ExitCode> {
        let mesh = match self.find()? {
            Found::Mesh(mesh) => mesh,
            Found::Elsewhere(status) => return Ok(ExitCode::from(u8::try_from(status).unwrap_or(1))),
        };
        Self::run_alone(command(mesh))
    }

    /// Whether the processes are those of a cluster.
    pub(crate) fn is_cluster(&self) -> bool {
        self.cluster.is_meant()
    }

    /// Runs a command that asks nobody.
    pub(crate) fn run_alone(command: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.context("the runtime cannot start")?.block_on(command)
    }

    fn find(&self) -> Result<Found> {
        let found = |urls| Ok(Found::Mesh(Mesh::Sockets(urls)));
        if self.is_cluster() {
            return Ok(Found::Mesh(Mesh::Cluster(self.cluster.clone())));
        }
        if !self.at.is_empty() {
            return found(self.at.clone());
        }
        let exe = PathBuf::from("/proc/self/exe");
        let front = Front { exe, name: None, format: nsm_lab::Format::text() };
        let labs = front.names();
        let lab = match &self.lab {
            Some(lab) if labs.contains(lab) => lab,
            Some(lab) => bail!("no lab {lab:?} runs here; {}", known(labs.iter())),
            None => {
                let node = std::env::var("NSM_INTROSPECT_DIR").unwrap_or_default();
                let node = if node.is_empty() { "/run/nsm/introspect" } else { &node };
                let sockets = sockets(Path::new(node))?;
                // What a killed process left does not hide a lab.
                let live = |url: &DialUrl| matches!(url, DialUrl::Unix(path) if !is_stale(path));
                let mut of_labs = labs.iter();
                match (of_labs.next(), of_labs.next()) {
                    _ if sockets.iter().any(live) => return found(sockets),
                    (None, _) => return found(sockets),
                    (Some(only), None) => only,
                    _ => bail!("several labs run here: say --lab NAME; {}", known(labs.iter())),
                }
            }
        };
        let args: Vec<String> = std::env::args().skip(1).collect();
        if let Some(status) = front.inside(lab, &args)? {
            return Ok(Found::Elsewhere(status));
        }
        found(sockets(&Paths::new(lab).introspect())?)
    }
}

fn known<'n>(labs: impl Iterator<Item = &'n String>) -> String {
    let names: Vec<_> = labs.map(String::as_str).collect();
    if names.is_empty() { "there is none".into() } else { format!("there are {}", names.join(", ")) }
}

fn sockets(directory: &Path) -> Result<Vec<DialUrl>> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(error).with_context(|| {
                format!(
                    "{} cannot be read: processes are looked at by root and by their user",
                    directory.display()
                )
            });
        }
    };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "sock"));
    paths.sort();
    Ok(paths.into_iter().map(DialUrl::Unix).collect())
}

fn is_stale(path: &Path) -> bool {
    let refused = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
    std::os::unix::net::UnixStream::connect(path).err().is_some_and(refused)
}

impl Mesh {
    /// What there is.
    pub(crate) async fn view(&self, kinds: &[Kind], verify: bool) -> Result<View> {
        match self {
            Self::Sockets(urls) => Ok(view(urls, kinds, verify).await),
            Self::Cluster(cluster) => cluster.view(kinds, verify).await,
        }
    }
}

/// Asks all of them at once.
async fn view(urls: &[DialUrl], kinds: &[Kind], verify: bool) -> View {
    let query = Query { kinds: kinds.iter().map(|kind| (*kind).into()).collect(), verify };
    let asked = futures::future::join_all(urls.iter().map(async |url| {
        if let DialUrl::Unix(path) = url
            && is_stale(path)
        {
            return Err(("its process is gone and has left its socket".to_owned(), true));
        }
        match tokio::time::timeout(PATIENCE, ask(url, query.clone())).await {
            Ok(told) => told.map_err(|error| (format!("{error:#}"), false)),
            Err(_) => Err((format!("it does not answer within {PATIENCE:?}"), false)),
        }
    }));
    let mut view = View::default();
    for (url, answer) in urls.iter().zip(asked.await) {
        match answer {
            Ok(seen) => view.seen.push(seen),
            Err((why, stale)) => view.silent.push(Silent { url: url.to_string(), why, stale }),
        }
    }
    view
}

type Client = IntrospectClient<tonic::transport::Channel>;

/// A client on a process's own socket.
async fn owner(path: &Path) -> Result<Client> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("unix://{}", path.display()))?;
    let channel = endpoint.connect().await.map_err(|e| anyhow::anyhow!("{}", explain(&e)))?;
    Ok(IntrospectClient::new(channel))
}

async fn ask(url: &DialUrl, query: Query) -> Result<Seen> {
    let mut items = match url {
        DialUrl::Unix(path) => owner(path).await?.look(query).await.map_err(said)?.into_inner(),
        DialUrl::Tcp(_) => {
            let source = nsm_identity::Source::from_env().await.context("no identity to ask with")?;
            let pool = Pool::new(source, PoolConfig::default());
            let channel = pool.get(url, PATIENCE).await.map_err(|e| anyhow::anyhow!("{}", explain(&e)))?;
            IntrospectClient::new(channel).look(query).await.map_err(said)?.into_inner()
        }
    };
    let mut seen = Seen { url: url.to_string(), ..Seen::default() };
    while let Some(item) = items.message().await.map_err(said)? {
        match item.what {
            Some(What::Process(process)) => seen.process = plain(process),
            Some(What::Connection(connection)) => seen.connections.push(plain(connection)),
            Some(What::Failure(failure)) => seen.failures.push(plain(failure)),
            Some(What::Service(service)) => seen.services.push(plain(service)),
            Some(What::Endpoint(endpoint)) => seen.endpoints.push(plain(endpoint)),
            Some(What::Wire(wire)) => seen.wires.push(plain(wire)),
            // Something that a newer process knows of.
            None => {}
        }
    }
    Ok(seen)
}

fn said(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{:?}: {}", status.code(), without_controls(status.message()))
}

/// What a process told, without what would act on a terminal: peers of the mesh chose most of these texts.
fn plain<T: Serialize + DeserializeOwned + Default>(told: T) -> T {
    fn clean(value: Value) -> Value {
        match value {
            Value::String(text) => Value::String(without_controls(&text)),
            Value::Array(items) => items.into_iter().map(clean).collect(),
            Value::Object(fields) => {
                fields.into_iter().map(|(key, value)| (without_controls(&key), clean(value))).collect()
            }
            other => other,
        }
    }
    // Messages of texts and numbers always come back.
    serde_json::to_value(told).map(clean).and_then(serde_json::from_value).unwrap_or_default()
}

fn without_controls(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

impl View {
    /// Fails with a reason that helps if nobody told anything; says on stderr who is missing otherwise.
    pub(crate) fn demand(&self) -> Result<()> {
        if self.seen.is_empty() {
            let silent: Vec<_> = self.silent.iter().map(|s| format!("{}: {}", s.url, s.why)).collect();
            let hint =
                "is a mesh running here? `nsm lab up FILE` starts one, `nsm check` says what is missing";
            match silent.is_empty() {
                true => bail!("no process of nsm is found ({hint})"),
                false => bail!("no process of nsm answers: {}", silent.join("; ")),
            }
        }
        for silent in self.silent.iter().filter(|silent| !silent.stale) {
            eprintln!("nsm: {} is left out: {}", silent.url, silent.why);
        }
        Ok(())
    }

    /// The process of that name as paths have it.
    pub(crate) fn named(&self, name: &str) -> Option<&Seen> {
        self.seen.iter().find(|seen| seen.process.name == name)
    }

    /// Endpoints of all directories, each once; the registry's word before a manager's, but for who builds wires.
    pub(crate) fn endpoints(&self) -> Vec<Endpoint> {
        let mut all = BTreeMap::<String, Endpoint>::new();
        for seen in self.directories() {
            for endpoint in &seen.endpoints {
                let known = all.entry(endpoint.name.clone()).or_insert_with(|| endpoint.clone());
                known.forwarder |= endpoint.forwarder;
            }
        }
        all.into_values().collect()
    }

    /// Services of all directories, each once.
    pub(crate) fn services(&self) -> Vec<Service> {
        let mut all = BTreeMap::<String, Service>::new();
        for seen in self.directories() {
            for service in &seen.services {
                all.entry(service.name.clone()).or_insert_with(|| service.clone());
            }
        }
        all.into_values().collect()
    }

    fn directories(&self) -> impl Iterator<Item = &Seen> {
        let of = |registry: bool| move |seen: &&Seen| (seen.process.role == "registry") == registry;
        self.seen.iter().filter(of(true)).chain(self.seen.iter().filter(of(false)))
    }

    /// Every connection from its client to its endpoint, with all hops that told of it, in the order of the path.
    pub(crate) fn wired(&self) -> Vec<Wired<'_>> {
        let mut all = BTreeMap::<(&str, &str), Wired<'_>>::new();
        for seen in &self.seen {
            for connection in &seen.connections {
                let Some(first) = connection.hops.first() else { continue };
                let wired = all.entry((&first.name, &first.id)).or_default();
                wired.hops.push((seen, connection));
            }
        }
        for wired in all.values_mut() {
            wired.hops.sort_by_key(|(_, connection)| connection.index);
        }
        all.into_values().collect()
    }
}

/// One connection, as those on its path know it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wired<'v> {
    pub(crate) hops: Vec<(&'v Seen, &'v Connection)>,
}

impl<'v> Wired<'v> {
    /// As the hop next to the client has it.
    pub(crate) fn front(&self) -> &'v Connection {
        self.hops[0].1
    }

    /// The longest path that anybody knows.
    pub(crate) fn path(&self) -> &'v [nsm_api::pb::introspect::Hop] {
        let longest =
            self.hops.iter().map(|(_, connection)| &connection.hops[..]).max_by_key(|path| path.len());
        longest.unwrap_or_default()
    }

    /// The first token of the path that expires.
    pub(crate) fn expires(&self) -> i64 {
        self.path().iter().map(|hop| hop.token_expires).filter(|at| *at > 0).min().unwrap_or_default()
    }
}

/// Changes what is logged.
pub(crate) async fn set_log(url: &DialUrl, filter: &str) -> Result<String> {
    let DialUrl::Unix(path) = url else { bail!("{url}: the log is changed on a process's own socket only") };
    let mut client = owner(path).await?;
    let set = client.set_log_level(LogLevel { filter: filter.into() }).await.map_err(said)?;
    Ok(set.into_inner().filter)
}

/// A duration in at most two units: `1h 5m`, `12s`, `80ms`.
pub(crate) fn short(duration: Duration) -> String {
    let (seconds, millis) = (duration.as_secs(), duration.subsec_millis());
    let units = [(86_400, "d"), (3600, "h"), (60, "m"), (1, "s")];
    let Some(at) = units.iter().position(|(size, _)| seconds >= *size) else { return format!("{millis}ms") };
    let (size, name) = units[at];
    let rest = units.get(at + 1).map(|(less, name)| ((seconds % size) / less, name)).filter(|(n, _)| *n > 0);
    let rest = rest.map(|(n, name)| format!("{n}{name}")).unwrap_or_default();
    format!("{}{name}{rest}", seconds / size)
}

/// How long ago that was; empty for never.
pub(crate) fn age(at: i64, now: SystemTime) -> String {
    match u64::try_from(inspect::millis(now).saturating_sub(at)) {
        Ok(past) if at > 0 => short(Duration::from_millis(past)),
        _ => String::new(),
    }
}

/// How long until then: `expired 3s ago` when it is past, empty for never.
pub(crate) fn left(at: i64, now: SystemTime) -> String {
    if at == 0 {
        return String::new();
    }
    match u64::try_from(at.saturating_sub(inspect::millis(now))) {
        Ok(left) => short(Duration::from_millis(left)),
        Err(_) => format!("expired {} ago", age(at, now)),
    }
}

/// Writes output; a reader who has seen enough is no error.
pub(crate) fn put(text: &str) -> Result<()> {
    match io::stdout().lock().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.context("the answer cannot be written"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_cannot_act_on_a_terminal() {
        let decision = nsm_api::pb::introspect::Decision { why: "a\x07b".into(), ..Default::default() };
        let bad = Connection {
            id: "c\x1b[2J".into(),
            labels: [("k\u{9b}".to_owned(), "v\n".to_owned())].into(),
            decisions: vec![decision],
            answers: u64::MAX,
            since: -1,
            ..Connection::default()
        };
        let told = plain(bad.clone());
        assert_eq!((told.id.as_str(), told.decisions[0].why.as_str()), ("c [2J", "a b"));
        assert_eq!(told.labels, [("k ".to_owned(), "v ".to_owned())].into());
        assert_eq!(plain(told.clone()), told);
        assert_eq!((told.answers, told.since), (u64::MAX, -1));
        let wire = Wire { near: None, far: Some(nsm_api::pb::introspect::End::default()), ..Wire::default() };
        assert_eq!(plain(wire.clone()), wire);
    }

    #[test]
    fn durations_have_two_units() {
        let table =
            [(80, "80ms"), (12_000, "12s"), (65_000, "1m5s"), (7_200_000, "2h"), (90_061_000, "1d1h")];
        for (millis, text) in table {
            assert_eq!(short(Duration::from_millis(millis)), text);
        }
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
        assert_eq!((age(40_000, now).as_str(), age(0, now).as_str()), ("1m", ""));
        assert_eq!((left(103_000, now).as_str(), left(97_000, now).as_str()), ("3s", "expired 3s ago"));
    }
}
