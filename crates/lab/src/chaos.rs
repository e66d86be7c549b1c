//! Round after round something breaks in a lab, with traffic all the time, and after each the mesh has to mend itself:
//! every client of the file pings the far ends of its wires. At the end no process may have grown.

mod plan;
mod weight;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use plan::Wanted;
pub use plan::{Plan, Round, Strike};
use weight::Weights;

use crate::expect::{Finding, Outcome, ms};
use crate::fault;
use crate::lab::Lab;
use crate::logs::Since;
use crate::network::Seen;
use crate::probe::{self, Echo, Flood};
use crate::scenario::Scenario;

/// Distance of the pings of each wire.
const EVERY: Duration = Duration::from_millis(5);
/// So many answers in a row on every wire, and all is well again.
const ROW: u32 = 5;
/// How long one wire is asked before it is looked for anew.
const PATIENCE: Duration = Duration::from_millis(300);

/// How much is broken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Chaos {
    /// What is broken is drawn from this.
    pub seed: u64,
    /// The first round: 1, or that of another run that failed.
    pub from: u64,
    /// So many rounds; with `lasts`, at most so many.
    pub rounds: u64,
    /// No round begins after so long.
    pub lasts: Option<Duration>,
    /// How long the mesh may take to mend itself after a round.
    pub within: Duration,
}

impl Chaos {
    /// The rounds in their order.
    pub fn rounds<'a>(&self, plan: &'a Plan) -> impl Iterator<Item = Round> + use<'a> {
        (self.from..self.from.saturating_add(self.rounds)).map(|number| plan.round(number))
    }
}

/// Breaks and waits, and tells the outcome of each round; ends after one that failed, or when nobody listens.
pub(crate) fn run(lab: &Lab, scenario: &Scenario, chaos: &Chaos, tell: &mut dyn FnMut(Outcome) -> bool) {
    let plan = Plan::new(scenario, chaos.seed);
    let (began, mut weights, mut known) = (Instant::now(), Weights::default(), Known::default());
    for round in chaos.rounds(&plan) {
        if chaos.lasts.is_some_and(|lasts| began.elapsed() >= lasts) {
            break;
        }
        let (since, at) = (Since::now(lab), Instant::now());
        let found = play(lab, &plan, &round, chaos.within, &mut known);
        let replay = || format!("; replay: --seed {} --from {} --rounds 1", chaos.seed, round.number);
        let held = found.is_ok();
        let measured = found.unwrap_or_else(|seen| seen + &replay());
        let logs = if held { Vec::new() } else { since.told("") };
        let millis = at.elapsed().as_millis() as u64;
        let goes_on = tell(Outcome { expectation: round.to_string(), held, measured, millis, logs });
        if !held || !goes_on {
            return;
        }
        weights.note(lab);
    }
    let at = Instant::now();
    // What is just being made or let go of is over soon.
    let found = probe::until(chaos.within, |_| weights.compare(lab));
    let (held, measured) = (found.is_ok(), found.unwrap_or_else(|seen| seen));
    let expectation = "no process has grown".to_owned();
    let millis = at.elapsed().as_millis() as u64;
    tell(Outcome { expectation, held, measured, millis, logs: Vec::new() });
}

/// Far ends of each wire so far: a client may move between them.
type Known = BTreeMap<Wanted, BTreeSet<IpAddr>>;

fn play(lab: &Lab, plan: &Plan, round: &Round, within: Duration, known: &mut Known) -> Finding {
    // All is well before anything is broken: a round that begins in the ruins of another proves nothing.
    mended(lab, plan.wires(), within, known).map_err(|seen| format!("before it: {seen}"))?;
    let mut floods = Vec::new();
    let goes = |pod: &str| round.strikes.iter().any(|strike| strike.fault.remove.as_deref() == Some(pod));
    for (wire, to) in known.iter().filter(|(wire, _)| !goes(&wire.pod)) {
        let namespace = lab.namespace(&wire.pod).map_err(|error| error.chain())?;
        let to: Vec<IpAddr> = to.iter().copied().collect();
        floods.push((wire.clone(), Flood::start(&namespace, &to, EVERY).map_err(|error| error.to_string())?));
    }
    let broken: Vec<Result<String, String>> = thread::scope(|scope| {
        let strikes: Vec<_> =
            round.strikes.iter().map(|strike| scope.spawn(|| happen(lab, strike))).collect();
        let joined = strikes.into_iter().map(|strike| strike.join());
        joined.map(|done| done.unwrap_or_else(|_| Err("a thread panicked".to_owned()))).collect()
    });
    let over = Instant::now();
    let mended = mended(lab, plan.wires(), within, known);
    let took = over.elapsed();
    // All at once: each waits for its last answers.
    let rows: Vec<_> = thread::scope(|scope| {
        let ends: Vec<_> =
            floods.into_iter().map(|(wire, flood)| (wire, scope.spawn(move || flood.end()))).collect();
        ends.into_iter().map(|(wire, end)| (wire, end.join())).collect()
    });
    let silences = rows.into_iter().filter_map(|(wire, row)| Some((row.ok()?.ok()?.silence, wire)));
    let worst = silences.max_by_key(|(silence, _)| *silence);
    let silent = worst.map_or_else(String::new, |(silence, wire)| {
        format!("; longest without an answer {} ({} of {})", ms(silence), wire.interface, wire.pod)
    });
    broken.into_iter().collect::<Result<Vec<_>, _>>()?;
    match mended {
        Ok(()) => Ok(format!("mended {} after it{silent}", ms(took))),
        Err(seen) => Err(format!("not mended after {}: {seen}{silent}", ms(took))),
    }
}

fn happen(lab: &Lab, strike: &Strike) -> Result<String, String> {
    thread::sleep(strike.at);
    if let Some(link) = &strike.fault.down {
        // Something else that is broken just now may have taken it away.
        let there = |seen: Seen| seen.links.iter().any(|seen| seen.name == link.interface);
        let seen = lab.namespace(&link.pod).and_then(|pod| Seen::of(&pod));
        if !seen.is_ok_and(there) {
            return Ok("was not there".to_owned());
        }
    }
    fault::happen(lab, &strike.fault).map_err(|error| format!("{}: {}", strike.fault, error.chain()))
}

/// Waits until every wire answers.
fn mended(lab: &Lab, wires: &[Wanted], within: Duration, known: &mut Known) -> Result<(), String> {
    let end = Instant::now() + within;
    for wire in wires {
        let left = end.saturating_duration_since(Instant::now());
        let far = probe::until(left, |_| answers(lab, wire))?;
        known.entry(wire.clone()).or_default().extend(far);
    }
    // One that answered at first may have fallen while another was waited for.
    let fell = wires.iter().find_map(|wire| answers(lab, wire).err());
    match fell {
        Some(_) if Instant::now() < end => {
            mended(lab, wires, end.saturating_duration_since(Instant::now()), known)
        }
        Some(seen) => Err(seen),
        None => Ok(()),
    }
}

/// The far ends of a wire, as its routes tell them, if all of them answer.
fn answers(lab: &Lab, wire: &Wanted) -> Result<Vec<IpAddr>, String> {
    let Wanted { pod, interface } = wire;
    let namespace = lab.namespace(pod).map_err(|error| error.chain())?;
    let seen = Seen::of(&namespace).map_err(|error| error.chain())?;
    let host = |net: &IpNet| net.prefix_len() == net.max_prefix_len();
    let routes = seen.routes.iter().filter(|route| route.interface == *interface && route.via.is_none());
    let own: BTreeSet<IpAddr> = seen.addresses.iter().map(|address| address.address.addr()).collect();
    let far: BTreeSet<IpAddr> = routes
        .filter(|route| host(&route.to))
        .map(|route| route.to.addr())
        .filter(|ip| !own.contains(ip))
        .collect();
    if far.is_empty() {
        return Err(format!("{pod} has no wire {interface}, or one that leads nowhere"));
    }
    let ask = |to: &IpAddr| {
        let echo = Echo::open(*to).and_then(|echo| echo.row(ROW, Instant::now() + PATIENCE));
        match echo {
            Ok(row) if row.answered == u64::from(ROW) => Ok(*to),
            Ok(_) => Err(format!("{to} does not answer {pod} over {interface}")),
            Err(error) => Err(format!("{pod} cannot ask {to} over {interface}: {error}")),
        }
    };
    namespace.run(|| far.iter().map(ask).collect()).map_err(|error| error.to_string())?
}
