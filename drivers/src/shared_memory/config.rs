//! Where producers find their ring, and what they get.

use std::path::{Path, PathBuf};

use qkd_keyfile::ModuleId;
use serde::Deserialize;

use crate::records::Limits;

/// Where producers connect, and what they get.
///
/// ```toml
/// kind = "shared-memory"
/// socket = "/run/qkd/tx-1.sock"  # the only setting without a default
/// capacity_bytes = 4194304       # of the ring; a power of 2
/// max_block_bits = 524288        # a longer key is dropped
/// peer_uids = []                 # users who may connect, besides root and this user
/// heartbeat_timeout_ms = 10000   # 0: a producer that hangs is not noticed
/// device_id = 1                  # tells the producer whom it is taken for
/// module = "tx-1"                # for the metadata; may be left out, as may `matching_module`
/// matching_module = "rx-1"
/// limits = { qber_warning_ppm = 80000, qber_absolute_ppm = 110000 }
/// ```
///
/// Or, for a producer that can only map a file and is trusted with it, in place of `socket` and
/// `peer_uids`:
///
/// ```toml
/// file = "/dev/shm/tx-1.ring"    # on a tmpfs
/// trusted = true                 # the memory cannot be sealed
/// peer_gid = 990                 # group that may use it, besides root and this user; may be left out
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Settings")]
pub struct SharedMemoryConfig {
    /// Path of the socket. Its folder must be one that no stranger can write to.
    pub socket: Option<PathBuf>,
    /// Path of the ring's file, where there is no socket.
    pub file: Option<PathBuf>,
    /// That the file's producer is trusted with memory that cannot be sealed.
    pub trusted: bool,
    /// Size of the ring's data, in bytes: a power of 2 from 4 KiB to 1 GiB.
    pub capacity_bytes: usize,
    /// Longest key that is delivered, in bits.
    pub max_block_bits: u32,
    /// Users who may connect to the socket, besides root and the user of this process.
    pub peer_uids: Vec<u32>,
    /// Group whose members may use the file.
    pub peer_gid: Option<u32>,
    /// Time after which a heartbeat that stands still means that the producer hangs, in
    /// milliseconds; 0 for never.
    pub heartbeat_timeout_ms: u64,
    /// Written into the ring: tells the producer whom it is taken for.
    pub device_id: u64,
    /// QKD module ID for the metadata; the ring does not tell it.
    pub module: Option<ModuleId>,
    /// Matching QKD module ID for the metadata.
    pub matching_module: Option<ModuleId>,
    /// When values count as out of range.
    pub limits: Limits,
}

/// Why settings do not say where producers find their ring. `Display` says what to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// Neither way in, or both.
    #[error("give one of `socket` and `file`: producers connect to a socket; a file they map")]
    NotOne,
    /// A file, and nobody has said that its producer is trusted.
    #[error(
        "a ring in a file cannot be sealed: its producer can take the memory away at any moment. Use \
         `socket`; or, if you trust the producer with that, set `trusted = true`"
    )]
    NotTrusted,
    /// `trusted` with a socket.
    #[error(
        "`trusted` is for a `file`: the ring of a `socket` is sealed, its producer need not be"
    )]
    NeedNotTrust,
    /// `peer_uids` with a file, or `peer_gid` with a socket.
    #[error(
        "who may use a `file` is said by `peer_gid`, who may connect to a `socket` by `peer_uids`"
    )]
    OtherPeers,
}

/// Where producers find their ring.
pub(super) enum Place<'a> {
    Socket(&'a Path),
    File(&'a Path),
}

impl SharedMemoryConfig {
    /// The defaults for a socket.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: Some(socket.into()),
            file: None,
            trusted: false,
            capacity_bytes: default_capacity_bytes(),
            max_block_bits: default_max_block_bits(),
            peer_uids: Vec::new(),
            peer_gid: None,
            heartbeat_timeout_ms: default_heartbeat_timeout_ms(),
            device_id: 0,
            module: None,
            matching_module: None,
            limits: Limits::default(),
        }
    }

    /// The defaults for a file, whose producer is trusted with it.
    pub fn in_file(file: impl Into<PathBuf>) -> Self {
        Self {
            socket: None,
            file: Some(file.into()),
            trusted: true,
            ..Self::new("")
        }
    }

    pub(super) fn place(&self) -> Result<Place<'_>, PlaceError> {
        let place = match (&self.socket, &self.file) {
            (Some(socket), None) => Place::Socket(socket),
            (None, Some(file)) => Place::File(file),
            _ => return Err(PlaceError::NotOne),
        };
        match place {
            Place::File(_) if !self.trusted => Err(PlaceError::NotTrusted),
            Place::Socket(_) if self.trusted => Err(PlaceError::NeedNotTrust),
            Place::File(_) if !self.peer_uids.is_empty() => Err(PlaceError::OtherPeers),
            Place::Socket(_) if self.peer_gid.is_some() => Err(PlaceError::OtherPeers),
            place => Ok(place),
        }
    }

    /// The socket or file, for whoever resolves or shows it.
    pub(crate) fn path_mut(&mut self) -> Option<&mut PathBuf> {
        self.socket.as_mut().or(self.file.as_mut())
    }
}

/// A driver's entry as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    socket: Option<PathBuf>,
    file: Option<PathBuf>,
    #[serde(default)]
    trusted: bool,
    #[serde(default = "default_capacity_bytes")]
    capacity_bytes: usize,
    #[serde(default = "default_max_block_bits")]
    max_block_bits: u32,
    #[serde(default)]
    peer_uids: Vec<u32>,
    peer_gid: Option<u32>,
    #[serde(default = "default_heartbeat_timeout_ms")]
    heartbeat_timeout_ms: u64,
    #[serde(default)]
    device_id: u64,
    module: Option<ModuleId>,
    matching_module: Option<ModuleId>,
    #[serde(default)]
    limits: Limits,
}

impl TryFrom<Settings> for SharedMemoryConfig {
    type Error = PlaceError;

    fn try_from(settings: Settings) -> Result<Self, PlaceError> {
        let config = Self {
            socket: settings.socket,
            file: settings.file,
            trusted: settings.trusted,
            capacity_bytes: settings.capacity_bytes,
            max_block_bits: settings.max_block_bits,
            peer_uids: settings.peer_uids,
            peer_gid: settings.peer_gid,
            heartbeat_timeout_ms: settings.heartbeat_timeout_ms,
            device_id: settings.device_id,
            module: settings.module,
            matching_module: settings.matching_module,
            limits: settings.limits,
        };
        config.place()?;
        Ok(config)
    }
}

const fn default_capacity_bytes() -> usize {
    4 << 20
}

/// 64 KiB of key.
const fn default_max_block_bits() -> u32 {
    1 << 19
}

const fn default_heartbeat_timeout_ms() -> u64 {
    10_000
}
