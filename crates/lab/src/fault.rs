//! Breaking something in a lab that stands, mending it, and counting packets meanwhile.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::Error;
use crate::disk::Full;
use crate::expect::{Finding, ms};
use crate::lab::{Lab, write_atomically};
use crate::network::{self, LinkChange};
use crate::plan::Cable;
use crate::probe::{self, Echo, Flood, Row};
use crate::relay::{Harm, Relay};
use crate::scenario::{Fault, FaultPing, FaultSignal, Impairment};

/// How long the ping runs before a fault and after it.
const BESIDE: Duration = Duration::from_millis(200);
/// Distance of the pings across a fault.
const EVERY: Duration = Duration::from_millis(1);
/// So many answers in a row, and all is well again.
const ROW: u32 = 5;

/// Does to a lab what `fault` says, and measures.
pub(crate) fn check(lab: &Lab, fault: &Fault) -> Finding {
    let traffic = fault.ping.as_ref().map(|ping| Traffic::start(lab, ping)).transpose()?;
    if traffic.is_some() {
        thread::sleep(BESIDE);
    }
    // Also after a fault that failed the pings have to be ended.
    let done = happen(lab, fault).map_err(|error| error.chain());
    let Some(traffic) = traffic else { return done };
    let (row, answers) = traffic.end(fault.within)?;
    let (lost, silence) = (row.lost(), row.silence);
    let counted =
        format!("{lost} of {} lost, {} without an answer, slowest {}", row.sent, ms(silence), ms(row.worst));
    let measured = format!("{counted}; {}", done?);
    match answers {
        Err(seen) => Err(format!("{measured}, but no answers in a row afterwards: {seen}")),
        Ok(()) if is_within(fault, &row) => Ok(measured),
        Ok(()) => Err(measured),
    }
}

/// Whether no more was lost than may be: a wire that may be silent for a while may lose what is sent meanwhile, and any
/// other nothing, if the fault does not say.
fn is_within(fault: &Fault, row: &Row) -> bool {
    let most = fault.lost.or(if fault.silence.is_some() { None } else { Some(0) });
    row.answered > 0
        && most.is_none_or(|most| row.lost() <= most)
        && fault.silence.is_none_or(|most| row.silence <= most)
}

/// What a ping across a fault has counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Struck {
    /// Pings sent.
    pub sent: u64,
    /// Those that nobody answered.
    pub lost: u64,
    /// The longest time in which none was answered.
    pub silence: Duration,
}

impl Lab {
    /// Lets a fault happen while its ping runs: until `done`, which is asked from when all of the fault is over, and until
    /// pings are answered in a row. Whether few enough were lost is the caller's to say.
    ///
    /// # Errors
    ///
    /// A fault that cannot happen or names no ping, or no answers within its bound.
    pub fn strike(&self, fault: &Fault, done: &mut dyn FnMut() -> bool) -> Result<Struck, Error> {
        let ping = fault.ping.as_ref().ok_or_else(|| Error::NotThere("the fault names no ping".into()))?;
        let traffic = Traffic::start(self, ping).map_err(Error::Reported)?;
        thread::sleep(BESIDE);
        let happened = happen(self, fault);
        let end = Instant::now() + fault.within;
        while happened.is_ok() && !done() && Instant::now() < end {
            thread::sleep(Duration::from_millis(1));
        }
        let (row, answers) = traffic.end(fault.within).map_err(Error::Reported)?;
        happened?;
        answers.map_err(|seen| Error::Reported(format!("no answers in a row after {fault}: {seen}")))?;
        Ok(Struck { sent: row.sent, lost: row.lost(), silence: row.silence })
    }
}

/// Pings from one pod, across a fault and until they are answered in a row.
pub(crate) struct Traffic<'a> {
    lab: &'a Lab,
    ping: &'a FaultPing,
    flood: Flood,
}

impl<'a> Traffic<'a> {
    pub(crate) fn start(lab: &'a Lab, ping: &'a FaultPing) -> Result<Self, String> {
        let namespace = lab.namespace(&ping.from).map_err(|error| error.chain())?;
        let flood = Flood::start(&namespace, &ping.to, EVERY).map_err(|error| error.to_string())?;
        Ok(Self { lab, ping, flood })
    }

    /// What was counted, and whether packets pass again.
    pub(crate) fn end(self, within: Duration) -> Result<(Row, Result<(), String>), String> {
        let answers = self.lab.namespace(&self.ping.from).map_err(|error| error.chain()).and_then(|pod| {
            pod.run(|| probe::until(within, |_| answered(&self.ping.to)))
                .map_err(|error| error.to_string())?
        });
        thread::sleep(BESIDE);
        let row = self.flood.end().map_err(|error| error.to_string())?;
        Ok((row, answers))
    }
}

/// Whether one of the addresses answers, some times in a row.
fn answered(to: &[IpAddr]) -> Result<(), String> {
    let mut seen = Vec::new();
    for to in to {
        match Echo::open(*to).and_then(|echo| echo.row(ROW, Instant::now() + BESIDE)) {
            Ok(row) if row.answered == u64::from(ROW) => return Ok(()),
            Ok(_) => seen.push(format!("{to}: no answer")),
            Err(error) => seen.push(format!("{to}: {error}")),
        }
    }
    Err(seen.join("; "))
}

/// Lets a fault happen, and waits until what mends itself is mended. Says how long things took.
pub(crate) fn happen(lab: &Lab, fault: &Fault) -> Result<String, Error> {
    let signal = match fault.signal {
        FaultSignal::KILL => Signal::KILL,
        FaultSignal::TERM => Signal::TERM,
    };
    let began = Instant::now();
    let mut doomed: Vec<&str> = fault.kill.iter().map(String::as_str).collect();
    let has_process = |pod: &&String| lab.plan.processes.iter().any(|process| process.name == **pod);
    doomed.extend(fault.remove.as_ref().filter(has_process).map(String::as_str));
    lab.supervisor.end_all(&doomed, signal);
    lab.supervisor.wait_end(&doomed, fault.within)?;
    if let Some(pod) = &fault.remove {
        lab.remove_namespace(pod)?;
    }
    let mut said = Vec::new();
    if !doomed.is_empty() || fault.remove.is_some() {
        said.push(format!("gone in {}", ms(began.elapsed())));
    }
    if fault.restart {
        let again = Instant::now();
        if let Some(pod) = &fault.remove {
            lab.restore_namespace(pod)?;
        }
        if fault.new_ca {
            let kept = lab.plan.paths().ca();
            fs::remove_dir_all(&kept).map_err(Error::files("remove", &kept))?;
        }
        let doomed = in_order(lab, &doomed);
        doomed.iter().try_for_each(|name| lab.start(name))?;
        lab.supervisor.wait_ready(&doomed, fault.within)?;
        said = vec![format!("ready again in {}", ms(again.elapsed()))];
    }
    if !fault.start.is_empty() {
        let again = Instant::now();
        // A pod's only process has its name, and so has its namespace.
        let is_pod = |name: &str| lab.plan.processes.iter().any(|process| process.namespace == name);
        let missing = |name: &&&str| is_pod(name) && lab.namespace(name).is_err();
        let started = in_order(lab, &fault.start.iter().map(String::as_str).collect::<Vec<_>>());
        started.iter().filter(missing).try_for_each(|pod| lab.restore_namespace(pod))?;
        started.iter().try_for_each(|name| lab.start(name))?;
        lab.supervisor.wait_ready(&started, fault.within)?;
        said.push(format!("ready in {}", ms(again.elapsed())));
    }
    if let Some(link) = &fault.down {
        network::change(&*lab.namespace(&link.pod)?, &link.interface, LinkChange::Down)?;
        said.push("set down".to_owned());
    }
    if let Some(service) = &fault.apply {
        lab.apply(service)?;
        said.push("applied".to_owned());
    }
    if fault.lasts_a_while() {
        let lasting = Lasting::begin(lab, fault)?;
        thread::sleep(fault.lasts);
        lasting.end()?;
        said.push(format!("over after {}", ms(fault.lasts)));
    }
    Ok(said.join(", "))
}

/// In the order of the plan: who is needed comes first.
fn in_order<'a>(lab: &'a Lab, names: &[&str]) -> Vec<&'a str> {
    let order = lab.plan.processes.iter().map(|process| process.name.as_str());
    order.filter(|name| names.contains(name)).collect()
}

/// What goes on until it is ended: all of it ends, whatever of it failed to begin or to end.
struct Lasting<'a> {
    lab: &'a Lab,
    frozen: Vec<&'a str>,
    /// Files that make clocks wrong.
    clocks: Vec<PathBuf>,
    full: Option<Full>,
    relay: Option<Relay>,
    /// Cables that are to be plugged in again.
    unplugged: Vec<&'a Cable>,
    /// Interfaces that lead from the relay to the bridge.
    plugs: Vec<String>,
}

impl<'a> Lasting<'a> {
    fn begin(lab: &'a Lab, fault: &'a Fault) -> Result<Self, Error> {
        let mut lasting = Self {
            lab,
            frozen: fault.freeze.iter().map(String::as_str).collect(),
            clocks: Vec::new(),
            full: None,
            relay: None,
            unplugged: Vec::new(),
            plugs: Vec::new(),
        };
        match lasting.all(fault) {
            Ok(()) => Ok(lasting),
            // Why it did not begin says more than what did not end then.
            Err(error) => lasting.end().and(Err(error)),
        }
    }

    fn all(&mut self, fault: &'a Fault) -> Result<(), Error> {
        let lab = self.lab;
        lab.supervisor.signal_all(&self.frozen, Signal::STOP);
        if let Some(node) = &fault.cut {
            self.unplug(node)?;
        }
        if let Some(Impairment { node, loss, delay }) = &fault.impair {
            let cable = self.unplug(node)?;
            let underlay = lab.namespace(&cable.b.namespace)?;
            let ends = [format!("relay-{}", cable.b.interface), format!("plug-{}", cable.b.interface)];
            network::plug(&underlay, [&ends[0], &ends[1]], &lab.plan.bridge)?;
            self.plugs.push(ends[0].clone());
            let harm = Harm { loss: *loss, delay: *delay };
            self.relay = Some(Relay::start(&underlay, [&cable.b.interface, &ends[0]], harm)?);
        }
        if let Some(shift) = &fault.clock {
            let path = lab.plan.paths().clock(&shift.of);
            // Nobody reads half of it.
            write_atomically(&path, shift.seconds.to_string().as_bytes())?;
            self.clocks.push(path);
        }
        if let Some(node) = &fault.full {
            self.full = Some(Full::make(&lab.plan.paths().disk(node))?);
        }
        Ok(())
    }

    fn end(mut self) -> Result<(), Error> {
        self.lab.supervisor.signal_all(&self.frozen, Signal::CONT);
        self.full = None;
        self.relay = None;
        let right = |path: PathBuf| fs::remove_file(&path).map_err(Error::files("remove", &path));
        let mut ended: Vec<_> = self.clocks.drain(..).map(right).collect();
        for cable in self.unplugged.drain(..) {
            let plugged = LinkChange::Plugged(&self.lab.plan.bridge);
            ended.push(change(self.lab, cable, &cable.b.interface, plugged));
            ended.extend(self.plugs.drain(..).map(|plug| change(self.lab, cable, &plug, LinkChange::Gone)));
        }
        ended.into_iter().collect()
    }

    /// Takes a node's cable out of the underlay's bridge.
    fn unplug(&mut self, node: &str) -> Result<&'a Cable, Error> {
        let mut cables = self.lab.plan.cables.iter();
        let cable = cables.find(|cable| cable.b.bridged && cable.a.namespace == node);
        let cable = cable.ok_or_else(|| Error::NotThere(format!("{node} has no cable")))?;
        change(self.lab, cable, &cable.b.interface, LinkChange::Unplugged)?;
        self.unplugged.push(cable);
        Ok(cable)
    }
}

/// Changes a link at the end of a cable that is the underlay's.
fn change(lab: &Lab, cable: &Cable, interface: &str, change: LinkChange<'_>) -> Result<(), Error> {
    network::change(&*lab.namespace(&cable.b.namespace)?, interface, change)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_lost_is_what_the_fault_says() {
        let ms = Duration::from_millis;
        let row = |lost: u64, silence| Row {
            sent: 1000,
            answered: 1000 - lost,
            best: ms(1),
            worst: ms(1),
            silence: ms(silence),
        };
        let fault = |lost, silence: Option<u64>| Fault { lost, silence: silence.map(ms), ..Fault::default() };
        for (lost, silence, row, good) in [
            (None, None, row(0, 1), true),
            (None, None, row(1, 1), false),
            (Some(1), None, row(1, 1), true),
            (Some(1), None, row(2, 1), false),
            (None, Some(20), row(500, 20), true),
            (None, Some(20), row(0, 21), false),
            (Some(0), Some(20), row(0, 20), true),
            (Some(0), Some(20), row(1, 2), false),
            (Some(2000), Some(2000), row(1000, 1000), false),
        ] {
            assert_eq!(is_within(&fault(lost, silence), &row), good, "{lost:?} {silence:?} {row:?}");
        }
    }
}
