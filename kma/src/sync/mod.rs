//! Key synchronisation of one link (Y.3803 clause 8.2.1, steps 3 to 6).
//!
//! 1. *Announce*: each end tells which QKD-keys it holds and which it dropped.
//! 2. *Propose*: the end with the smaller ID composes segments of QKD-keys that both hold.
//! 3. *Compare*: its tag goes out under mask bits of the segment; the answerer compares.
//! 4. *Answer*, once the answerer has stored the segment; *commit*, once the proposer has.
//!
//! Nothing is a KMA-key before both ends hold it (B-27). Where they differ, the segment is divided
//! until the QKD-key is found, and both discard it (B-26).

mod announce;
mod compare;
mod compose;
mod mismatch;
mod numbering;
mod pair;
mod propose;
mod standing;
mod suspect;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use bytes::Bytes;
use qkd_keyfile::{
    Composition, KmaKeyId, LinkId, ModulePairId, NodeId, QkdKeyId, QkdKeyName, SegmentNumber,
    StreamId,
    metadata::{KeyType, SecurityLevel},
};
use qkd_secmem::KeyBuf;
use zeroize::Zeroizing;

use crate::{
    digest::MASK_BYTES,
    io::{
        Alarm, Cx, FormatTicket, FormattedSegment, LinkConfig, Output, QuarantineReason, Settlement,
    },
    record::Stage,
    store::{NewSegment, Store},
    wire::DropReason,
};

pub(crate) use announce::Announcement;
pub use numbering::ModulePairStatus;

use compare::Comparing;
use mismatch::Division;
use pair::Pair;
use propose::Proposal;

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
    /// There is something to announce that need not wait for the next tick.
    pub(crate) has_news: bool,
    pairs: BTreeMap<ModulePairId, Pair>,
    /// Proposer: the module pair whose turn it is.
    turn: usize,
    /// Proposer: waits for the pipeline, then for the answer.
    proposals: BTreeMap<SegmentNumber, Proposal>,
    /// Proposer: segments that differed, by their number, of which parts are under comparison.
    divisions: BTreeMap<SegmentNumber, Division>,
    /// Answerer: waits for the pipeline.
    comparing: BTreeMap<SegmentNumber, Comparing>,
    /// Answerer: what was answered since this process began, to be said again.
    answers: BTreeMap<SegmentNumber, (KmaKeyId, Bytes)>,
    /// Orders to the pipeline so far.
    orders: u64,
    /// QKD-keys whose IDs had come in before.
    came_again: u64,
}

impl LinkSync {
    pub(crate) fn new(
        me: &NodeId,
        peer: &NodeId,
        link: LinkId,
        config: LinkConfig,
        unit_bytes: u32,
        store: &Store,
    ) -> Self {
        let pairs = config.module_pairs.iter();
        let pairs = pairs.map(|name| (name.clone(), fresh_pair(store, name)));
        let pairs = pairs.collect();
        Self {
            peer: peer.clone(),
            stream: StreamId::Link(link.clone()),
            proposer: link.proposer() == me,
            link,
            config,
            unit_bytes,
            connected: false,
            has_news: false,
            pairs,
            turn: 0,
            proposals: BTreeMap::new(),
            divisions: BTreeMap::new(),
            comparing: BTreeMap::new(),
            answers: BTreeMap::new(),
            orders: 0,
            came_again: 0,
        }
    }

    /// The session is there: everything unsettled is said again.
    pub(crate) fn connected(&mut self, cx: &Cx<'_>) {
        self.connected = true;
        let now = cx.now.mono;
        self.pairs.values_mut().for_each(|pair| {
            pair.connected(now);
            pair.standing.told = None;
        });
    }

    pub(crate) fn disconnected(&mut self) {
        self.connected = false;
    }

    /// The peer's store was replaced: segments under comparison are void.
    pub(crate) fn peer_replaced(&mut self, cx: &mut Cx<'_>) {
        for proposal in std::mem::take(&mut self.proposals).into_values() {
            self.give_up(cx, &proposal.composition);
        }
        for comparing in std::mem::take(&mut self.comparing).into_values() {
            let composition = comparing.propose.composition;
            self.with_pair(&composition.module_pair, |pair| {
                pair.release(cx.now.mono, &composition.pieces);
            });
        }
        self.divisions.clear();
        self.answers.clear();
    }

    /// The peer is told of what waits of the new pair as after a connect: all of it, before segments.
    pub(crate) fn add_pair(&mut self, cx: &mut Cx<'_>, module_pair: ModulePairId) {
        let fresh = || fresh_pair(cx.store, &module_pair);
        self.pairs.entry(module_pair.clone()).or_insert_with(fresh);
        self.has_news = true;
        numbering::say(cx, &module_pair);
    }

    pub(crate) fn knows_pair(&self, module_pair: &ModulePairId) -> bool {
        self.pairs.contains_key(module_pair)
    }

    /// A QKD-key waits in the pipeline.
    pub(crate) fn held(&mut self, cx: &mut Cx<'_>, name: QkdKeyName, key_bits: u32) {
        let generation = cx.store.generation(&name.module_pair);
        let Some(pair) = self.pairs.get_mut(&name.module_pair) else {
            return cx.settle(name, Settlement::Dropped);
        };
        if name.generation != generation {
            return cx.settle(name, Settlement::Dropped);
        }
        if pair.standing.wants_generation.is_some() {
            // It is of the numbering that is about to begin, or of the one that ended.
            return cx.settle(name, Settlement::Dropped);
        }
        let stopped = cx.store.stopped(&name.module_pair);
        if stopped.or(pair.standing.peer_stopped).is_some() || key_bits == 0 {
            return drop_key(cx, name, Settlement::Dropped);
        }
        if cx.store.is_used(&name) {
            return self.came_again(cx, name);
        }
        pair.standing.again = 0;
        pair.hold(cx.now.mono, name.id, key_bits);
        self.has_news = true;
    }

    /// The pipeline lost a QKD-key: the peer must not wait for it.
    pub(crate) fn lost(&mut self, cx: &mut Cx<'_>, name: &QkdKeyName) {
        if name.generation == cx.store.generation(&name.module_pair)
            && self.pairs.contains_key(&name.module_pair)
        {
            self.drop_free(cx, &name.module_pair, &name.id, DropReason::Gone);
        }
    }

    /// The pipeline refused a QKD-key. One that is settled already was only delivered again.
    pub(crate) fn quarantined(
        &mut self,
        cx: &mut Cx<'_>,
        name: QkdKeyName,
        reason: QuarantineReason,
    ) {
        let known = self.pairs.get(&name.module_pair);
        if known.is_none_or(|pair| pair.held.contains_key(&name.id)) || cx.store.is_used(&name) {
            return cx.settle(name, Settlement::Dropped);
        }
        self.with_pair(&name.module_pair, |pair| {
            pair.tell_dropped(name.id.clone(), DropReason::Quarantined(reason));
        });
        self.has_news = true;
        self.alarm_quarantined(cx, &name, reason, false);
        drop_key(cx, name, Settlement::Quarantined);
    }

    /// Announces, proposes and repeats what is due.
    pub(crate) fn poll(&mut self, cx: &mut Cx<'_>) {
        self.has_news = false;
        if !self.connected {
            return;
        }
        self.tell_standings(cx);
        self.announce_all(cx);
        if self.proposer {
            self.propose(cx);
            self.repeat_proposals(cx);
        }
    }

    /// The pipeline made a segment, at the proposer or at the answerer.
    pub(crate) fn formatted(
        &mut self,
        cx: &mut Cx<'_>,
        ticket: &FormatTicket,
        segment: Option<FormattedSegment>,
    ) {
        let number = ticket.segment;
        if self.proposer {
            return self.formatted_proposal(cx, ticket, segment);
        }
        let ordered = self.comparing.get(&number);
        if ordered.is_some_and(|comparing| comparing.order == ticket.order)
            && let Some(comparing) = self.comparing.remove(&number)
        {
            self.compare(cx, &comparing.propose, segment);
        }
    }

    /// Orders a segment of the pipeline; the order's number.
    fn order(
        &mut self,
        cx: &mut Cx<'_>,
        segment: SegmentNumber,
        composition: &Composition,
        unit_bytes: u32,
    ) -> u64 {
        self.orders += 1;
        cx.out.push(Output::Format {
            ticket: FormatTicket {
                peer: self.peer.clone(),
                segment,
                order: self.orders,
            },
            composition: composition.clone(),
            unit_bytes,
        });
        self.orders
    }

    fn with_pair<R>(
        &mut self,
        module_pair: &ModulePairId,
        work: impl FnOnce(&mut Pair) -> R,
    ) -> Option<R> {
        self.pairs.get_mut(module_pair).map(work)
    }

    /// A comparison is over: its QKD-keys are settled as far as nothing of them is left.
    fn close(&mut self, cx: &mut Cx<'_>, composition: &Composition, stored: bool) {
        self.with_pair(&composition.module_pair, |pair| {
            pair.conclude(&composition.pieces, stored);
        });
        self.settle_finished(cx, composition);
    }

    /// The QKD-keys of a composition go whole.
    fn give_up(&mut self, cx: &mut Cx<'_>, composition: &Composition) {
        cx.store.use_qkd_keys(names_of(composition));
        self.with_pair(&composition.module_pair, |pair| {
            pair.conclude(&composition.pieces, false);
            for id in compose::names_of(&composition.pieces) {
                pair.drop_rest(cx.now.mono, &id, false);
            }
        });
        self.settle_finished(cx, composition);
    }

    fn settle_finished(&mut self, cx: &mut Cx<'_>, composition: &Composition) {
        let ids = compose::names_of(&composition.pieces);
        let finished = self.with_pair(&composition.module_pair, |pair| pair.finish(&ids));
        for (id, outcome) in finished.into_iter().flatten() {
            let name = QkdKeyName {
                module_pair: composition.module_pair.clone(),
                generation: composition.generation,
                id,
            };
            cx.settle(name, outcome);
        }
    }

    /// What is free of a QKD-key is given up, and the peer is told.
    fn drop_free(
        &mut self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        id: &QkdKeyId,
        reason: DropReason,
    ) {
        let quarantine = matches!(reason, DropReason::Quarantined(_));
        let dropped = self.with_pair(module_pair, |pair| {
            let dropped = pair.drop_rest(cx.now.mono, id, quarantine);
            if dropped {
                pair.tell_dropped(id.clone(), reason);
            }
            dropped
        });
        if dropped == Some(true) {
            self.has_news = true;
            self.settle_dropped(cx, module_pair, id);
        }
    }

    /// A QKD-key of which nothing is free: recorded, and settled unless it is under comparison.
    fn settle_dropped(&mut self, cx: &mut Cx<'_>, module_pair: &ModulePairId, id: &QkdKeyId) {
        let name = name_of(cx, module_pair, id);
        cx.store.use_qkd_keys([name.clone()]);
        let finished = self.with_pair(module_pair, |pair| pair.finish([id]));
        for (_, outcome) in finished.into_iter().flatten() {
            cx.settle(name.clone(), outcome);
        }
    }

    /// One alarm for each would be a flood where a module is broken: at 1, 2, 4, 8 …
    fn alarm_quarantined(
        &mut self,
        cx: &mut Cx<'_>,
        name: &QkdKeyName,
        reason: QuarantineReason,
        at_peer: bool,
    ) {
        let count = self.with_pair(&name.module_pair, |pair| {
            pair.standing.quarantined += 1;
            pair.standing.quarantined
        });
        if count.is_some_and(u64::is_power_of_two) {
            cx.alarm(Alarm::Quarantined {
                peer: self.peer.clone(),
                module_pair: name.module_pair.clone(),
                qkd_key: name.id.clone(),
                reason,
                at_peer,
            });
        }
    }

    /// Stores a compared segment. Where there is no room, only this segment fails.
    fn store(&self, cx: &mut Cx<'_>, compared: Compared<'_>) -> bool {
        let stored = cx.store.store(NewSegment {
            stream: self.stream.clone(),
            number: compared.number,
            stage: compared.stage,
            key_type: compared.key_type,
            total_bits: compared.composition.len_bits().unwrap_or(0),
            head_bytes: crate::digest::MASK_BITS / 8,
            level: SecurityLevel::Qkd,
            kma_key_id: compared.kma_key_id,
            composition: Some(compared.composition.clone()),
            key: compared.bits,
            relayed: None,
        });
        if let Err(error) = stored {
            tracing::error!(%error, "segment cannot be stored");
            cx.fail_if_final(error);
            return false;
        }
        true
    }
}

/// A segment that is equal at both ends.
struct Compared<'a> {
    number: SegmentNumber,
    stage: Stage,
    key_type: KeyType,
    kma_key_id: KmaKeyId,
    composition: &'a Composition,
    bits: KeyBuf,
}

fn fresh_pair(store: &Store, module_pair: &ModulePairId) -> Pair {
    let mut pair = Pair::default();
    if let Some(numbering) = store.numbering(module_pair) {
        pair.standing.before = numbering.used.numbers_only();
    }
    pair
}

/// The name of a QKD-key that comes in now.
fn name_of(cx: &Cx<'_>, module_pair: &ModulePairId, id: &QkdKeyId) -> QkdKeyName {
    QkdKeyName {
        module_pair: module_pair.clone(),
        generation: cx.store.generation(module_pair),
        id: id.clone(),
    }
}

fn names_of(composition: &Composition) -> Vec<QkdKeyName> {
    let ids = compose::names_of(&composition.pieces).into_iter();
    ids.map(|id| QkdKeyName {
        module_pair: composition.module_pair.clone(),
        generation: composition.generation,
        id,
    })
    .collect()
}

/// A QKD-key that is not held never comes in again.
fn drop_key(cx: &mut Cx<'_>, name: QkdKeyName, outcome: Settlement) {
    cx.store.use_qkd_keys([name.clone()]);
    cx.settle(name, outcome);
}

/// The masks at the head of a segment, if it is long enough to have them.
fn masks_of(segment: &FormattedSegment) -> Option<Zeroizing<[u8; MASK_BYTES]>> {
    let (masks, body) = segment.bits.expose().split_first_chunk::<MASK_BYTES>()?;
    (!body.is_empty()).then(|| Zeroizing::new(*masks))
}
