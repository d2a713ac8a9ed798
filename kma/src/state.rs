//! What the records add up to.
//!
//! [`State::apply`] is the only code that changes durable state. It trusts its records (the journal
//! is checked when it is read, and the store checks before it records); a record that does not fit
//! is counted in [`State::inconsistencies`], which stays 0.

mod fold;

use std::collections::{BTreeMap, BTreeSet};

use qkd_keyfile::{
    AppId, KsaKeyId, ModulePairId, NodeId, SegmentNumber, StreamId, UnixTime, address::Generation,
    metadata::RelayedKeyMetadata,
};
use serde::{Deserialize, Serialize};

use crate::{
    record::{Binding, BurnReason, DiscardReason, Purpose, Record, RelayedWay, Stage, StopReason},
    session::LastSessions,
    stream::{Segment, Stream},
    used::UsedIds,
    vault::{RowId, SealTag},
};

/// The durable state of a KMA.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) streams: BTreeMap<StreamId, Stream>,
    pub(crate) peers: BTreeMap<NodeId, Peer>,
    /// Bindings received and not yet done with. By the node that made them too: no node can get in
    /// the way of another's key IDs.
    pub(crate) received: BTreeMap<(NodeId, KsaKeyId), ReceivedBinding>,
    pub(crate) numberings: BTreeMap<ModulePairId, Numbering>,
    /// How units came that wait here for their release.
    pub(crate) ways: BTreeMap<StreamId, BTreeMap<SegmentNumber, RelayedWay>>,
    /// The next row that was never used.
    pub(crate) next_row: u64,
    /// Version of the records.
    pub(crate) schema: u32,
    /// The time of the last record.
    pub(crate) unix: UnixTime,
    /// The age clock: seconds that the store has lived.
    pub(crate) age_seconds: u64,
    /// Rows of closed segments that policy keeps, and until when they were needed, by the age clock.
    pub(crate) preserved: BTreeMap<RowId, PreservedRow>,
    /// What an operator calls applications.
    pub(crate) names: BTreeMap<AppId, String>,
    /// How often the rows were lost while the journal stayed.
    pub(crate) emptied: u64,
    /// Bindings dropped because more came than are kept.
    pub(crate) forgotten_bindings: u64,
    /// Records that did not fit what came before them.
    pub(crate) inconsistencies: u64,
    /// Module pairs that are stopped here, and why. A compaction writes the records again: in a
    /// snapshot they would be one more thing that an older one lacks.
    #[serde(skip)]
    pub(crate) stopped: BTreeMap<ModulePairId, StopReason>,
    /// Rows of segments that ended, for the store to erase.
    #[serde(skip)]
    pub(crate) freed: Vec<RowId>,
}

/// The row of a segment that is closed and preserved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PreservedRow {
    pub(crate) seal: SealTag,
    pub(crate) len_bytes: u32,
    pub(crate) closed_at_seconds: u64,
}

/// The life of a module pair's numbering.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Numbering {
    pub(crate) generation: Generation,
    /// The last generation that began with a numbering of its own.
    pub(crate) anew: Generation,
    /// What this end's module says of itself.
    pub(crate) session: Option<u64>,
    /// IDs that came in, in this generation.
    pub(crate) used: UsedIds,
}

/// What is known about another KMA.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Peer {
    /// Its store's incarnation, once it has told.
    pub(crate) incarnation: Option<u64>,
    pub(crate) sessions: LastSessions,
    /// Bindings that it has not acknowledged, by sequence.
    pub(crate) outbox: BTreeMap<u64, Binding>,
    /// Bindings made for it so far.
    pub(crate) bindings_sent: u64,
    /// Bindings received from it so far.
    pub(crate) bindings_received: u64,
    /// Those of its bindings that are not done with, in the order they came.
    pub(crate) undelivered: BTreeMap<u64, KsaKeyId>,
    /// Segments ceded to it, by sequence, that it has not acknowledged.
    pub(crate) ceded: BTreeMap<u64, (StreamId, SegmentNumber)>,
    /// Segments ceded to it so far.
    pub(crate) cessions_sent: u64,
    /// Segments acquired from it so far.
    pub(crate) cessions_received: u64,
}

/// A binding of another KMA's.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReceivedBinding {
    pub(crate) sequence: u64,
    pub(crate) binding: Binding,
    pub(crate) delivered: BTreeSet<AppId>,
}

impl State {
    /// Folds one record in.
    pub(crate) fn apply(&mut self, record: &Record) {
        if self.fold(record).is_none() {
            self.inconsistencies += 1;
        }
    }

    pub(crate) fn stream_mut(&mut self, id: &StreamId) -> &mut Stream {
        if !self.streams.contains_key(id) {
            self.streams.insert(id.clone(), Stream::default());
        }
        self.streams.get_mut(id).expect("was just inserted")
    }

    fn numbering_mut(&mut self, module_pair: &ModulePairId) -> &mut Numbering {
        if !self.numberings.contains_key(module_pair) {
            let fresh = Numbering::default();
            self.numberings.insert(module_pair.clone(), fresh);
        }
        let numbering = self.numberings.get_mut(module_pair);
        numbering.expect("was just inserted")
    }

    pub(crate) fn segment(&self, stream: &StreamId, number: SegmentNumber) -> Option<&Segment> {
        self.streams.get(stream)?.segments.get(&number)
    }

    /// A peer whose store was made anew shares nothing with us any more.
    fn peer_store(&mut self, name: &NodeId, incarnation: u64) -> Option<()> {
        let known = self.peers.get(name).and_then(|peer| peer.incarnation);
        if known.is_some_and(|known| known != incarnation) {
            self.void(name);
        }
        self.peers.entry(name.clone()).or_default().incarnation = Some(incarnation);
        Some(())
    }

    /// Nothing is shared with anyone any more; peers will see a store they do not know.
    fn emptied(&mut self) -> Option<()> {
        self.emptied += 1;
        for name in self.peers.keys().cloned().collect::<Vec<_>>() {
            let incarnation = self.peers.get(&name).and_then(|peer| peer.incarnation);
            self.void(&name);
            self.peers.entry(name).or_default().incarnation = incarnation;
        }
        Some(())
    }

    /// Ends all that is shared with a peer. Segment numbers go on: none is given out twice.
    fn void(&mut self, name: &NodeId) {
        self.peers.remove(name);
        self.received.retain(|(source, _), _| source != name);
        for (id, stream) in &mut self.streams {
            // One of the two ends is this node's, so a stream that has the peer at one end is ours
            // with it.
            if id.peer_of(name).is_none() {
                continue;
            }
            stream.proposed.clear();
            self.ways.remove(id);
            for number in stream.segments.keys().copied().collect::<Vec<_>>() {
                let ended = stream.end(number, BurnReason::PeerStoreReplaced);
                self.freed
                    .extend(ended.iter().flat_map(|segment| segment.rows()));
            }
        }
    }

    fn discarded(
        &mut self,
        id: &StreamId,
        number: SegmentNumber,
        reason: DiscardReason,
    ) -> Option<()> {
        let stream = self.stream_mut(id);
        let was_proposed = stream.proposed.remove(&number);
        match reason {
            DiscardReason::Mismatch => stream.accounts.mismatched_segments += 1,
            _ => stream.accounts.discarded_segments += 1,
        }
        let was_stored = stream.segments.contains_key(&number);
        if was_stored {
            self.end(id, number, BurnReason::Closed)?;
        }
        (was_stored || was_proposed || reason == DiscardReason::Mismatch).then_some(())
    }

    /// Ends a segment, and with it what is bound to its bits.
    fn end(&mut self, id: &StreamId, number: SegmentNumber, reason: BurnReason) -> Option<()> {
        let segment = self.streams.get_mut(id)?.end(number, reason)?;
        self.freed.extend(segment.rows());
        if let Some(ways) = self.ways.get_mut(id) {
            ways.remove(&number);
        }
        if segment.bindings > 0 {
            self.unbind(id, number);
        }
        Some(())
    }

    /// A unit's completion may have to be said again until it is released: it covers the way.
    fn way(&mut self, id: &StreamId, number: SegmentNumber, way: Option<&RelayedKeyMetadata>) {
        let waits = self
            .segment(id, number)
            .is_some_and(|segment| segment.stage == Stage::Answered);
        if let Some(way) = way.filter(|_| waits) {
            let ways = self.ways.entry(id.clone()).or_default();
            ways.insert(number, way.into());
        }
    }

    /// Forgets received bindings into a segment.
    fn unbind(&mut self, id: &StreamId, number: SegmentNumber) -> i32 {
        let before = self.received.len();
        self.received.retain(|(source, _), received| {
            let binding = &received.binding;
            let ends = binding.stream == *id && binding.span.segment == number;
            if ends && let Some(peer) = self.peers.get_mut(source) {
                peer.undelivered.remove(&received.sequence);
            }
            !ends
        });
        i32::try_from(before - self.received.len()).unwrap_or(i32::MAX)
    }

    fn suspected(&mut self, id: &StreamId, number: SegmentNumber) -> Option<()> {
        let rows = self.streams.get_mut(id)?.suspect(number)?;
        self.freed.extend(rows);
        // Every received binding is looked at for it.
        if self.segment(id, number)?.bindings == 0 {
            return Some(());
        }
        let unbound = self.unbind(id, number);
        self.streams.get_mut(id)?.bind(number, -unbound)
    }

    /// Ends a segment that is done with, and keeps its row.
    fn preserved(&mut self, id: &StreamId, number: SegmentNumber) -> Option<()> {
        let stream = self.streams.get_mut(id)?;
        let segment = stream.end(number, BurnReason::Closed)?;
        let row = PreservedRow {
            seal: segment.seal,
            len_bytes: segment.len_bytes,
            closed_at_seconds: self.age_seconds,
        };
        self.preserved.insert(segment.row, row);
        self.freed
            .extend(segment.rows().filter(|row| *row != segment.row));
        Some(())
    }

    fn bound(&mut self, destination: &NodeId, sequence: u64, binding: &Binding) -> Option<()> {
        self.streams
            .get_mut(&binding.stream)?
            .bind(binding.span.segment, 1)?;
        let peer = self.peers.entry(destination.clone()).or_default();
        peer.bindings_sent = sequence.checked_add(1)?;
        peer.outbox.insert(sequence, binding.clone());
        Some(())
    }

    fn bindings_acknowledged(&mut self, destination: &NodeId, through: u64) -> Option<()> {
        let peer = self.peers.get_mut(destination)?;
        let kept = peer.outbox.split_off(&through.checked_add(1)?);
        let done = std::mem::replace(&mut peer.outbox, kept);
        for binding in done.into_values() {
            self.streams
                .get_mut(&binding.stream)?
                .bind(binding.span.segment, -1)?;
        }
        Some(())
    }

    fn binding_received(
        &mut self,
        source: &NodeId,
        sequence: u64,
        binding: &Binding,
    ) -> Option<()> {
        let stream = self.streams.get_mut(&binding.stream)?;
        stream.followed(binding.span, Purpose::Supply)?;
        stream.bind(binding.span.segment, 1)?;
        let peer = self.peers.entry(source.clone()).or_default();
        peer.bindings_received = sequence.checked_add(1)?;
        peer.undelivered.insert(sequence, binding.key_id);
        let received = ReceivedBinding {
            sequence,
            binding: binding.clone(),
            delivered: BTreeSet::new(),
        };
        self.received
            .insert((source.clone(), binding.key_id), received);
        Some(())
    }

    fn delivered(&mut self, source: &NodeId, key_id: KsaKeyId, application: &AppId) -> Option<()> {
        let received = self.received.get_mut(&(source.clone(), key_id))?;
        received.delivered.insert(application.clone());
        let delivered = &received.delivered;
        let mut applications = received.binding.applications.iter();
        if applications.all(|application| delivered.contains(application)) {
            self.done_with(source, key_id)?;
        }
        Some(())
    }

    /// A received binding needs its bytes no more.
    fn done_with(&mut self, source: &NodeId, key_id: KsaKeyId) -> Option<()> {
        let received = self.received.remove(&(source.clone(), key_id))?;
        if let Some(peer) = self.peers.get_mut(source) {
            peer.undelivered.remove(&received.sequence);
        }
        let binding = received.binding;
        self.streams
            .get_mut(&binding.stream)?
            .bind(binding.span.segment, -1)
    }
}
