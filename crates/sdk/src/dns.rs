//! The DNS servers and search domains that a wire brings, for the names of the pod (spec/control-plane.md 11.4).

use std::sync::Arc;

use async_trait::async_trait;
use nsm_api::pb::{connection::Connection, networkservice::NetworkServiceRequest};
use nsm_dns::{Config, Names};
use nsm_mesh::{
    Context, Element, Next, Result,
    scope::{Lease, Release},
};

/// Tells the pod's names what each wire brings; `None`: there are none to tell.
#[derive(Debug)]
pub struct DnsContexts(pub Option<Arc<Names>>);

/// What a wire has brought, as long as it is there.
#[derive(Debug)]
struct Brought {
    names: Arc<Names>,
    id: String,
}

#[async_trait]
impl Lease for Brought {
    fn name(&self) -> &'static str {
        "dns-contexts"
    }

    async fn release(self: Box<Self>, _: &Release) -> Result<()> {
        self.names.set(&self.id, Vec::new()).await;
        Ok(())
    }
}

#[async_trait]
impl Element for DnsContexts {
    fn name(&self) -> &'static str {
        "dns-contexts"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let conn = next.request(cx, request).await?;
        if let Some(names) = &self.0 {
            if cx.scope.get::<Brought>().is_none() {
                cx.scope.lease(Brought { names: Arc::clone(names), id: conn.id.clone() });
            }
            names.set(&conn.id, configs(&conn)).await;
        }
        Ok(conn)
    }
}

fn configs(conn: &Connection) -> Vec<Config> {
    let context = conn.context.as_ref().and_then(|context| context.dns_context.as_ref());
    let configs = context.into_iter().flat_map(|context| &context.configs);
    configs
        .map(|config| {
            let (config, bad) = Config::read(&config.dns_server_ips, &config.search_domains);
            for problem in bad {
                let endpoint = &conn.network_service_endpoint_name;
                tracing::warn!(connection = conn.id, %endpoint, "a DNS configuration is left out: {problem}");
            }
            config
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use nsm_api::pb::connectioncontext::{ConnectionContext, DnsConfig, DnsContext};

    use super::*;

    #[test]
    fn what_can_be_read_is_taken() {
        let config = DnsConfig {
            unknown: None,
            dns_server_ips: vec!["172.16.1.2".into(), "nonsense".into()],
            search_domains: vec!["my.coredns.service".into(), "..".into()],
        };
        let context = ConnectionContext {
            dns_context: Some(DnsContext { configs: vec![config], ..DnsContext::default() }),
            ..ConnectionContext::default()
        };
        let read = configs(&Connection { context: Some(context), ..Connection::default() });
        assert_eq!(read.len(), 1);
        assert_eq!(read[0].servers, ["172.16.1.2:53".parse().unwrap()]);
        assert_eq!(read[0].search.len(), 1);
        assert_eq!(configs(&Connection::default()), []);
    }
}
