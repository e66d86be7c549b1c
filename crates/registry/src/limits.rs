//! Bounds of what a peer may register or ask for: far above what meshes use, far below what hurts.

use std::collections::BTreeMap;

use nsm_api::{
    limits::{MAX_ENTRIES, Malformed, unknown},
    pb::registry::{NetworkService, NetworkServiceEndpoint},
};

/// A name: bytes. Kubernetes stores objects under names of at most 253.
pub const MAX_NAME: usize = 253;
/// A URL: bytes.
pub const MAX_URL: usize = 1024;
/// A label's key or value, a payload, a SPIFFE ID: bytes.
pub const MAX_LABEL: usize = 2048;
/// Services of one endpoint, path ids of one object, routes of one match.
pub const MAX_LIST: usize = 64;
/// Matches of one service.
pub const MAX_MATCHES: usize = 256;

/// Checks a service that is registered or asked for.
///
/// # Errors
/// The first bound that is passed.
pub fn check_service(service: &NetworkService) -> Result<(), Malformed> {
    unknown(&service.unknown)?;
    short("name", &service.name, MAX_NAME)?;
    short("payload", &service.payload, MAX_LABEL)?;
    few("matches", service.matches.len(), MAX_MATCHES)?;
    path_ids(&service.path_ids)?;
    let routes = service.matches.iter().flat_map(|m| &m.routes);
    let metadata = service.matches.iter().flat_map(|m| &m.metadata);
    unknown(service.matches.iter().flat_map(|m| &m.unknown))?;
    unknown(routes.flat_map(|route| &route.unknown))?;
    unknown(metadata.flat_map(|metadata| &metadata.unknown))?;
    for m in &service.matches {
        labels("source_selector", &m.source_selector)?;
        few("routes", m.routes.len(), MAX_LIST)?;
        m.routes.iter().try_for_each(|route| labels("destination_selector", &route.destination_selector))?;
        m.metadata.iter().try_for_each(|metadata| labels("metadata.labels", &metadata.labels))?;
    }
    Ok(())
}

/// Checks an endpoint that is registered or asked for.
///
/// # Errors
/// The first bound that is passed.
pub fn check_endpoint(endpoint: &NetworkServiceEndpoint) -> Result<(), Malformed> {
    unknown(&endpoint.unknown)?;
    short("name", &endpoint.name, MAX_NAME)?;
    short("url", &endpoint.url, MAX_URL)?;
    few("network_service_names", endpoint.network_service_names.len(), MAX_LIST)?;
    endpoint.network_service_names.iter().try_for_each(|n| short("network_service_names", n, MAX_NAME))?;
    few("network_service_labels", endpoint.network_service_labels.len(), MAX_LIST)?;
    unknown(endpoint.network_service_labels.values().flat_map(|labels| &labels.unknown))?;
    for (service, entry) in &endpoint.network_service_labels {
        short("network_service_labels", service, MAX_NAME)?;
        labels("network_service_labels", &entry.labels)?;
    }
    path_ids(&endpoint.path_ids)
}

fn path_ids(ids: &[String]) -> Result<(), Malformed> {
    few("path_ids", ids.len(), MAX_LIST)?;
    ids.iter().try_for_each(|id| short("path_ids", id, MAX_LABEL))
}

fn labels(what: &'static str, labels: &BTreeMap<String, String>) -> Result<(), Malformed> {
    few(what, labels.len(), MAX_ENTRIES)?;
    labels.iter().try_for_each(|(k, v)| short(what, k, MAX_LABEL).and_then(|()| short(what, v, MAX_LABEL)))
}

fn few(what: &'static str, got: usize, max: usize) -> Result<(), Malformed> {
    if got > max { Err(Malformed::TooMany { what, got, max }) } else { Ok(()) }
}

fn short(what: &'static str, text: &str, max: usize) -> Result<(), Malformed> {
    if text.len() > max {
        Err(Malformed::TooLong { what, got: text.len(), max })
    } else if text.chars().any(char::is_control) {
        Err(Malformed::Control(what))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use nsm_api::pb::registry::NetworkServiceLabels;

    use super::*;

    #[test]
    fn what_would_spoil_a_terminal_is_not_registered() {
        let clear = "\x1b[2J";
        let service = NetworkService { name: clear.into(), ..NetworkService::default() };
        let error = check_service(&service).unwrap_err();
        assert_eq!(error.to_string(), "name holds control characters; send it without them");
        let named = || NetworkServiceEndpoint { name: "e".into(), ..NetworkServiceEndpoint::default() };
        let labels =
            NetworkServiceLabels { unknown: None, labels: [("app".to_owned(), clear.to_owned())].into() };
        let bad = [
            ("name", NetworkServiceEndpoint { name: "e\n".into(), ..named() }),
            ("url", NetworkServiceEndpoint { url: clear.into(), ..named() }),
            (
                "network_service_names",
                NetworkServiceEndpoint { network_service_names: vec!["s\u{9b}2J".into()], ..named() },
            ),
            (
                "network_service_labels",
                NetworkServiceEndpoint {
                    network_service_labels: [("s".to_owned(), labels)].into(),
                    ..named()
                },
            ),
        ];
        for (what, endpoint) in bad {
            assert_eq!(check_endpoint(&endpoint), Err(Malformed::Control(what)));
        }
        assert_eq!(check_endpoint(&named()), Ok(()));
    }
}
