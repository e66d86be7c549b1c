//! What the test programs of `nsm` share.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// A copy of the program that every user may run, in a directory that is made enterable for all: the target directory
/// often lies in somebody's home.
pub(crate) fn program_for_everybody(directory: &Path) -> PathBuf {
    let program = directory.join("nsm");
    fs::copy(env!("CARGO_BIN_EXE_nsm"), &program).expect("copy the program");
    for path in [directory, &program] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("chmod");
    }
    program
}
