//! A workload's own end of a wire: its network namespace and the name of the interface in it.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    sync::Arc,
};

use async_trait::async_trait;
use nsm_api::{
    mechanism::{InodeUrl, LOCAL, interface_name, key, kind},
    pb::{
        connection::{Connection, Mechanism},
        networkservice::NetworkServiceRequest,
    },
};
use nsm_mesh::{Context, Element, Error, Next, Result};

/// The network namespace of this process, to be handed over with requests and answers.
#[derive(Debug, Clone)]
pub struct OwnNamespace {
    url: InodeUrl,
    fd: Arc<OwnedFd>,
}

impl OwnNamespace {
    /// Opens it. The calling thread decides which one it is.
    ///
    /// # Errors
    /// Without `/proc`.
    pub fn open() -> io::Result<Self> {
        Self::of(File::open("/proc/thread-self/ns/net")?)
    }

    /// Of an open file of it: for who speaks for another one.
    ///
    /// # Errors
    /// Those of `fstat`.
    pub fn of(file: File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self { url: InodeUrl { dev: meta.dev(), ino: meta.ino() }, fd: Arc::new(file.into()) })
    }

    /// How messages refer to it.
    #[must_use]
    pub fn url(&self) -> InodeUrl {
        self.url
    }

    /// Puts it into a mechanism, and the descriptor beside the message.
    pub fn put(&self, cx: &mut Context<'_>, mechanism: &mut Mechanism) {
        mechanism.set(key::INODE_URL, self.url.to_string());
        cx.fds.insert(self.url, Arc::clone(&self.fd));
    }
}

/// The asking side: every KERNEL preference gets our namespace.
#[derive(Debug)]
pub struct ClientEnd(pub OwnNamespace);

#[async_trait]
impl Element for ClientEnd {
    fn name(&self) -> &'static str {
        "client-end"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let service = request.connection.as_ref().map_or("", |c| &c.network_service).to_owned();
        let chosen = request.connection.as_mut().and_then(|c| c.mechanism.as_mut());
        for mechanism in
            request.mechanism_preferences.iter_mut().chain(chosen).filter(|m| m.r#type == kind::KERNEL)
        {
            if mechanism.get(key::NAME).is_none() {
                mechanism.set(key::NAME, interface_name(&service, rand::random));
            }
            self.0.put(cx, mechanism);
        }
        next.request(cx, request).await
    }
}

/// The answering side: chooses KERNEL (or NOOP) among what is offered, and names the interface and our
/// namespace.
#[derive(Debug)]
pub struct ServerEnd {
    /// Where the interface shall appear.
    pub namespace: OwnNamespace,
    /// Whether it shall come without addresses and routes.
    pub unnumbered: bool,
}

#[async_trait]
impl Element for ServerEnd {
    fn name(&self) -> &'static str {
        "server-end"
    }

    async fn request(
        &self,
        cx: &mut Context<'_>,
        mut request: NetworkServiceRequest,
        next: Next<'_>,
    ) -> Result<Connection> {
        let conn = request.connection.get_or_insert_default();
        let mut mechanism = choose(conn.mechanism.as_ref(), &request.mechanism_preferences)?;
        if mechanism.r#type == kind::KERNEL {
            if mechanism.get(key::NAME).is_none() {
                mechanism.set(key::NAME, interface_name(&conn.network_service, rand::random));
            }
            if self.unnumbered {
                mechanism.set(key::UNNUMBERED, "true");
            }
            self.namespace.put(cx, &mut mechanism);
        }
        conn.mechanism = Some(mechanism.clone());
        let mut answer = next.request(cx, request).await?;
        answer.mechanism = Some(mechanism);
        Ok(answer)
    }
}

/// A chosen mechanism beats the preferences; of these the first that we can serve is taken
/// (spec/control-plane.md 8.6).
fn choose(chosen: Option<&Mechanism>, preferences: &[Mechanism]) -> Result<Mechanism> {
    let ours = |m: &&Mechanism| m.cls == LOCAL && [kind::KERNEL, kind::NOOP].contains(&m.r#type.as_str());
    if let Some(chosen) = chosen.filter(|m| !m.r#type.is_empty()) {
        return ours(&chosen).then(|| chosen.clone()).ok_or_else(|| {
            Error::invalid(format!("unsupported mechanism {} {}", chosen.cls, chosen.r#type))
                .hint("this endpoint serves KERNEL and NOOP")
        });
    }
    preferences.iter().find(ours).cloned().ok_or_else(|| {
        let offered: Vec<_> = preferences.iter().map(|m| format!("{} {}", m.cls, m.r#type)).collect();
        Error::invalid(format!("cannot support any of the requested mechanism: {}", offered.join(", ")))
            .hint("this endpoint serves KERNEL and NOOP")
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use nsm_api::mechanism::REMOTE;
    use nsm_mesh::{Call, Connections, chain};

    use super::*;

    /// Refuses, and counts.
    #[derive(Debug)]
    struct Refusing(Arc<AtomicUsize>);

    #[async_trait]
    impl Element for Refusing {
        fn name(&self) -> &'static str {
            "refusing"
        }

        async fn request(
            &self,
            _: &mut Context<'_>,
            _: NetworkServiceRequest,
            _: Next<'_>,
        ) -> Result<Connection> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Err(Error::not_found("nobody"))
        }
    }

    #[tokio::test]
    async fn a_failure_behind_a_mechanism_is_not_tried_with_the_next_one() {
        let calls = Arc::new(AtomicUsize::new(0));
        let end = ServerEnd { namespace: OwnNamespace::open().unwrap(), unnumbered: false };
        let connections =
            Connections::asking("nse", chain![end, Refusing(Arc::clone(&calls))], Default::default());
        let conn = Connection { id: "u".into(), network_service: "s".into(), ..Connection::default() };
        let mechanism_preferences = vec![
            Mechanism::new(LOCAL, kind::MEMIF),
            Mechanism::kernel("a", None),
            Mechanism::kernel("b", None),
            Mechanism::new(LOCAL, kind::NOOP),
        ];
        let request = NetworkServiceRequest {
            connection: Some(conn),
            mechanism_preferences,
            ..NetworkServiceRequest::default()
        };
        let error = connections.request(Call::default(), request).await.unwrap_err();
        assert_eq!((error.to_string().as_str(), calls.load(Ordering::SeqCst)), ("nse: nobody", 1));
    }

    #[test]
    fn the_chosen_mechanism_beats_the_preferences() {
        let kernel = Mechanism::kernel("a", None);
        let memif = Mechanism::new(LOCAL, kind::MEMIF);
        let vxlan = Mechanism::new(REMOTE, kind::VXLAN);
        assert_eq!(choose(None, &[memif.clone(), vxlan.clone(), kernel.clone()]).unwrap(), kernel);
        assert!(choose(None, std::slice::from_ref(&memif)).unwrap_err().to_string().contains("LOCAL MEMIF"));
        assert!(choose(Some(&memif), std::slice::from_ref(&kernel)).is_err());
        assert_eq!(choose(Some(&kernel), &[]).unwrap(), kernel);
    }
}
