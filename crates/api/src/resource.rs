//! NetworkService resources as people write them: YAML to [`NetworkService`].
//!
//! A file holds one or more documents exactly as they would be applied to a cluster. Three
//! spellings of a match occur in the wild (spec/examples.md, registry.md 4.2, 4.8), and each item
//! of `matches` is read in the one it is written in:
//!
//! | spelling | `apiVersion` | fields |
//! |---|---|---|
//! | present | `networkservicemesh.io/v1` | `source_selector`, `routes[].destination_selector`, `fallthrough`, `metadata` |
//! | siblings | `networkservicemesh.io/v1alpha1` | `match:` and `destination:` without a value beside `sourceSelector`, `route[]`, `destinationSelector`; both markers may be missing |
//! | nested | either | the same names, below `match:` and `destination:` |
//!
//! Nothing is guessed and nothing is ignored: an unknown field, version or kind, a wrong type or a
//! template of a kind that is not evaluated is an [`Error`] with document, line and field, because
//! a selector that silently selects something else is the worst outcome.
//!
//! ```
//! let file = nsm_api::resource::parse(
//!     "apiVersion: networkservicemesh.io/v1
//! kind: NetworkService
//! metadata: {name: web}
//! spec:
//!   payload: IP
//!   matches:
//!   - routes:
//!     - destination_selector: {app: gateway}
//! ",
//! )?;
//! assert_eq!(file.services[0].matches[0].routes[0].destination_selector["app"], "gateway");
//! # Ok::<(), nsm_api::resource::Error>(())
//! ```

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::Spanned;

use crate::{
    matching::{Labels, Template},
    pb::registry::{Destination, Match, Metadata, NetworkService},
};

/// The services of a file, in the order of its documents, and what its author should know.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct File {
    /// One per document; names are unique.
    pub services: Vec<NetworkService>,
    /// Where the text is valid but may not mean what its author thinks.
    pub warnings: Vec<Warning>,
}

/// A place in a file: its document (from 1), line (from 1) and field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Which document of the file, counted from 1; empty ones do not count.
    pub document: usize,
    /// Which line of the file, counted from 1.
    pub line: u64,
    /// The field, as `spec.matches[0].route[0].destinationSelector`; empty for the whole document.
    pub field: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "document {}, line {}", self.document, self.line)?;
        if !self.field.is_empty() {
            write!(f, ", {}", self.field)?;
        }
        Ok(())
    }
}

/// Something valid that may select differently from what its author expects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// Where.
    pub place: Place,
    /// What, and what to write instead.
    pub text: String,
    /// It is about the rules of v1alpha1, which [`keep_old_choices`] keeps.
    pub of_old_rules: bool,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.text)
    }
}

/// Why a file was refused. The first problem is reported.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct Error {
    /// Where.
    pub place: Place,
    /// What, and what was expected.
    pub problem: Problem,
}

/// What is wrong with a resource.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The text is not YAML.
    #[error("not valid YAML: {0}")]
    Syntax(String),
    /// A field that the resource does not have.
    #[error("unknown field; expected {expected}{hint}")]
    UnknownField {
        /// The fields that exist there.
        expected: String,
        /// A likely correction, starting with `; `, or empty.
        hint: String,
    },
    /// A field that must be there is not.
    #[error("missing; expected {expected}")]
    Missing {
        /// What belongs there.
        expected: &'static str,
    },
    /// A value of another type or content.
    #[error("expected {expected}, found {found}")]
    Wrong {
        /// What belongs there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A field is given twice: nested and beside its marker, or by a repeated key.
    #[error("given twice; keep one")]
    Twice,
    /// An earlier document defines a service of the same name.
    #[error("document {document} of this file already defines a NetworkService of this name")]
    Duplicate {
        /// The earlier document.
        document: usize,
    },
    /// A selector value that is a template of a kind that is not evaluated.
    #[error(transparent)]
    Template(#[from] crate::matching::TemplateError),
}

/// Reads all documents of a file.
///
/// # Errors
/// The first problem found, with its place.
pub fn parse(text: &str) -> Result<File, Error> {
    let mut file = File::default();
    let mut defined = BTreeMap::new();
    let mut reader = text.as_bytes();
    // `yes`, `n` and the like are the text they look like.
    let options = serde_saphyr::options! { strict_booleans: true, with_snippet: false };
    for (at, root) in serde_saphyr::read_with_options::<_, Node>(&mut reader, options).enumerate() {
        let document = at + 1;
        let root = root.map_err(|error| Error {
            place: Place { document, line: error.location().map_or(0, |l| l.line()), field: String::new() },
            problem: Problem::Syntax(error.to_string()),
        })?;
        let mut reading = Reading { document, warnings: &mut file.warnings };
        let (service, name_at) = reading.resource(&root)?;
        if let Some(document) = defined.insert(service.name.clone(), document) {
            return Err(name_at.error(Problem::Duplicate { document }));
        }
        file.services.push(service);
    }
    Ok(file)
}

const VERSIONS: &str = "networkservicemesh.io/v1 or networkservicemesh.io/v1alpha1";

/// A document being read.
struct Reading<'w> {
    document: usize,
    warnings: &'w mut Vec<Warning>,
}

impl Reading<'_> {
    fn resource<'n>(&mut self, root: &'n Node) -> Result<(NetworkService, At<'n>), Error> {
        let root = At { document: self.document, node: root, field: String::new() };
        let mut top = root.fields()?;
        let version = top.required("apiVersion", VERSIONS)?;
        let v1 = match version.string()? {
            "networkservicemesh.io/v1" => true,
            "networkservicemesh.io/v1alpha1" => false,
            _ => return Err(version.wrong(VERSIONS)),
        };
        let kind = top.required("kind", "NetworkService")?;
        if kind.string()? != "NetworkService" {
            return Err(kind.wrong("NetworkService"));
        }
        let metadata = top.required("metadata", "metadata with a name")?;
        let mut meta = metadata.fields()?;
        let meta_name = meta.take("name");
        meta.ignore(OBJECT_META);
        meta.finish(OBJECT_META, "")?;
        let spec = top.take("spec");
        if !v1 {
            top.take("status");
        }
        top.finish("apiVersion, kind, metadata, spec", "")?;

        let mut service = NetworkService::default();
        let mut name = meta_name;
        if let Some(spec) = spec {
            let mut fields = spec.fields()?;
            if v1 {
                // registry.md 4.4: a name in the spec wins over the object's.
                name = fields.take("name").or(name);
                for id in items(fields.take("path_ids"))? {
                    service.path_ids.push(id.string()?.to_owned());
                }
            }
            if let Some(payload) = fields.take("payload") {
                service.payload = payload.string()?.to_owned();
                if !matches!(payload.string()?, "IP" | "ETHERNET") {
                    let text = format!(
                        "payload {:?} is neither IP nor ETHERNET: no wire carries it",
                        service.payload
                    );
                    self.warnings.push(payload.warning(text));
                }
            }
            let matches = fields.take("matches");
            fields.finish(if v1 { "name, payload, matches, path_ids" } else { "payload, matches" }, "")?;
            let mut written = vec![];
            for item in items(matches)? {
                let (m, old) = a_match(&item, v1)?;
                if m.routes.is_empty() && m.metadata.is_none() && !m.fallthrough {
                    self.warnings.push(item.warning("without a route this match selects nobody".to_owned()));
                }
                service.matches.push(m);
                written.push((item, old));
            }
            self.warn_of_old_rules(&service.matches, &written);
        }
        let name = name.ok_or_else(|| metadata.error(Problem::Missing { expected: "name" }))?;
        service.name = name.string()?.to_owned();
        if service.name.is_empty() {
            return Err(name.wrong("the name of the service"));
        }
        Ok((service, name))
    }

    /// Says where v0.2 would have chosen differently (registry.md 4.8): there (a) a match without
    /// candidates always fell through, except that (b) once a match with a source selector had
    /// applied, those without were skipped. Here the first match that applies decides, so without
    /// `fallthrough` both agree wherever (b) held, and differ where only (a) did.
    fn warn_of_old_rules(&mut self, matches: &[Match], written: &[(At<'_>, bool)]) {
        for (first, m) in matches.iter().enumerate() {
            if !written[first].1 {
                continue;
            }
            let Some((second, went_on)) = old_rules(matches, first) else { continue };
            let text = match (m.fallthrough, went_on) {
                (true, false) => format!(
                    "when this match finds no endpoint it falls through to match {}, which has no source selector; \
                     the old rule skipped such matches once one with a source selector had applied, so a chained \
                     request may now re-enter the chain: drop fallthrough or give match {0} a source selector",
                    second + 1
                ),
                (false, true) => format!(
                    "the old rule went on to match {} when this match found no endpoint; here the first match \
                     that applies decides: write networkservicemesh.io/v1 with fallthrough: true to keep the old \
                     choice (nsm convert does)",
                    second + 1
                ),
                _ => continue,
            };
            self.warnings.push(Warning { of_old_rules: true, ..written[first].0.warning(text) });
        }
    }
}

/// The next match that a client may have come to under the rules of v1alpha1 when the first one found no endpoint, and
/// whether it did.
fn old_rules(matches: &[Match], first: usize) -> Option<(usize, bool)> {
    let m = &matches[first];
    let mut later = matches.iter().enumerate().skip(first + 1);
    let (second, other) = later.find(|(_, other)| compatible(m, other))?;
    Some((second, m.source_selector.is_empty() || !other.source_selector.is_empty()))
}

/// Says in the words of v1 what a service that was written as v1alpha1 meant then (registry.md 4.8): where a match found
/// no endpoint, the next one was asked.
pub fn keep_old_choices(service: &mut NetworkService) {
    for first in 0..service.matches.len() {
        service.matches[first].fallthrough =
            old_rules(&service.matches, first).is_some_and(|(_, went_on)| went_on);
    }
}

/// What Kubernetes puts into `metadata`; only the name means something here.
const OBJECT_META: &str = "name, namespace, labels, annotations, generateName, uid, resourceVersion, generation, \
                           creationTimestamp, deletionTimestamp, deletionGracePeriodSeconds, ownerReferences, \
                           finalizers, managedFields, selfLink";

/// Whether some client's labels fit both source selectors, as far as literal values tell.
fn compatible(a: &Match, b: &Match) -> bool {
    a.source_selector
        .iter()
        .all(|(k, v)| b.source_selector.get(k).is_none_or(|w| v == w || v.contains("{{") || w.contains("{{")))
}

/// One item of `matches`, and whether it is written in the old spelling: it is in v1alpha1, and
/// wherever a `match` marker stands.
fn a_match(item: &At<'_>, v1: bool) -> Result<(Match, bool), Error> {
    let mut fields = item.fields()?;
    let marker = fields.take_even_null("match");
    let old = !v1 || marker.is_some();
    let (source, routes, known) = match (old, v1) {
        (false, _) => ("source_selector", "routes", "source_selector, routes, fallthrough, metadata"),
        (true, true) => ("sourceSelector", "route", "match, sourceSelector, route, fallthrough, metadata"),
        (true, false) => ("sourceSelector", "route", "match, sourceSelector, route"),
    };
    let mut nested = nested_fields(marker)?;
    let mut parsed = Match::default();
    if let Some(selector) = either(source, &mut fields, &mut nested)? {
        parsed.source_selector = a_selector(&selector)?;
    }
    for route in items(either(routes, &mut fields, &mut nested)?)? {
        parsed.routes.push(a_route(&route, old)?);
    }
    if v1 {
        if let Some(flag) = fields.take("fallthrough") {
            parsed.fallthrough = flag.boolean()?;
        }
        if let Some(metadata) = fields.take("metadata") {
            let mut inner = metadata.fields()?;
            let labels = inner.take("labels").map(|labels| a_selector(&labels)).transpose()?;
            inner.finish("labels", "")?;
            parsed.metadata = Some(Metadata { unknown: None, labels: labels.unwrap_or_default() });
        }
    }
    if let Some(nested) = nested {
        nested.finish("sourceSelector, route", IN_OLD_SPELLING)?;
    }
    fields.finish(known, if old { IN_OLD_SPELLING } else { IN_PRESENT_SPELLING })?;
    Ok((parsed, old))
}

fn a_route(item: &At<'_>, old: bool) -> Result<Destination, Error> {
    let mut fields = item.fields()?;
    let (selector, known) = match old {
        false => ("destination_selector", "destination_selector, weight"),
        true => ("destinationSelector", "destination, destinationSelector, weight"),
    };
    let marker = if old { fields.take_even_null("destination") } else { None };
    let mut nested = nested_fields(marker)?;
    let mut parsed = Destination::default();
    if let Some(selector) = either(selector, &mut fields, &mut nested)? {
        parsed.destination_selector = a_selector(&selector)?;
    }
    if let Some(weight) = either("weight", &mut fields, &mut nested)? {
        parsed.weight = weight.unsigned()?;
    }
    if let Some(nested) = nested {
        nested.finish("destinationSelector, weight", IN_OLD_SPELLING)?;
    }
    fields.finish(known, if old { IN_OLD_SPELLING } else { IN_PRESENT_SPELLING })?;
    Ok(parsed)
}

const IN_OLD_SPELLING: &str = "; this match is in the spelling of v1alpha1";
const IN_PRESENT_SPELLING: &str =
    "; the spelling of v1alpha1 is read in v1 only below or beside a `match:` key";

fn a_selector(at: &At<'_>) -> Result<Labels, Error> {
    let mut labels = Labels::new();
    for (key, value) in at.fields()?.into_all() {
        let text = value.string()?;
        Template::parse(text).map_err(|error| value.error(error.into()))?;
        labels.insert(key.to_owned(), text.to_owned());
    }
    Ok(labels)
}

/// The fields below a marker, if it holds any.
fn nested_fields<'n>(marker: Option<At<'n>>) -> Result<Option<Fields<'n>>, Error> {
    marker.filter(|m| m.node.value != Value::Null).map(|m| m.fields()).transpose()
}

/// A field that stands below a marker or beside it, but not both.
fn either<'n>(
    name: &'static str,
    beside: &mut Fields<'n>,
    below: &mut Option<Fields<'n>>,
) -> Result<Option<At<'n>>, Error> {
    let below = below.as_mut().and_then(|fields| fields.take(name));
    match (beside.take(name), below) {
        (Some(_), Some(below)) => Err(below.error(Problem::Twice)),
        (beside, below) => Ok(below.or(beside)),
    }
}

fn items(at: Option<At<'_>>) -> Result<Vec<At<'_>>, Error> {
    let Some(at) = at else { return Ok(Vec::new()) };
    let Value::List(nodes) = &at.node.value else { return Err(at.wrong("a list")) };
    let item = |(i, node)| At { document: at.document, node, field: format!("{}[{i}]", at.field) };
    Ok(nodes.iter().enumerate().map(item).collect())
}

/// A node and the way to it.
#[derive(Debug, Clone)]
struct At<'n> {
    document: usize,
    node: &'n Node,
    field: String,
}

impl<'n> At<'n> {
    fn fields(&self) -> Result<Fields<'n>, Error> {
        let Value::Map(pairs) = &self.node.value else { return Err(self.wrong("a mapping")) };
        let mut left = BTreeMap::new();
        for (key, node) in pairs {
            let separator = if self.field.is_empty() { "" } else { "." };
            let field = format!("{}{separator}{}", self.field, key.text);
            // Without a value of its own, a field's line is that of its key.
            let at = At { document: self.document, node, field };
            if left.insert(key.text.as_str(), (key.line, at.clone())).is_some() {
                return Err(at.error(Problem::Twice));
            }
        }
        Ok(Fields { at: self.clone(), left })
    }

    fn string(&self) -> Result<&'n str, Error> {
        match &self.node.value {
            Value::Text(text) => Ok(text),
            Value::Bool(_) | Value::Number(_) => Err(self.wrong("text (put it in quotes)")),
            _ => Err(self.wrong("text")),
        }
    }

    fn boolean(&self) -> Result<bool, Error> {
        if let Value::Bool(flag) = self.node.value { Ok(flag) } else { Err(self.wrong("true or false")) }
    }

    fn unsigned(&self) -> Result<u32, Error> {
        let number = if let Value::Number(text) = &self.node.value { text.parse().ok() } else { None };
        number.ok_or_else(|| self.wrong("a whole number from 0 to 4294967295"))
    }

    fn place(&self) -> Place {
        Place { document: self.document, line: self.node.line, field: self.field.clone() }
    }

    fn error(&self, problem: Problem) -> Error {
        Error { place: self.place(), problem }
    }

    fn wrong(&self, expected: impl Into<String>) -> Error {
        self.error(Problem::Wrong { expected: expected.into(), found: self.node.value.to_string() })
    }

    fn warning(&self, text: String) -> Warning {
        Warning { place: self.place(), text, of_old_rules: false }
    }
}

/// The fields of a mapping that were not read yet.
struct Fields<'n> {
    at: At<'n>,
    left: BTreeMap<&'n str, (u64, At<'n>)>,
}

impl<'n> Fields<'n> {
    /// A field; one without a value counts as absent, as in Kubernetes.
    fn take(&mut self, name: &str) -> Option<At<'n>> {
        self.take_even_null(name).filter(|at| at.node.value != Value::Null)
    }

    fn take_even_null(&mut self, name: &str) -> Option<At<'n>> {
        self.left.remove(name).map(|(_, at)| at)
    }

    fn required(&mut self, name: &str, expected: &'static str) -> Result<At<'n>, Error> {
        self.take(name).ok_or_else(|| {
            let mut place = self.at.place();
            place.field = name.to_owned();
            Error { place, problem: Problem::Missing { expected } }
        })
    }

    fn ignore(&mut self, names: &str) {
        self.left.retain(|name, _| names.split(", ").all(|ignored| ignored != *name));
    }

    fn into_all(self) -> impl Iterator<Item = (&'n str, At<'n>)> {
        self.left.into_iter().map(|(key, (_, at))| (key, at))
    }

    /// Refuses what is left over: the topmost line first.
    fn finish(self, known: &str, hint: &str) -> Result<(), Error> {
        let left = self.left.into_values().min_by_key(|(line, _)| *line);
        left.map_or(Ok(()), |(line, at)| {
            let problem = Problem::UnknownField { expected: known.to_owned(), hint: hint.to_owned() };
            Err(Error { place: Place { line, ..at.place() }, problem })
        })
    }
}

/// YAML as a tree that remembers lines.
#[derive(Debug, Clone, PartialEq)]
struct Node {
    line: u64,
    value: Value,
}

#[derive(Debug, Clone, PartialEq)]
enum Value {
    Null,
    Bool(bool),
    Number(String),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

#[derive(Debug, Clone, PartialEq)]
struct Key {
    line: u64,
    text: String,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Null => f.write_str("nothing"),
            Value::Bool(flag) => write!(f, "the boolean {flag}"),
            Value::Number(number) => write!(f, "the number {number}"),
            Value::Text(text) => write!(f, "{text:?}"),
            Value::List(_) => f.write_str("a list"),
            Value::Map(_) => f.write_str("a mapping"),
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self { line: spanned.referenced.line(), value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<String>::deserialize(deserializer)?;
        Ok(Self { line: spanned.referenced.line(), text: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("YAML")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, flag: bool) -> Result<Value, E> {
        Ok(Value::Bool(flag))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        Ok(Value::Number(number.to_string()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
        Ok(Value::Number(number.to_string()))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
        Ok(Value::Number(number.to_string()))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(Value::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(node) = items.next_element()? {
            list.push(node);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            map.push(entry);
        }
        Ok(Value::Map(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        matching::Policy,
        pb::registry::{NetworkServiceEndpoint, NetworkServiceLabels},
    };

    const SIBLINGS: &str = include_str!("../tests/fixtures/secure-intranet-siblings.yaml");
    const NESTED: &str = include_str!("../tests/fixtures/secure-intranet-nested.yaml");
    const PRESENT: &str = include_str!("../tests/fixtures/secure-intranet-present.yaml");
    const NAT: &str = include_str!("../tests/fixtures/cnf-nat-example.yaml");

    fn one(text: &str) -> NetworkService {
        let file = parse(text).expect("valid");
        assert_eq!(file.warnings, []);
        let [service] = <[_; 1]>::try_from(file.services).expect("one service");
        service
    }

    /// Follows the chain: each function asks for the same service with the label it offers.
    fn chain(service: &NetworkService, apps: &[&str]) -> Vec<String> {
        let labels = |app: &str| Labels::from([("app".to_owned(), app.to_owned())]);
        let endpoint = |app: &&str| NetworkServiceEndpoint {
            name: (*app).to_owned(),
            network_service_labels: [(
                service.name.clone(),
                NetworkServiceLabels { unknown: None, labels: labels(app) },
            )]
            .into(),
            ..Default::default()
        };
        let endpoints: Vec<_> = apps.iter().map(endpoint).collect();
        let policy = Policy::strict(service).expect("no templates");
        let (mut hops, mut client) = (vec![], Labels::new());
        while let [next] = policy.endpoints(&client, &endpoints).candidates[..] {
            hops.push(next.name.clone());
            // The gateway ends the chain: it asks for nothing.
            if next.name == "vpn-gateway" {
                break;
            }
            client = labels(&next.name);
        }
        hops
    }

    #[test]
    fn every_spelling_of_the_secure_intranet_selects_the_same_chain() {
        let siblings = one(SIBLINGS);
        assert_eq!(siblings, one(PRESENT));
        assert_eq!(siblings, one(NESTED));
        // the nested form of either version, and v1alpha1 without its empty markers
        assert_eq!(siblings, one(&NESTED.replace("io/v1\n", "io/v1alpha1\n")));
        let bare = SIBLINGS.replace("  - match:\n    sourceSelector", "  - sourceSelector");
        let bare = bare.replace("- destination:\n      destinationSelector", "- destinationSelector");
        let bare = bare.replace("  - match:\n    route", "  - route");
        assert!(!bare.contains("match:") && !bare.contains("destination:"));
        assert_eq!(siblings, one(&bare));
        let all = ["vpn-gateway", "passthrough-2", "firewall", "passthrough-1", "passthrough-3"];
        assert_eq!(
            chain(&siblings, &all),
            ["firewall", "passthrough-1", "passthrough-2", "passthrough-3", "vpn-gateway"]
        );
        // a missing stage stops the chain; it never re-enters at the default match
        assert_eq!(chain(&siblings, &["firewall", "vpn-gateway"]), ["firewall"]);
        assert_eq!(
            (siblings.name.as_str(), siblings.payload.as_str()),
            ("secure-intranet-connectivity", "IP")
        );
    }

    #[test]
    fn the_nat_example_selects_its_chain() {
        let service = one(NAT);
        let next = |app: &str| {
            let m = service.matches.iter().find(|m| m.source_selector["app"] == app).expect("a match");
            m.routes[0].destination_selector["app"].clone()
        };
        assert_eq!((next("client").as_str(), next("nat44").as_str()), ("nat44", "webserver"));
    }

    #[test]
    fn a_file_may_hold_several_documents() {
        let file = parse(&format!("---\n{SIBLINGS}---\n\n---\n{NAT}---\n# only a comment\n")).expect("valid");
        let names: Vec<_> = file.services.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["secure-intranet-connectivity", "cnf-nat-example"]);
        assert_eq!(parse("").expect("empty"), File::default());
    }

    #[test]
    fn the_present_form_is_read_whole() {
        let service = one("apiVersion: networkservicemesh.io/v1
kind: NetworkService
metadata:
  name: object-name
  namespace: team-a
  labels: {any: thing}
  annotations: {kubectl.kubernetes.io/last-applied-configuration: '{}'}
spec:
  name: web
  payload: ETHERNET
  path_ids: [spiffe://a/b]
  matches:
  - source_selector: {role: filter}
    fallthrough: true
    routes:
    - destination_selector: {role: gateway, nodeName: '{{.nodeName}}'}
      weight: 3
    metadata: {labels: {fast: 'true'}}
  - metadata:
    fallthrough: true
  - metadata: {}
  - routes: [{}]
    source_selector:
");
        assert_eq!((service.name.as_str(), service.payload.as_str()), ("web", "ETHERNET"));
        assert_eq!(service.path_ids, ["spiffe://a/b"]);
        let m = &service.matches[0];
        assert!(m.fallthrough && m.routes[0].weight == 3 && m.routes[0].destination_selector.len() == 2);
        assert_eq!(m.metadata.as_ref().expect("metadata").labels["fast"], "true");
        let metadata: Vec<_> = service.matches.iter().map(|m| m.metadata.is_some()).collect();
        assert_eq!(metadata, [true, false, true, false]);
        // v1 may add its own fields to a match of the old spelling
        let mixed = one("apiVersion: networkservicemesh.io/v1
kind: NetworkService
metadata: {name: mixed}
spec: {payload: IP, matches: [{match: , sourceSelector: {a: b}, fallthrough: true, metadata: {labels: {c: d}}}]}
");
        assert!(mixed.matches[0].fallthrough && mixed.matches[0].metadata.is_some());
    }

    #[test]
    fn every_error_names_document_line_field_and_what_was_expected() {
        let v1 = |spec: &str| {
            format!(
                "apiVersion: networkservicemesh.io/v1\nkind: NetworkService\nmetadata: {{name: n}}\nspec:\n{spec}"
            )
        };
        let old = |spec: &str| v1(spec).replace("io/v1\n", "io/v1alpha1\n");
        let table = [
            ("a: [".to_owned(), "document 1, line "),
            ("- a".to_owned(), "document 1, line 1: expected a mapping, found a list"),
            (
                "kind: NetworkService".to_owned(),
                "document 1, line 1, apiVersion: missing; expected networkservicemesh.io/v1 or",
            ),
            (
                "apiVersion: networkservicemesh.io/v2".to_owned(),
                "line 1, apiVersion: expected networkservicemesh.io/v1 or networkservicemesh.io/v1alpha1, found \"networkservicemesh.io/v2\"",
            ),
            (
                "apiVersion: v1\nkind: Pod".to_owned(),
                "line 1, apiVersion: expected networkservicemesh.io/v1 or",
            ),
            (
                "apiVersion: networkservicemesh.io/v1\nkind: NetworkServiceEndpoint".to_owned(),
                "line 2, kind: expected NetworkService, found \"NetworkServiceEndpoint\"",
            ),
            (
                "apiVersion: networkservicemesh.io/v1\nkind: NetworkService".to_owned(),
                "metadata: missing; expected metadata with a name",
            ),
            (
                "apiVersion: networkservicemesh.io/v1\nkind: NetworkService\nmetadata: {namespace: x}"
                    .to_owned(),
                "line 3, metadata: missing; expected name",
            ),
            (
                "apiVersion: networkservicemesh.io/v1\nkind: NetworkService\nmetadata: {name: ''}".to_owned(),
                "line 3, metadata.name: expected the name of the service, found \"\"",
            ),
            (
                "apiVersion: networkservicemesh.io/v1\nkind: NetworkService\nmetadata: {nam: x}".to_owned(),
                "line 3, metadata.nam: unknown field; expected name, namespace",
            ),
            (
                v1("  payload: IP\nstatus: {}"),
                "line 6, status: unknown field; expected apiVersion, kind, metadata, spec",
            ),
            (
                v1("  payload: 4"),
                "line 5, spec.payload: expected text (put it in quotes), found the number 4",
            ),
            (v1("  payload: IP\n  payload: IP"), "line 6"),
            (
                v1("  Payload: IP"),
                "line 5, spec.Payload: unknown field; expected name, payload, matches, path_ids",
            ),
            (v1("  matches: {}"), "line 5, spec.matches: expected a list, found a mapping"),
            (
                v1("  matches:\n  - sourceSelector: {a: b}"),
                "line 6, spec.matches[0].sourceSelector: unknown field; expected source_selector, routes, fallthrough, metadata; the spelling of v1alpha1 is read in v1 only below or beside a `match:` key",
            ),
            (v1("  matches:\n  - route: []"), "line 6, spec.matches[0].route: unknown field"),
            (
                v1("  matches:\n  - match: [a]"),
                "line 6, spec.matches[0].match: expected a mapping, found a list",
            ),
            (
                v1("  matches:\n  - match:\n      source_selector: {a: b}"),
                "line 7, spec.matches[0].match.source_selector: unknown field; expected sourceSelector, route; this match is in the spelling of v1alpha1",
            ),
            (
                v1("  matches:\n  - match:\n      sourceSelector: {a: b}\n    sourceSelector: {a: b}"),
                "line 7, spec.matches[0].match.sourceSelector: given twice",
            ),
            (
                v1("  matches:\n  - fallthrough: 'true'"),
                "line 6, spec.matches[0].fallthrough: expected true or false, found \"true\"",
            ),
            (
                v1("  matches:\n  - source_selector: {a: 1}"),
                "line 6, spec.matches[0].source_selector.a: expected text (put it in quotes), found the number 1",
            ),
            (
                v1("  matches:\n  - source_selector: {a: true}"),
                "spec.matches[0].source_selector.a: expected text (put it in quotes), found the boolean true",
            ),
            (
                v1("  matches:\n  - source_selector: {a: }"),
                "spec.matches[0].source_selector.a: expected text, found nothing",
            ),
            (
                v1(
                    "  matches:\n  - routes:\n    - destination_selector:\n        a: b\n        c: '{{if .x}}'",
                ),
                "line 9, spec.matches[0].routes[0].destination_selector.c: template \"{{if .x}}\" is not supported",
            ),
            (
                v1("  matches:\n  - routes:\n    - {weight: -1}"),
                "line 7, spec.matches[0].routes[0].weight: expected a whole number from 0 to 4294967295, found the number -1",
            ),
            (v1("  matches:\n  - routes:\n    - {weight: 1.5}"), "found the number 1.5"),
            (
                v1("  matches:\n  - routes:\n    - {destination: }"),
                "spec.matches[0].routes[0].destination: unknown field; expected destination_selector, weight",
            ),
            (
                v1("  matches:\n  - metadata: {label: {}}"),
                "spec.matches[0].metadata.label: unknown field; expected labels",
            ),
            (
                old("  matches:\n  - source_selector: {a: b}"),
                "line 6, spec.matches[0].source_selector: unknown field; expected match, sourceSelector, route; this match is in the spelling of v1alpha1",
            ),
            (
                old("  matches:\n  - fallthrough: true"),
                "spec.matches[0].fallthrough: unknown field; expected match, sourceSelector, route",
            ),
            (old("  name: x"), "line 5, spec.name: unknown field; expected payload, matches"),
            (
                old("  matches:\n  - route:\n    - destination:\n        destination_selector: {a: b}"),
                "line 8, spec.matches[0].route[0].destination.destination_selector: unknown field; expected destinationSelector, weight",
            ),
            (
                format!("{SIBLINGS}---\n{NAT}---\n{PRESENT}"),
                "document 3, line 51, metadata.name: document 1 of this file already defines",
            ),
        ];
        for (text, expected) in table {
            let error = parse(&text).expect_err(&text).to_string();
            assert!(error.contains(expected), "{text}\n-- gives --\n{error}\n-- not --\n{expected}");
        }
    }

    #[test]
    fn warnings_tell_where_the_old_rules_chose_differently() {
        let file = |version: &str, matches: &str| {
            let text = format!(
                "apiVersion: networkservicemesh.io/{version}\nkind: NetworkService\nmetadata: {{name: n}}\nspec: {{payload: IP, matches: [{matches}]}}"
            );
            let warnings = parse(&text).expect("valid").warnings;
            warnings.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        // (b) and the present rule agree: a chain and its default match
        assert!(
            file(
                "v1alpha1",
                "{sourceSelector: {a: b}, route: [{}]}, {sourceSelector: {a: c}, route: [{}]}, {route: [{}]}"
            )
            .is_empty()
        );
        // (a) alone: two matches that one client's labels fit
        let both =
            file("v1alpha1", "{sourceSelector: {a: b}, route: [{}]}, {sourceSelector: {c: d}, route: [{}]}");
        assert!(
            both[0].contains("document 1, line 4, spec.matches[0]: the old rule went on to match 2"),
            "{both:?}"
        );
        assert_eq!(file("v1alpha1", "{route: [{}]}, {sourceSelector: {c: d}, route: [{}]}").len(), 1);
        // (b): a default match behind a fall-through, in the nested spelling of v1
        let again =
            file("v1", "{match: {sourceSelector: {a: b}}, fallthrough: true}, {match: {route: [{}]}}");
        assert!(again[0].contains("the old rule skipped such matches"), "{again:?}");
        // the present spelling never had these rules
        assert!(file("v1", "{source_selector: {a: b}, fallthrough: true}, {routes: [{}]}").is_empty());
        assert!(file("v1", "{}")[0].contains("selects nobody"));
        // a payload that no wire carries
        let odd = parse(
            "apiVersion: networkservicemesh.io/v1\nkind: NetworkService\nmetadata: {name: n}\nspec: {payload: Ethernet}",
        );
        assert!(odd.expect("valid").warnings[0].text.contains("neither IP nor ETHERNET"));
    }

    #[test]
    fn hostile_yaml_is_refused_not_expanded() {
        let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: [*f,*f,*f,*f,*f,*f,*f,*f,*f]";
        assert!(matches!(parse(bomb).expect_err("refused").problem, Problem::Syntax(_)));
        assert!(parse(&"[".repeat(100_000)).is_err());
        assert!(parse("\u{0}\u{1}").is_err());
    }
}
