//! `config`: what is in a configuration file, before anything runs with it.

use std::path::PathBuf;

use clap::Subcommand;

use super::Failure;
use crate::config::Config;

#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Check a node's configuration; exit status 2 if it is wrong.
    #[command(after_help = "Example:\n  qkd-bridge config check alice.toml")]
    Check {
        /// The file.
        file: PathBuf,
    },
}

impl ConfigCommand {
    pub(super) fn run(self) -> Result<(), Failure> {
        let Self::Check { file } = self;
        let config = Config::read(&file)?;
        let pairs: usize = config.links.iter().map(|l| l.module_pairs.len()).sum();
        println!(
            "{}: node {}, {} links with {pairs} module pairs, stock with {} nodes, {} applications",
            file.display(),
            config.node.id,
            config.links.len(),
            config.stocks.len(),
            config.apps.len(),
        );
        Ok(())
    }
}
