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
