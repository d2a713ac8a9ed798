//! The command line.
//!
//! Exit status: 0 when all went well, 1 when something failed, 2 when the command line or a
//! configuration file is wrong.

mod bench;
mod bringup;
mod completions;
mod config;
mod controller;
mod demo;
mod inspect;
mod log;
mod manual;
mod pair;
mod pki;
mod randomness;
mod run;
mod sim;
mod status;
mod store;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use qkd_drivers::Openers;

use crate::config::ConfigError;

/// Software between QKD hardware and the applications that need its keys.
#[derive(Debug, Parser)]
#[command(name = "qkd-bridge", version, about, arg_required_else_help = true)]
pub struct Cli {
    /// Levels of the log: error, warn, info, debug, trace, also by part (`info,qkd_kma=debug`).
    #[arg(long, global = true, value_name = "LEVELS", env = "QKD_LOG")]
    log: Option<String>,
    #[command(subcommand)]
    command: Command,
}

/// What the program can do.
#[derive(Debug, Subcommand)]
enum Command {
    /// Run a node.
    #[command(after_help = "Example:\n  qkd-bridge run --config alice.toml\n\n\
        SIGTERM and Ctrl-C stop the node; SIGHUP makes it read module pairs, certificates \
        and log levels again.")]
    Run {
        /// The node's configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Stop when standard input ends.
        #[arg(long, hide = true)]
        exit_with_stdin: bool,
    },
    /// Run a controller, which gives nodes their routes (Ck).
    #[command(after_help = "Example:\n  qkd-bridge controller --config controller.toml")]
    Controller {
        /// The controller's configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Stop when standard input ends.
        #[arg(long, hide = true)]
        exit_with_stdin: bool,
    },
    /// Show a whole network on this machine: two applications get the same keys.
    #[command(after_help = "Examples:\n  qkd-bridge demo\n  \
        qkd-bridge demo --seconds 5 --keep --dir /tmp/network\n\n\
        Three nodes, a controller and simulated devices run as processes of their own, on loopback. \
        Exit status 0 only if every key was the same at both ends.")]
    Demo(demo::DemoArgs),
    /// Play module pairs, over the transports of real ones; or print what a system's key rate is.
    #[command(after_help = "Examples:\n  qkd-bridge sim --example > sim.toml\n  \
        qkd-bridge sim --config sim.toml\n  \
        qkd-bridge sim --config sim.toml --processes --seconds 60\n  \
        qkd-bridge sim --config sim.toml --half mp1:transmitter --seed <HEX>\n  \
        qkd-bridge sim rate --preset gys\n\n\
        Without a `seed` every run has a fresh one, which is printed; then the two halves of a pair \
        must be started by one command, or both be given it. The blocks are as secret as the seed.")]
    Sim(sim::SimArgs),
    /// Measure what this machine can do: each stage, beside what one would write first.
    #[command(after_help = "Examples:\n  qkd-bridge bench\n  \
        qkd-bridge bench --seconds 30 --json\n\n\
        Every answer is checked before it is timed. Cases take turns, so the ratios hold on a \
        machine that is not idle.")]
    Bench(bench::BenchArgs),
    /// Look at a module through its driver, and say what it does: rates, gaps, damage, randomness.
    #[command(
        after_help = "Examples:\n  qkd-bridge probe /dev/serial/by-id/usb-Vendor_QKD_0001-if00-port0\n  \
        qkd-bridge probe /run/qkd/keys --seconds 60 --json\n  \
        qkd-bridge probe /run/qkd/tx-1.sock --blocks 100\n  \
        qkd-bridge probe --driver '{ kind = \"directory\", path = \"/run/qkd/keys\", epochs = \"local\" }'\n\n\
        Key bytes are never shown. Where the device cannot be used, the command that mends it is. \
        Exit status 1 if nothing was heard of the module."
    )]
    Probe(bringup::ProbeArgs),
    /// Write down what a module does, without its keys, so that it can be sent to someone.
    #[command(
        after_help = "Examples:\n  qkd-bridge record /dev/ttyUSB0 -o tx.trace --seconds 60\n  \
        qkd-bridge record /run/qkd/keys -o keys.trace --blocks 1000 --consume\n\n\
        The trace has times, lengths, IDs, error rates, losses and defects, and no key bit."
    )]
    Record(bringup::RecordArgs),
    /// Play a trace to a bridge, over a real transport, with keys made up.
    #[command(
        after_help = "Examples:\n  qkd-bridge replay tx.trace --to /tmp/tty-replay\n  \
        qkd-bridge replay ring.trace --to /run/qkd/tx-1.sock --speed 10\n  \
        qkd-bridge replay keys.trace --to /run/qkd/keys\n  \
        qkd-bridge replay clavis.trace --to 127.0.0.1:5323\n\n\
        Both ends of a link can be played from one trace: equal seeds make equal keys."
    )]
    Replay(bringup::ReplayArgs),
    /// Say what is in a qcrypto file or a key file, without its key bytes; exit status 1 if it is bad.
    #[command(
        after_help = "Examples:\n  qkd-bridge inspect /run/qkd/keys/6a1f00c4\n  \
        qkd-bridge inspect --json 6a1f00c4\n\n\
        Formats: qcrypto final keys (type 7), key files of this program (QKDKEYF1). Other hand-over \
        files are reported as bad ones: look at their folder with `probe`."
    )]
    Inspect(inspect::InspectArgs),
    /// Make certificates for development.
    Pki {
        #[command(subcommand)]
        command: pki::PkiCommand,
    },
    /// Look at configuration files.
    Config {
        #[command(subcommand)]
        command: config::ConfigCommand,
    },
    /// Ask a running node how it is.
    #[command(after_help = "Examples:\n  qkd-bridge status --config alice.toml\n  \
        qkd-bridge status --config alice.toml --json")]
    Status {
        /// The node's configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Stop or start a module pair at a running node.
    Pair {
        #[command(subcommand)]
        command: pair::PairCommand,
    },
    /// Look into a node's store: check it, say what it holds, change its key, follow a key's life.
    Store {
        #[command(subcommand)]
        command: store::StoreCommand,
    },
    /// Write the manual pages of this program, one for each command, to a folder.
    #[command(after_help = "Example:\n  qkd-bridge man --dir /usr/local/share/man/man1")]
    Man {
        /// The folder.
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
    },
    /// Print a script that completes this program's command line in a shell.
    #[command(after_help = "Example:\n  \
        qkd-bridge completions bash > /etc/bash_completion.d/qkd-bridge")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// A configuration file is wrong: exit status 2.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// `--log` or `QKD_LOG` is wrong: exit status 2.
    #[error("log levels {levels:?}: {source}")]
    Levels {
        levels: String,
        source: tracing_subscriber::filter::ParseError,
    },
    #[error(transparent)]
    Node(#[from] crate::node::NodeError),
    #[error(transparent)]
    Pki(#[from] qkd_net::pki::PkiError),
    #[error(transparent)]
    Credentials(#[from] qkd_net::CredentialsError),
    #[error("cannot listen on {address}")]
    Listen {
        address: String,
        source: std::io::Error,
    },
    #[error("the node does not answer on {}: is it running?", socket.display())]
    NotRunning {
        socket: PathBuf,
        source: std::io::Error,
    },
    #[error("no link of this node is fed by module pair {module_pair}; there are: {}", known.join(", "))]
    UnknownModulePair {
        module_pair: qkd_keyfile::ModulePairId,
        known: Vec<String>,
    },
    #[error("demo")]
    Demo(#[from] crate::demo::DemoError),
    #[error("half {half} of a module pair")]
    Sim {
        half: String,
        source: qkd_sim_device::RunError,
    },
    #[error("half {0} of a module pair has failed")]
    SimProcess(String),
    #[error("{}", file.display())]
    Inspect {
        file: PathBuf,
        source: inspect::InspectError,
    },
    #[error(transparent)]
    Store(#[from] store::StoreError),
    #[error(transparent)]
    BringUp(#[from] bringup::BringUpError),
    #[error("the store failed; the node has stopped")]
    StoreFailed,
    #[error("the system refused")]
    System(#[from] std::io::Error),
}

impl Failure {
    const fn exit_status(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Levels { .. } => 2,
            Self::Store(error) => error.exit_status(),
            Self::BringUp(error) => error.exit_status(),
            Self::Node(_)
            | Self::Pki(_)
            | Self::Credentials(_)
            | Self::Listen { .. }
            | Self::NotRunning { .. }
            | Self::UnknownModulePair { .. }
            | Self::Demo(_)
            | Self::Sim { .. }
            | Self::SimProcess(_)
            | Self::Inspect { .. }
            | Self::StoreFailed
            | Self::System(_) => 1,
        }
    }
}

/// Runs the program and says how it went.
#[must_use]
pub fn main() -> ExitCode {
    main_with(Openers::new())
}

/// Runs the program with more drivers than it has of its own, and says how it went.
///
/// ```no_run
/// # use qkd_drivers::{KeySource, Openers};
/// # fn open_records() -> std::io::Result<Box<dyn KeySource>> { unimplemented!() }
/// fn main() -> std::process::ExitCode {
///     let openers = Openers::new().with("records", |_entry| Ok(open_records()?));
///     qkd_bridge::command::main_with(openers)
/// }
/// ```
#[must_use]
pub fn main_with(openers: Openers) -> ExitCode {
    let cli = Cli::parse();
    match cli.command.run(cli.log.as_deref(), openers) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("qkd-bridge: {}", chain(&failure));
            if let Failure::Node(crate::node::NodeError::Store(error)) = &failure
                && error.is_disk_full()
            {
                eprintln!(
                    "the disk is full; nothing that was acknowledged is lost. Make room and start \
                     the node again."
                );
            }
            ExitCode::from(failure.exit_status())
        }
    }
}

/// An error with all that lies behind it, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

impl Command {
    fn run(self, levels: Option<&str>, openers: Openers) -> Result<(), Failure> {
        match self {
            Self::Run {
                config,
                exit_with_stdin,
            } => {
                watch_stdin(exit_with_stdin)?;
                run::run(&config, levels, openers)
            }
            Self::Controller {
                config,
                exit_with_stdin,
            } => {
                watch_stdin(exit_with_stdin)?;
                controller::run(&config, levels)
            }
            Self::Demo(args) => args.run(levels),
            Self::Sim(args) => args.run(levels),
            Self::Bench(args) => args.run(),
            Self::Probe(args) => args.run(levels),
            Self::Record(args) => args.run(levels),
            Self::Replay(args) => args.run(levels),
            Self::Inspect(args) => args.run(),
            Self::Pki { command } => command.run(),
            Self::Config { command } => command.run(),
            Self::Status { config, json } => status::run(&config, json),
            Self::Pair { command } => command.run(),
            Self::Store { command } => command.run(),
            Self::Man { dir } => Ok(manual::write(&dir)?),
            Self::Completions { shell } => {
                completions::print(shell);
                Ok(())
            }
        }
    }
}

fn watch_stdin(wanted: bool) -> std::io::Result<()> {
    if wanted {
        crate::process::end_with_stdin()?;
    }
    Ok(())
}

/// A runtime for nodes and controllers.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
}
