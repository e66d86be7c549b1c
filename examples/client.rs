//! The smallest client: asks for one wire, keeps it up until a signal comes, closes it.
//!
//! NSM_NAME=web-client NSM_CONNECT_TO=unix:///run/nsm/nsm.io.sock SPIFFE_ENDPOINT_SOCKET=unix:///run/spire/agent.sock \
//!     cargo run --example client -- kernel://web/nsm0
#![allow(clippy::print_stdout, reason = "an example talks to whoever tries it")]

use nsm_sdk::Program;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).ok_or("which service? for example kernel://web/nsm0")?.parse()?;
    let wire = Program::from_env().await?.client()?.request(0, &url).await?;
    println!("up: {:?}", wire.connection().context.and_then(|context| context.ip_context));
    Program::until_signal().await?;
    Ok(wire.close().await?)
}
