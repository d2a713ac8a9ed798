//! `store`: what a node's store holds, whether it is sound, its key, and the life of its keys.

mod check;
mod figures;
mod rekey;
mod trace;
mod void;

use std::path::PathBuf;

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use qkd_kma::vault::{StoreView, VaultError};

use super::Failure;
use crate::{
    config::{Config, KekConfig, StoreConfig},
    kek::{KekSourceError, kek_source},
};

#[derive(Debug, Subcommand)]
pub(super) enum StoreCommand {
    /// Verify a store without changing it: journal, data keys, every row against the ledger, books.
    #[command(
        after_help = "Examples:\n  qkd-bridge store check --config alice.toml\n  \
        qkd-bridge store check --config alice.toml --json\n\n\
        The node must not run. Exit status: 0 sound, 1 it could not be checked, 2 the configuration is \
        wrong, 3 something is damaged. Damaged key is burned when the node comes to use it; run the \
        check on a copy and keep it if you want to look into the cause."
    )]
    Check {
        #[command(flatten)]
        which: Which,
        /// Do not check in a process of its own, which a damaged database may end.
        #[arg(long, hide = true)]
        in_process: bool,
    },
    /// Say what is in stock: per peer, owner and level, with ages, and what it takes on disk and in RAM.
    #[command(
        after_help = "Examples:\n  qkd-bridge store stats --config alice.toml\n  \
        qkd-bridge store stats --config alice.toml --json\n\n\
        Works beside a running node and needs no key: it reads the ledger, which holds none."
    )]
    Stats(Which),
    /// Wrap all data keys anew, under another key-encryption key if one is named, and destroy what
    /// wrapped them before.
    #[command(
        after_help = "Examples:\n  qkd-bridge store rekey --config alice.toml\n  \
        qkd-bridge store rekey --config alice.toml --to passphrase:prompt\n  \
        qkd-bridge store rekey --config alice.toml --to file:/etc/qkd-bridge/kek-2\n  \
        qkd-bridge store rekey --config alice.toml --to credential:qkd-kek\n\n\
        The node must not run. A crash leaves the store under the old key or under the new one. Then \
        change `kek` in the configuration as the command says, and destroy the old key."
    )]
    Rekey {
        #[command(flatten)]
        which: Which,
        /// The new key: file:PATH (made if it is not there), credential:NAME, or passphrase: and
        /// prompt, file:PATH, credential:NAME or env:NAME.
        #[arg(long, value_name = "SOURCE")]
        to: Option<KekConfig>,
    },
    /// Print a key's history, what it was made of and what came of it. No key, no hash of one.
    #[command(
        after_help = "Examples:\n  qkd-bridge store trace --config alice.toml 0000be38\n  \
        qkd-bridge store trace --config alice.toml mp1.0/0000be38\n  \
        qkd-bridge store trace --config alice.toml 6f1c1d7e-55cf-4c2a-9f43-0e6d7e0a5b11 --json\n  \
        qkd-bridge store trace --config alice.toml 'alice--bob/17'\n\n\
        Works beside a running node. Exit status 1 if the ledger and its archives do not know the ID."
    )]
    Trace {
        #[command(flatten)]
        which: Which,
        /// A QKD-key's ID, a KMA-key's or KSA-key's UUID, or STREAM/NUMBER.
        id: String,
    },
    /// Delete a key that others may know, and every key that was made of it or carried under it.
    #[command(
        after_help = "Examples:\n  qkd-bridge store void --config alice.toml mp1.0/0000be38\n  \
        qkd-bridge store void --config alice.toml mp1.0/0000be38 --yes\n  \
        qkd-bridge store void --config alice.toml 6f1c1d7e-55cf-4c2a-9f43-0e6d7e0a5b11 --with-origins --yes\n\n\
        Without --yes it only says what it would do. A node that runs does it at once; the store of one \
        that does not is changed, and the node tells the others when it is started. The matching nodes void \
        the same. What has to be done at nodes that share no stream with this one is printed."
    )]
    Void {
        #[command(flatten)]
        which: Which,
        /// A QKD-key's ID, a KMA-key's or KSA-key's UUID, or STREAM/NUMBER.
        id: String,
        /// Suspect what the key was made of too, and everything that came of that.
        #[arg(long)]
        with_origins: bool,
        /// Do it.
        #[arg(long)]
        yes: bool,
    },
}

/// A store, and how to speak of it.
#[derive(Debug, clap::Args)]
pub(super) struct Which {
    /// The node's configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// Why a store could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    #[error("store {}", dir.display())]
    Vault {
        dir: PathBuf,
        #[source]
        source: VaultError,
    },
    #[error("a node runs on the store {}: stop it first (`status` and `store stats` work beside it)", dir.display())]
    InUse { dir: PathBuf },
    #[error("there is no store in {}", dir.display())]
    None { dir: PathBuf },
    #[error(transparent)]
    Kek(#[from] KekSourceError),
    #[error("a store in memory has no key-encryption key")]
    NoKek,
    #[error("neither the ledger nor its archives know {id}")]
    Unknown { id: String },
    #[error("a node runs, and gives no answer on {}: what it was asked may be done", socket.display())]
    NoAnswer {
        socket: PathBuf,
        source: std::io::Error,
    },
    #[error("the node makes keys of suspected ones faster than they are found; run it again")]
    Unsettled,
    #[error("the store is damaged")]
    Damaged,
    #[error("no answer could be written")]
    Output(#[from] serde_json::Error),
    #[error("the system refused")]
    System(#[from] std::io::Error),
}

impl StoreError {
    pub(super) const fn exit_status(&self) -> u8 {
        match self {
            Self::Damaged => 3,
            _ => 1,
        }
    }

    /// What a failed vault means to whoever runs the command.
    fn of(config: &Config, source: VaultError) -> Self {
        let dir = config.store_dir();
        match source {
            VaultError::InUse { .. } => Self::InUse { dir },
            VaultError::Missing { file: "journal" } => Self::None { dir },
            source => Self::Vault { dir, source },
        }
    }
}

/// Both things that can go wrong while a store is opened to be looked at.
#[derive(Debug)]
enum Opening {
    Vault(VaultError),
    Kek(KekSourceError),
}

impl From<VaultError> for Opening {
    fn from(error: VaultError) -> Self {
        Self::Vault(error)
    }
}

/// Locks a store and opens it to look at it.
fn view(config: &Config) -> Result<StoreView, StoreError> {
    let kek = || match &config.store {
        StoreConfig::Lmdb { kek, .. } => kek_source(kek, false).map_err(Opening::Kek),
        StoreConfig::Memory => kek_source(&KekConfig::default(), false).map_err(Opening::Kek),
    };
    StoreView::open(&config.store_dir(), kek).map_err(|error| match error {
        Opening::Vault(source) => StoreError::of(config, source),
        Opening::Kek(error) => error.into(),
    })
}

impl StoreCommand {
    pub(super) fn run(self) -> Result<(), Failure> {
        let read = |which: &Which| Config::read(&which.config);
        match self {
            Self::Check { which, in_process } => {
                let config = read(&which)?;
                if in_process {
                    check::run(&config, which.json)?;
                } else {
                    check::run_apart(&which)?;
                }
            }
            Self::Stats(which) => figures::run(&read(&which)?, which.json)?,
            Self::Rekey { which, to } => rekey::run(&read(&which)?, to.as_ref(), which.json)?,
            Self::Trace { which, id } => trace::run(&read(&which)?, &id, which.json)?,
            Self::Void {
                which,
                id,
                with_origins,
                yes,
            } => {
                let id = &id;
                let suspicion = void::Suspicion { id, with_origins };
                void::run(&read(&which)?, suspicion, yes, which.json)?;
            }
        }
        Ok(())
    }
}

/// A bar on a terminal, nothing elsewhere.
fn progress(total: u64, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {bar:40} {pos}/{len} {eta}");
    let bar = ProgressBar::new(total).with_message(what);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
