//! `nsm convert`: files of the first generation in the words of today.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    path::PathBuf,
};

use anyhow::{Context as _, Result};
use clap::Args;

/// Writes files with networkservicemesh.io/v1alpha1 services as networkservicemesh.io/v1
///
/// Prints one file, ready for kubectl apply. Services mean what they meant: where v1alpha1 asked the next match, v1 says
/// fallthrough. Documents that are no services of networkservicemesh.io stay as they are; comments in services do not.
///
/// Example: nsm convert old.yaml | kubectl apply -f -
#[derive(Debug, Args)]
pub(crate) struct Convert {
    /// Files; none or `-`: the standard input
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
}

impl Convert {
    pub(crate) fn run(self) -> Result<()> {
        let files = if self.files.is_empty() { vec![PathBuf::from("-")] } else { self.files };
        let mut text = String::new();
        for path in files {
            let name = path.display().to_string();
            let before = match name.as_str() {
                "-" => {
                    let mut text = String::new();
                    io::stdin().read_to_string(&mut text).map(|_| text)
                }
                _ => fs::read_to_string(&path),
            };
            let before = before.with_context(|| format!("{name} cannot be read"))?;
            let converted = nsm_k8s::convert::convert(&before).with_context(|| name.clone())?;
            for warning in &converted.warnings {
                eprintln!("nsm: {name}: {warning}");
            }
            if !text.is_empty() && !converted.text.starts_with("---") {
                text.push_str("---\n");
            }
            text.push_str(&converted.text);
            if !text.ends_with('\n') {
                text.push('\n');
            }
        }
        // Nothing is printed unless all of it can be.
        let written = io::stdout().lock().write_all(text.as_bytes());
        written.or_else(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Ok(()),
            _ => Err(error).context("write"),
        })
    }
}
