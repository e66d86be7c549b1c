//! What a warm evaluation costs: `cargo run --release -p nsm-rego --example warm`.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::time::{Duration, Instant, SystemTime};

use nsm_identity::{ca::Authority, policy, policy::Judge, token};
use nsm_rego::Policy;
use serde_json::json;

const ROUNDS: u32 = 2000;

fn main() {
    let now = SystemTime::now();
    let authority = Authority::new("warm.lab".parse().unwrap(), now).unwrap();
    let issue = |name: &str| {
        authority.issue(&format!("spiffe://warm.lab/{name}").parse().unwrap(), Duration::from_secs(600), now)
    };
    let hops: Vec<_> = ["client", "manager", "forwarder"].map(|name| issue(name).unwrap()).into();
    let token = |from: usize, to: usize| {
        token::mint(&hops[from], Some(hops[to].id()), None, Duration::from_secs(600), now)
            .unwrap()
            .jwt()
            .to_owned()
    };
    let tokens = [token(0, 1), token(1, 2), token(2, 1)];
    let leaf = hops[1].leaf();
    let document = json!({
        "index": 2,
        "path_segments": tokens.each_ref().map(|token| json!({"token": token})),
        "auth_info": {"certificate": leaf.pem()},
    });
    let time = |what: &str, mut one: Box<dyn FnMut()>| {
        one();
        let begin = Instant::now();
        (0..ROUNDS).for_each(|_| one());
        println!("{what:<24} {:>8.1} µs", begin.elapsed().as_secs_f64() * 1e6 / f64::from(ROUNDS));
    };
    for name in ["tokens_valid", "tokens_expired", "tokens_chained", "prev_token_signed"] {
        let file = format!("{}/tests/policies/{name}.rego", env!("CARGO_MANIFEST_DIR"));
        let policy = Policy::parse(name, &std::fs::read_to_string(file).unwrap()).unwrap();
        assert_eq!(policy.judge(&document), Ok(true));
        let document = document.clone();
        time(name, Box::new(move || assert_eq!(policy.judge(&document), Ok(true))));
    }
    let (tokens, leaf) = (tokens.clone(), leaf.clone());
    time(
        "all four in Rust",
        Box::new(move || policy::check_server(&tokens, 2, &leaf, SystemTime::now()).unwrap()),
    );
}
