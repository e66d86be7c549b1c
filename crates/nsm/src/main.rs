//! `nsm`: one binary, every role a subcommand. This file reads flags and environment; the roles are in the
//! crates of the same names.

mod bench;
mod between;
mod common;
mod convert;
mod guard;
mod identity;
mod install;
mod lab;
mod operate;
mod probe;
mod programs;
mod roles;
mod telemetry;
mod webhook;
mod wires;

use std::{
    ffi::{OsStr, OsString},
    path::Path,
    process::ExitCode,
};

use clap::{CommandFactory as _, FromArgMatches as _, Parser};

/// The C library's took a third of the daemons' own time while a thousand wires moved.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
    Identity(identity::Identity),
    Webhook(webhook::Webhook),
    MapIp(between::MapIp),
    ClusterInfo(between::ClusterInfo),
    Probe(probe::Probe),
    Install(install::Install),
    Upgrade(install::Upgrade),
    Uninstall(install::Uninstall),
    Lab(lab::Lab),
    /// Measures what a wire costs on this machine, beside what the kernel alone can do
    Bench(bench::Bench),
    Get(operate::get::Get),
    Explain(operate::explain::Explain),
    Check(operate::check::Check),
    Log(operate::log::Log),
    Tell(operate::tell::Tell),
    Convert(convert::Convert),
    /// Prints a completion script for a shell
    Completions {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
}

/// As kubectl calls its plugin `nsm`, and what this is for there: roles are for pods.
const PLUGIN: &str = "kubectl-nsm";
const OF_PLUGIN: [&str; 9] =
    ["get", "explain", "check", "log", "install", "upgrade", "uninstall", "convert", "completions"];
/// Of these, what asks a mesh: that of the cluster.
const ASKING: [&str; 4] = ["get", "explain", "check", "log"];

/// All that can be said on a command line, and of a plugin only what is meant for it.
fn command(is_plugin: bool) -> clap::Command {
    // What is not said is there already.
    let as_installed = |flag: clap::Arg| {
        let hides = flag.get_action().takes_values() && flag.get_id() != "namespace";
        if hides { flag.hide_default_value(true) } else { flag }
    };
    let command = Nsm::command().mut_subcommand("upgrade", |upgrade| upgrade.mut_args(as_installed));
    if !is_plugin {
        return command;
    }
    command.mut_subcommands(|of| {
        let is_role = !OF_PLUGIN.contains(&of.get_name());
        of.hide(is_role)
    })
}

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    let mut command = command(called(&args) == Some(PLUGIN.as_ref()));
    let matches = command.try_get_matches_from_mut(as_ours(args)).unwrap_or_else(|error| error.exit());
    let command = Nsm::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut command).exit());
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
        Nsm::Identity(role) => common::run(&role.common().clone(), "identity", &role.name(), role.serve()),
        Nsm::Webhook(role) => common::run(&role.common.clone(), "webhook", &role.name(), role.serve()),
        Nsm::MapIp(role) => common::run(&role.common.clone(), "map-ip", "map-ip", role.serve()),
        Nsm::ClusterInfo(role) => {
            common::run(&role.common.clone(), "cluster-info", "cluster-info", role.serve())
        }
        Nsm::Probe(probe) => probe.run(),
        Nsm::Install(install) => install.run(),
        Nsm::Upgrade(upgrade) => upgrade.run(matches.subcommand_matches("upgrade")),
        Nsm::Uninstall(uninstall) => uninstall.run(),
        Nsm::Lab(lab) => return code(lab::run(lab)),
        Nsm::Bench(bench) => return code(bench::run(bench)),
        Nsm::Get(get) => return code(get.run()),
        Nsm::Explain(explain) => return code(explain.run()),
        Nsm::Check(check) => return code(check.run()),
        Nsm::Log(log) => return code(log.run()),
        Nsm::Tell(tell) => return code(tell.run()),
        Nsm::Convert(convert) => convert.run(),
        Nsm::Completions { shell } => {
            clap_complete::generate(shell, &mut Nsm::command(), "nsm", &mut std::io::stdout());
            Ok(())
        }
    };
    code(result.map(|()| ExitCode::SUCCESS))
}

/// By which name it was called.
fn called(args: &[OsString]) -> Option<&OsStr> {
    args.first().and_then(|program| Path::new(program).file_name())
}

/// The command line as it would be given to `nsm`: whoever is called by the name of one of upstream's programs has its role,
/// and kubectl's plugin asks kubectl's cluster.
fn as_ours(mut args: Vec<OsString>) -> Vec<OsString> {
    let called = called(&args);
    if called == Some(PLUGIN.as_ref()) {
        args[0] = PLUGIN.replace('-', " ").into();
        if args.get(1).is_some_and(|command| ASKING.iter().any(|asking| command == asking)) {
            args.insert(2, "--cluster".into());
        }
        return args;
    }
    let all = programs::PROGRAMS.iter().chain(&programs::INSIDE);
    let Some(program) = all.into_iter().find(|program| called == Some(program.name.as_ref())) else {
        return args;
    };
    // Go's programs write flags with one dash.
    let long = |arg: OsString| match arg.to_str() {
        Some(flag) if flag.len() > 2 && flag.starts_with('-') && !flag.starts_with("--") => {
            format!("-{flag}").into()
        }
        _ => arg,
    };
    let role = program.role.iter().map(OsString::from);
    std::iter::once("nsm".into()).chain(role).chain(args.into_iter().skip(1).map(long)).collect()
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
    fn whoever_is_called_as_upstreams_program_has_its_role() {
        let ours = |line: &str| {
            let args = as_ours(line.split(' ').map(OsString::from).collect());
            args.into_iter().map(|arg| arg.into_string().unwrap()).collect::<Vec<_>>().join(" ")
        };
        for (given, means) in [
            ("/bin/cmd-nsc-init", "nsm client --init"),
            ("cmd-nsmgr --name a", "nsm manager --name a"),
            (
                "/bin/grpc-health-probe -spiffe -addr=unix:///listen.on.sock",
                "nsm probe --spiffe --addr=unix:///listen.on.sock",
            ),
            ("nsm get -o json", "nsm get -o json"),
            ("/bin/nsm", "/bin/nsm"),
            ("/usr/bin/kubectl-nsm get wires", "kubectl nsm get --cluster wires"),
            ("kubectl-nsm install --tag v1", "kubectl nsm install --tag v1"),
            ("kubectl-nsm", "kubectl nsm"),
        ] {
            assert_eq!(ours(given), means);
        }
        for program in programs::PROGRAMS.iter().chain(&programs::INSIDE) {
            let args = as_ours(vec![format!("/bin/{}", program.name).into(), "--help".into()]);
            let error = Nsm::try_parse_from(args).unwrap_err();
            assert_eq!(error.kind(), clap::error::ErrorKind::DisplayHelp, "{}: {error}", program.name);
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        command(false).debug_assert();
        command(true).debug_assert();
    }
}
