//! `nsm`: one binary, every role a subcommand. This file reads flags and environment; the roles are in the
//! crates of the same names.

mod bench;
mod common;
mod guard;
mod lab;
mod operate;
mod roles;
mod telemetry;
mod webhook;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser};

/// A network service mesh: ask for a network service by name, get a wire to it.
///
/// A workload (a pod, a container, a process) asks its node's manager for a service; the manager's forwarder
/// builds a virtual wire, an interface with addresses and routes, to an endpoint that provides it: on this node
/// or on another, directly or through a chain of functions such as firewalls.
///
/// Try it on this machine, no cluster needed:
///
///   nsm lab run scenarios/secure-intranet.yaml
///
/// Flags are environment variables too, named as upstream's programs name them (NSM_NAME, NSM_CONNECT_TO, …).
/// Every role takes its identity from the SPIFFE Workload API at SPIFFE_ENDPOINT_SOCKET: `nsm identity` serves
/// one, SPIRE another. There is no mode without mutual TLS.
#[derive(Debug, Parser)]
#[command(
    name = "nsm",
    version,
    max_term_width = 110,
    arg_required_else_help = true,
    subcommand_required = true
)]
// What each role says of itself is at its flags: the first line here, all of it in `nsm ROLE --help`.
enum Nsm {
    Registry(roles::Registry),
    Manager(roles::Manager),
    Forwarder(roles::Forwarder),
    Node(roles::Node),
    Client(roles::Client),
    Endpoint(roles::Endpoint),
    Firewall(roles::Firewall),
    Passthrough(roles::Passthrough),
    Ipam(roles::Ipam),
    Identity(roles::Identity),
    Webhook(webhook::Webhook),
    Lab(lab::Lab),
    /// Measures what a wire costs on this machine, beside what the kernel alone can do
    Bench(bench::Bench),
    Get(operate::get::Get),
    Explain(operate::explain::Explain),
    Check(operate::check::Check),
    Log(operate::log::Log),
    /// Prints a completion script for a shell
    Completions {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let command = Nsm::parse();
    let result = match command {
        Nsm::Registry(role) => common::run(&role.common.clone(), "registry", &role.name(), role.serve()),
        Nsm::Manager(role) => common::run(&role.common.clone(), "manager", &role.name(), role.serve()),
        Nsm::Forwarder(role) => common::run(&role.common.clone(), "forwarder", &role.name(), role.serve()),
        Nsm::Node(role) => common::run(&role.common.clone(), "node", &role.name(), role.serve()),
        Nsm::Client(role) => common::run(&role.common.clone(), "client", &role.name(), role.serve()),
        Nsm::Endpoint(role) => common::run(&role.common.clone(), "endpoint", &role.name(), role.serve()),
        Nsm::Firewall(role) => common::run(&role.common.clone(), "firewall", &role.name(), role.serve()),
        Nsm::Passthrough(role) => {
            common::run(&role.common.clone(), "passthrough", &role.name(), role.serve())
        }
        Nsm::Ipam(role) => common::run(&role.common.clone(), "ipam", &role.name(), role.serve()),
        Nsm::Identity(role) => common::run(&role.common.clone(), "identity", &role.name(), role.serve()),
        Nsm::Webhook(role) => common::run(&role.common.clone(), "webhook", &role.name(), role.serve()),
        Nsm::Lab(lab) => return code(lab::run(lab)),
        Nsm::Bench(bench) => return code(bench::run(bench)),
        Nsm::Get(get) => return code(get.run()),
        Nsm::Explain(explain) => return code(explain.run()),
        Nsm::Check(check) => return code(check.run()),
        Nsm::Log(log) => return code(log.run()),
        Nsm::Completions { shell } => {
            clap_complete::generate(shell, &mut Nsm::command(), "nsm", &mut std::io::stdout());
            Ok(())
        }
    };
    code(result.map(|()| ExitCode::SUCCESS))
}

fn code(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("nsm: {error:#}");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Nsm::command().debug_assert();
    }
}
