//! `nsm install`, `nsm upgrade` and `nsm uninstall`: what a cluster is given, and given up.

use std::{
    fs,
    io::{self, Write as _},
    path::PathBuf,
};

use anyhow::{Context as _, Result, bail};
use clap::{ArgMatches, Args, ValueEnum, parser::ValueSource};
use nsm_install::{Identity, RECORD, Record, Settings, Store, chart, installation, removal};
use nsm_webhook::settings::SocketPath;

use crate::operate::{At, cluster::Cluster};

/// Prints what makes a Kubernetes cluster a mesh: nsm install | kubectl apply -f -
///
/// Identities are the mesh's own: a signer in the cluster has the key, an agent on each node tells pods who they are. With
/// --identity spire they come from SPIRE, which is there already.
///
/// Example: nsm install --images registry.example/mesh/ --tag v0.1.0 | kubectl apply -f -
#[derive(Debug, Args)]
pub(crate) struct Install {
    #[command(flatten)]
    what: What,
    /// What to write: one manifest, a base for kustomize, or a Helm chart
    #[arg(long, value_enum, default_value = "manifest")]
    format: Format,
    /// The directory that base or chart are written into; a manifest goes to standard output
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

/// Prints what makes an installed mesh one of this version: nsm upgrade --tag v0.2.0 | kubectl apply -f -
///
/// With the flags that it was installed with, which the ConfigMap nsm-installation says (kubectl reads it); those given here
/// change what they say. Each part is rolled pod by pod, and wires stand meanwhile: whoever makes them next on a node goes on
/// with them. What the mesh has no more by other flags or another version, `nsm upgrade --leftovers` prints afterwards.
#[derive(Debug, Args)]
pub(crate) struct Upgrade {
    #[command(flatten)]
    what: What,
    /// Print instead what was installed once and is no part of it any more: nsm upgrade --leftovers | kubectl delete -f -
    #[arg(long)]
    leftovers: bool,
    /// Another context of the kubeconfig
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// Another kubeconfig
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

/// Prints what `nsm install` of the same flags made, for kubectl: nsm uninstall | kubectl delete -f -
///
/// The webhook's configuration goes first, so that no pod is held up; the namespace goes last. Definitions of resources
/// go only with --crds true, and everything that was written of them with them.
#[derive(Debug, Args)]
pub(crate) struct Uninstall {
    #[command(flatten)]
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Manifest,
    Kustomize,
    Helm,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kept {
    /// In the memory of one registry
    Memory,
    /// As custom resources, by two registries
    Kubernetes,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Who {
    /// An agent on each node and a signer, which are installed
    Builtin,
    /// SPIRE, or whatever else serves --identity-socket on each node
    Spire,
}

#[derive(Debug, Args)]
struct What {
    /// Where everything lives
    #[arg(long, default_value = "nsm-system")]
    namespace: String,
    /// What stands before the names of images: REGISTRY/PATH/, or nothing
    #[arg(long, default_value = "", value_name = "PREFIX")]
    images: String,
    /// What stands behind them
    #[arg(long, default_value = "dev")]
    tag: String,
    /// When nodes pull images
    #[arg(long, default_value = "IfNotPresent", value_parser = ["Always", "IfNotPresent", "Never"])]
    pull_policy: String,
    /// Identities are spiffe://TRUST_DOMAIN/ns/NAMESPACE/pod/NAME; for SPIRE it is its own that counts
    #[arg(long, default_value = "k8s.nsm")]
    trust_domain: String,
    /// Who tells processes who they are
    #[arg(long, value_enum, default_value = "builtin")]
    identity: Who,
    /// The socket on each node where that is said (SPIFFE Workload API)
    #[arg(long, default_value = "/run/spire/sockets/agent.sock", value_name = "FILE")]
    identity_socket: SocketPath,
    /// What processes log: off, error, warn, info, debug or trace
    #[arg(long = "mesh-log-level", default_value = "info", value_name = "LEVEL")]
    log_level: String,
    /// Where tunnels between nodes end: a prefix that an address of each node is in; without one: the node's own address
    #[arg(long, default_value = "", value_name = "PREFIX")]
    underlay: String,
    /// What keeps registrations
    #[arg(long, value_enum, default_value = "kubernetes")]
    store: Kept,
    /// Whether annotated pods are given their wires
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    webhook: bool,
    /// Whether only those ports are open that are meant to be
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    network_policies: bool,
    /// The resources of networkservicemesh.io too; by default they are installed, and not uninstalled
    #[arg(long, action = clap::ArgAction::Set)]
    crds: Option<bool>,
}

impl What {
    fn settings(self, crds: bool) -> Settings {
        Settings {
            namespace: self.namespace,
            images: self.images,
            tag: self.tag,
            pull_policy: self.pull_policy,
            trust_domain: self.trust_domain,
            identity: match self.identity {
                Who::Builtin => Identity::Builtin,
                Who::Spire => Identity::Spire,
            },
            identity_socket: (self.identity_socket.directory, self.identity_socket.file),
            log_level: self.log_level,
            underlay: self.underlay,
            store: match self.store {
                Kept::Memory => Store::Memory,
                Kept::Kubernetes => Store::Kubernetes,
            },
            webhook: self.webhook,
            network_policies: self.network_policies,
            crds: self.crds.unwrap_or(crds),
        }
    }
}

impl What {
    /// Settings as they were, but for what was said.
    fn over(self, before: Settings, is_said: impl Fn(&str) -> bool) -> Settings {
        let now = self.settings(before.crds);
        let text = |flag: &str, now: String, before: String| if is_said(flag) { now } else { before };
        Settings {
            // Where it was found.
            namespace: now.namespace,
            images: text("images", now.images, before.images),
            tag: text("tag", now.tag, before.tag),
            pull_policy: text("pull_policy", now.pull_policy, before.pull_policy),
            trust_domain: text("trust_domain", now.trust_domain, before.trust_domain),
            identity: if is_said("identity") { now.identity } else { before.identity },
            identity_socket: if is_said("identity_socket") {
                now.identity_socket
            } else {
                before.identity_socket
            },
            log_level: text("log_level", now.log_level, before.log_level),
            underlay: text("underlay", now.underlay, before.underlay),
            store: if is_said("store") { now.store } else { before.store },
            webhook: if is_said("webhook") { now.webhook } else { before.webhook },
            network_policies: if is_said("network_policies") {
                now.network_policies
            } else {
                before.network_policies
            },
            crds: now.crds,
        }
    }
}

impl Install {
    pub(crate) fn run(self) -> Result<()> {
        let settings = self.what.settings(true);
        let files = match (self.format, &self.output) {
            (Format::Manifest, None) => return print(&installation(&settings, None)?),
            (Format::Manifest, Some(_)) => bail!("a manifest goes to standard output: leave --output out"),
            (Format::Kustomize, _) => chart::kustomize(&settings)?,
            (Format::Helm, _) => chart::helm(&settings, env!("CARGO_PKG_VERSION"))?,
        };
        let Some(output) = self.output else { bail!("--output says into which directory the files go") };
        for (path, text) in files {
            let path = output.join(path);
            let directory = path.parent().unwrap_or(&output);
            fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
            fs::write(&path, text).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}

impl Upgrade {
    /// `said` is the command line, which tells a flag that was given from one that was not.
    pub(crate) fn run(self, said: Option<&ArgMatches>) -> Result<()> {
        let cluster = Cluster::of(self.context, self.kubeconfig, &self.what.namespace);
        let mut before = None;
        // Says nothing but what it found, or why not.
        let _status = At::run_alone(async {
            before = cluster.config_map(RECORD).await?;
            Ok(std::process::ExitCode::SUCCESS)
        })?;
        let Some(before) = before else {
            bail!(
                "namespace {} says of no mesh how it was installed: there is no ConfigMap {RECORD} (hint: kustomize and Helm \
                 upgrade what they have installed; what an older nsm has installed, nsm install of the same flags upgrades)",
                self.what.namespace
            );
        };
        let before = Record::read(&before)?;
        let is_said =
            |flag: &str| said.is_some_and(|said| said.value_source(flag) == Some(ValueSource::CommandLine));
        let settings = self.what.over(before.settings.clone(), is_said);
        settings.check()?;
        if self.leftovers {
            return print(&Record::new(settings, Some(&before)).leftovers()?);
        }
        if (&settings.trust_domain, settings.identity)
            != (&before.settings.trust_domain, before.settings.identity)
        {
            eprintln!(
                "nsm: whoever tells processes who they are changes: nobody believes the identities of before, and wires are made anew"
            );
        }
        print(&installation(&settings, Some(&before))?)
    }
}

impl Uninstall {
    pub(crate) fn run(self) -> Result<()> {
        print(&removal(&self.what.settings(false))?)
    }
}

fn print(text: &str) -> Result<()> {
    io::stdout().lock().write_all(text.as_bytes()).context("write")
}
