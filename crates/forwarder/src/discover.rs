//! Finds the endpoint: by its name, or by what the service's matches say of the client's labels
//! (spec/control-plane.md 8.2, 8.3).

use std::{
    collections::HashMap,
    sync::Arc,
    time::SystemTime,
};

use async_trait::async_trait;
use nsm_api::{
    matching::Policy,
    path,
    pb::{connection::Connection, networkservice::NetworkServiceRequest, registry::NetworkService},
};
use nsm_mesh::{Context, Element, Error, Next, Result};
use nsm_registry::client::{Directory, Endpoint};
use parking_lot::Mutex;
use tonic::Code;

/// The element. Candidates are tried in turn, starting with the next one for every new wire of a service.
#[derive(Debug)]
pub struct Discover {
    directory: Arc<Directory>,
    turns: Mutex<HashMap<String, usize>>,
}

impl Discover {
    /// Asks this directory, the manager's.
    #[must_use]
    pub fn new(directory: Arc<Directory>) -> Self {
        Self { directory, turns: Mutex::default() }
    }

    async fn service(&self, cx: &Context<'_>, name: &str, payload: &str) -> Result<NetworkService> {
        let found = self.directory.service(name, payload, cx.deadline).await?;
        found.ok_or_else(|| {
            Error::not_found(format!("network service {name:?} is not found"))
                .hint("apply a NetworkService of that name, or start an endpoint that registers it")
        })
    }

    async fn named(&self, cx: &Context<'_>, name: &str) -> Result<Endpoint> {
        let found = self.directory.endpoint(name, cx.deadline).await?;
        found.ok_or_else(|| {
            Error::not_found(format!("network service endpoint {name:?} not found"))
                .hint("it has not registered, or its registration has expired")
        })
    }

    fn turn(&self, service: &str, candidates: usize) -> usize {
        let mut turns = self.turns.lock();
        let turn = turns.entry(service.to_owned()).or_default();
        let first = *turn % candidates;
        *turn = turn.wrapping_add(1);
        first
    }

    async fn select(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let conn = request.connection.get_or_insert_default();
        let service = self.service(cx, &conn.network_service, &conn.payload).await?;
        let mut endpoints = self.directory.endpoints(&service.name, cx.deadline).await?;
        let now = SystemTime::now();
        endpoints.retain(|e| e.nse.expiration_time.as_ref().is_none_or(|t| path::from_timestamp(t) > now));
        let policy = Policy::lenient(&service);
        let selection = policy.endpoints(&conn.labels, &endpoints);
        let candidates = &selection.candidates;
        if candidates.is_empty() {
            return Err(Error::not_found(format!("network service endpoint candidates not found: {selection}"))
                .hint("start an endpoint with these labels, or change the matches of the network service"));
        }
        service.payload.clone_into(&mut conn.payload);
        let first = self.turn(&service.name, candidates.len());
        let mut failures: Vec<(String, Error)> = Vec::new();
        for i in 0..candidates.len() {
            let candidate = candidates[(first + i) % candidates.len()];
            let mut attempt = request.clone();
            attempt.connection.get_or_insert_default().network_service_endpoint_name.clone_from(&candidate.nse.name);
            cx.next_hop = Some(candidate.dial.clone());
            match next.request(cx, attempt).await {
                Ok(conn) => return Ok(conn),
                Err(error) => failures.push((candidate.nse.name.clone(), error)),
            }
            if tokio::time::Instant::now() >= cx.deadline {
                break;
            }
        }
        Err(all_failed(failures))
    }
}

#[async_trait]
impl Element for Discover {
    fn name(&self) -> &'static str {
        "discover"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let conn = request.connection.get_or_insert_default();
        if conn.network_service_endpoint_name.is_empty() {
            return self.select(cx, request, next).await;
        }
        let name = conn.network_service_endpoint_name.clone();
        if conn.payload.is_empty() {
            conn.payload = self.service(cx, &conn.network_service, "").await?.payload;
        }
        cx.next_hop = Some(self.named(cx, &name).await?.dial);
        next.request(cx, request).await
    }

    async fn close_forgotten(&self, cx: &mut Context<'_>, conn: Connection, next: Next<'_>) -> Result<()> {
        match self.named(cx, &conn.network_service_endpoint_name).await {
            Ok(endpoint) => cx.next_hop = Some(endpoint.dial),
            // What is here is cleared all the same.
            Err(error) => tracing::debug!(%error, "the endpoint of a closed connection is not known"),
        }
        next.close_forgotten(cx, conn).await
    }
}

/// One candidate's error says more than "all failed"; of several each is named.
fn all_failed(mut failures: Vec<(String, Error)>) -> Error {
    if failures.len() == 1
        && let Some((_, error)) = failures.pop()
    {
        return error;
    }
    let code = failures.first().map_or(Code::Unknown, |(_, e)| e.code);
    let texts: Vec<_> = failures.iter().map(|(name, error)| format!("{name}: {error}")).collect();
    Error::new(code, format!("all candidates have failed: {}", texts.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_failure_speaks_for_itself() {
        let one = all_failed(vec![("a".into(), Error::denied("no"))]);
        assert_eq!((one.code, one.to_string().as_str()), (Code::PermissionDenied, "no"));
        let two = all_failed(vec![("a".into(), Error::denied("no")), ("b".into(), Error::internal("x"))]);
        assert_eq!(two.to_string(), "all candidates have failed: a: no; b: x");
    }
}
