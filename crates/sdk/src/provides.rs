//! What an endpoint gives its clients beside addresses (spec/control-plane.md section 11): routes, policy routes, DNS
//! servers.

use std::{collections::BTreeSet, net::IpAddr, path::PathBuf, str::FromStr};

use async_trait::async_trait;
use ipnet::IpNet;
use nsm_api::pb::{
    connection::Connection,
    connectioncontext::{DnsConfig, PolicyRoute, Route},
    networkservice::NetworkServiceRequest,
};
use nsm_kernel::{
    netns::NsId,
    plan::{ContextPolicy, ContextRoute, EndPlan, IpContext, Side, WirePlan},
};
use nsm_mesh::{
    Context, Element, Next, Result,
    from_file::{BadFile, FromFile},
};
use serde::Deserialize;

/// Prefixes that lie behind the endpoint: its clients get routes to them through the wire.
#[derive(Debug)]
pub struct RoutesBehind(pub Vec<IpNet>);

#[async_trait]
impl Element for RoutesBehind {
    fn name(&self) -> &'static str {
        "routes-behind"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let context = request.connection.get_or_insert_default().context.get_or_insert_default();
        let routes = &mut context.ip_context.get_or_insert_default().src_routes;
        for prefix in self.0.iter().map(|net| net.trunc().to_string()) {
            if !routes.iter().any(|r| r.prefix == prefix) {
                routes.push(Route { unknown: None, prefix, next_hop: String::new() });
            }
        }
        next.request(cx, request).await
    }
}

/// Policy routes of the clients (11.3): packets that match take routes of their own. They stand in a file; what changes
/// in it reaches each client with its next request or refresh.
#[derive(Debug, Clone, Default)]
pub struct PolicyRoutes(FromFile<Vec<PolicyRoute>>);

impl PolicyRoutes {
    /// Where upstream's endpoints find them.
    pub const FILE: &'static str = "/etc/policy-based-routing/config.yaml";

    /// Those in the file, which is followed; none where there is no such file. Needs a runtime.
    ///
    /// # Errors
    /// A file that is not YAML with a list of policies, or one that no kernel can do.
    pub fn open(file: impl Into<PathBuf>) -> Result<Self, BadFile> {
        FromFile::open(file, |text| text.map_or(Ok(Vec::new()), parse_policies)).map(Self)
    }
}

/// A policy as upstream's files spell it (spec/kubernetes.md 3.5.2).
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FilePolicy {
    #[serde(default)]
    from: String,
    #[serde(default)]
    proto: Scalar,
    #[serde(default, alias = "src_port", alias = "srcPort")]
    srcport: Scalar,
    #[serde(default, alias = "dst_port", alias = "dstPort")]
    dstport: Scalar,
    #[serde(default)]
    routes: Vec<FileRoute>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRoute {
    prefix: String,
    #[serde(default, alias = "next_hop", alias = "nextHop")]
    nexthop: String,
}

/// YAML takes `6666` for a number and `6667-6670` for a text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Scalar {
    Number(u64),
    Text(String),
}

impl Default for Scalar {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

impl From<Scalar> for String {
    fn from(scalar: Scalar) -> Self {
        match scalar {
            Scalar::Number(number) => number.to_string(),
            Scalar::Text(text) => text,
        }
    }
}

/// The policies in such a file.
#[doc(hidden)]
pub fn parse_policies(text: &str) -> Result<Vec<PolicyRoute>, String> {
    const EXPECTED: &str = "expected a YAML list of {from: ADDRESS/LENGTH, proto, srcport, dstport, routes: [{prefix, nexthop}]}, all but the list optional";
    let policies: Option<Vec<FilePolicy>> =
        serde_saphyr::from_str(text).map_err(|e| format!("{e}; {EXPECTED}"))?;
    let route = |r: FileRoute| Route { unknown: None, prefix: r.prefix, next_hop: r.nexthop };
    let policies: Vec<PolicyRoute> = policies
        .unwrap_or_default()
        .into_iter()
        .map(|p| PolicyRoute {
            from: p.from,
            proto: p.proto.into(),
            dst_port: p.dstport.into(),
            src_port: p.srcport.into(),
            routes: p.routes.into_iter().map(route).collect(),
            ..PolicyRoute::default()
        })
        .collect();
    check(&policies).map_err(|problem| format!("{problem}; {EXPECTED}"))?;
    Ok(policies)
}

/// Whether a forwarder can build them: said here, before every client hears it.
fn check(policies: &[PolicyRoute]) -> Result<(), nsm_kernel::plan::Invalid> {
    let route = |r: &Route| ContextRoute { prefix: r.prefix.clone(), next_hop: r.next_hop.clone() };
    let policy = |p: &PolicyRoute| ContextPolicy {
        from: p.from.clone(),
        proto: p.proto.clone(),
        src_port: p.src_port.clone(),
        dst_port: p.dst_port.clone(),
        routes: p.routes.iter().map(route).collect(),
    };
    let context = IpContext { policies: policies.iter().map(policy).collect(), ..IpContext::default() };
    let ns = NsId { dev: 0, ino: 0 };
    let near = EndPlan::new(Side::Near, ns, "near", "check").with_context(Side::Near, &context)?;
    WirePlan::veth("check", near, EndPlan::new(Side::Far, ns, "far", "check")).validate()
}

#[async_trait]
impl Element for PolicyRoutes {
    fn name(&self) -> &'static str {
        "policy-routes"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let policies = self.0.get();
        let context = request.connection.get_or_insert_default().context.get_or_insert_default();
        let ip = context.ip_context.get_or_insert_default();
        // The source addresses that the earlier policies brought go with them.
        let before: BTreeSet<String> = ip.policies.iter().map(|p| p.from.clone()).collect();
        ip.src_ip_addrs.retain(|address| !before.contains(address));
        ip.policies.clone_from(&policies);
        for from in policies.iter().map(|p| &p.from).filter(|from| !from.is_empty()) {
            if !ip.src_ip_addrs.contains(from) {
                ip.src_ip_addrs.push(from.clone());
            }
        }
        next.request(cx, request).await
    }
}

/// DNS servers that clients shall ask, and for which domains (11.4).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DnsConfigs(pub Vec<DnsConfig>);

/// Not a list of DNS configurations.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "DNS configurations {text:?}: {problem}; expected JSON such as [{{\"dns_server_ips\": [\"172.16.1.2\"], \"search_domains\": [\"my.domain\"]}}]"
)]
pub struct BadDnsConfigs {
    /// The text as given.
    pub text: String,
    /// What about it cannot be used.
    pub problem: String,
}

impl FromStr for DnsConfigs {
    type Err = BadDnsConfigs;

    fn from_str(text: &str) -> Result<Self, BadDnsConfigs> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Config {
            dns_server_ips: Vec<IpAddr>,
            #[serde(default)]
            search_domains: Vec<String>,
        }
        // JSON is YAML.
        let bad = |problem: String| BadDnsConfigs { text: text.into(), problem };
        let configs: Vec<Config> = match text.trim() {
            "" => Vec::new(),
            text => serde_saphyr::from_str(text).map_err(|e| bad(e.to_string()))?,
        };
        let config = |c: Config| DnsConfig {
            unknown: None,
            dns_server_ips: c.dns_server_ips.iter().map(IpAddr::to_string).collect(),
            search_domains: c.search_domains,
        };
        Ok(Self(configs.into_iter().map(config).collect()))
    }
}

#[async_trait]
impl Element for DnsConfigs {
    fn name(&self) -> &'static str {
        "dns-configs"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let context = request.connection.get_or_insert_default().context.get_or_insert_default();
        let configs = &mut context.dns_context.get_or_insert_default().configs;
        let set = |list: &[String]| list.iter().cloned().collect::<BTreeSet<_>>();
        for ours in &self.0 {
            let same = |c: &DnsConfig| {
                set(&c.dns_server_ips) == set(&ours.dns_server_ips)
                    && set(&c.search_domains) == set(&ours.search_domains)
            };
            if !configs.iter().any(same) {
                configs.push(ours.clone());
            }
        }
        next.request(cx, request).await
    }
}

#[cfg(test)]
mod tests {
    use nsm_api::pb::connectioncontext::ConnectionContext;
    use nsm_mesh::{Call, Connections, chain};

    use super::*;

    const SAMPLE: &str = "\
- {proto: 6, dstport: 6666, from: 172.16.2.201/24, routes: [{prefix: 172.16.3.0/24, nexthop: 172.16.2.200}]}
- {proto: 17, dstport: 6667-6670, routes: []}
";

    #[test]
    fn policies_are_read_as_upstream_writes_them() {
        let read = parse_policies(SAMPLE).unwrap();
        assert_eq!((read[0].proto.as_str(), read[0].dst_port.as_str()), ("6", "6666"));
        assert_eq!(read[0].routes[0].next_hop, "172.16.2.200");
        assert_eq!((read[1].from.as_str(), read[1].dst_port.as_str()), ("", "6667-6670"));
        assert!(parse_policies("").unwrap().is_empty());
        for (bad, says) in [
            ("- {proto: tcp}", "\"tcp\" is not an IP protocol number"),
            ("- {dstport: 70000}", "70000"),
            ("- {from: 10.0.0.1}", "\"10.0.0.1\" is not a source prefix"),
            ("- {routes: [{prefix: nowhere}]}", "nowhere"),
            ("- {proto: 6}\n- {proto: 6}", "match the same"),
            ("proto: 6", "expected a YAML list"),
            ("- {protocol: 6}", "protocol"),
        ] {
            let error = parse_policies(bad).unwrap_err();
            assert!(error.contains(says) && error.contains("expected a YAML list"), "{bad}: {error}");
        }
    }

    async fn answer(element: impl Element + 'static, context: ConnectionContext) -> ConnectionContext {
        let conn = Connection {
            id: "u".into(),
            network_service: "s".into(),
            context: Some(context),
            ..Connection::default()
        };
        let request = NetworkServiceRequest {
            connection: Some(conn),
            mechanism_preferences: vec![],
            ..NetworkServiceRequest::default()
        };
        let connections = Connections::asking("nse", chain![element], Default::default());
        connections.request(Call::default(), request).await.unwrap().connection.context.unwrap()
    }

    #[tokio::test]
    async fn policies_replace_those_before_with_their_source_addresses() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.yaml");
        std::fs::write(&file, SAMPLE).unwrap();
        let policies = PolicyRoutes::open(&file).unwrap();
        let first = answer(policies.clone(), ConnectionContext::default()).await;
        let ip = first.ip_context.as_ref().unwrap();
        assert_eq!((ip.policies.len(), &ip.src_ip_addrs), (2, &vec!["172.16.2.201/24".to_owned()]));
        assert_eq!(answer(policies.clone(), first.clone()).await, first, "a refresh changes nothing");
        std::fs::write(&file, "- {proto: 6, from: 172.16.9.9/32}").unwrap();
        while policies.0.get().len() != 1 {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        let second = answer(policies, first).await.ip_context.unwrap();
        assert_eq!((second.policies.len(), &second.src_ip_addrs), (1, &vec!["172.16.9.9/32".to_owned()]));
    }

    #[tokio::test]
    async fn dns_configs_are_added_once() {
        let ours: DnsConfigs =
            r#"[{"dns_server_ips": ["10.0.0.1", "10.0.0.2"], "search_domains": ["a"]}, {"dns_server_ips": ["::1"]}]"#
                .parse()
                .unwrap();
        let first = answer(ours.clone(), ConnectionContext::default()).await;
        assert_eq!(first.dns_context.as_ref().unwrap().configs, ours.0);
        let mut other_order = first.clone();
        other_order.dns_context.as_mut().unwrap().configs[0].dns_server_ips.reverse();
        assert_eq!(answer(ours, other_order.clone()).await, other_order);
        assert_eq!("".parse::<DnsConfigs>().unwrap(), DnsConfigs::default());
        assert_eq!("[]".parse::<DnsConfigs>().unwrap(), DnsConfigs::default());
        for bad in [r#"[{"dns_server_ips": ["here"]}]"#, r#"[{"servers": []}]"#, "{", "nonsense"] {
            let error = bad.parse::<DnsConfigs>().unwrap_err().to_string();
            assert!(error.contains("expected JSON such as"), "{error}");
        }
    }
}
