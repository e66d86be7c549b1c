//! Seeds that run with every test.

use std::process::Command;

fn sim(args: &[&str]) -> (bool, String) {
    let said = Command::new(env!("CARGO_BIN_EXE_nsm-sim")).args(args).output().expect("nsm-sim starts");
    let text = String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr);
    (said.status.success(), text)
}

#[test]
fn a_seed_replays_exactly() {
    for seed in ["0", "1", "2"] {
        let (first, again) = (sim(&["--seed", seed]), sim(&["--seed", seed]));
        assert!(first.1.contains("hash"), "{}", first.1);
        assert_eq!(first, again, "two runs of one seed differ");
    }
}

#[test]
fn seeds_differ() {
    let hash = |seed| sim(&["--seed", seed, "--calm"]).1.split(' ').nth(3).map(str::to_owned);
    assert_ne!(hash("0"), hash("1"));
}

#[test]
fn a_mesh_without_faults_keeps_its_promises() {
    let (good, text) = sim(&["--seeds", "10", "--calm"]);
    assert!(good, "{text}");
}

/// More of them: `cargo xtask sim`.
#[test]
fn a_mesh_keeps_its_promises_whatever_is_done_to_it() {
    let (good, text) = sim(&["--seeds", "20"]);
    assert!(good, "{text}");
}

/// Seeds that have found something, and what that was.
#[test]
fn what_was_found_once_stays_mended() {
    for (seed, found) in [
        ("803", "a clock that was set back while a request was under way let its connection live for hours"),
        ("639", "a clock that was set forward while a request was under way ended its connection at once"),
        ("6", "after a jump of the clock identities were renewed only when half of their life had passed"),
        ("53", "a wire of an earlier process stayed for as long as the clock had gone back"),
        ("137", "… and beside the new wire between the same two, with the same addresses"),
        (
            "20",
            "a Close that had queued behind another one went on to where the connection was asked for again",
        ),
        ("1298", "a Close that came behind the first one ended what had been asked for again meanwhile"),
        ("937", "how long tokens live was computed after the clock had jumped, not when they were checked"),
        ("951", "an endpoint was not found after its clock had jumped, until it registered again some time"),
        // Found something in meshes of other shapes, before a seed meant what it means now.
        ("7", "a fault of an earlier shape"),
        ("13", "a fault of an earlier shape"),
        ("341", "a fault of an earlier shape"),
        ("397", "a fault of an earlier shape"),
    ] {
        let (good, text) = sim(&["--seed", seed]);
        assert!(good, "{found}: {text}");
    }
}
