//! Tells when local epochs begin anew.
//!
//! A local epoch counts from the start of the device and has 17 significant bits, so names repeat
//! after 2^17 epochs (19 h 33 min), and at once when the device starts again. The file's time of
//! modification less its epoch is when that count was zero. It is the same, up to the time the
//! device takes for a block, for all files of one numbering, and another for the next. The driver
//! keeps it beside the files, so that a restart of the bridge is not taken for one of the device.

use qkd_handover::type7::EPOCH_NS;

use super::folder::Folder;

/// Where the present numbering began.
#[derive(Debug)]
pub(super) struct Numbering {
    began_s: Option<i64>,
    tolerance_s: i64,
}

/// How a file's numbering relates to the present one. In the order of delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Relation {
    Ended,
    Present,
    Next,
}

impl Numbering {
    /// Reads what an earlier run kept. A note that cannot be read counts as none: the next file
    /// then begins a numbering, which at worst drops keys that were not confirmed.
    pub(super) fn load(folder: &Folder, tolerance_s: u32) -> Self {
        let note = folder.read_note(NOTE, 256).ok().flatten();
        Self {
            began_s: note.and_then(|text| text.trim().parse().ok()),
            tolerance_s: i64::from(tolerance_s),
        }
    }

    /// The numbering of a file, as the time in seconds since 1970 when it began.
    pub(super) fn beginning_s(modified_s: i64, epoch: u32) -> i64 {
        let since_ns = i128::from(epoch) * i128::from(EPOCH_NS);
        modified_s.saturating_sub(i64::try_from(since_ns / 1_000_000_000).unwrap_or(i64::MAX))
    }

    pub(super) fn relation(&self, began_s: i64) -> Relation {
        match self
            .began_s
            .map(|present_s| began_s.saturating_sub(present_s))
        {
            None => Relation::Next,
            Some(later_s) if later_s > self.tolerance_s => Relation::Next,
            Some(later_s) if later_s < -self.tolerance_s => Relation::Ended,
            Some(_) => Relation::Present,
        }
    }

    /// Goes over to the numbering that began at `began_s`.
    pub(super) fn begin(&mut self, began_s: i64, folder: &Folder) -> nix::Result<()> {
        self.began_s = Some(began_s);
        folder.write_note(NOTE, &format!("{began_s}\n"))
    }

    /// The session that [`Event::Attached`](crate::Event::Attached) speaks of.
    pub(super) fn session(&self) -> Option<u64> {
        self.began_s.map(i64::cast_unsigned)
    }
}

/// Hidden, so that no scan takes it for a hand-over file.
pub(super) const NOTE: &str = ".numbering-began";

#[cfg(test)]
mod tests {
    use super::*;

    fn numbering(began_s: Option<i64>) -> Numbering {
        Numbering {
            began_s,
            tolerance_s: 600,
        }
    }

    #[test]
    fn files_of_one_numbering_begin_together_up_to_the_devices_delay() {
        let start = 1_800_000_000;
        let early = Numbering::beginning_s(start + 3, 2);
        let late = Numbering::beginning_s(start + 70_000 + 400, 130_389);
        assert_eq!((early, late), (start + 2, start + 398));
        assert_eq!(numbering(Some(early)).relation(late), Relation::Present);
    }

    #[test]
    fn a_name_seen_again_after_the_wrap_is_of_the_next_numbering() {
        let wrap_s = (EPOCH_NS << 17) / 1_000_000_000;
        assert_eq!(wrap_s, 19 * 3600 + 32 * 60 + 48);
        let present = numbering(Some(1_800_000_000));
        let again = 1_800_000_000 + wrap_s.cast_signed();
        assert_eq!(present.relation(again), Relation::Next);
        assert_eq!(
            numbering(Some(again)).relation(1_800_000_000),
            Relation::Ended
        );
    }

    #[test]
    fn the_first_file_ever_begins_a_numbering() {
        assert_eq!(numbering(None).relation(5), Relation::Next);
        assert_eq!(numbering(None).session(), None);
    }
}
