//! One hop of a relay: a key file under one-time pad, or under AES-256-GCM where policy allows, or a
//! reservation of bits; with a one-time tag over header and ciphertext.
//!
//! The owner of the pad names it explicitly. The receiver checks that the bits are free, then the
//! tag, then burns the bits, and only then decrypts: a forged or altered hop costs no pad.

mod aes;
mod receive;
mod send;

use qkd_kernels::TagKey;
use qkd_keyfile::{KeySpan, LinkId, NodeId, SegmentNumber, StreamId};
use qkd_secmem::KeyBuf;

use crate::{
    io::Cx,
    store::{FollowError, ReadError, Short},
};

pub(crate) use aes::{Batch, BatchKey};
pub(crate) use receive::{Arrived, receive};
pub(crate) use send::{
    METADATA_ALLOWANCE_BYTES, level_of_link, method, reserve, send, take_as_random,
};

/// Bytes of a tag, of its mask and of a hash key.
const TAG_BYTES: u32 = 16;

/// Why a hop was not sent or not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum HopError {
    /// Sending: the pad does not reach, or there is no open session. Nothing was taken.
    #[error("not enough pad")]
    Short,
    /// Key memory is full. Nothing was taken or burned.
    #[error("no key memory")]
    Memory,
    /// Pad cannot be read. Sending: a segment that never will be is burned. Receiving: nothing was.
    #[error("pad cannot be read")]
    Read,
    /// Receiving: not a header, or lengths that do not fit. Nothing was burned.
    #[error("malformed")]
    Malformed,
    /// Receiving: the tag is another's. Nothing was burned.
    #[error("tag does not fit")]
    BadTag,
    /// Receiving: the pad is not the sender's to use. Nothing was burned.
    #[error("pad may not be used: {0}")]
    Misuse(FollowError),
}

impl From<ReadError> for HopError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Memory(_) => Self::Memory,
            ReadError::NoSuchBits | ReadError::Get(_) => Self::Read,
        }
    }
}

impl From<Short> for HopError {
    fn from(_: Short) -> Self {
        Self::Short
    }
}

/// Where a hop leads, and what may be done on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Leg<'a> {
    /// The KMA at the other end of the hop.
    pub(crate) next: &'a NodeId,
    /// Pad that stays in stock for tags, hash keys and fallback keys.
    pub(crate) floor_bytes: u64,
    /// All KMAs from source to destination.
    pub(crate) route: &'a [NodeId],
    /// The unit's number.
    pub(crate) segment: SegmentNumber,
    /// Whether the source allows AES.
    pub(crate) may_fall_back: bool,
    /// Whether this node's policy does.
    pub(crate) falls_back: bool,
}

/// The stream of the link with a node.
pub(crate) fn link_stream(cx: &Cx<'_>, peer: &NodeId) -> Option<StreamId> {
    LinkId::between(cx.me, peer).map(StreamId::Link)
}

fn read_hash_key(
    cx: &mut Cx<'_>,
    stream: &StreamId,
    spans: &[KeySpan],
) -> Result<TagKey, HopError> {
    let bytes = cx.store.read_all(stream, spans)?;
    let mut h = [0; TAG_BYTES as usize];
    h.copy_from_slice(bytes.expose());
    let key = cx.backend.tag_key(&h);
    qkd_kernels::wipe(&mut h);
    Ok(key)
}

/// Bytes of spans; none where there are none.
fn read_some(
    cx: &mut Cx<'_>,
    stream: &StreamId,
    spans: &[KeySpan],
) -> Result<Option<KeyBuf>, HopError> {
    match spans {
        [] => Ok(None),
        spans => Ok(Some(cx.store.read_all(stream, spans)?)),
    }
}

fn masked(mut tag: [u8; 16], mask: &[u8]) -> [u8; 16] {
    tag.iter_mut().zip(mask).for_each(|(t, m)| *t ^= m);
    tag
}
