//! `nsm webhook`: flags and environment of the admission webhook, as upstream names them.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use nsm_transport::https::Shown;
use nsm_webhook::{
    cluster::Cluster,
    configuration::{Configuration, Reach},
    keeper::{Found, Keeper, Origin},
    server::{Hook, serve},
    settings::{Annotation, Program, Quantity, Resources, Settings, SocketPath, Variable},
};
use tokio::{net::TcpListener, time::sleep};

use crate::common::{Common, Shutdown, label};

/// On Kubernetes: gives annotated pods what they need to get their wires
///
/// API servers ask it about pods and workloads that are created. What is annotated with networkservicemesh.io gets an
/// init container that makes the wires and a side-car that keeps them; what is not is never held up by it. With
/// --webhook-mode selfregister it makes its certificates itself and tells the API server of them and of itself; spire,
/// upstream's default, serves its X.509-SVID and leaves the rest to SPIRE and a manifest.
///
/// Example: nsm webhook --webhook-mode selfregister --service-name nsm-webhook --namespace nsm-system --init-container-images cmd-nsc-init=nsm:dev --container-images cmd-nsc=nsm:dev
#[derive(Debug, Args)]
pub(crate) struct Webhook {
    /// Name in logs, and of the MutatingWebhookConfiguration that it writes
    #[arg(long, env = "NSM_NAME", default_value = "admission-webhook-k8s")]
    name: String,
    /// The Service in front of it
    #[arg(long, env = "NSM_SERVICE_NAME", default_value = "default")]
    service_name: String,
    /// The namespace of that Service
    #[arg(long, env = "NSM_NAMESPACE", default_value = "default")]
    namespace: String,
    /// The URL where API servers reach it, instead of a Service: for a webhook that runs outside of the cluster
    #[arg(long, env = "NSM_WEBHOOK_URL", value_name = "https://HOST:PORT/mutate")]
    webhook_url: Option<String>,
    /// Where to listen
    #[arg(long, env = "NSM_LISTEN_ON", default_value = ":443", value_name = "HOST:PORT")]
    listen_on: String,
    /// Key of the annotation that asks for wires
    #[arg(long, env = "NSM_ANNOTATION", default_value = "networkservicemesh.io")]
    annotation: Annotation,
    /// Labels that patched pods get, KEY:VALUE, several separated by commas
    #[arg(long, env = "NSM_LABELS", value_delimiter = ',', value_parser = label, value_name = "KEY:VALUE")]
    labels: Vec<(String, String)>,
    /// The variable that carries the annotation's value into the containers
    #[arg(long, env = "NSM_NSURL_ENV_NAME", default_value = "NSM_NETWORK_SERVICES")]
    nsurl_env_name: String,
    /// What runs before the pod's own containers: IMAGE, or NAME=IMAGE for /bin/NAME of it, several separated by commas
    #[arg(long, env = "NSM_INIT_CONTAINER_IMAGES", value_delimiter = ',', value_name = "[NAME=]IMAGE")]
    init_container_images: Vec<Program>,
    /// What runs beside them
    #[arg(long, env = "NSM_CONTAINER_IMAGES", value_delimiter = ',', value_name = "[NAME=]IMAGE")]
    container_images: Vec<Program>,
    /// Where nodes have the socket of the SPIFFE Workload API; pods see it in /run/spire/sockets
    #[arg(
        long,
        env = "NSM_IDENTITY_SOCKET",
        default_value = "/run/spire/sockets/agent.sock",
        value_name = "FILE"
    )]
    identity_socket: SocketPath,
    /// Further variables of these containers, NAME=VALUE, several separated by commas
    #[arg(long, env = "NSM_ENVS", value_delimiter = ',', value_name = "NAME=VALUE")]
    envs: Vec<Variable>,
    /// Where the certificate comes from: spire (the X.509-SVID) or selfregister (its own)
    #[arg(long, env = "NSM_WEBHOOK_MODE", default_value = "spire", ignore_case = true, value_parser = ["spire", "selfregister"])]
    webhook_mode: String,
    /// A certificate of yours, in either mode; with --key-file-path
    #[arg(long, env = "NSM_CERT_FILE_PATH", value_name = "FILE")]
    cert_file_path: Option<PathBuf>,
    /// Its key
    #[arg(long, env = "NSM_KEY_FILE_PATH", value_name = "FILE")]
    key_file_path: Option<PathBuf>,
    /// What API servers shall trust then, for selfregister
    #[arg(long, env = "NSM_CA_BUNDLE_FILE_PATH", value_name = "FILE")]
    ca_bundle_file_path: Option<PathBuf>,
    /// The Secret of its namespace that keeps the authorities of its certificates, for selfregister
    #[arg(long, env = "NSM_WEBHOOK_SECRET", default_value = "nsm-webhook-authorities", value_name = "NAME")]
    webhook_secret: String,
    /// Namespaces whose pods are left alone, besides its own, for selfregister
    #[arg(
        long,
        env = "NSM_SPARED_NAMESPACES",
        value_delimiter = ',',
        default_value = "kube-system",
        value_name = "NAMESPACE"
    )]
    spared_namespaces: Vec<String>,
    /// Side-cars as init containers that stay: auto is wherever the cluster has them (Kubernetes 1.29)
    #[arg(long, env = "NSM_NATIVE_SIDECARS", default_value = "auto", value_parser = ["auto", "true", "false"])]
    native_sidecars: String,
    /// Refuse what is annotated with what cannot be understood, instead of warning
    #[arg(long, env = "NSM_REJECT_MALFORMED", default_value_t = false, action = clap::ArgAction::Set)]
    reject_malformed: bool,
    /// At most so much memory for each of the containers
    #[arg(long, env = "NSM_SIDECAR_LIMITS_MEMORY", default_value = "80Mi", value_name = "QUANTITY")]
    sidecar_limits_memory: Quantity,
    /// At most so much of a processor
    #[arg(long, env = "NSM_SIDECAR_LIMITS_CPU", default_value = "200m", value_name = "QUANTITY")]
    sidecar_limits_cpu: Quantity,
    /// At least so much memory
    #[arg(long, env = "NSM_SIDECAR_REQUESTS_MEMORY", default_value = "40Mi", value_name = "QUANTITY")]
    sidecar_requests_memory: Quantity,
    /// At least so much of a processor
    #[arg(long, env = "NSM_SIDECAR_REQUESTS_CPU", default_value = "100m", value_name = "QUANTITY")]
    sidecar_requests_cpu: Quantity,
    #[command(flatten)]
    pub(crate) common: Common,
}

impl Webhook {
    pub(crate) fn name(&self) -> String {
        self.name.clone()
    }

    pub(crate) async fn serve(self) -> Result<()> {
        let (process, shutdown) = (self.common.process(), Shutdown::on_signals()?);
        let self_registers = self.webhook_mode.eq_ignore_ascii_case("selfregister");
        let files = match (&self.cert_file_path, &self.key_file_path) {
            (Some(certificate), Some(key)) => Some(Origin::Files {
                certificate: certificate.clone(),
                key: key.clone(),
                bundle: self.ca_bundle_file_path.clone(),
            }),
            (None, None) => None,
            _ => bail!("of --cert-file-path and --key-file-path one is given; expected both or none"),
        };
        if self_registers && files.is_some() && self.ca_bundle_file_path.is_none() {
            bail!(
                "selfregister with a certificate of yours needs --ca-bundle-file-path (NSM_CA_BUNDLE_FILE_PATH): \
                 what API servers shall trust"
            );
        }
        let mut settings = self.settings();
        settings.check()?;
        let every = self.listen_on.starts_with(':').then(|| format!("[::]{}", self.listen_on));
        let listen_on = every.as_deref().unwrap_or(&self.listen_on);
        let listener = TcpListener::bind(listen_on).await;
        let listener = listener.with_context(|| format!("cannot listen on {listen_on:?} (NSM_LISTEN_ON)"))?;

        let cluster = match Cluster::infer().await {
            Ok(cluster) => Some(cluster),
            Err(error) if self_registers => return Err(error.into()),
            Err(error) => {
                tracing::warn!(%error, "annotations and security levels of namespaces are not known");
                None
            }
        };
        if let Some(cluster) = cluster.as_ref().filter(|_| self.native_sidecars == "auto") {
            process.waits("waiting for the API server");
            settings.native_sidecars = tokio::select! {
                native = has_native_sidecars(cluster) => native,
                () = shutdown.clone().wait() => return Ok(()),
            };
        }
        if settings.names().next().is_none() {
            tracing::warn!(
                "pods get no container: neither NSM_INIT_CONTAINER_IMAGES nor NSM_CONTAINER_IMAGES is set"
            );
        }
        let found = Arc::<Found>::default();
        let shown = Arc::new(match (self_registers, &files) {
            (false, None) => Shown::svid(process.identity().await?),
            _ => Shown::own(),
        });
        let hook = Hook::new(settings, cluster.clone(), Arc::clone(&shown), Arc::clone(&found));
        let secret = Origin::Secret { namespace: self.namespace.clone(), name: self.webhook_secret.clone() };
        if let Some(origin) = files.or(self_registers.then_some(secret)) {
            let reach = self.reach();
            let keeper = Keeper {
                names: reach.names(),
                configuration: self_registers.then(|| self.configuration(reach)),
                cluster: cluster.filter(|_| self_registers),
                home: Some(self.namespace.clone()),
                origin,
                found,
                shown: Arc::clone(&shown),
            };
            tokio::spawn(keeper.run());
        }
        tracing::info!(name = self.name, address = %listener.local_addr()?, "pods are looked at");
        process.ready();
        serve(listener, hook, shutdown.wait()).await;
        Ok(())
    }

    fn settings(&self) -> Settings {
        Settings {
            annotation: self.annotation.clone(),
            labels: self.labels.iter().cloned().collect(),
            nsurl_env: self.nsurl_env_name.clone(),
            init_images: self.init_container_images.clone(),
            images: self.container_images.clone(),
            envs: self.envs.clone(),
            resources: Resources {
                limits_cpu: self.sidecar_limits_cpu.clone(),
                limits_memory: self.sidecar_limits_memory.clone(),
                requests_cpu: self.sidecar_requests_cpu.clone(),
                requests_memory: self.sidecar_requests_memory.clone(),
            },
            native_sidecars: self.native_sidecars == "true",
            reject_malformed: self.reject_malformed,
            identity_socket: self.identity_socket.clone(),
        }
    }

    fn reach(&self) -> Reach {
        match &self.webhook_url {
            Some(url) => Reach::Url(url.clone()),
            None => Reach::Service { name: self.service_name.clone(), namespace: self.namespace.clone() },
        }
    }

    fn configuration(&self, reach: Reach) -> Configuration {
        let spared = self.spared_namespaces.iter().chain([&self.namespace]).cloned();
        Configuration {
            name: self.name.clone(),
            annotation: self.annotation.clone(),
            reach,
            bundle: String::new(),
            spared: spared.filter(|name| !name.is_empty()).collect(),
            annotated: BTreeSet::new(),
            owner: None,
        }
    }
}

/// Without an API server nobody asks, so there is time.
async fn has_native_sidecars(cluster: &Cluster) -> bool {
    loop {
        match cluster.has_native_sidecars().await {
            Ok(native) => return native,
            Err(error) => tracing::warn!(%error, "waiting for it"),
        }
        sleep(Duration::from_secs(1)).await;
    }
}
