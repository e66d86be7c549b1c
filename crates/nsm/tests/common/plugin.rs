//! `kubectl nsm …` as somebody types it who has both in PATH.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    process::Output,
};

use nsm_cluster::Kubectl;
use tempfile::TempDir;

/// A directory of programs with kubectl, and nsm under its plugin's name.
pub(crate) struct Plugin {
    kubectl: Kubectl,
    programs: TempDir,
}

impl Plugin {
    pub(crate) fn new(kubectl: Kubectl) -> Self {
        let programs = tempfile::tempdir().expect("a directory");
        symlink(env!("CARGO_BIN_EXE_nsm"), programs.path().join("kubectl-nsm")).expect("the plugin");
        let program = kubectl.kubectl_command().get_program().to_string_lossy().into_owned();
        let script = programs.path().join("kubectl");
        fs::write(&script, format!("#!/bin/sh\nexec '{program}' kubectl \"$@\"\n")).expect("kubectl");
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("chmod");
        Self { kubectl, programs }
    }

    /// Where they are.
    #[allow(dead_code, reason = "some tests look elsewhere")]
    pub(crate) fn directory(&self) -> &std::path::Path {
        self.programs.path()
    }

    /// `kubectl nsm ARGS`: kubectl finds the plugin.
    pub(crate) fn run(&self, args: &[&str]) -> Output {
        let path = format!("{}:/usr/bin:/bin", self.programs.path().display());
        let mut command = self.kubectl.kubectl_command();
        command.arg("nsm").args(args).env("PATH", path).output().expect("kubectl")
    }
}
