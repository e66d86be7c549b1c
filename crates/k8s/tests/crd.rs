//! The custom resource definitions before a real API server.
#![allow(clippy::unwrap_used)]

use std::{io::Write, process::Stdio};

use nsm_cluster::{ApiServer, api_server};
use nsm_k8s::crd::{NETWORK_SERVICE_ENDPOINTS, NETWORK_SERVICES};

/// Creates an object as a user or another program does; what kubectl says if it is refused.
fn create(server: &ApiServer, manifest: &str) -> Result<String, String> {
    let mut kubectl = server.kubectl_command();
    // What a program sends is not validated on its side.
    let kubectl = kubectl.args(["create", "--validate=false", "--filename=-"]);
    let mut kubectl =
        kubectl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    kubectl.stdin.take().unwrap().write_all(manifest.as_bytes()).unwrap();
    let output = kubectl.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

#[test]
fn what_upstream_and_its_users_wrote_is_taken_and_kept() {
    let Some(server) = api_server("what_upstream_and_its_users_wrote_is_taken_and_kept") else { return };
    server.install(&[NETWORK_SERVICES, NETWORK_SERVICE_ENDPOINTS]);
    // As upstream's registry writes it.
    create(
        &server,
        r#"{"apiVersion": "networkservicemesh.io/v1", "kind": "NetworkServiceEndpoint",
            "metadata": {"generateName": "nse-", "name": "gw-7c9f-abcde"},
            "spec": {"name": "gw-7c9f-abcde", "network_service_names": ["web-access"],
                     "network_service_labels": {"web-access": {"labels": {"app": "gateway", "nodeName": "worker-2"}}, "bare": {}},
                     "url": "tcp://10.244.2.11:5001",
                     "expiration_time": {"seconds": 1760000060, "nanos": 120000000},
                     "initial_registration_time": {"seconds": 1760000000}, "path_ids": ["spiffe://k8s.nsm/ns/apps/pod/gw"]},
            "status": {}}"#,
    )
    .unwrap();
    // As people write them: without a value, with words of other versions, with nothing at all.
    create(
        &server,
        "
apiVersion: networkservicemesh.io/v1
kind: NetworkService
metadata: {name: web-access}
spec:
  payload: ETHERNET
  note: {of: [mine]}
  matches:
  - match:
    sourceSelector: {app: firewall}
    source_selector:
    routes:
    - destination:
      destination_selector: {app: gateway, nodeName: '{{.nodeName}}'}
      weight: 4294967295
  - fallthrough: true
    metadata: {labels: {app: x}}
---
{apiVersion: networkservicemesh.io/v1, kind: NetworkService, metadata: {name: empty}}
---
{apiVersion: networkservicemesh.io/v1, kind: NetworkService, metadata: {name: bare}, spec: }
---
{apiVersion: networkservicemesh.io/v1, kind: NetworkService, metadata: {generateName: netsvc-}, spec: {name: other, payload: Ip/any}}
",
    )
    .unwrap();
    let kept = server.kubectl(&["get", "netsvc", "web-access", "--output=jsonpath={.spec.note.of[0]} {.spec.matches[0].sourceSelector.app} {.spec.matches[0].routes[0].weight}"]);
    assert_eq!(kept, "mine firewall 4294967295");
    let columns = server.kubectl(&["get", "nses", "--no-headers"]);
    let columns: Vec<_> = columns.split_whitespace().collect();
    assert_eq!(columns[..3], ["gw-7c9f-abcde", r#"["web-access"]"#, "tcp://10.244.2.11:5001"]);
    let columns = server.kubectl(&["get", "netsvcs", "web-access", "--no-headers"]);
    assert_eq!(columns.split_whitespace().take(2).collect::<Vec<_>>(), ["web-access", "ETHERNET"]);
}

#[test]
fn what_upstream_cannot_read_either_is_refused_with_its_place() {
    let Some(server) = api_server("what_upstream_cannot_read_either_is_refused_with_its_place") else {
        return;
    };
    server.install(&[NETWORK_SERVICES, NETWORK_SERVICE_ENDPOINTS]);
    let cases = [
        ("NetworkService", "matches: {routes: []}", "spec.matches: Invalid value: \"object\""),
        ("NetworkService", "matches: [{source_selector: {app: 7}}]", "spec.matches[0].source_selector.app"),
        ("NetworkService", "matches: [{routes: [{weight: -1}]}]", "spec.matches[0].routes[0].weight"),
        ("NetworkService", "matches: [{fallthrough: 'yes'}]", "spec.matches[0].fallthrough"),
        ("NetworkService", "name: web@cluster.two", "an @ stands before the domain of another cluster"),
        ("NetworkServiceEndpoint", "expiration_time: '2026-01-01T00:00:00Z'", "spec.expiration_time"),
        ("NetworkServiceEndpoint", "expiration_time: {nanos: 1000000000}", "spec.expiration_time.nanos"),
        ("NetworkServiceEndpoint", "network_service_names: web", "spec.network_service_names"),
        ("NetworkServiceEndpoint", "name: e@cluster.two", "an @ stands before the domain of another cluster"),
    ];
    for (kind, spec, word) in cases {
        let manifest = format!(
            "{{apiVersion: networkservicemesh.io/v1, kind: {kind}, metadata: {{name: bad}}, spec: {{{spec}}}}}"
        );
        let said = create(&server, &manifest).expect_err(spec);
        assert!(said.contains(word), "{spec}: {said}");
    }
}
