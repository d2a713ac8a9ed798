//! Which module to open, and how.

use std::{io, path::PathBuf};

use serde::Deserialize;

use crate::{
    advice::Advice,
    clavis2::{Clavis2Config, Clavis2Source},
    directory::{DirectoryConfig, DirectorySource},
    etsi014::{Etsi014Config, Etsi014Source, Role},
    openers::CustomConfig,
    records::Limits,
    serial::{SerialConfig, SerialSource},
    shared_memory::{FileError, PlaceError, SharedMemoryConfig, SharedMemorySource},
    source::KeySource,
};
use qkd_handover::ring::MapError;

/// A module's entry in the configuration; `kind` names the driver.
///
/// ```toml
/// kind = "directory"
/// path = "/run/qkd/keys"
/// ```
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum DriverConfig {
    /// Hand-over files in a directory.
    Directory(DirectoryConfig),
    /// A device on a serial line.
    Serial(SerialConfig),
    /// A producer process that writes to shared memory.
    SharedMemory(SharedMemoryConfig),
    /// The daemon of a Clavis2.
    Clavis2(Clavis2Config),
    /// A vendor's key manager.
    Etsi014(Etsi014Config),
    /// A driver that the program has brought along; see [`Openers`](crate::Openers).
    Custom(CustomConfig),
}

impl DriverConfig {
    /// The paths of folder, port, socket or certificates, for a caller that resolves relative ones.
    pub fn paths_mut(&mut self) -> Vec<&mut PathBuf> {
        match self {
            Self::Directory(config) => vec![&mut config.path],
            Self::Serial(config) => vec![&mut config.path],
            Self::SharedMemory(config) => config.path_mut().into_iter().collect(),
            Self::Clavis2(_) => Vec::new(),
            Self::Etsi014(config) => {
                vec![&mut config.ca, &mut config.certificate, &mut config.key]
            }
            // Which of its settings are paths only the driver knows.
            Self::Custom(config) => vec![&mut config.folder],
        }
    }

    /// Whether the driver fetches keys by their IDs, so that it has to hear which the other end holds
    /// ([`KeySource::request`]).
    #[must_use]
    pub fn fetches_by_id(&self) -> bool {
        match self {
            Self::Clavis2(config) => config.role == Role::Fetch,
            Self::Etsi014(config) => config.role == Role::Fetch,
            // It ignores what it has no use for.
            Self::Custom(_) => true,
            Self::Directory(_) | Self::Serial(_) | Self::SharedMemory(_) => false,
        }
    }

    /// When the module's values count as out of range.
    #[must_use]
    pub fn limits(&self) -> Limits {
        match self {
            Self::Serial(config) => config.limits,
            Self::SharedMemory(config) => config.limits,
            Self::Custom(config) => config.limits,
            Self::Directory(config) => config.limits,
            // They tell no values.
            Self::Clavis2(_) | Self::Etsi014(_) => Limits::default(),
        }
    }

    /// Opens the module with a driver of this crate; [`Openers`](crate::Openers) know others too. Needs the context of a tokio runtime, in which the source is then polled.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; nothing is open and nothing was changed.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn open(&self) -> Result<Box<dyn KeySource>, OpenError> {
        Ok(match self {
            Self::Directory(config) => Box::new(DirectorySource::open(config)?),
            Self::Serial(config) => Box::new(SerialSource::open(config)?),
            Self::SharedMemory(config) => Box::new(SharedMemorySource::open(config)?),
            Self::Clavis2(config) => Box::new(Clavis2Source::open(config)?),
            Self::Etsi014(config) => Box::new(Etsi014Source::open(config)?),
            Self::Custom(config) => {
                return Err(OpenError::UnknownDriver {
                    driver: config.driver.clone(),
                    known: Vec::new(),
                });
            }
        })
    }
}

/// Why a module cannot be opened. `Display` says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The hand-over folder cannot be opened.
    #[error("cannot open {path}{}", because(advice.as_ref()))]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What mends it.
        advice: Option<Advice>,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The hand-over folder lets every user put files into it.
    #[error("{path} has mode {mode:o}: take away the others' right to write (chmod o-w)")]
    FolderMode {
        /// The folder.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The hand-over folder belongs to a user who is not trusted with keys.
    #[error("{path} belongs to user {uid}: change its owner, or add {uid} to `owner_uids`")]
    FolderOwner {
        /// The folder.
        path: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// The format of the files needs the name of one.
    #[error("{path}: give `file`, the name of the file with the keys, without its folder")]
    NoFileName {
        /// The folder.
        path: PathBuf,
    },
    /// The operating system gives no more change notifications.
    #[error("cannot watch {path}: raise fs.inotify.max_user_instances and max_user_watches")]
    Watch {
        /// The folder.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The serial port is there and cannot be used.
    #[error("cannot use {path} as a serial port{}", because(advice.as_ref()))]
    Port {
        /// The port.
        path: PathBuf,
        /// What mends it.
        advice: Option<Advice>,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The socket for producers cannot be made.
    #[error("cannot listen at {path}{}", because(advice.as_ref()))]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What mends it.
        advice: Option<Advice>,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The memory of the ring cannot be had.
    #[error("cannot make the ring for {path}: check `capacity_bytes` and the free memory")]
    Ring {
        /// The socket.
        path: PathBuf,
        /// The reason.
        source: MapError,
    },
    /// The ring's file cannot be made.
    #[error("cannot keep a ring at {path}: {reason}")]
    RingFile {
        /// The file.
        path: PathBuf,
        /// The reason, and what mends it.
        reason: FileError,
    },
    /// The settings do not say where producers find their ring.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// No socket towards a device.
    #[error("cannot talk to {address}")]
    Datagrams {
        /// The device.
        address: std::net::SocketAddr,
        /// The operating system's reason.
        source: io::Error,
    },
    /// Certificates for a key manager cannot be used.
    #[error(transparent)]
    Credentials(Box<qkd_net::CredentialsError>),
    /// This program has no driver of that name.
    #[error(
        "this program has no driver {driver:?} of its own{}: `kind = \"custom\"` is for programs that bring one along",
        listed(known)
    )]
    UnknownDriver {
        /// The name in the configuration.
        driver: String,
        /// The names that there are.
        known: Vec<String>,
    },
    /// A driver that the program has brought along cannot open its module.
    #[error("driver {driver:?}")]
    Custom {
        /// The driver's name.
        driver: String,
        /// Its reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A number of the configuration is out of its range.
    #[error("{setting} = {value}: give {expected}")]
    Setting {
        /// Name of the setting.
        setting: &'static str,
        /// Its value.
        value: u64,
        /// What it may be.
        expected: &'static str,
    },
}

fn because(advice: Option<&Advice>) -> String {
    advice.map_or_else(String::new, |advice| format!(": {advice}"))
}

fn listed(known: &[String]) -> String {
    match known {
        [] => String::new(),
        known => format!(" (it has {})", known.join(", ")),
    }
}
