//! What is decided about every kind of object, what patches look like, and that they do what they should to any object.
#![allow(clippy::unwrap_used, reason = "a test")]

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nsm_webhook::{
    annotation::MAX_WARNING,
    inject::{Namespace, Plan, Security, Verdict, Why, subject},
    review::{BadReview, answer, decode, review},
    settings::Settings,
};
use proptest::prelude::*;
use serde_json::{Value, json};

const UNIQUE: &str = "6f1c";

/// As upstream's reference deployment is set.
fn upstreams() -> Settings {
    Settings {
        labels: [("spiffe.io/spiffe-id".to_owned(), "true".to_owned())].into(),
        init_images: vec!["ghcr.io/networkservicemesh/ci/cmd-nsc-init:abc".parse().unwrap()],
        images: vec!["ghcr.io/networkservicemesh/ci/cmd-nsc:def".parse().unwrap()],
        envs: vec!["NSM_LOG_LEVEL=TRACE".parse().unwrap()],
        ..Settings::default()
    }
}

/// A question about an object that is created.
fn asked(group: &str, kind: &str, object: &Value) -> Value {
    json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
            "kind": { "group": group, "version": "v1", "kind": kind },
            "operation": "CREATE",
            "namespace": "default",
            "object": object,
        },
    })
}

fn plan_in(settings: &Settings, namespace: &Namespace, group: &str, kind: &str, object: &Value) -> Plan {
    let request = decode(asked(group, kind, object).to_string().as_bytes()).unwrap();
    match subject(settings, &request) {
        Ok(subject) => subject.plan(settings, namespace, UNIQUE),
        Err(why) => Plan::unchanged(why),
    }
}

fn plan_of(group: &str, kind: &str, object: &Value) -> Plan {
    plan_in(&upstreams(), &Namespace::default(), group, kind, object)
}

fn pod(value: &str) -> Value {
    json!({
        "metadata": { "name": "web", "annotations": { "networkservicemesh.io": value } },
        "spec": { "containers": [{ "name": "web", "image": "web" }] },
    })
}

/// The patch, as the API server reads it from the answer.
fn patch(settings: &Settings, namespace: &Namespace, group: &str, kind: &str, object: &Value) -> Value {
    let body = asked(group, kind, object).to_string();
    let answer = review(settings, body.as_bytes(), namespace, UNIQUE).unwrap();
    assert_eq!(answer["response"]["allowed"], true, "{answer}");
    let patch = answer["response"]["patch"].as_str().unwrap_or_else(|| panic!("no patch: {answer}"));
    assert_eq!(answer["response"]["patchType"], "JSONPatch");
    serde_json::from_slice(&BASE64_STANDARD.decode(patch).unwrap()).unwrap()
}

fn patched(settings: &Settings, namespace: &Namespace, group: &str, kind: &str, object: &Value) -> Value {
    let mut object = object.clone();
    let patch: json_patch::Patch =
        serde_json::from_value(patch(settings, namespace, group, kind, &object)).unwrap();
    json_patch::patch(&mut object, &patch).unwrap_or_else(|e| panic!("{e}: {object}"));
    object
}

fn container(name: &str, image: &str, value: &str, nsm_name: &str) -> Value {
    json!({
        "name": name,
        "image": image,
        "env": [
            { "name": "NSM_LOG_LEVEL", "value": "TRACE" },
            { "name": "SPIFFE_ENDPOINT_SOCKET", "value": "unix:///run/spire/sockets/agent.sock" },
            { "name": "POD_NAME", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } },
            { "name": "NSM_NETWORK_SERVICES", "value": value },
            { "name": "NSM_NAME", "value": nsm_name },
        ],
        "resources": {
            "limits": { "cpu": "200m", "memory": "80Mi" },
            "requests": { "cpu": "100m", "memory": "40Mi" },
        },
        "volumeMounts": [
            { "name": "spire-agent-socket", "mountPath": "/run/spire/sockets", "readOnly": true },
            { "name": "nsm-socket", "mountPath": "/var/lib/networkservicemesh", "readOnly": true },
        ],
        "imagePullPolicy": "IfNotPresent",
    })
}

fn init(value: &str, name: &str) -> Value {
    container("cmd-nsc-init", "ghcr.io/networkservicemesh/ci/cmd-nsc-init:abc", value, name)
}

fn side(value: &str, name: &str) -> Value {
    container("cmd-nsc", "ghcr.io/networkservicemesh/ci/cmd-nsc:def", value, name)
}

fn host_volumes() -> Value {
    json!([
        { "name": "spire-agent-socket", "hostPath": { "path": "/run/spire/sockets", "type": "Directory" } },
        { "name": "nsm-socket", "hostPath": { "path": "/var/lib/networkservicemesh", "type": "Directory" } },
    ])
}

#[test]
fn a_pod_gets_what_upstreams_webhook_gives_it() {
    let value = "kernel://finance@my.cluster2/nsm-1?app=web&app=db,memif://b";
    let own = json!({ "name": "own", "emptyDir": {} });
    let object = json!({
        "metadata": {
            "name": "web",
            "labels": { "app": "web", "spiffe.io/spiffe-id": "false" },
            "annotations": { "networkservicemesh.io": value },
        },
        "spec": {
            "initContainers": [{ "name": "first", "image": "first" }],
            "containers": [{ "name": "web", "image": "web", "aFieldOfTomorrow": 1 }],
            "volumes": [own],
        },
    });
    let name = "$(POD_NAME)-6f1c";
    let volumes = [&[own], host_volumes().as_array().unwrap().as_slice()].concat();
    assert_eq!(
        patch(&upstreams(), &Namespace::default(), "", "Pod", &object),
        json!([
            {
                "op": "add",
                "path": "/spec/initContainers",
                "value": [{ "name": "first", "image": "first" }, init(value, name)],
            },
            {
                "op": "add",
                "path": "/spec/containers",
                "value": [{ "name": "web", "image": "web", "aFieldOfTomorrow": 1 }, side(value, name)],
            },
            { "op": "add", "path": "/spec/volumes", "value": volumes },
            {
                "op": "add",
                "path": "/metadata/labels",
                "value": { "app": "web", "spiffe.io/spiffe-id": "true" },
            },
        ])
    );
}

#[test]
fn a_workload_is_patched_in_its_template_and_its_pods_are_left_alone_then() {
    let value = "kernel://finance/nsm-1";
    for kind in ["Deployment", "StatefulSet", "DaemonSet", "ReplicaSet"] {
        let object = json!({
            "metadata": { "name": "web", "annotations": { "networkservicemesh.io": value } },
            "spec": {
                "template": {
                    "metadata": { "labels": { "app": "web" } },
                    "spec": { "containers": [{ "name": "web", "image": "web" }] },
                },
            },
        });
        let name = "$(POD_NAME)-6f1c";
        assert_eq!(
            patch(&upstreams(), &Namespace::default(), "apps", kind, &object),
            json!([
                { "op": "add", "path": "/spec/template/spec/initContainers", "value": [init(value, name)] },
                {
                    "op": "add",
                    "path": "/spec/template/spec/containers",
                    "value": [{ "name": "web", "image": "web" }, side(value, name)],
                },
                { "op": "add", "path": "/spec/template/spec/volumes", "value": host_volumes() },
                {
                    "op": "add",
                    "path": "/spec/template/metadata/labels",
                    "value": { "app": "web", "spiffe.io/spiffe-id": "true" },
                },
            ]),
            "{kind}"
        );
        // The pods that come of it, in a namespace that is annotated too (section 10, row 4).
        let template =
            patched(&upstreams(), &Namespace::default(), "apps", kind, &object)["spec"]["template"].clone();
        let annotated = Namespace { annotation: Some(value.into()), ..Namespace::default() };
        let plan = plan_in(&upstreams(), &annotated, "", "Pod", &template);
        assert_eq!(plan, Plan::unchanged(Why::Done));
    }
}

#[test]
fn a_template_with_annotations_of_its_own_passes_ours_on_to_its_pods() {
    let object = |annotations: Value| {
        json!({
            "metadata": { "annotations": { "networkservicemesh.io": "kernel://a/x" } },
            "spec": {
                "template": {
                    "metadata": { "annotations": annotations },
                    "spec": { "containers": [{ "name": "web", "image": "web" }] },
                },
            },
        })
    };
    let foreign = object(json!({ "prometheus.io/scrape": "true" }));
    assert_eq!(
        patch(&upstreams(), &Namespace::default(), "apps", "Deployment", &foreign),
        json!([{
            "op": "add",
            "path": "/spec/template/metadata/annotations",
            "value": { "prometheus.io/scrape": "true", "networkservicemesh.io": "kernel://a/x" },
        }])
    );
    let both = object(json!({ "networkservicemesh.io": "kernel://b/x" }));
    let plan = plan_of("apps", "Deployment", &both);
    assert_eq!(plan.verdict, Verdict::Unchanged(Why::InTemplate));
    assert_eq!(
        plan.warnings,
        ["networkservicemesh.io: its template is annotated too, with another value, and that one counts"]
    );
    let same = plan_of("apps", "Deployment", &object(json!({ "networkservicemesh.io": "kernel://a/x" })));
    assert_eq!(same, Plan::unchanged(Why::InTemplate));
}

#[test]
fn whom_it_does_not_concern_is_left_alone() {
    let annotated = pod("kernel://a/x");
    let template =
        json!({ "metadata": {}, "spec": { "template": { "metadata": {}, "spec": { "containers": [] } } } });
    let mut of_deployment = template.clone();
    of_deployment["metadata"] = json!({
        "annotations": { "networkservicemesh.io": "kernel://a/x" },
        "ownerReferences": [{ "kind": "Deployment", "name": "web" }],
    });
    let with = |change: fn(&mut Value)| {
        let mut object = pod("kernel://a/x");
        change(&mut object);
        object
    };
    for (group, kind, object, why) in [
        ("batch", "Job", &template, Why::OtherKind),
        ("batch", "CronJob", &template, Why::OtherKind),
        ("", "Namespace", &annotated, Why::OtherKind),
        ("example.com", "Pod", &annotated, Why::OtherKind),
        ("", "Deployment", &template, Why::OtherKind),
        ("apps", "Deployment", &template, Why::NotAnnotated),
        ("apps", "ReplicaSet", &of_deployment, Why::OfDeployment),
        ("", "Pod", &pod(""), Why::NotAnnotated),
        ("", "Pod", &pod("  "), Why::NotAnnotated),
        ("", "Pod", &json!({ "metadata": {}, "spec": {} }), Why::NotAnnotated),
        ("", "Pod", &Value::Null, Why::Undecodable),
        ("", "Pod", &json!({ "metadata": 1, "spec": {} }), Why::Undecodable),
        ("", "Pod", &json!({ "metadata": {}, "spec": [] }), Why::Undecodable),
        ("", "Pod", &json!({ "metadata": { "labels": { "a": 1 } }, "spec": {} }), Why::Undecodable),
        ("", "Pod", &json!({ "metadata": { "annotations": [] }, "spec": {} }), Why::Undecodable),
        ("", "Pod", &with(|pod| pod["spec"]["containers"] = json!({})), Why::Undecodable),
        ("", "Pod", &with(|pod| pod["spec"]["containers"] = json!([1])), Why::Undecodable),
        ("", "Pod", &with(|pod| pod["spec"]["volumes"] = json!([{}])), Why::Undecodable),
        ("", "Pod", &with(|pod| pod["spec"]["readinessGates"] = json!({})), Why::Undecodable),
        ("apps", "Deployment", &annotated, Why::Undecodable),
        (
            "",
            "Pod",
            &with(|pod| pod["metadata"]["annotations"]["networkservicemesh.io/inject"] = json!("false")),
            Why::OptedOut,
        ),
    ] {
        assert_eq!(plan_of(group, kind, object), Plan::unchanged(why), "{kind} {object}");
    }
    for operation in ["UPDATE", "DELETE", "CONNECT", ""] {
        let mut body = asked("", "Pod", &annotated);
        body["request"]["operation"] = json!(operation);
        let request = decode(body.to_string().as_bytes()).unwrap();
        assert_eq!(subject(&upstreams(), &request).unwrap_err(), Why::NotCreated, "{operation}");
        let answer = answer(&request, &Plan::unchanged(Why::NotCreated));
        assert_eq!(
            answer["response"],
            json!({ "uid": "705ab4f5-6393-11e8-b7cc-42010a800002", "allowed": true })
        );
    }
}

#[test]
fn a_namespaces_annotation_is_for_pods_that_have_none() {
    let namespace = |annotation: &str| {
        let object = json!({ "metadata": { "annotations": { "networkservicemesh.io": annotation } } });
        Namespace::of(&upstreams(), &object)
    };
    let services = |namespace: &Namespace, object: &Value| {
        let patched = patched(&upstreams(), namespace, "", "Pod", object);
        patched["spec"]["containers"][1]["env"][3]["value"].clone()
    };
    let plain = json!({ "metadata": { "name": "web" }, "spec": { "containers": [{ "name": "web" }] } });
    assert_eq!(services(&namespace("kernel://n/x"), &plain), "kernel://n/x");
    assert_eq!(services(&namespace("kernel://n/x"), &pod("")), "kernel://n/x", "an empty one is none");
    assert_eq!(services(&namespace("kernel://n/x"), &pod("kernel://p/x")), "kernel://p/x");
    assert_eq!(namespace("").annotation, None);
    let workload = json!({ "metadata": {}, "spec": { "template": { "metadata": {}, "spec": {} } } });
    let plan = plan_in(&upstreams(), &namespace("kernel://n/x"), "apps", "Deployment", &workload);
    assert_eq!(plan, Plan::unchanged(Why::NotAnnotated), "its pods will be asked about");
    let mut out = plain;
    out["metadata"]["annotations"] = json!({ "networkservicemesh.io/inject": "false" });
    let plan = plan_in(&upstreams(), &namespace("kernel://n/x"), "", "Pod", &out);
    assert_eq!(plan, Plan::unchanged(Why::OptedOut));
}

#[test]
fn who_shall_not_be_ready_without_its_wires_is_given_the_gate() {
    let gate = json!({ "conditionType": "networkservicemesh.io/wires" });
    let gated = |mut object: Value| {
        object["metadata"]["annotations"]["networkservicemesh.io/readiness-gate"] = json!("true");
        object
    };
    let made = |kind: &str, object: &Value| {
        patched(&upstreams(), &Namespace::default(), if kind == "Pod" { "" } else { "apps" }, kind, object)
    };
    let plain = pod("kernel://a/x");
    assert!(made("Pod", &plain)["spec"]["readinessGates"].is_null());
    assert_eq!(made("Pod", &gated(plain.clone()))["spec"]["readinessGates"], json!([gate]));
    // Beside others', and once.
    let other = json!({ "conditionType": "example.com/lb" });
    let mut with_other = gated(plain.clone());
    with_other["spec"]["readinessGates"] = json!([other]);
    assert_eq!(made("Pod", &with_other)["spec"]["readinessGates"], json!([other, gate]));
    with_other["spec"]["readinessGates"] = json!([gate, other]);
    assert_eq!(made("Pod", &with_other)["spec"]["readinessGates"], json!([gate, other]));
    // A workload's, in its template, or handed on to its pods.
    let mut workload = gated(json!({
        "metadata": { "name": "web", "annotations": { "networkservicemesh.io": "kernel://a/x" } },
        "spec": { "template": { "metadata": {}, "spec": { "containers": [{ "name": "web" }] } } },
    }));
    let template = made("Deployment", &workload)["spec"]["template"].clone();
    assert_eq!(template["spec"]["readinessGates"], json!([gate]));
    workload["spec"]["template"]["metadata"] = json!({ "annotations": { "mine": "x" } });
    let template = made("Deployment", &workload)["spec"]["template"].clone();
    assert_eq!(template["metadata"]["annotations"]["networkservicemesh.io/readiness-gate"], "true");
}

#[test]
fn a_generated_name_needs_nothing_beside_it() {
    let mut object = pod("kernel://a/x");
    object["metadata"]["generateName"] = json!("web-");
    let patched = patched(&upstreams(), &Namespace::default(), "", "Pod", &object);
    assert_eq!(patched["spec"]["containers"][1], side("kernel://a/x", "$(POD_NAME)"));
    assert_eq!(patched["spec"]["initContainers"][0], init("kernel://a/x", "$(POD_NAME)"));
}

#[test]
fn what_a_namespace_demands_of_its_pods_holds_for_what_is_put_into_them() {
    let namespace = |level: &str| {
        let labels = json!({ "pod-security.kubernetes.io/enforce": level });
        Namespace::of(&upstreams(), &json!({ "metadata": { "labels": labels } }))
    };
    assert_eq!(namespace("privileged"), Namespace::default());
    assert_eq!(namespace("unheard-of"), Namespace::default());
    let csi = json!([
        { "name": "spire-agent-socket", "csi": { "driver": "csi.spiffe.io", "readOnly": true } },
        { "name": "nsm-socket", "csi": { "driver": "csi.networkservicemesh.io", "readOnly": true } },
    ]);
    let baseline = namespace("baseline");
    assert_eq!(baseline.security, Security::Baseline);
    let patched_in =
        |namespace: &Namespace, object: &Value| patched(&upstreams(), namespace, "", "Pod", object);
    let pod_in_baseline = patched_in(&baseline, &pod("kernel://a/x"));
    assert_eq!(pod_in_baseline["spec"]["volumes"], csi);
    assert_eq!(pod_in_baseline["spec"]["containers"][1], side("kernel://a/x", "$(POD_NAME)-6f1c"));

    let restricted = namespace("restricted");
    let mut object = pod("kernel://a/x");
    object["spec"]["securityContext"] =
        json!({ "runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": { "type": "RuntimeDefault" } });
    let upstreams_context = json!({ "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } });
    let given = patched_in(&restricted, &object);
    assert_eq!(given["spec"]["volumes"], csi);
    for container in [&given["spec"]["initContainers"][0], &given["spec"]["containers"][1]] {
        assert_eq!(container["securityContext"], upstreams_context);
    }
    // Said by each of the pod's containers instead of the pod: ours have to say it too, or the pod is refused.
    assert_eq!(
        patched_in(&restricted, &pod("kernel://a/x"))["spec"]["containers"][1]["securityContext"],
        json!({
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"] },
            "runAsNonRoot": true,
            "runAsUser": 65532,
            "seccompProfile": { "type": "RuntimeDefault" },
        })
    );
}

#[test]
fn virtual_functions_are_asked_for_beside_the_usual_resources() {
    let value = "kernel://a?sriovToken=worker.domain/10G,kernel://b?sriovToken=worker.domain/10G";
    let patched = patched(&upstreams(), &Namespace::default(), "", "Pod", &pod(value));
    for container in [&patched["spec"]["initContainers"][0], &patched["spec"]["containers"][1]] {
        assert_eq!(
            container["resources"],
            json!({
                "limits": { "cpu": "200m", "memory": "80Mi", "worker.domain/10G": "2" },
                "requests": { "cpu": "100m", "memory": "40Mi" },
            })
        );
    }
}

#[test]
fn native_side_cars_are_init_containers_that_stay() {
    let settings = Settings {
        init_images: vec!["cmd-nsc-init=nsm:dev".parse().unwrap()],
        images: vec!["cmd-nsc=nsm:dev".parse().unwrap()],
        native_sidecars: true,
        ..upstreams()
    };
    let given = patched(&settings, &Namespace::default(), "", "Pod", &pod("kernel://a/x"));
    assert_eq!(given["spec"]["containers"], json!([{ "name": "web", "image": "web" }]));
    let inits = given["spec"]["initContainers"].as_array().unwrap();
    let told: Vec<_> =
        inits.iter().map(|c| (&c["name"], &c["image"], &c["command"], &c["restartPolicy"])).collect();
    assert_eq!(
        told,
        [
            (&json!("cmd-nsc-init"), &json!("nsm:dev"), &json!(["/bin/cmd-nsc-init"]), &Value::Null),
            (&json!("cmd-nsc"), &json!("nsm:dev"), &json!(["/bin/cmd-nsc"]), &json!("Always")),
        ]
    );
    let mut job = pod("kernel://a/x");
    job["spec"]["restartPolicy"] = json!("Never");
    assert_eq!(plan_in(&settings, &Namespace::default(), "", "Pod", &job).warnings, [""; 0]);
    assert_eq!(
        plan_of("", "Pod", &job).warnings,
        [
            "networkservicemesh.io: the pod does not end with its containers: the side-car runs on (Kubernetes 1.29 has native side-cars)"
        ]
    );
}

#[test]
fn names_that_are_taken_are_left_to_who_has_them() {
    let mut object = pod("kernel://a/x");
    object["spec"]["volumes"] = json!([
        { "name": "nsm-socket", "emptyDir": {} },
        { "name": "spire-agent-socket", "hostPath": { "path": "/run/spire/sockets", "type": "Directory" } },
    ]);
    let given = patched(&upstreams(), &Namespace::default(), "", "Pod", &object);
    let names: Vec<_> =
        given["spec"]["volumes"].as_array().unwrap().iter().map(|volume| &volume["name"]).collect();
    assert_eq!(names, ["nsm-socket", "spire-agent-socket", "nsm-socket-1"]);
    assert_eq!(
        given["spec"]["containers"][1]["volumeMounts"],
        json!([
            { "name": "spire-agent-socket", "mountPath": "/run/spire/sockets", "readOnly": true },
            { "name": "nsm-socket-1", "mountPath": "/var/lib/networkservicemesh", "readOnly": true },
        ])
    );
    let mut bare = pod("kernel://a/x");
    bare["spec"]["containers"][0]["name"] = json!("cmd-nsc");
    let plan = plan_of("", "Pod", &bare);
    assert_eq!(plan.verdict, Verdict::Unchanged(Why::Done));
    assert_eq!(
        plan.warnings,
        [
            "networkservicemesh.io: it has a container named \"cmd-nsc\" already, so nothing is put into it: name it otherwise to get wires"
        ]
    );
}

#[test]
fn what_is_malformed_is_told_and_marked_and_refused_only_where_that_is_wanted() {
    for (value, says) in [
        ("kernel://a/x, b", "network service \" b\" (item 2 of 2): it has no MECHANISM://"),
        ("kernel://a b/x", "at character 11: invalid character ' '"),
        ("kernel://a/%zz", "invalid escape \"%zz\""),
        ("kernel://a:x/y", "invalid port \":x\""),
        ("service/if", "it has no MECHANISM://"),
        ("kernel://a/x,", "it is empty (a trailing or doubled comma?)"),
        ("pigeon://a/x", "\"pigeon\", which no client here has"),
        ("kernel://a/x,kernel://b/x", "item 1 wants the interface \"x\" too"),
    ] {
        let plan = plan_of("", "Pod", &pod(value));
        assert!(plan.warnings[0].starts_with("networkservicemesh.io: "), "{plan:?}");
        assert!(plan.warnings[0].contains(says), "{value}: {:?}", plan.warnings);
        let given = patched(&upstreams(), &Namespace::default(), "", "Pod", &pod(value));
        assert_eq!(
            given["spec"]["containers"][1]["env"][3]["value"], value,
            "as upstream: the client says it too"
        );
        assert_eq!(given["metadata"]["labels"]["networkservicemesh.io/problem"], "annotation");
    }
    let strict = Settings { reject_malformed: true, ..upstreams() };
    let body = asked("", "Pod", &pod("kernel://a b/x")).to_string();
    let answer = review(&strict, body.as_bytes(), &Namespace::default(), UNIQUE).unwrap();
    assert_eq!(answer["response"]["allowed"], false);
    assert_eq!(answer["response"]["status"]["code"], 422);
    let message = answer["response"]["status"]["message"].as_str().unwrap();
    assert!(
        message.starts_with(
            "annotation networkservicemesh.io: network service \"kernel://a b/x\" at character 11"
        ),
        "{message}"
    );
    let doubtful = plan_in(&strict, &Namespace::default(), "", "Pod", &pod("pigeon://a/x"));
    assert!(matches!(doubtful.verdict, Verdict::Patched(_)), "what is only doubtful is not refused");
    // In a template, whoever applies the workload is told; its pods are told of by events.
    let workload = json!({
        "metadata": {},
        "spec": { "template": {
            "metadata": { "annotations": { "networkservicemesh.io": "kernel://a b" } },
            "spec": { "containers": [] },
        } },
    });
    let plan = plan_of("apps", "DaemonSet", &workload);
    assert_eq!((plan.verdict, plan.warnings.len()), (Verdict::Unchanged(Why::InTemplate), 1));
}

#[test]
fn what_can_hardly_be_meant_is_told() {
    let mut object = pod("kernel://a/x");
    object["spec"]["hostNetwork"] = json!(true);
    assert_eq!(
        plan_of("", "Pod", &object).warnings,
        ["networkservicemesh.io: the pod has the network of its node (hostNetwork), and so would its wires"]
    );
    let mut mirror = pod("kernel://a/x");
    mirror["metadata"]["annotations"]["kubernetes.io/config.mirror"] = json!("0");
    let plan = plan_of("", "Pod", &mirror);
    assert_eq!(plan.verdict, Verdict::Unchanged(Why::Mirror));
    assert_eq!(
        plan.warnings,
        ["networkservicemesh.io: a static pod cannot be given wires: its manifest is on its node"]
    );
    let long = format!("kernel://a/x?{}", "ä;&".repeat(1000));
    for warning in plan_of("", "Pod", &pod(&long)).warnings {
        assert!(warning.chars().count() <= MAX_WARNING);
    }
}

#[test]
fn what_is_no_question_is_an_error() {
    let says = |body: &[u8]| decode(body).unwrap_err().to_string();
    assert!(says(b"").starts_with("the body is no AdmissionReview: EOF"));
    assert!(says(b"{\"request\": 1}").contains("invalid type: integer `1`"));
    assert!(says("[".repeat(100_000).as_bytes()).starts_with("the body is no AdmissionReview"));
    assert_eq!(
        says(b"{\"apiVersion\": \"v1\", \"kind\": \"Pod\"}"),
        "the body is \"v1\" \"Pod\"; expected \"admission.k8s.io/v1\" \"AdmissionReview\""
    );
    let answer =
        b"{\"apiVersion\": \"admission.k8s.io/v1\", \"kind\": \"AdmissionReview\", \"response\": {}}";
    assert!(matches!(decode(answer), Err(BadReview::NoRequest)));
    assert_eq!(says(answer), "the AdmissionReview has no request with a uid: it is for API servers to ask");
}

/// JSON that has much in common with pods.
fn near_pod() -> impl Strategy<Value = Value> {
    let word = prop_oneof![
        Just("networkservicemesh.io"),
        Just("networkservicemesh.io/inject"),
        Just("kubernetes.io/config.mirror"),
        Just("name"),
        Just("generateName"),
        Just("metadata"),
        Just("spec"),
        Just("template"),
        Just("labels"),
        Just("annotations"),
        Just("containers"),
        Just("initContainers"),
        Just("volumes"),
        Just("securityContext"),
        Just("ownerReferences"),
        Just("kind"),
        Just("cmd-nsc"),
        Just("nsm-socket"),
        Just("kernel://a/x"),
        Just("false"),
        Just("kernel://a b"),
        Just("Deployment"),
        Just("hostPath"),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        word.clone().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((word.clone(), inner), 0..6)
                .prop_map(|pairs| pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect::<Value>()),
        ]
    })
}

/// A pod as they are, more or less.
fn some_pod() -> impl Strategy<Value = Value> {
    let map = |values: &'static str| {
        let key = "[a-z]{1,4}|networkservicemesh\\.io|networkservicemesh\\.io/inject|spiffe\\.io/spiffe-id";
        prop::option::of(prop::collection::btree_map(key, values, 0..4))
    };
    let list = |names: &'static str| {
        let item = names.prop_map(|name| json!({ "name": name, "emptyDir": {}, "x": [1] }));
        prop::option::of(prop::collection::vec(item, 0..4))
    };
    let value = "kernel://[a-z]{1,3}/[a-z0-9]{1,4}(\\?sriovToken=a\\.b/c)?|kernel://a b|false|x";
    (map("[a-z]{0,3}"), map(value), list("[a-z]{1,3}|cmd-nsc"), list("[a-z]{1,3}"), list("nsm-socket|[a-z]{1,3}"))
        .prop_map(|(labels, annotations, inits, containers, volumes)| {
            json!({
                "kept": { "as": "it is" },
                "metadata": { "name": "p", "labels": labels, "annotations": annotations },
                "spec": { "initContainers": inits, "containers": containers, "volumes": volumes, "kept": [1, 2] },
            })
        })
}

proptest! {
    #[test]
    fn nothing_that_is_sent_panics(body: Vec<u8>, value in near_pod(), near in near_pod()) {
        let namespace = Namespace::of(&upstreams(), &value);
        let _ = review(&upstreams(), &body, &namespace, UNIQUE);
        for body in [value.to_string(), asked("", "Pod", &value).to_string(), asked("apps", "ReplicaSet", &near).to_string()] {
            let _ = review(&upstreams(), body.as_bytes(), &namespace, UNIQUE);
        }
    }

    #[test]
    fn a_patch_adds_ours_changes_nothing_else_and_is_made_once(
        pod in prop_oneof![some_pod(), near_pod()], workload: bool, native_sidecars: bool, annotated: bool, restricted: bool,
        own in prop::option::of("kernel://[a-z]{1,3}/[a-z]{1,3}"),
    ) {
        let settings = Settings { native_sidecars, ..upstreams() };
        let namespace = Namespace {
            annotation: annotated.then(|| "kernel://ns/if".into()),
            security: if restricted { Security::Restricted } else { Security::Privileged },
        };
        let (group, kind) = if workload { ("apps", "DaemonSet") } else { ("", "Pod") };
        let object = match workload {
            true => json!({ "metadata": { "annotations": { "networkservicemesh.io": own } }, "spec": { "template": pod } }),
            false => pod.clone(),
        };
        let plan = plan_in(&settings, &namespace, group, kind, &object);
        prop_assert!(!plan.to_string().is_empty());
        let Verdict::Patched(patch) = &plan.verdict else { return Ok(()) };
        let patch: json_patch::Patch = serde_json::from_value(json!(patch)).unwrap();
        let mut after = object.clone();
        json_patch::patch(&mut after, &patch).map_err(|e| TestCaseError::fail(format!("{e}: {object}")))?;

        // Made once: the pod that comes of it is as it should be. One pass may follow for a template with annotations.
        let again = plan_in(&settings, &namespace, group, kind, &after);
        prop_assert!(matches!(again.verdict, Verdict::Unchanged(Why::Done | Why::InTemplate)), "{:?}", again);

        // Nothing else: without what is ours it is what it was.
        let at = |object: &Value| if workload { object["spec"]["template"].clone() } else { object.clone() };
        let (before, mut rest) = (at(&object), at(&after));
        for (list, ours) in [("initContainers", vec!["cmd-nsc-init", "cmd-nsc"]), ("containers", vec!["cmd-nsc"])] {
            if let Some(list) = rest["spec"][list].as_array_mut() {
                let found = list.iter().filter(|c| ours.contains(&c["name"].as_str().unwrap())).count();
                prop_assert!(found <= ours.len());
                list.truncate(list.len() - found);
            }
        }
        for list in ["initContainers", "containers", "volumes"] {
            let none = Vec::new();
            let was = before["spec"][list].as_array().unwrap_or(&none);
            let is = rest["spec"][list].as_array().unwrap_or(&none);
            prop_assert!(is.starts_with(was), "{}", list);
            prop_assert!(list == "volumes" || is.len() == was.len(), "{}", list);
        }
        for (part, ours) in [("spec", &["initContainers", "containers", "volumes"][..]), ("metadata", &["labels", "annotations"])] {
            for (key, value) in before[part].as_object().into_iter().flatten() {
                if !ours.contains(&key.as_str()) {
                    prop_assert_eq!(&rest[part][key], value);
                }
            }
        }
        for (map, ours) in [("labels", "spiffe.io/spiffe-id"), ("annotations", "networkservicemesh.io")] {
            for (key, value) in before["metadata"][map].as_object().into_iter().flatten() {
                prop_assert!(key == ours || key.ends_with("/problem") || &rest["metadata"][map][key] == value);
            }
        }
        for (key, value) in before.as_object().into_iter().flatten() {
            prop_assert!(key == "spec" || key == "metadata" || &rest[key] == value);
        }
    }
}
