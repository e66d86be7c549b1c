//! What becomes of wires that stand when the network service leads elsewhere.

use std::{collections::BTreeMap, time::Duration};

use nsm_api::pb::registry::{Destination, Match, NetworkService};
use nsm_identity::Source;
use nsm_registry::{Client, ClientConfig};
use nsm_transport::{DialUrl, Pool, PoolConfig};
use rustix::process::Signal;

use crate::{
    harness::{self, Mesh, eventually},
    raw::in_runtime,
};

/// Pods without programs: tests start their own.
const BARE: &str = "\
- {name: a, node: node1}
- {name: b, node: node1}
- {name: x, node: node1}
- {name: y, node: node1}
";

/// A mesh with a service of two endpoints, which leads to x.
fn steered(test: &str) -> Option<Mesh> {
    let mesh = Mesh::up(test, BARE)?;
    for (name, prefix) in [("x", "172.16.1.0/24"), ("y", "172.16.2.0/24")] {
        let label = format!("app:{name}");
        mesh.endpoint(
            name,
            name,
            &["--service-names", "steered", "--labels", &label, "--cidr-prefix", prefix],
        );
    }
    mesh.ready(&["x", "y"]);
    mesh.inside("a", "steer x");
    Some(mesh)
}

#[test]
fn a_wire_that_its_service_leads_away_goes_to_another_endpoint() {
    let test = "a_wire_that_its_service_leads_away_goes_to_another_endpoint";
    let Some(mesh) = steered(test) else { return };
    mesh.client("guided", "b", "kernel://steered/nsm0", &[]);
    mesh.client("other", "a", "kernel://steered/nsm0", &[]);
    mesh.ready(&["guided", "other"]);
    let wired = |x: usize, y: usize| {
        eventually(&format!("{x} wires at x and {y} at y"), || {
            let at = ["x", "y", "a", "b"].map(|pod| mesh.links(pod).len());
            if at == [x, y, 1, 1] { Ok(()) } else { Err(format!("{at:?}\n{}", mesh.log("node1/manager"))) }
        });
    };
    wired(2, 0);
    // Nobody asks for anything: the change alone does it.
    mesh.inside("a", "steer y");
    wired(0, 2);
    // It leads to nobody: the wires are closed and asked for until it leads to somebody again.
    mesh.inside("a", "steer nobody");
    eventually("no wire stands", || {
        let at = ["x", "y"].map(|pod| mesh.links(pod).len());
        if at == [0, 0] { Ok(()) } else { Err(format!("{at:?}")) }
    });
    mesh.inside("a", "steer x");
    wired(2, 0);
    for client in ["guided", "other"] {
        mesh.end(client, Signal::TERM);
    }
    mesh.nothing_is_left(&["a", "b", "x", "y"]);
}

#[test]
fn a_wire_whose_service_led_away_while_its_manager_was_gone_leaves_the_endpoint_too() {
    let test = "a_wire_whose_service_led_away_while_its_manager_was_gone_leaves_the_endpoint_too";
    let Some(mesh) = steered(test) else { return };
    mesh.client("guided", "b", "kernel://steered/nsm0", &[]);
    mesh.ready(&["guided"]);
    // The manager that comes back hears of the change before it hears of the wire, from a client that names x.
    mesh.signal("guided", Signal::STOP);
    mesh.end("node1/manager", Signal::KILL);
    mesh.restart("node1/manager");
    mesh.inside("a", "steer y");
    mesh.signal("guided", Signal::CONT);
    eventually("the wire is at y", || {
        let at = ["x", "y"].map(|pod| mesh.links(pod).len());
        if at == [0, 1] { Ok(()) } else { Err(format!("{at:?}\n{}", mesh.log("node1/manager"))) }
    });
    mesh.end("guided", Signal::TERM);
    mesh.nothing_is_left(&["a", "b", "x", "y"]);
}

/// Makes the service `steered` lead to the endpoints with this label.
pub(crate) fn steer(lab: &str, app: &str) {
    in_runtime(async {
        let url: DialUrl = harness::url(lab, "nsm.io.sock").parse().expect("a URL");
        let pool = Pool::new(Source::from_env().await.expect("an identity"), PoolConfig::default());
        let destination_selector = BTreeMap::from([("app".to_owned(), app.to_owned())]);
        let routes = vec![Destination { destination_selector, ..Destination::default() }];
        let service = NetworkService {
            name: "steered".into(),
            payload: "IP".into(),
            matches: vec![Match { routes, ..Match::default() }],
            ..NetworkService::default()
        };
        let client = Client::new(pool, url, ClientConfig::default());
        // It stays when this process ends.
        client.register_service(service, Duration::from_secs(10)).await.expect("registered");
    });
}
