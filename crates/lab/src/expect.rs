//! Checking what a scenario expects, with a measured value for each.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::dns;
use crate::fault;
use crate::lab::Lab;
use crate::logs::{Logged, Since};
use crate::network::{self, Seen};
use crate::probe::{self, Connected, Echo};
use crate::scenario::{
    Dns, Echoed, Expectation, Http, Lookup, Ping, PortState, Presence, SILENCE, Tcp, WITHIN,
};

/// How long an answer is waited for that is not expected to come.
const ECHO: Duration = Duration::from_millis(100);

/// The result of one expectation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// The expectation in words.
    pub expectation: String,
    /// Whether it held.
    pub held: bool,
    /// What was measured, or what was seen instead.
    pub measured: String,
    /// How long the check took, in milliseconds.
    pub millis: u64,
    /// What the processes logged since something was broken, if that went wrong.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logs: Vec<Logged>,
}

/// Checks one expectation in a lab that is up.
pub(crate) fn check(lab: &Lab, expectation: &Expectation) -> Outcome {
    let began = Instant::now();
    let broken = match expectation {
        Expectation::Fault(fault) => Some((Since::now(lab), fault.ping.as_ref())),
        _ => None,
    };
    let result = match expectation {
        Expectation::Ping(ping) => in_pod(lab, &ping.from, || check_ping(ping)),
        Expectation::Tcp(tcp) => check_tcp(lab, tcp),
        Expectation::Http(http) => in_pod(lab, &http.from, || check_http(http)),
        Expectation::Dns(dns) => {
            let resolv_conf = lab.plan.paths().resolv_conf(&dns.from);
            in_pod(lab, &dns.from, || check_dns(dns, &resolv_conf))
        }
        Expectation::Route(route) => present(lab, &route.pod, route.is, route.within, |seen| {
            let found = seen.routes.iter().find(|other| {
                other.to == route.to
                    && route.via.is_none_or(|via| other.via == Some(via))
                    && route.interface.as_ref().is_none_or(|interface| *interface == other.interface)
            })?;
            let via = found.via.map(|via| format!(" via {via}")).unwrap_or_default();
            Some((true, format!("{}{via} dev {}", found.to, found.interface)))
        }),
        Expectation::Interface(interface) => {
            present(lab, &interface.pod, interface.is, interface.within, |seen| {
                let link = seen.links.iter().find(|link| link.name == interface.name)?;
                let found =
                    format!("{} {}, MTU {}", link.kind, if link.up { "up" } else { "down" }, link.mtu);
                Some((interface.mtu.is_none_or(|mtu| link.mtu == mtu), found))
            })
        }
        Expectation::Address(address) => present(lab, &address.pod, address.is, address.within, |seen| {
            let found = seen
                .addresses
                .iter()
                .find(|other| other.interface == address.interface && other.address == address.address)?;
            Some((true, found.address.to_string()))
        }),
        Expectation::Lookup(lookup) => check_lookup(lab, lookup),
        Expectation::Fault(fault) => fault::check(lab, fault),
    };
    let (held, measured) = match result {
        Ok(measured) => (true, measured),
        Err(seen) => (false, seen),
    };
    let millis = began.elapsed().as_millis() as u64;
    let logs = match broken {
        Some((since, ping)) if !held => since.told(ping.map_or("", |ping| &ping.from)),
        _ => Vec::new(),
    };
    Outcome { expectation: expectation.to_string(), held, measured, millis, logs }
}

// === private helpers ===

/// `Ok` is the measurement of something that held, `Err` what was seen instead.
pub(crate) type Finding = Result<String, String>;

fn in_pod(lab: &Lab, pod: &str, work: impl FnOnce() -> Finding + Send) -> Finding {
    let namespace = lab.namespace(pod).map_err(|error| error.chain())?;
    namespace.run(work).map_err(|error| Error::kernel(format!("enter {pod}"))(error).chain())?
}

fn check_ping(ping: &Ping) -> Finding {
    if ping.is == Echoed::Unanswered {
        return probe::until(ping.within.unwrap_or(Duration::ZERO), |_| match unanswered(ping) {
            Ok(0) => Ok(format!("0 of {} answered", ping.count)),
            Ok(answered) => Err(format!("{answered} of {} answered", ping.count)),
            Err(error) => Ok(error.to_string()),
        });
    }
    let end = Instant::now() + ping.within.unwrap_or(WITHIN);
    let mut lost_before = 0;
    probe::until(ping.within.unwrap_or(Duration::ZERO), |_| {
        let row = Echo::open(ping.to).and_then(|echo| echo.row(ping.count, end)).map_err(|error| {
            lost_before += 1;
            error.to_string()
        })?;
        if row.answered < u64::from(ping.count) {
            lost_before += row.sent - row.answered;
            return Err(format!("{} of {} answered", row.answered, ping.count));
        }
        let late = if lost_before == 0 { String::new() } else { format!(", after {lost_before} lost") };
        Ok(format!("{} of {} answered, {} to {}{late}", row.answered, row.sent, ms(row.best), ms(row.worst)))
    })
}

/// How many of the requests are answered, each of which is given a moment; or why they cannot even be sent.
fn unanswered(ping: &Ping) -> std::io::Result<u64> {
    let echo = Echo::open(ping.to)?;
    (0..ping.count).map(|_| Ok(echo.row(1, Instant::now() + ECHO)?.answered)).sum()
}

fn check_lookup(lab: &Lab, lookup: &Lookup) -> Finding {
    let namespace = lab.namespace(&lookup.pod).map_err(|error| error.chain())?;
    probe::until(lookup.within, |_| {
        let way = network::lookup(&namespace, lookup).map_err(|error| error.chain())?;
        let via = way.via.map(|via| format!(" via {via}")).unwrap_or_default();
        let found = format!("{}{via} dev {} table {}", way.to.addr(), way.interface, way.table);
        let expected = (lookup.via, &lookup.interface, lookup.table);
        if (way.via, &way.interface, way.table) == expected { Ok(found) } else { Err(found) }
    })
}

fn check_tcp(lab: &Lab, tcp: &Tcp) -> Finding {
    match tcp.is {
        PortState::Open => in_pod(lab, &tcp.from, || {
            let (_, time) = connect(tcp.to, tcp.within.unwrap_or(WITHIN))?;
            Ok(format!("connected in {}", ms(time)))
        }),
        PortState::Blocked => {
            let within = tcp.within.unwrap_or(SILENCE);
            let silent = in_pod(lab, &tcp.from, || match probe::connect(tcp.to, within) {
                Connected::Silence => Ok(format!("no answer in {}", ms(within))),
                Connected::Yes(_) => Err("it connects".into()),
                Connected::Refused(error) => Err(format!("answered, not silent: {error}")),
            })?;
            let Some(pod) = &tcp.listens_in else { return Ok(silent) };
            in_pod(lab, pod, || {
                let local = SocketAddr::from((Ipv4Addr::LOCALHOST, tcp.to.port()));
                match probe::connect(local, within) {
                    Connected::Yes(_) => Ok(format!("{silent}, though it listens")),
                    _ => Err(format!("{silent}, but nothing listens in {pod} either: that proves no filter")),
                }
            })
        }
    }
}

fn check_dns(dns: &Dns, resolv_conf: &Path) -> Finding {
    probe::until(dns.within, |left| {
        let began = Instant::now();
        let found =
            dns::resolve(resolv_conf, &dns.name, dns.address.is_some_and(|ip| ip.is_ipv6()), dns.tcp, left)?;
        let measured = match &found[..] {
            [] => format!("no such name, in {}", ms(began.elapsed())),
            found => {
                let list: Vec<_> = found.iter().map(ToString::to_string).collect();
                format!("{} in {}", list.join(", "), ms(began.elapsed()))
            }
        };
        match dns.address {
            Some(address) if found.contains(&address) => Ok(measured),
            None if found.is_empty() => Ok(measured),
            _ => Err(measured),
        }
    })
}

fn check_http(http: &Http) -> Finding {
    let began = Instant::now();
    let (mut stream, _) = connect(http.url.address, http.within)?;
    let left = http.within.saturating_sub(began.elapsed());
    let page =
        probe::get(&mut stream, http.url.address, &http.url.path, left).map_err(|error| error.to_string())?;
    let first = page.body.lines().next().unwrap_or_default();
    let measured = format!("{} in {}: {first}", page.status, ms(began.elapsed()));
    let body_fits = http.body.as_ref().is_none_or(|text| page.body.contains(text));
    if page.status == http.status && body_fits { Ok(measured) } else { Err(measured) }
}

/// Connects, again and again while it is refused, and says how long the attempt took that worked.
fn connect(to: SocketAddr, within: Duration) -> Result<(std::net::TcpStream, Duration), String> {
    probe::until(within, |left| {
        let began = Instant::now();
        match probe::connect(to, left) {
            Connected::Yes(stream) => Ok((stream, began.elapsed())),
            Connected::Silence => Err(format!("no answer in {}", ms(within))),
            Connected::Refused(error) => Err(error.to_string()),
        }
    })
}

/// `find` says what is there, and whether it is as wanted.
fn present(
    lab: &Lab,
    pod: &str,
    is: Presence,
    within: Duration,
    find: impl Fn(&Seen) -> Option<(bool, String)>,
) -> Finding {
    let namespace = lab.namespace(pod).map_err(|error| error.chain())?;
    let began = Instant::now();
    probe::until(within, |_| {
        let seen = Seen::of(&namespace).map_err(|error| error.chain())?;
        match (find(&seen), is) {
            (Some((true, found)), Presence::Present) => Ok(found),
            (Some((false, found)), Presence::Present) => Err(found),
            (None, Presence::Gone) => Ok(format!("gone after {}", ms(began.elapsed()))),
            (None, Presence::Present) => Err("not there".into()),
            (Some((_, found)), Presence::Gone) => Err(format!("still there: {found}")),
        }
    })
}

/// Milliseconds with as many digits as mean something.
pub(crate) fn ms(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1e3;
    if ms < 10.0 { format!("{ms:.2} ms") } else { format!("{ms:.0} ms") }
}
