//! `nsm explain`: why a wire is as it is, or why there is none.

use std::{collections::BTreeSet, fmt::Write as _, process::ExitCode, time::SystemTime};

use anyhow::{Result, bail};
use clap::Args;
use nsm_api::pb::introspect::{Connection, Decision, End, Failure, Wire};

use super::{At, Seen, View, Wired, age, get, left, put};

/// Tells why a wire is as it is, or why there is none
///
/// Every hop of its path, who was asked and why others were not, addresses, mechanism and MTU with the arithmetic behind
/// them, how long the tokens still live, the traffic so far, and what has failed lately with what to do about it.
/// Status 0: something is told; 1: nobody knows of it.
///
/// Example: nsm explain client
#[derive(Debug, Args)]
pub(crate) struct Explain {
    /// A connection id of any hop, a client or another process (pod), or a network service
    #[arg(value_name = "CONNECTION|POD|SERVICE")]
    what: String,
    /// For programs
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    at: At,
}

impl Explain {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        self.at.run(async |mesh| {
            let view = mesh.view(&[], false).await?;
            view.demand()?;
            // As kubectl names pods.
            let what = self.what.strip_prefix("pod/").unwrap_or(&self.what);
            let told = Told::of(&view, what);
            if told.is_empty() {
                bail!("{}", unknown(&view, what));
            }
            match self.json {
                true => put(&(serde_json::to_string_pretty(&told.json())? + "\n"))?,
                false => put(&told.text(SystemTime::now()))?,
            }
            Ok(ExitCode::SUCCESS)
        })
    }
}

fn unknown(view: &View, what: &str) -> String {
    let clients: BTreeSet<_> = view.wired().iter().map(|wired| wired.front().hops[0].name.clone()).collect();
    let services: Vec<_> = view.services().into_iter().map(|service| service.name).collect();
    let list = |names: Vec<String>| if names.is_empty() { "none".into() } else { names.join(", ") };
    format!(
        "nobody knows of {what:?}: no connection, process, service or failed request has that name; clients with wires: {}; services: {}",
        list(clients.into_iter().collect()),
        list(services)
    )
}

/// Whether a client has that name, or is that pod: the webhook puts a UUID behind the names of pods that could come again.
fn is_of(client: &str, name: &str) -> bool {
    let uuid = |text: &str| text.len() == 36 && text.split('-').map(str::len).eq([8, 4, 4, 4, 12]);
    let rest = client.strip_prefix(name);
    rest.is_some_and(|rest| rest.is_empty() || rest.strip_prefix('-').is_some_and(uuid))
}

/// What is known of what was asked for.
struct Told<'v> {
    view: &'v View,
    service: Option<nsm_api::pb::introspect::Service>,
    wires: Vec<Wired<'v>>,
    /// With the process that remembers it.
    failures: Vec<&'v Failure>,
    /// A process of that name, where it is one.
    process: Option<&'v Seen>,
}

impl<'v> Told<'v> {
    fn of(view: &'v View, what: &str) -> Self {
        let of_path = |wired: &Wired<'v>| {
            let any = wired.path().iter().any(|hop| hop.id == what);
            let own = wired.hops.iter().any(|(_, c)| c.id == what || c.service == what || c.endpoint == what);
            any || own || wired.path().first().is_some_and(|first| is_of(&first.name, what))
        };
        let mut wires: Vec<_> = view.wired().into_iter().filter(of_path).collect();
        let process = view.named(what);
        if wires.is_empty() && process.is_some() {
            // Something in the middle: everything that goes through it.
            let through = |wired: &Wired<'v>| wired.path().iter().any(|hop| hop.name == what);
            wires = view.wired().into_iter().filter(through).collect();
        }
        let about = |f: &&Failure| {
            is_of(&f.client, what)
                || f.connection == what
                || f.service == what
                || (f.hop == what && wires.is_empty())
                || wires.iter().any(|wired| wired.path().iter().any(|hop| hop.id == f.connection))
        };
        let mut failures: Vec<_> = view.seen.iter().flat_map(|seen| &seen.failures).filter(about).collect();
        failures.sort_by_key(|failure| (failure.last, failure.hop.clone()));
        let service = view.services().into_iter().find(|service| service.name == what);
        Self { view, service, wires, failures, process }
    }

    fn is_empty(&self) -> bool {
        self.service.is_none() && self.wires.is_empty() && self.failures.is_empty() && self.process.is_none()
    }

    fn json(&self) -> serde_json::Value {
        let wires = self.wires.iter().map(|wired| {
            let hops = wired.hops.iter().map(|(seen, connection)| {
                serde_json::json!({
                    "process": seen.process.name, "role": seen.process.role, "connection": connection,
                    "wire": wire_of(seen, connection),
                })
            });
            serde_json::json!({ "path": wired.path(), "hops": hops.collect::<Vec<_>>() })
        });
        serde_json::json!({
            "service": self.service,
            "connections": wires.collect::<Vec<_>>(),
            "failures": self.failures,
            "process": self.process.map(|seen| &seen.process),
        })
    }

    fn text(&self, now: SystemTime) -> String {
        let mut out = String::new();
        if let Some(service) = &self.service {
            self.tell_service(&mut out, service, now);
        }
        if let Some(seen) = self.process {
            let p = &seen.process;
            let status = if p.ready { "ready" } else { p.status.as_str() };
            line(
                &mut out,
                0,
                &format!("process {}, {}: {status}, {} connections", p.name, p.role, p.connections),
            );
            line(
                &mut out,
                1,
                &format!("identity {}, for another {}", p.spiffe_id, left(p.svid_expires, now)),
            );
        }
        for wired in &self.wires {
            self.tell_wire(&mut out, wired, now);
        }
        let rest: Vec<_> = self.failures.iter().filter(|f| !self.is_told_with_a_wire(f)).collect();
        if !rest.is_empty() {
            line(&mut out, 0, "requests that failed lately");
            rest.iter().for_each(|failure| tell_failure(&mut out, failure, now));
        }
        if self.wires.is_empty() && self.service.is_some() {
            line(&mut out, 0, "no wire leads to it now");
        }
        out
    }

    fn is_told_with_a_wire(&self, failure: &Failure) -> bool {
        !failure.connection.is_empty()
            && self.wires.iter().any(|wired| wired.path().iter().any(|hop| hop.id == failure.connection))
    }

    fn tell_service(&self, out: &mut String, service: &nsm_api::pb::introspect::Service, now: SystemTime) {
        let owner = match service.owners.first() {
            None => "the operator's".to_owned(),
            Some(owner) => format!("registered by {owner}"),
        };
        line(out, 0, &format!("service {}, payload {}, {owner}", service.name, service.payload));
        if service.matches.is_empty() {
            line(out, 1, "no matches: every endpoint may serve every client");
        }
        for (at, text) in service.matches.iter().enumerate() {
            line(out, 1, &format!("match {}: {text}", at + 1));
        }
        let serving: Vec<_> =
            self.view.endpoints().into_iter().filter(|e| e.services.contains(&service.name)).collect();
        if serving.is_empty() {
            line(out, 1, "nobody provides it: start an endpoint with --service-names");
        }
        for e in serving {
            let labels: Vec<_> =
                e.labels.iter().filter_map(|l| l.strip_prefix(&format!("{}: ", service.name))).collect();
            let labels = if labels.is_empty() { "no labels".to_owned() } else { labels.join(",") };
            line(
                out,
                1,
                &format!(
                    "endpoint {} at {}, {labels}, registered for another {}",
                    e.name,
                    e.url,
                    left(e.expires, now)
                ),
            );
        }
    }

    fn tell_wire(&self, out: &mut String, wired: &Wired<'_>, now: SystemTime) {
        let c = wired.front();
        let path = wired.path();
        line(
            out,
            0,
            &format!(
                "connection {} of {}: {} to service {} by {}, for {}",
                path[0].id,
                path[0].name,
                c.state,
                c.service,
                if c.endpoint.is_empty() { "nobody yet" } else { &c.endpoint },
                age(c.since, now),
            ),
        );
        let or = |list: &[String]| if list.is_empty() { "none".to_owned() } else { list.join(", ") };
        line(
            out,
            1,
            &format!(
                "addresses {} here, {} there; routes {}; payload {}; MTU {}",
                or(&c.client_addresses),
                or(&c.endpoint_addresses),
                or(&c.client_routes),
                c.payload,
                c.mtu
            ),
        );
        if !c.labels.is_empty() {
            let labels: Vec<_> = c.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
            line(out, 1, &format!("labels {}", labels.join(",")));
        }
        for (at, hop) in path.iter().enumerate() {
            let asked = wired.hops.iter().find(|(_, c)| c.index as usize == at);
            let role = asked.map_or("", |(seen, _)| seen.process.role.as_str());
            let token = match hop.token_expires {
                0 => "no token yet".to_owned(),
                at => format!("token of {} for another {}", signer(&hop.signer), left(at, now)),
            };
            line(out, 1, &format!("hop {at} {} {role} ({}): {token}", hop.name, hop.id));
            match asked {
                Some((seen, connection)) => tell_hop(out, seen, connection, now),
                // Who makes wires in the manager's own process (`nsm node`) tells of the wire, not of himself.
                None if let Some(wire) = self.made_by(&hop.id) => tell_kernel(out, wire),
                None if self.view.of_cluster => line(out, 2, "not asked: only the mesh's own pods are"),
                None => line(
                    out,
                    2,
                    "not asked: no such process is found here; `--at URL` asks one of another node",
                ),
            }
        }
        let own: Vec<_> =
            self.failures.iter().filter(|f| path.iter().any(|hop| hop.id == f.connection)).collect();
        if !own.is_empty() {
            line(out, 1, "failed lately");
            own.iter().for_each(|failure| tell_failure(out, failure, now));
        }
    }

    /// The wire of a connection at whoever makes wires.
    fn made_by(&self, connection: &str) -> Option<&'v Wire> {
        self.view.seen.iter().flat_map(|seen| &seen.wires).find(|wire| wire.connection == connection)
    }
}

fn signer(id: &str) -> &str {
    if id.is_empty() { "an unknown signer" } else { id }
}

fn tell_hop(out: &mut String, seen: &Seen, c: &Connection, now: SystemTime) {
    if !c.caller.is_empty() {
        line(
            out,
            2,
            &format!(
                "asked by {}, answered {} times, last {} ago, {}",
                c.caller,
                c.answers,
                age(c.refreshed, now),
                c.state
            ),
        );
    }
    for decision in &c.decisions {
        line(out, 2, &decided(decision));
    }
    if !c.mechanism.is_empty() {
        let shown = c.parameters.iter().filter(|(key, _)| key.as_str() != "inodeURL");
        let parameters: Vec<_> = shown.map(|(key, value)| format!("{key}={value}")).collect();
        line(out, 2, &format!("mechanism {} {}", c.mechanism, parameters.join(" ")));
    }
    if let Some(wire) = wire_of(seen, c) {
        tell_kernel(out, wire);
    }
}

fn decided(d: &Decision) -> String {
    let why = if d.why.is_empty() { String::new() } else { format!(": {}", d.why) };
    format!("{} {}{why} ({})", d.verdict, d.candidate, d.element)
}

fn wire_of<'s>(seen: &'s Seen, c: &Connection) -> Option<&'s Wire> {
    seen.wires.iter().find(|wire| wire.connection == c.id)
}

fn tell_kernel(out: &mut String, wire: &Wire) {
    let tunnel = if wire.tunnel.is_empty() { String::new() } else { format!(", {}", wire.tunnel) };
    line(out, 2, &format!("wire {}{tunnel}: {}", wire.kind, get::state(wire)));
    for because in &wire.mtu_because {
        line(out, 3, &format!("MTU {because}"));
    }
    for (whose, end) in [("client's end", &wire.near), ("endpoint's end", &wire.far)] {
        if let Some(end) = end {
            line(out, 3, &format!("{whose} {}", end_text(end)));
        }
    }
    for difference in &wire.differences {
        line(out, 3, &format!("not as planned: {difference}"));
    }
}

fn end_text(end: &End) -> String {
    if !end.there {
        return format!("{}: it is not in the kernel", end.interface);
    }
    format!(
        "{} in net:[{}]: {}, MTU {}, received {} packets {} bytes, sent {} packets {} bytes, dropped {}",
        end.interface,
        end.namespace,
        if end.up { "up" } else { "down" },
        end.mtu,
        end.rx_packets,
        end.rx_bytes,
        end.tx_packets,
        end.tx_bytes,
        end.drops
    )
}

fn tell_failure(out: &mut String, f: &Failure, now: SystemTime) {
    let times = if f.count > 1 {
        format!(", {} times since {} ago", f.count, age(f.first, now))
    } else {
        String::new()
    };
    let of = if f.client.is_empty() { String::new() } else { format!(" of {}", f.client) };
    line(
        out,
        1,
        &format!(
            "{} ago at {}: {}{of} for {}: {}{times}",
            age(f.last, now),
            f.hop,
            f.code,
            f.service,
            f.text
        ),
    );
    for decision in &f.decisions {
        line(out, 2, &decided(decision));
    }
    if !f.hint.is_empty() {
        line(out, 2, &format!("hint: {}", f.hint));
    }
}

fn line(out: &mut String, depth: usize, text: &str) {
    let _ = writeln!(out, "{:indent$}{}", "", text.trim_end(), indent = depth * 2);
}

#[cfg(test)]
mod tests {
    use super::is_of;

    #[test]
    fn a_client_is_known_by_its_pod() {
        let uuid = "4a6b1f0e-6c5f-4f5e-9a1e-0d8b6c1f2a3b";
        assert!(is_of("web", "web") && is_of(&format!("web-{uuid}"), "web"));
        for other in ["web-1", "web-7c9f6d5b4-abcde", &format!("web-1-{uuid}"), &format!("web{uuid}")] {
            assert!(!is_of(other, "web"), "{other}");
        }
    }
}
