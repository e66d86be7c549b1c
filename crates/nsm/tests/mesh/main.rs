//! The whole mesh as a system: the real program in real namespaces over real mTLS, under what goes wrong.
//!
//! Each test builds a lab of its own from `nsm_lab` (see `harness`), breaks one thing, reads what a person would
//! read, and looks whether anything is left: links in pods, records of wires, connections at any hop.
#![allow(clippy::print_stdout, reason = "a test that cannot run says so")]

mod answers;
mod client;
#[path = "../common/mod.rs"]
mod common;
mod config;
mod context;
mod examples;
mod functions;
mod harness;
mod healing;
mod hostile;
mod interop;
mod killed;
mod node;
mod operate;
mod pid_namespaces;
mod raw;
mod selection;
mod state;
mod steering;
mod traces;
mod two_nodes;
mod wire;

/// The part of a test that has to be a process in a pod, with the pod's identity: see [`harness::Mesh::inside`].
#[test]
#[ignore = "the other tests run it, as a process in a pod"]
fn inside() {
    let Some((job, lab)) = harness::job() else { return };
    match job.as_str() {
        "idle" => raw::wait_until_idle(&lab, &[]),
        "ghosts" => healing::ghosts(&lab),
        "changes" => healing::changes(&lab),
        // A manager remembers the connection of a wire that broke until its token expires: the client may choose anew.
        "idle wires" => raw::wait_until_idle(&lab, &["nsm.io.sock"]),
        "whole path" => node::whole_path(&lab),
        "bad requests" => wire::bad_requests(&lab),
        "bad tokens" => wire::bad_tokens(&lab),
        "bad namespaces" => wire::bad_namespaces(&lab),
        "foreign namespace" => pid_namespaces::foreign_namespace(&lab),
        "evil" => answers::evil(&lab),
        "leaving" => wire::leaving(&lab),
        "hardware addresses" => context::hardware_addresses(&lab),
        job if job.starts_with("lease ") => context::lease(&lab, &job["lease ".len()..]),
        job if job.starts_with("steer ") => steering::steer(&lab, &job["steer ".len()..]),
        other => match other.split_once(' ') {
            Some(("forget", endpoint)) => healing::forget(&lab, endpoint),
            Some(("mangle", socket)) => hostile::mangle(&lab, socket),
            Some(("lies", socket)) => interop::lies(&lab, socket),
            Some(("churn", amounts)) => interop::make_and_close(&lab, amounts),
            Some(("forge", socket)) => hostile::forge(&lab, socket),
            _ => panic!("no such job: {other}"),
        },
    }
}
