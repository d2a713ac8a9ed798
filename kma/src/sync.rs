//! Key synchronisation of one link (Y.3803 clause 8.2.1, steps 3 to 6).
//!
//! 1. *Announce*: each end tells which QKD-keys it holds and which it dropped.
//! 2. *Propose*: the end with the smaller ID composes a segment of a QKD-key that both hold.
//! 3. *Compare*: its tag goes out under mask bits of the segment; the answerer compares.
//! 4. *Answer*, once the answerer has stored the segment; *commit*, once the proposer has.
//!
//! Nothing is a KMA-key before both ends hold it (B-27); where they differ, both discard (B-26).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use qkd_keyfile::{
    Composition, Generation, KmaKeyId, LinkId, ModulePairId, Mono, NodeId, Piece, QkdKeyId,
    QkdKeyName, SegmentNumber, StreamId,
    metadata::{KeyType, SecurityLevel},
};
use qkd_secmem::KeyBuf;
use subtle::ConstantTimeEq;

use crate::{
    RESEND_AFTER,
    digest::{Half, MASK_BITS, MASK_BYTES, comparison_tag, link_key_id},
    io::{Alarm, Cx, FormatTicket, FormattedSegment, LinkConfig, Output, Settlement},
    record::{DiscardReason, Stage},
    store::NewSegment,
    wire::{Message, Verdict},
};

/// Segments under comparison at a time.
const WINDOW: usize = 64;

/// QKD-keys in one announcement.
const ANNOUNCE_MAX: usize = 1024;

/// A QKD-key that the peer still lacks after it has announced this many others of the module pair
/// since is dropped.
const LATER_MAX: u64 = 64;

/// QKD-keys of a module pair that the peer announced and this end lacks, at most.
const THEIRS_MAX: usize = 8192;

/// A QKD-key that the peer has not announced in this time, while connected, is dropped.
const UNMATCHED_TTL: std::time::Duration = std::time::Duration::from_secs(120);

/// Answers kept to be said again.
const ANSWERS_MAX: usize = 1024;

/// Shortest QKD-key that makes a segment: the masks and one byte.
const MIN_SEGMENT_BITS: u32 = MASK_BITS + 8;

/// One end of the synchronisation with one matching KMA.
#[derive(Debug)]
pub(crate) struct LinkSync {
    peer: NodeId,
    stream: StreamId,
    link: LinkId,
    proposer: bool,
    config: LinkConfig,
    unit_bytes: u32,
    connected: bool,
    pairs: BTreeMap<ModulePairId, Pair>,
    /// Proposer: waits for the pipeline, then for the answer.
    proposals: BTreeMap<SegmentNumber, Proposal>,
    /// Answerer: waits for the pipeline.
    comparing: BTreeMap<SegmentNumber, Comparison>,
    /// Answerer: what was answered about segments that were not stored.
    answers: VecDeque<(SegmentNumber, Vec<u8>)>,
    /// Bytes assigned so far to (this end, the other), so that each owns half.
    assigned: (u64, u64),
}

/// QKD-keys of one module pair that are not settled.
#[derive(Debug, Default)]
struct Pair {
    held: BTreeMap<QkdKeyId, Held>,
    theirs: BTreeMap<QkdKeyId, u32>,
    /// QKD-keys the peer has announced, ever.
    theirs_count: u64,
    /// Dropped, and the peer has yet to hear it.
    dropped: Vec<QkdKeyId>,
}

#[derive(Debug)]
struct Held {
    key_bits: u32,
    announced: Option<Announced>,
    /// In a segment under comparison.
    composed: bool,
}

#[derive(Debug, Clone, Copy)]
struct Announced {
    first: Mono,
    last: Mono,
    /// The peer's count at `first`.
    theirs_count: u64,
}

#[derive(Debug)]
struct Proposal {
    composition: Composition,
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

#[derive(Debug)]
struct Comparison {
    composition: Composition,
    key_type: KeyType,
    kma_key_id: KmaKeyId,
    tag: [u8; 16],
}

impl LinkSync {
    pub(crate) fn new(
        me: &NodeId,
        peer: &NodeId,
        link: LinkId,
        config: LinkConfig,
        unit_bytes: u32,
    ) -> Self {
        let pairs = config
            .module_pairs
            .iter()
            .map(|name| (name.clone(), Pair::default()))
            .collect();
        Self {
            peer: peer.clone(),
            stream: StreamId::Link(link.clone()),
            proposer: link.proposer() == me,
            link,
            config,
            unit_bytes,
            connected: false,
            pairs,
            proposals: BTreeMap::new(),
            comparing: BTreeMap::new(),
            answers: VecDeque::new(),
            assigned: (0, 0),
        }
    }

    /// The session is there: everything unsettled is said again.
    pub(crate) fn connected(&mut self) {
        self.connected = true;
        for pair in self.pairs.values_mut() {
            pair.theirs.clear();
            for held in pair.held.values_mut() {
                held.announced = None;
            }
        }
    }

    pub(crate) fn disconnected(&mut self) {
        self.connected = false;
    }

    /// The peer's store was replaced: segments under comparison are void.
    pub(crate) fn peer_replaced(&mut self, cx: &mut Cx<'_>) {
        let proposals = std::mem::take(&mut self.proposals);
        for proposal in proposals.into_values() {
            self.settle(cx, &proposal.composition, Settlement::Dropped);
        }
        self.comparing.clear();
        self.answers.clear();
    }

    pub(crate) fn knows_pair(&self, module_pair: &ModulePairId) -> bool {
        self.pairs.contains_key(module_pair)
    }

    /// A QKD-key waits in the pipeline.
    pub(crate) fn held(&mut self, cx: &mut Cx<'_>, name: QkdKeyName, key_bits: u32) {
        if cx.store.is_used(&name) {
            cx.settle(name, Settlement::Dropped);
            return;
        }
        if key_bits < MIN_SEGMENT_BITS {
            tracing::warn!(qkd_key = %name, key_bits, "too short to be compared; dropped");
            cx.store.use_qkd_keys([name.clone()]);
            cx.settle(name, Settlement::Dropped);
            return;
        }
        let Some(pair) = self.pairs.get_mut(&name.module_pair) else {
            cx.settle(name, Settlement::Dropped);
            return;
        };
        pair.held.entry(name.id.clone()).or_insert(Held {
            key_bits,
            announced: None,
            composed: false,
        });
    }

    /// The pipeline lost a QKD-key: the peer must not wait for it.
    pub(crate) fn lost(&mut self, cx: &mut Cx<'_>, name: &QkdKeyName) {
        if let Some(pair) = self.pairs.get_mut(&name.module_pair)
            && pair.held.get(&name.id).is_some_and(|held| !held.composed)
        {
            pair.held.remove(&name.id);
            pair.dropped.push(name.id.clone());
            cx.store.use_qkd_keys([name.clone()]);
            cx.settle(name.clone(), Settlement::Dropped);
        }
    }

    /// Announces, proposes and repeats what is due.
    pub(crate) fn poll(&mut self, cx: &mut Cx<'_>) {
        if !self.connected {
            return;
        }
        self.drop_unmatched(cx);
        self.announce(cx);
        if self.proposer {
            self.propose(cx);
            self.repeat_proposals(cx);
        }
    }

    fn announce(&mut self, cx: &mut Cx<'_>) {
        let now = cx.now.mono;
        for (name, pair) in &mut self.pairs {
            let count = pair.theirs_count;
            let due = |held: &Held| {
                !held.composed
                    && held
                        .announced
                        .is_none_or(|a| now.since(a.last) >= 2 * RESEND_AFTER)
            };
            let mut list = Vec::new();
            for (id, held) in &mut pair.held {
                // What the peer has announced too needs no second saying from the proposer's side
                // to be matched; from the answerer's it does, for the proposer matches.
                if !due(held) {
                    continue;
                }
                let first = held.announced.map_or(now, |a| a.first);
                let theirs_count = held.announced.map_or(count, |a| a.theirs_count);
                held.announced = Some(Announced {
                    first,
                    last: now,
                    theirs_count,
                });
                list.push((id.clone(), held.key_bits));
                if list.len() == ANNOUNCE_MAX {
                    break;
                }
            }
            let take = pair.dropped.len().min(ANNOUNCE_MAX);
            let dropped: Vec<_> = pair.dropped.drain(..take).collect();
            if !list.is_empty() || !dropped.is_empty() {
                let message = Message::Announce {
                    module_pair: name.clone(),
                    generation: Generation::default(),
                    held: list,
                    dropped,
                };
                cx.send(&self.peer, &message);
            }
        }
    }

    /// Drops QKD-keys that the peer will not have any more.
    fn drop_unmatched(&mut self, cx: &mut Cx<'_>) {
        let now = cx.now.mono;
        for (module_pair, pair) in &mut self.pairs {
            let count = pair.theirs_count;
            let theirs = &pair.theirs;
            let gone: Vec<QkdKeyId> = pair
                .held
                .iter()
                .filter(|(id, held)| !held.composed && !theirs.contains_key(id))
                .filter(|(_, held)| {
                    held.announced.is_some_and(|a| {
                        count - a.theirs_count > LATER_MAX || now.since(a.first) > UNMATCHED_TTL
                    })
                })
                .map(|(id, _)| id.clone())
                .collect();
            for id in gone {
                tracing::info!(%module_pair, qkd_key = %id, "held at one end only; dropped");
                pair.held.remove(&id);
                pair.dropped.push(id.clone());
                drop_key(cx, module_pair, id);
            }
        }
    }

    /// The peer's announcement.
    pub(crate) fn announced(
        &mut self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        held: Vec<(QkdKeyId, u32)>,
        dropped: &[QkdKeyId],
    ) {
        let Some(pair) = self.pairs.get_mut(module_pair) else {
            tracing::warn!(peer = %self.peer, %module_pair, "announced a module pair that is not configured here");
            return;
        };
        for (id, key_bits) in held {
            let name = name_of(module_pair, &id);
            if cx.store.is_used(&name) {
                // Settled here: tell the peer, unless the segment is still on its way to it.
                if !self
                    .proposals
                    .values()
                    .any(|p| composes(&p.composition, &id))
                {
                    pair.dropped.push(id);
                }
                continue;
            }
            if pair.theirs.insert(id, key_bits).is_none() {
                pair.theirs_count += 1;
            }
            if pair.theirs.len() > THEIRS_MAX {
                pair.theirs.pop_first();
            }
        }
        for id in dropped {
            pair.theirs.remove(id);
            if pair.held.get(id).is_some_and(|held| !held.composed) {
                pair.held.remove(id);
                drop_key(cx, module_pair, id.clone());
            }
        }
    }

    /// Composes segments of QKD-keys that both ends hold, one each.
    fn propose(&mut self, cx: &mut Cx<'_>) {
        let full = |cx: &Cx<'_>, config: &LinkConfig, stream: &StreamId| {
            cx.store
                .stream(stream)
                .is_some_and(|s| s.held_bytes >= config.capacity_bytes)
        };
        for module_pair in self.pairs.keys().cloned().collect::<Vec<_>>() {
            while self.proposals.len() < WINDOW && !full(cx, &self.config, &self.stream) {
                let Some(pair) = self.pairs.get_mut(&module_pair) else {
                    break;
                };
                let both = pair
                    .held
                    .iter()
                    .find(|(id, held)| !held.composed && pair.theirs.contains_key(id))
                    .map(|(id, held)| (id.clone(), held.key_bits));
                let Some((id, key_bits)) = both else {
                    break;
                };
                if pair.theirs.remove(&id) != Some(key_bits) {
                    // Not the same QKD-key, whatever its name says: both ends drop it.
                    pair.held.remove(&id);
                    pair.dropped.push(id.clone());
                    cx.alarm(Alarm::Mismatch {
                        peer: self.peer.clone(),
                        module_pair: module_pair.clone(),
                        qkd_keys: vec![id.clone()],
                    });
                    drop_key(cx, &module_pair, id);
                    continue;
                }
                if let Some(held) = pair.held.get_mut(&id) {
                    held.composed = true;
                }
                self.compose(cx, &module_pair, id, key_bits);
            }
        }
    }

    fn compose(&mut self, cx: &mut Cx<'_>, module_pair: &ModulePairId, id: QkdKeyId, bits: u32) {
        let composition = Composition {
            module_pair: module_pair.clone(),
            generation: Generation::default(),
            pieces: vec![Piece {
                qkd_key: id.clone(),
                offset_bits: 0,
                len_bits: bits,
            }],
        };
        cx.store.use_qkd_keys([name_of(module_pair, &id)]);
        let segment = cx.store.propose(&self.stream, Some(composition.clone()));
        let mine = self.assigned.0 <= self.assigned.1;
        let side = if mine {
            &mut self.assigned.0
        } else {
            &mut self.assigned.1
        };
        *side += u64::from(bits);
        cx.out.push(Output::Format {
            ticket: FormatTicket {
                peer: self.peer.clone(),
                segment,
            },
            composition: composition.clone(),
            unit_bytes: self.unit_bytes,
        });
        let kma_key_id = link_key_id(&self.link, segment, &composition);
        let key_type = if mine {
            KeyType::Encrypting
        } else {
            KeyType::Decrypting
        };
        let proposal = Proposal {
            composition,
            key_type,
            kma_key_id,
            made: None,
        };
        self.proposals.insert(segment, proposal);
    }

    fn repeat_proposals(&mut self, cx: &mut Cx<'_>) {
        for proposal in self.proposals.values_mut() {
            if let Some(made) = &mut proposal.made
                && cx.now.mono.since(made.sent) >= RESEND_AFTER
            {
                made.sent = cx.now.mono;
                cx.send_bytes(&self.peer, made.message.clone());
            }
        }
    }

    /// The pipeline made a segment, at the proposer or at the answerer.
    pub(crate) fn formatted(
        &mut self,
        cx: &mut Cx<'_>,
        number: SegmentNumber,
        segment: Option<FormattedSegment>,
    ) {
        if self.proposer {
            self.formatted_proposal(cx, number, segment);
        } else if let Some(comparison) = self.comparing.remove(&number) {
            self.compare(cx, number, &comparison, segment);
        }
    }

    fn formatted_proposal(
        &mut self,
        cx: &mut Cx<'_>,
        number: SegmentNumber,
        segment: Option<FormattedSegment>,
    ) {
        let Some(proposal) = self.proposals.get_mut(&number) else {
            return;
        };
        let Some((segment, masks)) = segment.and_then(with_masks) else {
            self.abandon(cx, number, DiscardReason::Missing);
            return;
        };
        let tag = comparison_tag(
            Half::Proposal,
            proposal.kma_key_id,
            &proposal.composition,
            &segment.digests,
            &masks,
        );
        let message = Message::Propose {
            segment: number,
            composition: proposal.composition.clone(),
            proposer_key_type: proposal.key_type,
            kma_key_id: proposal.kma_key_id,
            unit_bytes: self.unit_bytes,
            tag,
        }
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
            let ids = proposal.composition.pieces.iter();
            pair.dropped.extend(ids.map(|p| p.qkd_key.clone()));
        }
        self.settle(cx, &proposal.composition, Settlement::Dropped);
    }

    /// The proposer's half has come.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn proposed(
        &mut self,
        cx: &mut Cx<'_>,
        number: SegmentNumber,
        composition: Composition,
        proposer_key_type: KeyType,
        kma_key_id: KmaKeyId,
        unit_bytes: u32,
        tag: [u8; 16],
    ) {
        if self.proposer || self.comparing.contains_key(&number) || unit_bytes == 0 {
            return;
        }
        if let Some((_, answer)) = self.answers.iter().find(|(n, _)| *n == number) {
            let answer = answer.clone();
            cx.send_bytes(&self.peer, answer);
            return;
        }
        if cx.store.segment(&self.stream, number).is_some() {
            self.answer_again(cx, number, &composition, kma_key_id, unit_bytes);
            return;
        }
        let full = cx
            .store
            .stream(&self.stream)
            .is_some_and(|s| s.held_bytes >= self.config.capacity_bytes);
        if full {
            let message = Message::Answer {
                segment: number,
                verdict: Verdict::Full,
                tag: [0; 16],
            };
            cx.send(&self.peer, &message);
            return;
        }
        if kma_key_id != link_key_id(&self.link, number, &composition)
            || !self.holds(cx, &composition)
        {
            self.refuse(cx, number, &composition);
            return;
        }
        if let Some(pair) = self.pairs.get_mut(&composition.module_pair) {
            for piece in &composition.pieces {
                pair.theirs.remove(&piece.qkd_key);
                if let Some(held) = pair.held.get_mut(&piece.qkd_key) {
                    held.composed = true;
                }
            }
        }
        cx.out.push(Output::Format {
            ticket: FormatTicket {
                peer: self.peer.clone(),
                segment: number,
            },
            composition: composition.clone(),
            unit_bytes,
        });
        let comparison = Comparison {
            composition,
            key_type: proposer_key_type.opposite(),
            kma_key_id,
            tag,
        };
        self.comparing.insert(number, comparison);
    }

    /// Whether every piece is a whole QKD-key that waits here.
    fn holds(&self, cx: &Cx<'_>, composition: &Composition) -> bool {
        let Some(pair) = self.pairs.get(&composition.module_pair) else {
            return false;
        };
        let distinct: BTreeSet<_> = composition.pieces.iter().map(|p| &p.qkd_key).collect();
        composition.generation == Generation::default()
            && !distinct.is_empty()
            && distinct.len() == composition.pieces.len()
            && composition.pieces.iter().all(|piece| {
                let whole = |held: &Held| {
                    !held.composed && piece.offset_bits == 0 && piece.len_bits == held.key_bits
                };
                pair.held.get(&piece.qkd_key).is_some_and(whole)
                    && !cx
                        .store
                        .is_used(&name_of(&composition.module_pair, &piece.qkd_key))
            })
    }

    /// The proposer composed something that this end cannot: both drop the QKD-keys.
    fn refuse(&mut self, cx: &mut Cx<'_>, number: SegmentNumber, composition: &Composition) {
        if let Some(pair) = self.pairs.get_mut(&composition.module_pair) {
            for piece in &composition.pieces {
                pair.theirs.remove(&piece.qkd_key);
                if pair.held.get(&piece.qkd_key).is_some_and(|h| !h.composed) {
                    pair.held.remove(&piece.qkd_key);
                    drop_key(cx, &composition.module_pair, piece.qkd_key.clone());
                }
            }
        }
        self.answer(cx, number, Verdict::Missing, [0; 16]);
    }

    fn answer(&mut self, cx: &mut Cx<'_>, number: SegmentNumber, verdict: Verdict, tag: [u8; 16]) {
        let message = Message::Answer {
            segment: number,
            verdict,
            tag,
        }
        .encode();
        self.answers.push_back((number, message.clone()));
        if self.answers.len() > ANSWERS_MAX {
            self.answers.pop_front();
        }
        cx.send_bytes(&self.peer, message);
    }

    /// The answerer compares its own bits with the proposer's tag.
    fn compare(
        &mut self,
        cx: &mut Cx<'_>,
        number: SegmentNumber,
        comparison: &Comparison,
        segment: Option<FormattedSegment>,
    ) {
        let Some((segment, masks)) = segment.and_then(with_masks) else {
            self.uncompose(&comparison.composition);
            self.refuse(cx, number, &comparison.composition);
            return;
        };
        let tag_of = |half| {
            comparison_tag(
                half,
                comparison.kma_key_id,
                &comparison.composition,
                &segment.digests,
                &masks,
            )
        };
        let same = bool::from(tag_of(Half::Proposal).ct_eq(&comparison.tag));
        cx.store
            .use_qkd_keys(names_of(&comparison.composition).collect::<Vec<_>>());
        if same {
            let stored = store_segment(
                cx,
                &self.stream,
                number,
                Stage::Answered,
                comparison.key_type,
                comparison.kma_key_id,
                &comparison.composition,
                &segment.bits,
            );
            if stored {
                self.settle(cx, &comparison.composition, Settlement::Stored);
                self.answer(cx, number, Verdict::Match, tag_of(Half::AnswerMatch));
            }
        } else {
            cx.store.note_mismatch(&self.stream, number);
            self.alarm_mismatch(cx, &comparison.composition);
            self.settle(cx, &comparison.composition, Settlement::Dropped);
            self.answer(cx, number, Verdict::Differ, tag_of(Half::AnswerDiffer));
        }
    }

    fn uncompose(&mut self, composition: &Composition) {
        if let Some(pair) = self.pairs.get_mut(&composition.module_pair) {
            for piece in &composition.pieces {
                if let Some(held) = pair.held.get_mut(&piece.qkd_key) {
                    held.composed = false;
                }
            }
        }
    }

    /// A proposal that was answered before a restart: the same answer, from the stored bits.
    fn answer_again(
        &mut self,
        cx: &mut Cx<'_>,
        number: SegmentNumber,
        composition: &Composition,
        kma_key_id: KmaKeyId,
        unit_bytes: u32,
    ) {
        let Some(stored) = cx.store.segment(&self.stream, number) else {
            return;
        };
        if stored.kma_key_id != kma_key_id {
            return;
        }
        let span = qkd_keyfile::KeySpan {
            segment: number,
            offset_bytes: 0,
            len_bytes: stored.len_bytes,
        };
        let Ok(bits) = cx.store.read_all(&self.stream, &[span]) else {
            return;
        };
        let digests = digests_of(cx, &bits, unit_bytes as usize);
        let Some((segment, masks)) = with_masks(FormattedSegment { bits, digests }) else {
            return;
        };
        let tag = comparison_tag(
            Half::AnswerMatch,
            kma_key_id,
            composition,
            &segment.digests,
            &masks,
        );
        self.answer(cx, number, Verdict::Match, tag);
    }

    /// The answerer's half has come.
    pub(crate) fn answered(
        &mut self,
        cx: &mut Cx<'_>,
        number: SegmentNumber,
        verdict: Verdict,
        tag: &[u8; 16],
    ) {
        let made = match self.proposals.get(&number) {
            Some(proposal) if self.proposer => proposal.made.is_some(),
            _ => {
                // Answered before: either it is stored, and the commit says so again, or it is void.
                if self.proposer && verdict == Verdict::Match {
                    self.conclude_again(cx, number);
                }
                return;
            }
        };
        match verdict {
            Verdict::Full => {}
            _ if !made => {}
            Verdict::Missing => self.abandon(cx, number, DiscardReason::Missing),
            Verdict::Match => self.conclude(cx, number, Half::AnswerMatch, tag),
            Verdict::Differ => self.conclude(cx, number, Half::AnswerDiffer, tag),
        }
    }

    fn conclude_again(&mut self, cx: &mut Cx<'_>, number: SegmentNumber) {
        let message = if cx.store.segment(&self.stream, number).is_some() {
            Message::Commit {
                stream: self.stream.clone(),
                segment: number,
                release: [0; 16],
            }
        } else {
            Message::Void {
                stream: self.stream.clone(),
                segment: number,
            }
        };
        cx.send(&self.peer, &message);
    }

    fn conclude(&mut self, cx: &mut Cx<'_>, number: SegmentNumber, half: Half, tag: &[u8; 16]) {
        let Some(proposal) = self.proposals.remove(&number) else {
            return;
        };
        let Some(made) = proposal.made else {
            return;
        };
        let Some((segment, masks)) = with_masks(made.segment) else {
            return;
        };
        let expected = comparison_tag(
            half,
            proposal.kma_key_id,
            &proposal.composition,
            &segment.digests,
            &masks,
        );
        let authentic = bool::from(expected.ct_eq(tag));
        if half == Half::AnswerMatch && authentic {
            let stored = store_segment(
                cx,
                &self.stream,
                number,
                Stage::Confirmed,
                proposal.key_type,
                proposal.kma_key_id,
                &proposal.composition,
                &segment.bits,
            );
            if stored {
                self.settle(cx, &proposal.composition, Settlement::Stored);
                self.conclude_again(cx, number);
            }
            return;
        }
        // The bits differ, or the answer is not the peer's: either way both ends discard.
        cx.store
            .discard(&self.stream, number, DiscardReason::Mismatch);
        self.alarm_mismatch(cx, &proposal.composition);
        self.settle(cx, &proposal.composition, Settlement::Dropped);
        let void = Message::Void {
            stream: self.stream.clone(),
            segment: number,
        };
        cx.send(&self.peer, &void);
    }

    fn alarm_mismatch(&self, cx: &mut Cx<'_>, composition: &Composition) {
        cx.alarm(Alarm::Mismatch {
            peer: self.peer.clone(),
            module_pair: composition.module_pair.clone(),
            qkd_keys: composition
                .pieces
                .iter()
                .map(|p| p.qkd_key.clone())
                .collect(),
        });
    }

    /// The QKD-keys of a composition are done with here.
    fn settle(&mut self, cx: &mut Cx<'_>, composition: &Composition, outcome: Settlement) {
        for name in names_of(composition) {
            if let Some(pair) = self.pairs.get_mut(&name.module_pair) {
                pair.held.remove(&name.id);
                pair.theirs.remove(&name.id);
            }
            cx.settle(name, outcome);
        }
    }
}

fn name_of(module_pair: &ModulePairId, id: &QkdKeyId) -> QkdKeyName {
    QkdKeyName {
        module_pair: module_pair.clone(),
        generation: Generation::default(),
        id: id.clone(),
    }
}

fn names_of(composition: &Composition) -> impl Iterator<Item = QkdKeyName> {
    composition
        .pieces
        .iter()
        .map(|piece| name_of(&composition.module_pair, &piece.qkd_key))
}

fn composes(composition: &Composition, id: &QkdKeyId) -> bool {
    composition.pieces.iter().any(|piece| piece.qkd_key == *id)
}

fn drop_key(cx: &mut Cx<'_>, module_pair: &ModulePairId, id: QkdKeyId) {
    let name = name_of(module_pair, &id);
    cx.store.use_qkd_keys([name.clone()]);
    cx.settle(name, Settlement::Dropped);
}

/// A segment together with its masks, if it is long enough to have them.
fn with_masks(segment: FormattedSegment) -> Option<(FormattedSegment, [u8; MASK_BYTES])> {
    let (masks, body) = segment.bits.expose().split_first_chunk::<MASK_BYTES>()?;
    let masks = *masks;
    (!body.is_empty()).then_some((segment, masks))
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

#[allow(clippy::too_many_arguments)]
fn store_segment(
    cx: &mut Cx<'_>,
    stream: &StreamId,
    number: SegmentNumber,
    stage: Stage,
    key_type: KeyType,
    kma_key_id: KmaKeyId,
    composition: &Composition,
    bits: &KeyBuf,
) -> bool {
    let head_bytes = MASK_BITS / 8;
    let stored = cx.store.store(NewSegment {
        stream: stream.clone(),
        number,
        stage,
        key_type,
        total_bits: composition.len_bits().unwrap_or(0),
        head_bytes,
        level: SecurityLevel::Qkd,
        kma_key_id,
        composition: Some(composition.clone()),
        key: bits.expose(),
    });
    match stored {
        Ok(()) => true,
        Err(error) => {
            cx.failed.get_or_insert(error);
            false
        }
    }
}
