//! Every scenario of `scenarios/`, run by the real program as a person would run it.
#![allow(clippy::print_stdout, reason = "a test that cannot run says so")]

use std::path::Path;
use std::process::{Command, Stdio};

/// Runs a scenario under a name of this test's own, so that a demo may run beside it.
fn run(scenario: &str) {
    if !rustix::process::geteuid().is_root() {
        return println!("SKIPPED {scenario}: needs root to make network namespaces");
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios").join(format!("{scenario}.yaml"));
    let name = format!("t{}-{scenario}", std::process::id());
    let mut nsm = Command::new(env!("CARGO_BIN_EXE_nsm"));
    nsm.args(["lab", "run", "--name", &name]).arg(file).stdin(Stdio::null());
    let output = nsm.output().expect("start nsm");
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    assert!(said.contains("nothing left behind"), "{said}");
}

macro_rules! scenarios {
    ($($name:ident: $file:literal,)*) => {
        $(#[test] fn $name() { run($file); })*

        #[test]
        fn no_scenario_is_forgotten() {
            let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios");
            let entries = directory.read_dir().expect("scenarios").map(|entry| entry.expect("entry").path());
            let mut files: Vec<_> =
                entries.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
            files.sort();
            assert_eq!(files, [$($file),*]);
        }
    };
}

scenarios! {
    chaos: "chaos",
    component_restart: "component-restart",
    dns: "dns",
    dual_stack: "dual-stack",
    heal: "heal",
    heal_ethernet: "heal-ethernet",
    kernel2kernel: "kernel2kernel",
    kernel2vxlan2kernel: "kernel2vxlan2kernel",
    one_process: "one-process",
    secure_intranet: "secure-intranet",
    secure_intranet_ethernet: "secure-intranet-ethernet",
    two_services: "two-services",
    vpn_gateway: "vpn-gateway",
}
