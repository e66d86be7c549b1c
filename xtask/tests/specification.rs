//! SPECIFICATION.md is our word: each promise has a number of its own, and the tests that it names exist.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// All Rust code of the project.
fn sources(directory: &Path, text: &mut String) {
    for entry in fs::read_dir(directory).expect("read").flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text.push_str(&fs::read_to_string(&path).expect("read"));
        }
    }
}

#[test]
fn every_promise_has_a_number_of_its_own_and_tests_that_exist() {
    let specification = fs::read_to_string(root().join("SPECIFICATION.md")).expect("read");
    let mut code = String::new();
    for directory in ["crates", "xtask"] {
        sources(&root().join(directory), &mut code);
    }
    let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (index, line) in specification.lines().enumerate() {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        let [_, number, .., proof, _] = cells[..] else { continue };
        let (letters, digits) = number.split_at(number.find(|c: char| c.is_ascii_digit()).unwrap_or(0));
        if letters.is_empty() || digits.parse::<u32>().is_err() {
            continue;
        }
        let line = index + 1;
        if let Some(before) = numbers.insert(number, line) {
            wrong.push(format!("line {line}: {number} is the number of line {before} already"));
        }
        if proof.is_empty() {
            wrong.push(format!("line {line}: {number} names no test"));
        }
        // What stands between backquotes: crates, test programs, scenarios, and paths of tests.
        let quoted = proof.split('`').skip(1).step_by(2);
        for test in quoted.filter_map(|word| word.rsplit_once("::")).map(|(_, test)| test) {
            if !code.contains(&format!("fn {test}(")) {
                wrong.push(format!("line {line}: {number} names the test {test}, which does not exist"));
            }
        }
        for scenario in proof.split("scenario").skip(1) {
            let named = scenario.split('`').skip(1).step_by(2).take_while(|word| !word.starts_with("nsm"));
            for name in named.filter(|_| scenario.starts_with([' ', 's'])) {
                let file = root().join("scenarios").join(format!("{name}.yaml"));
                if !file.exists() && !code.contains(&format!("mod {name}")) {
                    wrong.push(format!(
                        "line {line}: {number} names the scenario {name}, which does not exist"
                    ));
                }
            }
        }
    }
    assert!(numbers.len() > 30, "the tables were not found");
    assert!(wrong.is_empty(), "SPECIFICATION.md:\n{}", wrong.join("\n"));
}
