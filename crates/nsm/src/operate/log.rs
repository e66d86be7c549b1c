//! `nsm log`: another log level for processes that run.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use nsm_transport::DialUrl;

use super::{At, Mesh, put, set_log};

/// Changes what running processes log, until they end
///
/// Signals do it too, as with upstream's programs: USR1 logs everything, USR2 what was logged at the start.
///
/// Example: nsm log info,nsm_mesh=debug --process manager
#[derive(Debug, Args)]
pub(crate) struct Log {
    /// error, warn, info, debug, trace, off, or a filter such as info,nsm_mesh=debug; `reset`: as at the start
    level: String,
    /// Only processes of these names or roles
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    process: Vec<String>,
    #[command(flatten)]
    at: At,
}

impl Log {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        self.at.run(async |mesh| {
            let view = mesh.view(&[nsm_api::pb::introspect::Kind::Process], false).await?;
            view.demand()?;
            let meant = |name: &String, role: &String| {
                self.process.is_empty() || self.process.iter().any(|p| p == name || p == role)
            };
            let level = if self.level == "reset" { "" } else { &self.level };
            let mut changed = 0;
            for seen in view.seen.iter().filter(|seen| meant(&seen.process.name, &seen.process.role)) {
                match (&mesh, &seen.pod) {
                    (Mesh::Cluster(cluster), Some(pod)) => {
                        put(&cluster.set_log(pod, &self.level, &seen.process.name).await?)?;
                    }
                    _ => {
                        let now = set_log(&seen.url.parse::<DialUrl>()?, level).await?;
                        put(&format!("{}: {now}\n", seen.process.name))?;
                    }
                }
                changed += 1;
            }
            if changed == 0 {
                let names: Vec<_> = view.seen.iter().map(|seen| seen.process.name.as_str()).collect();
                bail!("no process is called {}; there are {}", self.process.join(", "), names.join(", "));
            }
            Ok(ExitCode::SUCCESS)
        })
    }
}
