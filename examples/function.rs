//! A network function, composed: it stands in a chain (its service's matches lead clients to it, and from it to the next
//! element), lets a bounded number of wires through, and joins what comes in with what goes out.
//!
//! cargo run --example function -- web app:quota 10

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use nsm_cnf::{
    function::{JoinEnds, PassThrough},
    works::{Role, Works},
};
use nsm_sdk::pb::{connection::Connection, networkservice::NetworkServiceRequest};
use nsm_sdk::{Context, Element, Error, Lease, Next, Program, Release, Result, chain};
use nsm_sdk::{client::To, own_end::ClientEnd};

/// At most so many wires at a time.
#[derive(Debug)]
struct Quota {
    most: usize,
    taken: Arc<AtomicUsize>,
}

/// A place that a wire holds. Whatever ends the wire gives it back.
#[derive(Debug)]
struct Place(Arc<AtomicUsize>);

#[async_trait::async_trait]
impl Lease for Place {
    fn name(&self) -> &'static str {
        "place"
    }

    async fn release(self: Box<Self>, _: &Release) -> Result<()> {
        self.0.fetch_sub(1, Ordering::Relaxed);
        Ok(())
    }
}

#[async_trait::async_trait]
impl Element for Quota {
    fn name(&self) -> &'static str {
        "quota"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        if cx.scope.get::<Place>().is_none() {
            if self.taken.fetch_add(1, Ordering::Relaxed) >= self.most {
                self.taken.fetch_sub(1, Ordering::Relaxed);
                return Err(Error::unavailable(format!("all {} places are taken", self.most)));
            }
            cx.scope.lease(Place(Arc::clone(&self.taken)));
        }
        next.request(cx, request).await
    }
}

#[tokio::main]
async fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let [service, label, most] = &args[..] else { return Err("SERVICE KEY:VALUE PLACES".into()) };
    let (key, value) = label.split_once(':').ok_or("a label is KEY:VALUE")?;
    let most = most.parse()?;
    let serving = Program::from_env().await?.serving(service)?.labelled(key, value);
    let works = Works::start(Role::Passthrough)?;
    let chain = chain![
        serving.authorize(),
        serving.passing_monitor(),
        Quota { most, taken: Arc::default() },
        serving.unnumbered_end(),               // our end towards the client
        JoinEnds { works: Arc::clone(&works) }, // on the way back: joins both ends
        PassThrough { labels: serving.config.labels.clone() }, // the same service, asked for by us
        ClientEnd(serving.namespace()),         // our end towards the endpoint
        To(serving.manager()),                  // who finds the next element
        serving.dial(),
    ];
    serving.run(chain).await?;
    Ok(Arc::into_inner(works).map_or(Ok(()), Works::stop)?)
}
