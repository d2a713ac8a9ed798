//! The proposer's side: composes segments, concludes comparisons.

use bytes::Bytes;
use qkd_keyfile::{
    Composition, KmaKeyId, ModulePairId, Mono, Piece, QkdKeyId, SegmentNumber, metadata::KeyType,
};
use subtle::ConstantTimeEq;

use super::{Compared, LinkSync, compose, masks_of, names_of};
use crate::{
    RESEND_AFTER,
    digest::{Half, comparison_tag, link_key_id},
    io::{Cx, FormatTicket, FormattedSegment},
    record::{DiscardReason, Stage},
    wire::{DropReason, Message, Propose, Verdict},
};

/// Segments under comparison at a time. Parts of one that differs come on top of them.
const WINDOW: usize = 64;

/// A segment under comparison, at the proposer.
#[derive(Debug)]
pub(super) struct Proposal {
    pub(super) composition: Composition,
    key_type: KeyType,
    kma_key_id: KmaKeyId,
    /// The order to the pipeline.
    order: u64,
    /// The segment that differed and that this is a part of.
    division: Option<SegmentNumber>,
    made: Option<Made>,
}

#[derive(Debug)]
struct Made {
    segment: FormattedSegment,
    message: Bytes,
    sent: Mono,
}

impl LinkSync {
    /// Composes segments of QKD-keys that both ends hold, of every module pair in turn.
    pub(super) fn propose(&mut self, cx: &mut Cx<'_>) {
        let names: Vec<ModulePairId> = self.pairs.keys().cloned().collect();
        for name in &names {
            self.drop_unequal(cx, name);
        }
        let mut turn = names.iter().cycle().skip(self.turn);
        let mut idle = 0;
        while idle < names.len() {
            let Some(name) = turn.next() else {
                return;
            };
            self.turn = (self.turn + 1) % names.len();
            idle = if self.propose_one(cx, name) {
                0
            } else {
                idle + 1
            };
        }
    }

    /// Not the same QKD-key, whatever its name says, where it has two lengths: both ends drop it.
    fn drop_unequal(&mut self, cx: &mut Cx<'_>, module_pair: &ModulePairId) {
        let next = |pair: &mut super::Pair| pair.unequal.pop_first();
        while let Some(id) = self.with_pair(module_pair, next).flatten() {
            self.differ_unproven(cx, module_pair, vec![id]);
        }
    }

    fn propose_one(&mut self, cx: &mut Cx<'_>, module_pair: &ModulePairId) -> bool {
        let full = cx.store.is_full(&self.stream, self.config.capacity_bytes);
        // They stay in key memory until they are answered: a part of it, for others need some too.
        let open = self.proposals.values();
        let open_bytes: usize = open
            .map(|p| p.composition.len_bits().unwrap_or(0) as usize / 8)
            .sum();
        let no_room = open_bytes >= cx.store.memory_bytes() / 4;
        if self.proposals.len() >= WINDOW
            || no_room
            || full
            || self.is_out_of_names(cx, module_pair)
        {
            return false;
        }
        let Some(pair) = self.pairs.get(module_pair) else {
            return false;
        };
        let target_bits = 8 * u64::from(self.config.segment_bytes);
        let Some(gathered) = pair.compose(cx.now.mono, target_bits, self.config.gather) else {
            return false;
        };
        self.propose_pieces(cx, module_pair, gathered.0, None);
        true
    }

    /// Puts free bits under comparison.
    pub(super) fn propose_pieces(
        &mut self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        pieces: Vec<Piece>,
        division: Option<SegmentNumber>,
    ) {
        let taken = self.with_pair(module_pair, |pair| pair.take(cx.now.mono, &pieces));
        if !matches!(taken, Some(Ok(()))) {
            tracing::error!(%module_pair, "a segment of bits that are not free was not proposed");
            return;
        }
        let composition = Composition {
            module_pair: module_pair.clone(),
            generation: cx.store.generation(module_pair),
            pieces,
        };
        cx.store.use_qkd_keys(names_of(&composition));
        let segment = cx.store.propose(&self.stream, Some(composition.clone()));
        let order = self.order(cx, segment, &composition, self.unit_bytes);
        let proposal = Proposal {
            kma_key_id: link_key_id(&self.link, segment, &composition),
            key_type: self.assign(cx),
            composition,
            order,
            division,
            made: None,
        };
        self.proposals.insert(segment, proposal);
    }

    /// Whose the next segment is: the end's that has less, with what is on its way to it. So each
    /// has half, and one that uses more is given more: a share that nobody uses cannot fill the
    /// link and starve the other.
    fn assign(&self, cx: &Cx<'_>) -> KeyType {
        let entry = cx.store.stream(&self.stream);
        let held_bytes = entry.map_or(0, |entry| entry.held_bytes);
        let mut mine = cx.store.available_bytes(&self.stream);
        let mut theirs = held_bytes - mine;
        for proposal in self.proposals.values() {
            let share = match proposal.key_type {
                KeyType::Encrypting => &mut mine,
                KeyType::Decrypting => &mut theirs,
            };
            *share += u64::from(proposal.composition.len_bits().unwrap_or(0) / 8);
        }
        if mine <= theirs {
            KeyType::Encrypting
        } else {
            KeyType::Decrypting
        }
    }

    pub(super) fn repeat_proposals(&mut self, cx: &mut Cx<'_>) {
        for proposal in self.proposals.values_mut() {
            if let Some(made) = &mut proposal.made
                && cx.now.mono.since(made.sent) >= RESEND_AFTER
            {
                made.sent = cx.now.mono;
                cx.send_bytes(&self.peer, made.message.clone());
            }
        }
    }

    pub(super) fn formatted_proposal(
        &mut self,
        cx: &mut Cx<'_>,
        ticket: &FormatTicket,
        segment: Option<FormattedSegment>,
    ) {
        let number = ticket.segment;
        let waiting = self.proposals.get_mut(&number);
        let waits = |p: &&mut Proposal| p.made.is_none() && p.order == ticket.order;
        let Some(proposal) = waiting.filter(waits) else {
            return;
        };
        let with_masks = segment.and_then(|segment| Some((masks_of(&segment)?, segment)));
        let Some((masks, segment)) = with_masks else {
            return self.abandon(cx, number, &[]);
        };
        let tag = comparison_tag(
            Half::Proposal,
            proposal.kma_key_id,
            &proposal.composition,
            &segment.digests,
            &masks,
        );
        let message = Bytes::from(
            Message::Propose(Propose {
                segment: number,
                composition: proposal.composition.clone(),
                proposer_key_type: proposal.key_type,
                kma_key_id: proposal.kma_key_id,
                unit_bytes: self.unit_bytes,
                tag,
            })
            .encode(),
        );
        if self.connected {
            cx.send_bytes(&self.peer, message.clone());
        }
        proposal.made = Some(Made {
            segment,
            message,
            sent: cx.now.mono,
        });
    }

    /// Gives up a proposal. The QKD-keys that are missing, all where none is named, go at both ends;
    /// of the others the mask bits are burned, and the rest is free again.
    pub(super) fn abandon(&mut self, cx: &mut Cx<'_>, number: SegmentNumber, missing: &[QkdKeyId]) {
        let Some(proposal) = self.proposals.remove(&number) else {
            return;
        };
        cx.store
            .discard(&self.stream, number, DiscardReason::Missing);
        let composition = &proposal.composition;
        let now = cx.now.mono;
        self.with_pair(&composition.module_pair, |pair| {
            pair.release(now, &composition.pieces);
            pair.burn(now, &compose::masks_of(&composition.pieces));
        });
        for id in compose::names_of(&composition.pieces) {
            if missing.is_empty() || missing.contains(&id) {
                self.drop_free(cx, &composition.module_pair, &id, DropReason::Gone);
            }
        }
        self.settle_finished(cx, composition);
        self.part_done(cx, proposal.division, false);
    }

    /// The answerer's half has come.
    pub(crate) fn answered(
        &mut self,
        cx: &mut Cx<'_>,
        number: SegmentNumber,
        verdict: Verdict,
        tag: &[u8; 16],
        missing: &[QkdKeyId],
    ) {
        if !self.proposer {
            return;
        }
        match (self.proposals.get(&number), verdict) {
            // Answered before: either it is stored, and the commit says so again, or it is void.
            (None, Verdict::Match) => self.conclude_again(cx, number),
            (None, _) | (Some(_), Verdict::Full) => {}
            (Some(proposal), _) if proposal.made.is_none() => {}
            (Some(_), Verdict::Missing) => self.abandon(cx, number, missing),
            (Some(_), Verdict::Match) => self.conclude(cx, number, Half::AnswerMatch, tag),
            (Some(_), Verdict::Differ) => self.conclude(cx, number, Half::AnswerDiffer, tag),
        }
    }

    fn conclude_again(&self, cx: &mut Cx<'_>, number: SegmentNumber) {
        let (stream, segment) = (self.stream.clone(), number);
        let message = if cx.store.segment(&self.stream, number).is_some() {
            Message::Commit {
                stream,
                segment,
                release: [0; 16],
            }
        } else {
            Message::Void { stream, segment }
        };
        cx.send(&self.peer, &message);
    }

    fn conclude(&mut self, cx: &mut Cx<'_>, number: SegmentNumber, half: Half, tag: &[u8; 16]) {
        let Some(mut proposal) = self.proposals.remove(&number) else {
            return;
        };
        let made = proposal.made.take().map(|made| made.segment);
        let Some((masks, segment)) = made.and_then(|made| Some((masks_of(&made)?, made))) else {
            return;
        };
        let composition = &proposal.composition;
        let expected = comparison_tag(
            half,
            proposal.kma_key_id,
            composition,
            &segment.digests,
            &masks,
        );
        let equal = half == Half::AnswerMatch && bool::from(expected.ct_eq(tag));
        let compared = Compared {
            number,
            stage: Stage::Confirmed,
            key_type: proposal.key_type,
            kma_key_id: proposal.kma_key_id,
            composition,
            bits: segment.bits,
        };
        let division = proposal.division;
        if equal && self.store(cx, compared) {
            self.count_agreed(composition);
            self.close(cx, composition, true);
            self.part_done(cx, division, false);
        } else if equal {
            let reason = DiscardReason::NotStored;
            cx.store.discard(&self.stream, number, reason);
            self.close(cx, composition, false);
            self.part_done(cx, division, false);
        } else {
            self.conclude_unequal(cx, number, &proposal, half);
        }
        self.conclude_again(cx, number);
    }

    /// The bits differ, or the answer is not the peer's.
    fn conclude_unequal(
        &mut self,
        cx: &mut Cx<'_>,
        number: SegmentNumber,
        proposal: &Proposal,
        half: Half,
    ) {
        let composition = &proposal.composition;
        let divided = if half == Half::AnswerDiffer {
            self.divide(cx, number, composition, proposal.division)
        } else {
            // The answerer has stored it, and will hear that it is void: nothing is left to divide.
            // All but its own mask was equal.
            self.give_up(cx, composition);
            let ids = compose::names_of(&compose::masks_of(&composition.pieces));
            self.differ_unproven(cx, &composition.module_pair, ids.into_iter().collect());
            self.part_done(cx, proposal.division, true);
            false
        };
        let reason = if divided {
            DiscardReason::Divided
        } else {
            DiscardReason::Mismatch
        };
        cx.store.discard(&self.stream, number, reason);
    }
}
