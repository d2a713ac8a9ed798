//! Bringing up a module: `probe` looks, `record` writes down what it sees, `replay` plays that.
//!
//! All three go through the real drivers or the real transports, and none of them shows or keeps a key
//! bit.

mod probe;
mod record;
mod replay;
mod seen;

use std::{
    io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use qkd_drivers::{
    DirectoryConfig, DriverConfig, Event, KeySource, OpenError, ReadError, SerialConfig,
    Settlement, SharedMemoryConfig, advice, advice::Advice, clavis2::Role, next_event,
};
use qkd_sim_device::trace::TraceError;
use tokio::time::Instant;
use zeroize::{Zeroize, Zeroizing};

pub(super) use self::{probe::ProbeArgs, record::RecordArgs, replay::ReplayArgs};
use super::run::Signals;

/// Why a module could not be looked at.
#[derive(Debug, thiserror::Error)]
pub(super) enum BringUpError {
    #[error("cannot use {}: {advice}", device.display())]
    Advice { device: PathBuf, advice: Advice },
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(
        "cannot tell what {} is: give --kind serial, directory, shared-memory or shared-memory-file",
        .0.display()
    )]
    Kind(PathBuf),
    #[error("--driver is not the entry of a driver: {0}")]
    Driver(String),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("trace {}", path.display())]
    Trace { path: PathBuf, source: TraceError },
    #[error("{}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("nothing was heard of the module in {seconds} s")]
    Silent { seconds: u64 },
    /// Looking would cost keys that nobody has asked to lose.
    #[error(
        "this module gives each key out once, so what is looked at is lost to the node: \
         say so with --consume, and say how much with --blocks"
    )]
    GivesOnce,
    #[error(
        "this end fetches the keys that the other end has pulled, by their IDs: look at the end \
         whose role is \"pull\""
    )]
    Fetches,
    #[error("--to {0} is no address and port for datagrams, such as 127.0.0.1:5323")]
    Address(String),
}

impl BringUpError {
    /// 2 where the command line is wrong.
    pub(super) const fn exit_status(&self) -> u8 {
        match self {
            Self::Driver(_) | Self::GivesOnce | Self::Fetches | Self::Address(_) => 2,
            Self::Advice { .. }
            | Self::Kind(_)
            | Self::Open(_)
            | Self::Read(_)
            | Self::Trace { .. }
            | Self::File { .. }
            | Self::Silent { .. } => 1,
        }
    }
}

/// Which module, and for how long.
#[derive(Debug, clap::Args)]
pub(super) struct DeviceArgs {
    /// A serial port, the folder of hand-over files, the socket at which producers are to connect, or the
    /// file of a ring for a producer that is trusted with one.
    #[arg(value_name = "DEVICE", required_unless_present = "driver")]
    device: Option<PathBuf>,
    /// What it is, where its path does not tell.
    #[arg(long)]
    kind: Option<Kind>,
    /// Rate of a serial line, in baud.
    #[arg(long, value_name = "BAUD", default_value_t = 3_000_000)]
    baud: u32,
    /// The serial device has no RTS and CTS.
    #[arg(long)]
    no_rts_cts: bool,
    /// The driver's entry as in a node's configuration, for every other kind and setting.
    #[arg(long, value_name = "TOML", conflicts_with_all = ["device", "kind"])]
    driver: Option<String>,
    /// Stop after so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    seconds: u64,
    /// Stop after so many key blocks.
    #[arg(long, value_name = "N")]
    blocks: Option<u64>,
    /// Take the keys from the module for good: they are wiped and no one gets them. Without this they
    /// stay, but a module stops when it keeps as many as it can.
    #[arg(long)]
    consume: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    Serial,
    Directory,
    SharedMemory,
    SharedMemoryFile,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Serial => "serial",
            Self::Directory => "directory",
            Self::SharedMemory => "shared-memory",
            Self::SharedMemoryFile => "shared-memory-file",
        }
    }

    fn of(path: &Path) -> Option<Self> {
        let Ok(metadata) = path.metadata() else {
            let text = path.to_string_lossy();
            return match () {
                () if text.ends_with(".ring") => Some(Self::SharedMemoryFile),
                () if text.starts_with("/dev/") => Some(Self::Serial),
                () if text.ends_with(".sock") => Some(Self::SharedMemory),
                () => None,
            };
        };
        let file_type = metadata.file_type();
        match () {
            () if file_type.is_char_device() => Some(Self::Serial),
            () if file_type.is_dir() => Some(Self::Directory),
            () if file_type.is_socket() => Some(Self::SharedMemory),
            () => None,
        }
    }
}

/// Blocks that may come before any is settled.
const CREDIT_BLOCKS: u32 = 256;

impl DeviceArgs {
    /// As it is told.
    fn name(&self) -> String {
        match &self.device {
            Some(device) => device.display().to_string(),
            None => "driver".to_owned(),
        }
    }

    /// The driver's name and its configuration, once nothing is known to keep this user from it.
    fn driver(&self) -> Result<(String, DriverConfig), BringUpError> {
        if let Some(text) = &self.driver {
            #[derive(serde::Deserialize)]
            struct Entry {
                driver: DriverConfig,
            }
            let refuse = |error: toml::de::Error| BringUpError::Driver(error.message().to_owned());
            let table: toml::Table = toml::from_str(&format!("driver = {text}")).map_err(refuse)?;
            let kind = table["driver"].get("kind").and_then(toml::Value::as_str);
            let kind = kind.unwrap_or_default().to_owned();
            let entry: Entry = table.try_into().map_err(refuse)?;
            self.check_cost(&entry.driver)?;
            return Ok((kind, entry.driver));
        }
        let device = self.device.clone().unwrap_or_default();
        let Some(kind) = self.kind.or_else(|| Kind::of(&device)) else {
            return Err(BringUpError::Kind(device));
        };
        let advice = match kind {
            Kind::Serial => advice::port(&device),
            Kind::Directory => advice::folder(&device),
            Kind::SharedMemory => advice::new_socket(&device),
            // Opening it says what is wrong.
            Kind::SharedMemoryFile => None,
        };
        if let Some(advice) = advice {
            return Err(BringUpError::Advice { device, advice });
        }
        let config = match kind {
            Kind::Serial => DriverConfig::Serial(SerialConfig {
                baud: self.baud,
                rts_cts: !self.no_rts_cts,
                ..SerialConfig::new(device)
            }),
            Kind::Directory => DriverConfig::Directory(DirectoryConfig::new(device)),
            Kind::SharedMemory => DriverConfig::SharedMemory(SharedMemoryConfig::new(device)),
            Kind::SharedMemoryFile => {
                DriverConfig::SharedMemory(SharedMemoryConfig::in_file(device))
            }
        };
        Ok((kind.name().to_owned(), config))
    }

    /// Refuses what gives its keys out once, unless they are to be taken.
    fn check_cost(&self, driver: &DriverConfig) -> Result<(), BringUpError> {
        let role = match driver {
            DriverConfig::Clavis2(config) => config.role,
            DriverConfig::Etsi014(config) => config.role,
            _ => return Ok(()),
        };
        match role {
            Role::Fetch => Err(BringUpError::Fetches),
            Role::Pull if !self.consume => Err(BringUpError::GivesOnce),
            Role::Pull => Ok(()),
        }
    }

    /// Reads the module for the time or the blocks asked for; `see` is told every event, with the key
    /// of a key block.
    async fn watch(
        &self,
        source: &mut dyn KeySource,
        mut see: impl FnMut(&Event, &[u8]) -> Result<(), BringUpError>,
    ) -> Result<(), BringUpError> {
        let mut signals = Signals::new().map_err(|source| BringUpError::File {
            path: PathBuf::new(),
            source,
        })?;
        let progress = progress(&self.name());
        let mut buffer = Zeroizing::new(vec![0; source.max_block_bytes()]);
        let end = Instant::now() + Duration::from_secs(self.seconds);
        let mut blocks = 0;
        // One that gives a key out once gives no more than is looked at.
        let credit = self.blocks.and_then(|most| u32::try_from(most).ok());
        source.grant(credit.map_or(CREDIT_BLOCKS, |most| most.min(CREDIT_BLOCKS)));
        while self.blocks.is_none_or(|most| blocks < most) {
            let event = tokio::select! {
                _ = signals.next() => break,
                () = tokio::time::sleep_until(end) => break,
                event = next_event(source, &mut buffer) => event?,
            };
            let key_bytes = match &event {
                Event::Key(block) => block.len_bytes(),
                _ => 0,
            };
            see(&event, &buffer[..key_bytes])?;
            if let Event::Key(block) = &event {
                buffer[..key_bytes].zeroize();
                blocks += 1;
                progress.set_message(format!("{blocks} key blocks"));
                if self.consume {
                    source.settle(&block.metadata.qkd_key_id, Settlement::Dropped);
                }
                if self
                    .blocks
                    .is_none_or(|most| blocks + u64::from(CREDIT_BLOCKS) <= most)
                {
                    source.grant(1);
                }
            }
            progress.tick();
        }
        progress.finish_and_clear();
        if self.consume {
            // What was settled last is still to be told to the module.
            let rest = next_event(source, &mut buffer);
            let _ = tokio::time::timeout(Duration::from_millis(200), rest).await;
        }
        Ok(())
    }
}

/// On standard error, if that is a terminal.
fn progress(name: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {prefix}  {elapsed}  {msg}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_spinner());
    let bar = ProgressBar::new_spinner().with_style(style);
    bar.set_prefix(name.to_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// One thread is enough to read a module.
fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}
