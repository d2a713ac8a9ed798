//! The ledger's records: every change to what this node knows about its key bits.
//!
//! The durable state of the KMA is the fold of these records ([`State::apply`](crate::state::State)),
//! while it runs as after a restart: there is no second way to change it. No record holds a key bit
//! or a hash of one; the ledgers of both ends of a stream, read together, prove that no range of it
//! was used twice.

use qkd_keyfile::{
    AppId, Composition, KeySpan, KmaKeyId, KsaKeyId, ModulePairId, NodeId, QkdKeyId, SegmentNumber,
    StreamId, UnixTime,
    address::Generation,
    metadata::{
        KeyType, QkdKeyMetadata, RelayEncryption, RelayHop, RelayedKeyMetadata, SecurityLevel,
    },
};
use serde::{Deserialize, Serialize};

use crate::vault::{RowId, SealTag};

/// One change. Quantities in bytes count usable key of a segment unless the name says bits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// A process took over the store.
    Boot {
        /// Drawn at random by the process.
        boot: [u8; 16],
    },
    /// The rows ended with an earlier process, as those of a store in memory do: what was shared
    /// with anyone is void, and the store counts as a new one.
    Emptied,
    /// The matching KMA's store has this incarnation from now on; what was shared with an earlier
    /// one is void.
    PeerStore {
        /// The matching KMA.
        peer: NodeId,
        /// Its store's incarnation.
        incarnation: u64,
    },
    /// These QKD-keys are gone: they entered a composition or were dropped. An ID comes in once.
    QkdKeysUsed {
        /// The module pair that made them.
        module_pair: ModulePairId,
        /// The life of its numbering.
        generation: Generation,
        /// The IDs.
        ids: Vec<QkdKeyId>,
    },
    /// A segment number was given out, and its mask bits are burned: its tag may leave.
    Proposed {
        /// The stream that it will belong to.
        stream: StreamId,
        /// Its number.
        segment: SegmentNumber,
        /// What it is made of; none for a relayed unit.
        composition: Option<Composition>,
    },
    /// A segment's bits are in the store.
    Stored {
        /// Its stream.
        stream: StreamId,
        /// Its number.
        segment: SegmentNumber,
        /// Everything else about it.
        body: StoredSegment,
    },
    /// The matching KMA has the segment too: its bits may be used.
    Confirmed {
        /// Its stream.
        stream: StreamId,
        /// Its number.
        segment: SegmentNumber,
    },
    /// The segment is void; none of its bits was or will be used.
    Discarded {
        /// Its stream.
        stream: StreamId,
        /// Its number.
        segment: SegmentNumber,
        /// Why.
        reason: DiscardReason,
    },
    /// The owner took bits: its durable mark moves to the end of the span before a byte is used.
    Taken {
        /// The stream.
        stream: StreamId,
        /// The bits; they begin at the mark.
        span: KeySpan,
        /// What for.
        purpose: Purpose,
    },
    /// The end that does not own the bits used or burned them, as the owner named them.
    Followed {
        /// The stream.
        stream: StreamId,
        /// The bits.
        span: KeySpan,
        /// What for.
        purpose: Purpose,
    },
    /// The owner bound bits to a key ID (with the [`Record::Taken`] before it, one durable step).
    Bound {
        /// The KMA that must learn of it.
        destination: NodeId,
        /// Counts the bindings to that KMA.
        sequence: u64,
        /// The binding.
        binding: Binding,
    },
    /// The destination has every binding up to this one.
    BindingsAcknowledged {
        /// The KMA.
        destination: NodeId,
        /// The last sequence it has.
        through: u64,
    },
    /// A binding of another KMA, received.
    BindingReceived {
        /// The owner's KMA.
        source: NodeId,
        /// Its sequence.
        sequence: u64,
        /// The binding.
        binding: Binding,
    },
    /// A bound key is about to leave to an application; it never leaves to it again.
    Delivered {
        /// The owner's KMA.
        source: NodeId,
        /// The key.
        key_id: KsaKeyId,
        /// The application.
        application: AppId,
    },
    /// A received binding that no application fetched made room for later ones.
    Forgotten {
        /// The owner's KMA.
        source: NodeId,
        /// The key.
        key_id: KsaKeyId,
    },
    /// Both ends are done with the segment; its row is erased.
    Closed {
        /// Its stream.
        stream: StreamId,
        /// Its number.
        segment: SegmentNumber,
    },
    /// A part of everything that the records before added up to; the parts stand first in a journal
    /// that was compacted.
    Snapshot {
        /// Parts that follow this one.
        more: u32,
        /// This part of the encoded state.
        part: Vec<u8>,
    },

    // Life cycle (Y.3803 clause 8.2.6): what happened when, and what came of what. Where nothing else
    // is said these change no state.
    /// Version of the records from here on; first in a journal. A newer one is not opened.
    Schema {
        /// The version.
        version: u32,
    },
    /// What follows happened then.
    Time {
        /// By a clock that may be wrong.
        unix: UnixTime,
        /// By the age clock, which no jump of the other can move far: seconds that this store has
        /// lived. Only expiry and retention go by it.
        age_seconds: u64,
    },
    /// A QKD-key came from its module. Durable with the first change that rests on it, not before.
    Received {
        /// The module pair that made it.
        module_pair: ModulePairId,
        /// The life of its numbering.
        generation: Generation,
        /// Its length.
        key_bits: u32,
        /// What its module said of it; the hash is withheld.
        metadata: QkdKeyMetadata,
    },
    /// What else is known about a segment that was just stored.
    Described {
        /// Its stream.
        stream: StreamId,
        /// Its number.
        segment: SegmentNumber,
        /// What modules said about its QKD-keys; hashes are withheld.
        qkd_keys: Vec<QkdKeyMetadata>,
        /// How it came here, if it was relayed; the hash is withheld.
        relayed: Option<Box<RelayedKeyMetadata>>,
        /// Where the hashes that modules gave are sealed; gone with the segment.
        hashes: Option<SealedRow>,
    },
    /// A unit went over one hop, under this pad: sent or accepted, as the pad was taken or followed.
    Carried {
        /// The unit's stream, from source to destination.
        unit_stream: StreamId,
        /// The unit's number in it.
        unit: SegmentNumber,
        /// The link that the pad is from.
        stream: StreamId,
        /// The pad, tags and hash key included.
        pad: Vec<KeySpan>,
        /// How it was encrypted.
        encryption: RelayEncryption,
    },
    /// Nothing is used towards this KMA or taken from it any more.
    Quarantined {
        /// The KMA.
        peer: NodeId,
    },
    /// A segment is suspected to be known to others: its row is erased, no key of it is given out, its
    /// owner burns what is left, and the matching KMA is told.
    Suspected {
        /// Its stream.
        stream: StreamId,
        /// Its number.
        segment: SegmentNumber,
    },
    /// As [`Record::Closed`], but the row is kept for as long as policy says. Nothing reads it.
    Preserved {
        /// The segment's stream.
        stream: StreamId,
        /// Its number.
        segment: SegmentNumber,
    },
    /// A preserved row is erased.
    Deleted {
        /// The row.
        row: RowId,
    },
    /// What an operator calls an application.
    ApplicationNamed {
        /// The application.
        application: AppId,
        /// Its name.
        name: String,
    },
    /// A record of an archived journal about a segment that is still in stock, kept by a compaction.
    History {
        /// When it was recorded.
        unix: UnixTime,
        /// The record.
        record: Box<Self>,
    },

    // Key synchronisation.
    /// A module pair's QKD-keys have this generation from now on; those of an earlier one never come
    /// in any more.
    Numbering {
        /// The module pair.
        module_pair: ModulePairId,
        /// The generation.
        generation: Generation,
        /// The last generation in which the module pair began to number anew: IDs used before it
        /// may come in.
        anew: Generation,
        /// What this end's module says of itself, if it tells: another one means that it numbers
        /// anew.
        session: Option<u64>,
    },

    // Link sessions.
    /// A link session begins: no bit is used in it before [`Record::SessionAgreed`]. One that was not
    /// agreed makes room for it.
    SessionBegun {
        /// The matching KMA.
        peer: NodeId,
        /// The session.
        session: u64,
    },
    /// The matching KMA's ledger has the session too.
    SessionAgreed {
        /// The matching KMA.
        peer: NodeId,
        /// The session.
        session: u64,
    },

    // Ownership.
    /// This end gave a whole segment, of which it used nothing, to the other: it follows from now on.
    Ceded {
        /// The matching KMA, which must learn of it.
        to: NodeId,
        /// Counts the cessions to that KMA.
        sequence: u64,
        /// The stream.
        stream: StreamId,
        /// The segment.
        segment: SegmentNumber,
    },
    /// The other end ceded a segment: this end owns it from now on.
    Acquired {
        /// The matching KMA.
        from: NodeId,
        /// Its sequence.
        sequence: u64,
        /// The stream.
        stream: StreamId,
        /// The segment.
        segment: SegmentNumber,
    },
    /// The other end has acquired everything that was ceded to it up to this one.
    CessionsAcknowledged {
        /// The matching KMA.
        to: NodeId,
        /// The last sequence it has.
        through: u64,
    },

    // What an operator, or too many mismatches, did to module pairs.
    /// This end takes no QKD-key of a module pair any more, until it is started; a restart of the
    /// node does not do that.
    ModulePairStopped {
        /// The module pair.
        module_pair: ModulePairId,
        /// Why.
        reason: StopReason,
    },
    /// An operator has started a module pair that was stopped here.
    ModulePairStarted {
        /// The module pair.
        module_pair: ModulePairId,
    },
}

/// Why a module pair was stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StopReason {
    /// Too many of its QKD-keys differed.
    Mismatches,
    /// An operator stopped it.
    Operator,
}

/// A row of sealed bytes that are no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedRow {
    /// Where it is.
    pub row: RowId,
    /// Proves that its bytes are those stored.
    pub seal: SealTag,
    /// Its length.
    pub len_bytes: u32,
}

/// A segment as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredSegment {
    /// Whether its bits may be used already.
    pub stage: Stage,
    /// Encrypting: this end owns it.
    pub key_type: KeyType,
    /// All bits that went into it: usable ones, masks, spare bits.
    pub total_bits: u32,
    /// Bytes stored.
    pub len_bytes: u32,
    /// Bytes at its head that are never taken (an end-to-end unit's check bits).
    pub head_bytes: u32,
    /// Weakest level of its bits and of its way here.
    pub level: SecurityLevel,
    /// Equal at both ends.
    pub kma_key_id: KmaKeyId,
    /// What it is made of; none for a relayed unit.
    pub composition: Option<Composition>,
    /// Where its bits are.
    pub row: RowId,
    /// Proves that the row's bytes are those stored.
    pub seal: SealTag,
}

/// The way of a relayed unit, hop by hop, with the encryption method of each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayedWay {
    /// The weakest level of the bits that it was made of, and of all that was done to it.
    pub level: SecurityLevel,
    /// The hops, in order of the route.
    pub hops: Vec<RelayHop>,
}

impl From<&RelayedKeyMetadata> for RelayedWay {
    fn from(metadata: &RelayedKeyMetadata) -> Self {
        Self {
            level: metadata.level,
            hops: metadata.hops.clone(),
        }
    }
}

impl RelayedWay {
    /// The way of a unit that has not left yet.
    #[must_use]
    pub const fn of_level(level: SecurityLevel) -> Self {
        let hops = Vec::new();
        Self { level, hops }
    }

    /// One hop more; the level falls to that of its method. (An XOR with equally long independent
    /// bits weakens nothing.)
    #[must_use]
    pub fn then(mut self, hop: RelayHop) -> Self {
        self.level = self.level.min(hop.encryption.level());
        self.hops.push(hop);
        self
    }

    /// The weakest level over origin, every hop's method and every combination, whatever is claimed.
    #[must_use]
    pub fn weakest(&self) -> SecurityLevel {
        let hops = self.hops.iter().map(|hop| hop.encryption.level());
        hops.fold(self.level, SecurityLevel::min)
    }
}

/// How far a stored segment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// This end holds it and has said so; the other end has yet to confirm.
    Answered,
    /// Both ends hold it.
    Confirmed,
}

/// What bits were used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Purpose {
    /// One-time pad or authentication of a relay hop.
    Pad,
    /// A key for applications.
    Supply,
    /// Reserved for the relay of one unit (by its KMA-key ID): the bits leave the pad pool at both
    /// ends, and enter no ciphertext but the one that the relay's scheme names. If the relay is
    /// aborted, they are of no use any more.
    Relay(KmaKeyId),
    /// Nothing: burned.
    Burn(BurnReason),
}

/// Why bits were burned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum BurnReason {
    /// The rest of a segment was shorter than the key asked for.
    Remainder,
    /// Taken by a process of the owner that ended before the other end saw a use.
    DeadLease,
    /// The owner closed the segment.
    Closed,
    /// The matching KMA's store was replaced.
    PeerStoreReplaced,
    /// The store cannot read it any more.
    Unreadable,
    /// It was in stock for longer than policy allows.
    Expired,
    /// Others may know it.
    Suspected,
}

/// Why a segment was discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum DiscardReason {
    /// The two ends hold different bits.
    Mismatch,
    /// The two ends hold different bits; its parts are compared one by one.
    Divided,
    /// The module pair numbers anew, or was stopped.
    Renumbered,
    /// The matching KMA lacks a QKD-key of it.
    Missing,
    /// The process that proposed it ended before it was confirmed.
    Restart,
    /// The matching KMA does not know it.
    PeerUnaware,
    /// It took too long.
    TimedOut,
    /// A KMA on the way could not carry it.
    RelayFailed,
    /// The matching KMA's store was replaced.
    PeerStoreReplaced,
    /// The store has no room for it, or cannot write it.
    NotStored,
    /// Others may know what it was made of, or carried under.
    Suspected,
}

/// Bits that were given a key ID for applications.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// The key's ID.
    pub key_id: KsaKeyId,
    /// The stream that the bits are from.
    pub stream: StreamId,
    /// The bits.
    pub span: KeySpan,
    /// The application that asked.
    pub master: AppId,
    /// The applications at the destination that may fetch the key, once each.
    pub applications: Vec<AppId>,
}
