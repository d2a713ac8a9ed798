//! The answerer's side: compares proposals with its own bits.

use bytes::Bytes;
use qkd_keyfile::{Composition, KeySpan, QkdKeyId, SegmentNumber};
use qkd_secmem::KeyBuf;
use subtle::ConstantTimeEq;

use super::{
    Compared, LinkSync,
    compose::{self, MAX_SEGMENT_BITS, MIN_SEGMENT_BITS},
    masks_of, names_of,
};
use crate::{
    digest::{Half, MASK_BYTES, comparison_tag, link_key_id},
    io::{Alarm, Cx, FormattedSegment},
    record::{DiscardReason, Stage},
    store::ReadError,
    vault::{GetError, MAX_ROW_BYTES},
    wire::{DropReason, Message, Propose, Verdict},
};

/// Answers kept to be said again.
const ANSWERS_MAX: usize = 1024;

/// Lengths of a unit that are taken from a proposer: shorter ones cost more digest than bits.
const UNIT_BYTES: std::ops::RangeInclusive<usize> = 16..=MAX_ROW_BYTES;

/// A proposal that waits for the pipeline.
#[derive(Debug)]
pub(super) struct Comparing {
    /// The order to the pipeline.
    pub(super) order: u64,
    pub(super) propose: Propose,
}

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
        if composition.generation != cx.store.generation(&composition.module_pair) {
            // The later one of the two is on its way to whoever lacks it; then the proposal is void,
            // or comes again.
            return;
        }
        if propose.kma_key_id != link_key_id(&self.link, number, composition) {
            return self.refuse(cx, &propose, Vec::new());
        }
        if let Err(missing) = self.take(cx, composition) {
            return self.refuse(cx, &propose, missing);
        }
        let order = self.order(cx, number, composition, propose.unit_bytes);
        self.comparing.insert(number, Comparing { order, propose });
    }

    /// Takes the bits of a composition, if all are free here.
    fn take(&mut self, cx: &Cx<'_>, composition: &Composition) -> Result<(), Vec<QkdKeyId>> {
        let bits = composition.len_bits();
        let fits = bits.is_some_and(|bits| (MIN_SEGMENT_BITS..=MAX_SEGMENT_BITS).contains(&bits));
        let take = |pair: &mut super::Pair| pair.take(cx.now.mono, &composition.pieces);
        let taken = self.with_pair(&composition.module_pair, take);
        match taken.filter(|_| fits) {
            Some(taken) => taken,
            None => Err(Vec::new()),
        }
    }

    /// The proposer composed something that this end cannot. What is missing goes, at both ends: all
    /// of it where nothing is named.
    pub(super) fn refuse(&mut self, cx: &mut Cx<'_>, propose: &Propose, missing: Vec<QkdKeyId>) {
        let composition = &propose.composition;
        let now = cx.now.mono;
        self.with_pair(&composition.module_pair, |pair| {
            pair.burn(now, &compose::masks_of(&composition.pieces));
        });
        let ids = compose::names_of(&composition.pieces);
        for id in &ids {
            if missing.is_empty() || missing.contains(id) {
                self.drop_free(cx, &composition.module_pair, id, DropReason::Gone);
            } else {
                // Its masks are gone: what is left of it belongs to this process.
                let name = super::name_of(cx, &composition.module_pair, id);
                cx.store.use_qkd_keys([name]);
            }
        }
        self.settle_finished(cx, composition);
        self.answer(cx, propose, Verdict::Missing, [0; 16], missing);
    }

    fn answer(
        &mut self,
        cx: &mut Cx<'_>,
        propose: &Propose,
        verdict: Verdict,
        tag: [u8; 16],
        missing: Vec<QkdKeyId>,
    ) {
        let segment = propose.segment;
        let message = Message::Answer {
            segment,
            verdict,
            tag,
            missing,
        };
        let message = Bytes::from(message.encode());
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
            missing: Vec::new(),
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
            self.release(cx, composition);
            return self.refuse(cx, propose, Vec::new());
        };
        let FormattedSegment { bits, digests } = segment;
        let tag = |half| comparison_tag(half, propose.kma_key_id, composition, &digests, &masks);
        if !bool::from(tag(Half::Proposal).ct_eq(&propose.tag)) {
            let (_, parts) = self.differs(cx, composition);
            if parts.is_empty() {
                cx.store.note_mismatch(&self.stream, number);
            }
            let tag = tag(Half::AnswerDiffer);
            return self.answer(cx, propose, Verdict::Differ, tag, Vec::new());
        }
        let compared = Compared {
            number,
            stage: Stage::Answered,
            key_type: propose.proposer_key_type.opposite(),
            kma_key_id: propose.kma_key_id,
            composition,
            bits,
        };
        if !self.store(cx, compared) {
            self.release(cx, composition);
            return self.say_full(cx, number);
        }
        cx.store.use_qkd_keys(names_of(composition));
        self.count_agreed(composition);
        self.close(cx, composition, true);
        let tag = tag(Half::AnswerMatch);
        self.answer(cx, propose, Verdict::Match, tag, Vec::new());
    }

    pub(super) fn release(&mut self, cx: &Cx<'_>, composition: &Composition) {
        self.with_pair(&composition.module_pair, |pair| {
            pair.release(cx.now.mono, &composition.pieces);
        });
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
            return self.refuse(cx, propose, Vec::new());
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
                return self.answer(cx, propose, Verdict::Missing, [0; 16], Vec::new());
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
        self.answer(cx, propose, Verdict::Match, tag, Vec::new());
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
