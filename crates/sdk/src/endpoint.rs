//! An endpoint: a chain that ends here, served on a Unix socket and registered with the node's manager.

use std::sync::Arc;

use async_trait::async_trait;
use ipnet::IpNet;
use nsm_api::pb::{connection::Connection, connectioncontext::Route, networkservice::NetworkServiceRequest};
use nsm_mesh::{
    Chain, Context, Element, Next, Result,
    auth::Authorize,
    chain,
    monitor::{Hub, Monitor},
};

use crate::{
    ipam::{Ipam, PrefixGroups},
    own_end::{OwnNamespace, ServerEnd},
};

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
                routes.push(Route { prefix, next_hop: String::new() });
            }
        }
        next.request(cx, request).await
    }
}

/// The chain of `nsm endpoint`.
#[must_use]
pub fn endpoint(
    authorize: Authorize,
    hub: Arc<Hub>,
    prefixes: &PrefixGroups,
    behind: Vec<IpNet>,
    namespace: OwnNamespace,
) -> Chain {
    chain![
        authorize,                                  // who asks, before anything is taken
        Monitor { hub, terminates: true },          // what becomes of each wire
        Ipam::new(prefixes),                        // addresses for both ends
        RoutesBehind(behind),                       // what else is reached through us
        ServerEnd { namespace, unnumbered: false }, // where our end appears
    ]
}
