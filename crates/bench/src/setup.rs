//! What it costs to get a wire: time, rate, memory, handshakes, leftovers; and what the kernel alone needs for it.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use nsm_lab::Lab;
use nsm_lab::leaks::Snapshot;
use nsm_lab::process::Condition;

use crate::client::{Closed, Opened, Workers};
use crate::figures::Target;
use crate::{Error, Options, Row, Times, Topology, Value, bare, settle};

/// Wires that are made and closed before anything counts, at least one from each pod: afterwards every connection
/// between programs stands.
const WARM_UP: usize = 3;

/// Name of the programs that ask for wires, beside those of the lab.
const CLIENT: &str = "client";
/// How many wires are made by raw netlink for comparison, at most.
const BY_HAND: usize = 200;
/// The last wire is compared with the one of this number; both with those around it.
const EARLY: usize = 50;

/// What a process uses.
#[derive(Debug, Clone, Copy, Default)]
struct Usage {
    /// Resident memory, in KiB.
    resident: u64,
    /// Of that heap and stacks, in KiB.
    own: u64,
    /// Processor time since its start, its threads' included.
    cpu: Duration,
}

/// A program that nobody has asked anything for so long is idle: by then it has let go of what its start needed.
const IDLE: Duration = Duration::from_secs(4);

/// Of the programs of a lab, by name.
type Usages = BTreeMap<String, Usage>;

pub(crate) fn measure(
    options: &Options,
    topology: Topology,
    lab: &Lab,
    workers: &mut Workers,
    rows: &mut Vec<Row>,
    progress: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    let before = Snapshot::take()?;
    std::thread::sleep(IDLE);
    let idle = usage(lab, workers);

    let by_hand = options.wires.min(BY_HAND);
    progress(&format!("{topology}: {by_hand} wires by raw netlink"));
    let kernel = match topology {
        Topology::Local => bare::veths(by_hand, &lab.supervisor)?,
        Topology::TwoNodes => bare::vxlans(by_hand, &lab.supervisor)?,
    };

    let cold = workers.open(lab, 1, 1)?;
    let warm_up = WARM_UP.max(options.clients);
    workers.open(lab, warm_up, 1)?;
    workers.close(lab)?;
    let dialled = handshakes(lab);
    // What a wire costs is counted from here: the code that the first ones brought into memory is not theirs.
    let warm = usage(lab, workers);
    let cold = Value::Number { value: pings(&cold).max / 1e3, unit: "ms" };
    rows.push(Row::new(topology, "setup.cold", "the first wire, all handshakes included", cold));

    let (p50, p99) = match topology {
        Topology::Local => (10, 40),
        Topology::TwoNodes => (20, 60),
    };
    let mut with_wires = None;
    let mut left = Vec::new();
    for &concurrency in &options.concurrency {
        progress(&format!("{topology}: {} wires, {concurrency} at a time", options.wires));
        let begin = usage(lab, workers);
        let opened = workers.open(lab, options.wires, concurrency)?;
        let end = usage(lab, workers);
        let first = with_wires.is_none();
        with_wires.get_or_insert_with(|| end.clone());
        let refreshed = if first { workers.refresh(lab)? } else { Vec::new() };
        let after = usage(lab, workers);
        let closed = workers.close(lab)?;
        rows.extend(rows_of(topology, concurrency, (p50, p99), &opened, &closed));
        rows.extend(growth_row(topology, concurrency, &opened));
        rows.push(cpu_row(topology, concurrency, &begin, &end, opened.made.len()));
        if first {
            rows.push(refresh_row(options, topology, refreshed));
            rows.push(cpu_row(topology, "refresh", &end, &after, opened.made.len()));
        }
        left.extend(settle(lab, &before, options.wires)?);
    }

    let kernel_row =
        |id: &str, what: &str, times: Vec<_>| Row::new(topology, id, what, Value::Times(Times::of(times)));
    let what = "the same wire by raw netlink, to the first ping";
    rows.push(kernel_row("kernel.ping", what, kernel.iter().map(|made| made.ping).collect()));
    let what = "  of which creation and configuration";
    rows.push(kernel_row("kernel.apply", what, kernel.iter().map(|made| made.apply).collect()));
    let upstream = match topology {
        Topology::Local => "set-up p50 333, p99 371 ms; close p50 164 ms",
        Topology::TwoNodes => "set-up p50 352, p99 415 ms; close p50 189 ms",
    };
    let note = "upstream's Go programs and VPP, 50 wires one after the other; measured earlier on such a machine, not \
                in this run";
    rows.push(Row::new(topology, "upstream", "upstream, for scale", Value::Quoted(upstream)).note(note));

    let with_wires = with_wires.unwrap_or_default();
    for (name, idle) in idle.iter().filter(|(name, _)| *name != CLIENT) {
        let of = |usages: &Usages| usages.get(name).copied().unwrap_or_default();
        let (warm, loaded) = (of(&warm), of(&with_wires));
        let value = Value::Memory {
            idle: idle.resident,
            idle_own: idle.own,
            loaded: loaded.resident,
            per_wire: (loaded.resident as f64 - warm.resident as f64) / options.wires.max(1) as f64,
        };
        let row = Row::new(topology, format!("memory.{name}"), format!("memory of {name}"), value);
        // The goal is for those that every node or cluster has.
        let counts = name == "registry" || name.contains('/');
        let idle = idle.resident as f64 / 1024.0;
        rows.push(if counts { row.target(Target::at_most(idle, 15.0, " MiB idle")) } else { row });
    }

    let requests = options.wires * options.concurrency.len();
    let warm = handshakes(lab).saturating_sub(dialled);
    rows.push(
        Row::new(topology, "handshakes", "TLS handshakes while warm", Value::count(warm))
            .target(Target::none_of(warm))
            .note(format!("{requests} requests and closes; {dialled} before, when programs first met")),
    );
    rows.push(
        Row::new(topology, "left.wires", "objects left by closed wires", Value::count(left.len()))
            .target(Target::none_of(left.len()))
            .note(left.join("; ")),
    );
    Ok(())
}

// === private helpers ===

fn pings(opened: &Opened) -> Times {
    Times::of(opened.made.iter().map(|made| made.ping))
}

fn rows_of(
    topology: Topology,
    concurrency: usize,
    (p50, p99): (u32, u32),
    opened: &Opened,
    closed: &Closed,
) -> Vec<Row> {
    let (to_ping, made) = (pings(opened), opened.made.len());
    let how = match concurrency {
        1 => "one after the other".to_owned(),
        many => format!("{many} at a time"),
    };
    let what = format!("{made} wires {how}: Request to working ping");
    let times = Row::new(topology, format!("setup.{concurrency}"), what, Value::Times(to_ping));
    // With several at a time each waits for the others: then the rate is what counts.
    let times = if concurrency == 1 { times.target(Target::times(&to_ping, p50, p99)) } else { times };
    let request = Times::of(opened.made.iter().map(|made| made.request));
    let request =
        Row::new(topology, format!("request.{concurrency}"), "  of which Request", Value::Times(request));
    let per_second = made as f64 / opened.wall.as_secs_f64();
    let rate = Value::Number { value: per_second, unit: "wires/s" };
    let rate = Row::new(topology, format!("rate.{concurrency}"), "  rate", rate)
        .target(Target::at_least(per_second, 100.0, " wires/s"));
    let close = Value::Times(Times::of(closed.times.iter().copied()));
    let close = Row::new(topology, format!("close.{concurrency}"), "  closing, one after the other", close)
        .note(match closed.failed.first() {
            None => String::new(),
            Some(first) => format!("{} not closed in good order; the first: {first}", closed.failed.len()),
        });
    vec![times, request, rate, close]
}

/// Whether a wire takes longer when there are many.
fn growth_row(topology: Topology, concurrency: usize, opened: &Opened) -> Option<Row> {
    let median = |made: &[crate::client::Made]| Times::of(made.iter().map(|made| made.ping)).p50;
    let early = opened.made.get(EARLY / 2..EARLY + EARLY / 2)?;
    let late = opened.made.last_chunk::<EARLY>()?;
    let value = median(late) / median(early);
    let what = format!("  the last of them beside the {EARLY}th");
    Some(
        Row::new(topology, format!("growth.{concurrency}"), what, Value::Number { value, unit: "times" })
            .target(Target::at_most(value, 1.5, " times"))
            .note(format!("medians of the last {EARLY} and of {EARLY} around the {EARLY}th")),
    )
}

/// The way of a request there and back, every token checked and signed anew, without work for the kernel.
fn refresh_row(options: &Options, topology: Topology, times: Vec<Duration>) -> Row {
    let times = Times::of(times);
    let row =
        Row::new(topology, "refresh", "the control path alone: a wire is refreshed", Value::Times(times));
    let goal = if options.together { 0.7 } else { 1.5 };
    match topology {
        Topology::Local => row.target(Target::at_most(times.p50 / 1e3, goal, " ms at p50")),
        Topology::TwoNodes => row,
    }
}

/// What all programs together computed for a wire; unlike times this hardly depends on who else uses the machine.
fn cpu_row(
    topology: Topology,
    of: impl std::fmt::Display,
    begin: &Usages,
    end: &Usages,
    wires: usize,
) -> Row {
    let spent: Vec<_> = end
        .iter()
        .map(|(name, end)| {
            let begin = begin.get(name).copied().unwrap_or_default();
            (name, end.cpu.saturating_sub(begin.cpu).as_secs_f64() * 1e3 / wires.max(1) as f64)
        })
        .collect();
    let each: Vec<_> = spent.iter().map(|(name, millis)| format!("{name} {millis:.2}")).collect();
    let value = Value::Number { value: spent.iter().map(|(_, millis)| millis).sum(), unit: "ms" };
    Row::new(topology, format!("cpu.{of}"), "  processor time for each, all programs", value)
        .note(each.join(", "))
}

/// What every program of the lab uses, and the clients together.
fn usage(lab: &Lab, workers: &Workers) -> Usages {
    let of = |pid: u32| {
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let status = read("status");
        let field = |name: &str| -> Option<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        // Fields 14 and 15 of man 5 proc_pid_stat, also of threads that have ended, in ticks of 10 ms (USER_HZ).
        let stat = read("stat");
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
        let ticks: u64 = fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        Usage {
            resident: field("VmRSS:").unwrap_or_default(),
            own: field("RssAnon:").unwrap_or_default(),
            cpu: Duration::from_millis(10 * ticks),
        }
    };
    let running = lab.supervisor.processes().into_iter().filter(|(_, _, how)| *how == Condition::Ready);
    let running = running.map(|(name, id, _)| (name, of(id.pid)));
    let clients = workers.pids().map(of).fold(Usage::default(), |all, one| Usage {
        resident: all.resident + one.resident,
        own: all.own + one.own,
        cpu: all.cpu + one.cpu,
    });
    running.chain([(CLIENT.to_owned(), clients)]).collect()
}

/// How many TLS connections all programs of the lab have made as clients: each says so once in its log.
fn handshakes(lab: &Lab) -> usize {
    let logs = fs::read_dir(lab.plan.paths().root.join("logs")).into_iter().flatten().flatten();
    let texts = logs.map(|log| fs::read_to_string(log.path()).unwrap_or_default());
    texts.map(|text| text.matches("nsm_transport::pool: connected").count()).sum()
}
