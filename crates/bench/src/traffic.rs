//! What packets cost on a wire, beside a plain device of the same kind between the same pods, measured in turns.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use nsm_kernel::netns::Namespace;
use nsm_lab::Lab;
use nsm_lab::network::Seen;
use nsm_lab::probe::Echo;
use rustix::process::setpriority_process;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::client::Worker;
use crate::figures::Target;
use crate::{Error, Measure, Options, Row, Times, Topology, Value, bare};

/// What one write hands to the kernel.
const BLOCK: usize = 128 * 1024;
/// How long a stream runs before its bytes count: the window has to grow.
const WARM_UP: Duration = Duration::from_millis(150);
/// The best nice value (man 2 setpriority); on Linux it is the calling thread's.
const HIGHEST: i32 = -20;
/// A stream that stands still for so long is broken.
const STALL: Duration = Duration::from_secs(5);

/// Two addresses with something between them.
struct Line<'l> {
    client: &'l Namespace,
    endpoint: &'l Namespace,
    near: IpAddr,
    far: IpAddr,
}

#[derive(Clone, Copy)]
enum Direction {
    ToEndpoint,
    ToClient,
}

pub(crate) fn measure(
    options: &Options,
    topology: Topology,
    measures: &[Measure],
    lab: &Lab,
    worker: &mut Worker,
    rows: &mut Vec<Row>,
    progress: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    let opened = worker.open(lab, 1, 1)?;
    let made = opened.made.first().ok_or_else(|| Error::Client("made no wire".into()))?;
    let (client, endpoint) = (lab.namespace("client")?, lab.namespace("endpoint")?);
    let mtu_of = |interface: &str| -> Result<u32, Error> {
        let seen = Seen::of(client)?;
        let link = seen.links.iter().find(|link| link.name == interface);
        link.map(|link| link.mtu).ok_or_else(|| Error::Client(format!("has no interface {interface}")))
    };
    let mtu = mtu_of(&made.interface)?;
    match topology {
        Topology::Local => bare::set_mtu(lab, mtu)?,
        Topology::TwoNodes => bare::hand_made_vxlan(lab, mtu)?,
    }
    let beside = mtu_of(bare::INTERFACE)?;
    let note = match topology {
        Topology::Local => format!("beside a bare veth pair; MTU {mtu} and {beside}"),
        Topology::TwoNodes => {
            format!("beside a hand-made VXLAN over the same underlay; MTU {mtu} and {beside}")
        }
    };
    let wire = Line { client, endpoint, near: made.near, far: made.far };
    let plain = Line { client, endpoint, near: bare::NEAR.into(), far: bare::FAR.into() };

    for measure in measures {
        match measure {
            Measure::Throughput => {
                for (direction, id, what) in [
                    (Direction::ToEndpoint, "up", "TCP, one stream, client to endpoint"),
                    (Direction::ToClient, "down", "TCP, one stream, endpoint to client"),
                ] {
                    progress(&format!("{topology}: {what}, {} pairs", options.pairs));
                    let (of_wire, of_plain) = in_turns(options.pairs, lab, |on_wire| {
                        stream(if on_wire { &wire } else { &plain }, direction, options.duration)
                    })?;
                    let value = Value::beside(of_wire, of_plain, "Gbit/s");
                    let ratio = if let Value::Beside { ratio, .. } = &value { *ratio } else { f64::NAN };
                    rows.push(
                        Row::new(topology, format!("throughput.{id}"), what, value)
                            .target(Target::at_least(ratio, 0.97, ""))
                            .note(&note),
                    );
                }
            }
            Measure::Latency => {
                progress(&format!("{topology}: pings, {} pairs", options.pairs));
                let (of_wire, of_plain) = in_turns(options.pairs, lab, |on_wire| {
                    pings(if on_wire { &wire } else { &plain }, options.pings)
                })?;
                let beside = |figure: fn(Times) -> f64| {
                    let figures = |rounds: &[Vec<Duration>]| {
                        rounds.iter().map(|times| figure(Times::of(times.iter().copied()))).collect()
                    };
                    Value::beside(figures(&of_wire), figures(&of_plain), "µs")
                };
                let rows_of = [
                    ("latency.mean", "ping flood, average", beside(|times| times.mean)),
                    ("latency.p50", "  p50", beside(|times| times.p50)),
                    ("latency.p99", "  p99", beside(|times| times.p99)),
                ];
                rows.extend(rows_of.map(|(id, what, value)| Row::new(topology, id, what, value)));
            }
            Measure::Setup => {}
        }
    }
    worker.close(lab)?;
    Ok(())
}

// === private helpers ===

/// Measures wire and plain device in turns: whatever else the machine does meets both.
fn in_turns<T>(
    pairs: usize,
    lab: &Lab,
    mut once: impl FnMut(bool) -> Result<T, Error>,
) -> Result<(Vec<T>, Vec<T>), Error> {
    let (mut wire, mut plain) = (Vec::new(), Vec::new());
    for pair in 0..pairs {
        lab.supervisor.check()?;
        // Who comes first changes, so that neither profits from being second.
        let wire_first = pair % 2 == 0;
        for on_wire in [wire_first, !wire_first] {
            let figure = once(on_wire)?;
            if on_wire { wire.push(figure) } else { plain.push(figure) }
        }
    }
    Ok((wire, plain))
}

/// The rate of one TCP stream, in Gbit/s as the receiver sees it.
fn stream(line: &Line<'_>, direction: Direction, duration: Duration) -> Result<f64, Error> {
    let (client, endpoint) = connect(line)?;
    let (sender, receiver) = match direction {
        Direction::ToEndpoint => (client, endpoint),
        Direction::ToClient => (endpoint, client),
    };
    let rate = thread::scope(|scope| {
        let sending = thread::Builder::new().name("send".into()).spawn_scoped(scope, || send(sender));
        sending?;
        let receiving = thread::Builder::new()
            .name("receive".into())
            .spawn_scoped(scope, || receive(receiver, duration))?;
        receiving.join().unwrap_or_else(|_| Err(io::Error::other("the receiver panicked")))
    });
    rate.map_err(Error::system("measure a TCP stream"))
}

/// Sockets stay in the namespace where they were made, whoever uses them.
fn connect(line: &Line<'_>) -> Result<(TcpStream, TcpStream), Error> {
    let what = || format!("connect {} to {}", line.near, line.far);
    let entered = |ns: &Namespace, work: &mut (dyn FnMut() -> io::Result<TcpStream> + Send)| {
        ns.run(work).map_err(Error::kernel(what()))?.map_err(Error::system(what()))
    };
    let listener = line.endpoint.run(|| TcpListener::bind((line.far, 0)));
    let listener = listener.map_err(Error::kernel(what()))?.map_err(Error::system(what()))?;
    let to = listener.local_addr().map_err(Error::system(what()))?;
    let client = entered(line.client, &mut || TcpStream::connect_timeout(&to, STALL))?;
    let (endpoint, from): (_, SocketAddr) = listener.accept().map_err(Error::system(what()))?;
    if from.ip() != line.near {
        let other = io::Error::other(format!("it came from {from}: that is another wire"));
        return Err(Error::system(what())(other));
    }
    Ok((client, endpoint))
}

/// Sends until the receiver has enough.
fn send(mut stream: TcpStream) {
    settle_on(0);
    let block = vec![0; BLOCK];
    let _ = stream.set_write_timeout(Some(STALL));
    while stream.write_all(&block).is_ok() {}
}

fn receive(mut stream: TcpStream, duration: Duration) -> io::Result<f64> {
    settle_on(1);
    stream.set_read_timeout(Some(STALL))?;
    let mut block = vec![0; BLOCK];
    let began = Instant::now();
    let mut counting: Option<Instant> = None;
    let mut bytes = 0u64;
    loop {
        let length = stream.read(&mut block)?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let now = Instant::now();
        match counting {
            Some(since) => {
                bytes += length as u64;
                let time = now - since;
                if time >= duration {
                    return Ok(bytes as f64 * 8.0 / time.as_secs_f64() / 1e9);
                }
            }
            None if now - began >= WARM_UP => counting = Some(now),
            None => {}
        }
    }
}

/// Keeps the calling thread on one of the processors, before all others there: where the scheduler puts two threads,
/// and what else it has to do, decides more than the wire does. What of this is not allowed is left as it is.
fn settle_on(which: usize) {
    let _ = setpriority_process(None, HIGHEST);
    let Ok(allowed) = sched_getaffinity(None) else { return };
    let mut usable = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
    if allowed.count() > 1
        && let Some(cpu) = usable.nth(which)
    {
        let mut one = CpuSet::new();
        one.set(cpu);
        let _ = sched_setaffinity(None, &one);
    }
}

/// Each ping goes out when the last one came back.
fn pings(line: &Line<'_>, count: usize) -> Result<Vec<Duration>, Error> {
    let what = || format!("ping {}", line.far);
    let work = || -> io::Result<Vec<Duration>> {
        settle_on(0);
        let echo = Echo::open(line.far)?;
        let end = Instant::now() + STALL + Duration::from_millis(count as u64);
        (0..count)
            .map(|_| {
                let row = echo.row(1, end)?;
                if row.answered == 0 {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer"));
                }
                Ok(row.worst)
            })
            .collect()
    };
    line.client.run(work).map_err(Error::kernel(what()))?.map_err(Error::system(what()))
}
