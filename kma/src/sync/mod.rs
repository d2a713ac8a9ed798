//! Key synchronisation of one link (Y.3803 clause 8.2.1, steps 3 to 6).
//!
//! 1. *Announce*: each end tells which QKD-keys it holds and which it dropped.
//! 2. *Propose*: the end with the smaller ID composes a segment of a QKD-key that both hold.
//! 3. *Compare*: its tag goes out under mask bits of the segment; the answerer compares.
//! 4. *Answer*, once the answerer has stored the segment; *commit*, once the proposer has.
//!
//! Nothing is a KMA-key before both ends hold it (B-27); where they differ, both discard (B-26).

mod announce;
mod compare;
mod propose;

use std::collections::BTreeMap;

use qkd_keyfile::{
    Composition, Generation, KmaKeyId, LinkId, ModulePairId, NodeId, QkdKeyId, QkdKeyName,
    SegmentNumber, StreamId,
    metadata::{KeyType, SecurityLevel},
};
use qkd_secmem::KeyBuf;
use zeroize::Zeroizing;

use crate::{
    digest::{MASK_BITS, MASK_BYTES},
    io::{Alarm, Cx, FormattedSegment, LinkConfig, Settlement},
    record::Stage,
    store::NewSegment,
    vault::MAX_ROW_BYTES,
    wire::Propose,
};

pub(crate) use announce::Announcement;

use announce::Pair;
use propose::Proposal;

/// Shortest QKD-key that makes a segment: the masks and one byte.
const MIN_SEGMENT_BITS: u32 = MASK_BITS + 8;

/// The longest: what a row of the store takes.
const MAX_SEGMENT_BITS: u32 = 8 * (256 << 10);
const _: () = assert!(MAX_SEGMENT_BITS as usize <= 8 * MAX_ROW_BYTES);

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
    /// Proposer: the module pair whose turn it is.
    turn: usize,
    /// Proposer: waits for the pipeline, then for the answer.
    proposals: BTreeMap<SegmentNumber, Proposal>,
    /// Answerer: waits for the pipeline.
    comparing: BTreeMap<SegmentNumber, Propose>,
    /// Answerer: what was answered since this process began, to be said again.
    answers: BTreeMap<SegmentNumber, (KmaKeyId, Vec<u8>)>,
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
            turn: 0,
            proposals: BTreeMap::new(),
            comparing: BTreeMap::new(),
            answers: BTreeMap::new(),
            came_again: 0,
        }
    }

    /// The session is there: everything unsettled is said again.
    pub(crate) fn connected(&mut self) {
        self.connected = true;
        self.pairs.values_mut().for_each(Pair::connected);
    }

    pub(crate) fn disconnected(&mut self) {
        self.connected = false;
    }

    /// The peer's store was replaced: segments under comparison are void.
    pub(crate) fn peer_replaced(&mut self, cx: &mut Cx<'_>) {
        for proposal in std::mem::take(&mut self.proposals).into_values() {
            self.settle(cx, &proposal.composition, Settlement::Dropped);
        }
        for propose in std::mem::take(&mut self.comparing).into_values() {
            self.compose(&propose.composition, false);
        }
        self.answers.clear();
    }

    /// The peer is told of what waits of the new pair as after a connect: all of it, before segments.
    pub(crate) fn add_pair(&mut self, module_pair: ModulePairId) {
        self.pairs.entry(module_pair).or_default();
    }

    pub(crate) fn knows_pair(&self, module_pair: &ModulePairId) -> bool {
        self.pairs.contains_key(module_pair)
    }

    /// A QKD-key waits in the pipeline.
    pub(crate) fn held(&mut self, cx: &mut Cx<'_>, name: QkdKeyName, key_bits: u32) {
        let pair = self.pairs.get_mut(&name.module_pair);
        let Some(pair) = pair.filter(|_| name.generation == Generation::default()) else {
            return cx.settle(name, Settlement::Dropped);
        };
        if cx.store.is_used(&name) {
            // After a restart, hardware may deliver again what is settled already. A module that
            // numbers its QKD-keys anew looks alike, and loses them until generations are raised.
            self.came_again += 1;
            if self.came_again.is_power_of_two() {
                let times = self.came_again;
                tracing::warn!(qkd_key = %name, times, "an ID that came in before; dropped");
            }
            cx.settle(name, Settlement::Dropped);
        } else if !(MIN_SEGMENT_BITS..=MAX_SEGMENT_BITS).contains(&key_bits) {
            tracing::warn!(qkd_key = %name, key_bits, "too short or too long for a segment; dropped");
            drop_key(cx, &name.module_pair, name.id);
        } else {
            pair.hold(name.id, key_bits);
        }
    }

    /// The pipeline lost a QKD-key: the peer must not wait for it.
    pub(crate) fn lost(&mut self, cx: &mut Cx<'_>, name: &QkdKeyName) {
        if let Some(pair) = self.pairs.get_mut(&name.module_pair)
            && pair.drop_uncomposed(&name.id)
        {
            drop_key(cx, &name.module_pair, name.id.clone());
        }
    }

    /// Announces, proposes and repeats what is due.
    pub(crate) fn poll(&mut self, cx: &mut Cx<'_>) {
        if !self.connected {
            return;
        }
        for (name, pair) in &mut self.pairs {
            pair.poll(cx, &self.peer, name);
        }
        if self.proposer {
            self.propose(cx);
            self.repeat_proposals(cx);
        }
    }

    /// The peer's announcement.
    pub(crate) fn announced(
        &mut self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        announcement: Announcement<'_>,
    ) {
        match self.pairs.get_mut(module_pair) {
            Some(pair) => pair.announced(cx, module_pair, announcement),
            None => {
                tracing::warn!(peer = %self.peer, %module_pair, "announced a module pair that is not configured here");
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
        } else if let Some(propose) = self.comparing.remove(&number) {
            self.compare(cx, &propose, segment);
        }
    }

    /// Marks the QKD-keys of a composition as being in a segment under comparison, or not.
    fn compose(&mut self, composition: &Composition, composed: bool) {
        if let Some(pair) = self.pairs.get_mut(&composition.module_pair) {
            for piece in &composition.pieces {
                pair.compose(&piece.qkd_key, composed);
            }
        }
    }

    /// The QKD-keys of a composition are done with here.
    fn settle(&mut self, cx: &mut Cx<'_>, composition: &Composition, outcome: Settlement) {
        for name in names_of(composition) {
            if let Some(pair) = self.pairs.get_mut(&name.module_pair) {
                pair.forget(&name.id);
            }
            cx.settle(name, outcome);
        }
    }

    fn alarm_mismatch(&self, cx: &mut Cx<'_>, composition: &Composition) {
        let ids = composition.pieces.iter().map(|p| p.qkd_key.clone());
        cx.alarm(Alarm::Mismatch {
            peer: self.peer.clone(),
            module_pair: composition.module_pair.clone(),
            qkd_keys: ids.collect(),
        });
    }

    /// Stores a compared segment. Where there is no room, only this segment fails.
    fn store(&self, cx: &mut Cx<'_>, compared: &Compared<'_>) -> bool {
        let stored = cx.store.store(NewSegment {
            stream: self.stream.clone(),
            number: compared.number,
            stage: compared.stage,
            key_type: compared.key_type,
            total_bits: compared.composition.len_bits().unwrap_or(0),
            head_bytes: MASK_BITS / 8,
            level: SecurityLevel::Qkd,
            kma_key_id: compared.kma_key_id,
            composition: Some(compared.composition.clone()),
            key: compared.bits.expose(),
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
    bits: &'a KeyBuf,
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

fn drop_key(cx: &mut Cx<'_>, module_pair: &ModulePairId, id: QkdKeyId) {
    let name = name_of(module_pair, &id);
    cx.store.use_qkd_keys([name.clone()]);
    cx.settle(name, Settlement::Dropped);
}

/// The masks at the head of a segment, if it is long enough to have them.
fn masks_of(segment: &FormattedSegment) -> Option<Zeroizing<[u8; MASK_BYTES]>> {
    let (masks, body) = segment.bits.expose().split_first_chunk::<MASK_BYTES>()?;
    (!body.is_empty()).then(|| Zeroizing::new(*masks))
}
