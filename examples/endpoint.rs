//! An endpoint with a thought of its own: it provides a service, gives addresses, and counts its guests.
//!
//! cargo run --example endpoint -- web 172.16.1.0/24
#![allow(clippy::print_stdout, reason = "an example talks to whoever tries it")]

use std::sync::atomic::{AtomicU32, Ordering};

use nsm_sdk::pb::{connection::Connection, networkservice::NetworkServiceRequest};
use nsm_sdk::{Context, Element, Next, Program, Result, chain, ipam::Ipam};

/// Says how many requests there have been.
#[derive(Debug, Default)]
struct Guests(AtomicU32);

#[async_trait::async_trait]
impl Element for Guests {
    fn name(&self) -> &'static str {
        "guests"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let conn = next.request(cx, request).await?;
        println!("request {}: {}", self.0.fetch_add(1, Ordering::Relaxed) + 1, conn.id);
        Ok(conn)
    }
}

#[tokio::main]
async fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let service = args.next().ok_or("which service? for example web")?;
    let prefixes = args.next().ok_or("which addresses? for example 172.16.1.0/24")?.parse()?;
    let serving = Program::from_env().await?.serving(service)?;
    let chain = chain![
        serving.authorize(),                      // who asks, before anything is taken
        serving.monitor(),                        // what becomes of each wire
        Ipam::new(&prefixes, Default::default()), // addresses for both ends
        Guests::default(),
        serving.end(), // where our end appears
    ];
    Ok(serving.run(chain).await?)
}
