//! Keeps a client's wires from overlapping: what one of them uses, endpoints of the others must not hand out
//! (spec/control-plane.md 11.1). Wires of one awareness group may overlap: their endpoints know of each other.
//!
//! [`InUse`] is pure; [`OwnPrefixes`] is the chain element.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    str::FromStr,
    sync::Arc,
};

use async_trait::async_trait;
use ipnet::IpNet;
use nsm_api::{
    nsurl::NsUrl,
    pb::{connection::Connection, connectioncontext::IpContext, networkservice::NetworkServiceRequest},
};
use nsm_mesh::{Context, Element, Error, Lease, Next, Release, Result};
use parking_lot::Mutex;

use crate::groups::{self, Group};

/// Groups of network services whose endpoints know of each other (`NSM_AWARENESS_GROUPS`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AwarenessGroups(pub Vec<Vec<NsUrl>>);

/// Not a list of awareness groups.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "awareness groups {text:?}: {problem}; expected for example [kernel://a/nsm-1,kernel://b/nsm-2],[kernel://c]"
)]
pub struct BadAwarenessGroups {
    /// The text as given.
    pub text: String,
    /// What about it cannot be used.
    pub problem: String,
}

impl FromStr for AwarenessGroups {
    type Err = BadAwarenessGroups;

    /// `[url,url],[url]`; blanks do not count, an empty text is no group (spec/kubernetes.md 1.6).
    fn from_str(text: &str) -> Result<Self, BadAwarenessGroups> {
        let bad = |problem: String| BadAwarenessGroups { text: text.into(), problem };
        let read = groups::read(text).map_err(bad)?;
        if read.iter().any(|group| !group.bracketed) {
            return Err(bad("a group begins with a bracket".into()));
        }
        let urls = |group: Group| group.members.iter().map(|url| url.parse()).collect();
        let groups = read.into_iter().map(urls).collect::<Result<_, nsm_api::nsurl::BadNsUrl>>();
        let groups = groups.map_err(|e| bad(e.to_string()))?;
        Ok(Self(groups))
    }
}

/// What the wires of one client use.
#[derive(Debug, Default)]
pub struct InUse {
    groups: Vec<Vec<NsUrl>>,
    group_of: BTreeMap<String, usize>,
    wires: BTreeMap<String, BTreeSet<IpNet>>,
    /// All that is in `wires`.
    all: BTreeMap<IpNet, Use>,
    /// The fewest prefixes that cover `all`; `None` after something was taken away.
    cover: Option<BTreeSet<IpNet>>,
    /// Counts what comes into use.
    clock: u64,
}

/// How a prefix is used.
#[derive(Debug, Clone, Copy)]
struct Use {
    /// By how many wires.
    wires: usize,
    /// Since when.
    since: u64,
}

/// What an endpoint was asked not to hand out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Excluded {
    /// Single hosts in it.
    hosts: BTreeSet<IpAddr>,
    /// Besides those, the hosts that the other wires had in use by then.
    used_at: Option<u64>,
    /// What is the wire's own whoever else uses it.
    own: BTreeSet<IpNet>,
    /// What was added to the request for the other wires' sake, as it stands there.
    added: BTreeSet<String>,
}

/// An endpoint has handed out what it was asked not to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the endpoint gave this wire {address}, which another wire of this client uses ({prefix})")]
pub struct Overlap {
    /// What it handed out.
    pub address: String,
    /// What was excluded.
    pub prefix: String,
}

impl InUse {
    /// Nothing is in use yet.
    #[must_use]
    pub fn new(groups: AwarenessGroups) -> Self {
        Self { groups: groups.0, ..Self::default() }
    }

    /// Connection `id` is for this URL: the first group that lists it is its group. The URL itself is compared, without
    /// the labels that a client adds to every request.
    pub fn asked_for(&mut self, id: &str, url: &NsUrl) {
        match self.groups.iter().position(|group| group.contains(url)) {
            Some(group) => self.group_of.insert(id.to_owned(), group),
            None => self.group_of.remove(id),
        };
    }

    /// Adds to `ip` what the other wires use, but for those of the same group and the wire's own addresses. The fewest
    /// prefixes that cover it: every hop reads and copies the list, and a client may have a thousand wires.
    pub fn exclude(&mut self, id: &str, ip: &mut IpContext) -> Excluded {
        let own: BTreeSet<IpNet> = nets(ip.src_ip_addrs.iter().chain(&ip.dst_ip_addrs)).collect();
        let listed: BTreeSet<IpNet> = nets(&ip.excluded_prefixes).collect();
        let mut hosts: BTreeSet<IpAddr> = listed.iter().filter(|net| is_host(net)).map(IpNet::addr).collect();
        let (fewest, used_at) = match self.of_others(id, &own) {
            Some(fewest) => (fewest, Some(self.clock)),
            None => {
                let used = self.of_others_one_by_one(id, &own);
                hosts.extend(used.iter().filter(|net| is_host(net)).map(IpNet::addr));
                (IpNet::aggregate(&used.into_iter().collect()), None)
            }
        };
        let added: BTreeSet<String> =
            fewest.iter().filter(|net| !listed.contains(net)).map(IpNet::to_string).collect();
        ip.excluded_prefixes.extend(added.iter().cloned());
        Excluded { hosts, used_at, own, added }
    }

    /// What the others use, from what covers all of it; `None` where it cannot be told from that.
    fn of_others(&mut self, id: &str, own: &BTreeSet<IpNet>) -> Option<Vec<IpNet>> {
        if self.group_of.contains_key(id) {
            return None;
        }
        let mine = self.wires.get(id);
        let only_mine = mine.into_iter().flatten().filter(|net| self.all[*net].wires == 1);
        let mut without: BTreeSet<IpNet> = only_mine.chain(own).copied().collect();
        if !without.iter().all(is_host) {
            // Others may use a part of it.
            return None;
        }
        let all = &self.all;
        // Of a network that others leave alone it leaves alone all.
        without.retain(|net| !wider(*net).skip(1).any(|wider| all.contains_key(&wider)));
        let cover = self
            .cover
            .get_or_insert_with(|| IpNet::aggregate(&all.keys().copied().collect()).into_iter().collect());
        let mut fewest = Vec::with_capacity(cover.len());
        for net in cover.iter() {
            cut(*net, &without, &mut fewest);
        }
        Some(fewest)
    }

    fn of_others_one_by_one(&self, id: &str, own: &BTreeSet<IpNet>) -> BTreeSet<IpNet> {
        let group = self.group_of.get(id);
        let others = self
            .wires
            .iter()
            .filter(|(other, _)| *other != id && (group.is_none() || self.group_of.get(*other) != group));
        others.flat_map(|(_, nets)| nets).filter(|net| !own.contains(net)).copied().collect()
    }

    /// Whether the endpoint of this wire was asked not to hand out that host.
    fn was_excluded(&self, id: &str, host: IpAddr, asked: &Excluded) -> bool {
        let net = IpNet::from(host);
        let mine = usize::from(self.wires.get(id).is_some_and(|mine| mine.contains(&net)));
        asked.hosts.contains(&host)
            || asked.used_at.is_some_and(|then| {
                !asked.own.contains(&net)
                    && self.all.get(&net).is_some_and(|used| used.wires > mine && used.since <= then)
            })
    }

    /// Notes what an answer uses: addresses, routes to single hosts and, outside of groups, what it excludes on its
    /// own account. Takes what was added to the request out of the answer again.
    ///
    /// # Errors
    /// An address that was to be left out. Nothing is noted then.
    pub fn note(&mut self, id: &str, ip: &mut IpContext, asked: &Excluded) -> Result<(), Overlap> {
        for address in ip.src_ip_addrs.iter().chain(&ip.dst_ip_addrs) {
            // What is no address is nobody's; whoever builds the wire says so.
            let Ok(net) = address.parse::<IpNet>() else { continue };
            if self.was_excluded(id, net.addr(), asked) {
                return Err(Overlap {
                    address: address.clone(),
                    prefix: IpNet::from(net.addr()).to_string(),
                });
            }
        }
        ip.excluded_prefixes.retain(|prefix| !asked.added.contains(prefix));
        let routes = ip.src_routes.iter().chain(&ip.dst_routes).map(|route| &route.prefix);
        let mut uses: BTreeSet<IpNet> = nets(ip.src_ip_addrs.iter().chain(&ip.dst_ip_addrs)).collect();
        uses.extend(nets(routes).filter(is_host));
        if !self.group_of.contains_key(id) {
            uses.extend(nets(&ip.excluded_prefixes));
        }
        if self.wires.get(id) != Some(&uses) {
            self.forget_but(id, &uses);
            for net in &uses {
                self.begins(*net);
            }
            self.wires.insert(id.to_owned(), uses);
        }
        Ok(())
    }

    /// The wire is gone.
    pub fn forget(&mut self, id: &str) {
        self.forget_but(id, &BTreeSet::new());
    }

    /// The same of what it will not go on with.
    fn forget_but(&mut self, id: &str, goes_on: &BTreeSet<IpNet>) {
        for net in self.wires.remove(id).into_iter().flatten() {
            let Some(used) = self.all.get_mut(&net) else { continue };
            used.wires -= 1;
            if used.wires == 0 && !goes_on.contains(&net) {
                self.all.remove(&net);
                self.cover = None;
            }
        }
    }

    fn begins(&mut self, net: IpNet) {
        self.clock += 1;
        self.all.entry(net).or_insert(Use { wires: 0, since: self.clock }).wires += 1;
        if let Some(cover) = &mut self.cover {
            add(cover, net);
        }
    }
}

/// The prefix and those that it lies in.
fn wider(net: IpNet) -> impl Iterator<Item = IpNet> {
    std::iter::successors(Some(net), IpNet::supernet)
}

/// Adds to the fewest prefixes that cover something.
fn add(cover: &mut BTreeSet<IpNet>, net: IpNet) {
    if wider(net).any(|wider| cover.contains(&wider)) {
        return;
    }
    let inside: Vec<IpNet> = cover.range(net..).take_while(|other| net.contains(*other)).copied().collect();
    for other in &inside {
        cover.remove(other);
    }
    let mut net = net;
    while let Some(wider) = net.supernet() {
        let halves = wider.subnets(net.prefix_len()).into_iter().flatten();
        let Some(sibling) = halves.into_iter().find(|half| *half != net) else { break };
        if !cover.remove(&sibling) {
            break;
        }
        net = wider;
    }
    cover.insert(net);
}

/// The fewest prefixes that cover `net` without those hosts.
fn cut(net: IpNet, without: &BTreeSet<IpNet>, rest: &mut Vec<IpNet>) {
    match without.iter().any(|host| net.contains(host)) {
        false => rest.push(net),
        true if is_host(&net) => {}
        true => {
            net.subnets(net.prefix_len() + 1).into_iter().flatten().for_each(|half| cut(half, without, rest))
        }
    }
}

/// Those that can be read, without the part of a host.
fn nets<'a>(texts: impl IntoIterator<Item = &'a String>) -> impl Iterator<Item = IpNet> {
    texts.into_iter().filter_map(|text| text.parse().ok()).map(|net: IpNet| net.trunc())
}

/// Whether it is a single host.
fn is_host(net: &IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

/// The element: all wires of a client share one.
#[derive(Debug, Clone, Default)]
pub struct OwnPrefixes(Arc<Mutex<InUse>>);

impl OwnPrefixes {
    /// With these groups.
    #[must_use]
    pub fn new(groups: AwarenessGroups) -> Self {
        Self(Arc::new(Mutex::new(InUse::new(groups))))
    }

    /// See [`InUse::asked_for`].
    pub fn asked_for(&self, id: &str, url: &NsUrl) {
        self.0.lock().asked_for(id, url);
    }
}

#[derive(Debug)]
struct Noted {
    of: OwnPrefixes,
    id: String,
}

#[async_trait]
impl Lease for Noted {
    fn name(&self) -> &'static str {
        "own-prefixes"
    }

    async fn release(self: Box<Self>, _: &Release) -> Result<()> {
        self.of.0.lock().forget(&self.id);
        Ok(())
    }
}

#[async_trait]
impl Element for OwnPrefixes {
    fn name(&self) -> &'static str {
        "own-prefixes"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let conn = request.connection.get_or_insert_default();
        let id = conn.id.clone();
        let ip = conn.context.get_or_insert_default().ip_context.get_or_insert_default();
        let asked = self.0.lock().exclude(&id, ip);
        let mut answer = next.request(cx, request).await?;
        let ip = answer.context.get_or_insert_default().ip_context.get_or_insert_default();
        self.0.lock().note(&id, ip, &asked).map_err(|overlap| {
            Error::new(tonic::Code::FailedPrecondition, overlap.to_string()).hint(
                "give the endpoints prefixes that do not overlap, or list both services in one group of NSM_AWARENESS_GROUPS",
            )
        })?;
        if cx.scope.get::<Noted>().is_none() {
            cx.scope.lease(Noted { of: self.clone(), id });
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use nsm_api::pb::connectioncontext::Route;
    use proptest::prelude::*;

    use super::*;

    fn pair(src: &str, dst: &str, excluded: &[&str]) -> IpContext {
        let route = |prefix: &str| Route { unknown: None, prefix: prefix.into(), next_hop: String::new() };
        IpContext {
            src_ip_addrs: vec![src.into()],
            dst_ip_addrs: vec![dst.into()],
            src_routes: vec![route(dst), route("10.0.0.0/8"), route("no prefix at all")],
            dst_routes: vec![route(src)],
            excluded_prefixes: excluded.iter().map(|p| (*p).to_owned()).collect(),
            ..IpContext::default()
        }
    }

    fn excluded(used: &mut InUse, id: &str, mut ip: IpContext) -> Vec<String> {
        used.exclude(id, &mut ip);
        ip.excluded_prefixes
    }

    #[test]
    fn what_one_wire_uses_the_others_exclude() {
        let mut used = InUse::default();
        let mut first = pair("172.16.1.97/32", "172.16.1.96/32", &["10.96.0.0/12"]);
        used.note("c-0", &mut first, &Excluded::default()).unwrap();
        assert_eq!(
            excluded(&mut used, "c-1", IpContext::default()),
            ["10.96.0.0/12", "172.16.1.96/31"],
            "addresses, and what the first request learned"
        );
        assert_eq!(
            excluded(&mut used, "c-0", first.clone()),
            ["10.96.0.0/12"],
            "not its own, when it is refreshed"
        );
        let mut second = IpContext::default();
        let asked = used.exclude("c-1", &mut second);
        let mut answer = pair("172.16.1.99/32", "172.16.1.98/32", &["10.96.0.0/12", "172.16.1.96/31"]);
        used.note("c-1", &mut answer, &asked).unwrap();
        assert!(answer.excluded_prefixes.is_empty(), "what was added is worked out anew each time");
        used.forget("c-0");
        assert_eq!(excluded(&mut used, "c-2", IpContext::default()), ["172.16.1.98/31"]);
        used.forget("c-1");
        assert!(excluded(&mut used, "c-2", IpContext::default()).is_empty());
    }

    #[test]
    fn an_endpoint_that_hands_out_what_is_in_use_is_refused() {
        let mut used = InUse::default();
        used.note("c-0", &mut pair("172.16.1.97/32", "172.16.1.96/32", &[]), &Excluded::default()).unwrap();
        let mut request = IpContext::default();
        let asked = used.exclude("c-1", &mut request);
        // Whatever it says that it left out.
        let mut answer = pair("172.16.1.97/24", "172.16.1.98/32", &[]);
        let overlap = used.note("c-1", &mut answer, &asked).unwrap_err();
        assert_eq!((overlap.address.as_str(), overlap.prefix.as_str()), ("172.16.1.97/24", "172.16.1.97/32"));
        // Only single hosts are held against it: an endpoint may own a part of an excluded network.
        let mut request = IpContext { excluded_prefixes: vec!["10.0.0.0/8".into()], ..IpContext::default() };
        let asked = used.exclude("c-1", &mut request);
        used.note("c-1", &mut pair("10.1.0.1/32", "10.1.0.2/32", &["10.0.0.0/8"]), &asked).unwrap();
        // What cannot be read harms nobody (section 18, 13).
        let mut strange = pair("nonsense", "10.9.0.2/32", &["neither/this"]);
        used.note("c-2", &mut strange, &Excluded::default()).unwrap();
    }

    #[test]
    fn a_thousand_wires_exclude_a_handful_of_prefixes() {
        let mut used = InUse::default();
        for n in 0..1000_u32 {
            let address = |n: u32| format!("{}/32", std::net::Ipv4Addr::from(0xac10_0000 + n));
            let mut answer = pair(&address(2 * n + 1), &address(2 * n), &[]);
            used.note(&n.to_string(), &mut answer, &Excluded::default()).unwrap();
        }
        assert_eq!(
            excluded(&mut used, "new", IpContext::default()),
            [
                "172.16.0.0/22",
                "172.16.4.0/23",
                "172.16.6.0/24",
                "172.16.7.0/25",
                "172.16.7.128/26",
                "172.16.7.192/28"
            ]
        );
        // Each host of them is still held against an endpoint.
        let asked = used.exclude("new", &mut IpContext::default());
        let overlap = used.note("new", &mut pair("172.16.5.7/32", "10.0.0.1/32", &[]), &asked).unwrap_err();
        assert_eq!(overlap.prefix, "172.16.5.7/32");
    }

    proptest! {
        /// Whatever happened before, what is kept up to date covers what going through all wires finds.
        #[test]
        fn what_is_excluded_is_what_the_others_use(
            steps in prop::collection::vec((0..6_u8, prop::option::of((0..24_u8, 0..24_u8, 27..=32_u8))), 1..40),
        ) {
            let mut used = InUse::default();
            for (wire, what) in steps {
                let id = wire.to_string();
                match what {
                    Some((src, dst, length)) => {
                        let learned = format!("10.0.0.{src}/{length}");
                        let mut answer = pair(&format!("10.0.0.{src}/32"), &format!("10.0.0.{dst}/32"), &[&learned]);
                        answer.src_routes.clear();
                        let _ = used.note(&id, &mut answer, &Excluded::default());
                    }
                    None => used.forget(&id),
                }
                let own = used.wires.get(&id).into_iter().flatten().filter(|net| is_host(net)).copied().collect();
                let slowly = used.of_others_one_by_one(&id, &own);
                let Some(quickly) = used.of_others(&id, &own) else { continue };
                for host in 0..32_u8 {
                    let net: IpNet = IpAddr::from([10, 0, 0, host]).into();
                    let covers = |other: &IpNet| other.contains(&net);
                    prop_assert_eq!(quickly.iter().any(covers), slowly.iter().any(covers), "{}", net);
                }
                let fewest = IpNet::aggregate(&quickly);
                prop_assert_eq!(fewest.len(), quickly.len(), "{:?}", quickly);
            }
        }
    }

    #[test]
    fn wires_of_one_group_may_overlap_and_others_may_not() {
        let url = |text: &str| text.parse::<NsUrl>().unwrap();
        let groups = "[kernel://a/nsm-1?color=red, kernel://b/nsm-2], [kernel://c]".parse().unwrap();
        let mut used = InUse::new(groups);
        for (id, text) in [
            ("0", "kernel://a/nsm-1?color=red"),
            ("1", "kernel://b/nsm-2"),
            ("2", "kernel://c"),
            ("3", "kernel://a/nsm-1"),
            ("4", "kernel://d"),
        ] {
            used.asked_for(id, &url(text));
        }
        used.note("0", &mut pair("10.0.0.1/32", "10.0.0.0/32", &["192.0.2.0/24"]), &Excluded::default())
            .unwrap();
        let mut of = |id| excluded(&mut used, id, IpContext::default());
        assert!(of("1").is_empty(), "its endpoints know of each other");
        for other in ["2", "3", "4"] {
            assert_eq!(of(other), ["10.0.0.0/31"], "{other}: not what a group's wire excludes");
        }
    }

    #[test]
    fn groups_are_read_as_upstream_writes_them() {
        let read = |text: &str| text.parse::<AwarenessGroups>();
        assert_eq!(read("").unwrap().0.len(), 0);
        assert_eq!(read(" [kernel://a/x, kernel://b] ,[kernel://c]").unwrap().0.len(), 2);
        for (bad, says) in [
            ("[", "not closed"),
            ("kernel://a", "begins with a bracket"),
            ("[kernel://a", "not closed"),
            ("[[kernel://a]]", "within"),
            ("[kernel://a]x", "comma"),
            ("[kernel://a],", "comma"),
            ("[kernel://a],kernel://b", "begins with a bracket"),
            ("[]", "empty"),
            ("[kernel://a,]", "empty"),
            ("[nonsense]", "MECHANISM"),
        ] {
            let error = read(bad).unwrap_err().to_string();
            assert!(error.contains(says), "{bad}: {error}");
        }
    }
}
