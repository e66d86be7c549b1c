//! The prefixes that endpoints must not hand out on this node (spec/control-plane.md 11.1): those of the operator, and
//! those in a file that whoever looks after the cluster keeps up to date.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use ipnet::IpNet;
use nsm_api::pb::{connection::Connection, networkservice::NetworkServiceRequest};
use nsm_mesh::{
    Context, Element, Next, Result,
    from_file::{BadFile, FromFile},
};
use serde::Deserialize;

/// Adds the prefixes that endpoints must not hand out on this cluster, and makes sure that the contexts which
/// upstream's endpoints read without asking are there.
#[derive(Debug, Clone, Default)]
pub struct ExcludedPrefixes(FromFile<Vec<IpNet>>);

impl ExcludedPrefixes {
    /// Where upstream's manager finds them.
    pub const FILE: &'static str = "/var/lib/networkservicemesh/config/excluded_prefixes.yaml";

    /// These, and those in the file, which is followed. No such file: only these. Needs a runtime.
    ///
    /// # Errors
    /// A file that is not YAML with a list of prefixes under `prefixes`.
    pub fn open(fixed: Vec<IpNet>, file: impl Into<PathBuf>) -> Result<Self, BadFile> {
        let file = file.into();
        if file == Path::new("") {
            return Ok(Self(FromFile::fixed(IpNet::aggregate(&fixed))));
        }
        FromFile::open(file, move |text| {
            let mut prefixes = fixed.clone();
            prefixes.extend(text.map_or(Ok(Vec::new()), parse)?);
            // The fewest that cover them, IPv4 first.
            Ok(IpNet::aggregate(&prefixes))
        })
        .map(Self)
    }
}

/// What may stand in the file beside the prefixes is not ours.
#[derive(Deserialize)]
#[serde(untagged)]
enum Field {
    List(Vec<String>),
    Other(serde::de::IgnoredAny),
}

/// The prefixes in such a file.
#[doc(hidden)]
pub fn parse(text: &str) -> Result<Vec<IpNet>, String> {
    const EXPECTED: &str = "expected YAML such as `prefixes: [10.96.0.0/12, 2001:db8::/64]`";
    let fields: Option<BTreeMap<String, Field>> =
        serde_saphyr::from_str(text).map_err(|e| format!("{e}; {EXPECTED}"))?;
    let mut found = Vec::new();
    for (name, field) in fields.unwrap_or_default() {
        if !name.eq_ignore_ascii_case("prefixes") {
            continue;
        }
        let Field::List(list) = field else {
            return Err(format!("{name} is not a list of prefixes; {EXPECTED}"));
        };
        for text in list {
            let prefix: IpNet = text.parse().map_err(|_| format!("{text:?} is not a prefix; {EXPECTED}"))?;
            found.push(prefix.trunc());
        }
    }
    Ok(found)
}

#[async_trait]
impl Element for ExcludedPrefixes {
    fn name(&self) -> &'static str {
        "excluded-prefixes"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let context = request.connection.get_or_insert_default().context.get_or_insert_default();
        context.dns_context.get_or_insert_default();
        let listed = &mut context.ip_context.get_or_insert_default().excluded_prefixes;
        let mut seen = std::collections::HashSet::new();
        listed.extend(self.0.get().iter().map(IpNet::to_string));
        listed.retain(|prefix| seen.insert(prefix.clone()));
        next.request(cx, request).await
    }
}

#[cfg(test)]
mod tests {
    use nsm_mesh::{Call, Connections, chain};

    use super::*;

    #[test]
    fn the_file_is_read_as_upstream_writes_it() {
        let nets = |list: &[&str]| list.iter().map(|p| p.parse().unwrap()).collect::<Vec<IpNet>>();
        assert_eq!(
            parse("prefixes:\n- 10.96.0.1/12\n- 2001:db8::/64\n"),
            Ok(nets(&["10.96.0.0/12", "2001:db8::/64"]))
        );
        assert_eq!(parse("Prefixes: [10.0.0.0/8]\nother: {a: 1}\n"), Ok(nets(&["10.0.0.0/8"])));
        assert_eq!(parse("prefixes: []"), Ok(vec![]));
        assert_eq!(parse("other: 1"), Ok(vec![]));
        assert_eq!(parse(""), Ok(vec![]), "an empty file says nothing");
        for (bad, says) in [
            ("prefixes: [10.0.0.0/33]", "\"10.0.0.0/33\""),
            ("prefixes: 10.0.0.0/8", "not a list"),
            ("- 10.0.0.0/8", "expected YAML such as"),
            ("prefixes: [", "expected YAML such as"),
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains(says), "{bad}: {error}");
        }
    }

    #[tokio::test]
    async fn requests_carry_what_the_file_says_at_the_time() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("excluded_prefixes.yaml");
        let element = ExcludedPrefixes::open(vec!["10.0.0.0/9".parse().unwrap()], &file).unwrap();
        let connections = Connections::asking("mgr", chain![element.clone()], Default::default());
        let excluded = async |own: &[&str]| {
            let mut conn =
                Connection { id: "u".into(), network_service: "s".into(), ..Connection::default() };
            let context = conn.context.get_or_insert_default().ip_context.get_or_insert_default();
            context.excluded_prefixes = own.iter().map(|p| (*p).to_owned()).collect();
            let request = NetworkServiceRequest {
                connection: Some(conn),
                mechanism_preferences: vec![],
                ..NetworkServiceRequest::default()
            };
            let answer = connections.request(Call::default(), request).await.unwrap().connection;
            let context = answer.context.unwrap();
            assert!(context.dns_context.is_some(), "upstream's endpoints do not ask whether it is there");
            context.ip_context.unwrap().excluded_prefixes
        };
        assert_eq!(excluded(&[]).await, ["10.0.0.0/9"]);
        // Beside what is there, once, in order; overlapping and neighbouring ones are one.
        std::fs::write(&file, "prefixes: ['2001:db8::/64', 10.128.0.0/9, 10.1.0.0/16]").unwrap();
        while element.0.get().len() != 2 {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        assert_eq!(
            excluded(&["192.0.2.1/32", "10.0.0.0/8", "192.0.2.1/32"]).await,
            ["192.0.2.1/32", "10.0.0.0/8", "2001:db8::/64"]
        );
        let error = ExcludedPrefixes::open(vec![], directory.path()).unwrap_err();
        assert!(error.to_string().contains(&directory.path().display().to_string()), "{error}");
    }
}
