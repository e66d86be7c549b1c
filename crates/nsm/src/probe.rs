//! `nsm probe`: whether a server of the mesh serves, for Kubernetes' probes.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use clap::Args;
use nsm_identity::Source;
use nsm_mesh::inspect::Neighbour;
use nsm_transport::{DialUrl, Pool, PoolConfig};
use tokio::time::timeout;

/// Asks a server of the mesh whether it serves (grpc.health.v1, over mutual TLS), for probes of Kubernetes
///
/// It takes the place of /bin/grpc-health-probe in upstream's images, with its flags.
///
/// Example: nsm probe --addr unix:///var/lib/networkservicemesh/nsm.io.sock
#[derive(Debug, Args)]
pub(crate) struct Probe {
    /// The server: tcp://host:port, host:port or unix:///path
    #[arg(long, value_name = "URL")]
    addr: DialUrl,
    /// There is no other way than with the identity of the Workload API
    #[arg(long, hide = true)]
    spiffe: bool,
    /// How long an identity may take to come
    #[arg(long, default_value = "1s", value_parser = crate::common::positive_duration)]
    connect_timeout: Duration,
}

impl Probe {
    pub(crate) fn run(self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("the runtime cannot start")?;
        let asked = runtime.block_on(async {
            let source = timeout(self.connect_timeout, Source::from_env()).await;
            let source = source.map_err(|_| anyhow!("no identity within {:?}", self.connect_timeout))??;
            let pool = Pool::new(source, PoolConfig::default());
            let neighbour = Neighbour { pool, role: "server", url: self.addr.clone() };
            neighbour.ask().await.map_err(|why| anyhow!("{} does not serve: {why}", self.addr))
        });
        runtime.shutdown_background();
        asked
    }
}
