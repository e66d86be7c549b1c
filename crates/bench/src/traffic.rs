//! What packets cost on a wire, beside a plain device of the same kind between the same pods, measured in turns; and on
//! a second plain device, whose distance from the first is the noise of all that.

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

use crate::bare::{self, BARE, CONTROL, Plain};
use crate::client::Worker;
use crate::figures::Target;
use crate::{Error, Measure, Options, Row, Times, Topology, Value};

/// What is measured beside the plain device.
const WIRE: &str = "wire";
/// What is measured beside it for control.
const EQUAL: &str = "its equal";
/// What a row of the control is called.
const NOISE: &str = "  noise: its equal beside the bare device";

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
        let seen = Seen::of(&client)?;
        let link = seen.links.iter().find(|link| link.name == interface);
        link.map(|link| link.mtu).ok_or_else(|| Error::Client(format!("has no interface {interface}")))
    };
    let mtu = mtu_of(&made.interface)?;
    for plain in [&BARE, &CONTROL] {
        match topology {
            Topology::Local => bare::set_mtu(lab, plain, mtu)?,
            Topology::TwoNodes => bare::hand_made_vxlan(lab, plain, mtu)?,
        }
    }
    let beside = mtu_of(BARE.interface)?;
    let note = match topology {
        Topology::Local => format!("beside a bare veth pair; MTU {mtu} and {beside}"),
        Topology::TwoNodes => {
            format!("beside a hand-made VXLAN over the same underlay; MTU {mtu} and {beside}")
        }
    };
    let wire = Line { client: &client, endpoint: &endpoint, near: made.near, far: made.far };
    let plain = |plain: &Plain| Line {
        client: &client,
        endpoint: &endpoint,
        near: plain.near.into(),
        far: plain.far.into(),
    };
    let lines = [wire, plain(&CONTROL), plain(&BARE)];

    for measure in measures {
        match measure {
            Measure::Throughput => {
                for (direction, id, what) in [
                    (Direction::ToEndpoint, "up", "TCP, one stream, client to endpoint"),
                    (Direction::ToClient, "down", "TCP, one stream, endpoint to client"),
                ] {
                    progress(&format!("{topology}: {what}, {} rounds", options.pairs));
                    let [of_wire, of_control, of_plain] = in_turns(options.pairs, lab, |which| {
                        stream(&lines[which], direction, options.duration)
                    })?;
                    let value = Value::beside(WIRE, of_wire, of_plain.clone(), "Gbit/s");
                    let ratio = if let Value::Beside { ratio, .. } = &value { *ratio } else { f64::NAN };
                    rows.push(
                        Row::new(topology, format!("throughput.{id}"), what, value)
                            .target(Target::at_least(ratio, 0.97, ""))
                            .note(&note),
                    );
                    let value = Value::beside(EQUAL, of_control, of_plain, "Gbit/s");
                    rows.push(Row::new(topology, format!("throughput.{id}.control"), NOISE, value));
                }
            }
            Measure::Latency => {
                progress(&format!("{topology}: pings, {} rounds", options.pairs));
                let [of_wire, of_control, of_plain] =
                    in_turns(options.pairs, lab, |which| pings(&lines[which], options.pings))?;
                let figures = [
                    ("mean", "ping flood, average", (|times: Times| times.mean) as fn(Times) -> f64),
                    ("p50", "ping flood, p50", |times| times.p50),
                    ("p99", "ping flood, p99", |times| times.p99),
                ];
                for (id, what, figure) in figures {
                    let of = |rounds: &[Vec<Duration>]| -> Vec<f64> {
                        rounds.iter().map(|times| figure(Times::of(times.iter().copied()))).collect()
                    };
                    let beside = |what, rounds| Value::beside(what, of(rounds), of(&of_plain), "µs");
                    let (wire, control) = (beside(WIRE, &of_wire), beside(EQUAL, &of_control));
                    rows.push(Row::new(topology, format!("latency.{id}"), what, wire));
                    rows.push(Row::new(topology, format!("latency.{id}.control"), NOISE, control));
                }
            }
            Measure::Setup | Measure::Heal => {}
        }
    }
    worker.close(lab)?;
    Ok(())
}

// === private helpers ===

/// Measures each line in turns: whatever else the machine does meets all.
fn in_turns<T>(
    rounds: usize,
    lab: &Lab,
    mut once: impl FnMut(usize) -> Result<T, Error>,
) -> Result<[Vec<T>; 3], Error> {
    let mut figures = [const { Vec::new() }; 3];
    for round in 0..rounds {
        lab.supervisor.check()?;
        for which in order(round) {
            figures[which].push(once(which)?);
        }
    }
    Ok(figures)
}

/// Every order comes, and any two come first equally often: nobody profits from a place.
fn order(round: usize) -> [usize; 3] {
    let (first, second) = (round % 3, (round + 1) % 3);
    let third = (round + 2) % 3;
    if round.is_multiple_of(2) { [first, second, third] } else { [third, second, first] }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_six_rounds_everybody_has_had_every_place_twice() {
        let rounds: Vec<_> = (0..6).map(order).collect();
        for which in 0..3 {
            for place in 0..3 {
                let times = rounds.iter().filter(|round| round[place] == which).count();
                assert_eq!(times, 2, "{which} at {place}: {rounds:?}");
            }
        }
        let place = |round: &[usize; 3], which| round.iter().position(|other| *other == which);
        let wire_first = rounds.iter().filter(|round| place(round, 0) < place(round, 2)).count();
        assert_eq!(wire_first, 3, "{rounds:?}");
    }
}
