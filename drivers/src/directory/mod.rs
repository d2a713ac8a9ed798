//! Hand-over files in a directory: qcrypto's final-key files (type 7).
//!
//! The files are written in place, so a file shorter than its header says is left alone until it is
//! whole, or has not grown for [`partial_timeout_ms`](DirectoryConfig::partial_timeout_ms). Files
//! that fail a check go to `quarantine/` beside them. A key's file stays until the key is settled;
//! files that were not settled come again after a restart, and the layer above knows the IDs that it
//! has had.
//!
//! Notifications are hints and may be lost; a slow scan is the truth. Files are delivered in the
//! order of their epochs, not in the order of the directory.
//!
//! File operations are done in `poll` itself: the folder is to be on a local file system, best on a
//! `tmpfs`, where a deleted key leaves nothing behind.

mod folder;
mod intake;
mod names;
mod numbering;
mod reading;
mod watch;

use std::{
    collections::VecDeque,
    path::PathBuf,
    task::{Context, Poll},
    time::Duration,
};

use qkd_handover::type7::{MAX_KEY_BITS, words_bytes};
use qkd_keyfile::{ModuleId, QkdKeyId, units::bytes_for_bits};
use serde::Deserialize;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use self::{
    folder::Folder,
    intake::Intake,
    watch::{Hint, Watch},
};
use crate::{
    config::OpenError,
    event::{DetachReason, Event},
    scratch::Scratch,
    source::{KeySource, ReadError, Settlement},
    waiting::Waiting,
};

/// Where hand-over files lie, and how they are read.
///
/// ```toml
/// kind = "directory"
/// path = "/run/qkd/keys"       # the only setting without a default
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
            epochs: Epochs::default(),
            delete: yes(),
            max_block_bits: default_max_block_bits(),
            rescan_interval_ms: default_rescan_interval_ms(),
            partial_timeout_ms: default_partial_timeout_ms(),
            numbering_tolerance_s: default_numbering_tolerance_s(),
            owner_uids: Vec::new(),
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
    open: Option<(Intake, Watch)>,
    tick: Interval,
    /// Key words on their way; wiped after every block.
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
            scratch: Scratch::new(words_bytes(config.max_block_bits)),
            credit_blocks: 0,
            waiting: Waiting::default(),
            config: config.clone(),
        })
    }

    fn take_hints(&mut self, cx: &mut Context<'_>) {
        let mut gone = false;
        while let Some((intake, watch)) = &mut self.open {
            let more = watch.poll(cx, |hint| match hint {
                Hint::Name(name) => intake.hint(name),
                Hint::Lost => intake.scan_soon(),
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
                Some((intake, _)) if intake.folder().is_at(&self.config.path) => {
                    intake.scan_soon();
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

    fn detach(&mut self) {
        self.open = None;
        self.events.push_back(Event::Detached {
            reason: DetachReason::FolderGone,
        });
    }
}

impl KeySource for DirectorySource {
    fn max_block_bytes(&self) -> usize {
        bytes_for_bits(self.config.max_block_bits)
    }

    fn poll(&mut self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<Result<Event, ReadError>> {
        ReadError::check_buffer(out, self.max_block_bytes())?;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Poll::Ready(Ok(event));
            }
            self.take_hints(cx);
            self.take_tick(cx);
            if !self.events.is_empty() {
                continue;
            }
            self.waiting.register(cx);
            let Some((intake, _)) = &mut self.open else {
                return Poll::Pending;
            };
            if self.credit_blocks == 0 {
                return Poll::Pending;
            }
            match intake.next(&self.config, &mut self.scratch, out, &mut self.events) {
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
        if let Some((intake, _)) = &mut self.open {
            intake.settle(id, outcome, &self.config, &mut self.events);
            self.waiting.wake();
        }
    }
}

fn open_folder(config: &DirectoryConfig) -> Result<(Intake, Watch), OpenError> {
    let folder = Folder::open(&config.path, &config.owner_uids)?;
    let watch = Watch::new(&config.path).map_err(|source| OpenError::Watch {
        path: config.path.clone(),
        source,
    })?;
    // The first scan comes after this: what is put there in between is seen by one of the two.
    Ok((Intake::new(folder, config), watch))
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
