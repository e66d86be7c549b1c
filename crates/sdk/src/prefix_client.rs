//! Holds a prefix of a prefix server (spec/control-plane.md 11.9), for as long as it is needed.

use std::{fmt, time::Duration};

use ipnet::IpNet;
use nsm_api::pb::ipam::{PrefixRequest, Type, ipam_client::IpamClient};
use nsm_mesh::{Error, Result, error::explain, refresh};
use nsm_transport::{DialTarget, Pool};
use tokio::{sync::watch, task::AbortHandle};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};

/// A prefix that is ours while this lives. After a lost connection or a restart of the server the same one is asked
/// for; if it has gone to another meanwhile, a new one comes, and whoever watches hears of it.
pub struct LeasedPrefix {
    prefix: watch::Receiver<Option<IpNet>>,
    keeper: AbortHandle,
}

impl fmt::Debug for LeasedPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LeasedPrefix").field(&*self.prefix.borrow()).finish()
    }
}

impl LeasedPrefix {
    /// Asks this server for a prefix outside of `excluded`, and again whenever the connection is lost.
    #[must_use]
    pub fn keep(pool: Pool, server: DialTarget, dial_timeout: Duration, excluded: Vec<IpNet>) -> Self {
        let (tell, prefix) = watch::channel(None);
        let keeper = tokio::spawn(async move {
            let mut attempt = 0;
            loop {
                let mut answered = false;
                let end = hold(&pool, &server, dial_timeout, &excluded, &tell, &mut answered).await;
                if answered {
                    attempt = 0;
                }
                if attempt == 0 {
                    let end = end.err().map(|error| error.to_string());
                    tracing::info!(end, "the prefix server is lost; it is asked again");
                }
                tokio::time::sleep(refresh::backoff(attempt, rand::random())).await;
                attempt = attempt.saturating_add(1);
            }
        });
        Self { prefix, keeper: keeper.abort_handle() }
    }

    /// The prefix and its changes; `None` until the first has come.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Option<IpNet>> {
        self.prefix.clone()
    }

    /// Waits until there is one.
    pub async fn get(&self) -> IpNet {
        let mut prefix = self.prefix.clone();
        loop {
            if let Some(prefix) = *prefix.borrow_and_update() {
                return prefix;
            }
            if prefix.changed().await.is_err() {
                // The keeper lives as long as we do.
                return std::future::pending().await;
            }
        }
    }
}

impl Drop for LeasedPrefix {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

/// Holds it over one stream, until that ends.
async fn hold(
    pool: &Pool,
    server: &DialTarget,
    dial_timeout: Duration,
    excluded: &[IpNet],
    tell: &watch::Sender<Option<IpNet>>,
    answered: &mut bool,
) -> Result<()> {
    let channel =
        pool.get(server.clone(), dial_timeout).await.map_err(|e| Error::unavailable(explain(&e)))?;
    // The stream is open as long as there is a sender.
    let (ask, requests) = tokio::sync::mpsc::channel(1);
    let before = tell.borrow().map(|prefix| prefix.to_string()).unwrap_or_default();
    let exclude_prefixes = excluded.iter().map(IpNet::to_string).collect();
    let request = PrefixRequest { r#type: Type::Allocate.into(), prefix: before, exclude_prefixes };
    ask.try_send(request).map_err(|e| Error::internal(e.to_string()))?;
    let answers = IpamClient::new(channel).manage_prefixes(ReceiverStream::new(requests)).await?;
    let mut answers = answers.into_inner();
    while let Some(answer) = answers.next().await {
        let answer = answer?;
        let prefix: IpNet = answer.prefix.parse().map_err(|_| {
            Error::invalid(format!("the prefix server answers {:?}, which is not a prefix", answer.prefix))
        })?;
        *answered = true;
        tell.send_if_modified(|held| {
            let news = *held != Some(prefix);
            *held = Some(prefix);
            news
        });
    }
    drop(ask);
    Ok(())
}
