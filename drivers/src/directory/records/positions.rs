//! Up to where files are settled, in a note beside them.
//!
//! One line for each file: device, inode, where everything is settled up to, where the last settled
//! record begins, lines before it, and that record's ID (`-` where records have none). An ID tells
//! nothing of its key: neither key nor digest of key is here.

use std::collections::BTreeMap;

use crate::directory::folder::{Folder, Inode};

/// A place in a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Place {
    /// Everything before is done with.
    pub(super) offset_bytes: u64,
    /// Where the record before begins.
    pub(super) last_bytes: u64,
    /// Lines before.
    pub(super) line: u32,
    /// ID of the record before, where it has one of its own.
    pub(super) last_id: Option<String>,
}

/// Places by file.
#[derive(Debug, Default)]
pub(super) struct Positions(BTreeMap<Inode, Place>);

impl Positions {
    /// Reads what an earlier run noted. A note that cannot be read counts as none: records come again
    /// then, and the layer above knows their IDs.
    pub(super) fn load(folder: &Folder) -> Self {
        let text = folder.read_note(NOTE, MAX_BYTES).ok().flatten();
        Self(
            text.iter()
                .flat_map(|text| text.lines())
                .filter_map(parse)
                .collect(),
        )
    }

    pub(super) fn get(&self, inode: Inode) -> Place {
        self.0.get(&inode).cloned().unwrap_or_default()
    }

    pub(super) fn set(&mut self, inode: Inode, place: Place) {
        self.0.insert(inode, place);
    }

    /// Forgets files; returns whether any was forgotten.
    pub(super) fn retain(&mut self, mut is_there: impl FnMut(&Inode) -> bool) -> bool {
        let before = self.0.len();
        self.0.retain(|inode, _| is_there(inode));
        self.0.len() < before
    }

    /// Durable when it returns.
    pub(super) fn write(&self, folder: &Folder) -> nix::Result<()> {
        let lines = self.0.iter().map(|(Inode { device, inode }, place)| {
            let Place {
                offset_bytes,
                last_bytes,
                line,
                last_id,
            } = place;
            let id = last_id.as_deref().unwrap_or("-");
            format!("{device} {inode} {offset_bytes} {last_bytes} {line} {id}\n")
        });
        folder.write_note(NOTE, &lines.collect::<String>())
    }
}

fn parse(line: &str) -> Option<(Inode, Place)> {
    let mut fields = line.split(' ');
    let mut number = || fields.next()?.parse::<u64>().ok();
    let inode = Inode {
        device: number()?,
        inode: number()?,
    };
    let place = Place {
        offset_bytes: number()?,
        last_bytes: number()?,
        line: number()?.try_into().ok()?,
        last_id: fields.next().filter(|&id| id != "-").map(str::to_owned),
    };
    Some((inode, place))
}

/// Hidden, so that no scan takes it for a hand-over file.
const NOTE: &str = ".positions";

const MAX_BYTES: usize = 1 << 20;
