//! Whom to ask for which names: what each wire brought, and what the pod had before.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use hickory_proto::rr::Name;

/// Under this id stand the servers that the pod had before any wire; no connection has it.
pub const OWN: &str = "";
/// Servers that one question is sent to; more are not asked.
pub const MAX_SERVERS: usize = 16;
/// Search domains that one question is tried with.
pub const MAX_SEARCH: usize = 16;

/// Servers, and the domains that they are searched with. Without domains the servers are for every name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Config {
    /// Whom to ask.
    pub servers: Vec<SocketAddr>,
    /// What is appended to a name, in this order.
    pub search: Vec<Name>,
}

/// A name to ask for, and whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Absolute.
    pub name: Name,
    /// All of them are asked at once.
    pub servers: Vec<SocketAddr>,
    /// They came together, so they know the same: what one does not have the others have neither.
    pub alike: bool,
}

/// All that is configured, by the connection that brought it.
#[derive(Debug, Clone, Default)]
pub struct Configs(BTreeMap<String, Vec<Config>>);

impl Config {
    /// Of texts, as a DNS context has them: `address` or `address:port`, and domains. Second: what cannot be read.
    #[must_use]
    pub fn read<'a>(
        servers: impl IntoIterator<Item = &'a String>,
        search: impl IntoIterator<Item = &'a String>,
    ) -> (Self, Vec<String>) {
        let (mut config, mut bad) = (Self::default(), Vec::new());
        for text in servers {
            match server(text) {
                Some(server) => config.servers.push(server),
                None => bad.push(format!("{text:?} is not ADDRESS or ADDRESS:PORT of a DNS server")),
            }
        }
        for text in search {
            match domain(text) {
                Some(domain) => config.search.push(domain),
                None => bad.push(format!("{text:?} is not a search domain such as example.org")),
            }
        }
        (config, bad)
    }
}

/// A server's address, port 53 unless it names one.
#[must_use]
pub fn server(text: &str) -> Option<SocketAddr> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, 53)))
}

/// A search domain; the root is none.
#[must_use]
pub fn domain(text: &str) -> Option<Name> {
    let text = text.strip_suffix('.').unwrap_or(text);
    if text.split('.').any(str::is_empty) {
        return None;
    }
    let mut name = Name::from_ascii(text).ok()?;
    name.set_fqdn(true);
    // A lone backslash is read as the root, too.
    (!name.is_root()).then_some(name)
}

impl Configs {
    /// What a connection brought, instead of what it brought before; says whether that is a change.
    pub fn set(&mut self, id: &str, configs: Vec<Config>) -> bool {
        let new = if configs.is_empty() { None } else { Some(configs) };
        let old = match new.clone() {
            Some(configs) => self.0.insert(id.into(), configs),
            None => self.0.remove(id),
        };
        old != new
    }

    /// What to try for a name, in order: as it is; then with each search domain, at the servers that came with it, or
    /// without any domain.
    #[must_use]
    pub fn steps(&self, name: &Name) -> Vec<Step> {
        let all: Vec<_> = self
            .0
            .iter()
            .flat_map(|(id, configs)| configs.iter().map(move |config| (id == OWN, config)))
            .collect();
        let mut steps = tries(name.clone(), &all);
        let mut tried = vec![name.clone()];
        for domain in all.iter().flat_map(|(_, config)| &config.search) {
            let mut relative = name.clone();
            relative.set_fqdn(false);
            // A name that has become too long is no name.
            let Ok(mut name) = relative.append_domain(domain) else { continue };
            name.set_fqdn(true);
            if tried.contains(&name) {
                continue;
            }
            tried.push(name.clone());
            let theirs = |config: &Config| config.search.contains(domain) || config.search.is_empty();
            let theirs: Vec<_> = all.iter().filter(|(_, config)| theirs(config)).copied().collect();
            let theirs = tries(name.clone(), &theirs);
            steps.extend(if theirs.is_empty() { tries(name, &all) } else { theirs });
            if tried.len() > MAX_SEARCH {
                break;
            }
        }
        steps
    }
}

/// Asks first where a name is at home: at the wires whose domains it is in, or else at the pod's own servers, which know
/// everything that is not a wire's. The others are asked when nothing is there.
fn tries(name: Name, whom: &[(bool, &Config)]) -> Vec<Step> {
    let wires =
        |(own, config): &(bool, &Config)| !own && config.search.iter().any(|domain| domain.zone_of(&name));
    let of_a_wire = whom.iter().any(wires);
    let home = |config: &(bool, &Config)| if of_a_wire { wires(config) } else { config.0 };
    let (first, then): (Vec<_>, Vec<_>) = whom.iter().copied().partition(home);
    let known = collect(first.iter().map(|(_, config)| *config));
    let mut steps = Vec::new();
    for part in [first, then] {
        let mut servers = collect(part.iter().map(|(_, config)| *config));
        if !steps.is_empty() {
            servers.retain(|server| !known.contains(server));
        }
        let alike = part.iter().filter(|(_, config)| !config.servers.is_empty()).count() < 2;
        if !servers.is_empty() {
            steps.push(Step { name: name.clone(), servers, alike });
        }
    }
    steps
}

fn collect<'a>(configs: impl Iterator<Item = &'a Config>) -> Vec<SocketAddr> {
    let mut servers = Vec::new();
    for server in configs.flat_map(|config| &config.servers) {
        if !servers.contains(server) && servers.len() < MAX_SERVERS {
            servers.push(*server);
        }
    }
    servers
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn config(servers: &[&str], search: &[&str]) -> Config {
        let texts = |list: &[&str]| list.iter().map(|&s| s.to_owned()).collect::<Vec<_>>();
        let (config, bad) = Config::read(&texts(servers), &texts(search));
        assert_eq!(bad, [""; 0]);
        config
    }

    fn tried(configs: &Configs, name: &str) -> Vec<String> {
        let step = |step: Step| {
            let servers: Vec<_> = step.servers.iter().map(|s| s.ip().to_string()).collect();
            format!("{} {}", step.name, servers.join(" "))
        };
        configs.steps(&Name::from_ascii(name).unwrap()).into_iter().map(step).collect()
    }

    #[test]
    fn a_name_is_tried_as_it_is_and_then_where_each_domain_is_at_home() {
        let mut configs = Configs::default();
        assert_eq!(tried(&configs, "web."), [""; 0], "nobody to ask");
        assert!(configs.set(OWN, vec![config(&["10.0.0.1"], &["cluster.local"])]));
        assert!(configs.set("nsc-0", vec![config(&["172.16.1.2", "10.0.0.1"], &["corp", "corp"])]));
        assert!(
            !configs.set("nsc-0", vec![config(&["172.16.1.2", "10.0.0.1"], &["corp", "corp"])]),
            "the same"
        );
        assert_eq!(
            tried(&configs, "web."),
            [
                "web. 10.0.0.1",
                "web. 172.16.1.2",
                "web.cluster.local. 10.0.0.1",
                "web.corp. 172.16.1.2 10.0.0.1"
            ]
        );
        assert_eq!(
            tried(&configs, "a.corp.")[..2],
            ["a.corp. 172.16.1.2 10.0.0.1", "a.corp.cluster.local. 10.0.0.1"],
            "a name of a wire"
        );
        configs.set("nsc-1", vec![config(&["8.8.8.8"], &[]), config(&[], &["lonely"])]);
        assert_eq!(tried(&configs, "web.")[1], "web. 172.16.1.2 8.8.8.8");
        assert_eq!(tried(&configs, "web.")[3], "web.cluster.local. 8.8.8.8", "only after the pod's own");
        let lonely = |configs: &Configs| {
            tried(configs, "web.").into_iter().filter(|t| t.contains("lonely")).collect::<Vec<_>>()
        };
        assert_eq!(lonely(&configs), ["web.lonely. 8.8.8.8"], "servers without domains are for all");
        configs.set("nsc-1", vec![config(&[], &["lonely"])]);
        assert_eq!(lonely(&configs), ["web.lonely. 10.0.0.1 172.16.1.2"], "a domain without servers");
        assert!(configs.set("nsc-0", vec![]) && configs.set("nsc-1", vec![]));
        assert!(!configs.set("nsc-1", vec![]));
        assert_eq!(tried(&configs, "web.").len(), 2);
    }

    #[test]
    fn steps_are_bounded() {
        let mut configs = Configs::default();
        let domains: Vec<_> = (0..500).map(|i| format!("d{i}.example")).collect();
        let servers: Vec<_> = (0..200).map(|i| format!("10.0.0.{i}")).collect();
        let as_refs =
            |list: &[String]| -> Vec<&'static str> { list.iter().map(|s| &*s.clone().leak()).collect() };
        configs.set("x", vec![config(&as_refs(&servers), &as_refs(&domains))]);
        let steps = configs.steps(&Name::from_ascii("web.").unwrap());
        assert_eq!((steps.len(), steps[0].servers.len()), (MAX_SEARCH + 1, MAX_SERVERS));
        let long =
            format!("{}.", ["a23456789012345678901234567890123456789012345678901234567890123"; 3].join("."));
        configs.set("x", vec![config(&["10.0.0.1"], &[&*"long-domain-name.".repeat(8).leak()])]);
        assert_eq!(configs.steps(&Name::from_ascii(long).unwrap()).len(), 1, "too long with the domain");
    }

    #[test]
    fn the_root_is_no_search_domain_however_it_is_written() {
        for root in ["", ".", "..", "\\", "\\."] {
            assert_eq!(domain(root), None, "{root:?}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        let (config, bad) = Config::read(
            &["10.0.0.1:5353".into(), "2001:db8::1".into(), "[2001:db8::1]:54".into(), "dns.example".into()],
            &["a.b.".into(), ".".into(), "a..b".into(), String::new()],
        );
        assert_eq!(config.servers.iter().map(|s| s.port()).collect::<Vec<_>>(), [5353, 53, 54]);
        assert_eq!(config.search.len(), 1);
        assert_eq!(bad[0], "\"dns.example\" is not ADDRESS or ADDRESS:PORT of a DNS server");
        assert_eq!(bad[1], "\".\" is not a search domain such as example.org");
        assert_eq!(bad.len(), 4);
    }
}
