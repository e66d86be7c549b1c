//! What becomes of the wires of this node's workloads, for whoever tells them.

use std::{fmt, sync::Arc, time::Duration};

use crate::Edit;
use async_trait::async_trait;
use nsm_api::{
    path,
    pb::{
        connection::{Connection, MonitorScopeSelector, State},
        networkservice::NetworkServiceRequest,
    },
};
use nsm_identity::{SpiffeId, UnixPeer};
use nsm_mesh::{
    Context, Element, Error, Next, Result,
    monitor::{Hub, Viewer},
    scope::{Lease, Reason, Release},
};

/// A wire, as its workload calls it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WireOf {
    /// Who asks.
    pub workload: SpiffeId,
    /// The id that it gave the connection.
    pub connection: String,
}

impl WireOf {
    /// Of the caller, whose segment is before ours.
    fn new(workload: &SpiffeId, conn: &Connection) -> Option<Self> {
        let before = path::index(conn).checked_sub(1)?;
        let connection = path::segments(conn).get(before)?.id.clone();
        Some(Self { workload: workload.clone(), connection })
    }

    /// Of whoever asks. By TCP come hops that speak for workloads of other nodes.
    pub(crate) fn of_caller(cx: &Context<'_>, conn: &Connection) -> Option<Self> {
        let caller = cx.caller.as_ref().filter(|caller| caller.peer.unix().is_some())?;
        Self::new(caller.peer.id(), conn)
    }
}

/// Tells the workloads of this node what becomes of their wires, and knows what others have made of their wishes. Called in
/// the middle of requests: it waits for nothing.
#[async_trait]
pub trait Workloads: Send + Sync + fmt::Debug {
    /// A workload asks. `process`: what asks, where the connection is not known here yet.
    fn asked(&self, wire: &WireOf, conn: &Connection, process: Option<&UnixPeer>);
    /// It got this error.
    fn failed(&self, wire: &WireOf, error: &Error);
    /// The wire is up like this, or is down, though nobody may have asked.
    fn is(&self, wire: &WireOf, conn: &Connection);
    /// It is not the workload's any more.
    fn ended(&self, wire: &WireOf, reason: Reason);

    /// What somebody has made of the workload's wish.
    fn edit(&self, _wire: &WireOf) -> Option<Edit> {
        None
    }
    /// The wire is as it was edited.
    fn applied(&self, _wire: &WireOf, _edit: &Edit) {}
    /// It cannot be so, and stays as it was.
    fn refused(&self, _wire: &WireOf, _edit: &Edit, _error: &Error) {}
    /// Waits until somebody edits a wire, or takes an edit back.
    async fn edited(&self) {
        std::future::pending().await
    }
}

/// Notes what workloads ask for, and what they are refused.
#[derive(Debug)]
pub struct TellWorkloads(pub Option<Arc<dyn Workloads>>);

#[derive(Debug)]
struct Noted {
    workloads: Arc<dyn Workloads>,
    wire: WireOf,
}

#[async_trait]
impl Lease for Noted {
    fn name(&self) -> &'static str {
        "tell-workloads"
    }

    async fn release(self: Box<Self>, release: &Release) -> Result<()> {
        match release.reason {
            // The error says more; who wants another endpoint is being answered; wires outlive this process.
            Reason::Failed | Reason::Reselect | Reason::Shutdown => {}
            reason => self.workloads.ended(&self.wire, reason),
        }
        Ok(())
    }
}

#[async_trait]
impl Element for TellWorkloads {
    fn name(&self) -> &'static str {
        "tell-workloads"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let Some(workloads) = &self.0 else { return next.request(cx, request).await };
        let process = cx.caller.as_ref().and_then(|caller| caller.peer.unix());
        let conn = request.connection.as_ref();
        let wire = conn.and_then(|conn| Some((WireOf::of_caller(cx, conn)?, process?, conn)));
        let Some((wire, process, conn)) = wire else { return next.request(cx, request).await };
        let known = cx.scope.get::<Noted>().is_some();
        workloads.asked(&wire, conn, (!known).then_some(process));
        if !known {
            cx.scope.lease(Noted { workloads: Arc::clone(workloads), wire: wire.clone() });
        }
        let answer = next.request(cx, request).await;
        if let Err(error) = &answer {
            workloads.failed(&wire, &error.clone().at(cx.me));
        }
        answer
    }
}

/// Passes on how connections are; does not end.
pub(crate) async fn follow(hub: Arc<Hub>, workloads: Option<Arc<dyn Workloads>>) {
    let Some(workloads) = workloads else { return std::future::pending().await };
    loop {
        if let Ok(mut events) = hub.watch(MonitorScopeSelector::default(), Viewer::All) {
            while let Some(event) = events.recv().await {
                for id in event.connections.keys() {
                    // As it is by now, and whose it is.
                    let Some((conn, Some(owner))) = hub.get(id) else { continue };
                    if let Some(wire) = WireOf::new(&owner, &conn)
                        && matches!(conn.state(), State::Up | State::Down)
                    {
                        workloads.is(&wire, &conn);
                    }
                }
            }
        }
        // It was cut off, which takes more news at once than there are wires; then it hears of all.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
