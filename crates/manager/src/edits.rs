//! Wishes of workloads as others have edited them, who may: a wire is asked for as it is edited, and stays as it was where
//! that cannot be. Its workload does not learn of it: it is answered as it asked.

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use nsm_api::{
    matching::Labels,
    pb::{connection::Connection, networkservice::NetworkServiceRequest},
};
use nsm_mesh::{Context, Element, Lease, Next, Release, Result, Verdict, monitor::Hub};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{ClientInfo, WireOf, Workloads};

/// When an edit that could not be is tried again, at the next request after: what it lacked may be there.
const AGAIN: Duration = Duration::from_secs(30);

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    /// The service.
    pub service: String,
    /// What the service chooses an endpoint by; all of them.
    pub labels: Labels,
    /// The largest packet; `None`: the largest that fits.
    pub mtu: Option<u32>,
}

/// What somebody has made of a workload's wish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    /// What it shall be.
    pub wanted: Wanted,
    /// Which one it is: another change has a higher one.
    pub generation: i64,
    /// The wire is like this already, as an earlier process has said.
    pub stands: bool,
}

impl Edit {
    /// Whether it says the same.
    fn is(&self, other: &Self) -> bool {
        (self.generation, &self.wanted) == (other.generation, &other.wanted)
    }
}

/// The element, and what it shares with the task beside it.
#[derive(Debug, Clone)]
pub struct Edits(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    workloads: Option<Arc<dyn Workloads>>,
    /// What every wish is given.
    info: ClientInfo,
    /// Connections of workloads, by their ids here, and the edit that was looked at last.
    looked_at: Mutex<HashMap<String, (WireOf, Option<Edit>)>>,
}

/// What a connection is asked for as.
#[derive(Debug)]
struct AskedAs {
    shared: Arc<Shared>,
    id: String,
    edit: Option<Edit>,
    /// What could not be, and when that was tried.
    refused: Option<(Edit, Instant)>,
}

#[async_trait]
impl Lease for AskedAs {
    fn name(&self) -> &'static str {
        "edits"
    }

    async fn release(self: Box<Self>, _: &Release) -> Result<()> {
        self.shared.looked_at.lock().remove(&self.id);
        Ok(())
    }
}

impl Edits {
    /// Edits as `workloads` tell them; `info` is what every wish is given besides.
    #[must_use]
    pub fn new(workloads: Option<Arc<dyn Workloads>>, info: ClientInfo) -> Self {
        Self(Arc::new(Shared { workloads, info, looked_at: Mutex::default() }))
    }

    /// Has clients ask for connections whose edits are news. Does not end.
    pub async fn look_after(self, hub: Arc<Hub>) {
        let Some(workloads) = &self.0.workloads else { return std::future::pending().await };
        loop {
            workloads.edited().await;
            for id in self.0.news(&**workloads) {
                tracing::info!(connection = id, "its wire was edited; the client is told to ask for it");
                hub.ask_again(&id);
            }
        }
    }
}

impl Shared {
    /// The connections whose edits were not looked at yet.
    fn news(&self, workloads: &dyn Workloads) -> Vec<String> {
        let all = self.looked_at.lock();
        let is_news = |wire: &WireOf, seen: &Option<Edit>| match (workloads.edit(wire), seen) {
            (Some(now), Some(seen)) => !now.is(seen),
            (now, seen) => now.is_some() != seen.is_some(),
        };
        all.iter().filter(|(_, (wire, seen))| is_news(wire, seen)).map(|(id, _)| id.clone()).collect()
    }

    /// What is wanted by an edit, or without one, of what was asked.
    fn wanted(&self, edit: Option<&Edit>, asked: &Wanted) -> Wanted {
        let Some(edit) = edit else { return asked.clone() };
        let mut wanted = edit.wanted.clone();
        self.info.add_to(&mut wanted.labels);
        wanted
    }
}

/// Whether an edit could not be, and need not be tried again yet.
fn is_in_vain(refused: Option<&(Edit, Instant)>, edit: &Edit, now: Instant) -> bool {
    refused.is_some_and(|(refused, at)| refused.is(edit) && now < *at + AGAIN)
}

/// Makes of a connection, which was asked for as `before`, one that is asked for as it is wanted.
fn ask_as(conn: &mut Connection, wanted: &Wanted, before: &Wanted) {
    conn.network_service.clone_from(&wanted.service);
    conn.labels.clone_from(&wanted.labels);
    if (&wanted.service, &wanted.labels) != (&before.service, &before.labels) {
        conn.network_service_endpoint_name.clear();
    }
    let context = conn.context.get_or_insert_default();
    if wanted.service != before.service {
        // What the endpoints of the other service gave is of no use at those of this one.
        conn.payload.clear();
        context.mtu = 0;
        if let Some(ip) = &mut context.ip_context {
            let excluded = std::mem::take(&mut ip.excluded_prefixes);
            *ip = nsm_api::pb::connectioncontext::IpContext {
                excluded_prefixes: excluded,
                ..Default::default()
            };
        }
        if let Some(dns) = &mut context.dns_context {
            dns.configs.clear();
        }
    }
    match (wanted.mtu, before.mtu) {
        (Some(mtu), _) => context.mtu = mtu,
        // It only shrinks on its way: it begins anew.
        (None, Some(_)) => context.mtu = 0,
        (None, None) => {}
    }
}

#[async_trait]
impl Element for Edits {
    fn name(&self) -> &'static str {
        "edits"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let Some(workloads) = &self.0.workloads else { return next.request(cx, request).await };
        let conn = request.connection.get_or_insert_default();
        let Some(wire) = WireOf::of_caller(cx, conn) else { return next.request(cx, request).await };
        let id = conn.id.clone();
        let (edit, held) = (workloads.edit(&wire), cx.scope.get::<AskedAs>());
        let before = match held {
            Some(held) => held.edit.clone(),
            None => edit.clone().filter(|edit| edit.stands),
        };
        let mut refused = held.and_then(|held| held.refused.as_ref()).map(|(edit, at)| (edit.clone(), *at));
        let asked = Wanted { service: conn.network_service.clone(), labels: conn.labels.clone(), mtu: None };
        let was = self.0.wanted(before.as_ref(), &asked);
        let wanted = self.0.wanted(edit.as_ref(), &asked);
        let in_vain = |edit| is_in_vain(refused.as_ref(), edit, Instant::now());
        let mut answer = None;
        if wanted != was && !edit.as_ref().is_some_and(in_vain) {
            let mut attempt = request.clone();
            ask_as(attempt.connection.get_or_insert_default(), &wanted, &was);
            let deadline = cx.deadline;
            cx.deadline = cx.share(2);
            let result = next.request(cx, attempt).await;
            cx.deadline = deadline;
            let (verdict, why) = match &result {
                Ok(_) => (Verdict::Taken, String::new()),
                Err(error) => (Verdict::Failed, error.to_string()),
            };
            cx.trail.note(self.name(), &format!("an edit: {}", wanted.service), verdict, why);
            match (result, &edit) {
                (Ok(conn), _) => answer = Some((conn, edit.clone())),
                (Err(error), Some(edit)) => {
                    workloads.refused(&wire, edit, &error.at(cx.me));
                    refused = Some((edit.clone(), Instant::now()));
                }
                // It is asked for as its workload wants it, or not at all.
                (Err(error), None) => return Err(error),
            }
        }
        let (mut answer, now) = match answer {
            Some(answered) => answered,
            None => {
                ask_as(request.connection.get_or_insert_default(), &was, &was);
                let now = if wanted == was { edit.clone() } else { before };
                (next.request(cx, request).await?, now)
            }
        };
        if let Some(now) = &now {
            // As it asked: it shall not ask for the edit when that is taken back.
            (answer.network_service, answer.labels) = (asked.service, asked.labels);
            if edit.as_ref().is_some_and(|edit| edit.is(now)) {
                workloads.applied(&wire, now);
                refused = None;
            }
        }
        self.0.looked_at.lock().insert(id.clone(), (wire, edit));
        match cx.scope.get_mut::<AskedAs>() {
            Some(held) => (held.edit, held.refused) = (now, refused),
            None => cx.scope.lease(AskedAs { shared: Arc::clone(&self.0), id, edit: now, refused }),
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_is_tried_again_after_a_while_and_another_edit_at_once() {
        let (edit, now) = (Edit { wanted: Wanted::default(), generation: 2, stands: false }, Instant::now());
        let refused = (edit.clone(), now);
        assert!(!is_in_vain(None, &edit, now));
        assert!(is_in_vain(Some(&refused), &edit, now + AGAIN / 2));
        assert!(!is_in_vain(Some(&refused), &edit, now + AGAIN));
        assert!(!is_in_vain(Some(&refused), &Edit { generation: 3, ..edit }, now));
    }
}
