//! Addresses for wires that meet in one network (spec/control-plane.md 11.5, upstream's singlepointipam): each client gets
//! one address with the mask of the prefix, and finds the others there by itself; nobody gets routes. [`Addresses`] is
//! pure; [`SinglePointIpam`] is the chain element, in the place of [`Ipam`](crate::ipam::Ipam).

use std::{collections::HashMap, fmt, net::IpAddr, sync::Arc};

use async_trait::async_trait;
use ipnet::IpNet;
use nsm_api::pb::{
    connection::Connection, connectioncontext::IpContext, networkservice::NetworkServiceRequest,
};
use nsm_mesh::{Context, Element, Error, Lease, Next, Release, Result};
use parking_lot::Mutex;

use crate::ipam::{Exhausted, Pool, PrefixGroups, parse_net};

/// What is free and what is not. Of each prefix the lowest address is the endpoint's own; the last of an IPv4 prefix is
/// for broadcasts.
#[derive(Debug)]
pub struct Addresses {
    groups: Vec<Vec<Pool>>,
    held: HashMap<String, Vec<IpNet>>,
}

impl Addresses {
    /// All free but those that are nobody's.
    #[must_use]
    pub fn new(groups: &PrefixGroups) -> Self {
        let all = groups.0.iter().flatten();
        let broadcasts = all.clone().filter(|net| net.addr().is_ipv4()).map(IpNet::broadcast);
        let nobodys: Vec<_> = all.map(IpNet::network).chain(broadcasts).collect();
        let pool = |net: &IpNet| {
            let mut pool = Pool::new(*net);
            nobodys.iter().for_each(|address| pool.take(*address));
            pool
        };
        let groups = groups.0.iter().map(|group| group.iter().map(pool).collect()).collect();
        Self { groups, held: HashMap::new() }
    }

    /// The endpoint's own address of each prefix.
    pub fn own(&self) -> impl Iterator<Item = IpNet> {
        self.groups.iter().flatten().map(|pool| pool.net_of(pool.net().network()))
    }

    /// Gives connection `id` one address of each group: those that it holds unless they are excluded now, else what its
    /// context names already, else the lowest that is free.
    ///
    /// # Errors
    /// A group without a free address; nothing is held then.
    pub fn assign(&mut self, id: &str, ip: &mut IpContext) -> Result<(), Exhausted> {
        let excluded: Vec<IpNet> = ip.excluded_prefixes.iter().filter_map(|p| parse_net(p)).collect();
        let is_excluded = |address: IpAddr| excluded.iter().any(|net| net.contains(&address));
        let mut nets = self.held.get(id).cloned().unwrap_or_default();
        if nets.is_empty() || nets.iter().any(|net| is_excluded(net.addr())) {
            for net in self.release(id) {
                ip.src_ip_addrs.retain(|address| *address != net.to_string());
            }
            nets.clear();
            let carried: Vec<IpNet> = ip.src_ip_addrs.iter().filter_map(|text| text.parse().ok()).collect();
            for group in 0..self.groups.len() {
                let found = self.groups[group].iter().find_map(|pool| {
                    let known = carried.iter().find(|net| {
                        net.prefix_len() == pool.net().prefix_len()
                            && pool.is_free(net.addr())
                            && !is_excluded(net.addr())
                    });
                    let address = known.map(IpNet::addr).or_else(|| pool.lowest_free(&excluded))?;
                    Some(pool.net_of(address))
                });
                let Some(net) = found else {
                    let prefixes: Vec<_> = self.groups[group].iter().map(|p| p.net().to_string()).collect();
                    let held = self.held.len();
                    self.give(&nets);
                    return Err(Exhausted { prefixes: prefixes.join(", "), held, excluded: excluded.len() });
                };
                // Of all: prefixes may overlap.
                self.groups.iter_mut().flatten().for_each(|pool| pool.take(net.addr()));
                nets.push(net);
            }
            self.held.insert(id.to_owned(), nets.clone());
        }
        for net in nets.iter().map(ToString::to_string) {
            if !ip.src_ip_addrs.contains(&net) {
                ip.src_ip_addrs.push(net);
            }
        }
        Ok(())
    }

    /// Gives back what `id` holds, and tells what that was.
    pub fn release(&mut self, id: &str) -> Vec<IpNet> {
        let nets = self.held.remove(id).unwrap_or_default();
        self.give(&nets);
        nets
    }

    fn give(&mut self, nets: &[IpNet]) {
        for pool in self.groups.iter_mut().flatten() {
            nets.iter().for_each(|net| pool.give(net.addr()));
        }
    }
}

/// The chain element of an endpoint whose clients meet in one network.
pub struct SinglePointIpam(Arc<Mutex<Addresses>>);

impl SinglePointIpam {
    /// Over these prefixes.
    #[must_use]
    pub fn new(groups: &PrefixGroups) -> Self {
        Self(Arc::new(Mutex::new(Addresses::new(groups))))
    }
}

impl fmt::Debug for SinglePointIpam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SinglePointIpam").field("held", &self.0.lock().held.len()).finish()
    }
}

#[derive(Debug)]
struct Held(Arc<Mutex<Addresses>>, String);

#[async_trait]
impl Lease for Held {
    fn name(&self) -> &'static str {
        "ipam"
    }

    async fn release(self: Box<Self>, _: &Release) -> Result<()> {
        self.0.lock().release(&self.1);
        Ok(())
    }
}

#[async_trait]
impl Element for SinglePointIpam {
    fn name(&self) -> &'static str {
        "ipam"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let conn = request.connection.get_or_insert_default();
        let ip = conn.context.get_or_insert_default().ip_context.get_or_insert_default();
        self.0.lock().assign(&conn.id, ip).map_err(Error::from)?;
        if cx.scope.get::<Held>().is_none() {
            cx.scope.lease(Held(Arc::clone(&self.0), conn.id.clone()));
        }
        next.request(cx, request).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assigned(addresses: &mut Addresses, id: &str, ip: &mut IpContext) -> String {
        match addresses.assign(id, ip) {
            Ok(()) => ip.src_ip_addrs.join(" "),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn each_client_gets_one_address_of_each_group_with_its_mask_and_no_route() {
        let mut all = Addresses::new(&"[172.10.0.0/30,172.10.1.0/24],100:200::/64".parse().unwrap());
        let own: Vec<_> = all.own().map(|net| net.to_string()).collect();
        assert_eq!(own, ["172.10.0.0/30", "172.10.1.0/24", "100:200::/64"]);
        let mut first = IpContext::default();
        assert_eq!(assigned(&mut all, "a", &mut first), "172.10.0.1/30 100:200::1/64");
        assert_eq!(assigned(&mut all, "a", &mut first), "172.10.0.1/30 100:200::1/64", "a refresh");
        let only = IpContext { src_ip_addrs: first.src_ip_addrs.clone(), ..IpContext::default() };
        assert_eq!(first, only, "nothing else is written");
        assert_eq!(assigned(&mut all, "b", &mut IpContext::default()), "172.10.0.2/30 100:200::2/64");
        // The last address of the first prefix is for broadcasts.
        assert_eq!(assigned(&mut all, "c", &mut IpContext::default()), "172.10.1.1/24 100:200::3/64");
        all.release("a");
        assert_eq!(assigned(&mut all, "d", &mut IpContext::default()), "172.10.0.1/30 100:200::1/64");
    }

    #[test]
    fn what_is_excluded_moves_what_is_carried_stays_and_a_failure_holds_nothing() {
        let mut all = Addresses::new(&"172.10.0.0/24,100:200::/127".parse().unwrap());
        let mut ip = IpContext { src_ip_addrs: vec!["172.10.0.9/24".into()], ..IpContext::default() };
        assert_eq!(assigned(&mut all, "a", &mut ip), "172.10.0.9/24 100:200::1/127", "as before a restart");
        ip.excluded_prefixes = vec!["172.10.0.8/29".into()];
        assert_eq!(assigned(&mut all, "a", &mut ip), "172.10.0.1/24 100:200::1/127");
        let full = assigned(&mut all, "b", &mut IpContext::default());
        assert!(full.contains("100:200::/127"), "{full}");
        all.release("a");
        assert_eq!(assigned(&mut all, "c", &mut IpContext::default()), "172.10.0.1/24 100:200::1/127");
    }

    proptest::proptest! {
        /// Beside a list of what is free: the lowest address of the first prefix that has one, never twice, not of prefixes
        /// that overlap either, none that is excluded or nobody's, and refused only when there is none.
        #[test]
        fn addresses_are_unique_lowest_and_refused_only_when_there_is_none(
            prefixes in proptest::collection::vec((0u32..24, 27u8..33), 1..4),
            parted in 0usize..4,
            ops in proptest::collection::vec((0u8..8, 0u8..4, 0u32..24, 29u8..33), 0..40),
        ) {
            let net = |host: u32, length| {
                IpNet::new(std::net::Ipv4Addr::from(0x0a00_0000 + host).into(), length).unwrap().trunc()
            };
            let prefixes: Vec<_> = prefixes.into_iter().map(|(host, length)| net(host, length)).collect();
            let (first, second) = prefixes.split_at(parted.min(prefixes.len() - 1));
            let groups: Vec<_> = [first, second].iter().filter(|g| !g.is_empty()).map(|g| g.to_vec()).collect();
            let mut all = Addresses::new(&PrefixGroups(groups.clone()));
            let nobodys: Vec<_> = prefixes.iter().flat_map(|net| [net.network(), net.broadcast()]).collect();
            let mut live = HashMap::<u8, Vec<IpNet>>::new();
            for (id, op, host, length) in ops {
                if op == 0 {
                    all.release(&id.to_string());
                    live.remove(&id);
                    continue;
                }
                let excluded: Vec<_> = (op == 1).then(|| net(host, length)).into_iter().collect();
                let is_out = |address: &IpAddr| excluded.iter().any(|net| net.contains(address));
                let keeps = live.remove(&id).filter(|held| !held.iter().any(|net| is_out(&net.addr())));
                let mut taken: Vec<_> = live.values().flatten().map(IpNet::addr).collect();
                let wanted = keeps.or_else(|| {
                    let mut wanted = Vec::new();
                    for group in &groups {
                        let is_free = |a: &IpAddr| !taken.contains(a) && !nobodys.contains(a) && !is_out(a);
                        let hosts = |net: &IpNet| (0..1u32 << (32 - net.prefix_len())).map({
                            let IpAddr::V4(first) = net.network() else { unreachable!("all are IPv4") };
                            move |n| IpAddr::from(std::net::Ipv4Addr::from(u32::from(first) + n))
                        });
                        let found = group.iter().find_map(|net| {
                            Some(IpNet::new(hosts(net).find(is_free)?, net.prefix_len()).unwrap())
                        })?;
                        taken.push(found.addr());
                        wanted.push(found);
                    }
                    Some(wanted)
                });
                let mut ip = IpContext {
                    excluded_prefixes: excluded.iter().map(ToString::to_string).collect(),
                    ..IpContext::default()
                };
                let got = all.assign(&id.to_string(), &mut ip).ok().map(|()| {
                    ip.src_ip_addrs.iter().map(|net| net.parse().unwrap()).collect::<Vec<IpNet>>()
                });
                proptest::prop_assert_eq!(&got, &wanted);
                live.extend(got.map(|got| (id, got)));
                proptest::prop_assert_eq!(all.held.len(), live.len());
            }
        }
    }
}
