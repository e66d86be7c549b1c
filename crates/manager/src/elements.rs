//! The manager's small elements: who this node is, and what its workloads may ask for.

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;
use nsm_api::{
    mechanism::LOCAL,
    path,
    pb::{
        connection::{Connection, Mechanism},
        networkservice::NetworkServiceRequest,
    },
};
use nsm_identity::policy::{Check, Policies};
use nsm_mesh::{Context, Element, Error, Next, Result};

/// Speaks for workloads of this node only. A call whose path begins with the caller is a workload's own: it has to come
/// on the Unix socket, where the kernel says which process asks. By TCP come hops that speak for others.
#[derive(Debug)]
pub struct OnNode {
    /// Whether this is checked.
    pub policies: Arc<Policies>,
}

#[async_trait]
impl Element for OnNode {
    fn name(&self) -> &'static str {
        "on-node"
    }

    async fn admit(&self, cx: &mut Context<'_>, conn: &mut Connection) -> Result<()> {
        let Some(caller) = &cx.caller else { return Ok(()) };
        if caller.peer.unix().is_some() || path::index(conn) > 1 || !self.policies.makes(Check::OnNode) {
            return Ok(());
        }
        Err(Error::denied(format!(
            "no sufficient privileges: {} asks for itself by TCP, where nothing shows that it runs on this node",
            caller.peer.id()
        ))
        .counted(Check::OnNode.name())
        .hint("workloads ask on the Unix socket of their node's manager; NSM_WITHOUT_CHECKS=on_node allows it"))
    }
}

/// Lets workloads of this node ask for wires of this node only. Where tunnels end is settled between forwarders, and
/// those reach managers by TCP: a mechanism with addresses from a Unix socket would aim a node's tunnels at will.
#[derive(Debug)]
pub struct LocalMechanisms;

impl LocalMechanisms {
    fn check<'m>(cx: &Context<'_>, mut offered: impl Iterator<Item = &'m Mechanism>) -> Result<()> {
        let Some(caller) = cx.caller.as_ref().filter(|caller| caller.peer.unix().is_some()) else {
            return Ok(());
        };
        match offered.find(|mechanism| mechanism.cls != LOCAL) {
            None => Ok(()),
            Some(other) => Err(Error::denied(format!(
                "{} asks on a Unix socket for mechanism {:?} {:?}; expected was one of class {LOCAL}",
                caller.peer.id(),
                other.cls,
                other.r#type,
            ))
            .hint("workloads ask for KERNEL; forwarders and proxies, which negotiate tunnels, reach managers by TCP")),
        }
    }
}

#[async_trait]
impl Element for LocalMechanisms {
    fn name(&self) -> &'static str {
        "local-mechanisms"
    }

    async fn admit(&self, cx: &mut Context<'_>, conn: &mut Connection) -> Result<()> {
        // An empty one is upstream's way to say that none is chosen.
        let chosen = conn.mechanism.iter().filter(|m| !m.cls.is_empty() || !m.r#type.is_empty());
        Self::check(cx, chosen)
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        Self::check(cx, request.mechanism_preferences.iter())?;
        next.request(cx, request).await
    }
}

/// Adds labels that say where the client runs, where it did not say so itself
/// (`nodeName`, `podName`, `clusterName`; spec/control-plane.md 6.3).
#[derive(Debug, Clone)]
pub struct ClientInfo(pub BTreeMap<String, String>);

impl ClientInfo {
    pub(crate) fn add_to(&self, labels: &mut BTreeMap<String, String>) {
        for (key, value) in &self.0 {
            labels.entry(key.clone()).or_insert_with(|| value.clone());
        }
    }
}

#[async_trait]
impl Element for ClientInfo {
    fn name(&self) -> &'static str {
        "client-info"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        self.add_to(&mut request.connection.get_or_insert_default().labels);
        next.request(cx, request).await
    }
}
