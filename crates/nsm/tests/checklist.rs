//! The rules of interoperability (spec/control-plane.md section 17) and upstream's defects (section 18), and the tests
//! that prove that we keep the ones, and neither have nor fear the others.

use std::{fs, path::Path};

/// A rule: what it demands, and the tests, each as file below `crates/` and name.
type Rule = (&'static str, &'static [(&'static str, &'static str)]);

const RULES: [Rule; 18] = [
    (
        "every answer has the caller's index and id, and the complete path",
        &[
            ("mesh/tests/hop.rs", "an_answer_is_the_askers_complete_signed_and_up"),
            ("mesh/tests/hop.rs", "what_peers_do_wrong_is_survived"),
            ("api/src/path.rs", "steps_never_panic_and_answers_come_back_to_the_asker"),
        ],
    ),
    (
        "token and expires in the own segment of every answer; nobody spins without",
        &[
            ("mesh/tests/hop.rs", "an_answer_is_the_askers_complete_signed_and_up"),
            ("mesh/src/refresh.rs", "no_tight_loop_without_an_expiry"),
        ],
    ),
    (
        "one token and one expiry with every call, over TLS only",
        &[
            ("mesh/tests/hop.rs", "an_answer_is_the_askers_complete_signed_and_up"),
            ("transport/tests/grpc.rs", "garbage_plaintext_and_silence_harm_nobody"),
        ],
    ),
    (
        "tokens: an array of audiences, ES256, a numeric exp, the subject of the certificate",
        &[
            ("identity/tests/tokens.rs", "a_token_is_what_upstream_makes"),
            ("identity/tests/tokens.rs", "each_policy_denies_what_it_must"),
        ],
    ),
    (
        "context, ip_context and dns_context are there",
        &[("manager/src/excluded_prefixes.rs", "requests_carry_what_the_file_says_at_the_time")],
    ),
    (
        "the initial event at once, even when empty",
        &[
            ("mesh/tests/hop.rs", "a_connection_whose_next_hop_falls_silent_is_down"),
            ("mesh/src/monitor.rs", "watchers_get_the_state_first_and_then_what_changes"),
        ],
    ),
    (
        "events have the own id as key and the own index",
        &[
            ("mesh/tests/hop.rs", "a_connection_whose_next_hop_falls_silent_is_down"),
            ("mesh/src/monitor.rs", "what_the_next_hop_says_is_translated"),
        ],
    ),
    (
        "streams do not end with Canceled, and DOWN is told however the next hop's stream ends",
        &[("mesh/tests/hop.rs", "a_connection_whose_next_hop_falls_silent_is_down")],
    ),
    (
        "UP in answers; RESELECT_REQUESTED closes the old connection first",
        &[
            ("mesh/tests/hop.rs", "an_answer_is_the_askers_complete_signed_and_up"),
            ("mesh/tests/runner.rs", "reselection_closes_the_old_connection_first"),
        ],
    ),
    (
        "the chosen mechanism beats preferences, which keep their order",
        &[
            ("sdk/src/own_end.rs", "the_chosen_mechanism_beats_the_preferences"),
            ("mesh/tests/hop.rs", "what_this_mesh_does_not_know_passes_through_unharmed"),
        ],
    ),
    (
        "ids are stable, new ones are UUIDs",
        &[
            ("mesh/tests/hop.rs", "an_answer_is_the_askers_complete_signed_and_up"),
            ("api/src/path.rs", "a_refresh_keeps_all_ids_and_a_new_hop_gets_a_new_one"),
        ],
    ),
    (
        "ALPN h2, mutual TLS, no resumption, no keepalive pings",
        &[
            ("identity/tests/certificates.rs", "tls_is_mutual_speaks_h2_and_is_not_resumed"),
            ("transport/tests/grpc.rs", "both_sides_know_each_other_over_unix_and_tcp"),
        ],
    ),
    (
        "descriptors below TLS, with every read, at most 64 in a message",
        &[
            ("transport/tests/fds.rs", "more_descriptors_than_one_message_carries_travel_with_one_write"),
            ("transport/tests/fds.rs", "a_thousand_calls_at_once_with_the_same_and_different_descriptors"),
        ],
    ),
    (
        "inode URLs come back as they went; a descriptor that comes again harms nobody",
        &[
            ("transport/tests/fds.rs", "each_arrival_is_taken_once_and_takers_that_gave_up_lose_nothing"),
            ("transport/tests/grpc.rs", "a_descriptor_goes_there_and_back"),
        ],
    ),
    (
        "a forwarder registers for `forwarder`, with p2p, under its name in paths, by descriptor",
        &[("registry/tests/registry.rs", "a_manager_knows_the_forwarders_of_its_node_without_the_registry")],
    ),
    (
        "a client's connections are NAME-INDEX, before and after a restart",
        &[("nsm/tests/mesh/state.rs", "a_killed_client_that_comes_back_goes_on_with_its_wire")],
    ),
    (
        "payloads are upper case and pass as they are",
        &[
            ("mesh/tests/hop.rs", "what_this_mesh_does_not_know_passes_through_unharmed"),
            ("nsm/tests/mesh/config.rs", "a_wrong_flag_or_variable_is_refused_with_what_is_expected"),
        ],
    ),
    (
        "unknown states, mechanisms and labels are data",
        &[
            ("mesh/tests/hop.rs", "what_this_mesh_does_not_know_passes_through_unharmed"),
            ("mesh/tests/hop.rs", "a_connection_whose_next_hop_falls_silent_is_down"),
        ],
    ),
];

/// The defects by number. Not here: 4, 21 and 23, which are of upstream's code only (a tracing wrapper, an element, a
/// path in its defaults); 18, which is the protocol's.
const DEFECTS: [(u8, &[(&str, &str)]); 19] = [
    (1, &[("transport/tests/grpc.rs", "one_handshake_however_many_wait_and_one_error_for_all")]),
    (
        2,
        &[
            ("registry/src/cache.rs", "look_ups_and_watches_share_one_watch"),
            (
                "manager/src/follow_service.rs",
                "connections_of_a_service_share_a_watch_that_ends_with_the_last",
            ),
        ],
    ),
    (3, &[("mesh/tests/runner.rs", "one_connection_is_served_in_turn_and_many_in_parallel")]),
    (5, &[("mesh/src/monitor.rs", "a_peer_sees_what_it_asked_for_and_nothing_else")]),
    (6, &[("mesh/tests/runner.rs", "a_failed_refresh_keeps_the_connection_and_a_close_releases_it")]),
    (
        7,
        &[
            ("mesh/tests/runner.rs", "requests_that_make_no_sense_are_refused_before_anything_is_acquired"),
            ("identity/tests/tokens.rs", "hostile_tokens_never_panic"),
        ],
    ),
    (
        8,
        &[
            ("mesh/tests/runner.rs", "a_connection_ends_when_the_token_before_it_expires"),
            ("nsm/tests/mesh/two_nodes.rs", "both_ends_go_when_the_token_of_a_killed_client_expires"),
        ],
    ),
    (
        9,
        &[
            ("sdk/src/client.rs", "a_wire_that_falls_at_once_is_asked_for_in_growing_bounded_pauses"),
            ("mesh/src/refresh.rs", "pauses_are_bounded"),
        ],
    ),
    (10, &[("sdk/src/own_end.rs", "a_failure_behind_a_mechanism_is_not_tried_with_the_next_one")]),
    (11, &[("api/src/matching.rs", "weights_say_how_often_each_is_the_first_to_be_tried")]),
    (12, &[("sdk/src/ipam.rs", "a_restarted_endpoint_takes_over_what_its_clients_carry")]),
    (
        13,
        &[
            ("sdk/src/prefixes.rs", "an_endpoint_that_hands_out_what_is_in_use_is_refused"),
            ("mesh/tests/hop.rs", "what_peers_do_wrong_is_survived"),
        ],
    ),
    (
        14,
        &[
            ("nsm/tests/mesh/two_nodes.rs", "a_client_of_a_pod_that_is_gone_on_the_other_node_gets_another"),
            ("nsm/tests/mesh/steering.rs", "a_wire_that_its_service_leads_away_goes_to_another_endpoint"),
        ],
    ),
    (15, &[("mesh/tests/hop.rs", "what_peers_do_wrong_is_survived")]),
    (16, &[("forwarder/src/tunnel.rs", "parity_uniqueness_and_release")]),
    (
        17,
        &[
            ("transport/tests/fds.rs", "what_nobody_takes_is_closed_soon"),
            ("transport/tests/fds.rs", "as_many_descriptors_as_the_kernel_carries_arrive"),
        ],
    ),
    (19, &[("mesh/tests/runner.rs", "a_caller_that_leaves_mid_request_leaves_nothing")]),
    (20, &[("mesh/tests/hop.rs", "what_peers_do_wrong_is_survived")]),
    (22, &[("mesh/tests/hop.rs", "a_connection_whose_next_hop_falls_silent_is_down")]),
];

#[test]
fn every_rule_has_tests_that_exist() {
    for (index, (rule, tests)) in RULES.iter().enumerate() {
        exist(&format!("rule {}, {rule}", index + 1), tests);
    }
}

#[test]
fn every_defect_has_tests_that_exist() {
    for (defect, tests) in DEFECTS {
        exist(&format!("defect {defect}"), tests);
    }
}

/// Holds a claim to its tests.
fn exist(claim: &str, tests: &[(&str, &str)]) {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    assert!(!tests.is_empty(), "{claim}, has no test");
    for (file, test) in tests {
        let code = fs::read_to_string(crates.join(file)).unwrap_or_else(|e| panic!("{claim}: {file}: {e}"));
        let at = code.find(&format!("fn {test}("));
        let at = at.unwrap_or_else(|| panic!("{claim}: {file} has no test {test}"));
        // Of what stands before it, the last attribute makes it a test (or a property).
        let before = &code[..at];
        let is_test = ["#[test]", "#[tokio::test", "proptest! {"]
            .iter()
            .filter_map(|attribute| before.rfind(attribute))
            .max()
            .is_some_and(|attribute| !before[attribute..].contains("\n}\n"));
        assert!(is_test, "{claim}: {test} in {file} is no test");
    }
}

/// Bounds on what peers may use are set where a server is built: whoever builds one more has to think of them.
#[test]
fn every_server_has_bounds() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crates");
    let mut files = vec![crates.to_owned()];
    let mut servers = Vec::new();
    while let Some(path) = files.pop() {
        if path.is_dir() {
            // Tests' servers, and the resolver's, which is no gRPC.
            if !path.ends_with("tests") && !path.ends_with("dns") {
                files.extend(fs::read_dir(&path).expect("read").flatten().map(|entry| entry.path()));
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("read");
            let (code, _) = text.split_once("#[cfg(test)]").unwrap_or((&text, ""));
            let code: String = code
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"))
                .collect::<Vec<_>>()
                .join("\n");
            for (built, bounded) in [
                ("    Server::bind(", ".guarded("),
                ("transport::Server::builder()", ".max_concurrent_streams("),
            ] {
                let builds = code.contains(built) || code.contains(&format!("= {}", built.trim_start()));
                if builds {
                    servers.push(path.strip_prefix(crates).expect("below").display().to_string());
                    assert!(code.contains(bounded), "{}: {built} without {bounded}", path.display());
                }
            }
            let services = code.matches("Server::new(").count();
            let bounded = code.matches(".max_decoding_message_size(").count();
            assert_eq!(services, bounded, "{}: services without .max_decoding_message_size(", path.display());
        }
    }
    servers.sort();
    assert_eq!(
        servers,
        [
            "forwarder/src/serve.rs",
            "identity/src/ca/workload.rs",
            "manager/src/lib.rs",
            "mesh/src/inspect.rs",
            "registry/src/server.rs",
            "sdk/src/endpoint.rs",
            "sdk/src/prefix_server.rs",
        ]
    );
}
