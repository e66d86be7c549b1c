//! What an annotation asks for, and what about it cannot be understood.

use std::collections::BTreeMap;

use nsm_api::{
    mechanism::kind,
    nsurl::{BadNsUrl, NsUrl},
};

/// The label that asks for a virtual function (spec/kubernetes.md 1.4).
const SRIOV_TOKEN: &str = "sriovToken";
/// How much of an item a problem repeats: API servers cut warnings after [`MAX_WARNING`].
const SHOWN: usize = 60;
/// Characters of a warning that API servers pass on.
pub const MAX_WARNING: usize = 256;

/// The value of an annotation, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// What clients are told: the value as it is, without the blanks around items that upstream's clients refuse.
    pub value: String,
    /// How many virtual functions of each kind are asked for.
    pub devices: BTreeMap<String, u32>,
    /// Why no client will understand it.
    pub malformed: Option<String>,
    /// What can hardly be meant.
    pub doubtful: Vec<String>,
}

impl Wanted {
    /// Reads a value. Whatever it is, something is to be done with it.
    #[must_use]
    pub fn read(value: &str) -> Self {
        let mut wanted =
            Self { value: value.into(), devices: BTreeMap::new(), malformed: None, doubtful: Vec::new() };
        let urls = match NsUrl::parse_list(value) {
            Ok(urls) => urls,
            Err(bad) => {
                let url = bad.url.chars().take(SHOWN).collect();
                wanted.malformed = Some(BadNsUrl { url, ..bad }.to_string());
                return wanted;
            }
        };
        wanted.value = value.split(',').map(|item| item.trim_matches(' ')).collect::<Vec<_>>().join(",");
        for url in urls {
            let shown = || url.to_string().chars().take(SHOWN).collect::<String>();
            if ![kind::KERNEL, kind::MEMIF, "VFIO"].contains(&url.mechanism.as_str()) {
                let mechanism: String = url.mechanism.to_lowercase().chars().take(SHOWN).collect();
                wanted.doubtful.push(format!(
                    "{:?} asks for the mechanism {mechanism:?}, which no client here has; expected kernel, memif or vfio",
                    shown()
                ));
            }
            for piece in &url.ignored {
                let piece: String = piece.chars().take(SHOWN).collect();
                wanted.doubtful.push(format!(
                    "{:?} has {piece:?}, which is no label and is left out: write LABEL=VALUE, separated by &, with ; and % as %3B and %25",
                    shown()
                ));
            }
            let Some(token) = url.labels.get(SRIOV_TOKEN) else { continue };
            if is_device(token) {
                *wanted.devices.entry(token.clone()).or_default() += 1;
            } else {
                let token: String = token.chars().take(SHOWN).collect();
                wanted.doubtful.push(format!(
                    "{:?} asks for the virtual function {token:?}; expected {SRIOV_TOKEN}=DOMAIN/CAPABILITY, for example worker.domain/10G",
                    shown()
                ));
            }
        }
        wanted
    }

    /// Everything that somebody should be told of it.
    pub fn problems(&self) -> impl Iterator<Item = &String> {
        self.malformed.iter().chain(&self.doubtful)
    }
}

/// An extended resource's name as the API server takes it: one that it refuses would keep the pod out.
fn is_device(token: &str) -> bool {
    let Some((domain, capability)) = token.split_once('/') else { return false };
    let end = |c: char| c.is_ascii_alphanumeric();
    let label = |part: &str| {
        let end = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        part.starts_with(end) && part.ends_with(end) && part.chars().all(|c| end(c) || c == '-')
    };
    let own =
        domain == "kubernetes.io" || domain.ends_with(".kubernetes.io") || domain.starts_with("requests.");
    // The quota of a resource is named requests.RESOURCE, which must be a name too.
    !own && domain.len() <= 253 - "requests.".len()
        && domain.split('.').all(label)
        && capability.len() <= 63
        && capability.starts_with(end)
        && capability.ends_with(end)
        && capability.chars().all(|c| end(c) || "-_.".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_are_told_is_what_was_written_without_blanks_around_items() {
        for (value, told) in [
            ("kernel://a/x,memif://b", "kernel://a/x,memif://b"),
            ("Kernel://a/x?l=%20b#f", "Kernel://a/x?l=%20b#f"),
            (" kernel://a/x ,  kernel://b/y", "kernel://a/x,kernel://b/y"),
        ] {
            let wanted = Wanted::read(value);
            assert_eq!(wanted.value, told);
            assert_eq!(wanted.problems().next(), None, "{value}");
        }
    }

    #[test]
    fn devices_are_counted() {
        let wanted = Wanted::read(
            "vfio://a?sriovToken=w.d/10G,kernel://b?sriovToken=w.d/10G,kernel://c?sriovToken=w.d/1G,kernel://d",
        );
        assert_eq!(wanted.devices, [("w.d/10G".into(), 2), ("w.d/1G".into(), 1)].into());
        assert_eq!(wanted.problems().next(), None);
    }

    #[test]
    fn what_no_api_server_takes_as_a_resource_is_none() {
        for bad in [
            "10G",
            "/10G",
            "w.d/",
            "W.D/10G",
            "w..d/10G",
            "w.d/10 G",
            "w.d/-",
            "kubernetes.io/x",
            "a.kubernetes.io/x",
        ] {
            let wanted = Wanted::read(&format!("kernel://a?sriovToken={}", bad.replace(' ', "%20")));
            assert!(wanted.devices.is_empty(), "{bad}");
            assert!(
                wanted.doubtful[0].contains(&format!(
                    "asks for the virtual function {bad:?}; expected sriovToken=DOMAIN/CAPABILITY"
                )),
                "{wanted:?}"
            );
        }
    }

    /// Every malformed kind of spec/kubernetes.md 1.5 that cannot be meant.
    #[test]
    fn what_no_client_will_understand_is_told_and_passed_on_as_it_is() {
        for (bad, says) in [
            (
                "kernel://a b/x",
                "at character 11: invalid character ' ' in the name of the service: remove it",
            ),
            ("kernel://a/%zz", "at character 12: invalid escape \"%zz\": write %25 for a percent sign"),
            ("kernel://a:http/x", "at character 11: invalid port \":http\": a service has none, remove it"),
            ("service/if", "it has no MECHANISM:// (write kernel:// before the service)"),
            (
                "kernel://a/x,",
                "network service \"\" (item 2 of 2): it is empty (a trailing or doubled comma?)",
            ),
            ("kernel://a/x,kernel://b/x", "(item 2 of 2): item 1 wants the interface \"x\" too"),
            ("kernel://a/0123456789012345", "has 16 bytes; Linux takes at most 15"),
            ("kernel:///x", "it names no service"),
        ] {
            let wanted = Wanted::read(bad);
            let told = wanted.malformed.expect(bad);
            assert!(told.contains(says), "{bad}: {told}");
            assert_eq!((wanted.value.as_str(), wanted.devices.len()), (bad, 0));
        }
    }

    #[test]
    fn what_can_hardly_be_meant_is_told() {
        let wanted = Wanted::read("pigeon://a/x?b;c=1&d=%zz");
        let told: Vec<_> = wanted.problems().map(String::as_str).collect();
        assert_eq!(
            told,
            [
                "\"pigeon://a/x\" asks for the mechanism \"pigeon\", which no client here has; expected kernel, memif or vfio",
                "\"pigeon://a/x\" has \"b;c=1\", which is no label and is left out: write LABEL=VALUE, separated by &, with ; and % as %3B and %25",
                "\"pigeon://a/x\" has \"d=%zz\", which is no label and is left out: write LABEL=VALUE, separated by &, with ; and % as %3B and %25",
            ]
        );
        assert_eq!(wanted.malformed, None);
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics_and_what_is_told_is_short(value: String, near in "[kernl:/@?&=%;, \\[\\]#.a-f0-9]{0,300}") {
            for value in [value, near] {
                for problem in Wanted::read(&value).problems() {
                    proptest::prop_assert!(problem.chars().count() < 600, "{}", problem);
                }
            }
        }
    }
}
