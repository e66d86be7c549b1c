//! `nsm map-ip` and `nsm cluster-info`: what whoever stands between clusters has to know of this one.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use nsm_k8s::{
    addresses::{Mapper, Source},
    objects::Objects,
    properties::{Informer, Place},
};

use crate::common::{Common, Shutdown, label};

/// On Kubernetes: writes a file that says by which addresses other clusters reach the nodes of this one
///
/// A flat map, YAML: each node's internal address to its external one, and the address of this pod to that of its node;
/// or what a ConfigMap says instead. It follows both while it runs, and is written as a whole. For upstream's nsmgr-proxy, as
/// upstream's cmd-map-ip-k8s.
///
/// Example: nsm map-ip --output-path /etc/mapip/config.yaml --node-name node1
#[derive(Debug, Args)]
pub(crate) struct MapIp {
    /// The file
    #[arg(long, env = "NSM_OUTPUT_PATH", default_value = "external_ips.yaml", value_name = "FILE")]
    output_path: PathBuf,
    /// The node that this pod is on; without one nothing is said of the pod
    #[arg(long, env = "NSM_NODE_NAME", default_value = "")]
    node_name: String,
    /// A ConfigMap to take the addresses from, instead of nodes: each of its keys holds such a map
    #[arg(long, env = "NSM_FROM_CONFIG_MAP", default_value = "", value_name = "NAME")]
    from_config_map: String,
    /// The namespace of that ConfigMap
    #[arg(long, env = "NSM_NAMESPACE", default_value = "default")]
    namespace: String,
    #[command(flatten)]
    pub(crate) common: Common,
}

impl MapIp {
    pub(crate) async fn serve(self) -> Result<()> {
        let (process, shutdown) = (self.common.process(), Shutdown::on_signals()?);
        ensure!(
            self.output_path.file_name().is_some(),
            "--output-path (NSM_OUTPUT_PATH) {:?}: expected a file, for example /etc/mapip/config.yaml",
            self.output_path
        );
        let api = Objects::infer().await.context("map-ip asks the API server")?;
        let source = match self.from_config_map.as_str() {
            "" => Source::Nodes(self.node_name),
            name => Source::ConfigMap(self.namespace, name.to_owned()),
        };
        process.ready();
        tokio::select! {
            () = Mapper::new(api, source, self.output_path).run() => {}
            () = shutdown.wait() => {}
        }
        Ok(())
    }
}

/// On Kubernetes: writes what the cluster says of itself (ClusterProperty of about.k8s.io) into a ConfigMap
///
/// One key with a flat map, YAML, to which properties are added and in which they are changed; nothing is removed. For
/// upstream's nsmgr-proxy, which labels what leaves the cluster with it, as upstream's cmd-cluster-info-k8s.
///
/// Example: nsm cluster-info --namespace nsm-system
#[derive(Debug, Args)]
pub(crate) struct ClusterInfo {
    /// The ConfigMap
    #[arg(long, env = "NSM_CONFIGMAP_NAME", default_value = "cluster-info", value_name = "NAME")]
    configmap_name: String,
    /// Its namespace
    #[arg(long, env = "NSM_NAMESPACE", default_value = "default")]
    namespace: String,
    /// Its key
    #[arg(long, env = "NSM_FILE_NAME", default_value = "config.yaml", value_name = "KEY")]
    file_name: String,
    /// What properties are called there, PROPERTY:NAME, several separated by commas
    #[arg(
        long,
        env = "NSM_TRANSLATION_MAP",
        default_value = "id.k8s.io:clusterName",
        value_delimiter = ',',
        value_parser = label,
        value_name = "PROPERTY:NAME"
    )]
    translation_map: Vec<(String, String)>,
    #[command(flatten)]
    pub(crate) common: Common,
}

impl ClusterInfo {
    pub(crate) async fn serve(self) -> Result<()> {
        let (process, shutdown) = (self.common.process(), Shutdown::on_signals()?);
        let api = Objects::infer().await.context("cluster-info asks the API server")?;
        let place = Place { namespace: self.namespace, name: self.configmap_name, key: self.file_name };
        process.ready();
        tokio::select! {
            () = Informer::new(api, place, self.translation_map.into_iter().collect()).run() => {}
            () = shutdown.wait() => {}
        }
        Ok(())
    }
}
