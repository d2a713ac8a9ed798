//! `pair`: stops and starts module pairs at a running node.

use std::{io, path::PathBuf};

use clap::Subcommand;
use qkd_keyfile::ModulePairId;
use qkd_kma::{ModulePairStatus, OperatorAct, OperatorAnswer, StopReason};
use serde_json::json;

use super::Failure;
use crate::{config::Config, node};

#[derive(Debug, Subcommand)]
pub(super) enum PairCommand {
    /// Make no more key of a module pair, until it is started again.
    #[command(
        after_help = "Examples:\n  qkd-bridge pair stop --config alice.toml pair-1\n  \
        qkd-bridge pair stop --config alice.toml pair-1 --json\n\n\
        The node must run. It tells the matching node, which stops too; what both have agreed stays in \
        stock, what they have not is dropped. A restart of the node does not start the module pair."
    )]
    Stop(Which),
    /// Let a module pair go on that was stopped here, by hand or for differing too often.
    #[command(
        after_help = "Examples:\n  qkd-bridge pair start --config alice.toml pair-1\n\n\
        The node must run. Each end has a stop of its own: where both have stopped the module pair, as \
        they do when it differs too often, it is started at both. Differences are counted anew."
    )]
    Start(Which),
}

/// A module pair of a node.
#[derive(Debug, clap::Args)]
pub(super) struct Which {
    /// The node's configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    /// The module pair's name.
    module_pair: ModulePairId,
}

impl PairCommand {
    pub(super) fn run(self) -> Result<(), Failure> {
        let (which, act): (_, fn(_) -> _) = match self {
            Self::Stop(which) => (which, OperatorAct::StopModulePair),
            Self::Start(which) => (which, OperatorAct::StartModulePair),
        };
        let config = Config::read(&which.config)?;
        let act = act(which.module_pair.clone());
        let socket = config.order_socket();
        let answer = node::order(&socket, &act);
        let answer = answer.map_err(|source| Failure::NotRunning { socket, source })?;
        match answer {
            OperatorAnswer::ModulePair { changed, status } if which.json => {
                let report = json!({
                    "module_pair": which.module_pair,
                    "changed": changed,
                    "status": status,
                });
                println!("{report:#}");
            }
            OperatorAnswer::ModulePair { changed, status } => print(&which, changed, &status),
            OperatorAnswer::UnknownModulePair { known } => {
                return Err(Failure::UnknownModulePair {
                    module_pair: which.module_pair,
                    known: known.iter().map(ToString::to_string).collect(),
                });
            }
            OperatorAnswer::Suspected { .. } => {
                return Err(io::Error::other("an answer to another order").into());
            }
        }
        Ok(())
    }
}

fn print(which: &Which, changed: bool, status: &ModulePairStatus) {
    let name = &which.module_pair;
    let news = if changed { "" } else { " already" };
    match status.stopped_here {
        Some(reason) => println!(
            "module pair {name} is stopped here{news} ({}); it is started with\n  \
             qkd-bridge pair start --config {} {name}",
            why(reason),
            which.config.display()
        ),
        None => println!("module pair {name} is started here{news}"),
    }
    if let Some(reason) = status.stopped_there {
        println!(
            "it is stopped at {} ({}), as far as this node knows: start it there too",
            status.peer,
            why(reason)
        );
    }
}

const fn why(reason: StopReason) -> &'static str {
    match reason {
        StopReason::Mismatches => "too many QKD-keys differed",
        StopReason::Operator => "by an operator",
    }
}
