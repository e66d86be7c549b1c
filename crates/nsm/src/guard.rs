//! Flags of what a role checks of its peers and lets them use. Also in docs/authorisation.md.

use std::{collections::BTreeSet, sync::Arc};

use anyhow::Result;
use clap::{
    Args,
    builder::{PossibleValue, PossibleValuesParser, TypedValueParser},
};
use nsm_identity::policy::{Check, Policies};
use nsm_transport::{Guard, Limits, Refusals};

/// What is left out, for every role that speaks with others.
#[derive(Debug, Clone, Args)]
pub(crate) struct Checks {
    /// Checks to leave out, for a mesh with peers that fail them for honest reasons. Each gives something up
    #[arg(long, env = "NSM_WITHOUT_CHECKS", value_delimiter = ',', value_parser = check(), value_name = "CHECK")]
    without_checks: Vec<Check>,
    /// Refuse paths with a hop whose signature cannot be verified because nobody handed on its certificate. For meshes
    /// without programs of upstream's
    #[arg(long, env = "NSM_ALL_HOPS_SIGNED")]
    all_hops_signed: bool,
}

/// A list of policies, as a group of flags with one flag: its field, variable, side and default, and what it says in
/// `--help`.
macro_rules! policy_list {
    ($(#[$what:meta])* $name:ident, $field:ident, $variable:literal, $side:literal, $default:literal, $help:literal) => {
        $(#[$what])*
        #[derive(Debug, Clone, Args)]
        pub(crate) struct $name {
            #[doc = $help]
            #[arg(long, env = $variable, value_delimiter = ',', value_name = "REGO", default_value = $default)]
            $field: Vec<String>,
        }

        impl $name {
            /// # Errors
            /// A policy that cannot be used.
            pub(crate) fn policies(&self, checks: &Checks) -> Result<Arc<Policies>> {
                with_files(checks, &self.$field, $side)
            }
        }
    };
}

policy_list! {
    /// What is checked of answers to registrations.
    RegistryAnswers, registry_client_policies, "NSM_REGISTRY_CLIENT_POLICIES", "client",
    "etc/nsm/opa/common/.*.rego,etc/nsm/opa/registry/.*.rego,etc/nsm/opa/client/.*.rego",
    "Policies on a registry's answers: files, or regular expressions over their names; etc/nsm/opa has the built-in \
     ones. Each must allow. Empty: nothing is checked"
}

policy_list! {
    /// What is checked of registrations.
    Registrations, registry_server_policies, "NSM_REGISTRY_SERVER_POLICIES", "server",
    "etc/nsm/opa/common/.*.rego,etc/nsm/opa/registry/.*.rego,etc/nsm/opa/server/.*.rego",
    "Policies on registrations, as --registry-client-policies"
}

policy_list! {
    /// What is checked of requests.
    Requests, request_policies, "NSM_REQUEST_POLICIES", "server",
    "etc/nsm/opa/common/.*.rego,etc/nsm/opa/server/.*.rego",
    "Policies on requests and closes, as --registry-client-policies; upstream's programs have no such setting"
}

/// What peers may use.
#[derive(Debug, Clone, Args)]
pub(crate) struct Bounds {
    /// Connections at a time on each socket; one more is closed at once
    #[arg(long, env = "NSM_MAX_CONNECTIONS", default_value_t = Limits::default().connections, value_name = "N")]
    max_connections: usize,
    /// Connections of one SPIFFE ID at a time. Upstream's managers and forwarders hold one for each wire
    #[arg(
        long,
        env = "NSM_MAX_CONNECTIONS_PER_ID",
        default_value_t = Limits::default().connections_of_one,
        value_name = "N"
    )]
    max_connections_per_id: usize,
    /// Calls at a time on one connection, streams included; more wait at the peer
    #[arg(long, env = "NSM_MAX_CALLS", default_value_t = Limits::default().calls, value_name = "N")]
    max_calls: u32,
    /// Bytes of requests that one connection may have begun and not ended
    #[arg(long, env = "NSM_MAX_IN_FLIGHT", default_value_t = Limits::default().in_flight, value_name = "BYTES")]
    max_in_flight: usize,
    /// Watches and monitor streams that one SPIFFE ID may have open at a time
    #[arg(
        long,
        env = "NSM_MAX_WATCHES_PER_ID",
        default_value_t = Limits::default().watches_of_one,
        value_name = "N"
    )]
    max_watches_per_id: usize,
}

/// All of it, for a role that takes requests.
#[derive(Debug, Clone, Args)]
pub(crate) struct Guarding {
    #[command(flatten)]
    requests: Requests,
    #[command(flatten)]
    registry_answers: RegistryAnswers,
    #[command(flatten)]
    checks: Checks,
    #[command(flatten)]
    bounds: Bounds,
    /// Counted together, whatever runs in this process.
    #[arg(skip)]
    refusals: Refusals,
}

impl Guarding {
    /// What is checked of requests, and what peers may use.
    ///
    /// # Errors
    /// A policy that cannot be used, here and below.
    pub(crate) fn guard(&self) -> Result<Guard> {
        let policies = self.requests.policies(&self.checks)?;
        Ok(Guard { refusals: self.refusals.clone(), ..self.bounds.guard(policies) })
    }

    /// What is checked of answers to registrations.
    pub(crate) fn registry_answers(&self) -> Result<Arc<Policies>> {
        self.registry_answers.policies(&self.checks)
    }

    /// What is checked of registrations.
    pub(crate) fn of(&self, registrations: &Registrations) -> Result<Arc<Policies>> {
        registrations.policies(&self.checks)
    }

    /// The same for a registry in this process.
    pub(crate) fn of_registry(&self, registrations: &Registrations) -> Result<Guard> {
        let policies = self.of(registrations)?;
        Ok(Guard { refusals: self.refusals.clone(), ..self.bounds.guard(policies) })
    }
}

fn check() -> impl TypedValueParser<Value = Check> {
    let values = Check::ALL.map(|check| PossibleValue::new(check.name()).help(check.gives_up()));
    PossibleValuesParser::new(values)
        .map(|name| Check::ALL.into_iter().find(|check| check.name() == name).expect("one of them"))
}

impl Checks {
    fn left_out(&self) -> Policies {
        if !self.without_checks.is_empty() {
            let names: BTreeSet<_> = self.without_checks.iter().map(|check| check.name()).collect();
            tracing::warn!(checks = ?names, "left out: peers are trusted more than they could be (NSM_WITHOUT_CHECKS)");
        }
        let without = self.without_checks.iter().copied().collect();
        Policies { without, all_hops_signed: self.all_hops_signed, files: Vec::new() }
    }
}

impl Bounds {
    pub(crate) fn guard(&self, policies: Arc<Policies>) -> Guard {
        let limits = Limits {
            connections: self.max_connections,
            connections_of_one: self.max_connections_per_id,
            calls: self.max_calls,
            in_flight: self.max_in_flight,
            watches_of_one: self.max_watches_per_id,
            ..Limits::default()
        };
        Guard { policies, limits, refusals: Refusals::default() }
    }
}

fn with_files(checks: &Checks, masks: &[String], side: &str) -> Result<Arc<Policies>> {
    let mut policies = checks.left_out();
    // An empty variable is an empty list, which checks nothing, as upstream has it.
    let masks: Vec<_> = masks.iter().filter(|mask| !mask.is_empty()).cloned().collect();
    if masks.is_empty() {
        policies.without.extend(Check::ALL);
        tracing::warn!("no policies: paths are not checked at all");
        return Ok(Arc::new(policies));
    }
    load(&masks, side, &mut policies)?;
    Ok(Arc::new(policies))
}

#[cfg(feature = "rego")]
fn load(masks: &[String], side: &str, policies: &mut Policies) -> Result<()> {
    let side = if side == "client" { nsm_rego::Side::Client } else { nsm_rego::Side::Server };
    let loaded = nsm_rego::load(masks, side)?;
    for file in &loaded.files {
        tracing::info!(
            policy = nsm_identity::policy::Judge::name(&**file),
            "an operator's policy is asked too"
        );
    }
    loaded.join(policies);
    Ok(())
}

/// Without the interpreter only the built-in sets can be named.
#[cfg(not(feature = "rego"))]
fn load(masks: &[String], _side: &str, _policies: &mut Policies) -> Result<()> {
    match masks.iter().find(|mask| !mask.starts_with("etc/nsm/opa/") || !mask.ends_with(".*.rego")) {
        None => Ok(()),
        Some(mask) => anyhow::bail!(
            "the policy {mask} cannot be used: this program was built without Rego (feature rego)"
        ),
    }
}
