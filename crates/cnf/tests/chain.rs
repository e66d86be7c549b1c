//! The chain of a function between a caller and a next hop: what each of them sees, and what is joined meanwhile.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use nsm_api::mechanism::{key, kind};
use nsm_api::pb::connection::{Connection, Mechanism, Path, PathSegment};
use nsm_api::pb::connectioncontext::{ConnectionContext, IpContext};
use nsm_api::pb::networkservice::NetworkServiceRequest;
use nsm_cnf::function::{JoinEnds, PassThrough};
use nsm_cnf::works::{Role, Works};
use nsm_kernel::joiner::State;
use nsm_kernel::netns::Namespace;
use nsm_mesh::metrics::Metrics;
use nsm_mesh::{Call, Connections, Context, Element, Error, Next, Result, chain};
use nsm_sdk::own_end::{ClientEnd, OwnNamespace, ServerEnd};
use parking_lot::Mutex;

/// The next hop: answers as an endpoint behind it would, and keeps what it was asked.
#[derive(Debug, Default)]
struct NextHop {
    asked: Mutex<Vec<NetworkServiceRequest>>,
    refuses: bool,
}

#[derive(Debug)]
struct Behind(Arc<NextHop>);

#[async_trait]
impl Element for Behind {
    fn name(&self) -> &'static str {
        "next-hop"
    }

    async fn request(
        &self,
        _: &mut Context<'_>,
        request: NetworkServiceRequest,
        _: Next<'_>,
    ) -> Result<Connection> {
        self.0.asked.lock().push(request.clone());
        if self.0.refuses {
            return Err(Error::unavailable("nobody there"));
        }
        let mut conn = request.connection.unwrap();
        conn.mechanism = conn.mechanism.or_else(|| request.mechanism_preferences.first().cloned());
        conn.network_service_endpoint_name = "gateway-1".into();
        conn.payload = "IP".into();
        let ip_context = IpContext {
            src_ip_addrs: vec!["172.16.1.3/32".into()],
            dst_ip_addrs: vec!["172.16.1.2/32".into()],
            ..IpContext::default()
        };
        conn.context =
            Some(ConnectionContext { ip_context: Some(ip_context), ..ConnectionContext::default() });
        Ok(conn)
    }
}

struct Function {
    connections: Arc<Connections>,
    next: Arc<NextHop>,
    works: Arc<Works>,
    namespace: Namespace,
}

fn labels(app: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("app".to_owned(), app.to_owned())])
}

fn function(test: &str, refuses: bool) -> Option<Function> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED {test}: network namespaces need root");
        return None;
    }
    let namespace = Namespace::unnamed().unwrap();
    let (own, works) =
        namespace.run(|| (OwnNamespace::open().unwrap(), Works::start(Role::Passthrough).unwrap())).unwrap();
    let next = Arc::new(NextHop { refuses, ..NextHop::default() });
    let chain = chain![
        ServerEnd { namespace: own.clone(), unnumbered: true },
        JoinEnds { works: Arc::clone(&works) },
        PassThrough { labels: labels("firewall") },
        ClientEnd(own),
        Behind(Arc::clone(&next)),
    ];
    let connections = Connections::asking("firewall", chain, Arc::new(Metrics::default()));
    Some(Function { connections, next, works, namespace })
}

/// As the forwarder asks on behalf of a client.
fn request() -> NetworkServiceRequest {
    let segment = PathSegment { name: "fwd".into(), id: "c-1".into(), ..PathSegment::default() };
    NetworkServiceRequest {
        connection: Some(Connection {
            id: "c-1".into(),
            network_service: "secure-intranet-connectivity".into(),
            network_service_endpoint_name: "firewall".into(),
            labels: labels("client"),
            path: Some(Path { unknown: None, index: 0, path_segments: vec![segment] }),
            ..Connection::default()
        }),
        mechanism_preferences: vec![Mechanism::new("LOCAL", kind::KERNEL)],
        ..NetworkServiceRequest::default()
    }
}

#[tokio::test]
async fn a_request_goes_on_as_our_own_and_its_answer_comes_back_as_the_caller_s() {
    let Some(function) = function("a_request_goes_on_as_our_own", false) else { return };
    let answer = function.connections.request(Call::default(), request()).await.unwrap();
    let near = answer.connection.mechanism.clone().unwrap();
    assert!(near.is_true(key::UNNUMBERED) && near.inode().unwrap().is_some());
    assert_eq!(answer.connection.labels, labels("client"));
    assert_eq!(answer.connection.network_service_endpoint_name, "firewall");
    assert!(answer.fds.get(near.inode().unwrap().unwrap()).is_some(), "the namespace goes along");

    let asked = function.next.asked.lock().last().cloned().unwrap();
    let conn = asked.connection.unwrap();
    assert_eq!(conn.labels, labels("firewall"));
    assert_eq!(conn.network_service_endpoint_name, "", "the service's matches choose");
    assert_eq!(conn.mechanism, None);
    let far = &asked.mechanism_preferences[0];
    assert!(far.is_true(key::UNNUMBERED) && far.inode().unwrap().is_some());
    assert_ne!(far.get(key::NAME), near.get(key::NAME));

    // Joined when the forwarders have made both.
    let name = near.get(key::NAME).unwrap().to_owned();
    assert_eq!(function.works.state(&name), Some(State::Waiting));

    // A refresh asks the same endpoint for the same interface, and joins what is joined.
    let refresh = NetworkServiceRequest { connection: Some(answer.connection), ..request() };
    let answer = function.connections.request(Call::default(), refresh).await.unwrap();
    assert_eq!(answer.connection.mechanism, Some(near));
    let again = function.next.asked.lock().last().cloned().unwrap().connection.unwrap();
    assert_eq!(again.network_service_endpoint_name, "gateway-1");
    assert_eq!(again.mechanism.unwrap().get(key::NAME), far.get(key::NAME));

    function.connections.close(Call::default(), answer.connection).await.unwrap();
    assert_eq!(function.works.state(&name), None);
    drop(function.namespace);
}

#[tokio::test]
async fn what_the_next_hop_refuses_leaves_nothing() {
    let Some(function) = function("what_the_next_hop_refuses_leaves_nothing", true) else { return };
    let error = function.connections.request(Call::default(), request()).await.unwrap_err();
    assert!(error.to_string().contains("nobody there"), "{error}");
    assert!(function.connections.is_empty());
    let nothing = NetworkServiceRequest {
        mechanism_preferences: vec![Mechanism::new("LOCAL", kind::NOOP)],
        ..request()
    };
    let error = function.connections.request(Call::default(), nothing).await.unwrap_err();
    assert!(error.to_string().contains("only kernel interfaces can be joined"), "{error}");
    assert!(function.connections.is_empty());
}
