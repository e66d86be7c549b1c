//! `nsm get`: what there is, as a table or for programs.

use std::{
    io::{self, IsTerminal as _},
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use nsm_api::pb::introspect::{End, Kind, Wire};
use nsm_lab::{
    Format,
    report::{plain_table, render},
};
use serde::Serialize;

use super::{At, Seen, View, Wired, age, left, put};

/// How often `--watch` asks; of a cluster, where each pod takes a kubectl.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));

/// Shows what there is in a mesh: connections, services, endpoints, wires, processes, failures
///
/// Beside a running lab, or as root on a node, it finds the processes by itself. Status 0: shown; 1: nobody answers, or
/// nothing has the name that was asked for.
///
/// Example: nsm get connections -o wide --watch
#[derive(Debug, Args)]
pub(crate) struct Get {
    /// What to show
    #[arg(value_enum)]
    what: What,
    /// Only those of this name or id
    name: Vec<String>,
    /// How to show it
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
    /// Show it again whenever it changes
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    at: At,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Every connection, once, from its client to its endpoint
    #[value(alias = "connection", alias = "conn")]
    Connections,
    /// What can be asked for
    #[value(alias = "service", alias = "svc")]
    Services,
    /// Who provides it
    #[value(alias = "endpoint", alias = "nse")]
    Endpoints,
    /// What forwarders have in the kernel
    #[value(alias = "wire")]
    Wires,
    /// Who tells all this
    #[value(alias = "process", alias = "ps")]
    Processes,
    /// Requests that failed, the newest last
    #[value(alias = "failure")]
    Failures,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Wide,
    Json,
    Yaml,
}

impl Get {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        self.at.run(async |mesh| {
            let mut shown = String::new();
            loop {
                let view = mesh.view(&self.what.kinds(), false).await;
                let text = view.and_then(|view| {
                    view.demand()?;
                    self.text(&view)
                });
                match text {
                    Err(error) if !self.watch => return Err(error),
                    // It may come.
                    Err(error) => eprintln!("nsm: {error:#}"),
                    Ok(text) if text != shown => {
                        let clear = self.watch && io::stdout().is_terminal() && self.output.is_for_people();
                        put(&format!("{}{text}", if clear { "\x1b[2J\x1b[H" } else { "" }))?;
                        shown = text;
                    }
                    Ok(_) => {}
                }
                if !self.watch {
                    return Ok(ExitCode::SUCCESS);
                }
                tokio::time::sleep(if self.at.is_cluster() { AGAIN.1 } else { AGAIN.0 }).await;
            }
        })
    }

    fn text(&self, view: &View) -> Result<String> {
        let now = SystemTime::now();
        let mut rows = match self.what {
            What::Connections => view.wired().iter().map(|wired| connection(wired, now)).collect(),
            What::Services => services(view),
            What::Endpoints => endpoints(view, now),
            What::Wires => wires(view, now),
            What::Processes => view.seen.iter().map(|seen| process(seen, now)).collect(),
            What::Failures => failures(view, now),
        };
        if !self.name.is_empty() {
            rows.retain(|row: &Row| self.name.iter().any(|name| row.names.contains(name)));
            if rows.is_empty() {
                bail!("{} of {} found", "nothing", self.name.join(", "));
            }
        }
        let values = || rows.iter().map(|row| &row.value).collect::<Vec<_>>();
        Ok(match self.output {
            Output::Json => serde_json::to_string_pretty(&values())? + "\n",
            Output::Yaml => serde_saphyr::to_string(&values())?,
            Output::Table | Output::Wide => self.table(&rows),
        })
    }

    fn table(&self, rows: &[Row]) -> String {
        let columns: Vec<_> =
            self.what.columns().iter().filter(|column| self.output == Output::Wide || !column.1).collect();
        let mut table = plain_table(columns.iter().map(|column| column.0));
        for row in rows {
            let cells = row.cells.iter().zip(self.what.columns());
            let shown = cells.filter(|(_, column)| self.output == Output::Wide || !column.1);
            table.add_row(shown.map(|(cell, _)| if cell.is_empty() { "-" } else { cell.as_str() }));
        }
        render(&table, Format::text()) + "\n"
    }
}

impl Output {
    fn is_for_people(self) -> bool {
        matches!(self, Self::Table | Self::Wide)
    }
}

/// A name that never changes, and whether only `-o wide` shows it.
type Column = (&'static str, bool);

impl What {
    fn kinds(self) -> Vec<Kind> {
        vec![match self {
            Self::Connections => Kind::Connection,
            Self::Services => return vec![Kind::Service, Kind::Endpoint],
            Self::Endpoints => Kind::Endpoint,
            Self::Wires => Kind::Wire,
            Self::Processes => Kind::Process,
            Self::Failures => Kind::Failure,
        }]
    }

    fn columns(self) -> &'static [Column] {
        match self {
            Self::Connections => &[
                ("CONNECTION", false),
                ("CLIENT", false),
                ("SERVICE", false),
                ("ENDPOINT", false),
                ("STATE", false),
                ("MECHANISM", false),
                ("ADDRESS", false),
                ("AGE", false),
                ("EXPIRES", false),
                ("PEER", true),
                ("MTU", true),
                ("PAYLOAD", true),
                ("LABELS", true),
                ("PATH", true),
            ],
            Self::Services => &[
                ("SERVICE", false),
                ("PAYLOAD", false),
                ("ENDPOINTS", false),
                ("MATCHES", false),
                ("OWNER", true),
            ],
            Self::Endpoints => &[
                ("ENDPOINT", false),
                ("SERVICES", false),
                ("URL", false),
                ("EXPIRES", false),
                ("LABELS", true),
                ("OWNER", true),
            ],
            Self::Wires => &[
                ("WIRE", false),
                ("FORWARDER", false),
                ("KIND", false),
                ("CLIENT-END", false),
                ("ENDPOINT-END", false),
                ("MTU", false),
                ("STATE", false),
                ("RX", false),
                ("TX", false),
                ("DROPS", false),
                ("TUNNEL", true),
                ("EXPIRES", true),
                ("CONNECTION", true),
            ],
            Self::Processes => &[
                ("PROCESS", false),
                ("ROLE", false),
                ("STATUS", false),
                ("CONNECTIONS", false),
                ("SVID-EXPIRES", false),
                ("AGE", false),
                ("PID", true),
                ("TASKS", true),
                ("VERSION", true),
                ("LOG", true),
                ("SPIFFE-ID", true),
                ("SOCKET", true),
            ],
            Self::Failures => &[
                ("LAST", false),
                ("TIMES", false),
                ("HOP", false),
                ("CLIENT", false),
                ("SERVICE", false),
                ("CODE", false),
                ("ERROR", false),
                ("CALLER", true),
                ("HINT", true),
            ],
        }
    }
}

/// One line, and the same for programs.
struct Row {
    /// What it can be asked for by.
    names: Vec<String>,
    cells: Vec<String>,
    value: serde_json::Value,
}

impl Row {
    fn new<const N: usize>(names: &[&str], cells: [String; N], value: impl Serialize) -> Self {
        Self {
            names: names.iter().map(|&name| name.to_owned()).collect(),
            cells: cells.into(),
            // Messages without maps of other keys than text always serialise.
            value: serde_json::to_value(value).unwrap_or_default(),
        }
    }
}

fn connection(wired: &Wired<'_>, now: SystemTime) -> Row {
    let c = wired.front();
    let (path, first) = (wired.path(), &c.hops[0]);
    let hops: Vec<_> = path.iter().map(|hop| hop.name.as_str()).collect();
    let labels: Vec<_> = c.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let mut value = serde_json::to_value(c).unwrap_or_default();
    if let Some(fields) = value.as_object_mut() {
        fields.insert("client".into(), first.name.clone().into());
        fields.insert("connection".into(), first.id.clone().into());
        fields.insert("path".into(), hops.clone().into());
        fields.insert("expires".into(), wired.expires().into());
    }
    let cells = [
        first.id.clone(),
        first.name.clone(),
        c.service.clone(),
        c.endpoint.clone(),
        c.state.clone(),
        c.mechanism.clone(),
        c.client_addresses.join(","),
        age(c.since, now),
        left(wired.expires(), now),
        c.endpoint_addresses.join(","),
        c.mtu.to_string(),
        c.payload.clone(),
        labels.join(","),
        hops.join(" > "),
    ];
    Row::new(&[&first.id, &first.name, &c.service], cells, value)
}

fn services(view: &View) -> Vec<Row> {
    let endpoints = view.endpoints();
    let row = |s: nsm_api::pb::introspect::Service| {
        let serving = endpoints.iter().filter(|e| e.services.contains(&s.name)).count();
        let matches = if s.matches.is_empty() { "any".into() } else { s.matches.join("; ") };
        let owner = if s.owners.is_empty() { "operator".to_owned() } else { s.owners.join(",") };
        Row::new(&[&s.name], [s.name.clone(), s.payload.clone(), serving.to_string(), matches, owner], &s)
    };
    view.services().into_iter().map(row).collect()
}

fn endpoints(view: &View, now: SystemTime) -> Vec<Row> {
    let row = |e: nsm_api::pb::introspect::Endpoint| {
        let cells = [
            e.name.clone(),
            e.services.join(","),
            e.url.clone(),
            left(e.expires, now),
            e.labels.join("; "),
            e.owners.first().cloned().unwrap_or_default(),
        ];
        Row::new(&[&e.name], cells, &e)
    };
    view.endpoints().into_iter().map(row).collect()
}

fn wires(view: &View, now: SystemTime) -> Vec<Row> {
    let mut rows = Vec::new();
    for seen in &view.seen {
        for wire in &seen.wires {
            let end = |end: &Option<End>| end.as_ref().map(|end| end.interface.clone()).unwrap_or_default();
            // Of a tunnel only one end is here; of a pair both show the same traffic, the other way round.
            let shown = wire.near.as_ref().or(wire.far.as_ref());
            let count = |of: fn(&End) -> u64| shown.map(|end| of(end).to_string()).unwrap_or_default();
            let cells = [
                wire.client.clone(),
                seen.process.name.clone(),
                wire.kind.clone(),
                end(&wire.near),
                end(&wire.far),
                wire.mtu.to_string(),
                state(wire).to_owned(),
                count(|end| end.rx_packets),
                count(|end| end.tx_packets),
                count(|end| end.drops),
                wire.tunnel.clone(),
                left(wire.expires, now),
                wire.connection.clone(),
            ];
            let mut value = serde_json::to_value(wire).unwrap_or_default();
            if let Some(fields) = value.as_object_mut() {
                fields.insert("forwarder".into(), seen.process.name.clone().into());
                fields.insert("state".into(), state(wire).into());
            }
            rows.push(Row::new(&[&wire.client, &wire.connection], cells, value));
        }
    }
    rows
}

/// What the kernel has of a wire.
pub(crate) fn state(wire: &Wire) -> &'static str {
    let ends = || wire.near.iter().chain(&wire.far);
    match () {
        () if wire.orphan => "orphan",
        () if ends().any(|end| !end.there) => "missing",
        () if ends().any(|end| !end.up) => "down",
        () if !wire.claimed => "unclaimed",
        () => "up",
    }
}

fn process(seen: &Seen, now: SystemTime) -> Row {
    let p = &seen.process;
    let cells = [
        p.name.clone(),
        p.role.clone(),
        if p.ready { "ready".into() } else { p.status.clone() },
        p.connections.to_string(),
        left(p.svid_expires, now),
        age(p.since, now),
        p.pid.to_string(),
        p.tasks.to_string(),
        p.version.clone(),
        p.log_level.clone(),
        p.spiffe_id.clone(),
        seen.url.clone(),
    ];
    Row::new(&[&p.name, &p.role], cells, p)
}

fn failures(view: &View, now: SystemTime) -> Vec<Row> {
    let mut all: Vec<_> = view.seen.iter().flat_map(|seen| &seen.failures).collect();
    all.sort_by_key(|failure| failure.last);
    let row = |f: &nsm_api::pb::introspect::Failure| {
        let cells = [
            format!("{} ago", age(f.last, now)),
            f.count.to_string(),
            f.hop.clone(),
            f.client.clone(),
            f.service.clone(),
            f.code.clone(),
            f.text.clone(),
            f.caller.clone(),
            f.hint.clone(),
        ];
        Row::new(&[&f.client, &f.connection, &f.service], cells, f)
    };
    all.into_iter().map(row).collect()
}
