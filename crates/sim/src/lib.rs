//! Whole meshes in one process, in virtual time, from a seed.
//!
//! A seed is a mesh (nodes, endpoints, clients, how long tokens live) and what is done to it. The programs are ours as
//! they are: registry, managers, forwarders, endpoints and clients are started by what `nsm` starts them with, on one
//! thread of a runtime whose clock only goes on when all of them wait.
//!
//! | Real | Modelled |
//! |---|---|
//! | every chain and element, the runner, leases, monitors, dialling, refresh, heal, expiry | the network ([`network`]): messages instead of sockets, TLS and HTTP/2 |
//! | paths, tokens, certificates, policies; tonic's services, encoding, deadlines, cancellation | the CA's daemon: identities are issued by its library, and renewed at half their life |
//! | pools of connections, descriptors beside messages | what a handshake decides: the same verifier, no TLS |
//! | the registry's store, its watches, caches and expiry | the kernel ([`kernel`]): interfaces, VNIs, namespaces; no packets, so no probes |
//! | the plans of wires on disk | the death of a process: it reaches nobody any more, and what it holds is dropped |
//!
//! Randomness and the time of day come from [`ambient`], so a seed is the same run each time: `trace` hashes what
//! happens, and two runs have the same hash. A run is a process of its own, because programs have global state.

mod ambient;
mod chance;
mod check;
mod faults;
mod kernel;
mod network;
mod trace;
mod world;

use std::{collections::BTreeSet, fmt, sync::atomic::Ordering, time::Duration};

use anyhow::{Context as _, Result};
use tokio::time::{Instant, sleep};

pub use trace::Violation;

use crate::{
    chance::Chance,
    check::Checker,
    faults::Faults,
    network::{TURN, Weather},
    trace::Trace,
    world::{CAPACITY, Shape, What, World, only},
};

/// How a seed is run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Whether nothing goes wrong.
    pub calm: bool,
    /// Whether what happens is written to the standard error.
    pub trace: bool,
}

/// What came of a seed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// Of everything that happened.
    pub hash: u64,
    /// How much happened.
    pub events: u64,
    /// How long it took in there.
    pub simulated: Duration,
    /// How many certificates have expired with nobody to give out others.
    pub certificates_expired: u64,
    /// What did not hold.
    pub violations: Vec<Violation>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, hash, events, simulated, certificates_expired: expired, violations } = self;
        let millis = simulated.as_millis();
        write!(
            f,
            "seed {seed} hash {hash:016x} events {events} simulated {millis} ms certificates expired {expired}"
        )?;
        violations.iter().try_for_each(|violation| write!(f, "\n  {violation}"))
    }
}

/// How often everything is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How long things go wrong.
const TROUBLE: Duration = Duration::from_secs(90);
/// How long a mesh may take to be well when nothing goes wrong any more; each check has its own bound within.
const LONGEST: Duration = Duration::from_secs(400);

/// Runs a seed on a thread of its own.
///
/// # Errors
/// What has nothing to do with the seed: no directory, no thread.
pub fn run(seed: u64, options: Options) -> Result<Outcome> {
    let thread = std::thread::Builder::new().name(format!("seed {seed}")).stack_size(16 << 20);
    let running = thread.spawn(move || {
        ambient::seed(seed);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.context("a runtime")?.block_on(async {
            ambient::start_clock();
            live(seed, options).await
        })
    });
    running?.join().map_err(|_| anyhow::anyhow!("seed {seed}: the simulation itself panicked"))?
}

async fn live(seed: u64, options: Options) -> Result<Outcome> {
    let trace = Trace::new(options.trace);
    let mut chance = Chance::new(seed, 1);
    let shape = Shape::draw(&mut chance);
    trace.note(format_args!("{shape:?}"));
    let mut world = World::new(shape, seed, trace.clone())?;
    world.supervise()?;
    let mut checker = Checker::default();
    let mut faults = Faults::new(Chance::new(seed, 5), &world);
    let end = Instant::now() + TROUBLE;
    let mut calm = Some(Instant::now());
    while Instant::now() < end && !trace.is_violated() {
        sleep(LOOK).await;
        if !options.calm {
            faults.step(&mut world)?;
        }
        world.supervise()?;
        calm = if faults.is_calm() { calm.or(Some(Instant::now())) } else { None };
        checker.look(&world, calm);
    }
    faults.end(&mut world)?;
    let calm = Instant::now();
    settle(&mut world, &mut checker, calm).await?;
    if !trace.is_violated() {
        drill(&mut world, &mut checker, &mut chance, faults.have_stalled()).await?;
    }
    if !trace.is_violated() {
        audit(&mut world, &mut checker).await?;
    }
    let (hash, events, violations) = trace.end();
    let certificates_expired = world.certificates_expired.load(Ordering::Relaxed);
    Ok(Outcome { seed, hash, events, simulated: ambient::elapsed(), certificates_expired, violations })
}

/// Waits until the mesh is well, or something does not hold.
async fn settle(world: &mut World, checker: &mut Checker, calm: Instant) -> Result<()> {
    let latest = calm + LONGEST;
    loop {
        sleep(LOOK).await;
        world.supervise()?;
        checker.look(world, Some(calm));
        if world.trace.is_violated() || checker.is_well() {
            return Ok(());
        }
        if Instant::now() > latest {
            world.trace.violated("the mesh is well in the end", checker.complaints().join("; "));
            return Ok(());
        }
    }
}

/// How late events are while endpoints go, at most.
const LATE: Duration = Duration::from_millis(200);
/// How long the mesh may take, while nothing else goes wrong, over what is done to it one at a time.
const SOON: Duration = Duration::from_secs(15);
/// How long a wire of which an interface was deleted may be without it: it is mended once a second.
const MENDED: Duration = Duration::from_secs(3);

/// Waits until `well` says so, for a bounded time.
async fn soon(
    world: &mut World,
    checker: &mut Checker,
    invariant: &'static str,
    well: impl Fn(&Checker) -> bool,
) -> Result<()> {
    within(SOON, world, checker, invariant, well).await
}

/// As [`soon`], for this long.
async fn within(
    bound: Duration,
    world: &mut World,
    checker: &mut Checker,
    invariant: &'static str,
    well: impl Fn(&Checker) -> bool,
) -> Result<()> {
    let (begin, mut seen) = (Instant::now(), false);
    while !seen && !world.trace.is_violated() {
        if begin.elapsed() > bound {
            world.trace.violated(invariant, checker.complaints().join("; "));
        }
        sleep(LOOK).await;
        world.supervise()?;
        checker.look(world, Some(begin));
        seen = well(checker);
    }
    Ok(())
}

/// Whoever lives asks again before anything of his can expire, whatever the clock says; identities take their seconds.
async fn clock_jumps(world: &mut World, checker: &mut Checker, seconds: i64) -> Result<()> {
    world.trace.note(format_args!("only the clock jumps {seconds} s"));
    let expired =
        |world: &World| -> u64 { world.all(|_| true).iter().map(|slot| world.expired(*slot)).sum() };
    let (begin, before) = (Instant::now(), expired(world));
    ambient::jump(seconds);
    while begin.elapsed() < SOON {
        sleep(LOOK).await;
        world.supervise()?;
        checker.look(world, Some(begin));
    }
    let more = expired(world) - before;
    if more > 0 {
        world.trace.violated("a clock that jumps ends no connection", format!("{more} have expired"));
    }
    // Whoever was refused meanwhile has the time that he has after other trouble.
    settle(world, checker, Instant::now()).await
}

/// Somebody deletes interfaces of wires, and sets one down. Nobody but the node's own forwarder has to see that.
async fn interfaces_go(world: &mut World, checker: &mut Checker, chance: &mut Chance) -> Result<()> {
    for _ in 0..4 {
        let devices = world.kernels.all();
        if world.trace.is_violated() || devices.is_empty() {
            return Ok(());
        }
        world.kernels.cut(devices[chance.below(devices.len())].2.index);
        let mended = |checker: &Checker| checker.is_well();
        within(MENDED, world, checker, "an interface that is deleted is made again", mended).await?;
    }
    let devices = world.kernels.all();
    if let Some((_, _, device)) = devices.get(chance.below(devices.len())) {
        world.kernels.set_down(device.index);
        let bound = world.shape.lifetime;
        within(bound, world, checker, "an interface that was set down is up again", Checker::all_up).await?;
    }
    Ok(())
}

/// One thing after the other is done to a mesh that is well. While much goes wrong at once tokens that expire clear up
/// after everybody, in the end; here nobody has that long. `deaf`: not everybody may hear of what happens.
async fn drill(world: &mut World, checker: &mut Checker, chance: &mut Chance, deaf: bool) -> Result<()> {
    // What has been under way for long, with nobody to answer it, comes to its end.
    let quiet = Instant::now() + world::REQUEST * 3;
    while Instant::now() < quiet || !checker.is_well() {
        settle(world, checker, Instant::now()).await?;
        if world.trace.is_violated() {
            return Ok(());
        }
    }
    world.trace.note(format_args!("nothing happens"));
    let interfaces = |world: &World| -> BTreeSet<u32> {
        world.kernels.all().into_iter().map(|(_, _, device)| device.index).collect()
    };
    let (begin, before) = (Instant::now(), interfaces(world));
    while begin.elapsed() < world.shape.lifetime + SOON && !world.trace.is_violated() {
        sleep(LOOK).await;
        world.supervise()?;
        checker.look(world, Some(begin));
        if !checker.is_well() || interfaces(world) != before {
            let mut seen = checker.complaints();
            seen.extend((interfaces(world) != before).then(|| "interfaces were made anew".to_owned()));
            world.trace.violated("what nothing happens to stays", seen.join("; "));
        }
    }
    for seconds in [7200, -7200] {
        if !world.trace.is_violated() {
            clock_jumps(world, checker, seconds).await?;
        }
    }

    interfaces_go(world, checker, chance).await?;

    let endpoints = world.all(|what| matches!(what, What::Endpoint { .. }));
    if endpoints.len() > 1 && !deaf {
        for endpoint in endpoints {
            // What is told of the endpoint that was comes after the other one has answered.
            world.net.set_weather(Weather { late: LATE, ..Weather::default() });
            world.net.in_turn(true);
            world.kill(endpoint);
            world.slots[endpoint].wanted = false;
            soon(world, checker, "another endpoint serves", Checker::all_served).await?;
            sleep(TURN).await;
            world.net.in_turn(false);
            world.net.set_weather(Weather::default());
            world.slots[endpoint].wanted = true;
            settle(world, checker, Instant::now()).await?;
        }
    }

    if world.trace.is_violated() {
        return Ok(());
    }
    let node = chance.below(world.shape.nodes);
    let what = What::Client { patient: false, service: world::SERVICE.to_owned() };
    let visitor = world.add(what, "visitor".to_owned(), node)?;
    for stay in 1..=8_u32 {
        world.trace.note(format_args!("a visitor asks and leaves"));
        world.slots[visitor].wanted = true;
        world.start(visitor)?;
        sleep(chance.duration(Duration::from_millis(1)..Duration::from_millis(40) * stay)).await;
        world.stop(visitor);
        soon(world, checker, "who leaves leaves nothing", Checker::is_well).await?;
        if world.trace.is_violated() {
            return Ok(());
        }
    }
    world.trace.note(format_args!("a visitor asks in vain"));
    world.kernels.set_refusals(1.0);
    world.slots[visitor].wanted = true;
    world.start(visitor)?;
    sleep(Duration::from_secs(4)).await;
    world.stop(visitor);
    world.kernels.set_refusals(0.0);
    soon(world, checker, "a request that fails leaves nothing", Checker::is_well).await
}

/// Nothing is left when all clients have closed, and all that was lent can be lent again.
async fn audit(world: &mut World, checker: &mut Checker) -> Result<()> {
    world.trace.note(format_args!("everybody closes"));
    let everybody = world.all(|what| matches!(what, What::Client { .. }));
    everybody.iter().for_each(|client| world.stop(*client));
    soon(world, checker, "a close goes all the way", Checker::is_well).await?;
    everybody.iter().for_each(|client| world.kill(*client));
    let plans = world.plans();
    if let [plan, ..] = &plans[..] {
        world.trace.violated("nothing is left on disk", format!("{} plans, such as {plan}", plans.len()));
    }
    if let [vni, ..] = &world.vnis()[..] {
        world.trace.violated("every VNI is given back", vni.clone());
    }
    if world.trace.is_violated() {
        return Ok(());
    }
    world.trace.note(format_args!("everything is asked for"));
    for endpoint in world.all(|what| matches!(what, What::Endpoint { .. })) {
        let (name, node) = (world.slots[endpoint].name.clone(), world.slots[endpoint].node);
        let mut asking = Vec::new();
        for number in 0..CAPACITY {
            let what = What::Client { patient: true, service: only(&name) };
            let client = world.add(what, format!("auditor{number}-{name}"), node)?;
            world.start(client)?;
            asking.push(client);
        }
        settle(world, checker, Instant::now()).await?;
        asking.iter().for_each(|client| world.stop(*client));
        settle(world, checker, Instant::now()).await?;
        asking.iter().for_each(|client| world.kill(*client));
    }
    if world.trace.is_violated() {
        return Ok(());
    }
    world.trace.note(format_args!("all endpoints die"));
    for endpoint in world.all(|what| matches!(what, What::Endpoint { .. })) {
        world.slots[endpoint].wanted = false;
        world.kill(endpoint);
    }
    sleep(world.shape.lifetime + SOON).await;
    let forwarders = world.all(|what| *what == What::Forwarder);
    for name in world.registered().await? {
        if !forwarders.iter().any(|slot| world.slots[*slot].name == name) {
            world.trace.violated("who is dead is forgotten", format!("{name} is registered"));
        }
    }
    Ok(())
}
