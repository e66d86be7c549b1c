//! A function in a chain of functions: it answers a request by a request of its own for the same service, and joins
//! the two wires (control-plane 11.8).

use std::collections::BTreeMap;
use std::future::Future;
use std::mem;
use std::sync::Arc;

use async_trait::async_trait;
use nsm_api::context;
use nsm_api::mechanism::{LOCAL, interface_name, key, kind};
use nsm_api::payload;
use nsm_api::pb::connection::{Connection, Mechanism};
use nsm_api::pb::networkservice::NetworkServiceRequest;
use nsm_identity::Source;
use nsm_kernel::join::{Join, Layer};
use nsm_mesh::auth::Authorize;
use nsm_mesh::dial::Dial;
use nsm_mesh::error::explain;
use nsm_mesh::monitor::{Hub, Monitor};
use nsm_mesh::{Chain, Context, Element, Error, Lease, Next, NextHop, Release, Result, chain};
use nsm_sdk::client::To;
use nsm_sdk::endpoint::{EndpointConfig, serve};
use nsm_sdk::own_end::{ClientEnd, OwnNamespace, ServerEnd};
use tokio::task::spawn_blocking;

use crate::works::{Role, Works};

/// The chain of `nsm firewall` and `nsm passthrough`.
#[must_use]
pub fn function(
    authorize: Authorize,
    hub: Arc<Hub>,
    namespace: OwnNamespace,
    works: Arc<Works>,
    labels: BTreeMap<String, String>,
    manager: NextHop,
    dial: Dial,
) -> Chain {
    chain![
        authorize,                                                    // who asks, before anything is made
        Monitor { hub, terminates: false },                           // what becomes of each wire
        ServerEnd { namespace: namespace.clone(), unnumbered: true }, // our end towards the client
        JoinEnds { works },                                           // on the way back: joins both ends
        PassThrough { labels },                                       // the same service, asked for by us
        ClientEnd(namespace),                                         // our end towards the endpoint
        To(manager),                                                  // who finds the next element
        dial,
    ]
}

/// Serves as a function until `shutdown`: `nsm firewall`, `nsm passthrough`. The calling thread's namespace is the one
/// that the wires end in.
///
/// # Errors
/// A kernel that does not do what the role needs, a socket that cannot be bound, a manager that refuses.
pub async fn run(
    config: EndpointConfig,
    role: Role,
    source: Source,
    ready: impl FnOnce(),
    shutdown: impl Future<Output = ()> + Send,
) -> Result<()> {
    let namespace = OwnNamespace::open()
        .map_err(|e| Error::internal(format!("our own network namespace cannot be opened: {e}")))?;
    if let Role::Firewall { rules, .. } = &role {
        tracing::info!("rules, first match decides:\n{rules}");
    }
    let works = Works::start(role).map_err(|e| refused("start", &e))?;
    let hub = Arc::new(Hub::guarded(&config.guard));
    let pool = config.pool(source.clone());
    let dial = Dial::new(pool.clone(), &config.name, Arc::clone(&hub), config.dial_timeout);
    let chain = function(
        config.authorize(),
        Arc::clone(&hub),
        namespace,
        Arc::clone(&works),
        config.labels.clone(),
        NextHop::from(config.connect_to.clone()),
        dial,
    );
    let served = serve(config, chain, hub, source, pool, ready, shutdown).await;
    let stopped = match Arc::into_inner(works) {
        Some(works) => works.stop().map_err(|e| refused("clean up", &e)),
        // A request that is still running holds them; what it has joined ends with its interfaces.
        None => Ok(()),
    };
    served.and(stopped)
}

/// Asks for the same service with our own labels, and gives the asker's back in the answer.
#[derive(Debug)]
pub struct PassThrough {
    /// Our labels: the service's matches lead from them to the next element.
    pub labels: BTreeMap<String, String>,
}

/// What the last answer of this connection said of the next link.
#[derive(Debug)]
struct NextLink {
    endpoint: String,
    mechanism: Option<Mechanism>,
}

#[async_trait]
impl Lease for NextLink {
    fn name(&self) -> &'static str {
        "next-link"
    }

    async fn release(self: Box<Self>, _: &Release) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl Element for PassThrough {
    fn name(&self) -> &'static str {
        "pass-through"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let conn = request.connection.get_or_insert_default();
        let near = conn.mechanism.as_ref().and_then(|m| m.get(key::NAME)).unwrap_or_default();
        let name = far_name(&conn.network_service, near);
        let known = cx.scope.get::<NextLink>();
        conn.mechanism = known.and_then(|link| link.mechanism.clone());
        let endpoint = known.map(|link| link.endpoint.clone()).unwrap_or_default();
        let asked_endpoint = mem::replace(&mut conn.network_service_endpoint_name, endpoint);
        let asked_labels = mem::replace(&mut conn.labels, self.labels.clone());
        let mut ours = Mechanism::kernel(&name, None);
        ours.set(key::UNNUMBERED, "true");
        request.mechanism_preferences = vec![ours];

        let mut answer = next.request(cx, request).await?;
        let link = NextLink {
            endpoint: answer.network_service_endpoint_name.clone(),
            mechanism: answer.mechanism.clone(),
        };
        match cx.scope.get_mut::<NextLink>() {
            Some(known) => *known = link,
            None => cx.scope.lease(link),
        }
        answer.network_service_endpoint_name = asked_endpoint;
        answer.labels = asked_labels;
        Ok(answer)
    }
}

/// Joins the end towards the client, which it finds chosen, with that towards the endpoint, which the answer names.
///
/// The client's end appears only after our answer, so the join comes about on its own, when both are there.
#[derive(Debug)]
pub struct JoinEnds {
    /// What joins.
    pub works: Arc<Works>,
}

/// Two ends are joined, or shall be.
#[derive(Debug)]
struct Joined {
    works: Arc<Works>,
    near: String,
}

#[async_trait]
impl Lease for Joined {
    fn name(&self) -> &'static str {
        "join"
    }

    async fn release(self: Box<Self>, _: &Release) -> Result<()> {
        part(self.works, self.near).await
    }
}

async fn part(works: Arc<Works>, near: String) -> Result<()> {
    let parted = spawn_blocking(move || works.part(&near)).await;
    parted.map_err(|e| Error::internal(e.to_string()))?.map_err(|e| refused("part two wires", &e))
}

#[async_trait]
impl Element for JoinEnds {
    fn name(&self) -> &'static str {
        "join"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let near = interface(request.connection.as_ref().and_then(|c| c.mechanism.as_ref()), "client")?;
        let answer = next.request(cx, request).await?;
        let far = interface(answer.mechanism.as_ref(), "endpoint")?;
        let join = Join { near: near.clone(), far, layer: layer(&answer)? };
        let works = Arc::clone(&self.works);
        let joined = spawn_blocking(move || works.join(join)).await;
        joined.map_err(|e| Error::internal(e.to_string()))?.map_err(|e| refused("join two wires", &e))?;
        match cx.scope.get_mut::<Joined>() {
            Some(joined) if joined.near == near => {}
            known => {
                if let Some(other) = known.map(|known| mem::replace(&mut known.near, near.clone())) {
                    part(Arc::clone(&self.works), other).await?;
                } else {
                    cx.scope.lease(Joined { works: Arc::clone(&self.works), near });
                }
            }
        }
        Ok(answer)
    }
}

// === private helpers ===

/// The interface that a KERNEL mechanism names.
fn interface(mechanism: Option<&Mechanism>, whose: &str) -> Result<String> {
    let kernel = mechanism.filter(|m| m.cls == LOCAL && m.r#type == kind::KERNEL);
    let name = kernel.and_then(|m| m.get(key::NAME)).ok_or_else(|| {
        let what = mechanism.map_or_else(|| "nothing".into(), |m| format!("{} {}", m.cls, m.r#type));
        Error::invalid(format!(
            "the wire towards the {whose} is {what}; only kernel interfaces can be joined"
        ))
    })?;
    Ok(name.to_owned())
}

/// On which layer a connection's wires carry what they carry.
fn layer(conn: &Connection) -> Result<Layer> {
    match conn.payload.as_str() {
        // The role decides whether it is filtered.
        payload::ETHERNET => Ok(Layer::Ethernet { filtered: true }),
        // A service that is registered without a payload carries IP.
        payload::IP | "" => {
            let (near, far) = context::addresses(conn);
            Ok(Layer::Ip { near, far })
        }
        other => Err(Error::invalid(format!("payload {other:?} is neither IP nor ETHERNET"))),
    }
}

/// The name of our end towards the endpoint: the same for the same end towards the client, so that a restart asks for
/// what is there.
fn far_name(service: &str, near: &str) -> String {
    let mut hash = crate::filter::fnv(near.as_bytes());
    interface_name(service, || {
        let digit = (hash % 62) as u8;
        hash /= 62;
        digit
    })
}

fn refused(what: &str, error: &nsm_kernel::Error) -> Error {
    Error::new(tonic::Code::FailedPrecondition, format!("this function cannot {what}: {}", explain(error)))
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use nsm_api::pb::connectioncontext::{ConnectionContext, IpContext};

    use super::*;

    #[test]
    fn the_payload_decides_the_layer() {
        let ip_context = IpContext {
            src_ip_addrs: vec!["172.16.1.3/32".into(), "2001:db8::3/128".into(), "not one".into()],
            dst_ip_addrs: vec!["172.16.1.2/32".into()],
            ..IpContext::default()
        };
        let context = ConnectionContext { ip_context: Some(ip_context), ..ConnectionContext::default() };
        let conn = |payload: &str| Connection {
            payload: payload.into(),
            context: Some(context.clone()),
            ..Connection::default()
        };
        assert!(layer(&conn("ETHERNET")).unwrap().is_ethernet());
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let wanted =
            Layer::Ip { near: vec![ip("172.16.1.3"), ip("2001:db8::3")], far: vec![ip("172.16.1.2")] };
        assert_eq!(layer(&conn("IP")).unwrap(), wanted);
        assert_eq!(layer(&conn("")).unwrap(), wanted);
        assert!(layer(&conn("MPLS")).unwrap_err().to_string().contains("MPLS"));
    }

    #[test]
    fn only_kernel_interfaces_are_joined() {
        assert_eq!(interface(Some(&Mechanism::kernel("nsm0", None)), "client").unwrap(), "nsm0");
        let memif = Mechanism::new(LOCAL, kind::MEMIF);
        assert!(interface(Some(&memif), "client").unwrap_err().to_string().contains("LOCAL MEMIF"));
        assert!(
            interface(None, "endpoint").unwrap_err().to_string().contains("towards the endpoint is nothing")
        );
    }

    #[test]
    fn the_far_name_follows_from_the_near_one() {
        let name = far_name("secure-intranet-connectivity", "secure-int-a1b2");
        assert_eq!(name.len(), 15);
        assert_eq!(name, far_name("secure-intranet-connectivity", "secure-int-a1b2"));
        assert_ne!(name, far_name("secure-intranet-connectivity", "secure-int-a1b3"));
        assert_ne!(name, "secure-int-a1b2");
    }
}
