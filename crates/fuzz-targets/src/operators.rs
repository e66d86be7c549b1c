//! What operators write, as variables and as files, and what others on a node may name: texts, that is.

use std::{net::IpAddr, path::Path};

use ipnet::IpNet;
use nsm_api::{
    matching::{Labels, Template},
    mechanism::InodeUrl,
    pb::connectioncontext::IpContext,
};
use nsm_dns::{config, resolv};
use nsm_identity::{ca, policy::Judge as _};
use nsm_kernel::plan::{decode_id, encode_id, mark as written, parse_mark};
use nsm_sdk::{
    ipam::{IpamPolicy, Pools, PrefixGroups},
    prefixes::AwarenessGroups,
    provides::{DnsConfigs, parse_policies},
};
use nsm_webhook::{
    annotation::Wanted,
    settings::{Annotation, Program, Quantity, SocketPath, Variable},
};

/// The alternative name of a link: whoever may name links may write it.
pub fn mark(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Some((side, id)) = parse_mark(text) {
        assert_eq!(written(side, &id), text, "it is somebody else's mark");
    }
    let _ = decode_id(text);
    let code = encode_id(text);
    assert!(code.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_%".contains(&byte)), "{code:?}");
    assert_eq!(decode_id(&code).as_deref(), Some(text), "another id");
}

/// The value of a variable, or a text in a message or an annotation.
pub fn settings(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match text.parse::<PrefixGroups>() {
        Ok(groups) => hand_out(&groups),
        Err(error) => told(&error),
    }
    if let Err(error) = text.parse::<AwarenessGroups>() {
        told(&error);
    }
    if let Err(error) = text.parse::<DnsConfigs>() {
        told(&error);
    }
    let _ = text.parse::<IpamPolicy>();
    if let Ok(url) = text.parse::<InodeUrl>() {
        assert_eq!(url.to_string().parse(), Ok(url));
    }
    match Template::parse(text) {
        Ok(template) => {
            let expanded = template.expand(&Labels::new());
            assert!(text.contains("{{") || expanded == text, "{expanded:?}");
        }
        Err(error) => assert!(error.to_string().len() < 1000, "{error}"),
    }
    if let Ok(key) = text.parse::<Annotation>() {
        assert_eq!(key.to_string(), text);
    }
    if let Ok(path) = text.parse::<SocketPath>() {
        assert_eq!(format!("{}/{}", path.directory, path.file), text);
    }
    if let Ok(program) = text.parse::<Program>() {
        assert!((1..=63).contains(&program.name.len()) && !program.image.is_empty(), "{program:?}");
    }
    if let Ok(variable) = text.parse::<Variable>() {
        assert_eq!(format!("{}={}", variable.name, variable.value), text);
    }
    let _ = text.parse::<Quantity>();
    let wanted = Wanted::read(text);
    assert_eq!(Wanted::read(&wanted.value).value, wanted.value, "read twice, it is not the same");
    assert!(wanted.problems().all(|problem| problem.chars().count() < 600));
    if let Some(server) = config::server(text) {
        assert_eq!(config::server(&server.to_string()), Some(server));
    }
    if let Some(domain) = config::domain(text) {
        assert!(domain.is_fqdn() && !domain.is_root(), "{text:?} is the root");
    }
}

/// What an endpoint hands out is of its prefixes, whatever they are.
fn hand_out(groups: &PrefixGroups) {
    assert!(!groups.0.is_empty());
    let mut context = IpContext::default();
    if Pools::new(groups, IpamPolicy::Strict).assign("x", &mut context).is_err() {
        return;
    }
    let (src, dst) = (context.src_ip_addrs.iter(), context.dst_ip_addrs.iter());
    assert_eq!((src.len(), dst.len()), (groups.0.len(), groups.0.len()), "one pair of each group");
    for (address, group) in src.zip(&groups.0).chain(dst.zip(&groups.0)) {
        let address: IpNet = address.parse().expect("ADDRESS/LENGTH");
        assert!(group.iter().any(|prefix| prefix.contains(&address)), "{address} is of no {group:?}");
    }
}

/// A file that an operator writes: YAML, or a `resolv.conf`.
pub fn files(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let path = Path::new("file");
    match nsm_manager::parse_excluded_prefixes(text) {
        Ok(prefixes) => {
            let list: Vec<_> = prefixes.iter().map(IpNet::to_string).collect();
            let again =
                nsm_manager::parse_excluded_prefixes(&format!("prefixes: [\"{}\"]", list.join("\",\"")));
            assert!(list.is_empty() || again == Ok(prefixes), "{again:?}");
        }
        Err(error) => told(&error),
    }
    if let Err(error) = parse_policies(text) {
        told(&error);
    }
    if let Err(error) = ca::Config::parse(text, path) {
        told(&error);
    }
    match nsm_lab::Scenario::parse(text, path) {
        Ok(scenario) => assert_eq!(nsm_lab::Plan::new(&scenario).lab, scenario.name),
        Err(error) => told(&error),
    }
    if let Ok(converted) = nsm_k8s::convert::convert(text)
        && converted.written > 0
    {
        let again = nsm_k8s::convert::convert(&converted.text).expect("what we write we read");
        assert_eq!(again.text, converted.text, "written twice, it is not the same");
    }
    let us = IpAddr::from([127, 0, 0, 1]);
    let ours = resolv::taken_over(text, us);
    assert_eq!(resolv::original(&ours).as_deref(), Some(text), "it cannot be restored");
    let configured = resolv::configured(&ours);
    assert_eq!(configured.servers, [(us, 53).into()], "others are asked, too");
    assert!(configured.search.is_empty());
    let _ = (resolv::configured(text), resolv::original(text));
}

/// A policy in Rego, and a verdict of it.
pub fn rego(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match nsm_rego::Policy::parse("policy.rego", text) {
        Ok(policy) => {
            let segment = serde_json::json!({ "id": "1", "token": "a.b.c" });
            let document = serde_json::json!({ "index": 0, "path_segments": [segment] });
            if let Err(error) = policy.judge(&document) {
                assert!(error.chars().count() <= 200, "{error}");
            }
        }
        Err(error) => told(&error),
    }
}

fn told(error: &impl ToString) {
    assert!(!error.to_string().trim().is_empty(), "nobody is told what is wrong");
}
