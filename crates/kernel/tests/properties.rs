//! Any plan: it survives storage, compares with itself, and the kernel becomes equal to it, from any other plan.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

mod common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use nsm_kernel::netns::NsId;
use nsm_kernel::plan::{
    ContextPolicy, ContextRoute, EndPlan, IpContext, Mac, Neighbour, Policy, PortRange, Route, Selector,
    Side, WirePlan, parse_mark,
};
use nsm_kernel::store::{Record, Store};
use nsm_kernel::{Nsids, difference};
use proptest::collection::vec;
use proptest::option::of;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// A host out of few, so that plans collide.
fn host(v6: bool, base: u16) -> impl Strategy<Value = IpAddr> {
    (1..6u16).prop_map(move |n| {
        if v6 {
            Ipv6Addr::new(0x2001, 0xdb8, base, 0, 0, 0, 0, n).into()
        } else {
            Ipv4Addr::from(0xac10_0000 | u32::from(base) << 8 | u32::from(n)).into()
        }
    })
}

fn address() -> impl Strategy<Value = IpNet> {
    any::<bool>().prop_flat_map(|v6| {
        let lengths = if v6 { vec![64, 127, 128] } else { vec![24, 31, 32] };
        (host(v6, 1), prop::sample::select(lengths)).prop_map(|(ip, length)| IpNet::new(ip, length).unwrap())
    })
}

fn route() -> impl Strategy<Value = Route> {
    any::<bool>().prop_flat_map(|v6| {
        let lengths = if v6 { vec![0, 48, 64, 128] } else { vec![0, 8, 24, 32] };
        (host(v6, 2), prop::sample::select(lengths), of(host(v6, 3)), any::<bool>()).prop_map(
            |(ip, length, via, link_scope)| Route {
                dst: IpNet::new(ip, length).unwrap().trunc(),
                via,
                link_scope: link_scope && via.is_none(),
            },
        )
    })
}

fn mac() -> impl Strategy<Value = Mac> {
    any::<[u8; 5]>().prop_map(|[a, b, c, d, e]| Mac([2, a, b, c, d, e]))
}

fn ports() -> impl Strategy<Value = PortRange> {
    (1..u16::MAX, 0..100u16).prop_map(|(first, more)| PortRange { first, last: first.saturating_add(more) })
}

fn policy() -> impl Strategy<Value = Policy> {
    (of(address()), of(prop::sample::select(vec![6u8, 17])), of(ports()), of(ports()), vec(route(), 0..3))
        .prop_map(|(from, proto, src_ports, dst_ports, mut routes)| {
            // One family where the source has one.
            routes
                .retain(|route| from.is_none_or(|from| from.addr().is_ipv4() == route.dst.addr().is_ipv4()));
            Policy { when: Selector { from, proto, src_ports, dst_ports }, routes }
        })
}

fn end(side: Side, ns: NsId) -> impl Strategy<Value = EndPlan> {
    let things = (vec(address(), 0..4), vec(route(), 0..5), vec((any::<bool>(), 1..6u16, mac()), 0..3));
    let policies = vec(policy(), 0..if side == Side::Near { 3 } else { 1 });
    (things, policies, of(1280..9000u32), of(mac()), "[a-z]{1,20}").prop_map(
        move |((addresses, routes, neighbours), policies, mtu, mac, alias)| {
            let mut end = EndPlan::new(side, ns, format!("nsm-{side}"), &alias);
            (end.addresses, end.routes, end.policies, end.mtu, end.mac) =
                (addresses, routes, policies, mtu, mac);
            for (v6, n, mac) in neighbours {
                let ip: IpAddr = if v6 {
                    Ipv6Addr::new(0x2001, 0xdb8, 4, 0, 0, 0, 0, n).into()
                } else {
                    Ipv4Addr::from(0xac10_0400 | u32::from(n)).into()
                };
                if end.neighbours.iter().all(|other| other.ip != ip) {
                    end.neighbours.push(Neighbour { ip, mac, permanent: false });
                }
            }
            end
        },
    )
}

fn wire(near: NsId, far: NsId) -> impl Strategy<Value = WirePlan> {
    (end(Side::Near, near), end(Side::Far, far))
        .prop_map(|(near, far)| WirePlan::veth("wire", near, far))
        .prop_filter("valid", |plan| plan.validate().is_ok())
}

#[test]
fn the_kernel_becomes_equal_to_any_plan_from_any_other() {
    const NAME: &str = "the_kernel_becomes_equal_to_any_plan_from_any_other";
    if common::node(NAME).is_none() {
        return;
    }
    let config = Config { cases: 60, failure_persistence: None, ..Config::default() };
    let nowhere = NsId { dev: 0, ino: 0 };
    TestRunner::new(config)
        .run(&vec(wire(nowhere, nowhere), 1..4), |mut plans| {
            // A node of its own for each case, so that what fails can be made smaller.
            let node = common::node(NAME).unwrap();
            for ns in node.known() {
                // As in every pod: without any IPv4 address ever, the kernel takes a gateway for a broadcast address.
                common::output(ns, "ip link set lo up");
            }
            for plan in &mut plans {
                plan.near.as_mut().unwrap().ns = node.client.id();
                plan.far.as_mut().unwrap().ns = node.endpoint.id();
            }
            let mut last = None;
            for plan in &plans {
                let applied = node.kernel.apply(plan, &node.known()).map_err(|e| fail(&e))?;
                let seen = node.kernel.snapshot(plan, &node.known()).map_err(|e| fail(&e))?;
                prop_assert_eq!(difference(plan, &seen), [], "{}\nseen as {}", plan, seen.plan);
                let again = node.kernel.apply(plan, &node.known()).map_err(|e| fail(&e))?;
                prop_assert_eq!(again.writes, 0);
                prop_assert_eq!(applied.created, last.is_none());
                last = Some((plan, applied));
            }
            if let Some((plan, applied)) = last {
                node.kernel.remove(plan, common::nsids(&applied), &node.known()).map_err(|e| fail(&e))?;
            }
            for ns in node.known() {
                prop_assert_eq!(common::output(ns, "ip -br link").lines().count(), 1);
                prop_assert!(!common::output(ns, "ip rule").contains("proto 78"));
            }
            Ok(())
        })
        .unwrap();
}

fn fail(error: &nsm_kernel::Error) -> TestCaseError {
    TestCaseError::fail(format!("{error:?}"))
}

fn some_wire() -> impl Strategy<Value = WirePlan> {
    wire(NsId { dev: 4, ino: 1 }, NsId { dev: 4, ino: 2 })
}

proptest! {
    #![proptest_config(Config { failure_persistence: None, ..Config::default() })]

    #[test]
    fn a_plan_survives_its_text(plan in some_wire()) {
        let text = serde_json::to_string(&plan).unwrap();
        prop_assert_eq!(serde_json::from_str::<WirePlan>(&text).unwrap(), plan);
    }

    #[test]
    fn a_plan_equals_itself_in_any_order(plan in some_wire()) {
        for (_, end) in plan.ends() {
            prop_assert_eq!(end.difference(end), []);
            prop_assert_eq!(end.canonical().canonical(), end.canonical());
            let mut mixed = end.canonical();
            mixed.addresses.reverse();
            mixed.routes.reverse();
            prop_assert_eq!(end.difference(&mixed), []);
        }
    }

    #[test]
    fn a_plan_survives_the_store(plan in some_wire(), id in "\\PC{1,30}") {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let record = Record { plan: WirePlan { id, ..plan }, nsids: Nsids::default(), data: serde_json::Value::Null };
        if record.plan.validate().is_ok() {
            store.put(&record).unwrap();
            prop_assert_eq!(store.load().unwrap().records, [record]);
        }
    }

    #[test]
    fn marks_lead_back_to_the_connection(id in any::<String>(), near in any::<bool>(), other in any::<String>()) {
        let ns = NsId { dev: 4, ino: 1 };
        let plan = WirePlan::veth(id.clone(), EndPlan::new(Side::Near, ns, "a", ""), EndPlan::new(Side::Far, ns, "b", ""));
        let side = if near { Side::Near } else { Side::Far };
        let mark = plan.mark(side);
        prop_assert!(plan.validate().is_err() || mark.len() <= 127);
        prop_assert_eq!(parse_mark(&mark), Some((side, id)));
        if let Some((side, id)) = parse_mark(&other) {
            prop_assert!(other.contains(&side.to_string()) && !id.contains('\0'));
        }
    }

    #[test]
    fn no_context_is_too_strange(
        texts in vec(prop_oneof![any::<String>(), "[0-9a-f:./-]{0,20}"], 12),
        mtu in any::<u32>(),
    ) {
        let text = |at: usize| texts[at].clone();
        let route = |at| ContextRoute { prefix: text(at), next_hop: text(at + 1) };
        let context = IpContext {
            src_addrs: vec![text(0)],
            dst_addrs: vec![text(1)],
            src_routes: vec![route(2)],
            dst_routes: vec![route(3)],
            policies: vec![ContextPolicy {
                from: text(4), proto: text(5), src_port: text(6), dst_port: text(7), routes: vec![route(8)],
            }],
            neighbours: vec![(text(10), text(11))],
            mtu,
        };
        for side in [Side::Near, Side::Far] {
            let end = EndPlan::new(side, NsId { dev: 4, ino: 1 }, text(0), &text(1)).with_context(side, &context);
            if let Ok(end) = end {
                let _ = WirePlan::veth(text(2), end.clone(), end.clone()).validate();
                prop_assert!(end.to_string().contains(" in 4/1 alias "));
            }
        }
    }
}
