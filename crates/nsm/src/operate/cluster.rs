//! The mesh of a Kubernetes cluster, from wherever kubectl reaches it. In the pods of the mesh is this very program, which
//! finds and asks the processes there (`nsm tell`); kubectl, which knows credentials, proxies and contexts, brings its
//! words here.

use std::{
    path::PathBuf,
    process::{Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use futures::{StreamExt as _, stream};
use nsm_api::pb::introspect::Kind;
use serde_json::Value;
use tokio::{process::Command, time::timeout};

use super::{PATIENCE, Seen, Silent, View, plain, without_controls};

/// How many pods are asked at once: each takes a kubectl.
const AT_ONCE: usize = 8;
/// How long a kubectl may take beyond what its program takes.
const WAY: Duration = Duration::from_secs(15);
/// The parts of the mesh whose processes tell of themselves: the names of their containers.
const TELLING: [&str; 2] = ["node", "registry"];
/// Who reads its own sockets in the images of the mesh.
const PROGRAM: &str = "/bin/nsm";

/// Which cluster, and where in it.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Of a Kubernetes cluster")]
pub(crate) struct Cluster {
    /// Ask the mesh of the cluster that kubectl's context names, by kubectl exec; `kubectl nsm` always does
    #[arg(long, conflicts_with_all = ["lab", "at"])]
    cluster: bool,
    /// Another context of the kubeconfig
    #[arg(long, value_name = "NAME", requires = "cluster")]
    context: Option<String>,
    /// Another kubeconfig
    #[arg(long, value_name = "FILE", requires = "cluster")]
    kubeconfig: Option<PathBuf>,
    /// Where the mesh is installed
    #[arg(short, long, value_name = "NAME", default_value = "nsm-system", requires = "cluster")]
    namespace: String,
}

/// A pod of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Pod {
    name: String,
    /// Which part of the mesh.
    part: String,
    node: String,
    /// Whether its container runs.
    runs: bool,
    /// What is wrong with it; empty: it is ready.
    trouble: String,
}

impl Pod {
    fn of(pod: &Value) -> Self {
        let text = |value: &Value| without_controls(value.as_str().unwrap_or_default());
        let part = text(&pod["metadata"]["labels"]["app.kubernetes.io/component"]);
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let containers = list(&pod["status"]["containerStatuses"]);
        let runs = containers.iter().any(|c| c["name"] == *part && c["state"]["running"].is_object());
        let ready = list(&pod["status"]["conditions"]);
        let ready = ready.into_iter().find(|condition| condition["type"] == "Ready").unwrap_or_default();
        let waits = containers.iter().map(|c| &c["state"]["waiting"]).find(|waiting| waiting.is_object());
        let why = waits.unwrap_or(&ready);
        let why: Vec<_> = [text(&why["reason"]), text(&why["message"])]
            .into_iter()
            .filter(|said| !said.is_empty())
            .collect();
        let trouble = match ready["status"] == "True" {
            true => String::new(),
            false => format!("not ready, {}: {}", text(&pod["status"]["phase"]), why.join(": ")),
        };
        let (name, node) = (text(&pod["metadata"]["name"]), text(&pod["spec"]["nodeName"]));
        Self { name, part, node, runs, trouble }
    }

    /// As it is said.
    fn place(&self) -> String {
        let node = if self.node.is_empty() { String::new() } else { format!(" on {}", self.node) };
        format!("pod/{}{node}", self.name)
    }

    fn tells(&self) -> bool {
        self.runs && TELLING.contains(&self.part.as_str())
    }
}

impl Cluster {
    /// Whether somebody has asked for one.
    pub(crate) fn is_meant(&self) -> bool {
        self.cluster
    }

    /// The mesh in a namespace of a cluster.
    pub(crate) fn of(context: Option<String>, kubeconfig: Option<PathBuf>, namespace: &str) -> Self {
        Self { cluster: true, context, kubeconfig, namespace: namespace.to_owned() }
    }

    /// A ConfigMap of the mesh's namespace, if it is there.
    pub(crate) async fn config_map(&self, name: &str) -> Result<Option<Value>> {
        let said = self.kubectl(&["get", "configmap", name, "--ignore-not-found", "--output=json"]).await?;
        if !said.status.success() {
            bail!("the ConfigMap {}/{name} is not told: {}", self.namespace, last_words(&said.stderr));
        }
        if said.stdout.is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(&said.stdout).context("kubectl get configmap --output=json").map(Some)
    }

    /// What the processes of the mesh tell, and which of its pods are in trouble.
    pub(crate) async fn view(&self, kinds: &[Kind], verify: bool) -> Result<View> {
        let mut tell = vec!["tell".to_owned()];
        if !kinds.is_empty() {
            let names: Vec<_> = kinds.iter().map(|kind| kind.as_str_name()).collect();
            tell.push(format!("--kinds={}", names.join(",")));
        }
        tell.extend(verify.then(|| "--verify".to_owned()));
        let pods = self.pods().await?;
        let tell: Vec<_> = tell.iter().map(String::as_str).collect();
        let told = stream::iter(pods.iter().filter(|pod| pod.tells()))
            .map(async |pod| (pod, self.exec(pod, &tell).await.and_then(|said| read(&said))))
            .buffered(AT_ONCE);
        let mut view = View { of_cluster: true, ..View::default() };
        for (pod, told) in told.collect::<Vec<_>>().await {
            let place = |url: &str| format!("{}, {url}", pod.place());
            match told {
                Ok(told) => {
                    view.seen.extend(told.seen.into_iter().map(|seen| Seen {
                        url: place(&seen.url),
                        pod: Some(pod.clone()),
                        ..seen
                    }));
                    let silent = told.silent.into_iter();
                    view.silent.extend(silent.map(|silent| Silent { url: place(&silent.url), ..silent }));
                }
                Err(error) => {
                    view.silent.push(Silent { url: pod.place(), why: format!("{error:#}"), stale: false });
                }
            }
        }
        let bad = pods.into_iter().filter(|pod| !pod.tells() && !pod.trouble.is_empty());
        view.silent.extend(bad.map(|pod| Silent { url: pod.place(), why: pod.trouble, stale: false }));
        Ok(view)
    }

    /// What the program says on each node, by the names of the nodes.
    pub(crate) async fn on_nodes(&self, args: &[&str]) -> Result<Vec<(String, Result<String>)>> {
        let pods = self.pods().await?;
        let nodes = pods.into_iter().filter(|pod| pod.part == "node" && pod.runs);
        let said = stream::iter(nodes)
            .map(async |pod| {
                let said = self.exec(&pod, args).await;
                (pod.node, said)
            })
            .buffered(AT_ONCE);
        Ok(said.collect().await)
    }

    /// Changes what a process in a pod logs.
    pub(crate) async fn set_log(&self, pod: &Pod, level: &str, process: &str) -> Result<String> {
        self.exec(pod, &["log", level, "--process", process]).await
    }

    /// The pods of the mesh, in the order of their names.
    async fn pods(&self) -> Result<Vec<Pod>> {
        let said =
            self.kubectl(&["get", "pods", "--selector=app.kubernetes.io/name=nsm", "--output=json"]).await?;
        if !said.status.success() {
            bail!(
                "the pods of the mesh are not told: {}{}",
                last_words(&said.stderr),
                self.rights(&said.stderr)
            );
        }
        let list: Value = serde_json::from_slice(&said.stdout).context("kubectl get pods --output=json")?;
        let pods: Vec<_> = list["items"].as_array().into_iter().flatten().map(Pod::of).collect();
        if pods.is_empty() {
            bail!(
                "there is no mesh in namespace {} of this cluster (hint: `nsm install | kubectl apply -f -` makes one; \
                 --namespace and --context say where else to look)",
                self.namespace
            );
        }
        Ok(pods)
    }

    /// What the program prints in a pod; a status other than 0 is an answer, too, if it prints something.
    async fn exec(&self, pod: &Pod, args: &[&str]) -> Result<String> {
        let exec = ["exec", &pod.name, "--container", &pod.part, "--", PROGRAM];
        let said = self.kubectl(&[&exec[..], args].concat()).await?;
        if said.stdout.is_empty() {
            let stderr = &said.stderr;
            let words = last_words(stderr);
            let older = words.contains("unrecognized subcommand");
            let older = if older { " (hint: the mesh there is older than this nsm: upgrade it)" } else { "" };
            bail!("{words}{older}{}", self.rights(stderr));
        }
        Ok(String::from_utf8_lossy(&said.stdout).into_owned())
    }

    /// What RBAC has to allow, where kubectl was told that it does not.
    fn rights(&self, stderr: &[u8]) -> String {
        if !String::from_utf8_lossy(stderr).contains("is forbidden") {
            return String::new();
        }
        format!(
            " (hint: whoever looks at a mesh this way needs, in namespace {}, the rules {{apiGroups: [\"\"], resources: \
             [pods], verbs: [get, list]}} and {{apiGroups: [\"\"], resources: [pods/exec], verbs: [create]}}; for what \
             becomes of wires, kubectl get wires does)",
            self.namespace
        )
    }

    async fn kubectl(&self, args: &[&str]) -> Result<Output> {
        let mut kubectl = Command::new("kubectl");
        if let Some(kubeconfig) = &self.kubeconfig {
            kubectl.arg("--kubeconfig").arg(kubeconfig);
        }
        if let Some(context) = &self.context {
            kubectl.arg("--context").arg(context);
        }
        kubectl.arg("--namespace").arg(&self.namespace).args(args);
        kubectl.stdin(Stdio::null()).kill_on_drop(true);
        let limit = PATIENCE + WAY;
        match timeout(limit, kubectl.output()).await {
            Err(_) => bail!("kubectl {} does not answer within {limit:?}", args[0]),
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => bail!(
                "there is no kubectl in PATH, which is what reaches a cluster \
                 (hint: https://kubernetes.io/docs/tasks/tools; on a node itself nsm needs neither it nor --cluster)"
            ),
            Ok(said) => said.context("kubectl cannot be started"),
        }
    }
}

/// What `nsm tell` printed in a pod. Whoever has taken a node chooses these texts.
fn read(said: &str) -> Result<View> {
    let view: View = serde_json::from_str(said).context("it tells something else than nsm tell does")?;
    let silent = view.silent.into_iter().map(plain).collect();
    Ok(View { seen: view.seen.into_iter().map(plain).collect(), silent, of_cluster: true })
}

/// What kubectl said last before it gave up, without what says only that it did.
fn last_words(stderr: &[u8]) -> String {
    let said = String::from_utf8_lossy(stderr);
    let says = |line: &&str| !line.is_empty() && !line.starts_with("command terminated with");
    let lines: Vec<_> = said.lines().map(str::trim).filter(says).collect();
    let from =
        lines.iter().position(|line| line.starts_with("error:")).unwrap_or(lines.len().saturating_sub(1));
    match lines[from..].join(" ") {
        words if words.is_empty() => "kubectl failed and does not say why".to_owned(),
        words => without_controls(&words),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pods_are_asked_that_tell_of_themselves_and_the_others_are_named_with_their_trouble() {
        let pod = |part: &str, state: Value, ready: &str| {
            let pod = Pod::of(&json!({
                "metadata": { "name": "p", "labels": { "app.kubernetes.io/component": part } },
                "spec": { "nodeName": "node1" },
                "status": {
                    "phase": "Running",
                    "conditions": [{ "type": "Ready", "status": ready, "reason": "ContainersNotReady" }],
                    "containerStatuses": [
                        { "name": "identity", "state": { "running": {} } },
                        { "name": part, "state": state },
                    ],
                },
            }));
            (pod.tells(), pod.trouble)
        };
        let waits = json!({ "waiting": { "reason": "ImagePullBackOff", "message": "no such image" } });
        let running = || json!({ "running": { "startedAt": "t" } });
        assert_eq!(pod("node", running(), "True"), (true, String::new()));
        let not_ready = "not ready, Running: ContainersNotReady".to_owned();
        assert_eq!(pod("registry", running(), "False"), (true, not_ready));
        let pulls = "not ready, Running: ImagePullBackOff: no such image".to_owned();
        assert_eq!(pod("node", waits, "False"), (false, pulls));
        assert_eq!(pod("webhook", running(), "True"), (false, String::new()));
        let pending = Pod::of(&json!({
            "metadata": { "name": "p" },
            "status": { "phase": "Pending", "conditions": [{ "type": "PodScheduled", "status": "False" }] },
        }));
        assert_eq!((pending.place().as_str(), pending.trouble.as_str()), ("pod/p", "not ready, Pending: "));
    }

    #[test]
    fn what_another_version_tells_is_read_and_cannot_act_on_a_terminal() {
        let told = r#"{"seen":[{"url":"u","process":{"name":"a\u001b[2J","new":{}},"new":1}],"silent":[{"why":"\u0007"}]}"#;
        let view = read(told).map_err(|error| format!("{error:#}"));
        let view = view.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((view.seen[0].process.name.as_str(), view.silent[0].why.as_str()), ("a [2J", " "));
        let wrong = read("Usage: nsm").map(|_| ()).map_err(|error| error.to_string());
        assert_eq!(wrong, Err("it tells something else than nsm tell does".to_owned()));
    }

    #[test]
    fn kubectls_last_words_are_said() {
        let words = |said: &str| last_words(said.as_bytes());
        assert_eq!(words("Warning: x\nerror: no such\n  pod\n"), "error: no such pod");
        assert_eq!(words("E1122 memcache\nThe connection was refused\n"), "The connection was refused");
        assert_eq!(words("command terminated with exit code 1\n"), "kubectl failed and does not say why");
    }
}
