//! Says on the pods of a node what becomes of their wires: from the manager's words to those of Kubernetes.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use async_trait::async_trait;
use clap::Args;
use nsm_api::pb::connection::{Connection, State};
use nsm_identity::{SpiffeId, UnixPeer};
use nsm_k8s::{
    objects::Objects,
    wires::{Name, Reader, Trouble, Wires, Wish, Writer},
};
use nsm_manager::{Edit, Wanted, WireOf, Workloads};
use nsm_mesh::{Error, Reason};
use nsm_signer::pod::Pods;

/// How long a start waits to learn which wires were edited.
const FIRST: Duration = Duration::from_secs(1);

/// Flags of whoever knows pods.
#[derive(Debug, Args)]
pub(crate) struct Telling {
    /// Say on the pods of this node what becomes of their wires: as resources (kubectl get wires), events and, where a
    /// pod waits for it, a condition; ask for wires as those resources are edited. Takes the API server of this pod or of KUBECONFIG, and NODE_NAME
    #[arg(long, env = "NSM_TELL_PODS")]
    tell_pods: bool,
    /// The node that this is
    #[arg(long, env = "NODE_NAME", hide = true, default_value = "")]
    node_name: String,
}

impl Telling {
    /// Whoever says it, if somebody does, and what he does beside; `claim` is how long a wire may be there that nobody
    /// asks for.
    pub(crate) async fn start(&self, claim: Duration) -> Result<Option<Arc<dyn Workloads>>> {
        if !self.tell_pods {
            return Ok(None);
        }
        anyhow::ensure!(
            !self.node_name.is_empty(),
            "--tell-pods (NSM_TELL_PODS) needs NODE_NAME, the name of the node as the API server knows it; in a pod it is \
             the field spec.nodeName"
        );
        let api = Objects::infer().await.context("--tell-pods (NSM_TELL_PODS)")?;
        let wires = Wires::default();
        let mut reader = Reader::new(api.clone(), wires.clone(), &self.node_name);
        // Wires that stand are soon asked for again, and shall be asked for as they were edited.
        if let Ok(Err(error)) = tokio::time::timeout(FIRST, reader.read()).await {
            tracing::debug!(%error, "it is not known yet which wires were edited");
        }
        tokio::spawn(reader.run());
        tokio::spawn(Writer::new(api, wires.clone(), &self.node_name, claim).run());
        // Processes of this very pod ask for no wires.
        Ok(Some(Arc::new(ToldPods { wires, pods: Arc::new(Pods::new(None, "")) })))
    }
}

/// Whose processes are pods.
#[derive(Debug)]
struct ToldPods {
    wires: Wires,
    pods: Arc<Pods>,
}

/// A pod's identity is `…/ns/NAMESPACE/pod/NAME`; others have no pod that something could be said on.
fn name_of(wire: &WireOf) -> Option<Name> {
    let (namespace, pod) = pod_of(&wire.workload)?;
    Some(Name { namespace, pod, connection: wire.connection.clone() })
}

fn pod_of(id: &SpiffeId) -> Option<(String, String)> {
    let mut parts = id.path().strip_prefix("/ns/")?.split('/');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(namespace), Some("pod"), Some(pod), None) => Some((namespace.to_owned(), pod.to_owned())),
        _ => None,
    }
}

#[async_trait]
impl Workloads for ToldPods {
    fn asked(&self, wire: &WireOf, conn: &Connection, process: Option<&UnixPeer>) {
        let Some(name) = name_of(wire) else {
            tracing::debug!(workload = %wire.workload, "not the identity of a pod: nothing is said on one");
            return;
        };
        let wish = Wish { service: conn.network_service.clone(), labels: conn.labels.clone() };
        self.wires.asked(&name, wish);
        if let Some(process) = process.cloned() {
            let (wires, pods) = (self.wires.clone(), Arc::clone(&self.pods));
            // A file; the request does not wait for it.
            tokio::task::spawn_blocking(move || {
                let groups = process.control_groups().map_err(|e| e.to_string());
                match groups.and_then(|groups| pods.of(&groups).map_err(|e| e.to_string())) {
                    Ok(uid) => wires.is_of(&name, uid.as_str()),
                    Err(reason) => tracing::debug!(?name, reason, "whose wire it is cannot be told"),
                }
            });
        }
    }

    fn failed(&self, wire: &WireOf, error: &Error) {
        if let Some(name) = name_of(wire) {
            self.wires.failed(&name, Trouble::said(&error.to_string()));
        }
    }

    fn is(&self, wire: &WireOf, conn: &Connection) {
        let Some(name) = name_of(wire) else { return };
        match conn.state() {
            State::Up => self.wires.up(&name, conn),
            _ => self.wires.down(&name, None),
        }
    }

    fn ended(&self, wire: &WireOf, reason: Reason) {
        let Some(name) = name_of(wire) else { return };
        let trouble = match reason {
            Reason::Expired => Some(Trouble {
                message: "its client has not asked for it again in time".into(),
                hint: "the log of the pod's container cmd-nsc says more".into(),
            }),
            Reason::Unmatched => Some(Trouble {
                message: "the service does not lead to its endpoint any more".into(),
                hint: String::new(),
            }),
            _ => None,
        };
        self.wires.ended(&name, trouble);
    }

    fn edit(&self, wire: &WireOf) -> Option<Edit> {
        let edit = self.wires.edit(&name_of(wire)?)?;
        let Wish { service, labels } = edit.wish;
        let wanted = Wanted { service, labels, mtu: edit.mtu };
        Some(Edit { wanted, generation: edit.generation, stands: edit.stands })
    }

    fn applied(&self, wire: &WireOf, edit: &Edit) {
        self.became(wire, edit, None);
    }

    fn refused(&self, wire: &WireOf, edit: &Edit, error: &Error) {
        self.became(wire, edit, Some(Trouble::said(&error.to_string())));
    }

    async fn edited(&self) {
        self.wires.edited().await;
    }
}

impl ToldPods {
    fn became(&self, wire: &WireOf, edit: &Edit, trouble: Option<Trouble>) {
        if let Some(name) = name_of(wire) {
            self.wires.applied(&name, edit.generation, trouble);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_known_by_their_identities() {
        let pod = |id: &str| pod_of(&id.parse().unwrap());
        assert_eq!(pod("spiffe://k8s.nsm/ns/apps/pod/web-1"), Some(("apps".to_owned(), "web-1".to_owned())));
        for other in [
            "spiffe://k8s.nsm/ns/apps/node/node1",
            "spiffe://k8s.nsm/web",
            "spiffe://k8s.nsm/ns/apps/pod/web/x",
            "spiffe://k8s.nsm/ns/apps/pod",
        ] {
            assert_eq!(pod(other), None, "{other}");
        }
    }
}
