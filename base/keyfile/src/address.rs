//! The address of a key bit: `(stream, incarnation, segment, bit offset)`.
//!
//! Leases, marks and messages name bits only this way. What a vendor calls a QKD-key is provenance
//! ([`QkdKeyName`]), never an address: vendor numbers repeat.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::id::{ModulePairId, NodeId, QkdKeyId};

/// Two matching KMAs that are joined by one or more module pairs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LinkId {
    low: NodeId,
    high: NodeId,
}

impl LinkId {
    /// The link between two nodes, the same whichever comes first; `None` for a node and itself.
    #[must_use]
    pub fn between(one: &NodeId, other: &NodeId) -> Option<Self> {
        let (low, high) = match one.cmp(other) {
            std::cmp::Ordering::Less => (one, other),
            std::cmp::Ordering::Greater => (other, one),
            std::cmp::Ordering::Equal => return None,
        };
        Some(Self {
            low: low.clone(),
            high: high.clone(),
        })
    }

    /// The KMA that composes segments: the one with the smaller ID.
    #[must_use]
    pub fn proposer(&self) -> &NodeId {
        &self.low
    }

    /// The KMA that answers proposals.
    #[must_use]
    pub fn answerer(&self) -> &NodeId {
        &self.high
    }

    /// The other end, seen from `node`; `None` if `node` is at neither end.
    #[must_use]
    pub fn peer_of(&self, node: &NodeId) -> Option<&NodeId> {
        match node {
            _ if *node == self.low => Some(&self.high),
            _ if *node == self.high => Some(&self.low),
            _ => None,
        }
    }
}

impl fmt::Display for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}--{}", self.low, self.high)
    }
}

/// A sequence of segments that two KMAs share.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum StreamId {
    /// Made by key synchronisation from the QKD-keys of a link.
    Link(LinkId),
    /// Made by key relay; the source numbers the segments and owns them all.
    EndToEnd {
        /// Source KMA of the relay.
        source: NodeId,
        /// Destination KMA of the relay.
        destination: NodeId,
    },
}

impl StreamId {
    /// The other end, seen from `node`; `None` if `node` is at neither end.
    #[must_use]
    pub fn peer_of(&self, node: &NodeId) -> Option<&NodeId> {
        match self {
            Self::Link(link) => link.peer_of(node),
            Self::EndToEnd {
                source,
                destination,
            } => match node {
                _ if node == source => Some(destination),
                _ if node == destination => Some(source),
                _ => None,
            },
        }
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(link) => link.fmt(f),
            Self::EndToEnd {
                source,
                destination,
            } => write!(f, "{source}->{destination}"),
        }
    }
}

/// One life of a stream: drawn at random when its store is created, so that a store that was wiped
/// and made anew never takes an old address for one of its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Incarnation(pub u64);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Incarnation({self})")
    }
}

/// Number of a segment in its stream; durable at the end that assigns it, never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SegmentNumber(pub u64);

impl fmt::Display for SegmentNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Counts the times that a module pair began to number its QKD-keys anew.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Generation(pub u32);

/// What a QKD-key is called: unique on its link.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct QkdKeyName {
    /// The module pair that made it.
    pub module_pair: ModulePairId,
    /// The life of the module pair's numbering.
    pub generation: Generation,
    /// The vendor's ID.
    pub id: QkdKeyId,
}

impl fmt::Display for QkdKeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}/{}", self.module_pair, self.generation.0, self.id)
    }
}

/// A run of bits of one QKD-key that goes into a segment.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Piece {
    /// The QKD-key.
    pub qkd_key: QkdKeyId,
    /// First bit taken.
    pub offset_bits: u32,
    /// Bits taken.
    pub len_bits: u32,
}

/// What a segment is made of: pieces, in order, of QKD-keys of one module pair.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Composition {
    /// The module pair that made all the QKD-keys.
    pub module_pair: ModulePairId,
    /// The life of its numbering.
    pub generation: Generation,
    /// The pieces.
    pub pieces: Vec<Piece>,
}

impl Composition {
    /// Bits of all pieces together; `None` if they cannot be counted.
    #[must_use]
    pub fn len_bits(&self) -> Option<u32> {
        self.pieces
            .iter()
            .try_fold(0_u32, |sum, piece| sum.checked_add(piece.len_bits))
    }
}

/// A run of bits inside one segment. Whole bytes: the byte is the smallest pad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct KeySpan {
    /// The segment.
    pub segment: SegmentNumber,
    /// First byte, counted from the segment's first usable bit.
    pub offset_bytes: u32,
    /// Length in bytes.
    pub len_bytes: u32,
}

impl KeySpan {
    /// One past the last byte, if it can be counted at all.
    #[must_use]
    pub const fn end_bytes(&self) -> Option<u32> {
        self.offset_bytes.checked_add(self.len_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeId {
        name.parse().unwrap()
    }

    #[test]
    fn a_link_is_the_same_from_both_ends() {
        let (a, b) = (node("alice"), node("bob"));
        let link = LinkId::between(&b, &a).unwrap();
        assert_eq!(LinkId::between(&a, &b), Some(link.clone()));
        assert_eq!((link.proposer(), link.answerer()), (&a, &b));
        assert_eq!((link.peer_of(&a), link.peer_of(&b)), (Some(&b), Some(&a)));
        assert_eq!(link.peer_of(&node("carol")), None);
        assert_eq!(LinkId::between(&a, &a), None);
    }

    #[test]
    fn an_end_to_end_stream_has_a_direction() {
        let forth = StreamId::EndToEnd {
            source: node("a"),
            destination: node("c"),
        };
        assert_eq!(forth.to_string(), "a->c");
        assert_eq!(forth.peer_of(&node("c")), Some(&node("a")));
        assert_eq!(forth.peer_of(&node("b")), None);
    }

    #[test]
    fn a_span_that_overflows_has_no_end() {
        let span = KeySpan {
            segment: SegmentNumber(1),
            offset_bytes: u32::MAX,
            len_bytes: 1,
        };
        assert_eq!(span.end_bytes(), None);
    }
}
