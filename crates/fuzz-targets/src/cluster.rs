//! What is heard in a cluster: objects of an API server, what agents and signers say to each other, and what is kept of
//! authorities.

use std::{
    collections::BTreeMap,
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use nsm_api::pb::registry::{NetworkService, NetworkServiceEndpoint};
use nsm_identity::{
    Bundles, SpiffeId,
    ca::{Authority, rotation::Authorities},
    chains::Chains,
};
use nsm_install::record::Record;
use nsm_k8s::{
    addresses,
    prefixes::{self, ADDED},
    properties,
    resource::{Kind, Object},
    wires,
};
use nsm_signer::{
    pod::Pods,
    protocol::{Ask, Signed},
};
use prost::Message as _;
use serde_json::{Value, json};

/// What is kept of an authority of `spiffe://fuzz.nsm`, which nobody trusts.
const KEPT: &str = include_str!("../../../fuzz/corpus/authorities/kept.pem");
/// It lives then.
const NOW: Duration = Duration::from_secs(1_800_000_000);

/// An object, or a line of a watch that tells of one.
pub fn kubernetes(bytes: &[u8]) {
    let _ = nsm_k8s::object_of(bytes);
    let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return };
    custom::<NetworkService>(&value);
    custom::<NetworkServiceEndpoint>(&value);
    if let Some((_, Some((_, edit)))) = wires::read(&value) {
        assert!(edit.generation > 1, "nobody has edited it");
    }
    map(&addresses::of_node(&value["status"]["addresses"], None));
    if let Ok(said) = addresses::of_config_map(&value["data"]) {
        map(&said);
    }
    let text = |key: &str| value["data"][key].as_str().unwrap_or_default();
    if let Ok(said) = properties::texts(text("properties")) {
        map(&said);
        let written = serde_saphyr::to_string(&said).expect("texts can be written");
        assert_eq!(properties::texts(&written), Ok(said), "what we write we read");
    }
    let _ = prefixes::prefixes(&value["spec"]["podCIDRs"]);
    for heard in [prefixes::made(text("ClusterConfiguration")), prefixes::added(text(ADDED.1))] {
        match heard {
            Ok(prefixes) => assert!(prefixes.iter().all(|prefix| prefix.trunc() == *prefix)),
            Err(problem) => assert!(!problem.is_empty()),
        }
    }
    if let Ok(record) = Record::read(&value) {
        let written = record.object().expect("what was read can be written");
        assert_eq!(Record::read(&written).expect("what we write we read"), record);
        let _ = (record.leftovers().expect("names can be written"), record.settings.check());
    }
}

/// A registration as it is kept: what it means is what its object means when it is written anew.
fn custom<T: Kind + Clone + PartialEq>(value: &Value) {
    let _ = T::doubts(&value["spec"]);
    let Ok(object) = serde_json::from_value::<Object<T>>(value.clone()) else { return };
    match object.item() {
        Ok(item) => {
            let again = Object::new(object.metadata, item.clone()).item();
            assert_eq!(again.expect("what we write we read"), item);
        }
        Err(error) => assert!(!error.what.is_empty(), "{error}"),
    }
}

/// A flat map, as others read the file that we write of it.
fn map(said: &BTreeMap<String, String>) {
    let written = serde_saphyr::to_string(said).expect("texts can be written");
    let again: Option<BTreeMap<String, String>> =
        serde_saphyr::from_str(&written).expect("what we write we read");
    assert_eq!(&again.unwrap_or_default(), said, "{written}");
}

/// What an agent asks, what it is answered, and the control groups of whoever asks it.
pub fn signer(bytes: &[u8]) {
    static AUTHORITIES: OnceLock<(Authorities, SpiffeId)> = OnceLock::new();
    let (authorities, id) = AUTHORITIES.get_or_init(|| {
        let id = "spiffe://fuzz.nsm/ns/default/pod/web".parse().expect("an ID");
        (Authorities::parse(KEPT).expect("authorities"), id)
    });
    if let Ok(ask) = serde_json::from_slice::<Ask>(bytes) {
        let written = serde_json::to_vec(&ask).expect("what was read can be written");
        assert_eq!(serde_json::from_slice::<Ask>(&written).expect("what we write we read"), ask);
    }
    if let Ok(signed) = serde_json::from_slice::<Signed>(bytes) {
        let written = serde_json::to_vec(&signed).expect("what was read can be written");
        assert_eq!(serde_json::from_slice::<Signed>(&written).expect("what we write we read"), signed);
    }
    let request = serde_json::from_slice::<Ask>(bytes).map_or_else(|_| bytes.to_vec(), |ask| ask.request.0);
    match authorities.issue(id, &request, Duration::from_secs(3600), SystemTime::UNIX_EPOCH + NOW) {
        Ok(leaf) => {
            let leaf = nsm_identity::Leaf::parse(leaf).expect("an SVID");
            assert_eq!(leaf.id(), id, "whatever else the request asks for");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    let Ok(groups) = std::str::from_utf8(bytes) else { return };
    let pods = Pods::new(None, "0::/");
    if let Ok(pod) = pods.of(groups) {
        let (plain, slice) = (pod.as_str(), pod.as_str().replace('-', "_"));
        assert!(groups.contains(plain) || groups.contains(&slice), "nobody has named {pod}");
        let below = "/podaaaaaaaa-3f1a-4c52-9d4f-0123456789ab";
        let deeper: Vec<_> = groups.lines().map(|line| format!("{line}{below}")).collect();
        let one_hierarchy = groups.lines().count() == 1;
        assert!(
            !one_hierarchy || pods.of(&deeper.join("\n")).as_ref() == Ok(&pod),
            "what it made itself counts"
        );
    }
    let _ = Pods::new(serde_json::from_value(json!("0e2b6c1e-3f1a-4c52-9d4f-0123456789ab")).ok(), groups)
        .of(groups);
}

/// Authorities as they are kept (PEM), chains as hops hand them on and as the Workload API has them (DER).
pub fn authorities(bytes: &[u8]) {
    static TRUSTED: OnceLock<Bundles> = OnceLock::new();
    let trusted = TRUSTED.get_or_init(|| {
        let kept = Authorities::parse(KEPT).expect("authorities");
        let mut bundles = Bundles::default();
        bundles.insert(kept.domain().expect("of a domain").clone(), &kept.roots()).expect("roots");
        bundles
    });
    if let Ok(text) = std::str::from_utf8(bytes) {
        match Authorities::parse(text) {
            Ok(kept) => {
                assert!(!kept.roots().is_empty());
                let again = Authorities::parse(&kept.pem()).expect("what we write we read");
                assert_eq!((again.pem(), again.roots()), (kept.pem(), kept.roots()));
                assert_eq!(again.domain(), kept.domain());
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        match Authority::parse(text) {
            Ok(root) => assert!(!root.domain().to_string().is_empty()),
            Err(reason) => assert!(!reason.is_empty()),
        }
    }
    if let Ok(chain) = nsm_identity::split_certificates(bytes) {
        assert_eq!(chain.iter().map(AsRef::as_ref).collect::<Vec<&[u8]>>().concat(), bytes, "not all of it");
        let chains = Chains::default();
        let now = SystemTime::UNIX_EPOCH + NOW;
        if let Ok(print) = chains.learn(&chain, trusted, now) {
            assert!(chains.find(&print, trusted, now).is_some(), "it is not remembered");
        }
    }
    if let Ok(answer) = nsm_identity::pb::X509svidResponse::decode(bytes) {
        let _ = nsm_identity::identity_of(answer);
    }
}
