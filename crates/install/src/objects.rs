//! The objects, in the order in which they are applied.

use std::collections::BTreeSet;

use nsm_k8s::{
    prefixes::{ADDED, FOUND},
    wires::CONDITION,
};
use nsm_webhook::{
    configuration::{Configuration, Reach},
    settings::Annotation,
};
use serde_json::{Value, json};

use crate::{Identity, Settings, Store};

/// The registry's Service: upstream's name, which its programs and users know.
const REGISTRY: &str = "registry";
/// The webhook's Service and configuration, as upstream names them.
const WEBHOOK: (&str, &str) = ("admission-webhook-svc", "nsm-mutating-webhook");
/// Where workloads find the manager of their node.
const SOCKETS: &str = "/var/lib/networkservicemesh";
/// Where processes find who they are.
const IDENTITY: &str = "/run/spire/sockets";
/// Who has the keys of the trust domain: the Service, the Secret with the keys, the ConfigMap that says whom to trust.
const SIGNER: (&str, &str, &str) = ("nsm-identity", "nsm-identity-authorities", "nsm-identity-roots");
/// Where the agent of a node has the token for it.
const TOKEN: &str = "/run/secrets/nsm-identity";
/// Where clients of the API server look for the way to it.
const API: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Where managers find what no endpoint shall hand out.
const PREFIXES: &str = "/etc/nsm/prefixes";
/// Plans of wires, and sockets to look at processes.
const RUN: &str = "/run/nsm";

/// Everything but the definitions of resources.
#[must_use]
pub fn objects(settings: &Settings) -> Vec<Value> {
    let mut objects = vec![namespace(settings), priority(settings)];
    if settings.identity == Identity::Builtin {
        objects.extend(signer(settings));
    }
    objects.extend(registry(settings));
    objects.extend(node(settings));
    if settings.webhook {
        objects.extend(webhook(settings));
    }
    objects
}

fn namespace(settings: &Settings) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        // The nodes' pods make interfaces in other pods.
        "metadata": { "name": settings.namespace, "labels": { "pod-security.kubernetes.io/enforce": "privileged" } },
    })
}

/// Without the mesh nobody's wires are made; what the cluster itself needs goes before.
fn priority(settings: &Settings) -> Value {
    json!({
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": { "name": priority_name(settings) },
        "description": "Network service mesh: pods wait for it to get their wires",
        "value": 1_000_000,
    })
}

/// What has no namespace has the mesh's in its name, so that there can be two.
fn priority_name(settings: &Settings) -> String {
    settings.namespace.clone()
}

/// Who has the keys of the trust domain.
fn signer(settings: &Settings) -> Vec<Value> {
    let env = json!([
        { "name": "NSM_LOG_LEVEL", "value": settings.log_level },
        { "name": "NSM_TRUST_DOMAIN", "value": settings.trust_domain },
        { "name": "NSM_NAMESPACE", "valueFrom": field("metadata.namespace") },
        { "name": "NSM_SERVICE_NAME", "value": SIGNER.0 },
        { "name": "NSM_LISTEN_ON", "value": ":8443" },
        { "name": "NSM_INTROSPECT_DIR", "value": "" },
    ]);
    let container = json!({
        "name": "identity",
        "image": settings.image("nsm"),
        "imagePullPolicy": settings.pull_policy,
        "args": ["identity", "signer"],
        "env": env,
        "ports": [{ "name": "https", "containerPort": 8443 }],
        "securityContext": harmless(),
        "readinessProbe": https_probe(),
        "livenessProbe": { "tcpSocket": { "port": "https" }, "periodSeconds": 20 },
        "resources": resources("10m", "16Mi", "128Mi"),
    });
    let mut pod = pod(settings, "identity", &container, vec![]);
    pod["automountServiceAccountToken"] = json!(true);
    let everywhere =
        [rule("", "pods", &["list"]), rule("authentication.k8s.io", "tokenreviews", &["create"])];
    let here = [
        rule("", "secrets", &["create"]),
        named(rule("", "secrets", &["get", "update"]), SIGNER.1),
        rule("", "configmaps", &["create"]),
        named(rule("", "configmaps", &["get", "update"]), SIGNER.2),
    ];
    let mut objects = vec![account(settings, "identity")];
    objects.extend(cluster_role(settings, "identity", &everywhere));
    objects.extend(role(settings, "identity", &here));
    objects.extend([
        service(settings, SIGNER.0, "identity", &[("https", 443, "https")]),
        deployment(settings, "identity", 2, &pod),
        disruption(settings, "identity"),
    ]);
    if settings.network_policies {
        objects.push(network_policy(settings, "identity", "https"));
    }
    objects
}

/// Tells the pods of a node who they are. Its tokens are mounted into this container only.
fn agent(settings: &Settings) -> Value {
    let env = json!([
        { "name": "NSM_LOG_LEVEL", "value": settings.log_level },
        { "name": "NSM_NAMESPACE", "valueFrom": field("metadata.namespace") },
        { "name": "POD_UID", "valueFrom": field("metadata.uid") },
        { "name": "NSM_IDENTITY_SIGNER", "value": format!("{}.{}.svc:443", SIGNER.0, settings.namespace) },
        { "name": "NSM_IDENTITY_SOCKET", "value": format!("{IDENTITY}/{}", settings.identity_socket.1) },
        { "name": "NSM_INTROSPECT_DIR", "value": "" },
    ]);
    json!({
        "name": "identity",
        "image": settings.image("nsm"),
        "imagePullPolicy": settings.pull_policy,
        "args": ["identity", "agent"],
        "env": env,
        // Makes a socket in a directory of root's, and reads what everybody may.
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"] },
            "readOnlyRootFilesystem": true,
            "runAsUser": 0,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "resources": resources("10m", "16Mi", "128Mi"),
        "volumeMounts": [
            mount("identity", IDENTITY, false),
            mount("identity-token", TOKEN, true),
            mount("api", API, true),
        ],
    })
}

/// Bound to the pod, and by it to the node.
fn token(audience: Option<&str>) -> Value {
    let mut token = json!({ "path": "token", "expirationSeconds": 3600 });
    if let Some(audience) = audience {
        token["audience"] = json!(audience);
    }
    json!({ "serviceAccountToken": token })
}

fn agent_volume() -> Value {
    json!({ "name": "identity-token", "projected": { "sources": [token(Some("nsm-identity"))] } })
}

/// The way to the API server, for the containers that mount it.
fn api_volume() -> Value {
    let trust = json!({ "configMap": { "name": "kube-root-ca.crt", "items": [{ "key": "ca.crt", "path": "ca.crt" }] } });
    let namespace = json!({ "downwardAPI": { "items": [{ "path": "namespace", "fieldRef": { "fieldPath": "metadata.namespace" } }] } });
    json!({ "name": "api", "projected": { "sources": [token(None), trust, namespace] } })
}

/// The directory.
fn registry(settings: &Settings) -> Vec<Value> {
    let (store, replicas) = match settings.store {
        Store::Memory => ("memory", 1),
        Store::Kubernetes => ("kubernetes", 2),
    };
    let mut env = identity_env(settings);
    env.extend([
        json!({ "name": "NSM_NAME", "valueFrom": field("metadata.name") }),
        json!({ "name": "NSM_NAMESPACE", "valueFrom": field("metadata.namespace") }),
        json!({ "name": "NSM_LISTEN_ON", "value": "tcp://:5002" }),
        json!({ "name": "NSM_STORE", "value": store }),
        json!({ "name": "NSM_CLUSTER_PREFIXES", "value": (settings.store == Store::Kubernetes).to_string() }),
        json!({ "name": "NSM_FOLLOW_NODES", "value": (settings.store == Store::Kubernetes).to_string() }),
    ]);
    let container = json!({
        "name": "registry",
        "image": settings.image("nsm"),
        "imagePullPolicy": settings.pull_policy,
        "args": ["registry"],
        "env": env,
        "ports": [{ "name": "registry", "containerPort": 5002 }],
        "securityContext": harmless(),
        "startupProbe": probe("tcp://127.0.0.1:5002", 1, 60),
        "readinessProbe": probe("tcp://127.0.0.1:5002", 5, 3),
        "livenessProbe": probe("tcp://127.0.0.1:5002", 20, 3),
        "resources": resources("10m", "24Mi", "256Mi"),
        "volumeMounts": [mount("identity", IDENTITY, true), mount("run", RUN, false)],
    });
    let needs_api = settings.store == Store::Kubernetes;
    let mut pod = pod(
        settings,
        "registry",
        &container,
        vec![identity_volume(settings), json!({ "name": "run", "emptyDir": {} })],
    );
    pod["automountServiceAccountToken"] = json!(needs_api);
    let mut objects = vec![account(settings, "registry")];
    if needs_api {
        let registered = json!({
            "apiGroups": ["networkservicemesh.io"],
            "resources": ["networkservices", "networkserviceendpoints"],
            "verbs": ["get", "list", "watch", "create", "update", "delete"],
        });
        // What of a resource is not understood is said on it.
        let say = json!({
            "apiGroups": ["networkservicemesh.io"],
            "resources": ["networkservices/status", "networkserviceendpoints/status"],
            "verbs": ["patch"],
        });
        let configs = |verbs: &[&str], names: &[&str]| {
            let mut rule = rule("", "configmaps", verbs);
            rule["resourceNames"] = json!(names);
            rule
        };
        // What the cluster itself uses, and which nodes are gone.
        let prefixes = [
            rule("", "nodes", &["get", "list", "watch"]),
            rule("", "services", &["list"]),
            rule("networking.k8s.io", "servicecidrs", &["list"]),
            rule("crd.projectcalico.org", "ippools", &["list"]),
            configs(&["get"], &["kubeadm-config", "cilium-config"]),
        ];
        objects.extend(cluster_role(settings, "registry", &[&[registered, say][..], &prefixes].concat()));
        let here = [
            rule("", "configmaps", &["create"]),
            configs(&["get", "update"], &[FOUND.0]),
            configs(&["get"], &[ADDED.0]),
        ];
        objects.extend(role(settings, "registry", &here));
    }
    objects.extend([
        service(settings, REGISTRY, "registry", &[("registry", 5002, "registry")]),
        deployment(settings, "registry", replicas, &pod),
        disruption(settings, "registry"),
    ]);
    if settings.network_policies {
        objects.push(network_policy(settings, "registry", "registry"));
    }
    objects
}

/// Manager and forwarder of each node.
fn node(settings: &Settings) -> Vec<Value> {
    let socket = format!("unix://{SOCKETS}/nsm.io.sock");
    let mut env = identity_env(settings);
    env.extend([
        json!({ "name": "NODE_NAME", "valueFrom": field("spec.nodeName") }),
        json!({ "name": "NODE_IP", "valueFrom": field("status.hostIP") }),
        // The same for the next pod on this node: it goes on with the wires.
        json!({ "name": "NSM_NAME", "value": "nsm-node-$(NODE_NAME)" }),
        json!({ "name": "NSM_LISTEN_ON", "value": format!("{socket},tcp://$(NODE_IP):5001") }),
        json!({ "name": "NSM_TUNNEL_IP", "value": if settings.underlay.is_empty() { "$(NODE_IP)" } else { &settings.underlay } }),
        json!({ "name": "NSM_REGISTRY_URL", "value": format!("tcp://{REGISTRY}.{}.svc:5002", settings.namespace) }),
        json!({ "name": "NSM_STATE_DIR", "value": format!("{RUN}/forwarder") }),
        json!({ "name": "NSM_TELL_PODS", "value": "true" }),
        json!({ "name": "NSM_EXCLUDED_PREFIXES_FILE", "value": format!("{PREFIXES}/{}", FOUND.1) }),
    ]);
    let container = json!({
        "name": "node",
        "image": settings.image("nsm"),
        "imagePullPolicy": settings.pull_policy,
        "args": ["node"],
        "env": env,
        "ports": [{ "name": "manager", "containerPort": 5001, "hostPort": 5001 }],
        // It enters the network namespaces of other pods.
        "securityContext": { "privileged": true, "runAsUser": 0, "readOnlyRootFilesystem": true },
        "startupProbe": probe(&socket, 1, 120),
        "readinessProbe": probe(&socket, 5, 3),
        "livenessProbe": probe(&socket, 20, 3),
        // Idle it has 8 to 12 MiB, and twice 13 to 19 KiB for each wire: room for some thousands.
        "resources": resources("20m", "32Mi", "256Mi"),
        "volumeMounts": [
            mount("identity", IDENTITY, true),
            mount("sockets", SOCKETS, false),
            mount("run", RUN, false),
            mount("api", API, true),
            mount("prefixes", PREFIXES, true),
        ],
    });
    let mut volumes = vec![
        identity_volume(settings),
        host("sockets", SOCKETS, "DirectoryOrCreate"),
        host("run", RUN, "DirectoryOrCreate"),
        api_volume(),
        // It is there a moment later, or an operator writes it.
        json!({ "name": "prefixes", "configMap": { "name": FOUND.0, "optional": true } }),
    ];
    let mut objects = vec![account(settings, "node")];
    objects.extend(cluster_role(
        settings,
        "node",
        &[
            rule("networkservicemesh.io", "wires", &["get", "list", "watch", "create", "delete"]),
            rule("networkservicemesh.io", "wires/status", &["patch"]),
            rule("", "events", &["create", "patch"]),
            rule("", "pods/status", &["patch"]),
        ],
    ));
    objects.extend(own_node_only(settings));
    let builtin = settings.identity == Identity::Builtin;
    if builtin {
        volumes.push(agent_volume());
        objects.extend(role(settings, "node", &[named(rule("", "configmaps", &["get"]), SIGNER.2)]));
    }
    let mut pod = pod(settings, "node", &container, volumes);
    if builtin {
        pod["containers"] = json!([container, agent(settings)]);
    }
    // Tunnels end at the node's address; workloads are told apart by their processes.
    pod["hostNetwork"] = json!(true);
    pod["hostPID"] = json!(true);
    pod["dnsPolicy"] = json!("ClusterFirstWithHostNet");
    pod["tolerations"] = json!([{ "operator": "Exists" }]);
    pod["automountServiceAccountToken"] = json!(false);
    let daemons = json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": metadata(settings, "nsm-node", "node"),
        "spec": {
            "selector": { "matchLabels": labels("node") },
            "template": template("node", &pod),
            // Wires stand while their process is replaced.
            "updateStrategy": { "type": "RollingUpdate", "rollingUpdate": { "maxUnavailable": "25%" } },
        },
    });
    objects.push(daemons);
    objects
}

/// Whoever takes a node speaks for the pods of that node, not for others': RBAC cannot say so.
fn own_node_only(settings: &Settings) -> Vec<Value> {
    let same = |field: &str| {
        format!(
            "has(object.{field}) == has(oldObject.{field}) && (!has(object.{field}) || object.{field} == oldObject.{field})"
        )
    };
    let others = |of: &str| {
        format!(
            "(has({of}.status.conditions) ? {of}.status.conditions : []).filter(c, c.type != '{CONDITION}')"
        )
    };
    let of_pods = [
        ("object.spec.nodeName == variables.node".to_owned(), "of the pods of its own node"),
        (format!("{} == {}", others("object"), others("oldObject")), "by the condition of its own"),
    ];
    // What the API server lets whoever may write a status change besides it.
    let kept = ["metadata.labels", "metadata.annotations", "metadata.finalizers"].into_iter().chain([
        "status.phase",
        "status.podIPs",
        "status.hostIPs",
        "status.containerStatuses",
        "status.initContainerStatuses",
        "status.ephemeralContainerStatuses",
    ]);
    let of_pods: Vec<_> =
        of_pods.into_iter().chain(kept.map(|field| (same(field), "by the condition of its own"))).collect();
    let of_wires = vec![(
        "(object == null || object.spec.node == variables.node) && (oldObject == null || oldObject.spec.node == variables.node)"
            .to_owned(),
        "of the wires of its own node's pods",
    )];
    let from =
        |of: &str| format!("has({of}.source) && has({of}.source.host) && {of}.source.host == variables.node");
    let of_events = vec![(
        format!(
            "object.involvedObject.kind == 'Pod' && {} && (oldObject == null || {})",
            from("object"),
            from("oldObject")
        ),
        "as itself, of pods",
    )];
    [
        ("wires", "networkservicemesh.io", json!(["wires", "wires/status"]), of_wires),
        ("events", "", json!(["events"]), of_events),
        ("pods", "", json!(["pods/status"]), of_pods),
    ]
    .into_iter()
    .flat_map(|(what, group, resources, rules)| policy(settings, what, group, &resources, &rules))
    .collect()
}

/// What the account of the nodes' pods may only write so.
fn policy(
    settings: &Settings,
    what: &str,
    group: &str,
    resources: &Value,
    rules: &[(String, &str)],
) -> [Value; 2] {
    let metadata = json!({ "name": format!("{}-node-{what}", settings.namespace), "labels": labels("node") });
    // Short, so that no line is folded within an expression of the chart.
    let here = format!("'system:serviceaccounts:{}' in request.userInfo.groups", settings.namespace);
    let extra = "authentication.kubernetes.io/node-name";
    let node = format!(
        "has(request.userInfo.extra) && '{extra}' in request.userInfo.extra ? request.userInfo.extra['{extra}'][0] : ''"
    );
    let mut validations = vec![json!({
        "expression": "variables.node != ''",
        "message": "the token of nsm-node is not bound to a node, so it is not known of which pods it may speak",
        "reason": "Forbidden",
    })];
    validations.extend(rules.iter().map(|(expression, of)| {
        json!({ "expression": expression, "message": format!("nsm-node writes {what} {of} only"), "reason": "Forbidden" })
    }));
    let version = "admissionregistration.k8s.io/v1";
    [
        json!({
            "apiVersion": version, "kind": "ValidatingAdmissionPolicy", "metadata": metadata,
            "spec": {
                "failurePolicy": "Fail",
                "matchConstraints": { "resourceRules": [{
                    "apiGroups": [group], "apiVersions": ["v1"], "resources": resources,
                    "operations": ["CREATE", "UPDATE", "DELETE"],
                }] },
                "matchConditions": [
                    { "name": "by-us", "expression": here },
                    { "name": "by-nodes", "expression": "request.userInfo.username.endsWith(':nsm-node')" },
                ],
                "variables": [{ "name": "node", "expression": node }],
                "validations": validations,
            },
        }),
        json!({
            "apiVersion": version, "kind": "ValidatingAdmissionPolicyBinding", "metadata": metadata,
            "spec": { "policyName": metadata["name"], "validationActions": ["Deny"] },
        }),
    ]
}

/// What annotated pods are looked at by.
fn webhook(settings: &Settings) -> Vec<Value> {
    let value = |name: &str, value: &str| json!({ "name": name, "value": value });
    let env = json!([
        value("NSM_LOG_LEVEL", &settings.log_level),
        value("NSM_NAME", WEBHOOK.1),
        value("NSM_WEBHOOK_MODE", "selfregister"),
        value("NSM_SERVICE_NAME", WEBHOOK.0),
        { "name": "NSM_NAMESPACE", "valueFrom": field("metadata.namespace") },
        value("NSM_LISTEN_ON", ":8443"),
        value("NSM_INTROSPECT_DIR", ""),
        value("NSM_LABELS", "spiffe.io/spiffe-id:true"),
        value("NSM_IDENTITY_SOCKET", &format!("{}/{}", settings.identity_socket.0, settings.identity_socket.1)),
        value("NSM_INIT_CONTAINER_IMAGES", &settings.image("cmd-nsc-init")),
        value("NSM_CONTAINER_IMAGES", &settings.image("cmd-nsc")),
        value("NSM_SIDECAR_REQUESTS_CPU", "10m"),
        value("NSM_SIDECAR_REQUESTS_MEMORY", "16Mi"),
        value("NSM_SIDECAR_LIMITS_MEMORY", "64Mi"),
    ]);
    let container = json!({
        "name": "webhook",
        "image": settings.image("nsm"),
        "imagePullPolicy": settings.pull_policy,
        "args": ["webhook"],
        "env": env,
        "ports": [{ "name": "https", "containerPort": 8443 }],
        "securityContext": harmless(),
        "readinessProbe": https_probe(),
        "livenessProbe": { "tcpSocket": { "port": "https" }, "periodSeconds": 20 },
        // API servers learn a moment late that it is gone.
        "lifecycle": { "preStop": { "sleep": { "seconds": 3 } } },
        "resources": resources("10m", "16Mi", "128Mi"),
    });
    let mut pod = pod(settings, "webhook", &container, vec![]);
    pod["automountServiceAccountToken"] = json!(true);
    let (group, kind) = ("admissionregistration.k8s.io", "mutatingwebhookconfigurations");
    let everywhere = [
        rule("", "namespaces", &["get", "list"]),
        rule("", "pods", &["list"]),
        rule("", "events", &["create"]),
        rule(group, kind, &["create"]),
        named(rule(group, kind, &["get", "update"]), WEBHOOK.1),
    ];
    let here = [
        rule("", "secrets", &["create"]),
        named(rule("", "secrets", &["get", "update"]), "nsm-webhook-authorities"),
    ];
    let mut objects = vec![account(settings, "webhook")];
    objects.extend(cluster_role(settings, "webhook", &everywhere));
    objects.extend(role(settings, "webhook", &here));
    objects.extend([
        service(settings, WEBHOOK.0, "webhook", &[("https", 443, "https")]),
        deployment(settings, "webhook", 2, &pod),
        disruption(settings, "webhook"),
    ]);
    if settings.network_policies {
        objects.push(network_policy(settings, "webhook", "https"));
    }
    // The webhook fills in whom to trust. Until then annotated pods are refused, and not made without their wires.
    let configuration = Configuration {
        name: WEBHOOK.1.into(),
        annotation: Annotation::default(),
        reach: Reach::Service { name: WEBHOOK.0.into(), namespace: settings.namespace.clone() },
        bundle: String::new(),
        spared: BTreeSet::from(["kube-system".to_owned(), settings.namespace.clone()]),
        annotated: BTreeSet::new(),
        owner: None,
    };
    objects.push(configuration.object());
    objects
}

fn rule(group: &str, resource: &str, verbs: &[&str]) -> Value {
    json!({ "apiGroups": [group], "resources": [resource], "verbs": verbs })
}

/// For the one object of this name only.
fn named(mut rule: Value, name: &str) -> Value {
    rule["resourceNames"] = json!([name]);
    rule
}

fn https_probe() -> Value {
    json!({ "httpGet": { "path": "/ready", "port": "https", "scheme": "HTTPS" }, "periodSeconds": 2 })
}

/// Where identities come from, on the node. Where that is not ours, pods wait until it is there.
fn identity_volume(settings: &Settings) -> Value {
    let kind = if settings.identity == Identity::Builtin { "DirectoryOrCreate" } else { "Directory" };
    host("identity", &settings.identity_socket.0, kind)
}

/// Labels by which the pods of a part are found.
fn labels(part: &str) -> Value {
    json!({ "app.kubernetes.io/name": "nsm", "app.kubernetes.io/component": part })
}

fn metadata(settings: &Settings, name: &str, part: &str) -> Value {
    json!({ "name": name, "namespace": settings.namespace, "labels": labels(part) })
}

fn field(path: &str) -> Value {
    json!({ "fieldRef": { "fieldPath": path } })
}

fn mount(name: &str, path: &str, read_only: bool) -> Value {
    json!({ "name": name, "mountPath": path, "readOnly": read_only })
}

fn host(name: &str, path: &str, kind: &str) -> Value {
    json!({ "name": name, "hostPath": { "path": path, "type": kind } })
}

fn identity_env(settings: &Settings) -> Vec<Value> {
    vec![
        json!({ "name": "NSM_LOG_LEVEL", "value": settings.log_level }),
        json!({ "name": "SPIFFE_ENDPOINT_SOCKET", "value": format!("unix://{IDENTITY}/{}", settings.identity_socket.1) }),
        json!({ "name": "POD_NAME", "valueFrom": field("metadata.name") }),
    ]
}

/// No limit of the processor: what is throttled makes others wait.
fn resources(cpu: &str, memory: &str, most: &str) -> Value {
    json!({ "requests": { "cpu": cpu, "memory": memory }, "limits": { "memory": most } })
}

/// For what only talks.
fn harmless() -> Value {
    json!({
        "allowPrivilegeEscalation": false,
        "capabilities": { "drop": ["ALL"] },
        "readOnlyRootFilesystem": true,
        "runAsNonRoot": true,
        "runAsUser": 65532,
        "seccompProfile": { "type": "RuntimeDefault" },
    })
}

fn probe(url: &str, period: u32, failures: u32) -> Value {
    json!({
        "exec": { "command": ["/bin/nsm", "probe", "--addr", url] },
        "periodSeconds": period,
        "timeoutSeconds": 3,
        "failureThreshold": failures,
    })
}

fn pod(settings: &Settings, part: &str, container: &Value, volumes: Vec<Value>) -> Value {
    json!({
        "serviceAccountName": format!("nsm-{part}"),
        "priorityClassName": priority_name(settings),
        "nodeSelector": { "kubernetes.io/os": "linux" },
        "terminationGracePeriodSeconds": 10,
        "containers": [container],
        "volumes": volumes,
    })
}

/// Every pod of the mesh has an identity.
fn template(part: &str, pod: &Value) -> Value {
    let mut labels = labels(part);
    labels["spiffe.io/spiffe-id"] = json!("true");
    json!({ "metadata": { "labels": labels }, "spec": pod })
}

fn account(settings: &Settings, part: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(settings, &format!("nsm-{part}"), part),
    })
}

fn binding(settings: &Settings, kind: &str, name: &str, part: &str) -> (Value, Value) {
    let reference = json!({ "apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name });
    let subject =
        json!({ "kind": "ServiceAccount", "name": format!("nsm-{part}"), "namespace": settings.namespace });
    (reference, json!([subject]))
}

fn cluster_role(settings: &Settings, part: &str, rules: &[Value]) -> [Value; 2] {
    let name = format!("{}-{part}", settings.namespace);
    let metadata = json!({ "name": name, "labels": labels(part) });
    let (reference, subjects) = binding(settings, "ClusterRole", &name, part);
    let version = "rbac.authorization.k8s.io/v1";
    [
        json!({ "apiVersion": version, "kind": "ClusterRole", "metadata": metadata, "rules": rules }),
        json!({
            "apiVersion": version, "kind": "ClusterRoleBinding", "metadata": metadata,
            "roleRef": reference, "subjects": subjects,
        }),
    ]
}

fn role(settings: &Settings, part: &str, rules: &[Value]) -> [Value; 2] {
    let name = format!("nsm-{part}");
    let metadata = metadata(settings, &name, part);
    let (reference, subjects) = binding(settings, "Role", &name, part);
    let version = "rbac.authorization.k8s.io/v1";
    [
        json!({ "apiVersion": version, "kind": "Role", "metadata": metadata, "rules": rules }),
        json!({
            "apiVersion": version, "kind": "RoleBinding", "metadata": metadata,
            "roleRef": reference, "subjects": subjects,
        }),
    ]
}

fn service(settings: &Settings, name: &str, part: &str, ports: &[(&str, u16, &str)]) -> Value {
    let ports =
        ports.iter().map(|(name, port, target)| json!({ "name": name, "port": port, "targetPort": target }));
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(settings, name, part),
        "spec": { "selector": labels(part), "ports": ports.collect::<Vec<_>>() },
    })
}

fn deployment(settings: &Settings, part: &str, replicas: u32, pod: &Value) -> Value {
    let mut pod = pod.clone();
    // One of two survives its node.
    pod["topologySpreadConstraints"] = json!([{
        "labelSelector": { "matchLabels": labels(part) },
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
    }]);
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(settings, &format!("nsm-{part}"), part),
        "spec": {
            "replicas": replicas,
            "selector": { "matchLabels": labels(part) },
            "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 } },
            "template": template(part, &pod),
        },
    })
}

/// One at a time, also where there is only one: a drain is not held up.
fn disruption(settings: &Settings, part: &str) -> Value {
    json!({
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(settings, &format!("nsm-{part}"), part),
        "spec": { "maxUnavailable": 1, "selector": { "matchLabels": labels(part) } },
    })
}

/// Only the port that is meant to be open is. Who asks comes from nodes, whose addresses nobody knows here.
fn network_policy(settings: &Settings, part: &str, port: &str) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(settings, &format!("nsm-{part}"), part),
        "spec": {
            "podSelector": { "matchLabels": labels(part) },
            "policyTypes": ["Ingress"],
            "ingress": [{ "ports": [{ "port": port }] }],
        },
    })
}
