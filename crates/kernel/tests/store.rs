//! The plan store: what goes in comes out; what is damaged is told and does no harm.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

mod common;

use std::fs;

use nsm_kernel::netns::NsId;
use nsm_kernel::plan::{EndPlan, Side, WirePlan};
use nsm_kernel::store::{Record, Store};
use nsm_kernel::{Error, Nsid, Nsids};
use rustix::io::Errno;

fn record(id: &str) -> Record {
    let near = EndPlan::new(Side::Near, NsId { dev: 4, ino: 1 }, "nsm0", "nsc-0");
    let far = EndPlan::new(Side::Far, NsId { dev: 4, ino: 2 }, "nse0", "nsc-0");
    Record {
        plan: WirePlan::veth(id, near, far),
        nsids: Nsids { near: Some(Nsid(1)), far: None },
        data: serde_json::json!({"expires": 1_795_270_594}),
    }
}

fn names(dir: &std::path::Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn records_come_back_whatever_the_connection_is_called() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("a/b")).unwrap();
    let ids = [
        "plain-1",
        "..",
        "../../etc/passwd",
        ".hidden",
        "a/b",
        "ünïcode",
        "%2e",
        "a\nb",
        " ",
        "x".repeat(110).as_str(),
    ]
    .map(String::from);
    for id in &ids {
        store.put(&record("other")).unwrap();
        store.put(&record(id)).unwrap();
        store.put(&record(id)).unwrap();
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing outside the store");
    let loaded = Store::open(dir.path().join("a/b")).unwrap().load().unwrap();
    assert_eq!(loaded.damaged, []);
    let mut wanted: Vec<_> = ids.iter().map(|id| record(id)).chain([record("other")]).collect();
    wanted.sort_by(|a, b| a.plan.id.cmp(&b.plan.id));
    assert_eq!(loaded.records, wanted);
    for id in &ids {
        assert!(store.remove(id).unwrap());
        assert!(!store.remove(id).unwrap());
    }
    assert_eq!(names(&dir.path().join("a/b")), ["other.wire"]);
    for id in ["".to_owned(), "x".repeat(111), "/".repeat(37)] {
        assert!(matches!(store.put(&record(&id)), Err(Error::Plan(_))), "{id}");
    }
}

#[test]
fn damage_is_reported_and_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.put(&record("good")).unwrap();
    store.put(&record("victim")).unwrap();
    let bytes = fs::read(dir.path().join("victim.wire")).unwrap();
    // Torn anywhere, every bit of it flipped, or extended.
    for length in 0..bytes.len() {
        fs::write(dir.path().join("victim.wire"), &bytes[..length]).unwrap();
        assert_one_damaged(&store);
    }
    for at in 0..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(dir.path().join("victim.wire"), &bytes).unwrap();
        assert_one_damaged(&store);
    }
    fs::write(dir.path().join("victim.wire"), [&bytes[..], b"x"].concat()).unwrap();
    assert_one_damaged(&store);
    // Complete, but another's.
    fs::copy(dir.path().join("good.wire"), dir.path().join("victim.wire")).unwrap();
    assert_one_damaged(&store);
    store.put(&record("victim")).unwrap();
    assert_eq!(store.load().unwrap().damaged, []);

    fs::write(dir.path().join("README"), "not ours").unwrap();
    fs::create_dir(dir.path().join("dir.wire")).unwrap();
    fs::write(dir.path().join(".unfinished-x"), "killed while writing").unwrap();
    let store = Store::open(dir.path()).unwrap();
    let loaded = store.load().unwrap();
    assert_eq!((loaded.records.len(), loaded.damaged.len()), (2, 2));
    assert_eq!(names(dir.path()), ["README", "dir.wire", "good.wire", "victim.wire"]);
}

#[test]
fn who_looks_into_another_s_store_disturbs_no_write() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.put(&record("good")).unwrap();
    fs::write(dir.path().join(".unfinished-good"), "being written").unwrap();
    let seen = Store::look(dir.path()).unwrap();
    assert_eq!((seen.records, seen.damaged), (vec![record("good")], vec![]));
    assert_eq!(names(dir.path()), [".unfinished-good", "good.wire"]);
}

fn assert_one_damaged(store: &Store) {
    let loaded = store.load().unwrap();
    assert_eq!(loaded.records, [record("good")]);
    assert_eq!(loaded.damaged[0].id.as_deref(), Some("victim"));
}

#[test]
fn a_full_disk_is_an_error_that_leaves_the_old_record() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED a_full_disk_is_an_error_that_leaves_the_old_record: mounts need root");
        return;
    }
    common::with_private_run(|| {
        let store = Store::open("/run/state").unwrap();
        store.put(&record("old")).unwrap();
        let before = store.load().unwrap().records;
        // 64 KiB in all: fill it up.
        let mut filler = Vec::new();
        while fs::write(format!("/run/fill-{}", filler.len()), [0; 4096]).is_ok() {
            filler.push(());
        }
        let mut changed = record("old");
        changed.data = serde_json::json!("x".repeat(10_000));
        for attempt in [&changed, &record("new")] {
            let error = store.put(attempt).unwrap_err();
            assert_eq!(error.errno(), Some(Errno::NOSPC), "{error}");
            assert!(error.to_string().contains("full"), "{error}");
        }
        assert_eq!(names("/run/state".as_ref()), ["old.wire"]);
        assert_eq!(store.load().unwrap().records, before);
        fs::remove_file("/run/fill-0").unwrap();
        store.put(&record("new")).unwrap();
    });
}
