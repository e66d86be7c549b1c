//! Who may serve whom: the matches of a network service applied to labels.
//!
//! A [`Policy`] is a service's matches, compiled once. It answers two questions for a client's
//! labels: which endpoints may serve it ([`Policy::endpoints`]) and which forwarders may carry it
//! ([`Policy::forwarders`]). Both answers also say *why* (`Display` of [`Selection`]), because
//! "no candidates" is the error a user meets first. Rules: spec/registry.md 6.2–6.4 and
//! control-plane.md 8.1, 8.4.
//!
//! Selector values may be templates over the client's labels. Supported are `{{.key}}`,
//! `{{index . "a.b/c"}}` and literal text; everything deployed uses only these.
//!
//! ```
//! use nsm_api::{matching::Policy, pb::registry::*};
//! let labels = |l: &[(&str, &str)]| l.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
//! let service = NetworkService {
//!     name: "web".into(),
//!     matches: vec![Match {
//!         routes: vec![Destination {
//!             destination_selector: labels(&[("node", "{{.node}}")]),
//!             ..Default::default()
//!         }],
//!         ..Default::default()
//!     }],
//!     ..Default::default()
//! };
//! let near = NetworkServiceEndpoint {
//!     name: "near".into(),
//!     network_service_labels: [(
//!         "web".into(),
//!         NetworkServiceLabels { labels: labels(&[("node", "n1")]), ..Default::default() },
//!     )].into(),
//!     ..Default::default()
//! };
//! let policy = Policy::strict(&service)?;
//! let (client, endpoints) = (labels(&[("node", "n1")]), [near]);
//! assert_eq!(policy.endpoints(&client, &endpoints).candidates.len(), 1);
//! # Ok::<(), nsm_api::matching::TemplateError>(())
//! ```

use std::{borrow::Borrow, collections::BTreeMap, fmt};

use crate::pb::registry::{NetworkService, NetworkServiceEndpoint};

/// Labels of a client, an endpoint or a forwarder.
pub type Labels = BTreeMap<String, String>;

/// The forwarder labels that a match without `metadata` asks for (spec/registry.md 6.4).
pub const DEFAULT_FORWARDER_LABEL: (&str, &str) = ("p2p", "true");

/// The matches of one network service, compiled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    service: String,
    rules: Vec<Rule>,
}

impl Policy {
    /// Compiles the matches of a service that an operator wrote.
    ///
    /// # Errors
    /// The first selector value that is a template of a kind this mesh does not evaluate.
    pub fn strict(service: &NetworkService) -> Result<Self, TemplateError> {
        Self::compile(service, Template::parse)
    }

    /// Compiles the matches of a service that came over the wire. A template that is not supported
    /// stands for its own text, as a faulty one does upstream.
    #[must_use]
    pub fn lenient(service: &NetworkService) -> Self {
        let compiled = Self::compile::<std::convert::Infallible>(service, |text| {
            Ok(Template::parse(text).unwrap_or_else(|_| Template::literal(text)))
        });
        match compiled {
            Ok(policy) => policy,
        }
    }

    /// The name of the service.
    #[must_use]
    pub fn service(&self) -> &str {
        &self.service
    }

    /// The endpoints, out of `seen`, that may serve a client with these labels: route by route, so
    /// that one which fits two routes appears twice (spec/registry.md 6.2). Expired endpoints are
    /// the caller's to drop beforehand.
    pub fn endpoints<'a, E>(&'a self, client: &'a Labels, seen: &'a [E]) -> Selection<'a, E>
    where
        E: Borrow<NetworkServiceEndpoint>,
    {
        self.select(client, seen, None, |rule| {
            if rule.metadata.is_some() && rule.routes.is_empty() && !rule.fallthrough {
                return Found { unrestricted: true, ..Found::alike(seen.iter().collect()) };
            }
            let mut found = Found::alike(Vec::new());
            for (route, weight) in rule.routes.iter().zip(&rule.weights) {
                let before = found.who.len();
                found.who.extend(seen.iter().filter(|e| {
                    let labels = labels_for((*e).borrow(), &self.service);
                    route.fits(labels.unwrap_or(&NO_LABELS), client)
                }));
                let fit = found.who.len() - before;
                found.shares.extend(std::iter::repeat_n(f64::from(*weight) / fit.max(1) as f64, fit));
            }
            found
        })
    }

    /// The forwarders, out of `seen`, that may carry a client with these labels (spec/registry.md
    /// 6.4). `forwarder_service` is the service that forwarders register under.
    pub fn forwarders<'a, E>(
        &'a self,
        client: &'a Labels,
        forwarder_service: &'a str,
        seen: &'a [E],
    ) -> Selection<'a, E>
    where
        E: Borrow<NetworkServiceEndpoint>,
    {
        let default = Selector::forwarders();
        self.select(client, seen, Some(forwarder_service), |rule| {
            let wanted = rule.metadata.as_ref().filter(|labels| !labels.0.is_empty()).unwrap_or(&default);
            let fits =
                |e: &&E| labels_for((*e).borrow(), forwarder_service).is_some_and(|l| wanted.fits(l, client));
            Found::alike(seen.iter().filter(fits).collect())
        })
    }

    fn compile<E>(
        service: &NetworkService,
        mut template: impl FnMut(&str) -> Result<Template, E>,
    ) -> Result<Self, E> {
        let mut selector = |labels: &Labels| {
            let pairs = labels.iter().map(|(k, v)| Ok((k.clone(), template(v)?)));
            pairs.collect::<Result<Vec<_>, E>>().map(Selector)
        };
        let mut rules = Vec::with_capacity(service.matches.len());
        for m in &service.matches {
            let routes = m.routes.iter().map(|route| selector(&route.destination_selector));
            rules.push(Rule {
                routes: routes.collect::<Result<_, E>>()?,
                weights: m.routes.iter().map(|route| route.weight).collect(),
                source: selector(&m.source_selector)?,
                fallthrough: m.fallthrough,
                metadata: m.metadata.as_ref().map(|meta| selector(&meta.labels)).transpose()?,
            });
        }
        Ok(Self { service: service.name.clone(), rules })
    }

    /// The walk that both questions share: the first match that applies decides, unless it finds
    /// nobody and falls through.
    fn select<'a, E>(
        &'a self,
        client: &'a Labels,
        seen: &'a [E],
        forwarders_of: Option<&'a str>,
        find: impl Fn(&'a Rule) -> Found<'a, E>,
    ) -> Selection<'a, E> {
        let mut selection = Selection {
            candidates: Vec::new(),
            shares: Vec::new(),
            tried: Vec::new(),
            policy: self,
            client,
            seen,
            forwarders_of,
        };
        if self.rules.is_empty() {
            selection.candidates = seen.iter().collect();
            return selection;
        }
        for rule in &self.rules {
            if !rule.source.fits(client, client) {
                selection.tried.push(Verdict::SourceDiffers);
                continue;
            }
            let found = find(rule);
            selection.tried.push(match found.who.len() {
                _ if found.unrestricted => Verdict::Unrestricted,
                0 if rule.fallthrough => Verdict::FellThrough,
                0 => Verdict::Nobody,
                count => Verdict::Selected(count),
            });
            (selection.candidates, selection.shares) = (found.who, found.shares);
            if selection.tried.last() != Some(&Verdict::FellThrough) {
                break;
            }
        }
        selection
    }
}

/// Whom one match finds.
struct Found<'a, E> {
    who: Vec<&'a E>,
    shares: Vec<f64>,
    unrestricted: bool,
}

impl<'a, E> Found<'a, E> {
    /// Each is as good as the other.
    fn alike(who: Vec<&'a E>) -> Self {
        Self { who, shares: Vec::new(), unrestricted: false }
    }
}

/// What a [`Policy`] chose, and why: `Display` names the service, the labels tried, each match with
/// what became of it, and, if nobody was chosen, who was there.
#[derive(Debug, Clone)]
pub struct Selection<'a, E> {
    /// Who was chosen, in the order in which to try them.
    pub candidates: Vec<&'a E>,
    /// What became of the first matches of the service, in order; empty if it has none.
    pub tried: Vec<Verdict>,
    /// Of each candidate, its part of its route's weight; empty: all are alike.
    shares: Vec<f64>,
    policy: &'a Policy,
    client: &'a Labels,
    seen: &'a [E],
    forwarders_of: Option<&'a str>,
}

impl<E> Selection<'_, E> {
    /// The place, counted from 0, of the match that decided; `None` if the service has no matches
    /// or none applied.
    #[must_use]
    pub fn decided_by(&self) -> Option<usize> {
        let last = self.tried.len().checked_sub(1)?;
        (!matches!(self.tried[last], Verdict::SourceDiffers | Verdict::FellThrough)).then_some(last)
    }

    /// In which order to try the candidates for the `turn`th wire. Without weights each is the first in turn. With
    /// weights a route's candidates are the first as often as its weight says, well mixed, and those of a route without
    /// one only follow (upstream ignores weights: spec/control-plane.md 18, defect 11).
    #[must_use]
    pub fn order(&self, turn: usize) -> Vec<&E> {
        let count = self.candidates.len();
        if count == 0 {
            return Vec::new();
        }
        let sum: f64 = self.shares.iter().sum();
        let alike = self.shares.iter().all(|share| *share == self.shares[0]);
        let first = if alike {
            turn % count
        } else {
            // Multiples of the golden ratio are spread evenly, however many one looks at.
            const GOLDEN: f64 = 0.618_033_988_749_894_8;
            let mut at = ((turn % (1 << 24)) as f64 * GOLDEN).fract() * sum;
            let hit = self.shares.iter().position(|share| {
                at -= share;
                at < 0.0
            });
            hit.unwrap_or_default()
        };
        let mut order: Vec<usize> = (0..count).map(|i| (first + i) % count).collect();
        if !alike {
            order.sort_by_key(|&i| self.shares[i] == 0.0);
        }
        order.into_iter().map(|i| self.candidates[i]).collect()
    }

    /// Why somebody who was seen is a candidate, or is not.
    #[must_use]
    pub fn reason(&self, e: &E) -> (bool, String)
    where
        E: Borrow<NetworkServiceEndpoint>,
    {
        let chosen = self.candidates.iter().any(|c| std::ptr::eq(*c, e));
        let Some(at) = self.decided_by() else {
            let why = match self.tried.is_empty() {
                true => "the service has no matches: anybody may serve",
                false => "no match of the service applies to the client's labels",
            };
            return (chosen, why.to_owned());
        };
        let rule = &self.policy.rules[at];
        let labels =
            labels_for(e.borrow(), self.forwarders_of.unwrap_or(&self.policy.service)).unwrap_or(&NO_LABELS);
        let default;
        let wanted: Vec<&Selector> = match self.forwarders_of {
            None => rule.routes.iter().collect(),
            Some(_) => match rule.metadata.as_ref().filter(|m| !m.0.is_empty()) {
                Some(metadata) => vec![metadata],
                None => {
                    default = Selector::forwarders();
                    vec![&default]
                }
            },
        };
        let texts = |found: Vec<String>| found.into_iter().take(4).collect::<Vec<_>>().join("; ");
        let why = match chosen {
            true if self.tried[at] == Verdict::Unrestricted => "it selects forwarders only".to_owned(),
            true => {
                let fit = wanted.iter().filter(|w| w.fits(labels, self.client));
                texts(fit.map(|w| format!("labels fit {w}")).collect())
            }
            false => texts(wanted.iter().filter_map(|w| w.misfit(labels, self.client)).collect()),
        };
        let why = if why.is_empty() { "it has no route".to_owned() } else { why };
        (chosen, format!("match {}: {why}", at + 1))
    }
}

/// What became of one match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The source selector does not fit the client's labels.
    SourceDiffers,
    /// It applied, nobody fits, and it says `fallthrough`.
    FellThrough,
    /// It applied and nobody fits: the answer is empty, later matches are not tried.
    Nobody,
    /// It applied and chose this many.
    Selected(usize),
    /// It applied and selects forwarders only, so every endpoint may serve.
    Unrestricted,
}

impl<E: Borrow<NetworkServiceEndpoint>> fmt::Display for Selection<'_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.forwarders_of.is_some() { "forwarder" } else { "endpoint" };
        write!(f, "network service {:?} for labels {}: ", self.policy.service, Brief(self.client.iter()))?;
        if self.tried.is_empty() {
            write!(f, "it has no matches, so every {what} may serve")?;
        }
        let skip = self.tried.len().saturating_sub(LISTED);
        if skip > 0 {
            write!(f, "{skip} matches before did not decide; ")?;
        }
        for (at, (rule, verdict)) in self.policy.rules.iter().zip(&self.tried).enumerate().skip(skip) {
            let separator = if at == skip { "" } else { "; " };
            write!(f, "{separator}match {} {}", at + 1, rule.source)?;
            let wanted = || match self.forwarders_of {
                Some(_) => match rule.metadata.as_ref().filter(|m| !m.0.is_empty()) {
                    Some(labels) => labels.to_string(),
                    None => format!("{{{}={}}}", DEFAULT_FORWARDER_LABEL.0, DEFAULT_FORWARDER_LABEL.1),
                },
                None => {
                    let routes: Vec<_> = rule.routes.iter().take(LISTED).map(ToString::to_string).collect();
                    if routes.is_empty() { "no route".to_owned() } else { routes.join(" or ") }
                }
            };
            match verdict {
                Verdict::SourceDiffers => write!(f, " does not apply")?,
                Verdict::FellThrough => write!(f, " wants {}, nobody fits, falls through", wanted())?,
                Verdict::Nobody => write!(f, " wants {}, nobody fits", wanted())?,
                Verdict::Selected(n) => write!(f, " wants {}, {n} {what}(s) fit", wanted())?,
                Verdict::Unrestricted => write!(f, " leaves endpoints unrestricted")?,
            }
        }
        if !self.candidates.is_empty() {
            return Ok(());
        }
        if self.tried.last().is_some_and(|v| matches!(v, Verdict::SourceDiffers | Verdict::FellThrough)) {
            write!(f, "; no match is left")?;
        }
        write!(f, "; {what}s seen: ")?;
        if self.seen.is_empty() {
            return write!(f, "none");
        }
        let service = self.forwarders_of.unwrap_or(&self.policy.service);
        for (at, e) in self.seen.iter().take(LISTED).enumerate() {
            let e = e.borrow();
            let labels = labels_for(e, service).unwrap_or(&NO_LABELS);
            write!(f, "{}{} {}", if at == 0 { "" } else { ", " }, cut(&e.name), Brief(labels.iter()))?;
        }
        match self.seen.len().saturating_sub(LISTED) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// Labels that somebody must have. Each value is a [`Template`] over the client's labels.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selector(Vec<(String, Template)>);

impl Selector {
    /// Whether `labels` have what this selector asks for, with `client` as the variables of its
    /// templates. A missing label counts as an empty one, but as upstream, fewer labels than the
    /// selector has never fit.
    #[must_use]
    pub fn fits(&self, labels: &Labels, client: &Labels) -> bool {
        labels.len() >= self.0.len()
            && self.0.iter().all(|(key, wanted)| {
                let have = labels.get(key).map_or("", String::as_str);
                have == wanted.raw || wanted.expands_to(have, client)
            })
    }

    /// Why `labels` do not fit, in words; `None`: they do.
    #[must_use]
    pub fn misfit(&self, labels: &Labels, client: &Labels) -> Option<String> {
        if self.fits(labels, client) {
            return None;
        }
        let differs = self.0.iter().find(|(key, wanted)| {
            let have = labels.get(key).map_or("", String::as_str);
            have != wanted.raw && !wanted.expands_to(have, client)
        });
        Some(match differs {
            None => format!("it has {} labels, the selector {}", labels.len(), self.0.len()),
            Some((key, wanted)) => {
                let (have, key, wanted) = (labels.get(key), cut(key), wanted.expand(client));
                match have {
                    Some(have) => format!("label {key} is {:?}, not {:?}", cut(have), cut(&wanted)),
                    None => format!("it has no label {key}={}", cut(&wanted)),
                }
            }
        })
    }

    /// What forwarders must have where a match says nothing of them.
    fn forwarders() -> Self {
        let (key, value) = DEFAULT_FORWARDER_LABEL;
        Self(vec![(key.to_owned(), Template::literal(value))])
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Brief(self.0.iter().map(|(k, v)| (k, &v.raw))).fmt(f)
    }
}

/// A selector's value, parsed: literal text and references to the client's labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    raw: String,
    /// Empty for text without references.
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    /// `{{.key}}`: a missing key prints `<no value>`.
    Field(String),
    /// `{{index . "key"}}`: a missing key is empty.
    Index(String),
}

impl Template {
    /// Parses the supported part of Go's text/template.
    ///
    /// # Errors
    /// Anything else between `{{` and `}}`.
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, action)) = rest.split_once("{{") {
            if !before.is_empty() {
                parts.push(Part::Text(before.to_owned()));
            }
            let (part, after) = action_of(action)
                .map_err(|problem| TemplateError { template: cut(text).to_string(), problem })?;
            parts.push(part);
            rest = after;
        }
        if !parts.is_empty() && !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        Ok(Self { raw: text.to_owned(), parts })
    }

    /// Text that stands for itself.
    #[must_use]
    pub fn literal(text: &str) -> Self {
        Self { raw: text.to_owned(), parts: Vec::new() }
    }

    /// The text with the client's labels in place of its references.
    #[must_use]
    pub fn expand(&self, client: &Labels) -> String {
        if self.parts.is_empty() {
            return self.raw.clone();
        }
        self.parts.iter().map(|part| part.expand(client)).collect()
    }

    fn expands_to(&self, text: &str, client: &Labels) -> bool {
        let mut rest = Some(text);
        for part in &self.parts {
            rest = rest.and_then(|rest| rest.strip_prefix(part.expand(client)));
        }
        !self.parts.is_empty() && rest == Some("")
    }
}

impl Part {
    fn expand<'a>(&'a self, client: &'a Labels) -> &'a str {
        match self {
            Part::Text(text) => text,
            Part::Field(key) => client.get(key).map_or("<no value>", String::as_str),
            Part::Index(key) => client.get(key).map_or("", String::as_str),
        }
    }
}

/// A selector value that is a template of a kind this mesh does not evaluate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "template {template:?} is not supported: {problem}; what is: {{{{.key}}}}, {{{{index . \"a.b/c\"}}}} and literal text"
)]
pub struct TemplateError {
    template: String,
    problem: &'static str,
}

/// Whether a stored service answers a query (spec/registry.md 2.2). What the query leaves empty
/// matches everything.
#[must_use]
pub fn service_answers(query: &NetworkService, stored: &NetworkService) -> bool {
    (query.name.is_empty() || query.name == stored.name)
        && (query.payload.is_empty() || query.payload == stored.payload)
        && (query.matches.is_empty() || query.matches == stored.matches)
}

/// Whether a stored endpoint answers a query (spec/registry.md 2.2): names are equal, service names
/// and labels are included, the URL is a *substring* (managers rely on it), the expiration time is
/// compared in whole seconds, and a stored endpoint without one does not answer a query with one.
#[must_use]
pub fn endpoint_answers(query: &NetworkServiceEndpoint, stored: &NetworkServiceEndpoint) -> bool {
    let labels_included = || {
        query.network_service_labels.iter().all(|(service, wanted)| {
            stored
                .network_service_labels
                .get(service)
                .is_some_and(|have| wanted.labels.iter().all(|(k, v)| have.labels.get(k) == Some(v)))
        })
    };
    (query.name.is_empty() || query.name == stored.name)
        && stored.url.contains(&query.url)
        && query.network_service_names.iter().all(|name| stored.network_service_names.contains(name))
        && query
            .expiration_time
            .as_ref()
            .is_none_or(|time| stored.expiration_time.as_ref().is_some_and(|s| s.seconds == time.seconds))
        && labels_included()
}

/// The labels an endpoint has for a service; `None` if it has no entry for it.
#[must_use]
pub fn labels_for<'a>(endpoint: &'a NetworkServiceEndpoint, service: &str) -> Option<&'a Labels> {
    endpoint.network_service_labels.get(service).map(|entry| &entry.labels)
}

/// One match of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    source: Selector,
    routes: Vec<Selector>,
    /// Of each route.
    weights: Vec<u32>,
    fallthrough: bool,
    /// Labels of the forwarder; present but empty differs from absent in
    /// [`Policy::endpoints`] only.
    metadata: Option<Selector>,
}

static NO_LABELS: Labels = Labels::new();

/// How many things an explanation lists: labels and names come from strangers.
const LISTED: usize = 16;

/// Parses what follows `{{`, up to and including `}}`.
fn action_of(text: &str) -> Result<(Part, &str), &'static str> {
    const OTHER: &str = "it is neither a label's name nor an index by a quoted string";
    let text = text.trim_start_matches(SPACE);
    if let Some(field) = text.strip_prefix('.') {
        let end = field.find(|c: char| c != '_' && !c.is_alphanumeric()).unwrap_or(field.len());
        let (key, rest) = field.split_at(end);
        if key.is_empty() || key.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(OTHER);
        }
        let rest = closing(rest).ok_or(
            "after a label's name only }} may follow (a key with dots, dashes or slashes needs the index form)",
        )?;
        return Ok((Part::Field(key.to_owned()), rest));
    }
    let dot = text.strip_prefix("index").and_then(|t| t.strip_prefix(SPACE)).ok_or(OTHER)?;
    let dot = dot.trim_start_matches(SPACE).strip_prefix('.').ok_or(OTHER)?;
    let quoted = dot.trim_start_matches(SPACE);
    let (key, rest) = quoted_string(quoted)?;
    let rest = closing(rest).ok_or("after the index only }} may follow")?;
    Ok((Part::Index(key), rest))
}

/// What Go's template lexer skips inside an action.
const SPACE: [char; 4] = [' ', '\t', '\r', '\n'];

fn closing(text: &str) -> Option<&str> {
    text.trim_start_matches(SPACE).strip_prefix("}}")
}

fn quoted_string(text: &str) -> Result<(String, &str), &'static str> {
    const OPEN: &str = "the index needs a quoted string";
    if let Some(raw) = text.strip_prefix('`') {
        let (key, rest) = raw.split_once('`').ok_or(OPEN)?;
        return Ok((key.to_owned(), rest));
    }
    let body = text.strip_prefix('"').ok_or(OPEN)?;
    let mut key = String::new();
    let mut chars = body.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((key, &body[at + 1..])),
            '\\' => match chars.next() {
                Some((_, c @ ('"' | '\\'))) => key.push(c),
                _ => return Err("only \\\" and \\\\ are escapes of the index's string"),
            },
            '\n' => return Err(OPEN),
            c => key.push(c),
        }
    }
    Err(OPEN)
}

/// At most 64 characters of a text that a stranger chose.
fn cut(text: &str) -> std::borrow::Cow<'_, str> {
    match text.char_indices().nth(64) {
        Some((end, _)) => format!("{}…", &text[..end]).into(),
        None => text.into(),
    }
}

/// Prints pairs as `{k=v, …}`, bounded.
struct Brief<I>(I);

impl<'a, I: Iterator<Item = (&'a String, &'a String)> + Clone> fmt::Display for Brief<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        for (at, (key, value)) in self.0.clone().take(LISTED).enumerate() {
            write!(f, "{}{}={}", if at == 0 { "" } else { ", " }, cut(key), cut(value))?;
        }
        f.write_str(if self.0.clone().nth(LISTED).is_some() { ", …}" } else { "}" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::registry::{Destination, Match, Metadata, NetworkServiceLabels};
    use proptest::prelude::*;

    fn labels(text: &str) -> Labels {
        let pairs = text.split(',').filter(|p| !p.is_empty()).map(|p| p.split_once('=').expect("k=v"));
        pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
    }

    fn service(matches: Vec<Match>) -> NetworkService {
        NetworkService {
            name: "s".into(),
            payload: "IP".into(),
            matches,
            path_ids: vec![],
            ..NetworkService::default()
        }
    }

    /// `source -> route | route`, with `!` for fallthrough and `@labels` for metadata.
    fn rule(text: &str) -> Match {
        let (source, rest) = text.split_once("->").expect("->");
        let fallthrough = rest.contains('!');
        let rest = rest.replace('!', "");
        let (routes, metadata) = match rest.split_once('@') {
            Some((routes, meta)) => {
                (routes.to_owned(), Some(Metadata { unknown: None, labels: labels(meta.trim()) }))
            }
            None => (rest, None),
        };
        let routes = routes.split('|').map(str::trim).filter(|r| !r.is_empty());
        let route = |r: &str| Destination {
            unknown: None,
            destination_selector: if r == "any" { Labels::new() } else { labels(r) },
            weight: 7,
        };
        Match {
            unknown: None,
            source_selector: labels(source.trim()),
            routes: routes.map(route).collect(),
            fallthrough,
            metadata,
        }
    }

    fn endpoint(name: &str, text: &str) -> NetworkServiceEndpoint {
        NetworkServiceEndpoint {
            name: name.into(),
            network_service_names: vec!["s".into()],
            network_service_labels: [(
                "s".into(),
                NetworkServiceLabels { unknown: None, labels: labels(text) },
            )]
            .into(),
            ..Default::default()
        }
    }

    fn names(selection: &Selection<'_, NetworkServiceEndpoint>) -> String {
        selection.candidates.iter().map(|e| e.name.as_str()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn weights_say_how_often_each_is_the_first_to_be_tried() {
        let route = |app: &str, weight| Destination {
            unknown: None,
            destination_selector: labels(&format!("app={app}")),
            weight,
        };
        let seen: Vec<_> =
            ["a", "b1", "b2", "z"].map(|name| endpoint(name, &format!("app={}", &name[..1]))).into();
        let tried = |routes: Vec<Destination>, turns: usize| {
            let policy = Policy::strict(&service(vec![Match { routes, ..Match::default() }])).unwrap();
            let (client, mut firsts) = (labels(""), BTreeMap::<String, usize>::new());
            let selection = policy.endpoints(&client, &seen);
            for turn in 7..7 + turns {
                let order = selection.order(turn);
                assert_eq!(order.len(), selection.candidates.len(), "everybody is tried");
                if let Some(first) = order.first() {
                    *firsts.entry(first.name.clone()).or_default() += 1;
                }
            }
            let last = |turn| selection.order(turn).last().map(|e| e.name.clone()).unwrap_or_default();
            (
                firsts
                    .into_iter()
                    .map(|(name, count)| format!("{name}:{count}"))
                    .collect::<Vec<_>>()
                    .join(" "),
                last(0),
            )
        };
        let weighted = vec![route("a", 2), route("b", 1), route("z", 0)];
        let (firsts, last) = tried(weighted.clone(), 600);
        assert_eq!((firsts.as_str(), last.as_str()), ("a:400 b1:100 b2:100", "z"));
        let (few, _) = tried(weighted, 6);
        assert_eq!(few, "a:4 b1:1 b2:1", "well mixed");
        assert_eq!(tried(vec![route("a", 0), route("b", 0)], 9).0, "a:3 b1:3 b2:3", "no weights: in turn");
        assert_eq!(tried(vec![route("b", 9)], 4).0, "b1:2 b2:2", "one route: in turn");
        assert_eq!(tried(vec![route("a", u32::MAX), route("b", u32::MAX)], 100).0, "a:50 b1:25 b2:25");
        assert_eq!(tried(Vec::new(), 3), (String::new(), String::new()), "nobody");
    }

    #[test]
    fn endpoints_are_selected_as_the_table_says() {
        let seen = [
            endpoint("a", "app=a"),
            endpoint("b", "app=b,zone=1"),
            endpoint("b2", "app=b,zone=2"),
            endpoint("none", ""),
        ];
        // (matches, client labels, chosen, the match that decided)
        let table: &[(&[&str], &str, &str, Option<usize>)] = &[
            (&[], "", "a b b2 none", None),
            (&["-> app=a"], "", "a", Some(0)),
            (&["-> app=a"], "x=y", "a", Some(0)),
            (&["-> any"], "", "a b b2 none", Some(0)),
            // the first match that applies decides, even with nobody
            (&["app=fw -> app=b", "-> app=a"], "app=fw", "b b2", Some(0)),
            (&["app=fw -> app=b", "-> app=a"], "app=other", "a", Some(1)),
            (&["app=fw -> app=zz", "-> app=a"], "app=fw", "", Some(0)),
            // unless it falls through
            (&["app=fw -> app=zz !", "-> app=a"], "app=fw", "a", Some(1)),
            (&["-> app=zz !"], "", "", None),
            (&["-> app=zz !", "app=fw -> app=a"], "", "", None),
            // no match applies
            (&["app=fw -> app=b"], "", "", None),
            (&["app=fw,zone=1 -> app=b"], "app=fw", "", None),
            (&["app=fw -> app=b"], "app=fw,zone=1", "b b2", Some(0)),
            // an endpoint that fits two routes appears twice, route by route
            (&["-> app=b | zone=1 | app=a"], "", "b b2 b a", Some(0)),
            // metadata alone selects forwarders only
            (&["-> @fast=true"], "", "a b b2 none", Some(0)),
            (&["-> @"], "", "a b b2 none", Some(0)),
            (&["-> app=zz @fast=true"], "", "", Some(0)),
            // rule 3 precedes rule 4: a match without routes that falls through does fall through
            (&["-> ! @fast=true", "-> app=a"], "", "a", Some(1)),
            // no routes, no metadata: nobody
            (&["->"], "", "", Some(0)),
            // templates
            (&["-> app={{.want}}"], "want=b", "b b2", Some(0)),
            (&["-> app=b,zone={{ .zone }}"], "zone=2", "b2", Some(0)),
            (&["-> zone={{.zone}}"], "", "", Some(0)),
            // index of a missing key is empty, which equals a missing label; fewer labels never fit
            (&["-> zone={{index . \"a.b/c\"}}"], "", "a", Some(0)),
            (&["-> zone={{index . \"a.b/c\"}}"], "a.b/c=2", "b2", Some(0)),
            // in a source selector, the client's labels are both sides
            (&["app={{.role}} -> app=a"], "app=x,role=x", "a", Some(0)),
            (&["app={{.role}} -> app=a"], "app=x,role=y", "", None),
        ];
        for (matches, client, chosen, decided) in table {
            let policy =
                Policy::strict(&service(matches.iter().map(|m| rule(m)).collect())).expect("supported");
            let client = labels(client);
            let selection = policy.endpoints(&client, &seen);
            assert_eq!(names(&selection), *chosen, "{matches:?} for {client:?}: {selection}");
            assert_eq!(selection.decided_by(), *decided, "{matches:?} for {client:?}: {selection}");
        }
    }

    #[test]
    fn only_the_labels_of_the_service_count() {
        let mut other = endpoint("other", "");
        other.network_service_labels =
            [("t".into(), NetworkServiceLabels { unknown: None, labels: labels("app=a") })].into();
        let policy = Policy::strict(&service(vec![rule("-> app=a")])).expect("supported");
        assert!(policy.endpoints(&Labels::new(), &[other]).candidates.is_empty());
    }

    #[test]
    fn forwarders_are_selected_as_the_table_says() {
        let forwarder = |name: &str, text: &str| {
            let mut e = endpoint(name, "");
            e.network_service_labels =
                [("forwarder".into(), NetworkServiceLabels { unknown: None, labels: labels(text) })].into();
            e
        };
        let mut nameless = endpoint("no-entry", "p2p=true");
        nameless.network_service_names = vec!["forwarder".into()];
        let seen = [forwarder("plain", "p2p=true"), forwarder("fast", "p2p=true,fast=1"), nameless];
        let table: &[(&[&str], &str, &str)] = &[
            (&[], "", "plain fast no-entry"),
            (&["-> app=a"], "", "plain fast"),
            (&["-> app=a @fast=1"], "", "fast"),
            (&["-> @fast={{.speed}}"], "speed=1", "fast"),
            (&["-> @"], "", "plain fast"),
            (&["x=y -> app=a"], "", ""),
            (&["-> app=a @fast=2"], "", ""),
            (&["-> app=a @fast=2 !", "-> app=a"], "", "plain fast"),
        ];
        for (matches, client, chosen) in table {
            let policy =
                Policy::strict(&service(matches.iter().map(|m| rule(m)).collect())).expect("supported");
            let client = labels(client);
            let selection = policy.forwarders(&client, "forwarder", &seen);
            assert_eq!(names(&selection), *chosen, "{matches:?} for {client:?}: {selection}");
        }
    }

    #[test]
    fn everybody_who_was_seen_has_a_reason() {
        let seen = [endpoint("a", "app=a"), endpoint("b", "app=b"), endpoint("none", "")];
        let reasons = |matches: &[&str], client: &str| {
            let policy =
                Policy::strict(&service(matches.iter().map(|m| rule(m)).collect())).expect("supported");
            let client = labels(client);
            let selection = policy.endpoints(&client, &seen);
            seen.iter().map(|e| selection.reason(e)).collect::<Vec<_>>()
        };
        let expected = |list: [(bool, &str); 3]| list.map(|(fits, why)| (fits, why.to_owned())).to_vec();
        let anybody = (true, "the service has no matches: anybody may serve");
        assert_eq!(reasons(&[], ""), expected([anybody; 3]));
        assert_eq!(
            reasons(&["x=y -> any", "-> app={{.want}}"], "want=a"),
            expected([
                (true, "match 2: labels fit {app={{.want}}}"),
                (false, "match 2: label app is \"b\", not \"a\""),
                (false, "match 2: it has no label app=a"),
            ])
        );
        let nothing = (false, "no match of the service applies to the client's labels");
        assert_eq!(reasons(&["x=y -> any"], ""), expected([nothing; 3]));
        assert_eq!(reasons(&["->"], ""), expected([(false, "match 1: it has no route"); 3]));
    }

    #[test]
    fn an_empty_answer_names_service_labels_and_endpoints() {
        let policy =
            Policy::strict(&service(vec![rule("app=fw -> app=p1"), rule("-> app=fw")])).expect("supported");
        let seen = [endpoint("gw-1", "app=gw")];
        let client = labels("app=x");
        assert_eq!(
            policy.endpoints(&client, &seen).to_string(),
            "network service \"s\" for labels {app=x}: match 1 {app=fw} does not apply; match 2 {} wants \
             {app=fw}, nobody fits; endpoints seen: gw-1 {app=gw}"
        );
        let text = policy.forwarders(&client, "forwarder", &seen).to_string();
        assert!(
            text.ends_with("match 2 {} wants {p2p=true}, nobody fits; forwarders seen: gw-1 {}"),
            "{text}"
        );
    }

    #[test]
    fn an_explanation_is_bounded_whatever_strangers_send() {
        let many: Labels = (0..100_000).map(|i| (format!("{i:0>100}"), "v".repeat(100))).collect();
        let mut stored = endpoint(&"n".repeat(10_000), "");
        stored
            .network_service_labels
            .insert("s".into(), NetworkServiceLabels { unknown: None, labels: many.clone() });
        let seen = vec![stored; 40];
        let rules = (0..100).map(|i| rule(&format!("-> app={i} !"))).collect();
        let policy = Policy::strict(&service(rules)).expect("supported");
        let text = policy.endpoints(&many, &seen).to_string();
        assert!(text.len() < 60_000 && text.contains("and 24 more"), "{} bytes", text.len());
    }

    #[test]
    fn templates_expand_as_upstream_does() {
        let client = labels("nodeName=n1,podName=p,a.b/c=deep,x=X,größe=L");
        let table = [
            ("plain", "plain"),
            ("", ""),
            ("}} alone", "}} alone"),
            ("{ {.x}}", "{ {.x}}"),
            ("{{.nodeName}}", "n1"),
            ("{{ .podName }}", "p"),
            ("{{\t.podName\n}}", "p"),
            ("{{.gone}}", "<no value>"),
            ("{{index . \"a.b/c\"}}", "deep"),
            ("{{ index  .  `a.b/c` }}", "deep"),
            ("{{index . \"go\\\"ne}}\"}}", ""),
            ("pre-{{.x}}-post", "pre-X-post"),
            ("{{.x}}{{.x}}", "XX"),
            ("{{.größe}}", "L"),
        ];
        for (text, expanded) in table {
            let template = Template::parse(text).expect(text);
            assert_eq!(template.expand(&client), expanded, "{text}");
            assert!(template.parts.is_empty() || template.expands_to(expanded, &client), "{text}");
        }
    }

    #[test]
    fn other_templates_are_refused_at_load_and_are_their_own_text_from_the_wire() {
        let refused = [
            "{{if eq .a \"b\"}}x{{else}}y{{end}}",
            "{{.a | printf \"%.3s\"}}",
            "{{.a.b}}",
            "{{.a-b}}",
            "{{.}}",
            "{{.1}}",
            "{{- .a}}",
            "{{.a -}}",
            "{{\"a\"}}",
            "{{/* a */}}",
            "{{index . .a}}",
            "{{index .a \"b\"}}",
            "{{index . \"a\" \"b\"}}",
            "{{index . \"a\\n\"}}",
            "{{indexes . \"a\"}}",
            "{{.a}",
            "{{",
            "{{index . \"a",
        ];
        for text in refused {
            let error = Template::parse(text).expect_err(text).to_string();
            assert!(error.contains("{{.key}}") && error.contains("not supported"), "{error}");
            let mut wanted = rule("-> any");
            wanted.routes[0].destination_selector.insert("app".into(), text.into());
            assert!(Policy::strict(&service(vec![wanted.clone()])).is_err(), "{text}");
            let mut seen = endpoint("e", "");
            let own_text =
                NetworkServiceLabels { unknown: None, labels: [("app".to_owned(), text.to_owned())].into() };
            seen.network_service_labels.insert("s".into(), own_text);
            let policy = Policy::lenient(&service(vec![wanted]));
            assert_eq!(policy.endpoints(&labels("a=b"), &[seen]).candidates.len(), 1, "{text}");
        }
    }

    #[test]
    fn queries_are_answered_as_the_specification_says() {
        let time = |seconds, nanos| Some(prost_types::Timestamp { seconds, nanos });
        let stored = NetworkServiceEndpoint {
            name: "nse".into(),
            network_service_names: vec!["s".into(), "t".into()],
            network_service_labels: [(
                "s".into(),
                NetworkServiceLabels { unknown: None, labels: labels("a=1,b=2") },
            )]
            .into(),
            url: "tcp://10.0.0.1:5001".into(),
            expiration_time: time(7, 5),
            initial_registration_time: time(1, 0),
            path_ids: vec!["spiffe://x".into()],
            ..NetworkServiceEndpoint::default()
        };
        let query = |change: &dyn Fn(&mut NetworkServiceEndpoint)| {
            let mut q = NetworkServiceEndpoint::default();
            change(&mut q);
            endpoint_answers(&q, &stored)
        };
        let with_labels = |service: &str, text: &str| {
            let entry = (service.to_owned(), NetworkServiceLabels { unknown: None, labels: labels(text) });
            query(&|q| q.network_service_labels = [entry.clone()].into())
        };
        assert!(query(&|_| {}));
        assert!(query(&|q| q.name = "nse".into()) && !query(&|q| q.name = "ns".into()));
        assert!(query(&|q| q.url = "10.0.0.1:500".into()) && !query(&|q| q.url = "10.0.0.2".into()));
        assert!(query(&|q| q.network_service_names = vec!["t".into(), "s".into(), "t".into()]));
        assert!(!query(&|q| q.network_service_names = vec!["t".into(), "u".into()]));
        assert!(query(&|q| q.expiration_time = time(7, 9)) && !query(&|q| q.expiration_time = time(8, 5)));
        assert!(with_labels("s", "a=1") && with_labels("s", "") && !with_labels("s", "a=2"));
        assert!(!with_labels("s", "c=") && !with_labels("t", ""));
        assert!(query(&|q| q.path_ids = vec!["spiffe://y".into()]));
        assert!(query(&|q| q.initial_registration_time = time(2, 0)));
        // a stored endpoint without an expiration time does not answer, and nothing panics
        let eternal = NetworkServiceEndpoint { expiration_time: None, ..stored.clone() };
        let by_time = NetworkServiceEndpoint { expiration_time: time(7, 0), ..Default::default() };
        assert!(!endpoint_answers(&by_time, &eternal));

        let stored = service(vec![rule("-> app=a"), rule("-> app=b")]);
        let by = |matches| NetworkService { matches, ..Default::default() };
        assert!(service_answers(&by(stored.matches.clone()), &stored));
        assert!(!service_answers(&by(vec![rule("-> app=b"), rule("-> app=a")]), &stored));
        assert!(!service_answers(&by(vec![rule("-> app=a")]), &stored));
        assert!(service_answers(&NetworkService { payload: "IP".into(), ..Default::default() }, &stored));
        assert!(!service_answers(
            &NetworkService { payload: "ETHERNET".into(), ..Default::default() },
            &stored
        ));
        assert!(!service_answers(&NetworkService { name: "S".into(), ..Default::default() }, &stored));
    }

    proptest! {
        #[test]
        fn templates_never_panic_and_match_their_own_expansion(
            text in "[{}. a\"`\\\\index]{0,24}", x in "[a-c<]{0,3}"
        ) {
            let client = labels(&format!("a={x}"));
            if let Ok(template) = Template::parse(&text) {
                let expanded = template.expand(&client);
                prop_assert!(template.parts.is_empty() || template.expands_to(&expanded, &client));
                let longer = format!("{expanded}!");
                prop_assert!(!template.expands_to(&longer, &client));
            }
        }
    }
}
