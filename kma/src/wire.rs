//! What KMAs (and their KSAs) say to each other over Kx-1 and Kx-2.
//!
//! One message is one postcard-encoded [`Message`]; the transport delimits messages and is mutually
//! authenticated and confidential (TLS 1.3). What must hold against a broken transport too, key bits
//! and their relay, carries its own one-time masks and tags. Q.4163 is not public; the messages here
//! are this project's, and [`VERSION`] is refused when it differs.
//!
//! Every message may be lost, repeated or overtaken: a state is said again until the other end has
//! answered it, and hearing it twice changes nothing.

use qkd_keyfile::{
    Composition, KeySpan, KmaKeyId, KsaKeyId, ModulePairId, NodeId, QkdKeyId, SegmentNumber,
    StreamId, address::Generation, metadata::KeyType,
};
use serde::{Deserialize, Serialize};

use crate::{
    io::QuarantineReason,
    record::{Binding, RelayedWay, StopReason},
    session::LastSessions,
};

/// Version of the messages.
pub(crate) const VERSION: u16 = 4;

/// Longest message that is taken, in bytes.
pub(crate) const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// Most items of one list in a message.
pub(crate) const MAX_ITEMS: usize = 4096;

/// Most applications that one key is for, at the destination.
pub(crate) const MAX_APPLICATIONS: usize = 64;

/// A message between two nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Message {
    /// First on every connection, in both directions.
    Hello {
        version: u16,
        /// The sender's store.
        incarnation: u64,
        /// The sender's process.
        boot: [u8; 16],
        /// What the sender's ledger knows of sessions with the receiver.
        sessions: LastSessions,
    },
    /// How far the sender has taken the bits that it owns, and how far its bindings are known. First
    /// in a new link session, per direction.
    Marks(Marks),
    /// Dead leases below the marks are burned; the sender of [`Message::Marks`] may use pad now.
    MarksTaken { session: u64 },
    /// The marks are behind what the sender of this saw used.
    RolledBack { session: u64 },

    // Key synchronisation on a link.
    /// QKD-keys that the sender holds, with their lengths in bits, and such that it dropped.
    Announce {
        module_pair: ModulePairId,
        generation: Generation,
        /// The last generation in which the module pair began to number anew.
        anew: Generation,
        held: Vec<(QkdKeyId, u32)>,
        dropped: Vec<(QkdKeyId, DropReason)>,
        /// The sender has announced all that it holds, on this connection.
        complete: bool,
    },
    /// The proposer's half of the comparison.
    Propose(Propose),
    /// The answerer's half; `tag` is zero unless the verdict is [`Verdict::Match`] or
    /// [`Verdict::Differ`]. `missing` are the QKD-keys of [`Verdict::Missing`]; where it names none,
    /// all of them are.
    Answer {
        segment: SegmentNumber,
        verdict: Verdict,
        tag: [u8; 16],
        missing: Vec<QkdKeyId>,
    },

    // Two-phase confirmation, for segments of links and for end-to-end units.
    /// The sender has stored the segment; the receiver may use it. `release` proves it for an
    /// end-to-end unit (mask 2), and is zero for a link segment.
    Commit {
        stream: StreamId,
        segment: SegmentNumber,
        release: [u8; 16],
    },
    /// The sender holds these, answered, and has had no commit.
    Pending {
        stream: StreamId,
        segments: Vec<SegmentNumber>,
    },
    /// The segment is void: drop it.
    Void {
        stream: StreamId,
        segment: SegmentNumber,
    },
    /// The owner has taken the whole segment, and nothing of it is in flight.
    Spent {
        stream: StreamId,
        segments: Vec<SegmentNumber>,
    },
    /// The other end has burned what was left; both forget the segments.
    SpentTaken {
        stream: StreamId,
        segments: Vec<SegmentNumber>,
    },

    // Key relay.
    /// One hop of a relay.
    Relay(SealedHop),
    /// The hop was accepted (its pad is burned) or was accepted before.
    HopTaken { session: u64, sequence: u64 },
    /// A unit cannot be carried further; goes back along its route.
    RelayFailed {
        route: Vec<NodeId>,
        segment: SegmentNumber,
    },
    /// The destination holds the unit: the end-to-end check of all its bits, and of its way.
    Completion {
        stream: StreamId,
        segment: SegmentNumber,
        way: RelayedWay,
        tag: [u8; 16],
    },

    // Supply (Kx-2: no key bit).
    /// Bindings in sequence, from `first` on.
    Bindings { first: u64, bindings: Vec<Binding> },
    /// All bindings before `next` are durable at the sender of this.
    BindingsTaken { next: u64 },
    /// An application asks here for a key that is not bound; is it bound at your end?
    AskBinding { key_ids: Vec<KsaKeyId> },
    /// The bindings asked about went out before this message; those that did not do not exist.
    AskedBindings { key_ids: Vec<KsaKeyId> },

    // Life cycle.
    /// Others may know these segments: nothing of them is used any more.
    Suspected {
        stream: StreamId,
        segments: Vec<SegmentNumber>,
    },

    // Key relay by XOR.
    /// An XOR of two keys of one relay, to the one that XORs all of them.
    Xor(XorPart),
    /// The XOR came, or is of no use any more.
    XorTaken { relay: KmaKeyId, place: u8 },

    // Key synchronisation, again.
    /// The answerer's module numbers anew: the proposer is to raise this generation.
    Renumbered {
        module_pair: ModulePairId,
        generation: Generation,
    },

    // Ownership.
    /// The sender is short of bits of its own, by so many bytes, and has acquired all that was ceded to
    /// it before `acquired`. Of no use once more was.
    Want { acquired: u64, bytes: u64 },
    /// Segments that the sender owned, in sequence, from `first` on: the receiver owns them.
    Cessions {
        first: u64,
        segments: Vec<(StreamId, SegmentNumber)>,
    },
    /// All cessions before `next` are durable at the sender of this.
    CessionsTaken { next: u64 },

    // What an operator orders.
    /// Whether the sender has stopped a module pair (`here`), and whether it believes that the
    /// receiver has (`there`); who is believed wrongly answers with the same.
    Standing {
        module_pair: ModulePairId,
        here: Option<StopReason>,
        there: Option<StopReason>,
    },
}

/// A part of what the owner of bits tells when a link session begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Marks {
    pub(crate) session: u64,
    /// Counts the times that the marks are said; parts of different rounds do not fit together.
    pub(crate) round: u32,
    /// This part, from 0.
    pub(crate) part: u32,
    /// All parts.
    pub(crate) parts: u32,
    /// The sender has acknowledgements of all bindings before this one.
    pub(crate) bindings_known: u64,
    /// The sequence of the next binding.
    pub(crate) bindings_next: u64,
    /// The receiver has acquired all segments that the sender ceded before this one.
    pub(crate) cessions_known: u64,
    /// The sequence of the next cession.
    pub(crate) cessions_next: u64,
    /// All segments that the sender owns and has not taken to the end.
    pub(crate) marks: Vec<Mark>,
}

/// How far the owner of a segment has taken its bits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    pub(crate) stream: StreamId,
    pub(crate) segment: SegmentNumber,
    /// Nothing at or above it was ever taken.
    pub(crate) mark_bytes: u32,
    /// Nothing below it is still on its way: what was not used there is dead.
    pub(crate) dead_below_bytes: u32,
}

/// The proposer's half of a comparison.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Propose {
    pub(crate) segment: SegmentNumber,
    pub(crate) composition: Composition,
    /// What the proposer will hold; the answerer holds the opposite.
    pub(crate) proposer_key_type: KeyType,
    pub(crate) kma_key_id: KmaKeyId,
    pub(crate) unit_bytes: u32,
    pub(crate) tag: [u8; 16],
}

/// One hop of a relay: a key file under one-time pad.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SealedHop {
    /// An encoded [`RelayHeader`]; the tag covers it.
    #[serde(with = "serde_bytes_vec")]
    pub(crate) header: Vec<u8>,
    #[serde(with = "serde_bytes_vec")]
    pub(crate) ciphertext: Vec<u8>,
    pub(crate) tag: [u8; 16],
}

/// Why a QKD-key is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum DropReason {
    /// It is settled, or was given up.
    Gone,
    /// The two ends hold different bits, or bits that could not be compared.
    Differs,
    /// The sender's pipeline refused it.
    Quarantined(QuarantineReason),
}

/// Where [`Message::Relay`] stands among the messages.
const RELAY: u32 = 12;

/// A [`SealedHop`] as it lies in its message: the bulk of what is said between KMAs is not copied to
/// be read.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct HopRef<'a> {
    pub(crate) header: &'a [u8],
    pub(crate) ciphertext: &'a [u8],
    pub(crate) tag: [u8; 16],
}

impl<'a> HopRef<'a> {
    /// Reads a whole message; `None` for anything but a hop.
    pub(crate) fn decode(bytes: &'a [u8]) -> Option<Self> {
        let (kind, rest) = postcard::take_from_bytes::<u32>(bytes).ok()?;
        if kind != RELAY || bytes.len() > MAX_MESSAGE_BYTES {
            return None;
        }
        let (hop, rest) = postcard::take_from_bytes::<Self>(rest).ok()?;
        rest.is_empty().then_some(hop)
    }
}

impl<'a> From<&'a SealedHop> for HopRef<'a> {
    fn from(hop: &'a SealedHop) -> Self {
        Self {
            header: &hop.header,
            ciphertext: &hop.ciphertext,
            tag: hop.tag,
        }
    }
}

/// A hop's message in the making: what [`Message::encode`] gives, without a copy of the ciphertext.
#[derive(Debug)]
pub(crate) struct HopWriter(Vec<u8>);

impl HopWriter {
    /// Begins a message with so long a ciphertext.
    pub(crate) fn new(header: &[u8], ciphertext_bytes: usize) -> Self {
        let mut this = Self(Vec::with_capacity(header.len() + ciphertext_bytes + 32));
        this.number(u64::from(RELAY));
        this.number(header.len() as u64);
        this.0.extend_from_slice(header);
        this.number(ciphertext_bytes as u64);
        this
    }

    pub(crate) fn ciphertext(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(crate) fn finish(mut self, tag: [u8; 16]) -> Vec<u8> {
        self.0.extend_from_slice(&tag);
        self.0
    }

    /// LEB128, as postcard has it.
    fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        self.0.push(value.to_le_bytes()[0]);
    }
}

/// What a comparison found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Verdict {
    /// Same bits; the answerer has stored them.
    Match,
    /// Other bits; both ends discard.
    Differ,
    /// The answerer does not hold some bits of it. The proposal's mask bits are burned.
    Missing,
    /// The answerer's store takes no more for now.
    Full,
}

/// What a hop says about the unit it carries; covered by the hop's tag, not encrypted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RelayHeader {
    /// The link session.
    pub(crate) session: u64,
    /// Counts the hops of this session and direction.
    pub(crate) sequence: u64,
    /// All KMAs from source to destination.
    pub(crate) route: Vec<NodeId>,
    /// The unit's number in the stream from source to destination.
    pub(crate) segment: SegmentNumber,
    /// Whether the source allows hops under AES-256-GCM.
    pub(crate) may_fall_back: bool,
    pub(crate) cargo: Cargo,
    /// Pad of the hash key: 16 bytes, the same in every hop of a session and direction until it is
    /// rotated.
    pub(crate) hash_key: Vec<KeySpan>,
    /// Pad of the tag: 16 bytes.
    pub(crate) mask: Vec<KeySpan>,
    /// What [`Cargo`] says.
    pub(crate) pad: Vec<KeySpan>,
}

/// What a hop carries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Cargo {
    /// A key file under one-time pad: `pad` is as long as the ciphertext.
    Padded,
    /// A key file under AES-256-GCM: `pad` is the key, 32 bytes, the same in every hop of a batch.
    Aes256Gcm {
        /// Counts the hops of the batch; the nonce.
        nonce: u64,
    },
    /// Nothing: the bits of `pad` leave the pad pool at both ends, for this relay alone.
    Reservation(Reservation),
}

/// Bits of a link that are the key of a relay, or hide it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reservation {
    /// The relay: the KMA-key ID of the unit.
    pub(crate) relay: KmaKeyId,
    /// What is done with the bits.
    pub(crate) scheme: ReservedFor,
    /// The weakest level so far, and the way so far.
    pub(crate) way: RelayedWay,
}

/// The scheme that bits are reserved for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ReservedFor {
    /// Case 1: they are the unit.
    LinkKey,
    /// Fig. 7 and Fig. 8: the next node reserves as many with its own next, and sends the XOR.
    Xor(XorPlan),
}

/// Where XORs go, and which there are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct XorPlan {
    /// Who XORs them, if not the destination.
    pub(crate) centre: Option<NodeId>,
    /// Whether the source sends one too: random bits under the first link's key.
    pub(crate) random: bool,
}

/// One XOR of two keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct XorPart {
    pub(crate) relay: KmaKeyId,
    pub(crate) route: Vec<NodeId>,
    pub(crate) plan: XorPlan,
    /// The sender's place in the route; [`CENTRE_PLACE`] for the centre.
    pub(crate) place: u8,
    #[serde(with = "serde_bytes_vec")]
    pub(crate) ciphertext: Vec<u8>,
}

/// The place of a centre, which is in no route.
pub(crate) const CENTRE_PLACE: u8 = u8::MAX;

impl Message {
    /// The message's bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        match postcard::to_allocvec(self) {
            Ok(bytes) => bytes,
            Err(error) => unreachable!("a message encodes into memory: {error}"),
        }
    }

    /// Reads a whole message; `None` for anything else.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() > MAX_MESSAGE_BYTES {
            return None;
        }
        let (message, rest) = postcard::take_from_bytes::<Self>(bytes).ok()?;
        (rest.is_empty() && message.is_bounded()).then_some(message)
    }

    /// Whether every list is short enough to work through at once.
    fn is_bounded(&self) -> bool {
        let longest = match self {
            Self::Marks(marks) => marks.marks.len(),
            Self::Announce { held, dropped, .. } => held.len().max(dropped.len()),
            Self::Answer { missing, .. } => missing.len(),
            Self::Propose(propose) => propose.composition.pieces.len(),
            Self::Pending { segments, .. }
            | Self::Spent { segments, .. }
            | Self::Suspected { segments, .. }
            | Self::SpentTaken { segments, .. } => segments.len(),
            Self::RelayFailed { route, .. } => route.len(),
            Self::Xor(part) => part.route.len(),
            Self::Completion { way, .. } => way.hops.len(),
            Self::Bindings { bindings, .. } => {
                let applications = bindings.iter().map(|b| b.applications.len());
                if applications.max() > Some(MAX_APPLICATIONS) {
                    return false;
                }
                bindings.len()
            }
            Self::Cessions { segments, .. } => segments.len(),
            Self::AskBinding { key_ids } | Self::AskedBindings { key_ids } => key_ids.len(),
            Self::Hello { .. }
            | Self::MarksTaken { .. }
            | Self::RolledBack { .. }
            | Self::Renumbered { .. }
            | Self::Standing { .. }
            | Self::Commit { .. }
            | Self::Void { .. }
            | Self::Relay(_)
            | Self::HopTaken { .. }
            | Self::XorTaken { .. }
            | Self::BindingsTaken { .. }
            | Self::Want { .. }
            | Self::CessionsTaken { .. } => 0,
        };
        longest <= MAX_ITEMS
    }
}

/// Byte strings as bytes, not as lists of numbers.
mod serde_bytes_vec {
    use serde::{Deserializer, Serializer, de::Visitor};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a byte string")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }
        }
        from.deserialize_bytes(Bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_survives_and_every_truncation_of_it_is_refused() {
        let message = Message::Relay(SealedHop {
            header: vec![1, 2, 3],
            ciphertext: vec![9; 300],
            tag: [7; 16],
        });
        let bytes = message.encode();
        assert_eq!(Message::decode(&bytes), Some(message));
        for len in 0..bytes.len() {
            assert_eq!(Message::decode(&bytes[..len]), None);
        }
        assert_eq!(Message::decode(&[&bytes[..], &[0]].concat()), None);
    }

    #[test]
    fn a_hop_reads_and_writes_in_place_as_any_message_does() {
        for len in [0, 1, 127, 128, 70_000] {
            let hop = SealedHop {
                header: vec![7; len / 2],
                ciphertext: vec![9; len],
                tag: [3; 16],
            };
            let bytes = Message::Relay(hop.clone()).encode();
            let mut writer = HopWriter::new(&hop.header, len);
            writer.ciphertext(&hop.ciphertext);
            assert_eq!(writer.finish(hop.tag), bytes);
            let read = HopRef::decode(&bytes).unwrap();
            assert_eq!(
                (read.header, read.ciphertext),
                (&hop.header[..], &hop.ciphertext[..])
            );
            assert_eq!(read.tag, hop.tag);
            assert!(HopRef::decode(&bytes[..bytes.len() - 1]).is_none());
            assert!(HopRef::decode(&[&bytes[..], &[0]].concat()).is_none());
        }
        let other = Message::BindingsTaken { next: 1 }.encode();
        assert!(HopRef::decode(&other).is_none());
    }

    #[test]
    fn a_list_longer_than_any_peer_sends_is_refused() {
        let message = Message::AskBinding {
            key_ids: vec![KsaKeyId([0; 16]); MAX_ITEMS + 1],
        };
        assert_eq!(Message::decode(&message.encode()), None);
    }
}
