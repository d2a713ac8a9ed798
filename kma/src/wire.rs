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

use crate::record::Binding;

/// Version of the messages.
pub(crate) const VERSION: u16 = 1;

/// Longest message that is taken, in bytes.
pub(crate) const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// Most items of one list in a message.
pub(crate) const MAX_ITEMS: usize = 4096;

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
    },
    /// For each segment that the sender owns: its durable mark. First in a new link session, per
    /// direction.
    Marks { session: u64, marks: Vec<Mark> },
    /// Dead leases below the marks are burned; the sender of [`Message::Marks`] may use pad now.
    MarksTaken { session: u64 },

    // Key synchronisation on a link.
    /// QKD-keys that the sender holds, with their lengths in bits, and such that it dropped.
    Announce {
        module_pair: ModulePairId,
        generation: Generation,
        held: Vec<(QkdKeyId, u32)>,
        dropped: Vec<QkdKeyId>,
    },
    /// The proposer's half of the comparison.
    Propose {
        segment: SegmentNumber,
        composition: Composition,
        /// What the proposer will hold; the answerer holds the opposite.
        proposer_key_type: KeyType,
        kma_key_id: KmaKeyId,
        unit_bytes: u32,
        tag: [u8; 16],
    },
    /// The answerer's half; `tag` is zero unless the verdict is [`Verdict::Match`] or
    /// [`Verdict::Differ`].
    Answer {
        segment: SegmentNumber,
        verdict: Verdict,
        tag: [u8; 16],
    },

    // Two-phase confirmation, for segments of links and for end-to-end units.
    /// The sender has stored the segment; the receiver may use it. `release` proves it for an
    /// end-to-end unit (mask 2), and is zero for a link segment.
    Commit {
        stream: StreamId,
        segment: SegmentNumber,
        release: [u8; 16],
    },
    /// The receiver of the commit has confirmed.
    Committed {
        stream: StreamId,
        segment: SegmentNumber,
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
    /// One hop of a relay. `header` is an encoded [`RelayHeader`]; the tag covers it.
    Relay {
        #[serde(with = "serde_bytes_vec")]
        header: Vec<u8>,
        #[serde(with = "serde_bytes_vec")]
        ciphertext: Vec<u8>,
        tag: [u8; 16],
    },
    /// The hop was accepted (its pad is burned) or was accepted before.
    HopTaken { session: u64, sequence: u64 },
    /// A unit cannot be carried further; goes back along its route.
    RelayFailed {
        route: Vec<NodeId>,
        segment: SegmentNumber,
    },
    /// The destination holds the unit: the end-to-end check of all its bits.
    Completion {
        stream: StreamId,
        segment: SegmentNumber,
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

/// What a comparison found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Verdict {
    /// Same bits; the answerer has stored them.
    Match,
    /// Other bits; both ends discard.
    Differ,
    /// The answerer does not hold a QKD-key of it, or not as long.
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
    /// Where the session's hash key was taken; the same in every hop of a session and direction.
    pub(crate) hash_key: KeySpan,
    /// Pad of the tag: 16 bytes.
    pub(crate) mask: Vec<KeySpan>,
    /// Pad of the key file: as long as the ciphertext.
    pub(crate) pad: Vec<KeySpan>,
}

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
            Self::Marks { marks, .. } => marks.len(),
            Self::Announce { held, dropped, .. } => held.len().max(dropped.len()),
            Self::Propose { composition, .. } => composition.pieces.len(),
            Self::Pending { segments, .. }
            | Self::Spent { segments, .. }
            | Self::SpentTaken { segments, .. } => segments.len(),
            Self::RelayFailed { route, .. } => route.len(),
            Self::Bindings { bindings, .. } => bindings.len(),
            Self::AskBinding { key_ids } | Self::AskedBindings { key_ids } => key_ids.len(),
            Self::Hello { .. }
            | Self::MarksTaken { .. }
            | Self::Answer { .. }
            | Self::Commit { .. }
            | Self::Committed { .. }
            | Self::Void { .. }
            | Self::Relay { .. }
            | Self::HopTaken { .. }
            | Self::Completion { .. }
            | Self::BindingsTaken { .. } => 0,
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
        let message = Message::Relay {
            header: vec![1, 2, 3],
            ciphertext: vec![9; 300],
            tag: [7; 16],
        };
        let bytes = message.encode();
        assert_eq!(Message::decode(&bytes), Some(message));
        for len in 0..bytes.len() {
            assert_eq!(Message::decode(&bytes[..len]), None);
        }
        assert_eq!(Message::decode(&[&bytes[..], &[0]].concat()), None);
    }

    #[test]
    fn a_list_longer_than_any_peer_sends_is_refused() {
        let message = Message::AskBinding {
            key_ids: vec![KsaKeyId([0; 16]); MAX_ITEMS + 1],
        };
        assert_eq!(Message::decode(&message.encode()), None);
    }
}
