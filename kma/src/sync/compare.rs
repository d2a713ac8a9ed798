//! The answerer's side: compares proposals with its own bits.

use std::collections::BTreeSet;

use qkd_keyfile::{Composition, Generation, KeySpan, SegmentNumber};
use qkd_secmem::KeyBuf;
use subtle::ConstantTimeEq;

use super::{Compared, LinkSync, MAX_SEGMENT_BITS, drop_key, masks_of, name_of, names_of};
use crate::{
    digest::{Half, MASK_BYTES, comparison_tag, link_key_id},
    io::{Alarm, Cx, FormatTicket, FormattedSegment, Output, Settlement},
    record::{DiscardReason, Stage},
    store::ReadError,
    vault::{GetError, MAX_ROW_BYTES},
    wire::{Message, Propose, Verdict},
};

/// Answers kept to be said again.
const ANSWERS_MAX: usize = 1024;

/// Lengths of a unit that are taken from a proposer: shorter ones cost more digest than bits.
const UNIT_BYTES: std::ops::RangeInclusive<usize> = 16..=MAX_ROW_BYTES;

impl LinkSync {
    /// The proposer's half has come.
    pub(crate) fn proposed(&mut self, cx: &mut Cx<'_>, propose: Propose) {
        let number = propose.segment;
        if self.proposer
            || self.comparing.contains_key(&number)
            || !UNIT_BYTES.contains(&(propose.unit_bytes as usize))
            || number.0 == u64::MAX
        {
            return;
        }
        let said = self.answers.get(&number);
        if let Some((_, answer)) = said.filter(|(id, _)| *id == propose.kma_key_id) {
            let answer = answer.clone();
            return cx.send_bytes(&self.peer, answer);
        }
        if cx.store.segment(&self.stream, number).is_some() {
            return self.answer_again(cx, &propose);
        }
        if cx.store.is_full(&self.stream, self.config.capacity_bytes) {
            return self.say_full(cx, number);
        }
        let composition = &propose.composition;
        if propose.kma_key_id != link_key_id(&self.link, number, composition)
            || !self.holds(cx, composition)
        {
            return self.refuse(cx, &propose);
        }
        cx.out.push(Output::Format {
            ticket: FormatTicket {
                peer: self.peer.clone(),
                segment: number,
            },
            composition: composition.clone(),
            unit_bytes: propose.unit_bytes,
        });
        self.compose(composition, true);
        self.comparing.insert(number, propose);
    }

    /// Whether every piece is a whole QKD-key that waits here.
    fn holds(&self, cx: &Cx<'_>, composition: &Composition) -> bool {
        let Some(pair) = self.pairs.get(&composition.module_pair) else {
            return false;
        };
        let distinct: BTreeSet<_> = composition.pieces.iter().map(|p| &p.qkd_key).collect();
        let bits = composition.len_bits();
        composition.generation == Generation::default()
            && bits.is_some_and(|bits| bits <= MAX_SEGMENT_BITS)
            && !distinct.is_empty()
            && distinct.len() == composition.pieces.len()
            && composition.pieces.iter().all(|piece| {
                piece.offset_bits == 0
                    && pair.free_bits(&piece.qkd_key) == Some(piece.len_bits)
                    && !cx
                        .store
                        .is_used(&name_of(&composition.module_pair, &piece.qkd_key))
            })
    }

    /// The proposer composed something that this end cannot: both drop the QKD-keys.
    fn refuse(&mut self, cx: &mut Cx<'_>, propose: &Propose) {
        let composition = &propose.composition;
        if let Some(pair) = self.pairs.get_mut(&composition.module_pair) {
            for piece in &composition.pieces {
                if pair.free_bits(&piece.qkd_key).is_some() {
                    pair.forget(&piece.qkd_key);
                    drop_key(cx, &composition.module_pair, piece.qkd_key.clone());
                }
            }
        }
        self.answer(cx, propose, Verdict::Missing, [0; 16]);
    }

    fn answer(&mut self, cx: &mut Cx<'_>, propose: &Propose, verdict: Verdict, tag: [u8; 16]) {
        let segment = propose.segment;
        let message = Message::Answer {
            segment,
            verdict,
            tag,
        }
        .encode();
        let said = (propose.kma_key_id, message.clone());
        self.answers.insert(segment, said);
        if self.answers.len() > ANSWERS_MAX {
            self.answers.pop_first();
        }
        cx.send_bytes(&self.peer, message);
    }

    /// No room: the proposal comes again, and is compared then.
    fn say_full(&self, cx: &mut Cx<'_>, segment: SegmentNumber) {
        let message = Message::Answer {
            segment,
            verdict: Verdict::Full,
            tag: [0; 16],
        };
        cx.send(&self.peer, &message);
    }

    /// Compares the bits here with the proposer's tag.
    pub(super) fn compare(
        &mut self,
        cx: &mut Cx<'_>,
        propose: &Propose,
        segment: Option<FormattedSegment>,
    ) {
        let (number, composition) = (propose.segment, &propose.composition);
        let with_masks = segment.and_then(|segment| Some((masks_of(&segment)?, segment)));
        let Some((masks, segment)) = with_masks else {
            self.compose(composition, false);
            return self.refuse(cx, propose);
        };
        let digests = &segment.digests;
        let tag = |half| comparison_tag(half, propose.kma_key_id, composition, digests, &masks);
        if !bool::from(tag(Half::Proposal).ct_eq(&propose.tag)) {
            cx.store.use_qkd_keys(names_of(composition));
            cx.store.note_mismatch(&self.stream, number);
            self.alarm_mismatch(cx, composition);
            self.settle(cx, composition, Settlement::Dropped);
            return self.answer(cx, propose, Verdict::Differ, tag(Half::AnswerDiffer));
        }
        let compared = Compared {
            number,
            stage: Stage::Answered,
            key_type: propose.proposer_key_type.opposite(),
            kma_key_id: propose.kma_key_id,
            composition,
            bits: &segment.bits,
        };
        if !self.store(cx, &compared) {
            self.compose(composition, false);
            return self.say_full(cx, number);
        }
        cx.store.use_qkd_keys(names_of(composition));
        self.settle(cx, composition, Settlement::Stored);
        self.answer(cx, propose, Verdict::Match, tag(Half::AnswerMatch));
    }

    /// A proposal that was answered before a restart: the same answer, from the stored bits.
    fn answer_again(&mut self, cx: &mut Cx<'_>, propose: &Propose) {
        let (number, kma_key_id) = (propose.segment, propose.kma_key_id);
        let Some(stored) = cx.store.segment(&self.stream, number) else {
            return;
        };
        if stored.kma_key_id != kma_key_id {
            // A number is given out once: the proposer's store forgot that it was.
            cx.alarm(Alarm::PeerRolledBack {
                peer: self.peer.clone(),
            });
            return self.refuse(cx, propose);
        }
        let span = KeySpan {
            segment: number,
            offset_bytes: 0,
            len_bytes: stored.len_bytes,
        };
        let bits = match cx.store.read_all(&self.stream, &[span]) {
            Ok(bits) => bits,
            Err(ReadError::Get(GetError::Vault { .. }) | ReadError::Memory(_)) => return,
            Err(_) => {
                let reason = DiscardReason::NotStored;
                cx.store.discard(&self.stream, number, reason);
                return self.answer(cx, propose, Verdict::Missing, [0; 16]);
            }
        };
        let digests = digests_of(cx, &bits, propose.unit_bytes as usize);
        let segment = FormattedSegment { bits, digests };
        let Some(masks) = masks_of(&segment) else {
            return;
        };
        let tag = comparison_tag(
            Half::AnswerMatch,
            kma_key_id,
            &propose.composition,
            &segment.digests,
            &masks,
        );
        self.answer(cx, propose, Verdict::Match, tag);
    }
}

/// SHA-256 of every unit after the masks; the last may be shorter.
fn digests_of(cx: &Cx<'_>, bits: &KeyBuf, unit_bytes: usize) -> Vec<[u8; 32]> {
    let body = bits.expose().get(MASK_BYTES..).unwrap_or_default();
    let whole = body.len() - body.len() % unit_bytes;
    let mut digests = vec![[0; 32]; body.len().div_ceil(unit_bytes)];
    let units = whole / unit_bytes;
    cx.backend
        .sha256_units(&body[..whole], unit_bytes, &mut digests[..units]);
    if whole < body.len() {
        let rest = &body[whole..];
        cx.backend
            .sha256_units(rest, rest.len(), &mut digests[units..]);
    }
    digests
}
