//! An endpoint that answers with what is not its own: a process in a pod, with the pod's identity and our own protocol,
//! but for the namespace that it names.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use nsm_api::pb::{connection::Connection, networkservice::NetworkServiceRequest};
use nsm_identity::Source;
use nsm_kernel::netns::Namespace;
use nsm_mesh::{
    Context, Element, Next, Result, chain,
    metrics::Metrics,
    monitor::{Hub, Monitor},
};
use nsm_sdk::{
    endpoint::{EndpointConfig, serve},
    own_end::{OwnNamespace, ServerEnd},
};
use rustix::process::Signal;

use crate::{
    harness::{self, Mesh, eventually},
    raw::in_runtime,
};

const PODS: &str = "\
- {name: a, node: node1}
- {name: b, node: node1}
- {name: evil, node: node1}
";
/// The client's label that says what it shall be answered with, and the namespaces there are.
const LABEL: &str = "into";
const NAMESPACES: [&str; 4] = ["a", "b", "node1", "evil"];

/// Answers with the namespace that the client's label names.
#[derive(Debug)]
struct Elsewhere(BTreeMap<String, ServerEnd>);

#[async_trait]
impl Element for Elsewhere {
    fn name(&self) -> &'static str {
        "elsewhere"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let labels = request.connection.as_ref().map(|conn| &conn.labels);
        let into = labels.and_then(|labels| labels.get(LABEL)).expect("a label");
        self.0[into].request(cx, request, next).await
    }
}

/// The endpoint itself: runs until it is killed.
pub(crate) fn evil(lab: &str) {
    in_runtime(async {
        let source = Source::from_env().await.expect("an identity");
        let parse = "a URL";
        let config = EndpointConfig {
            name: "evil".into(),
            connect_to: harness::url(lab, "nsm.io.sock").parse().expect(parse),
            listen_on: Some(harness::url(lab, "evil.sock").parse().expect(parse)),
            services: vec!["plain".into()],
            labels: BTreeMap::new(),
            register_payload: None,
            idle_timeout: None,
            dial_timeout: harness::PATIENCE,
            max_token_lifetime: Duration::from_secs(600),
            guard: Default::default(),
            registry_answers: Default::default(),
            metrics: Arc::new(Metrics::default()),
        };
        let ends = NAMESPACES.map(|name| {
            let namespace = Namespace::named(&format!("{lab}.{name}")).expect("it is there");
            let namespace = namespace.run(OwnNamespace::open).expect("enter").expect("open");
            (name.to_owned(), ServerEnd { namespace, unnumbered: false })
        });
        let hub = Arc::new(Hub::default());
        let chain = chain![
            config.authorize(),
            Monitor { hub: Arc::clone(&hub), terminates: true },
            Elsewhere(BTreeMap::from(ends)),
        ];
        let pool = config.pool(source.clone());
        let ready = || println!("evil is ready");
        serve(config, chain, hub, source, pool, ready, std::future::pending()).await.expect("served");
    });
}

#[test]
fn an_endpoint_that_answers_with_anothers_namespace_is_refused_and_leaves_nothing() {
    let test = "an_endpoint_that_answers_with_anothers_namespace_is_refused_and_leaves_nothing";
    let Some(mesh) = Mesh::up(test, PODS) else { return };
    mesh.start_inside("evil", "evil", "evil");
    mesh.says("evil", "evil is ready");
    let own = |name: &str| {
        let namespace = mesh.lab.namespace(name).expect("it is there");
        namespace.run(OwnNamespace::open).expect("enter").expect("open").url()
    };
    let pid = mesh.pid("evil").as_raw_pid();
    let before = mesh.links("node1");
    // A pod that has nothing to do with it; the client's own pod, whose descriptor the forwarder holds; the node.
    for victim in ["b", "a", "node1"] {
        let service = format!("kernel://plain/nsm0?{LABEL}={victim}");
        mesh.client("client", "a", &service, &["--once"]);
        let (how, said) = mesh.ended("client");
        assert_eq!(how, "exit status 1", "{said}");
        let lab = &mesh.lab.plan.lab;
        for text in [
            "nsm: no wire to plain: forwarder-node1: ",
            &format!(
                "{} is not the network namespace of spiffe://{lab}.lab/pod/evil (process {pid}), which is {}",
                own(victim),
                own("evil")
            ),
            "a workload gets wires only into its own namespace; list its SPIFFE ID in NSM_NAMESPACE_DELEGATES",
        ] {
            assert!(said.contains(text), "{victim}: {text:?} is not in {said:?}");
        }
        mesh.nothing_is_left(&["a", "b", "evil"]);
        eventually("the node is as it was", || {
            let links = mesh.links("node1");
            if links == before { Ok(()) } else { Err(format!("{links:?}")) }
        });
    }
    // It is the namespace that is refused, nothing else about it.
    mesh.client("client", "a", &format!("kernel://plain/nsm0?{LABEL}=evil"), &["--once"]);
    mesh.ready(&["client"]);
    mesh.has("a", "nsm0");
    assert_eq!(mesh.links("evil").len(), 1);
    mesh.end("client", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "evil"]);
}
