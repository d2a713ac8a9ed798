//! Hand-over files in a directory.
//!
//! Files of one block each (qcrypto's final keys, raw `.cor` files, our own key files) may be written in
//! place, so a file shorter than it should be is left alone until it is whole, or has not grown for
//! [`partial_timeout_ms`](DirectoryConfig::partial_timeout_ms). Files that fail a check go to
//! `quarantine/` beside them. A key's file stays until the key is settled; that it is settled is noted
//! durably before it goes. Files that were not settled come again after a restart, and the layer above
//! knows the IDs that it has had.
//!
//! Files of many keys (48-byte records, hexadecimal lines, AIT R10 records) grow; they are read from where
//! they were read to, and up to where all is settled is noted durably.
//!
//! Notifications are hints and may be lost; a slow scan is the truth. Files are delivered in the
//! order of their epochs, not in the order of the directory.
//!
//! File operations are done in `poll` itself: the folder is to be on a local file system, best on a
//! `tmpfs`, where a deleted key leaves nothing behind.

mod folder;
mod format;
mod intake;
mod journal;
mod names;
mod numbering;
mod reading;
mod records;
mod watch;

use std::{
    collections::VecDeque,
    ffi::OsString,
    path::PathBuf,
    task::{Context, Poll},
    time::Duration,
};

use qkd_handover::{hex_lines, type7::MAX_KEY_BITS};
use qkd_keyfile::{ModuleId, QkdKeyId, units::bytes_for_bits};
use serde::Deserialize;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use self::{
    folder::Folder,
    intake::Intake,
    records::Records,
    watch::{Hint, Watch},
};
use crate::{
    config::OpenError,
    event::{DetachReason, Event, KeyBlock},
    records::Limits,
    scratch::Scratch,
    source::{KeySource, ReadError, Settlement},
    waiting::Waiting,
};

pub use format::Format;

/// Where hand-over files lie, and how they are read.
///
/// ```toml
/// kind = "directory"
/// path = "/run/qkd/keys"       # the only setting without a default
/// format = "type7"             # or another of `Format`
/// file_bytes = 204800          # format "cor": length of every file
/// file = "keys.bin"            # "uuid-records", "r10": the file; "hex-lines": the peer in its name
/// block_keys = 4096            # "hex-lines": lines of a file
/// epochs = "extended"          # or "local": 17 bits, repeating every 19.5 h
/// delete = true                # false: settled files are moved to `done/`
/// max_block_bits = 524288      # a longer key goes to quarantine
/// rescan_interval_ms = 5000
/// partial_timeout_ms = 30000
/// numbering_tolerance_s = 600  # local epochs: delay of the device that is no new numbering
/// owner_uids = []              # trusted with keys besides root and this user
/// module = "tx-1"              # for the metadata; may be left out, as may `matching_module`
/// matching_module = "rx-1"
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DirectoryConfig {
    /// The folder that the module writes to.
    pub path: PathBuf,
    /// What the files are.
    #[serde(default)]
    pub format: Format,
    /// With [`Format::Cor`]: length of every file, in bytes.
    #[serde(default = "default_file_bytes")]
    pub file_bytes: u32,
    /// With files of many keys: the name of the file that is written to; what rotation makes of it
    /// begins so. With [`Format::HexLines`]: what stands before the `_` and the number.
    #[serde(default)]
    pub file: Option<String>,
    /// With [`Format::HexLines`]: lines of a file; equal at both ends.
    #[serde(default = "default_block_keys")]
    pub block_keys: u32,
    /// What the epochs in the files count from.
    #[serde(default)]
    pub epochs: Epochs,
    /// Whether settled files are deleted, or moved to `done/`.
    #[serde(default = "yes")]
    pub delete: bool,
    /// Longest key that is read, in bits.
    #[serde(default = "default_max_block_bits")]
    pub max_block_bits: u32,
    /// Time between two scans of the folder, in milliseconds.
    #[serde(default = "default_rescan_interval_ms")]
    pub rescan_interval_ms: u64,
    /// Time after which a file that has stopped growing is not expected to be finished, in
    /// milliseconds. It is noticed at the next scan.
    #[serde(default = "default_partial_timeout_ms")]
    pub partial_timeout_ms: u64,
    /// With local epochs: how much longer the device may take for one block than for another, in
    /// seconds, before the files count as those of another numbering.
    #[serde(default = "default_numbering_tolerance_s")]
    pub numbering_tolerance_s: u32,
    /// Users who may own the folder and its files, besides root and the user of this process.
    #[serde(default)]
    pub owner_uids: Vec<u32>,
    /// When an error rate counts as out of range; only R10 records tell one.
    #[serde(default)]
    pub limits: Limits,
    /// QKD module ID for the metadata; the files do not tell it.
    #[serde(default)]
    pub module: Option<ModuleId>,
    /// Matching QKD module ID for the metadata.
    #[serde(default)]
    pub matching_module: Option<ModuleId>,
}

/// What epochs count from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Epochs {
    /// From 1970, in 32 bits: names do not repeat before 2043.
    #[default]
    Extended,
    /// From the start of the device, in 17 bits: names repeat.
    Local,
}

impl DirectoryConfig {
    /// The defaults for a folder.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: Format::default(),
            file_bytes: default_file_bytes(),
            file: None,
            block_keys: default_block_keys(),
            epochs: Epochs::default(),
            delete: yes(),
            max_block_bits: default_max_block_bits(),
            rescan_interval_ms: default_rescan_interval_ms(),
            partial_timeout_ms: default_partial_timeout_ms(),
            numbering_tolerance_s: default_numbering_tolerance_s(),
            owner_uids: Vec::new(),
            limits: Limits::default(),
            module: None,
            matching_module: None,
        }
    }

    fn check(&self) -> Result<(), OpenError> {
        let refuse = |setting, value, expected| {
            Err(OpenError::Setting {
                setting,
                value,
                expected,
            })
        };
        if !(1..=MAX_KEY_BITS).contains(&self.max_block_bits) {
            let bits = u64::from(self.max_block_bits);
            return refuse("max_block_bits", bits, "1 to 2097152");
        }
        if !(1..=MAX_KEY_BITS / 8).contains(&self.file_bytes) {
            let bytes = u64::from(self.file_bytes);
            return refuse("file_bytes", bytes, "1 to 262144");
        }
        if self.block_keys == 0 {
            return refuse("block_keys", 0, "at least 1");
        }
        let is_named = self.file.as_deref().is_some_and(|name| {
            !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0'])
        });
        if self.format.has_records() && !is_named {
            return Err(OpenError::NoFileName {
                path: self.path.clone(),
            });
        }
        if !(10..=3_600_000).contains(&self.rescan_interval_ms) {
            let ms = self.rescan_interval_ms;
            return refuse("rescan_interval_ms", ms, "10 to 3600000");
        }
        Ok(())
    }
}

/// The module whose hand-over files are read.
#[derive(Debug)]
pub struct DirectorySource {
    config: DirectoryConfig,
    open: Option<(Reader, Watch)>,
    tick: Interval,
    /// Key on its way; wiped after every block.
    scratch: Scratch,
    events: VecDeque<Event>,
    credit_blocks: u32,
    waiting: Waiting,
}

impl DirectorySource {
    /// Opens the folder.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: the folder is not there, not fit for keys, or cannot be watched, or a setting
    /// is out of range. Nothing was changed.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn open(config: &DirectoryConfig) -> Result<Self, OpenError> {
        config.check()?;
        let open = open_folder(config)?;
        let pause = Duration::from_millis(config.rescan_interval_ms);
        let mut tick = interval_at(Instant::now() + pause, pause);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            events: VecDeque::from([open.0.attached(config)]),
            open: Some(open),
            tick,
            scratch: Scratch::new(config.scratch_bytes()),
            credit_blocks: 0,
            waiting: Waiting::default(),
            config: config.clone(),
        })
    }

    fn take_hints(&mut self, cx: &mut Context<'_>) {
        let mut gone = false;
        while let Some((reader, watch)) = &mut self.open {
            let more = watch.poll(cx, |hint| match hint {
                Hint::Name(name) => reader.hint(name),
                Hint::Lost => reader.scan_soon(),
                Hint::FolderGone => gone = true,
            });
            if gone {
                self.detach();
            } else if more.is_pending() {
                return;
            }
        }
    }

    /// Once per tick: checks that the path still means this folder, or tries to open it again.
    fn take_tick(&mut self, cx: &mut Context<'_>) {
        while self.tick.poll_tick(cx).is_ready() {
            match &mut self.open {
                Some((reader, _)) if reader.folder().is_at(&self.config.path) => {
                    reader.scan_soon();
                }
                Some(_) => self.detach(),
                None => {
                    if let Ok(open) = open_folder(&self.config) {
                        self.events.push_back(open.0.attached(&self.config));
                        self.open = Some(open);
                    }
                }
            }
        }
    }

    fn flush(&mut self) {
        if let Some((Reader::Records(records), _)) = &mut self.open {
            records.flush(&self.config, &mut self.events);
        }
    }

    fn detach(&mut self) {
        self.open = None;
        self.events.push_back(Event::Detached {
            reason: DetachReason::FolderGone,
        });
    }
}

impl KeySource for DirectorySource {
    fn max_block_bytes(&self) -> usize {
        bytes_for_bits(self.config.longest_key_bits())
    }

    fn poll(&mut self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<Result<Event, ReadError>> {
        ReadError::check_buffer(out, self.max_block_bytes())?;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Poll::Ready(Ok(event));
            }
            self.take_hints(cx);
            self.take_tick(cx);
            self.flush();
            if !self.events.is_empty() {
                continue;
            }
            self.waiting.register(cx);
            let Some((reader, _)) = &mut self.open else {
                return Poll::Pending;
            };
            if self.credit_blocks == 0 {
                return Poll::Pending;
            }
            let next = reader.next(&self.config, &mut self.scratch, out, &mut self.events);
            self.flush();
            match next {
                Ok(Some(block)) => {
                    self.credit_blocks -= 1;
                    return Poll::Ready(Ok(Event::Key(block)));
                }
                Ok(None) if self.events.is_empty() => return Poll::Pending,
                Ok(None) => {}
                Err(_) => self.detach(),
            }
        }
    }

    fn grant(&mut self, blocks: u32) {
        self.credit_blocks = self.credit_blocks.saturating_add(blocks);
        self.waiting.wake();
    }

    fn settle(&mut self, id: &QkdKeyId, outcome: Settlement) {
        if let Some((reader, _)) = &mut self.open {
            reader.settle(id, outcome, &self.config, &mut self.events);
            self.waiting.wake();
        }
    }
}

/// What was settled last is noted, so that it does not come again.
impl Drop for DirectorySource {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Files of one block each, or of many.
#[derive(Debug)]
enum Reader {
    Blocks(Intake),
    Records(Records),
}

impl Reader {
    const fn folder(&self) -> &Folder {
        match self {
            Self::Blocks(intake) => intake.folder(),
            Self::Records(records) => records.folder(),
        }
    }

    fn attached(&self, config: &DirectoryConfig) -> Event {
        match self {
            Self::Blocks(intake) => intake.attached(config),
            Self::Records(_) => Records::attached(config),
        }
    }

    const fn scan_soon(&mut self) {
        match self {
            Self::Blocks(intake) => intake.scan_soon(),
            Self::Records(records) => records.scan_soon(),
        }
    }

    fn hint(&mut self, name: OsString) {
        match self {
            Self::Blocks(intake) => intake.hint(name),
            Self::Records(records) => records.hint(&name),
        }
    }

    fn next(
        &mut self,
        config: &DirectoryConfig,
        scratch: &mut [u8],
        out: &mut [u8],
        events: &mut VecDeque<Event>,
    ) -> nix::Result<Option<KeyBlock>> {
        match self {
            Self::Blocks(intake) => intake.next(config, scratch, out, events),
            Self::Records(records) => records.next(config, scratch, out, events),
        }
    }

    fn settle(
        &mut self,
        id: &QkdKeyId,
        outcome: Settlement,
        config: &DirectoryConfig,
        events: &mut VecDeque<Event>,
    ) {
        match self {
            Self::Blocks(intake) => intake.settle(id, outcome, config, events),
            // One record cannot be set aside: its file goes when all of it is settled.
            Self::Records(records) => records.settle(id),
        }
    }
}

fn open_folder(config: &DirectoryConfig) -> Result<(Reader, Watch), OpenError> {
    let folder = Folder::open(&config.path, &config.owner_uids)?;
    let grow = config.format.has_records();
    let watch = Watch::new(&config.path, grow).map_err(|source| OpenError::Watch {
        path: config.path.clone(),
        source,
    })?;
    // The first scan comes after this: what is put there in between is seen by one of the two.
    let reader = if grow {
        Reader::Records(Records::new(folder))
    } else {
        Reader::Blocks(Intake::new(folder, config))
    };
    Ok((reader, watch))
}

/// [`qkd_handover::cor::USUAL_FILE_BYTES`].
const fn default_file_bytes() -> u32 {
    204_800
}

const fn default_block_keys() -> u32 {
    hex_lines::USUAL_BLOCK_KEYS
}

const fn yes() -> bool {
    true
}

/// 64 KiB of key.
const fn default_max_block_bits() -> u32 {
    1 << 19
}

const fn default_rescan_interval_ms() -> u64 {
    5000
}

const fn default_partial_timeout_ms() -> u64 {
    30_000
}

const fn default_numbering_tolerance_s() -> u32 {
    600
}
