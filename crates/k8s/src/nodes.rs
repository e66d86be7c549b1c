//! Nodes that are gone: what was registered there is waited for no longer.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use serde_json::Value;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};
use tracing::info;

use crate::{
    follow::{Follower, Heard},
    objects::Objects,
};

/// How long a node may be missing that is only made anew: its kubelet registers it again.
const GRACE: Duration = Duration::from_secs(10);

/// Addresses, as nodes are reached by them.
type Addresses = BTreeSet<String>;

/// The nodes that there are, and were a moment ago.
#[derive(Debug, Default)]
struct Nodes {
    there: BTreeMap<String, Addresses>,
    gone: BTreeMap<String, (Instant, Addresses)>,
}

impl Nodes {
    fn hear(&mut self, heard: Heard, now: Instant) {
        match heard {
            Heard::All(all) => {
                let names: BTreeSet<_> = all.iter().map(name).collect();
                let missing: Vec<_> =
                    self.there.keys().filter(|name| !names.contains(*name)).cloned().collect();
                missing.iter().for_each(|name| self.is_gone(name, now));
                all.iter().for_each(|node| self.is(node));
            }
            Heard::Is(node) => self.is(&node),
            Heard::Gone(node) => self.is_gone(&name(&node), now),
        }
    }

    fn is(&mut self, node: &Value) {
        let name = name(node);
        self.gone.remove(&name);
        self.there.insert(name, addresses(node));
    }

    fn is_gone(&mut self, name: &str, now: Instant) {
        if let Some(addresses) = self.there.remove(name) {
            self.gone.insert(name.to_owned(), (now + GRACE, addresses));
        }
    }

    /// Where nobody is any more, and when there will be more of that.
    fn due(&mut self, now: Instant) -> (Addresses, Option<Instant>) {
        let due: Vec<_> =
            self.gone.iter().filter(|(_, (at, _))| *at <= now).map(|(name, _)| name.clone()).collect();
        let mut left = Addresses::new();
        for name in due {
            if let Some((_, addresses)) = self.gone.remove(&name) {
                info!(node = name, "a node is gone, and what was registered there with it");
                left.extend(addresses);
            }
        }
        // Another may have them by now.
        left.retain(|address| !self.there.values().any(|there| there.contains(address)));
        (left, self.gone.values().map(|(at, _)| *at).min())
    }
}

fn name(node: &Value) -> String {
    node["metadata"]["name"].as_str().unwrap_or_default().to_owned()
}

fn addresses(node: &Value) -> Addresses {
    let all = node["status"]["addresses"].as_array().into_iter().flatten();
    all.filter(|address| address["type"] == "InternalIP" || address["type"] == "ExternalIP")
        .filter_map(|address| address["address"].as_str().map(str::to_owned))
        .collect()
}

/// Tells of addresses where nodes were that are gone; does not end.
pub(crate) async fn follow(api: Objects, left: impl Fn(&Addresses)) {
    let (nodes, news) = (Arc::new(Mutex::new(Nodes::default())), Notify::new());
    let follower = Follower::new(api, "nodes", "/api/v1/nodes", "");
    let hear = |heard| {
        nodes.lock().hear(heard, Instant::now());
        news.notify_one();
    };
    let tell = async {
        loop {
            let (addresses, next) = nodes.lock().due(Instant::now());
            if !addresses.is_empty() {
                left(&addresses);
            }
            let wait = async {
                match next {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = news.notified() => {}
                () = wait => {}
            }
        }
    };
    tokio::join!(follower.run(hear), tell);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, address: &str) -> Value {
        let addresses = json!([
            { "type": "InternalIP", "address": address },
            { "type": "Hostname", "address": name },
        ]);
        json!({ "metadata": { "name": name }, "status": { "addresses": addresses } })
    }

    #[test]
    fn a_node_is_gone_when_it_is_not_back_in_time_and_nobody_has_its_address() {
        let (mut nodes, now) = (Nodes::default(), Instant::now());
        let (one, two, three) = (node("one", "10.0.0.1"), node("two", "10.0.0.2"), node("three", "10.0.0.3"));
        nodes.hear(Heard::All(vec![one.clone(), two.clone(), three]), now);
        assert_eq!(nodes.due(now + GRACE), (Addresses::new(), None));
        for gone in [&one, &two] {
            nodes.hear(Heard::Gone(gone.clone()), now);
        }
        assert_eq!(nodes.due(now), (Addresses::new(), Some(now + GRACE)));
        // It is made anew.
        nodes.hear(Heard::Is(one.clone()), now + GRACE / 2);
        assert_eq!(nodes.due(now + GRACE), (["10.0.0.2".to_owned()].into(), None));
        assert_eq!(nodes.due(now + GRACE), (Addresses::new(), None), "once");
        // Nothing was heard for a while, and another has the address of one that is missing since.
        nodes.hear(Heard::All(vec![node("four", "10.0.0.3"), one]), now);
        assert_eq!(nodes.due(now + GRACE), (Addresses::new(), None));
    }
}
