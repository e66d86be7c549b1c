//! Which policies an operator's list names: upstream's built-in ones, under `etc/nsm/opa`, and files.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use nsm_identity::policy::{Check, Policies};
use regex::Regex;

use crate::{Error, Policy};

/// Upstream's built-in policies by the names under which its lists know them, and the checks that they are here.
const BUILT_IN: [(&str, Check); 6] = [
    ("etc/nsm/opa/common/tokens_valid.rego", Check::TokensValid),
    ("etc/nsm/opa/common/tokens_expired.rego", Check::TokensExpired),
    ("etc/nsm/opa/common/tokens_chained.rego", Check::TokensChained),
    ("etc/nsm/opa/registry/client_allowed.rego", Check::ClientAllowed),
    ("etc/nsm/opa/server/prev_token_signed.rego", Check::PeerSigned),
    ("etc/nsm/opa/client/next_token_signed.rego", Check::PeerSigned),
];

/// How deep below a mask's directory files are looked for.
const DEPTH: usize = 16;

/// Whose policies a list is about: what a server checks of requests, or a client of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `NSM_REGISTRY_SERVER_POLICIES`
    Server,
    /// `NSM_REGISTRY_CLIENT_POLICIES`
    Client,
}

/// What a list comes to.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The files that it names.
    pub files: Vec<Arc<Policy>>,
    /// Upstream's built-in policies of this side that it does not name, so that nobody checks them.
    pub not_named: BTreeSet<Check>,
}

/// Reads a list as upstream does (registry.md 2.9.4): each mask is an existing file, or a regular expression over
/// whole file names, of the built-in policies and of files below the mask's directory.
///
/// # Errors
/// A mask that names nothing or is no regular expression; a file that cannot be read or is no policy.
pub fn load(masks: &[String], side: Side) -> Result<Loaded, Error> {
    let mut loaded = Loaded { files: Vec::new(), not_named: of_side(side).map(|(_, check)| check).collect() };
    let mut seen = BTreeSet::new();
    for mask in masks {
        let (mut paths, regex, directory) = (Vec::new(), expression(mask)?, directory(mask));
        let mut built_in = 0;
        if Path::new(mask).is_file() {
            paths.push(PathBuf::from(mask));
        } else {
            for (_, check) in of_side(side).filter(|(name, _)| regex.is_match(name)) {
                loaded.not_named.remove(&check);
                built_in += 1;
            }
            below(&directory, DEPTH, &mut |path| {
                if path.extension().is_some_and(|e| e == "rego") && regex.is_match(&path.to_string_lossy()) {
                    paths.push(path.to_owned());
                }
            });
        }
        if paths.is_empty() && built_in == 0 {
            return Err(Error::Nothing { mask: mask.clone(), directory });
        }
        paths.sort();
        for path in paths {
            if seen.insert(path.clone()) {
                let text = std::fs::read_to_string(&path)
                    .map_err(|source| Error::Read { path: path.clone(), source })?;
                loaded.files.push(Arc::new(Policy::parse(&path.to_string_lossy(), &text)?));
            }
        }
    }
    Ok(loaded)
}

impl Loaded {
    /// Adds it to what a role checks.
    pub fn join(self, policies: &mut Policies) {
        policies.without.extend(self.not_named);
        policies.files.extend(self.files.into_iter().map(|file| file as Arc<_>));
    }
}

fn of_side(side: Side) -> impl Iterator<Item = (&'static str, Check)> {
    let other = match side {
        Side::Server => "/client/",
        Side::Client => "/server/",
    };
    BUILT_IN.into_iter().filter(move |(name, _)| !name.contains(other))
}

/// Anchored: a mask speaks of whole names.
fn expression(mask: &str) -> Result<Regex, Error> {
    let plain = mask.strip_prefix("./").unwrap_or(mask);
    Regex::new(&format!("^(?:\\./)?(?:{plain})$")).map_err(|e| Error::Mask {
        mask: mask.into(),
        reason: e.to_string().lines().last().unwrap_or_default().into(),
    })
}

/// The longest part of a mask that is a directory.
fn directory(mask: &str) -> PathBuf {
    let literal =
        mask.find(['*', '+', '?', '[', '(', '{', '\\', '|', '^', '$']).map_or(mask, |at| &mask[..at]);
    match literal.rfind('/') {
        Some(0) => PathBuf::from("/"),
        Some(at) => PathBuf::from(&literal[..at]),
        None => PathBuf::from("."),
    }
}

fn below(directory: &Path, depth: usize, found: &mut dyn FnMut(&Path)) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        // Links are followed to files (a ConfigMap's are links), not to directories, which might lead in circles.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if depth > 0 {
                below(&path, depth - 1, found);
            }
        } else if path.is_file() {
            found(&path);
        }
    }
}
