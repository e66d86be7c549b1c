//! kubectl, for tests: as people use it.

use std::{
    fs,
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// kubectl before a cluster of tests, with all rights.
#[derive(Debug, Clone)]
pub struct Kubectl {
    pub(crate) program: PathBuf,
    /// Where the cluster has its files.
    pub(crate) directory: PathBuf,
}

impl Kubectl {
    /// The kubeconfig of somebody who may do everything.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.join("pki/admin.conf")
    }

    /// Runs kubectl with all rights and returns what it printed.
    ///
    /// # Panics
    /// With what it said, if it fails.
    #[must_use]
    pub fn kubectl(&self, args: &[&str]) -> String {
        let output = self.kubectl_command().args(args).output().unwrap_or_else(|e| panic!("kubectl: {e}"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {}: {said}", args.join(" "));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// kubectl with all rights, for those who write to it or want it to fail.
    #[must_use]
    pub fn kubectl_command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("kubectl").env("KUBECONFIG", self.kubeconfig()).stdin(Stdio::null());
        command
    }

    /// Applies a manifest (`kubectl apply --server-side`).
    ///
    /// # Panics
    /// With what kubectl said, if it is refused.
    pub fn apply(&self, manifest: &str) {
        let mut kubectl = self.kubectl_command();
        kubectl.args(["apply", "--server-side", "--force-conflicts", "--filename=-"]);
        kubectl.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut kubectl = kubectl.spawn().unwrap_or_else(|e| panic!("kubectl: {e}"));
        // If it does not read on, it says why.
        let _ = kubectl.stdin.take().map(|mut stdin| stdin.write_all(manifest.as_bytes()));
        let output = kubectl.wait_with_output().unwrap_or_else(|e| panic!("kubectl: {e}"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl apply: {said}\n{manifest}");
    }

    /// Applies custom resource definitions and returns when their resources are served.
    ///
    /// # Panics
    /// With what kubectl said, if one is refused, or if they are not served within a minute.
    pub fn install(&self, definitions: &[&str]) {
        definitions.iter().for_each(|definition| self.apply(definition));
        let _met = self.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"]);
        // Established is said a moment before requests are served.
        let names = self.kubectl(&["get", "crd", "--output=jsonpath={.items[*].metadata.name}"]);
        let end = Instant::now() + Duration::from_secs(60);
        for name in names.split_whitespace() {
            while !self.kubectl_command().args(["get", name]).output().is_ok_and(|got| got.status.success()) {
                assert!(Instant::now() < end, "{name} are not served");
                sleep(Duration::from_millis(20));
            }
        }
    }

    /// The kubeconfig of a service account, which is made if it is not there: it may do what RBAC lets it.
    ///
    /// # Panics
    /// If there is no such namespace.
    #[must_use]
    pub fn kubeconfig_of(&self, namespace: &str, account: &str) -> PathBuf {
        self.apply(&format!(
            "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {account}, namespace: {namespace}}}\n"
        ));
        self.kubeconfig_with(namespace, account, &[])
    }

    /// The same, as a pod on a node has it: its token is bound to the node, which has to be there.
    ///
    /// # Panics
    /// If there is no such namespace or node.
    #[must_use]
    pub fn kubeconfig_on(&self, node: &str, namespace: &str, account: &str) -> PathBuf {
        let bound = ["--bound-object-kind=Node".to_owned(), format!("--bound-object-name={node}")];
        let bound: Vec<_> = bound.iter().map(String::as_str).collect();
        let _made = self.kubeconfig_of(namespace, account);
        self.kubeconfig_with(namespace, account, &bound)
    }

    fn kubeconfig_with(&self, namespace: &str, account: &str, how: &[&str]) -> PathBuf {
        let args = ["create", "token", account, "--namespace", namespace, "--duration=24h"];
        let token = self.kubectl(&[&args[..], how].concat());
        let on = how.last().and_then(|bound| bound.split('=').nth(1)).unwrap_or_default();
        let path = self.directory.join(format!("{namespace}.{account}.{on}.conf"));
        fs::copy(self.kubeconfig(), &path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let config = |args: &[&str]| {
            let mut command = self.kubectl_command();
            let done = command.arg("config").args(args).env("KUBECONFIG", &path).output();
            assert!(done.is_ok_and(|done| done.status.success()), "kubectl config {args:?}");
        };
        config(&["set-credentials", account, &format!("--token={}", token.trim())]);
        config(&["set-context", "--current", &format!("--user={account}"), "--namespace", namespace]);
        path
    }
}
