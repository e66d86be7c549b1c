//! Addresses for point-to-point wires (spec/control-plane.md 11.5): of each pair the endpoint takes the lower
//! address, the client the next, both with full mask. [`Pools`] is pure; [`Ipam`] is the chain element.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
    sync::Arc,
};

use async_trait::async_trait;
use ipnet::IpNet;
use nsm_api::{
    pb::{
        connection::Connection,
        connectioncontext::{IpContext, Route},
        networkservice::NetworkServiceRequest,
    },
    planted,
};
use nsm_mesh::{Context, Element, Error, Lease, Next, Release, Result};
use parking_lot::Mutex;

use crate::groups;

/// The configuration: groups of prefixes. Every connection gets one pair of each group; within a group a
/// prefix is used when the ones before it are exhausted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixGroups(pub Vec<Vec<IpNet>>);

/// Not a list of prefix groups.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "prefix groups {text:?}: {problem}; expected for example 172.16.1.0/24 or [172.16.1.0/24,172.16.2.0/24],2001:db8::/64"
)]
pub struct BadPrefixGroups {
    /// The text as given.
    pub text: String,
    /// What about it cannot be used.
    pub problem: String,
}

impl FromStr for PrefixGroups {
    type Err = BadPrefixGroups;

    /// `prefix` or `[prefix,prefix,…]`, separated by commas; blanks do not count
    /// (spec/kubernetes.md 3.5.1).
    fn from_str(text: &str) -> Result<Self, BadPrefixGroups> {
        let bad = |problem: String| BadPrefixGroups { text: text.into(), problem };
        let prefix =
            |item: &String| item.parse::<IpNet>().map_err(|_| bad(format!("{item:?} is not ADDRESS/LENGTH")));
        let groups = groups::read(text).map_err(bad)?;
        let groups = groups.iter().map(|group| group.members.iter().map(prefix).collect());
        let groups = groups.collect::<Result<Vec<_>, _>>()?;
        if groups.is_empty() { Err(bad("it is empty".into())) } else { Ok(Self(groups)) }
    }
}

/// What becomes of the addresses and routes that a request brings along.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IpamPolicy {
    /// The endpoint alone says what is in the IP context: what it did not hand out is removed, so that no client
    /// writes addresses, routes, rules or neighbours into the endpoint's pod.
    #[default]
    Strict,
    /// Everything stays and the endpoint's pairs are added, as upstream's endpoints do it by default
    /// (spec/kubernetes.md 3.5): clients and those between are trusted with the endpoint's routing.
    Polite,
}

/// Neither `strict` nor `polite`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("IPAM policy {0:?}: expected strict or polite")]
pub struct BadIpamPolicy(pub String);

impl FromStr for IpamPolicy {
    type Err = BadIpamPolicy;

    fn from_str(text: &str) -> Result<Self, BadIpamPolicy> {
        match text.to_ascii_lowercase().as_str() {
            "strict" => Ok(Self::Strict),
            "polite" => Ok(Self::Polite),
            _ => Err(BadIpamPolicy(text.into())),
        }
    }
}

impl IpamPolicy {
    fn write(self, ip: &mut IpContext, pairs: &[Pair]) {
        if self == Self::Strict {
            ip.src_ip_addrs.clear();
            ip.dst_ip_addrs.clear();
            ip.src_routes.clear();
            ip.dst_routes.clear();
            ip.policies.clear();
            ip.ip_neighbors.clear();
        }
        pairs.iter().for_each(|pair| add(ip, pair));
    }
}

/// One wire's addresses of one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// The endpoint's.
    pub dst: IpAddr,
    /// The client's.
    pub src: IpAddr,
}

/// What is free and what is not.
#[derive(Debug)]
pub struct Pools {
    groups: Vec<Vec<Pool>>,
    policy: IpamPolicy,
    held: HashMap<String, Vec<Pair>>,
}

/// Nothing is left in a group.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "no address is free in {prefixes} for another wire: {held} connections hold addresses, {excluded} prefixes are excluded"
)]
pub struct Exhausted {
    /// The group.
    pub prefixes: String,
    /// Connections that hold addresses.
    pub held: usize,
    /// Prefixes that this request excludes.
    pub excluded: usize,
}

impl From<Exhausted> for Error {
    fn from(error: Exhausted) -> Self {
        Self::new(tonic::Code::ResourceExhausted, error.to_string())
            .hint("give the endpoint a larger NSM_CIDR_PREFIX, or start another endpoint of the service")
    }
}

impl Pools {
    /// All free.
    #[must_use]
    pub fn new(groups: &PrefixGroups, policy: IpamPolicy) -> Self {
        let pools = |group: &Vec<IpNet>| group.iter().map(|net| Pool::new(*net)).collect();
        Self { groups: groups.0.iter().map(pools).collect(), policy, held: HashMap::new() }
    }

    /// Gives connection `id` its pairs, one for each group: the ones it holds unless they are excluded now,
    /// else the ones its context already names (an endpoint that restarted takes them over), else the lowest
    /// free ones. The context is brought up to date, as the policy says.
    ///
    /// # Errors
    /// A group without a free pair; nothing is held then.
    pub fn assign(&mut self, id: &str, ip: &mut IpContext) -> Result<(), Exhausted> {
        let excluded: Vec<IpNet> = ip.excluded_prefixes.iter().filter_map(|p| parse_net(p)).collect();
        let is_free_of =
            |pair: &Pair| !excluded.iter().any(|net| net.contains(&pair.src) || net.contains(&pair.dst));
        if let Some(pairs) = self.held.get(id) {
            if pairs.iter().all(is_free_of) {
                self.policy.write(ip, pairs);
                return Ok(());
            }
            for pair in self.release(id) {
                remove(ip, &pair);
            }
        }
        let mut taken = Vec::new();
        for group in 0..self.groups.len() {
            let pair = recover(&self.groups[group], ip, &excluded)
                .or_else(|| self.groups[group].iter().find_map(|pool| pool.lowest_pair(&excluded)));
            let Some(pair) = pair else {
                taken.iter().for_each(|pair| self.free(pair));
                let prefixes: Vec<_> = self.groups[group].iter().map(|p| p.net.to_string()).collect();
                return Err(Exhausted {
                    prefixes: prefixes.join(", "),
                    held: self.held.len(),
                    excluded: excluded.len(),
                });
            };
            if !planted::is("an address is given twice") {
                // Of all: prefixes may overlap.
                for pool in self.groups.iter_mut().flatten() {
                    pool.take(pair.dst);
                    pool.take(pair.src);
                }
            }
            taken.push(pair);
        }
        self.policy.write(ip, &taken);
        self.held.insert(id.into(), taken);
        Ok(())
    }

    /// Gives back what `id` holds, and tells what that was.
    pub fn release(&mut self, id: &str) -> Vec<Pair> {
        let pairs = self.held.remove(id).unwrap_or_default();
        pairs.iter().for_each(|pair| self.free(pair));
        pairs
    }

    /// How many connections hold addresses.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.len()
    }

    fn free(&mut self, pair: &Pair) {
        for address in [pair.dst, pair.src] {
            for pool in self.groups.iter_mut().flatten() {
                pool.give(address);
            }
        }
    }
}

/// The chain element of an endpoint.
pub struct Ipam {
    pools: Arc<Mutex<Pools>>,
    policy: IpamPolicy,
}

impl Ipam {
    /// Over these prefixes. Elements after it may add to the context what the endpoint itself wants there.
    #[must_use]
    pub fn new(groups: &PrefixGroups, policy: IpamPolicy) -> Self {
        Self { pools: Arc::new(Mutex::new(Pools::new(groups, policy))), policy }
    }
}

impl fmt::Debug for Ipam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ipam").field("held", &self.pools.lock().held()).finish()
    }
}

#[derive(Debug)]
struct Held {
    pools: Arc<Mutex<Pools>>,
    id: String,
}

#[async_trait]
impl Lease for Held {
    fn name(&self) -> &'static str {
        "ipam"
    }

    async fn release(self: Box<Self>, _: &Release) -> Result<()> {
        if !planted::is("ipam keeps addresses") {
            self.pools.lock().release(&self.id);
        }
        Ok(())
    }
}

#[async_trait]
impl Element for Ipam {
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
        let id = conn.id.clone();
        let context = conn.context.get_or_insert_default();
        if self.policy == IpamPolicy::Strict
            && let Some(ethernet) = &mut context.ethernet_context
        {
            // The hardware address of our end is ours to say, too.
            ethernet.dst_mac.clear();
        }
        let ip = context.ip_context.get_or_insert_default();
        self.pools.lock().assign(&id, ip).map_err(Error::from)?;
        if cx.scope.get::<Held>().is_none() {
            cx.scope.lease(Held { pools: Arc::clone(&self.pools), id });
        }
        next.request(cx, request).await
    }
}

/// One prefix. Addresses are counted from its first; no address is special (the endpoint of 169.254.0.0/16 is
/// 169.254.0.0).
#[derive(Debug)]
pub(crate) struct Pool {
    net: IpNet,
    used: BTreeSet<u128>,
}

impl Pool {
    pub(crate) fn new(net: IpNet) -> Self {
        Self { net: net.trunc(), used: BTreeSet::new() }
    }

    pub(crate) fn net(&self) -> IpNet {
        self.net
    }

    /// An address with the mask of the prefix.
    pub(crate) fn net_of(&self, address: IpAddr) -> IpNet {
        IpNet::new(address, self.net.prefix_len()).unwrap_or(IpNet::from(address))
    }

    pub(crate) fn is_free(&self, address: IpAddr) -> bool {
        self.net.contains(&address) && !self.used.contains(&number(address))
    }

    pub(crate) fn take(&mut self, address: IpAddr) {
        if self.net.contains(&address) {
            self.used.insert(number(address));
        }
    }

    pub(crate) fn give(&mut self, address: IpAddr) {
        if self.net.contains(&address) {
            self.used.remove(&number(address));
        }
    }

    pub(crate) fn lowest_free(&self, excluded: &[IpNet]) -> Option<IpAddr> {
        self.lowest(number(self.net.network()), excluded).map(|number| self.address(number))
    }

    fn lowest_pair(&self, excluded: &[IpNet]) -> Option<Pair> {
        let dst = self.lowest(number(self.net.network()), excluded)?;
        let src = self.lowest(dst.checked_add(1)?, excluded)?;
        Some(Pair { dst: self.address(dst), src: self.address(src) })
    }

    /// The lowest free number from `from` on.
    fn lowest(&self, from: u128, excluded: &[IpNet]) -> Option<u128> {
        let last = number(self.net.broadcast());
        let mut at = from;
        while at <= last {
            if let Some(net) = excluded.iter().find(|net| net.contains(&self.address(at))) {
                at = number(net.broadcast()).checked_add(1)?;
            } else if self.used.contains(&at) {
                // Steps over a run of used numbers.
                at = self
                    .used
                    .range(at..)
                    .zip(at..=last)
                    .take_while(|(used, n)| *used == n)
                    .last()?
                    .1
                    .checked_add(1)?;
            } else {
                return Some(at);
            }
        }
        None
    }

    fn address(&self, number: u128) -> IpAddr {
        match self.net {
            IpNet::V4(_) => Ipv4Addr::from(number as u32).into(),
            IpNet::V6(_) => Ipv6Addr::from(number).into(),
        }
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

/// The pair that a context already names, if both addresses are free here: nothing is taken otherwise.
fn recover(pools: &[Pool], ip: &IpContext, excluded: &[IpNet]) -> Option<Pair> {
    let first = |pool: &Pool, list: &[String]| {
        list.iter()
            .filter_map(|text| parse_net(text))
            .map(|net| net.addr())
            .find(|a| pool.is_free(*a) && !excluded.iter().any(|net| net.contains(a)))
    };
    pools.iter().find_map(|pool| {
        Some(Pair { src: first(pool, &ip.src_ip_addrs)?, dst: first(pool, &ip.dst_ip_addrs)? })
            .filter(|pair| pair.src != pair.dst)
    })
}

fn host(address: IpAddr) -> String {
    IpNet::from(address).to_string()
}

fn add(ip: &mut IpContext, pair: &Pair) {
    let (src, dst) = (host(pair.src), host(pair.dst));
    let route = |prefix: &str| Route { unknown: None, prefix: prefix.into(), next_hop: String::new() };
    if !ip.src_routes.iter().any(|r| r.prefix == dst) {
        ip.src_routes.push(route(&dst));
    }
    if !ip.dst_routes.iter().any(|r| r.prefix == src) {
        ip.dst_routes.push(route(&src));
    }
    if !ip.src_ip_addrs.contains(&src) {
        ip.src_ip_addrs.push(src);
    }
    if !ip.dst_ip_addrs.contains(&dst) {
        ip.dst_ip_addrs.push(dst);
    }
}

fn remove(ip: &mut IpContext, pair: &Pair) {
    let (src, dst) = (host(pair.src), host(pair.dst));
    ip.src_ip_addrs.retain(|a| *a != src);
    ip.dst_ip_addrs.retain(|a| *a != dst);
    ip.src_routes.retain(|r| r.prefix != dst);
    ip.dst_routes.retain(|r| r.prefix != src);
}

pub(crate) fn parse_net(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

#[cfg(test)]
mod tests {
    use nsm_api::pb::connectioncontext::{IpNeighbor, PolicyRoute};

    use super::*;

    fn pools(text: &str) -> Pools {
        Pools::new(&text.parse().unwrap(), IpamPolicy::Strict)
    }

    fn assigned(pools: &mut Pools, id: &str) -> Option<(Vec<String>, Vec<String>)> {
        let mut ip = IpContext::default();
        pools.assign(id, &mut ip).ok()?;
        Some((ip.dst_ip_addrs, ip.src_ip_addrs))
    }

    fn texts(dst: &[&str], src: &[&str]) -> Option<(Vec<String>, Vec<String>)> {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        Some((own(dst), own(src)))
    }

    #[test]
    fn the_lower_address_is_the_endpoints() {
        let mut gateway = pools("172.16.1.2/31");
        assert_eq!(assigned(&mut gateway, "a"), texts(&["172.16.1.2/32"], &["172.16.1.3/32"]));
        assert_eq!(assigned(&mut gateway, "b"), None, "a /31 holds one pair");
        gateway.release("a");
        assert_eq!(assigned(&mut gateway, "b"), texts(&["172.16.1.2/32"], &["172.16.1.3/32"]));
        assert_eq!(
            assigned(&mut pools("169.254.0.0/16"), "a"),
            texts(&["169.254.0.0/32"], &["169.254.0.1/32"])
        );
    }

    #[test]
    fn a_pair_of_every_group_and_the_next_prefix_when_one_is_full() {
        let mut dual = pools("[10.0.0.0/31, 10.0.1.0/31], 2001:db8::/116");
        assert_eq!(
            assigned(&mut dual, "a"),
            texts(&["10.0.0.0/32", "2001:db8::/128"], &["10.0.0.1/32", "2001:db8::1/128"])
        );
        assert_eq!(
            assigned(&mut dual, "b"),
            texts(&["10.0.1.0/32", "2001:db8::2/128"], &["10.0.1.1/32", "2001:db8::3/128"])
        );
        assert_eq!(assigned(&mut dual, "c"), None);
        dual.release("b");
        assert_eq!(
            assigned(&mut dual, "d").unwrap().0[1],
            "2001:db8::2/128",
            "what a failed request took is free"
        );
    }

    #[test]
    fn a_refresh_keeps_and_exclusion_moves() {
        let mut p = pools("10.0.0.0/24");
        let mut ip = IpContext::default();
        p.assign("a", &mut ip).unwrap();
        let first = ip.clone();
        p.assign("a", &mut ip).unwrap();
        assert_eq!(ip, first);
        ip.excluded_prefixes = vec!["10.0.0.0/25".into()];
        p.assign("a", &mut ip).unwrap();
        assert_eq!(
            (ip.dst_ip_addrs[0].as_str(), ip.src_routes[0].prefix.as_str()),
            ("10.0.0.128/32", "10.0.0.128/32")
        );
        assert_eq!(ip.src_ip_addrs.len(), 1);
    }

    #[test]
    fn a_restarted_endpoint_takes_over_what_its_clients_carry() {
        let mut ip = IpContext {
            src_ip_addrs: vec!["10.0.0.9/32".into()],
            dst_ip_addrs: vec!["10.0.0.8/32".into()],
            ..IpContext::default()
        };
        let mut p = pools("10.0.0.0/24");
        p.assign("a", &mut ip).unwrap();
        assert_eq!(
            (ip.src_ip_addrs.len(), ip.src_ip_addrs[0].as_str(), ip.dst_routes[0].prefix.as_str()),
            (1, "10.0.0.9/32", "10.0.0.9/32")
        );
        let mut half = IpContext {
            src_ip_addrs: vec!["10.0.0.20/32".into()],
            dst_ip_addrs: vec!["10.0.0.8/32".into()],
            ..IpContext::default()
        };
        p.assign("b", &mut half).unwrap();
        assert_eq!(half.src_ip_addrs, ["10.0.0.1/32"], "its pair is not free: it gets another");
        p.release("b");
        let mut again = IpContext {
            src_ip_addrs: vec!["10.0.0.20/32".into()],
            dst_ip_addrs: vec!["10.0.0.21/32".into()],
            ..IpContext::default()
        };
        p.assign("c", &mut again).unwrap();
        assert_eq!(again.src_ip_addrs, ["10.0.0.20/32"], "a half recovery takes nothing");
    }

    fn meddled() -> IpContext {
        let route = |prefix: &str| Route { unknown: None, prefix: prefix.into(), next_hop: String::new() };
        IpContext {
            src_ip_addrs: vec!["192.0.2.1/32".into(), "10.0.0.9/32".into()],
            dst_ip_addrs: vec!["192.0.2.77/32".into(), "10.0.0.8/32".into()],
            src_routes: vec![route("198.51.100.0/24")],
            dst_routes: vec![route("0.0.0.0/0"), route("172.16.1.101/32")],
            excluded_prefixes: vec!["10.0.0.0/30".into()],
            ip_neighbors: vec![IpNeighbor {
                unknown: None,
                ip: "10.0.0.1".into(),
                hardware_address: "02::1".into(),
            }],
            policies: vec![PolicyRoute::default()],
            ..IpContext::default()
        }
    }

    #[test]
    fn a_client_writes_nothing_into_the_endpoints_pod() {
        let mut p = pools("10.0.0.0/24");
        let mut clean = IpContext {
            src_ip_addrs: vec!["10.0.0.9/32".into()],
            dst_ip_addrs: vec!["10.0.0.8/32".into()],
            ..IpContext::default()
        };
        clean.excluded_prefixes = meddled().excluded_prefixes;
        clean.src_routes =
            vec![Route { unknown: None, prefix: "10.0.0.8/32".into(), next_hop: String::new() }];
        clean.dst_routes =
            vec![Route { unknown: None, prefix: "10.0.0.9/32".into(), next_hop: String::new() }];
        for asked in ["first", "refreshed"] {
            let mut ip = meddled();
            p.assign("a", &mut ip).unwrap();
            assert_eq!(ip, clean, "{asked}");
        }
    }

    #[test]
    fn a_polite_endpoint_leaves_what_others_wrote() {
        let mut p = Pools::new(&"10.0.0.0/24".parse().unwrap(), "polite".parse().unwrap());
        let mut ip = meddled();
        p.assign("a", &mut ip).unwrap();
        assert_eq!((&ip.src_ip_addrs, &ip.policies), (&meddled().src_ip_addrs, &meddled().policies));
        assert_eq!((ip.src_routes.len(), ip.dst_routes.len()), (2, 3));
        assert!("harsh".parse::<IpamPolicy>().is_err());
    }

    #[test]
    fn bad_configuration_is_named() {
        for (bad, says) in [
            ("", "empty"),
            ("10.0.0.0", "10.0.0.0"),
            ("[10.0.0.0/8", "closed"),
            ("10.0.0.0/8,", "comma"),
            ("[10.0.0.0/8]x", "bracket"),
            ("10.0.0.0/33", "33"),
            ("[[10.0.0.0/8]]", "[10"),
        ] {
            let error = bad.parse::<PrefixGroups>().unwrap_err().to_string();
            assert!(error.contains(says), "{bad}: {error}");
        }
    }

    /// Addresses of a few small prefixes that touch and overlap, as texts.
    fn nearby() -> impl proptest::strategy::Strategy<Value = String> {
        use proptest::strategy::Strategy as _;
        (0u32..24, 27u8..33).prop_map(|(host, length)| {
            IpNet::new(Ipv4Addr::from(0x0a00_0000 + host).into(), length).unwrap().trunc().to_string()
        })
    }

    proptest::proptest! {
        /// Beside a list of what is free: a connection gets the lowest two addresses of the first prefix that has two,
        /// or hears that none has; no address is ever given twice, not of prefixes that overlap either, and none that is
        /// excluded; giving back all leaves all free.
        #[test]
        fn pairs_are_unique_lowest_and_refused_only_when_there_is_none(
            groups in proptest::collection::vec(proptest::collection::vec(nearby(), 1..3), 1..3),
            ops in proptest::collection::vec((0u8..8, 0u8..4, nearby()), 0..40),
        ) {
            let groups: Vec<Vec<IpNet>> =
                groups.iter().map(|group| group.iter().map(|net| net.parse().unwrap()).collect()).collect();
            let mut p = Pools::new(&PrefixGroups(groups.clone()), IpamPolicy::Strict);
            let mut live = HashMap::<u8, (Vec<IpAddr>, IpContext)>::new();
            for (id, op, excluded) in ops {
                if op == 0 {
                    p.release(&id.to_string());
                    live.remove(&id);
                    continue;
                }
                let mut ip = live.get(&id).map(|(_, ip)| ip.clone()).unwrap_or_default();
                ip.excluded_prefixes = if op == 1 { vec![excluded.clone()] } else { Vec::new() };
                let excluded: Vec<IpNet> = ip.excluded_prefixes.iter().filter_map(|net| net.parse().ok()).collect();
                let is_out = |address: &IpAddr| excluded.iter().any(|net| net.contains(address));
                let before = live.remove(&id).map(|(held, _)| held);
                let keeps = before.filter(|held| !held.iter().any(is_out));
                let moves = keeps.is_none() && !ip.src_ip_addrs.is_empty();
                let mut taken: Vec<IpAddr> = live.values().flat_map(|(held, _)| held).copied().collect();
                let wanted = keeps.or_else(|| {
                    let mut wanted = Vec::new();
                    for group in &groups {
                        let free = |net: &IpNet| {
                            let mut all = addresses(*net).filter(|a| !taken.contains(a) && !is_out(a));
                            Some([all.next()?, all.next()?])
                        };
                        let pair = group.iter().find_map(free)?;
                        taken.extend(pair);
                        wanted.extend(pair);
                    }
                    Some(wanted)
                });
                let got = p.assign(&id.to_string(), &mut ip).ok().map(|()| {
                    let both = ip.dst_ip_addrs.iter().zip(&ip.src_ip_addrs);
                    both.flat_map(|(dst, src)| [dst, src]).map(|a| parse_net(a).unwrap().addr()).collect::<Vec<_>>()
                });
                if moves {
                    // It may have kept a pair of another group, which its context still named.
                    proptest::prop_assert!(got.is_some() || wanted.is_none());
                } else {
                    proptest::prop_assert_eq!(&got, &wanted);
                }
                if let Some(got) = got {
                    proptest::prop_assert!(!got.iter().any(is_out));
                    live.insert(id, (got, ip));
                }
                let mut all: Vec<_> = live.values().flat_map(|(held, _)| held).collect();
                let count = all.len();
                all.sort();
                all.dedup();
                proptest::prop_assert_eq!(all.len(), count);
                proptest::prop_assert_eq!(p.held(), live.len());
            }
            for id in live.keys() {
                p.release(&id.to_string());
            }
            proptest::prop_assert!(p.groups.iter().flatten().all(|pool| pool.used.is_empty()));
        }
    }

    fn addresses(net: IpNet) -> impl Iterator<Item = IpAddr> {
        (number(net.network())..=number(net.broadcast())).map(|n| Ipv4Addr::from(n as u32).into())
    }

    /// Every prefix of up to 16 addresses at both ends of both families, until it is full.
    #[test]
    fn every_address_of_a_prefix_is_handed_out_in_order() {
        for (net, bits) in [
            ("0.0.0.0", 32),
            ("255.255.255.255", 32),
            ("::", 128),
            ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 128),
        ] {
            for size in 0..=4 {
                let net = IpNet::new(net.parse().unwrap(), bits - size).unwrap().trunc();
                let mut p = Pools::new(&PrefixGroups(vec![vec![net]]), IpamPolicy::Strict);
                let mut next = number(net.network());
                for pair in 0..(1usize << size) / 2 {
                    let (dst, src) = assigned(&mut p, &pair.to_string()).unwrap();
                    for got in [&dst[0], &src[0]] {
                        assert_eq!(number(parse_net(got).unwrap().addr()), next, "{net}");
                        next = next.wrapping_add(1);
                    }
                }
                assert_eq!(assigned(&mut p, "one too many"), None, "{net}");
                assert_eq!(p.held(), (1 << size) / 2);
            }
        }
    }
}
