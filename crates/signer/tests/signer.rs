//! Signers and agents before a real API server, with the rights that `nsm install` gives them.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use nsm_cluster::{ApiServer, api_server};
use nsm_identity::{Bundles, ca::workload::Issued};
use nsm_install::{Settings, manifest};
use nsm_k8s::objects::Objects;
use nsm_signer::{
    agent::{Agent, AgentError, Config as AgentConfig},
    pod::PodUid,
    signer::{Config, Signer},
};
use rustls_pki_types::UnixTime;
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::Notify, task::JoinHandle, time::timeout};

const PATIENCE: Duration = Duration::from_secs(120);

/// An API server with what `nsm install` makes, and two nodes with a pod of a workload and one of ours each.
struct Ring {
    server: ApiServer,
    signer: PathBuf,
    node: PathBuf,
    directory: TempDir,
}

/// A signer that runs.
struct Running {
    address: String,
    ready: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Running {
    async fn get_ready(self) -> Self {
        timeout(PATIENCE, self.ready.notified()).await.expect("the signer is ready");
        self
    }
}

impl Ring {
    fn new(test: &str) -> Option<Self> {
        let server = api_server(test)?;
        server.apply(&manifest(&Settings { webhook: false, ..Settings::default() }).unwrap());
        server.apply("{apiVersion: v1, kind: ServiceAccount, metadata: {name: default, namespace: default}}");
        for node in ["node1", "node2"] {
            server.apply(&format!("{{apiVersion: v1, kind: Node, metadata: {{name: {node}}}}}"));
            for (namespace, name, account) in [
                ("default", format!("web-{node}"), "default"),
                ("nsm-system", format!("agent-{node}"), "nsm-node"),
            ] {
                server.apply(&format!(
                    "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: {namespace}}}, spec: {{nodeName: \
                     {node}, serviceAccountName: {account}, automountServiceAccountToken: false, containers: [{{name: a, \
                     image: a}}]}}}}"
                ));
            }
        }
        let signer = server.kubeconfig_of("nsm-system", "nsm-identity");
        let node = server.kubeconfig_of("nsm-system", "nsm-node");
        Some(Self { server, signer, node, directory: tempfile::tempdir().unwrap() })
    }

    async fn signer_of(&self, domain: &str, kubeconfig: &Path) -> Running {
        self.signer_for(domain, kubeconfig, Duration::from_secs(3600)).await
    }

    async fn signer_for(&self, domain: &str, kubeconfig: &Path, svid_lifetime: Duration) -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let config = Config {
            trust_domain: domain.parse().unwrap(),
            svid_lifetime,
            namespace: "nsm-system".into(),
            secret: "nsm-identity-authorities".into(),
            roots: "nsm-identity-roots".into(),
            agents: "nsm-node".into(),
            names: vec!["nsm-identity.nsm-system.svc".into(), "127.0.0.1".into()],
        };
        let signer = Signer::new(config, Objects::of(kubeconfig).await.unwrap());
        let ready = Arc::<Notify>::default();
        let told = Arc::clone(&ready);
        let task = tokio::spawn(async move {
            signer.serve(listener, || told.notify_one(), std::future::pending()).await.unwrap();
        });
        Running { address, ready, task }
    }

    async fn signer(&self) -> Running {
        self.signer_of("k8s.nsm", &self.signer).await
    }

    fn token(&self, account: &str, audience: &str, pod: Option<&str>) -> String {
        let mut args = vec!["create", "token", account, "--namespace=nsm-system", "--audience", audience];
        if let Some(pod) = pod {
            args.extend(["--bound-object-kind=Pod", "--bound-object-name", pod]);
        }
        self.server.kubectl(&args)
    }

    /// An agent with this token; it may at the API server what `nsm install` lets it.
    async fn agent(&self, signer: &Running, token: &str) -> Agent {
        let file = tempfile::Builder::new().tempfile_in(self.directory.path()).unwrap();
        let (_, path) = file.keep().unwrap();
        fs::write(&path, token).unwrap();
        let config = AgentConfig {
            signer: signer.address.clone(),
            token: path,
            roots: ("nsm-system".into(), "nsm-identity-roots".into()),
            own: None,
        };
        Agent::new(config, Objects::of(&self.node).await.unwrap()).unwrap()
    }

    async fn agent_on(&self, signer: &Running, node: &str) -> Agent {
        let token = self.token("nsm-node", "nsm-identity", Some(&format!("agent-{node}")));
        self.agent(signer, &token).await
    }

    fn uid(&self, namespace: &str, pod: &str) -> PodUid {
        let args = ["get", "pod", pod, "--namespace", namespace, "--output=jsonpath={.metadata.uid}"];
        PodUid::try_from(self.server.kubectl(&args)).unwrap()
    }

    fn secret(&self) -> String {
        let args = [
            "get",
            "secret",
            "nsm-identity-authorities",
            "--namespace=nsm-system",
            "--output=jsonpath={.data}",
        ];
        self.server.kubectl(&args)
    }
}

/// The identity, where a workload would believe it.
fn believed(issued: &Issued, by: &Issued) -> String {
    let mut bundles = Bundles::default();
    bundles.insert(by.domain.clone(), &by.roots).unwrap();
    let now = UnixTime::since_unix_epoch(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap());
    let (leaf, rest) = issued.svids[0].chain().split_first().unwrap();
    bundles.verify(leaf, rest, now).unwrap().id().to_string()
}

fn refusal(answer: Result<Issued, AgentError>) -> String {
    match answer {
        Ok(issued) => panic!("{} was signed", issued.svids[0].id()),
        Err(error @ AgentError::Refused { .. }) => error.to_string(),
        Err(error) => panic!("not a refusal: {error}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_gets_identities_of_pods_of_its_node_and_no_others() {
    let Some(ring) = Ring::new("an_agent_gets_identities_of_pods_of_its_node_and_no_others") else { return };
    // Two at once, where there is nothing yet: they share what one of them made.
    let (one, two) = tokio::join!(ring.signer(), ring.signer());
    let (one, two) = (one.get_ready().await, two.get_ready().await);
    let (first, second) = (ring.agent_on(&one, "node1").await, ring.agent_on(&two, "node2").await);
    let (web1, web2) = (ring.uid("default", "web-node1"), ring.uid("default", "web-node2"));

    let (of_one, of_two) = (first.ask(&web1).await.unwrap(), second.ask(&web2).await.unwrap());
    assert_eq!(believed(&of_one, &of_two), "spiffe://k8s.nsm/ns/default/pod/web-node1");
    assert_eq!(believed(&of_two, &of_one), "spiffe://k8s.nsm/ns/default/pod/web-node2");
    let own = first.ask(&ring.uid("nsm-system", "agent-node1")).await.unwrap();
    assert_eq!(believed(&own, &of_one), "spiffe://k8s.nsm/ns/nsm-system/node/node1");

    // What a stolen node can do: nothing for pods of others.
    let said = refusal(first.ask(&web2).await);
    assert!(said.contains(&format!("no pod with the UID {web2} runs on node node1")), "{said}");
    let nobody = PodUid::try_from("0e2b6c1e-3f1a-4c52-9d4f-0123456789ab".to_owned()).unwrap();
    assert!(refusal(first.ask(&nobody).await).contains("no pod with the UID"));

    for (token, says) in [
        ("nonsense".to_owned(), "the token of the agent is not accepted"),
        (ring.token("nsm-node", "nsm-identity", None), "not bound to a node"),
        (
            ring.token("nsm-node", "other", Some("agent-node1")),
            "expected a bound token for the audience nsm-identity",
        ),
        (
            ring.token("nsm-registry", "nsm-identity", None),
            "system:serviceaccount:nsm-system:nsm-registry may not ask for identities; only agents may, which have the \
             service account nsm-system/nsm-node",
        ),
    ] {
        let said = refusal(ring.agent(&one, &token).await.ask(&web1).await);
        assert!(said.contains(says), "{said}");
    }

    // Whoever is deleted has no identity any more.
    let _said = ring.server.kubectl(&["delete", "pod", "web-node1", "--force", "--grace-period=0"]);
    assert!(refusal(first.ask(&web1).await).contains("no pod with the UID"));
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_a_pod_have_the_same_and_it_goes_on_without_a_signer_until_it_ends() {
    let name = "all_of_a_pod_have_the_same_and_it_goes_on_without_a_signer_until_it_ends";
    let Some(ring) = Ring::new(name) else { return };
    let web = ring.uid("default", "web-node1");
    let leaf = |issued: &Issued| issued.svids[0].leaf().clone();
    // Long enough for a slow machine to get to its second half in good time.
    let signer = ring.signer_for("k8s.nsm", &ring.signer, Duration::from_secs(20)).await.get_ready().await;
    let agent = ring.agent_on(&signer, "node1").await;
    let (one, other) = tokio::join!(agent.issued(&web, false), agent.issued(&web, false));
    let (one, other) = (one.unwrap(), other.unwrap());
    assert_eq!(leaf(&one), leaf(&other));
    one.renew.due().await;
    let next = agent.issued(&web, true).await.unwrap();
    assert_ne!(leaf(&next), leaf(&one), "after half of its life there is another");
    drop(signer);
    next.renew.due().await;
    let said = agent.issued(&web, true).await.unwrap_err().to_string();
    assert!(said.contains("does not answer"), "{said}");
    // Whoever starts now has what the others have, for as long as it is good.
    loop {
        let began = SystemTime::now();
        match agent.issued(&web, false).await {
            Ok(issued) => assert_eq!(leaf(&issued), leaf(&next)),
            Err(error) => {
                assert!(SystemTime::now() >= next.svids[0].not_after(), "{error}");
                break;
            }
        }
        assert!(began < next.svids[0].not_after(), "what has ended is nobody's");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_outlive_signers_and_are_never_replaced_unasked() {
    let Some(ring) = Ring::new("keys_outlive_signers_and_are_never_replaced_unasked") else { return };
    let web = ring.uid("default", "web-node1");
    let signer = ring.signer().await.get_ready().await;
    let before = ring.agent_on(&signer, "node1").await.ask(&web).await.unwrap();
    let kept = ring.secret();
    drop(signer);
    let signer = ring.signer().await.get_ready().await;
    let agent = ring.agent_on(&signer, "node1").await;
    let after = agent.ask(&web).await.unwrap();
    let (_, _) = (believed(&before, &after), believed(&after, &before));
    assert_eq!(ring.secret(), kept);
    drop(signer);

    // Nobody there: said with where, and what to look at.
    let said = agent.ask(&web).await.unwrap_err().to_string();
    assert!(said.contains("does not answer") && said.contains("Deployment nsm-identity"), "{said}");

    // Another domain, and a Secret that somebody damaged: neither is replaced, and both are waited for.
    let other = ring.signer_of("other.nsm", &ring.signer).await;
    let at_other = ring.agent_on(&other, "node1").await;
    assert!(timeout(Duration::from_secs(3), other.ready.notified()).await.is_err());
    assert!(at_other.ask(&web).await.is_err());
    assert_eq!(ring.secret(), kept);
    drop(other);
    let patch = r#"{"data":{"authorities.pem":"bm9uc2Vuc2U="}}"#;
    let patch = ["patch", "secret", "nsm-identity-authorities", "--namespace=nsm-system", "--patch", patch];
    let _said = ring.server.kubectl(&patch);
    let signer = ring.signer().await;
    assert!(timeout(Duration::from_secs(3), signer.ready.notified()).await.is_err());
    let _said =
        ring.server.kubectl(&["delete", "secret", "nsm-identity-authorities", "--namespace=nsm-system"]);
    let signer = signer.get_ready().await;
    let anew = ring.agent_on(&signer, "node1").await.ask(&web).await.unwrap();
    assert_ne!(anew.roots, before.roots);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_missing_is_named_and_waited_for() {
    let Some(ring) = Ring::new("a_right_that_is_missing_is_named_and_waited_for") else { return };
    let web = ring.uid("default", "web-node1");
    // An agent that may not read whom to trust.
    let signer = ring.signer().await.get_ready().await;
    let _said = ring.server.kubectl(&["delete", "rolebinding", "nsm-node", "--namespace=nsm-system"]);
    let agent = ring.agent_on(&signer, "node1").await;
    let mut said = String::new();
    for _ in 0..200 {
        // RBAC takes effect a moment late.
        match agent.ask(&web).await {
            Err(error) => {
                said = error.to_string();
                break;
            }
            Ok(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    drop(signer);
    let rule = r#"its role needs the rule {apiGroups: [""], resources: [configmaps], verbs: [get]}"#;
    assert!(said.contains("system:serviceaccount:nsm-system:nsm-node") && said.contains(rule), "{said}");
    // A signer that may not have tokens reviewed.
    let _said = ring.server.kubectl(&["delete", "clusterrolebinding", "nsm-system-identity"]);
    ring.server.apply(
        &manifest(&Settings::default())
            .unwrap()
            .split("---\n")
            .filter(|object| object.contains("kind: RoleBinding") && object.contains("name: nsm-node\n"))
            .collect::<Vec<_>>()
            .join("---\n"),
    );
    let signer = ring.signer().await.get_ready().await;
    let agent = ring.agent_on(&signer, "node1").await;
    let rule =
        r#"the rule {apiGroups: ["authentication.k8s.io"], resources: [tokenreviews], verbs: [create]}"#;
    let mut said = String::new();
    for _ in 0..200 {
        said = agent.ask(&web).await.err().map_or_else(String::new, |error| error.to_string());
        if said.contains(rule) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(said.contains(rule) && said.contains("cannot sign now"), "{said}");
}
