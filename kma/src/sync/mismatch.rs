//! What happens where the two ends differ: the segment is divided until the QKD-key is found.

use std::collections::BTreeSet;

use qkd_keyfile::{Composition, ModulePairId, Piece, QkdKeyId, SegmentNumber};

use super::{
    LinkSync,
    compose::{divide, names_of as ids_of},
    names_of,
};
use crate::{
    io::{Alarm, Cx},
    record::StopReason,
    wire::DropReason,
};

/// So many QKD-keys that agree make up for one that differed.
const MADE_UP_BY: u32 = 64;

/// Proposer: a segment that differed, and what is not known about it yet.
#[derive(Debug)]
pub(super) struct Division {
    module_pair: ModulePairId,
    /// Parts under comparison.
    open: usize,
    /// A QKD-key that differs was found.
    found: bool,
    /// QKD-keys that lent masks to a comparison that failed: where all parts agree, it was one of
    /// them.
    unproven: BTreeSet<QkdKeyId>,
}

impl LinkSync {
    /// The bits of a segment differ. Its masks are burned; the parts to be compared next are free
    /// again. Where there is none, its QKD-keys go whole, with an alarm.
    pub(super) fn differs(
        &mut self,
        cx: &mut Cx<'_>,
        composition: &Composition,
    ) -> (Vec<Piece>, Vec<Vec<Piece>>) {
        let divided = divide(&composition.pieces);
        if divided.parts.is_empty() {
            self.differ_whole(cx, composition);
            return (divided.burned, divided.parts);
        }
        let now = cx.now.mono;
        cx.store.use_qkd_keys(names_of(composition));
        self.with_pair(&composition.module_pair, |pair| {
            pair.release(now, &composition.pieces);
            pair.burn(now, &divided.burned);
        });
        self.settle_finished(cx, composition);
        (divided.burned, divided.parts)
    }

    /// The QKD-keys of a composition go whole: one of them differs.
    pub(super) fn differ_whole(&mut self, cx: &mut Cx<'_>, composition: &Composition) {
        self.give_up(cx, composition);
        let ids = ids_of(&composition.pieces).into_iter().collect();
        self.count_mismatch(cx, &composition.module_pair, ids);
    }

    /// Raises the alarm, and stops a module pair that differs too often.
    pub(super) fn count_mismatch(
        &mut self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        qkd_keys: Vec<QkdKeyId>,
    ) {
        cx.alarm(Alarm::Mismatch {
            peer: self.peer.clone(),
            module_pair: module_pair.clone(),
            qkd_keys,
        });
        let limit = self.config.mismatch_limit;
        let mismatches = self.with_pair(module_pair, |pair| {
            pair.standing.mismatches += 1;
            pair.standing.mismatches
        });
        if limit > 0 && mismatches.is_some_and(|count| count >= limit) {
            self.stop(cx, module_pair, StopReason::Mismatches);
        }
    }

    /// QKD-keys agreed.
    pub(super) fn count_agreed(&mut self, composition: &Composition) {
        let keys = ids_of(&composition.pieces).len();
        self.with_pair(&composition.module_pair, |pair| {
            let standing = &mut pair.standing;
            standing.agreed += u32::try_from(keys).unwrap_or(u32::MAX);
            let made_up = standing.agreed / MADE_UP_BY;
            standing.agreed %= MADE_UP_BY;
            standing.mismatches = standing.mismatches.saturating_sub(made_up);
        });
    }

    /// Proposer: a segment differs, a part of `division` if it has one.
    pub(super) fn divide(
        &mut self,
        cx: &mut Cx<'_>,
        number: SegmentNumber,
        composition: &Composition,
        division: Option<SegmentNumber>,
    ) -> bool {
        let (burned, parts) = self.differs(cx, composition);
        let divided = !parts.is_empty();
        let root = division.unwrap_or(number);
        if divided {
            let module_pair = composition.module_pair.clone();
            let entry = self.divisions.entry(root).or_insert_with(|| Division {
                module_pair,
                open: 0,
                found: false,
                unproven: BTreeSet::new(),
            });
            entry.open += parts.len();
            entry.unproven.extend(ids_of(&burned));
        }
        for part in parts {
            self.propose_pieces(cx, &composition.module_pair, part, Some(root));
        }
        self.part_done(cx, division, !divided);
        divided
    }

    /// Proposer: a part is compared, and more parts of it are counted already.
    pub(super) fn part_done(
        &mut self,
        cx: &mut Cx<'_>,
        division: Option<SegmentNumber>,
        found: bool,
    ) {
        let Some(root) = division else { return };
        let Some(entry) = self.divisions.get_mut(&root) else {
            return;
        };
        entry.open = entry.open.saturating_sub(1);
        entry.found |= found;
        if entry.open > 0 {
            return;
        }
        let Some(done) = self.divisions.remove(&root) else {
            return;
        };
        if !done.found {
            self.differ_unproven(cx, &done.module_pair, done.unproven.into_iter().collect());
        }
    }

    /// QKD-keys of which some bits differ that cannot be compared any more, at both ends.
    pub(super) fn differ_unproven(
        &mut self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        qkd_keys: Vec<QkdKeyId>,
    ) {
        for id in &qkd_keys {
            self.drop_free(cx, module_pair, id, DropReason::Differs);
            self.with_pair(module_pair, |pair| {
                pair.tell_dropped(id.clone(), DropReason::Differs);
            });
        }
        self.has_news = true;
        self.count_mismatch(cx, module_pair, qkd_keys);
    }

    /// Forgets the divisions of a module pair.
    pub(super) fn forget_divisions(&mut self, module_pair: &ModulePairId) {
        self.divisions
            .retain(|_, division| division.module_pair != *module_pair);
    }
}
