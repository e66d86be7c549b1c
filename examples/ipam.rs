//! Addresses of one's own making: each client says by its label `seat` which address it wants, and two cannot have the
//! same. What a wire holds is a lease, so a seat is free again whatever ends its wire.
//!
//! cargo run --example ipam -- web

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
};

use nsm_sdk::pb::{connection::Connection, networkservice::NetworkServiceRequest};
use nsm_sdk::{Context, Element, Error, Lease, Next, Program, Release, Result, chain};

/// Who sits where, by connection.
type Seats = Arc<Mutex<BTreeMap<u8, String>>>;

#[derive(Debug, Default)]
struct Theatre(Seats);

#[derive(Debug)]
struct Seat(Seats, u8);

#[async_trait::async_trait]
impl Lease for Seat {
    fn name(&self) -> &'static str {
        "seat"
    }

    async fn release(self: Box<Self>, _: &Release) -> Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
        Ok(())
    }
}

impl Theatre {
    /// Whether the seat is taken now, not by this connection before.
    fn take(&self, seat: u8, connection: &str) -> Result<bool> {
        let mut seats = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match seats.get(&seat) {
            Some(holder) if holder != connection => Err(Error::unavailable(format!("seat {seat} is taken"))),
            Some(_) => Ok(false),
            None => {
                seats.insert(seat, connection.to_owned());
                Ok(true)
            }
        }
    }
}

#[async_trait::async_trait]
impl Element for Theatre {
    fn name(&self) -> &'static str {
        "theatre"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let conn = request.connection.get_or_insert_default();
        let wish = conn.labels.get("seat").map(String::as_str).unwrap_or_default();
        let seat = wish.parse().ok().filter(|seat| (1..=250).contains(seat)).ok_or_else(|| {
            Error::invalid(format!("label seat is {wish:?}; expected 1 to 250"))
                .hint("ask for kernel://SERVICE?seat=7")
        })?;
        if self.take(seat, &conn.id)? {
            cx.scope.lease(Seat(Arc::clone(&self.0), seat));
        }
        let ip = conn.context.get_or_insert_default().ip_context.get_or_insert_default();
        ip.src_ip_addrs = vec![format!("{}/32", Ipv4Addr::new(10, 50, 0, seat))];
        ip.dst_ip_addrs = vec!["10.50.0.254/32".into()];
        next.request(cx, request).await
    }
}

#[tokio::main]
async fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let service = std::env::args().nth(1).ok_or("which service? for example web")?;
    let serving = Program::from_env().await?.serving(service)?;
    let chain = chain![serving.authorize(), serving.monitor(), Theatre::default(), serving.end()];
    Ok(serving.run(chain).await?)
}
