//! How long wires take: `cargo run --release -p nsm-kernel --example wires [count]`, as root.
//!
//! Each wire joins two pods of its own, made before, in a node that is a namespace too. Prints microseconds.
#![allow(clippy::print_stdout, reason = "prints its result")]

use std::error::Error;
use std::time::{Duration, Instant};

use nsm_kernel::netns::Namespace;
use nsm_kernel::plan::{EndPlan, IpContext, Side, Vxlan, WirePlan};
use nsm_kernel::{Kernel, Nsids};

fn main() -> Result<(), Box<dyn Error>> {
    let count = std::env::args().nth(1).map_or(Ok(100), |count| count.parse())?;
    let kernel = Kernel::new(Namespace::unnamed()?)?;
    let pods = (0..count)
        .map(|_| Ok((Namespace::unnamed()?, Namespace::unnamed()?)))
        .collect::<Result<Vec<_>, nsm_kernel::Error>>()?;
    let context = IpContext {
        src_addrs: vec!["172.16.1.3/32".into(), "2001:db8::3/128".into()],
        dst_addrs: vec!["172.16.1.2/32".into(), "2001:db8::2/128".into()],
        mtu: 9000,
        ..IpContext::default()
    };
    for tunnelled in [false, true] {
        let (mut making, mut checking, mut reading, mut made) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (vni, (client, endpoint)) in (1..).zip(&pods) {
            let id = format!("wire-{vni}");
            let near =
                EndPlan::new(Side::Near, client.id(), "nsm0", &id).with_context(Side::Near, &context)?;
            let far =
                EndPlan::new(Side::Far, endpoint.id(), "nse0", &id).with_context(Side::Far, &context)?;
            let (local, remote) = ("192.0.2.1".parse()?, "192.0.2.2".parse()?);
            let plan = if tunnelled {
                WirePlan::vxlan(
                    id,
                    Vxlan { vni, local, remote, port: 4789, remote_port: 4789 },
                    Side::Near,
                    near,
                )
            } else {
                WirePlan::veth(id, near, far)
            };
            let known = [client, endpoint];
            let applied = timed(&mut making, || kernel.apply(&plan, &known))?;
            timed(&mut checking, || kernel.apply(&plan, &known))?;
            timed(&mut reading, || kernel.snapshot(&plan, &known))?;
            let nsids =
                Nsids { near: applied.near.map(|end| end.nsid), far: applied.far.map(|end| end.nsid) };
            made.push((plan, nsids));
        }
        println!("{count} {} wires", if tunnelled { "VXLAN" } else { "veth" });
        print("apply, new", making);
        print("apply, equal", checking);
        print("snapshot", reading);
        let start = Instant::now();
        for (plan, nsids) in &made {
            kernel.remove_later(plan, *nsids, &[], drop);
        }
        let queued = start.elapsed();
        kernel.flush();
        println!("  remove: queued in {queued:.1?}, all gone after {:.1?}", start.elapsed());
    }
    Ok(())
}

fn timed<T>(times: &mut Vec<Duration>, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    times.push(start.elapsed());
    result
}

fn print(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |per_cent: usize| times[(times.len() - 1) * per_cent / 100].as_micros();
    println!(
        "  {what:13} min {:5}  p10 {:5}  p50 {:5}  p90 {:5}  p99 {:5}",
        at(0),
        at(10),
        at(50),
        at(90),
        at(99)
    );
}
