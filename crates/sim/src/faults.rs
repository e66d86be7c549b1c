//! What is done to a mesh.

use std::time::Duration;

use anyhow::Result;
use tokio::time::Instant;

use crate::{
    ambient,
    chance::Chance,
    network::Weather,
    world::{SHORT, What, World},
};

/// Something that ends at a time.
#[derive(Debug)]
enum Passing {
    Weather,
    Cut(usize, usize),
    Frozen(usize),
    Down(usize),
    Closed(usize),
    Identities,
    Kernel,
    Clock(i64),
}

/// Draws faults and undoes them.
#[derive(Debug)]
pub(crate) struct Faults {
    chance: Chance,
    passing: Vec<(Instant, Passing)>,
    next: Instant,
    /// How long there is between two, about.
    pace: Duration,
    /// Whether messages have been lost without a word.
    stalled: bool,
    /// When no identities are given out for so long that those expire which are short, if they are.
    outage: Option<(Instant, Duration)>,
}

impl Faults {
    pub(crate) fn new(mut chance: Chance, world: &World) -> Self {
        let pace = chance.duration(Duration::from_secs(1)..Duration::from_secs(20));
        let secs = Duration::from_secs;
        let outage = (world.shape.certificates == SHORT).then(|| {
            (Instant::now() + chance.duration(secs(5)..secs(30)), chance.duration(secs(30)..secs(80)))
        });
        Self {
            chance,
            passing: Vec::new(),
            next: Instant::now() + Duration::from_secs(5),
            pace,
            stalled: false,
            outage,
        }
    }

    /// Does what is due.
    pub(crate) fn step(&mut self, world: &mut World) -> Result<()> {
        let now = Instant::now();
        self.undo(world, |until| until <= now)?;
        if let Some((_, lasts)) = self.outage.take_if(|(at, _)| *at <= now) {
            self.withhold(world, now + lasts);
        }
        if now >= self.next {
            self.next = now + self.chance.duration(self.pace / 5..self.pace * 3);
            self.strike(world)?;
        }
        Ok(())
    }

    /// Whether nothing is being done.
    pub(crate) fn is_calm(&self) -> bool {
        self.passing.is_empty()
    }

    /// Whether messages have been lost without a word: whoever has asked for events that way hears of none until he asks
    /// again, with his next request.
    pub(crate) fn have_stalled(&self) -> bool {
        self.stalled
    }

    /// Ends everything that is being done.
    pub(crate) fn end(&mut self, world: &mut World) -> Result<()> {
        self.undo(world, |_| true)
    }

    fn undo(&mut self, world: &mut World, over: impl Fn(Instant) -> bool) -> Result<()> {
        let (done, rest): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.passing).into_iter().partition(|(until, _)| over(*until));
        self.passing = rest;
        for (_, passing) in done {
            world.trace.note(format_args!("over: {passing:?}"));
            match passing {
                Passing::Weather => world.net.set_weather(Weather::default()),
                Passing::Cut(a, b) => world.net.heal(a, b),
                Passing::Frozen(slot) => {
                    if let Some(running) = &world.slots[slot].running {
                        running.process.freeze(false);
                    }
                }
                Passing::Down(slot) | Passing::Closed(slot) => {
                    world.slots[slot].wanted = true;
                    if world.is_running(slot) {
                        // It was told to end and has not yet.
                        world.kill(slot);
                    }
                    world.start(slot)?;
                }
                Passing::Identities => {
                    world.issuing.send_replace(true);
                }
                Passing::Kernel => world.kernels.set_refusals(0.0),
                Passing::Clock(back) => ambient::jump(back),
            }
        }
        Ok(())
    }

    fn strike(&mut self, world: &mut World) -> Result<()> {
        let millis = Duration::from_millis;
        let secs = Duration::from_secs;
        let now = Instant::now();
        let slot = self.chance.below(world.slots.len());
        match self.chance.below(19) {
            0..=3 => {
                let until = now + self.chance.duration(millis(10)..secs(15));
                self.down(world, slot, until);
            }
            4 => {
                // A whole node, as by a power cut: pods come back as others.
                let node = self.chance.below(world.shape.nodes);
                let until = now + self.chance.duration(millis(500)..secs(20));
                world.trace.note(format_args!("node {node} fails"));
                for slot in world.all(|_| true) {
                    if world.slots[slot].node == node && world.slots[slot].what != What::Registry {
                        self.down(world, slot, until);
                    }
                }
            }
            5 => {
                let pods = world.all(|what| matches!(what, What::Endpoint { .. } | What::Client { .. }));
                let pod = pods[self.chance.below(pods.len())];
                if world.is_running(pod) && world.slots[pod].wanted {
                    let until = now + self.chance.duration(millis(10)..secs(10));
                    world.replace(pod)?;
                    world.slots[pod].wanted = false;
                    self.passing.push((until, Passing::Down(pod)));
                }
            }
            6 | 7 if world.shape.nodes > 1 => {
                let a = self.chance.below(world.shape.nodes);
                let b = (a + 1 + self.chance.below(world.shape.nodes - 1)) % world.shape.nodes;
                let until = now + self.chance.duration(millis(100)..secs(50));
                world.trace.note(format_args!("cut {a} {b}"));
                world.net.cut(a, b);
                self.passing.push((until, Passing::Cut(a, b)));
            }
            8 | 9 => {
                let mut some =
                    |most: f64| if self.chance.happens(0.5) { self.chance.fraction() * most } else { 0.0 };
                let weather = Weather {
                    breaks: some(0.3),
                    stalls: some(0.15),
                    twice: some(0.4),
                    slow: some(0.5),
                    late: Duration::ZERO,
                };
                let until = now + self.chance.duration(secs(1)..secs(30));
                world.trace.note(format_args!("weather {weather:?}"));
                self.stalled |= weather.stalls > 0.0;
                world.net.set_weather(weather);
                self.passing.push((until, Passing::Weather));
            }
            10 => {
                if let Some(running) = &world.slots[slot].running {
                    world.trace.note(format_args!("freeze {}", world.slots[slot].name));
                    running.process.freeze(true);
                    let until = now + self.chance.duration(millis(100)..secs(20));
                    self.passing.push((until, Passing::Frozen(slot)));
                }
            }
            11 | 12 => {
                let clients = world.all(|what| matches!(what, What::Client { .. }));
                let client = clients[self.chance.below(clients.len())];
                if world.slots[client].wanted && world.is_running(client) {
                    world.stop(client);
                    let until = now + self.chance.duration(millis(100)..secs(30));
                    self.passing.push((until, Passing::Closed(client)));
                }
            }
            13 => {
                let ends = world.all(|what| !matches!(what, What::Client { .. }));
                let end = ends[self.chance.below(ends.len())];
                if world.slots[end].wanted && world.is_running(end) {
                    world.stop(end);
                    let until = now + self.chance.duration(millis(500)..secs(15));
                    self.passing.push((until, Passing::Closed(end)));
                }
            }
            14 => {
                let seconds = if self.chance.happens(0.5) { 7200 } else { -7200 };
                world.trace.note(format_args!("the clock jumps {seconds} s"));
                ambient::jump(seconds);
                if self.chance.happens(0.7) {
                    let until = now + self.chance.duration(millis(100)..secs(60));
                    self.passing.push((until, Passing::Clock(-seconds)));
                }
            }
            15..=17 => {
                let devices = world.kernels.all();
                if !devices.is_empty() {
                    let (_, _, device) = &devices[self.chance.below(devices.len())];
                    match self.chance.happens(0.7) {
                        true => drop(world.kernels.cut(device.index)),
                        false => world.kernels.set_down(device.index),
                    }
                }
            }
            _ => {
                if self.chance.happens(0.5) {
                    let until = now + self.chance.duration(secs(1)..secs(200));
                    self.withhold(world, until);
                } else {
                    let likely = self.chance.fraction();
                    world.trace.note(format_args!("the kernel refuses {likely:.2}"));
                    world.kernels.set_refusals(likely);
                    let until = now + self.chance.duration(secs(1)..secs(20));
                    self.passing.push((until, Passing::Kernel));
                }
            }
        }
        Ok(())
    }

    fn withhold(&mut self, world: &World, until: Instant) {
        world.trace.note(format_args!("no identities"));
        world.issuing.send_replace(false);
        self.passing.push((until, Passing::Identities));
    }

    fn down(&mut self, world: &mut World, slot: usize, until: Instant) {
        if world.slots[slot].wanted && world.is_running(slot) {
            world.kill(slot);
            world.slots[slot].wanted = false;
            self.passing.push((until, Passing::Down(slot)));
        }
    }
}
