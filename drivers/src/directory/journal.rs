//! Which files are settled and may still be there.
//!
//! Between a settlement and the moment when the file is gone for good the machine may stop. So the file
//! is noted first, durably, and a file that is noted is never delivered again: it is disposed of. A note
//! names a file by more than its name, because names repeat.
//!
//! One line for each, appended: device, inode, time of modification, size, name. No key, and no digest of
//! one. Lines are taken out together, once the folder without their files is durable.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
};

use super::folder::{Folder, Identity};

/// Settled files.
#[derive(Debug, Default)]
pub(super) struct Journal {
    settled: HashMap<OsString, Identity>,
    lines: usize,
    /// The last line was cut off.
    torn: bool,
}

impl Journal {
    /// Reads what an earlier run noted. A line that is cut off was not durable: its file is there still,
    /// and was not deleted.
    pub(super) fn load(folder: &Folder) -> Self {
        let text = folder.read_note(NOTE, MAX_BYTES).ok().flatten();
        let text = text.unwrap_or_default();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let settled = whole.lines().filter_map(|line| {
            let at = line.match_indices(' ').nth(3)?.0;
            let name = OsString::from(&line[at + 1..]);
            Some((name, Identity::from_text(&line[..at])?))
        });
        Self {
            lines: text.lines().count(),
            torn: !text.is_empty() && !text.ends_with('\n'),
            settled: settled.collect(),
        }
    }

    /// Whether this very file was settled.
    pub(super) fn holds(&self, name: &OsStr, identity: Identity) -> bool {
        self.settled.get(name) == Some(&identity)
    }

    /// Notes that a file is settled; durable when it returns.
    pub(super) fn add(
        &mut self,
        name: &OsStr,
        identity: Identity,
        folder: &Folder,
    ) -> nix::Result<()> {
        if self.lines >= MAX_LINES {
            self.shorten(folder)?;
        }
        let end_of_torn = if self.torn { "\n" } else { "" };
        // Names of hand-over files are text without line breaks.
        let name_text = name.to_string_lossy();
        let line = format!("{end_of_torn}{} {name_text}\n", identity.to_text());
        self.torn = true;
        folder.append_note(NOTE, &line)?;
        self.torn = false;
        self.lines += 1;
        self.settled.insert(name.to_owned(), identity);
        Ok(())
    }

    /// Forgets files that are gone, once that is durable.
    fn shorten(&mut self, folder: &Folder) -> nix::Result<()> {
        folder.sync()?;
        self.settled.retain(|name, identity| {
            let now = folder.look_at(name);
            !matches!(now, Ok(None)) && !matches!(now, Ok(Some((now, _))) if now != *identity)
        });
        let lines = self
            .settled
            .iter()
            .map(|(name, identity)| format!("{} {}\n", identity.to_text(), name.to_string_lossy()));
        folder.write_note(NOTE, &lines.collect::<String>())?;
        self.lines = self.settled.len();
        self.torn = false;
        Ok(())
    }
}

/// Hidden, so that no scan takes it for a hand-over file.
pub(super) const NOTE: &str = ".ingested";

const MAX_LINES: usize = 1024;

/// More than so many lines of the longest names that a file system has.
const MAX_BYTES: usize = 1 << 20;
