//! What is broken in which round: drawn from a seed, and from nothing else.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use nsm_api::nsurl::NsUrl;

use crate::chance::Chance;
use crate::scenario::{Daemons, Fault, Impairment, Link, Pod, Scenario, Shift};

/// A wire that a client of the file asks for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Wanted {
    /// The client's pod.
    pub(crate) pod: String,
    /// The wire's interface in it.
    pub(crate) interface: String,
}

/// What there is to break, and the seed.
#[derive(Debug, Clone)]
pub struct Plan {
    seed: u64,
    nodes: Vec<Node>,
    daemons: Vec<String>,
    clients: Vec<String>,
    endpoints: Vec<String>,
    wires: Vec<Wanted>,
}

#[derive(Debug, Clone)]
struct Node {
    name: String,
    /// Everything that runs there, daemons first.
    processes: Vec<String>,
}

/// Some faults, one after the other or at once; then the mesh has time to mend itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    /// Counted from 1.
    pub number: u64,
    /// In the order in which they begin.
    pub strikes: Vec<Strike>,
}

/// One fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Strike {
    /// When it begins, in its round.
    pub at: Duration,
    /// What happens.
    pub fault: Fault,
}

/// Faults of one round, at most.
const STRIKES: u64 = 3;
/// The last of them begins so long after the first, at most.
const SPREAD: u64 = 2000;

// === impl Plan ===

impl Plan {
    /// For this scenario.
    #[must_use]
    pub fn new(scenario: &Scenario, seed: u64) -> Self {
        let daemons_of = |node: &str| scenario.daemons.of(node);
        let mut daemons = vec!["identity".to_owned()];
        if scenario.daemons == Daemons::Separate {
            daemons.push("registry".to_owned());
        }
        daemons.extend(scenario.nodes.iter().flat_map(|node| daemons_of(node)));
        let named = |of: &dyn Fn(&Pod) -> bool| -> Vec<String> {
            scenario.pods.iter().filter(|pod| of(pod)).map(|pod| pod.name.clone()).collect()
        };
        let nodes = scenario.nodes.iter().map(|node| {
            let mut processes = daemons_of(node);
            processes.extend(named(&|pod| pod.node == *node && pod.has_program()));
            Node { name: node.clone(), processes }
        });
        let wires = scenario.pods.iter().flat_map(|pod| {
            let urls = NsUrl::parse_list(&pod.wanted_services().unwrap_or_default()).unwrap_or_default();
            let wanted = |url: NsUrl| Some(Wanted { pod: pod.name.clone(), interface: url.interface? });
            urls.into_iter().filter_map(wanted).collect::<Vec<_>>()
        });
        Self {
            seed,
            nodes: nodes.collect(),
            daemons,
            clients: named(&|pod| pod.wanted_services().is_some()),
            endpoints: named(&|pod| pod.has_program() && pod.wanted_services().is_none()),
            wires: wires.collect(),
        }
    }

    /// The wires that have to be there after each round.
    pub(crate) fn wires(&self) -> &[Wanted] {
        &self.wires
    }

    /// What is broken in a round. Each is drawn for itself: one of them is the same without those before it.
    #[must_use]
    pub fn round(&self, number: u64) -> Round {
        let mut chance = Chance::new(self.seed ^ number.wrapping_mul(0xd1b5_4a32_d192_ed03));
        // Numbers that follow each other begin alike.
        chance.next();
        let mut touched = BTreeSet::new();
        let mut strikes: Vec<Strike> = Vec::new();
        for nth in 0..chance.between(1, STRIKES) {
            let at = if nth == 0 { 0 } else { chance.below(SPREAD) };
            let Some(fault) = self.fault(&mut chance) else { continue };
            // What is broken by one is not broken by another: a process cannot be killed while it is made again.
            let touches = touched_by(&fault);
            if touches.iter().any(|name| touched.contains(name)) {
                continue;
            }
            touched.extend(touches);
            strikes.push(Strike { at: Duration::from_millis(at), fault });
        }
        strikes.sort_by_key(|strike| strike.at);
        Round { number, strikes }
    }

    fn fault(&self, chance: &mut Chance) -> Option<Fault> {
        let none = Fault { within: READY, ..Fault::default() };
        let killed = |kill: Vec<String>| Fault { kill, restart: true, ..none.clone() };
        let millis = Duration::from_millis;
        let fault = match chance.below(20) {
            0..4 => killed(chance.some(&self.daemons, 4)),
            4..6 => killed(chance.some(&self.endpoints, 2)),
            6 => killed(vec![chance.one(&self.clients)?.clone()]),
            7..10 => Fault {
                freeze: chance.some(&self.daemons, 3),
                lasts: millis(chance.between(100, 3000)),
                ..none
            },
            10..12 => Fault {
                cut: Some(chance.one(&self.nodes)?.name.clone()),
                lasts: millis(chance.between(100, 4000)),
                ..none
            },
            12 => {
                let Wanted { pod, interface } = chance.one(&self.wires)?.clone();
                Fault { down: Some(Link { pod, interface }), ..none }
            }
            13 => Fault { remove: Some(chance.one(&self.clients)?.clone()), restart: true, ..none },
            14 => Fault { remove: Some(chance.one(&self.endpoints)?.clone()), restart: true, ..none },
            15 => {
                let node = chance.one(&self.nodes)?.name.clone();
                let (loss, delay) = (chance.between(1, 40) as u8, millis(chance.below(60)));
                let impair = Some(Impairment { node, loss, delay });
                Fault { impair, lasts: millis(chance.between(500, 4000)), ..none }
            }
            16 | 17 => {
                let nodes = self.nodes.iter().map(|node| node.name.clone());
                let clocks: Vec<String> = nodes.chain(["identity".to_owned()]).collect();
                // By hours, in which everything expires, or by seconds, in which only some of it does.
                let most = *chance.one(&[7200, 7200, 60])?;
                let seconds = chance.between(0, 2 * most) as i64 - most as i64;
                let clock = Some(Shift { of: chance.one(&clocks)?.clone(), seconds });
                Fault { clock, lasts: millis(chance.between(500, 4000)), ..none }
            }
            18 => {
                let full = Some(chance.one(&self.nodes)?.name.clone());
                Fault { full, lasts: millis(chance.between(500, 4000)), ..none }
            }
            _ => killed(chance.one(&self.nodes)?.processes.clone()),
        };
        fault.is_some().then_some(fault)
    }
}

/// How long what was ended may take to be ready again: others are frozen or cut off meanwhile.
const READY: Duration = Duration::from_secs(30);

fn touched_by(fault: &Fault) -> Vec<String> {
    let mut names: Vec<String> = fault.kill.iter().chain(&fault.freeze).cloned().collect();
    names.extend(fault.remove.clone());
    names.extend(fault.down.iter().map(|link| link.pod.clone()));
    let impaired = fault.impair.as_ref().map(|impairment| &impairment.node);
    names.extend(fault.cut.iter().chain(impaired).map(|node| format!("the cable of {node}")));
    names.extend(fault.clock.iter().map(|shift| format!("the clock of {}", shift.of)));
    names.extend(fault.full.iter().map(|node| format!("the disk of {node}")));
    names
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "round {}", self.number)?;
        for (nth, strike) in self.strikes.iter().enumerate() {
            let between = if nth == 0 { ": " } else { "; " };
            write!(f, "{between}{}", strike.fault)?;
            if !strike.at.is_zero() {
                write!(f, " after {} ms", strike.at.as_millis())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(seed: u64) -> Plan {
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios/heal.yaml");
        Plan::new(&Scenario::load(&file).expect("the scenario"), seed)
    }

    #[test]
    fn a_round_is_drawn_from_its_seed_and_number_alone() {
        let rounds =
            |seed: u64| -> Vec<String> { (1..=50).map(|n| plan(seed).round(n).to_string()).collect() };
        assert_eq!(rounds(7), rounds(7));
        assert_ne!(rounds(7), rounds(8));
        let alone = plan(7);
        assert_eq!(alone.round(40), {
            (1..40).for_each(|n| drop(alone.round(n)));
            alone.round(40)
        });
        // As long as the same things can break: a seed that has found something is worth something.
        assert_eq!(alone.round(1).to_string(), FIRST_OF_SEVEN);
    }

    const FIRST_OF_SEVEN: &str = "round 1: node2 cut off for 2s 139ms; node3 cut off for 2s 594ms after 143 ms; the disk of \
         node1 full for 3s 133ms after 252 ms";

    #[test]
    fn everything_that_can_break_breaks_and_nothing_twice_in_a_round() {
        let plan = plan(1);
        let mut kinds = BTreeSet::new();
        let mut overlaps = false;
        for number in 1..=500 {
            let round = plan.round(number);
            assert!(!round.strikes.is_empty(), "{round}");
            overlaps |= round.strikes.len() > 1;
            let mut touched = BTreeSet::new();
            for strike in &round.strikes {
                assert!(touched_by(&strike.fault).into_iter().all(|name| touched.insert(name)), "{round}");
                let Fault { kill, freeze, cut, down, remove, impair, clock, full, .. } = &strike.fault;
                kinds.insert(match (kill.len(), freeze.is_empty(), cut, down, remove) {
                    _ if impair.is_some() => "impaired",
                    _ if clock.is_some() => "clock",
                    _ if full.is_some() => "full disk",
                    (0, false, ..) => "freeze",
                    (0, _, Some(_), ..) => "cut",
                    (0, _, _, Some(_), _) => "down",
                    (0, _, _, _, Some(pod)) if pod == "client" => "client removed",
                    (0, _, _, _, Some(_)) => "endpoint removed",
                    _ if kill.iter().any(|name| name.contains('/'))
                        && kill.iter().any(|name| name.contains('-')) =>
                    {
                        "node"
                    }
                    _ if kill.iter().any(|name| name == "client") => "client",
                    _ if kill.iter().any(|name| name.contains('-')) => "endpoint",
                    (1, ..) => "daemon",
                    _ => "daemons",
                });
            }
        }
        let all = [
            "client",
            "client removed",
            "clock",
            "cut",
            "daemon",
            "daemons",
            "down",
            "endpoint",
            "endpoint removed",
            "freeze",
            "full disk",
            "impaired",
            "node",
        ];
        assert!(overlaps && kinds.iter().copied().eq(all), "{kinds:?}");
    }
}
