//! The proposer's side: composes segments, concludes comparisons.

use qkd_keyfile::{
    Composition, Generation, KmaKeyId, ModulePairId, Mono, Piece, QkdKeyId, SegmentNumber,
    metadata::KeyType,
};
use subtle::ConstantTimeEq;

use super::{Compared, LinkSync, drop_key, masks_of, name_of};
use crate::{
    RESEND_AFTER,
    digest::{Half, comparison_tag, link_key_id},
    io::{Cx, FormatTicket, FormattedSegment, Output, Settlement},
    record::{DiscardReason, Stage},
    wire::{Message, Propose, Verdict},
};

/// Segments under comparison at a time.
const WINDOW: usize = 64;

/// A segment under comparison, at the proposer.
#[derive(Debug)]
pub(super) struct Proposal {
    pub(super) composition: Composition,
    key_type: KeyType,
    kma_key_id: KmaKeyId,
    made: Option<Made>,
}

#[derive(Debug)]
struct Made {
    segment: FormattedSegment,
    message: Vec<u8>,
    sent: Mono,
}

impl LinkSync {
    /// Composes segments of QKD-keys that both ends hold, one each, of every module pair in turn.
    pub(super) fn propose(&mut self, cx: &mut Cx<'_>) {
        let names: Vec<ModulePairId> = self.pairs.keys().cloned().collect();
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

    fn propose_one(&mut self, cx: &mut Cx<'_>, module_pair: &ModulePairId) -> bool {
        let full = cx.store.is_full(&self.stream, self.config.capacity_bytes);
        if self.proposals.len() >= WINDOW || full {
            return false;
        }
        let Some(pair) = self.pairs.get_mut(module_pair) else {
            return false;
        };
        let Some((id, bits_here, bits_there)) = pair.next_match() else {
            return false;
        };
        if bits_here == bits_there {
            self.compose_one(cx, module_pair, id, bits_here);
        } else {
            // Not the same QKD-key, whatever its name says: both ends drop it.
            pair.drop_uncomposed(&id);
            self.alarm_mismatch(cx, &whole(module_pair, id.clone(), bits_here));
            drop_key(cx, module_pair, id);
        }
        true
    }

    fn compose_one(
        &mut self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        id: QkdKeyId,
        bits: u32,
    ) {
        cx.store.use_qkd_keys([name_of(module_pair, &id)]);
        let composition = whole(module_pair, id, bits);
        self.compose(&composition, true);
        let segment = cx.store.propose(&self.stream, Some(composition.clone()));
        cx.out.push(Output::Format {
            ticket: FormatTicket {
                peer: self.peer.clone(),
                segment,
            },
            composition: composition.clone(),
            unit_bytes: self.unit_bytes,
        });
        let proposal = Proposal {
            kma_key_id: link_key_id(&self.link, segment, &composition),
            key_type: self.assign(cx),
            composition,
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
        number: SegmentNumber,
        segment: Option<FormattedSegment>,
    ) {
        let waiting = self.proposals.get_mut(&number);
        let Some(proposal) = waiting.filter(|proposal| proposal.made.is_none()) else {
            return;
        };
        let with_masks = segment.and_then(|segment| Some((masks_of(&segment)?, segment)));
        let Some((masks, segment)) = with_masks else {
            return self.abandon(cx, number, DiscardReason::Missing);
        };
        let tag = comparison_tag(
            Half::Proposal,
            proposal.kma_key_id,
            &proposal.composition,
            &segment.digests,
            &masks,
        );
        let message = Message::Propose(Propose {
            segment: number,
            composition: proposal.composition.clone(),
            proposer_key_type: proposal.key_type,
            kma_key_id: proposal.kma_key_id,
            unit_bytes: self.unit_bytes,
            tag,
        })
        .encode();
        if self.connected {
            cx.send_bytes(&self.peer, message.clone());
        }
        proposal.made = Some(Made {
            segment,
            message,
            sent: cx.now.mono,
        });
    }

    /// Gives up a proposal, here and at the peer.
    fn abandon(&mut self, cx: &mut Cx<'_>, number: SegmentNumber, reason: DiscardReason) {
        let Some(proposal) = self.proposals.remove(&number) else {
            return;
        };
        cx.store.discard(&self.stream, number, reason);
        if let Some(pair) = self.pairs.get_mut(&proposal.composition.module_pair) {
            for piece in &proposal.composition.pieces {
                pair.tell_dropped(piece.qkd_key.clone());
            }
        }
        self.settle(cx, &proposal.composition, Settlement::Dropped);
    }

    /// The answerer's half has come.
    pub(crate) fn answered(
        &mut self,
        cx: &mut Cx<'_>,
        number: SegmentNumber,
        verdict: Verdict,
        tag: &[u8; 16],
    ) {
        if !self.proposer {
            return;
        }
        match (self.proposals.get(&number), verdict) {
            // Answered before: either it is stored, and the commit says so again, or it is void.
            (None, Verdict::Match) => self.conclude_again(cx, number),
            (None, _) | (Some(_), Verdict::Full) => {}
            (Some(proposal), _) if proposal.made.is_none() => {}
            (Some(_), Verdict::Missing) => self.abandon(cx, number, DiscardReason::Missing),
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
        let Some(proposal) = self.proposals.remove(&number) else {
            return;
        };
        let made = proposal.made.as_ref().map(|made| &made.segment);
        let Some((segment, masks)) = made.and_then(|made| Some((made, masks_of(made)?))) else {
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
            bits: &segment.bits,
        };
        let outcome = if equal && self.store(cx, &compared) {
            Settlement::Stored
        } else if equal {
            let reason = DiscardReason::NotStored;
            cx.store.discard(&self.stream, number, reason);
            Settlement::Dropped
        } else {
            // The bits differ, or the answer is not the peer's: either way both ends discard.
            let reason = DiscardReason::Mismatch;
            cx.store.discard(&self.stream, number, reason);
            self.alarm_mismatch(cx, composition);
            Settlement::Dropped
        };
        self.settle(cx, composition, outcome);
        self.conclude_again(cx, number);
    }
}

/// A segment of one whole QKD-key.
fn whole(module_pair: &ModulePairId, qkd_key: QkdKeyId, len_bits: u32) -> Composition {
    Composition {
        module_pair: module_pair.clone(),
        generation: Generation::default(),
        pieces: vec![Piece {
            qkd_key,
            offset_bits: 0,
            len_bits,
        }],
    }
}
