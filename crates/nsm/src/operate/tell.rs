//! `nsm tell`: what the processes found here tell, for an `nsm` that is elsewhere.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use nsm_api::pb::introspect::Kind;

use super::{At, put};

/// Prints what the processes found here tell, for an nsm that is elsewhere (--cluster)
#[derive(Debug, Args)]
#[command(hide = true)]
pub(crate) struct Tell {
    /// Of what; everything, without it
    #[arg(long, value_delimiter = ',', value_parser = kind)]
    kinds: Vec<Kind>,
    /// Compare wires with the kernel
    #[arg(long)]
    verify: bool,
}

impl Tell {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        At::default().run(async |mesh| {
            let view = mesh.view(&self.kinds, self.verify).await?;
            put(&(serde_json::to_string(&view)? + "\n"))?;
            Ok(ExitCode::SUCCESS)
        })
    }
}

fn kind(text: &str) -> Result<Kind, String> {
    Kind::from_str_name(text).ok_or_else(|| format!("{text:?} is nothing that this version tells"))
}
