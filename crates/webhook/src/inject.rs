//! Whom a request concerns, and what he is given: the decision and the patch (spec/kubernetes.md 2.2 to 2.6).

use std::fmt;

use serde::Serialize;
use serde_json::{Map, Value, json};

use nsm_k8s::wires::CONDITION;

use crate::{
    annotation::{MAX_WARNING, Wanted},
    review::Request,
    settings::{Program, Settings},
};

/// Where the SPIFFE Workload API is in pods.
const IDENTITY: (&str, &str) = ("spire-agent-socket", "/run/spire/sockets");
/// Where the manager of the node is, on nodes and in pods.
const MANAGER: (&str, &str) = ("nsm-socket", "/var/lib/networkservicemesh");
/// The label of a namespace that says what its pods may.
const POD_SECURITY: &str = "pod-security.kubernetes.io/enforce";
/// What kubelets put on the API server's copy of a pod that is a file of a node.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// The annotation, beside ours, of pods that shall not be ready without their wires.
const GATE: &str = "readiness-gate";

/// As whom containers run that must not be root and are not told as whom.
const NOBODY: u32 = 65532;

/// Why nothing is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// Objects that exist stay as they are.
    #[error("it is not created")]
    NotCreated,
    /// Pods of other kinds are looked at when they are created.
    #[error("it is neither a pod nor of a kind that the webhook reads")]
    OtherKind,
    /// The API server will say what is wrong with it.
    #[error("its metadata or spec is not as it should be")]
    Undecodable,
    /// Its Deployment was looked at.
    #[error("it belongs to a Deployment")]
    OfDeployment,
    /// Nobody asks for a wire.
    #[error("it is not annotated")]
    NotAnnotated,
    /// It says that it wants none.
    #[error("it is annotated to be left alone")]
    OptedOut,
    /// Its pods carry the annotation themselves.
    #[error("the annotation is in its template: its pods are looked at when they are created")]
    InTemplate,
    /// It has what we would give it.
    #[error("it has our containers already")]
    Done,
    /// It cannot be given anything.
    #[error("it is a copy of a file on a node")]
    Mirror,
}

/// What the pod's namespace says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Namespace {
    /// Its annotation: for pods that have none.
    pub annotation: Option<String>,
    /// What its pods may.
    pub security: Security,
}

/// A level of the Pod Security Standards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Security {
    /// Anything; also where the namespace says nothing that we know.
    #[default]
    Privileged,
    /// No host paths.
    Baseline,
    /// Nothing that is not needed.
    Restricted,
}

impl Namespace {
    /// A namespace by its object.
    #[must_use]
    pub fn of(settings: &Settings, object: &Value) -> Self {
        let security = match object["metadata"]["labels"][POD_SECURITY].as_str() {
            Some("baseline") => Security::Baseline,
            Some("restricted") => Security::Restricted,
            _ => Security::Privileged,
        };
        let annotation = annotation(&object["metadata"], settings.annotation.key()).map(str::to_owned);
        Self { annotation, security }
    }
}

/// One change of an object, as JSON Patch (RFC 6902) has it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "op", rename = "add")]
pub struct Add {
    /// Of what.
    pub path: String,
    /// What stands there afterwards.
    pub value: Value,
    #[serde(skip)]
    added: usize,
}

/// What is to be done with an object.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The object's fate.
    pub verdict: Verdict,
    /// What somebody should be told about it, each at most [`MAX_WARNING`] characters.
    pub warnings: Vec<String>,
}

/// What becomes of an object.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// It is as it should be.
    Unchanged(Why),
    /// It is given something.
    Patched(Vec<Add>),
    /// It shall not be.
    Refused(String),
}

impl Plan {
    /// Nothing is done, and nothing is said.
    #[must_use]
    pub fn unchanged(why: Why) -> Self {
        Self { verdict: Verdict::Unchanged(why), warnings: Vec::new() }
    }
}

impl fmt::Display for Plan {
    /// For logs: what changes, not what of it is secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.verdict {
            Verdict::Unchanged(why) => write!(f, "unchanged: {why}"),
            Verdict::Refused(why) => write!(f, "refused: {why}"),
            Verdict::Patched(patch) => {
                f.write_str("patched:")?;
                patch.iter().enumerate().try_for_each(|(i, add)| {
                    let what = add.path.rsplit('/').next().unwrap_or_default();
                    let all = add.value.as_array().map(Vec::len).or(add.value.as_object().map(Map::len));
                    let before = all.unwrap_or_default().saturating_sub(add.added);
                    write!(f, "{} {what} {before} +{}", if i == 0 { "" } else { "," }, add.added)
                })
            }
        }
    }
}

/// An object that may ask for wires.
#[derive(Debug)]
pub struct Subject<'a> {
    object: &'a Value,
    /// The pod itself, or what a workload makes its pods of.
    pod: &'a Value,
    /// Where that stands in the object.
    base: &'static str,
    own: Option<&'a str>,
    opted_out: bool,
    /// It shall not be ready without its wires.
    gated: bool,
}

/// Whether a request concerns us; if so its namespace has to be known, for [`Subject::plan`].
///
/// # Errors
/// Why it does not, whatever the namespace says.
pub fn subject<'a>(settings: &Settings, request: &'a Request) -> Result<Subject<'a>, Why> {
    if request.operation != "CREATE" {
        return Err(Why::NotCreated);
    }
    let object = &request.object;
    let workload = match (request.kind.group.as_str(), request.kind.kind.as_str()) {
        ("", "Pod") => false,
        ("apps", "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet") => true,
        _ => return Err(Why::OtherKind),
    };
    let (pod, base) = if workload { (&object["spec"]["template"], "/spec/template") } else { (object, "") };
    if !is_pod(pod) || !is_metadata(&object["metadata"]) {
        return Err(Why::Undecodable);
    }
    let metadata = &object["metadata"];
    if request.kind.kind == "ReplicaSet" && is_owned_by_deployment(metadata) {
        return Err(Why::OfDeployment);
    }
    let own = annotation(metadata, settings.annotation.key());
    if workload && own.is_none() && annotation(&pod["metadata"], settings.annotation.key()).is_none() {
        return Err(Why::NotAnnotated);
    }
    let says = |word: &str, value: &str| {
        let key = settings.annotation.beside(word);
        [metadata, &pod["metadata"]].iter().any(|m| annotation(m, &key) == Some(value))
    };
    let (opted_out, gated) = (says("inject", "false"), says(GATE, "true"));
    Ok(Subject { object, pod, base, own, opted_out, gated })
}

impl Subject<'_> {
    /// What is to be done. `unique` makes the names of connections of this object differ from those of its namesakes.
    #[must_use]
    pub fn plan(&self, settings: &Settings, namespace: &Namespace, unique: &str) -> Plan {
        let key = settings.annotation.key();
        if self.opted_out {
            return Plan::unchanged(Why::OptedOut);
        }
        let in_template = (!self.base.is_empty()).then(|| annotation(&self.pod["metadata"], key)).flatten();
        let inherited = namespace.annotation.as_deref().filter(|_| self.base.is_empty());
        let Some(value) = in_template.or(self.own).or(inherited) else {
            return Plan::unchanged(Why::NotAnnotated);
        };
        let wanted = Wanted::read(value);
        let mut warnings: Vec<_> = wanted.problems().cloned().collect();
        let verdict = if let Some(malformed) = wanted.malformed.as_ref().filter(|_| settings.reject_malformed)
        {
            Verdict::Refused(format!("annotation {key}: {malformed}"))
        } else if in_template.is_some() {
            if self.own.is_some_and(|own| Some(own) != in_template) {
                warnings
                    .push("its template is annotated too, with another value, and that one counts".into());
            }
            Verdict::Unchanged(Why::InTemplate)
        } else {
            self.verdict(settings, namespace.security, &wanted, unique, &mut warnings)
        };
        let said = |warning: String| bounded(&format!("{key}: {warning}"));
        Plan { verdict, warnings: warnings.into_iter().map(said).collect() }
    }

    fn verdict(
        &self,
        settings: &Settings,
        security: Security,
        wanted: &Wanted,
        unique: &str,
        warnings: &mut Vec<String>,
    ) -> Verdict {
        let (metadata, spec) = (&self.pod["metadata"], &self.pod["spec"]);
        if !metadata["annotations"][MIRROR].is_null() {
            warnings.push("a static pod cannot be given wires: its manifest is on its node".into());
            return Verdict::Unchanged(Why::Mirror);
        }
        let existing = |list: &str| spec[list].as_array().cloned().unwrap_or_default();
        let (mut inits, mut containers) = (existing("initContainers"), existing("containers"));
        let has = |name: &str| inits.iter().chain(&containers).any(|container| container["name"] == name);
        let (there, missing): (Vec<_>, Vec<_>) = settings.names().partition(|name| has(name));
        if let Some(name) = there.first() {
            if !missing.is_empty() {
                warnings.push(format!(
                    "it has a container named {name:?} already, so nothing is put into it: name it otherwise to get wires"
                ));
            }
            return Verdict::Unchanged(Why::Done);
        }
        self.doubt(settings, warnings);

        // A workload's template with annotations of its own is left to its pods, each of which is told apart.
        if !self.base.is_empty() && metadata["annotations"].as_object().is_some_and(|map| !map.is_empty()) {
            let value = self.own.unwrap_or(&wanted.value);
            let gate = self.gated.then(|| (settings.annotation.beside(GATE), json!("true")));
            let ours = [(settings.annotation.key().to_owned(), json!(value))].into_iter().chain(gate);
            return Verdict::Patched(vec![self.merge(&["metadata", "annotations"], ours)]);
        }

        let (volumes, mounts, added) = volumes(settings, existing("volumes"), security);
        let env = self.environment(settings, wanted, unique);
        let container = |program: &Program| {
            let mut container = json!({
                "name": program.name,
                "image": program.image,
                "env": env,
                "resources": settings.resources.with(&wanted.devices),
                "volumeMounts": mounts,
                "imagePullPolicy": "IfNotPresent",
            });
            if let Some(command) = &program.command {
                container["command"] = json!([command]);
            }
            if security == Security::Restricted {
                container["securityContext"] = restricted(&spec["securityContext"]);
            }
            container
        };
        let (init_count, count) = (settings.init_images.len(), settings.images.len());
        inits.extend(settings.init_images.iter().map(container));
        let sidecars = settings.images.iter().map(container);
        let mut counts = (init_count, count);
        if settings.native_sidecars {
            inits.extend(sidecars.map(|mut container| {
                container["restartPolicy"] = json!("Always");
                container
            }));
            counts = (init_count + count, 0);
        } else {
            containers.extend(sidecars);
        }
        let mut labels: Map<_, _> = settings.labels.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
        if wanted.problems().next().is_some() {
            labels.insert(settings.annotation.beside("problem"), json!("annotation"));
        }
        let add = |list: &str, value: Vec<Value>, added| Add {
            path: format!("{}/spec/{list}", self.base),
            value: value.into(),
            added,
        };
        let mut patch = vec![
            add("initContainers", inits, counts.0),
            add("containers", containers, counts.1),
            add("volumes", volumes, added),
            self.merge(&["metadata", "labels"], labels),
        ];
        let mut gates = existing("readinessGates");
        let ours = json!({ "conditionType": CONDITION });
        if self.gated && !gates.contains(&ours) {
            gates.push(ours);
            patch.push(add("readinessGates", gates, 1));
        }
        Verdict::Patched(patch)
    }

    /// What can hardly be meant with this pod.
    fn doubt(&self, settings: &Settings, warnings: &mut Vec<String>) {
        let spec = &self.pod["spec"];
        if spec["hostNetwork"] == true {
            warnings.push("the pod has the network of its node (hostNetwork), and so would its wires".into());
        }
        let ends = spec["restartPolicy"].as_str().is_some_and(|policy| policy != "Always");
        if ends && !settings.native_sidecars && !settings.images.is_empty() {
            warnings.push(
                "the pod does not end with its containers: the side-car runs on (Kubernetes 1.29 has native side-cars)"
                    .into(),
            );
        }
    }

    /// The variables of our containers: init container and side-car are one client, by one name.
    fn environment(&self, settings: &Settings, wanted: &Wanted, unique: &str) -> Vec<Value> {
        let variable = |name: &str, value: &str| json!({ "name": name, "value": value });
        let metadata = &self.object["metadata"];
        let generated = metadata["generateName"].as_str().is_some_and(|name| !name.is_empty());
        let name = if generated { "$(POD_NAME)".into() } else { format!("$(POD_NAME)-{unique}") };
        let endpoint = format!("unix://{}/{}", IDENTITY.1, settings.identity_socket.file);
        let mut env: Vec<_> = settings.envs.iter().map(|given| variable(&given.name, &given.value)).collect();
        env.extend([
            variable("SPIFFE_ENDPOINT_SOCKET", &endpoint),
            json!({ "name": "POD_NAME", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } }),
            variable(&settings.nsurl_env, &wanted.value),
            variable("NSM_NAME", &name),
        ]);
        env
    }

    /// The map at `path` of the pod with `ours` in it. What is missing on the way is made.
    fn merge(&self, path: &[&str], ours: impl IntoIterator<Item = (String, Value)>) -> Add {
        let mut at = self.pod;
        for (depth, step) in path.iter().enumerate() {
            if !at[*step].is_object() {
                // A patch cannot go through what is not there.
                let inner: Map<_, _> = ours.into_iter().collect();
                let added = inner.len();
                let value = path[depth + 1..].iter().rev().fold(json!(inner), |v, step| json!({ *step: v }));
                return Add { path: self.path(&path[..=depth]), value, added };
            }
            at = &at[*step];
        }
        let mut map = at.as_object().cloned().unwrap_or_default();
        let before = map.len();
        map.extend(ours);
        Add { path: self.path(path), added: map.len() - before, value: map.into() }
    }

    fn path(&self, steps: &[&str]) -> String {
        steps.iter().fold(self.base.to_owned(), |path, step| format!("{path}/{step}"))
    }
}

/// All volumes, where ours are mounted, and how many are new. A volume that is the same is used as it is; one that only
/// has the name keeps it.
fn volumes(settings: &Settings, mut all: Vec<Value>, security: Security) -> (Vec<Value>, Vec<Value>, usize) {
    let before = all.len();
    let mut mounts = Vec::new();
    for ((name, path), on_node, driver) in [
        (IDENTITY, settings.identity_socket.directory.as_str(), "csi.spiffe.io"),
        (MANAGER, MANAGER.1, "csi.networkservicemesh.io"),
    ] {
        let source = match security {
            Security::Privileged => ("hostPath", json!({ "path": on_node, "type": "Directory" })),
            Security::Baseline | Security::Restricted => {
                ("csi", json!({ "driver": driver, "readOnly": true }))
            }
        };
        let volume = |name: &str| json!({ "name": name, source.0: source.1 });
        let free = |name: &String| !all.iter().any(|other| other["name"] == name.as_str());
        let others = (1..).map(|n| format!("{name}-{n}"));
        let mut names = std::iter::once(name.to_owned()).chain(others);
        let same = |name: &String| all.contains(&volume(name));
        let Some(name) = names.find(|name| same(name) || free(name)) else { continue };
        mounts.push(json!({ "name": name, "mountPath": path, "readOnly": true }));
        if free(&name) {
            let volume = volume(&name);
            all.push(volume);
        }
    }
    let added = all.len() - before;
    (all, mounts, added)
}

/// What a restricted namespace demands of a container, as far as its pod does not say it for all.
fn restricted(of_pod: &Value) -> Value {
    let mut context = json!({ "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } });
    if of_pod["runAsNonRoot"] != true {
        context["runAsNonRoot"] = json!(true);
    }
    // Our images, like upstream's, say root, and then nothing else would start.
    if of_pod["runAsUser"].is_null() {
        context["runAsUser"] = json!(NOBODY);
    }
    if of_pod["seccompProfile"].is_null() {
        context["seccompProfile"] = json!({ "type": "RuntimeDefault" });
    }
    context
}

/// An annotation that says something.
fn annotation<'a>(metadata: &'a Value, key: &str) -> Option<&'a str> {
    metadata["annotations"][key].as_str().filter(|value| !value.trim().is_empty())
}

/// Whether this can be patched and read as a pod: what is not there may be missing, what is there has its type.
fn is_pod(pod: &Value) -> bool {
    let is_list = |list: &Value| {
        let named = |container: &Value| container["name"].is_string();
        list.is_null() || list.as_array().is_some_and(|list| list.iter().all(named))
    };
    let spec = &pod["spec"];
    pod.is_object()
        && is_metadata(&pod["metadata"])
        && spec.is_object()
        && ["initContainers", "containers", "volumes"].iter().all(|list| is_list(&spec[*list]))
        && (spec["readinessGates"].is_null() || spec["readinessGates"].is_array())
}

fn is_metadata(metadata: &Value) -> bool {
    let is_map =
        |map: &Value| map.is_null() || map.as_object().is_some_and(|map| map.values().all(Value::is_string));
    (metadata.is_null() || metadata.is_object())
        && is_map(&metadata["labels"])
        && is_map(&metadata["annotations"])
}

fn is_owned_by_deployment(metadata: &Value) -> bool {
    metadata["ownerReferences"]
        .as_array()
        .is_some_and(|owners| owners.iter().any(|owner| owner["kind"] == "Deployment"))
}

/// A warning as API servers pass it on.
fn bounded(text: &str) -> String {
    match text.char_indices().nth(MAX_WARNING - 1) {
        Some((end, _)) if text.len() > end + 1 => format!("{}…", &text[..end]),
        _ => text.into(),
    }
}
