//! A kustomize base and a Helm chart, made of the same objects.
//!
//! The chart's templates are found out, not written: objects are made of settings whose texts are expressions of Helm,
//! once for each choice of what is no text. What is always the same is a template; what differs is one under a condition.

use std::collections::BTreeMap;

use crate::{Identity, InstallError, Settings, Store, definitions, objects, yaml};

/// Files by their paths.
pub type Files = BTreeMap<String, String>;

const GENERATED: &str = "# Made by `cargo xtask deploy` of crates/install: do not edit.\n";

/// A base for kustomize: the manifest of these settings, one file for each kind of things.
///
/// # Errors
/// The settings are bad.
pub fn kustomize(settings: &Settings) -> Result<Files, InstallError> {
    settings.check()?;
    let mut files = Files::new();
    let manifest = objects::objects(settings).iter().map(yaml).collect::<Result<Vec<_>, _>>()?;
    files.insert("nsm.yaml".into(), format!("{GENERATED}{}", manifest.join("---\n")));
    let mut resources = vec!["nsm.yaml"];
    if settings.crds {
        let definitions: Vec<_> =
            definitions().iter().map(|text| text.trim_end().to_owned() + "\n").collect();
        files.insert("crds.yaml".into(), format!("{GENERATED}{}", definitions.join("---\n")));
        resources.insert(0, "crds.yaml");
    }
    let listed: String = resources.iter().map(|file| format!("- {file}\n")).collect();
    let kustomization = format!(
        "{GENERATED}apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n{listed}"
    );
    files.insert("kustomization.yaml".into(), kustomization);
    Ok(files)
}

/// What a user of the chart chooses besides texts.
type Choice = (Store, Identity, bool, bool);

/// A Helm chart with these settings as its values.
///
/// # Errors
/// The settings are bad.
pub fn helm(settings: &Settings, version: &str) -> Result<Files, InstallError> {
    settings.check()?;
    let mut files = Files::new();
    let chart = format!(
        "{GENERATED}apiVersion: v2\nname: nsm\ndescription: A network service mesh\ntype: application\n\
         version: {version}\nappVersion: {version}\nkubeVersion: \">=1.30.0-0\"\n"
    );
    files.insert("Chart.yaml".into(), chart);
    let store = match settings.store {
        Store::Memory => "memory",
        Store::Kubernetes => "kubernetes",
    };
    let identity = match settings.identity {
        Identity::Builtin => "builtin",
        Identity::Spire => "spire",
    };
    let values = format!(
        "{GENERATED}# What stands before the names of images: REGISTRY/PATH/, or nothing\nimages: {:?}\n# What stands behind them\n\
         tag: {:?}\n# Always, IfNotPresent or Never\npullPolicy: {:?}\n# Identities are spiffe://TRUSTDOMAIN/...\ntrustDomain: {:?}\n\
         # Who says who is who: builtin, or spire, which is there already\nidentity: {identity:?}\n\
         # The socket on each node where that is said\nidentitySocket: {:?}\nlogLevel: {:?}\n# Where tunnels between nodes end: a prefix that an address of each node is in; empty: the node's own address\n\
         underlay: {:?}\n# What keeps registrations: memory or kubernetes\n\
         store: {store:?}\n# Whether annotated pods are given their wires\nwebhook: {}\n# Whether only those ports are open that are meant to be\n\
         networkPolicies: {}\n# Where everything lives\nnamespace: {:?}\n",
        settings.images,
        settings.tag,
        settings.pull_policy,
        settings.trust_domain,
        format!("{}/{}", settings.identity_socket.0, settings.identity_socket.1),
        settings.log_level,
        settings.underlay,
        settings.webhook,
        settings.network_policies,
        settings.namespace,
    );
    files.insert("values.yaml".into(), values);
    if settings.crds {
        for (name, definition) in nsm_k8s::crd::ALL {
            files.insert(format!("crds/{name}.yaml"), definition.to_owned());
        }
    }
    files.insert("templates/nsm.yaml".into(), format!("{GENERATED}{}", templates()?));
    Ok(files)
}

/// All objects, each under the conditions under which it is as it is.
fn templates() -> Result<String, InstallError> {
    let choices: Vec<Choice> = [Store::Memory, Store::Kubernetes]
        .into_iter()
        .flat_map(|store| [Identity::Spire, Identity::Builtin].map(|identity| (store, identity)))
        .flat_map(|(store, identity)| [false, true].map(|webhook| (store, identity, webhook)))
        .flat_map(|(store, identity, webhook)| {
            [false, true].map(|policies| (store, identity, webhook, policies))
        })
        .collect();
    // Of each object what it looks like, by choices; in the order of the richest one.
    let mut order = Vec::new();
    let mut forms: BTreeMap<String, BTreeMap<String, Vec<Choice>>> = BTreeMap::new();
    for choice in choices.iter().rev() {
        let (store, identity, webhook, network_policies) = *choice;
        let value = |name: &str| format!("{{{{ .Values.{name} }}}}");
        let settings = Settings {
            namespace: value("namespace"),
            images: value("images"),
            tag: value("tag"),
            pull_policy: value("pullPolicy"),
            trust_domain: value("trustDomain"),
            identity,
            identity_socket: (
                "{{ dir .Values.identitySocket }}".into(),
                "{{ base .Values.identitySocket }}".into(),
            ),
            log_level: value("logLevel"),
            underlay: "{{ .Values.underlay | default `$(NODE_IP)` }}".into(),
            store,
            webhook,
            network_policies,
            crds: false,
        };
        for object in objects::objects(&settings) {
            let key = format!("{} {}", object["kind"], object["metadata"]["name"]);
            if !order.contains(&key) {
                order.push(key.clone());
            }
            forms.entry(key).or_default().entry(yaml(&object)?).or_default().push(*choice);
        }
    }
    let mut out = String::new();
    for key in &order {
        for (text, when) in &forms[key] {
            let text = format!("---\n{text}");
            out += &match condition(when, &choices) {
                None => text,
                Some(condition) => format!("{{{{- if {condition} }}}}\n{text}{{{{- end }}}}\n"),
            };
        }
    }
    Ok(out)
}

/// What holds for exactly these of all choices, where that is a matter of single values; `None`: nothing need hold.
fn condition(when: &[Choice], all: &[Choice]) -> Option<String> {
    let same = |part: fn(&Choice) -> String| {
        let mut parts: Vec<_> = when.iter().map(part).collect();
        parts.sort();
        parts.dedup();
        let [only] = &parts[..] else { return None };
        all.iter().any(|choice| part(choice) != *only).then(|| only.clone())
    };
    let store = same(|(store, ..)| match store {
        Store::Memory => "eq .Values.store \"memory\"".into(),
        Store::Kubernetes => "ne .Values.store \"memory\"".into(),
    });
    let identity = same(|(_, identity, ..)| match identity {
        Identity::Spire => "eq .Values.identity \"spire\"".into(),
        Identity::Builtin => "ne .Values.identity \"spire\"".into(),
    });
    let flag =
        |name: &str, on: bool| if on { format!(".Values.{name}") } else { format!("not .Values.{name}") };
    let webhook = same(|(_, _, on, _)| on.to_string()).map(|on| flag("webhook", on == "true"));
    let policies = same(|(.., on)| on.to_string()).map(|on| flag("networkPolicies", on == "true"));
    let conditions: Vec<_> = [store, identity, webhook, policies].into_iter().flatten().collect();
    debug_assert!(when.len() << conditions.len() == all.len(), "not a matter of single values: {when:?}");
    match &conditions[..] {
        [] => None,
        [one] => Some(one.clone()),
        more => Some(format!("and {}", more.iter().map(|c| format!("({c})")).collect::<Vec<_>>().join(" "))),
    }
}
