//! One hop of a relay: a key file under one-time pad, with a one-time tag over header and
//! ciphertext.
//!
//! The owner of the pad names it explicitly. The receiver checks that the bits are free, then the
//! tag, then burns the bits, and only then decrypts: a forged or altered hop costs no pad.

use qkd_kernels::TagKey;
use qkd_keyfile::{KeySpan, LinkId, NodeId, SegmentNumber, StreamId, metadata::RelayEncryption};
use qkd_secmem::KeyBuf;
use subtle::ConstantTimeEq;

use crate::{
    io::Cx,
    record::Purpose,
    session::{HashKey, SentHop, Session},
    store::{FollowError, ReadError, Short},
    wire::{MAX_ITEMS, Message, RelayHeader, SealedHop},
};

/// Bytes of a tag, of its mask and of a hash key.
const TAG_BYTES: u32 = 16;

/// Room in a key file for its metadata, in bytes: what a hop needs beyond the unit is less.
pub(crate) const METADATA_ALLOWANCE_BYTES: u64 = 2048;

/// Hops in flight towards one KMA, at most.
const IN_FLIGHT_MAX: usize = 256;

/// Tags under one hash key, at most: a forger's chance grows with them.
const TAGS_MAX: u64 = if cfg!(test) { 5 } else { 1 << 32 };

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

/// What a hop carries, and where to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Leg<'a> {
    /// The KMA at the other end of the hop.
    pub(crate) next: &'a NodeId,
    /// Pad that stays in stock for tags and hash keys.
    pub(crate) floor_bytes: u64,
    /// All KMAs from source to destination.
    pub(crate) route: &'a [NodeId],
    /// The unit's number.
    pub(crate) segment: SegmentNumber,
}

/// Encrypts `key_file` with pad of the link, and sends it.
///
/// # Errors
///
/// See [`HopError`]; `key_file` is wiped either way.
pub(crate) fn send(
    cx: &mut Cx<'_>,
    session: &mut Session,
    leg: Leg<'_>,
    mut key_file: KeyBuf,
) -> Result<(), HopError> {
    let stream = link_stream(cx, leg.next).ok_or(HopError::Malformed)?;
    let id = session.open_id().ok_or(HopError::Short)?;
    ready(cx, session, leg.next, key_file.len_bytes(), leg.floor_bytes).ok_or(HopError::Short)?;
    let rotate = session.sending.hash_key.is_none() || session.sending.tags >= TAGS_MAX;
    let len = u32::try_from(key_file.len_bytes()).map_err(|_| HopError::Malformed)?;
    let tags = if rotate { 2 * TAG_BYTES } else { TAG_BYTES };
    let want = len.checked_add(tags).ok_or(HopError::Malformed)?;
    // Tags and hash keys are what the floor is for.
    let floor = leg.floor_bytes.saturating_sub(u64::from(tags));
    let spans = cx.store.plan_pad(&stream, want, floor)?;
    let mut rest = spans.clone();
    let hash_key = split_off_front(&mut rest, tags - TAG_BYTES);
    let mask = split_off_front(&mut rest, TAG_BYTES);
    let read = read_pads(cx, &stream, [&hash_key, &mask, &rest]);
    let (fresh, mask_bytes, mut pad_bytes) = read.inspect_err(|error| {
        if matches!(error, HopError::Read) {
            cx.store.burn_unreadable(&stream, &spans);
        }
    })?;
    cx.store.take(&stream, &spans, Purpose::Pad);
    cx.store.carried(
        leg.route,
        leg.segment,
        &stream,
        spans.clone(),
        RelayEncryption::OneTimePad,
    );
    if let Some(key) = fresh {
        let spans = hash_key;
        session.sending.hash_key = Some(HashKey { spans, key });
        session.sending.tags = 0;
    }
    let Some(hash_key) = &session.sending.hash_key else {
        return Err(HopError::Read);
    };
    session.sending.tags += 1;
    let sequence = session.sending.next_sequence;
    session.sending.next_sequence += 1;
    let spans = hash_key.spans.iter().chain(&spans);
    let segments = spans.map(|span| span.segment).collect();
    let header = encode(&RelayHeader {
        session: id,
        sequence,
        route: leg.route.to_vec(),
        segment: leg.segment,
        hash_key: hash_key.spans.clone(),
        mask,
        pad: rest,
    });
    let tag =
        hash_key
            .key
            .encrypt_tag_and_wipe(&header, key_file.expose_mut(), pad_bytes.expose_mut());
    let message = Message::Relay(SealedHop {
        header,
        ciphertext: key_file.expose().to_vec(),
        tag: masked(tag, mask_bytes.expose()),
    })
    .encode();
    cx.send_bytes(leg.next, message.clone());
    let hop = SentHop {
        message,
        segments,
        sent: cx.now.mono,
    };
    session.sending.unacknowledged.insert(sequence, hop);
    Ok(())
}

/// Hash key (if there is one to read), mask and pad of a hop.
fn read_pads(
    cx: &mut Cx<'_>,
    stream: &StreamId,
    [hash_key, mask, pad]: [&[KeySpan]; 3],
) -> Result<(Option<TagKey>, KeyBuf, KeyBuf), HopError> {
    let fresh = match hash_key {
        [] => None,
        spans => Some(read_hash_key(cx, stream, spans)?),
    };
    let mask = cx.store.read_all(stream, mask)?;
    Ok((fresh, mask, cx.store.read_all(stream, pad)?))
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

/// Splits the first `len_bytes` off a run of spans.
fn split_off_front(spans: &mut Vec<KeySpan>, len_bytes: u32) -> Vec<KeySpan> {
    let mut front = Vec::new();
    let mut missing = len_bytes;
    while missing > 0 && !spans.is_empty() {
        let first = &mut spans[0];
        let len_bytes = missing.min(first.len_bytes);
        front.push(KeySpan {
            len_bytes,
            ..*first
        });
        first.offset_bytes += len_bytes;
        first.len_bytes -= len_bytes;
        missing -= len_bytes;
        if first.len_bytes == 0 {
            spans.remove(0);
        }
    }
    front
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
    hop: &SealedHop,
) -> Result<Option<(RelayHeader, KeyBuf)>, HopError> {
    let stream = link_stream(cx, peer).ok_or(HopError::Malformed)?;
    let header: RelayHeader = postcard::from_bytes(&hop.header).map_err(|_| HopError::Malformed)?;
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
    if !is_well_formed(&header, hop.ciphertext.len()) {
        return Err(HopError::Malformed);
    }
    let known = &session.receiving.hash_keys;
    let known = known.iter().position(|key| key.spans == header.hash_key);
    let fresh: &[KeySpan] = match known {
        Some(_) => &[],
        None => &header.hash_key,
    };
    let spans: Vec<KeySpan> = [fresh, &header.mask, &header.pad].concat();
    match cx.store.check_follow(&stream, &spans) {
        Ok(()) => {}
        // The commit is on its way; the hop comes again.
        Err(FollowError::Unconfirmed) => return Ok(None),
        Err(error) => return Err(HopError::Misuse(error)),
    }
    let (fresh, mask, pad) = read_pads(cx, &stream, [fresh, &header.mask, &header.pad])?;
    let old = known.and_then(|at| session.receiving.hash_keys.get(at));
    let Some(tag_key) = fresh.as_ref().or(old.map(|old| &old.key)) else {
        return Err(HopError::Malformed);
    };
    let expected = masked(tag_key.tag(&hop.header, &hop.ciphertext), mask.expose());
    if !bool::from(expected.ct_eq(&hop.tag)) {
        return Err(HopError::BadTag);
    }
    cx.store.follow(&stream, &spans).map_err(HopError::Misuse)?;
    cx.store.carried(
        &header.route,
        header.segment,
        &stream,
        spans,
        RelayEncryption::OneTimePad,
    );
    if let Some(key) = fresh {
        let keys = &mut session.receiving.hash_keys;
        keys.truncate(1);
        let spans = header.hash_key.clone();
        keys.insert(0, HashKey { spans, key });
    }
    session
        .receiving
        .accepted
        .insert(header.sequence, header.sequence + 1);
    // The pad's own buffer becomes the key file: no third copy of either exists.
    let mut key_file = pad;
    cx.backend
        .xor_in_place(key_file.expose_mut(), &hop.ciphertext);
    cx.send(peer, &taken);
    Ok(Some((header, key_file)))
}

/// Whether lengths and numbers can be. Spans stand in the order in which an owner takes them, so that
/// no row is opened twice for one hop.
fn is_well_formed(header: &RelayHeader, ciphertext_bytes: usize) -> bool {
    let ascending = |spans: &[KeySpan]| {
        spans.len() <= MAX_ITEMS && spans.windows(2).all(|pair| pair[0] < pair[1])
    };
    total(&header.pad) == Some(ciphertext_bytes as u64)
        && total(&header.mask) == Some(u64::from(TAG_BYTES))
        && total(&header.hash_key) == Some(u64::from(TAG_BYTES))
        && [&header.pad, &header.mask, &header.hash_key].map(|spans| ascending(spans)) == [true; 3]
        && header.sequence < u64::MAX
        && header.segment.0 < u64::MAX
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
