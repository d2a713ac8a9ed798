//! One hop of a relay: a key file under one-time pad, with a one-time tag over header and
//! ciphertext.
//!
//! The owner of the pad names it explicitly. The receiver checks that the bits are free, then the
//! tag, then burns the bits, and only then decrypts: a forged or altered hop costs no pad.

use qkd_kernels::TagKey;
use qkd_keyfile::{KeySpan, LinkId, NodeId, SegmentNumber, StreamId};
use qkd_secmem::KeyBuf;
use subtle::ConstantTimeEq;

use crate::{
    io::Cx,
    session::{SentHop, Session},
    store::{FollowError, ReadError, Short},
    wire::{Message, RelayHeader},
};

/// Bytes of a tag, of its mask and of a hash key.
const TAG_BYTES: u32 = 16;

/// Room in a key file for its metadata, in bytes: what a hop needs beyond the unit is less.
const METADATA_ALLOWANCE_BYTES: u64 = 2048;

/// Hops in flight towards one KMA, at most.
const IN_FLIGHT_MAX: usize = 256;

/// Why a hop was not sent or not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum HopError {
    /// Sending: the pad does not reach, or there is no open session. Nothing was taken.
    #[error("not enough pad")]
    Short,
    /// Key memory is full. Sending: pad may have been taken, and is burned with the session's end.
    #[error("no key memory")]
    Memory,
    /// The store cannot be read.
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

fn link_stream(cx: &Cx<'_>, peer: &NodeId) -> Option<StreamId> {
    LinkId::between(cx.me, peer).map(StreamId::Link)
}

/// Whether a unit of this length could leave towards `next` now.
pub(crate) fn ready(
    cx: &Cx<'_>,
    session: &Session,
    next: &NodeId,
    unit_bytes: usize,
    floor_bytes: u64,
) -> Option<()> {
    session.open_id()?;
    let stream = link_stream(cx, next)?;
    let need = unit_bytes as u64 + METADATA_ALLOWANCE_BYTES + floor_bytes;
    let room = session.sending.unacknowledged.len() < IN_FLIGHT_MAX;
    (room && cx.store.available_bytes(&stream) >= need).then_some(())
}

/// Encrypts `key_file` with pad of the link to `next`, and sends it.
///
/// # Errors
///
/// See [`HopError`]; `key_file` is wiped either way.
pub(crate) fn send(
    cx: &mut Cx<'_>,
    session: &mut Session,
    next: &NodeId,
    floor_bytes: u64,
    route: &[NodeId],
    segment: SegmentNumber,
    mut key_file: KeyBuf,
) -> Result<(), HopError> {
    let stream = link_stream(cx, next).ok_or(HopError::Malformed)?;
    let id = session.open_id().ok_or(HopError::Short)?;
    ready(cx, session, next, key_file.len_bytes(), floor_bytes).ok_or(HopError::Short)?;
    if session.sending.hash_key.is_none() {
        session.sending.hash_key = Some(draw_hash_key(cx, &stream)?);
    }
    let Some((hash_key, tag_key)) = &session.sending.hash_key else {
        return Err(HopError::Read);
    };
    let len = u32::try_from(key_file.len_bytes()).map_err(|_| HopError::Malformed)?;
    let pad = cx.store.take_pad(&stream, len, floor_bytes)?;
    let mask = cx.store.take_pad(&stream, TAG_BYTES, 0)?;
    let mut pad_bytes = cx.store.read_all(&stream, &pad)?;
    let mask_bytes = cx.store.read_all(&stream, &mask)?;
    let sequence = session.sending.next_sequence;
    session.sending.next_sequence += 1;
    let mut segments: Vec<SegmentNumber> = pad.iter().chain(&mask).map(|s| s.segment).collect();
    segments.push(hash_key.segment);
    segments.dedup();
    let header = encode(&RelayHeader {
        session: id,
        sequence,
        route: route.to_vec(),
        segment,
        hash_key: *hash_key,
        mask,
        pad,
    });
    let tag = tag_key.encrypt_tag_and_wipe(&header, key_file.expose_mut(), pad_bytes.expose_mut());
    let message = Message::Relay {
        header,
        ciphertext: key_file.expose().to_vec(),
        tag: masked(tag, mask_bytes.expose()),
    }
    .encode();
    cx.send_bytes(next, message.clone());
    let hop = SentHop {
        message,
        segments,
        sent: cx.now.mono,
    };
    session.sending.unacknowledged.insert(sequence, hop);
    Ok(())
}

/// A fresh hash key from this end's pad; the floor is there for it.
fn draw_hash_key(cx: &mut Cx<'_>, stream: &StreamId) -> Result<(KeySpan, TagKey), HopError> {
    // One span: a hash key that lies across two segments is passed over, once a session at most.
    for _ in 0..2 {
        let spans = cx.store.take_pad(stream, TAG_BYTES, 0)?;
        if let [span] = spans[..] {
            return Ok((span, read_hash_key(cx, stream, span)?));
        }
    }
    Err(HopError::Short)
}

fn read_hash_key(cx: &mut Cx<'_>, stream: &StreamId, span: KeySpan) -> Result<TagKey, HopError> {
    let bytes = cx.store.read_all(stream, &[span])?;
    let mut h = [0; TAG_BYTES as usize];
    h.copy_from_slice(bytes.expose());
    let key = cx.backend.tag_key(&h);
    qkd_kernels::wipe(&mut h);
    Ok(key)
}

/// Checks, burns and decrypts a hop. `None` for one that was accepted before, which is acknowledged
/// again, and, without acknowledgement, for one of another session or one that came before the
/// commit of a segment that its pad is from.
///
/// # Errors
///
/// See [`HopError`]; nothing was burned.
pub(crate) fn receive(
    cx: &mut Cx<'_>,
    session: &mut Session,
    peer: &NodeId,
    header_bytes: &[u8],
    ciphertext: &[u8],
    tag: &[u8; 16],
) -> Result<Option<(RelayHeader, KeyBuf)>, HopError> {
    let stream = link_stream(cx, peer).ok_or(HopError::Malformed)?;
    let header: RelayHeader =
        postcard::from_bytes(header_bytes).map_err(|_| HopError::Malformed)?;
    if session.accepting_id() != Some(header.session) {
        return Ok(None);
    }
    let taken = Message::HopTaken {
        session: header.session,
        sequence: header.sequence,
    };
    if session.receiving.accepted.contains(header.sequence) {
        cx.send(peer, &taken);
        return Ok(None);
    }
    if total(&header.pad) != Some(ciphertext.len() as u64)
        || total(&header.mask) != Some(u64::from(TAG_BYTES))
        || header.hash_key.len_bytes != TAG_BYTES
        || header.sequence == u64::MAX
    {
        return Err(HopError::Malformed);
    }
    let fresh_key = match &session.receiving.hash_key {
        Some((span, _)) if *span == header.hash_key => None,
        Some(_) => return Err(HopError::Malformed),
        None => Some(header.hash_key),
    };
    let spans: Vec<KeySpan> = header
        .pad
        .iter()
        .chain(&header.mask)
        .chain(&fresh_key)
        .copied()
        .collect();
    match cx.store.check_follow(&stream, &spans) {
        Ok(()) => {}
        // The commit is on its way; the hop comes again.
        Err(FollowError::Unconfirmed) => return Ok(None),
        Err(error) => return Err(HopError::Misuse(error)),
    }
    let fresh_key = match fresh_key {
        Some(span) => Some((span, read_hash_key(cx, &stream, span)?)),
        None => None,
    };
    let mask = cx.store.read_all(&stream, &header.mask)?;
    let pad = cx.store.read_all(&stream, &header.pad)?;
    let Some((_, tag_key)) = fresh_key.as_ref().or(session.receiving.hash_key.as_ref()) else {
        return Err(HopError::Malformed);
    };
    let expected = masked(tag_key.tag(header_bytes, ciphertext), mask.expose());
    if !bool::from(expected.ct_eq(tag)) {
        return Err(HopError::BadTag);
    }
    cx.store.follow(&stream, &spans).map_err(HopError::Misuse)?;
    if fresh_key.is_some() {
        session.receiving.hash_key = fresh_key;
    }
    session
        .receiving
        .accepted
        .insert(header.sequence, header.sequence + 1);
    // The pad's own buffer becomes the key file: no third copy of either exists.
    let mut key_file = pad;
    cx.backend.xor_in_place(key_file.expose_mut(), ciphertext);
    cx.send(peer, &taken);
    Ok(Some((header, key_file)))
}

fn total(spans: &[KeySpan]) -> Option<u64> {
    spans.iter().try_fold(0_u64, |sum, span| {
        sum.checked_add(u64::from(span.len_bytes))
    })
}

fn masked(mut tag: [u8; 16], mask: &[u8]) -> [u8; 16] {
    tag.iter_mut().zip(mask).for_each(|(t, m)| *t ^= m);
    tag
}

fn encode(header: &RelayHeader) -> Vec<u8> {
    match postcard::to_allocvec(header) {
        Ok(bytes) => bytes,
        Err(error) => unreachable!("a header encodes into memory: {error}"),
    }
}
