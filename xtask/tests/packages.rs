//! What `cargo xtask packages` says on machines that lack something: in a mount namespace of the test's own, in which
//! the directory of nftables is hidden.
#![allow(clippy::print_stdout, reason = "a test that cannot run says so")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Output};

/// Runs `xtask packages` where /usr/sbin is empty, after the given setup, as that user.
fn without_sbin(setup: &str, user: u32) -> Option<Output> {
    if fs::metadata("/proc/self").expect("proc").uid() != 0 {
        println!("SKIPPED packages: needs root to hide a directory in a mount namespace");
        return None;
    }
    let directory = tempfile::Builder::new().prefix("nsm-test-").tempdir().expect("directory");
    // The target directory often lies in a home that others may not enter.
    let program = directory.path().join("xtask");
    fs::copy(env!("CARGO_BIN_EXE_xtask"), &program).expect("copy");
    for path in [directory.path(), &program] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("chmod");
    }
    let script = format!(
        "mount -t tmpfs none /usr/sbin && {setup} exec setpriv --reuid={user} --regid={user} --clear-groups {} packages",
        program.display()
    );
    let output = Command::new("unshare").args(["--mount", "sh", "-c", &script]).output().expect("unshare");
    Some(output)
}

#[test]
fn an_ordinary_user_is_told_what_to_type() {
    let Some(output) = without_sbin("", 65534) else { return };
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let line = "sudo apt-get install --yes --no-install-recommends nftables\n";
    assert!(said.contains("system packages are missing; install them with") && said.contains(line), "{said}");
}

#[test]
fn a_package_without_its_program_is_an_error() {
    if !Path::new("/usr/sbin/nft").exists() {
        println!("SKIPPED a_package_without_its_program_is_an_error: nftables is not installed");
        return;
    }
    // apt finds everything as it should be, so it neither asks the network nor changes anything.
    let Some(output) = without_sbin("", 0) else { return };
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("xtask: installing nftables"), "{said}");
    assert!(said.contains("its program is neither in PATH nor in /usr/sbin"), "{said}");
}

#[test]
fn without_apt_the_error_says_so() {
    let Some(output) = without_sbin("mount --bind /dev/null /usr/bin/apt-get &&", 0) else { return };
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("start apt-get: is this Debian or Ubuntu?"), "{said}");
}
