//! Whatever prints a message prints no token.

use std::{cell::RefCell, collections::BTreeSet, fmt::Debug};

use nsm_api::pb::{
    connection::*,
    connectioncontext::*,
    introspect::{
        Connection as ToldConnection, Decision, End, Endpoint, Failure, Hop, Item, LogLevel, Neighbour,
        Process, Query, Service, Wire,
    },
    ipam::*,
    networkservice::*,
    registry::*,
};
use nsm_hostile::Schema;
use prost::Message;

/// Decodes a message and prints it, in both forms.
type Print = fn(&[u8]) -> String;

fn print<M: Message + Default + Debug>(bytes: &[u8]) -> String {
    let message = M::decode(bytes).expect("a filled message");
    format!("{message:?}{message:#?}")
}

macro_rules! messages {
    [$($package:literal: $($name:ident $(= $other:literal)?),*;)*] => {
        vec![$($((concat!($package, ".", messages!(@ $name $($other)?)), print::<$name> as Print)),*),*]
    };
    (@ $name:ident $other:literal) => { $other };
    (@ $name:ident) => { stringify!($name) };
}

#[test]
fn no_message_shows_a_token_and_all_show_the_rest() {
    let printed = messages![
        "networkservice": NetworkServiceRequest;
        "connection": Mechanism, PathSegment, Path, Connection, ConnectionEvent, MonitorScopeSelector;
        "connectioncontext": IpNeighbor, Route, IpFamily, ExtraPrefixRequest, PolicyRoute, IpContext = "IPContext",
            DnsConfig = "DNSConfig", DnsContext = "DNSContext", EthernetContext, ConnectionContext;
        "registry": NetworkService, Match, Metadata, Destination, NetworkServiceLabels, NetworkServiceEndpoint,
            NetworkServiceQuery, NetworkServiceEndpointQuery, NetworkServiceResponse,
            NetworkServiceEndpointResponse;
        "ipam": PrefixRequest, PrefixResponse;
        "nsm.introspect.v1": Item, Query, Process, Neighbour, ToldConnection = "Connection", Hop, Decision, Failure,
            Service, Endpoint, Wire, End, LogLevel;
    ];
    let schema = Schema::new(nsm_api::DESCRIPTORS).unwrap();
    let names: BTreeSet<_> = printed.iter().map(|(name, _)| *name).collect();
    let all: BTreeSet<_> = schema.messages().filter(|name| !name.starts_with("google.")).collect();
    assert_eq!(names, all, "a message is new or gone: say here how it is decoded");

    let mut secrets = 0;
    for (name, print) in printed {
        let texts = RefCell::new(BTreeSet::new());
        let filled = schema.filled(name, &|field| {
            let Some(field) = field else { return "text-of-entry".into() };
            let text = if is_secret(field) { SECRET.into() } else { format!("text-of-{field}") };
            texts.borrow_mut().insert(text.clone());
            text
        });
        let shown = print(&filled);
        // A choice shows one of the messages that stand here themselves.
        if name == "nsm.introspect.v1.Item" {
            assert!(!shown.contains(SECRET), "{shown}");
            continue;
        }
        for text in texts.into_inner() {
            secrets += usize::from(text == SECRET);
            let binary = !name.starts_with("nsm.") && BINARY.contains(&text.as_str());
            let shows = text != SECRET && !binary;
            assert_eq!(shown.contains(&text), shows, "{name} and {text}: {shown}");
        }
    }
    assert!(secrets >= 5, "segments are in requests, connections, paths, events and selectors");
}

/// Certificates are no secrets, and nothing to read: they are shown by their size.
const BINARY: [&str; 2] = ["text-of-signer", "text-of-chain"];
const SECRET: &str = "eyJhbGciOiJFUzI1NiJ9";

/// Fields that hold what lets its holder speak for another.
fn is_secret(field: &str) -> bool {
    ["token", "secret", "password", "private_key", "svid_key"].iter().any(|word| field.contains(word))
}
