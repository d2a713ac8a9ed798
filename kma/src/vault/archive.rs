//! Journals that a compaction replaced: history, for checkers and for tracing. They hold no key.
//!
//! A compaction links the journal under a name of its own before the short one takes its place, so
//! the history is whole at any time and after any crash. Dropping the oldest is policy.

use std::time::Duration;

use super::VaultError;
use super::disk::Disk;

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Archive {
    pub(super) name: String,
    pub(super) len_bytes: u64,
    /// Since it was replaced, by the wall clock.
    pub(super) age: Duration,
}

/// How much history is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistoryLimit {
    /// Bytes of all archives.
    pub bytes: u64,
    /// Age of one, since its last record.
    pub age: Duration,
}

impl Default for HistoryLimit {
    /// 1 GiB and 400 days.
    fn default() -> Self {
        Self {
            bytes: 1 << 30,
            age: Duration::from_secs(400 * 24 * 3600),
        }
    }
}

/// Archives are named by the number of their first frame, so that their names sort as they follow.
pub(super) fn name_of(first_number: u64) -> String {
    format!("{PREFIX}{first_number:016x}")
}

const PREFIX: &str = "archive-";

/// All of them, oldest first.
pub(super) fn list(disk: &dyn Disk) -> Result<Vec<Archive>, VaultError> {
    let names = disk.list().map_err(io)?;
    let archives = names
        .into_iter()
        .filter(|(name, ..)| name.starts_with(PREFIX));
    let mut archives: Vec<_> = archives
        .map(|(name, len_bytes, age)| Archive {
            name,
            len_bytes,
            age,
        })
        .collect();
    archives.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(archives)
}

/// Drops the oldest beyond the limit.
pub(super) fn prune(disk: &dyn Disk, limit: HistoryLimit) -> Result<(), VaultError> {
    let archives = list(disk)?;
    let mut bytes: u64 = archives.iter().map(|archive| archive.len_bytes).sum();
    for archive in archives {
        if bytes <= limit.bytes && archive.age <= limit.age {
            break;
        }
        bytes -= archive.len_bytes;
        disk.remove(&archive.name).map_err(io)?;
    }
    disk.sync_dir().map_err(io)
}

pub(super) fn io(source: std::io::Error) -> VaultError {
    VaultError::Io {
        file: "archives",
        source,
    }
}
