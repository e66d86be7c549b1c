//! The corpora in the tree, through every decoder: what a fuzzer once found stays found.
#![allow(clippy::print_stdout, reason = "how much was tried")]

use std::{fs, path::PathBuf};

use nsm_fuzz_targets::TARGETS;
use nsm_hostile::Schema;
use rand::{RngExt, SeedableRng, rngs::StdRng};

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let entries = fs::read_dir(&directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), fs::read(path).expect("a file"))).collect()
}

#[test]
fn every_decoder_takes_its_corpus_and_what_is_near_it() {
    let mut chance = StdRng::seed_from_u64(1);
    for (name, target) in TARGETS {
        let corpus = corpus(name);
        assert!(!corpus.is_empty(), "fuzz/corpus/{name} is empty");
        let mut tried = 0;
        for (_, bytes) in &corpus {
            target(bytes);
            for _ in 0..200 {
                let mut near = bytes.clone();
                for _ in 0..chance.random_range(1..4) {
                    match (chance.random_range(0..3), near.len()) {
                        (_, 0) => near.push(chance.random()),
                        (0, length) => near[chance.random_range(0..length)] ^= 1 << chance.random_range(0..8),
                        (1, length) => near.truncate(chance.random_range(0..length)),
                        (_, length) => near.insert(chance.random_range(0..length), chance.random()),
                    }
                }
                target(&near);
                tried += 1;
            }
        }
        println!("{name}: {} files, {tried} beside them", corpus.len());
    }
}

#[test]
fn every_mangled_message_is_decoded_or_refused() {
    let schema = Schema::new(nsm_api::DESCRIPTORS).expect("descriptors");
    let mut tried = 0;
    for name in schema.messages().filter(|name| !name.starts_with("google.")) {
        let good = schema.filled(name, &|_| "x".into());
        for mangled in schema.mangled(name, &good) {
            nsm_fuzz_targets::messages(&mangled.bytes);
            nsm_fuzz_targets::connection_path(&mangled.bytes);
            tried += 1;
        }
    }
    println!("{tried} mangled messages");
    assert!(tried > 1000, "{tried}");
}
