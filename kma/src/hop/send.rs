//! The end of a hop that owns the pad.

use bytes::Bytes;
use qkd_kernels::TagKey;
use qkd_keyfile::{KeySpan, KmaKeyId, SegmentNumber, StreamId, metadata::RelayEncryption};
use qkd_secmem::KeyBuf;

use super::{
    Batch, BatchKey, HopError, Leg, TAG_BYTES,
    aes::{BATCH_MAX, KEY_BYTES, OVERHEAD_BYTES},
    link_stream, masked, read_hash_key, read_some,
};
use crate::{
    io::Cx,
    record::Purpose,
    session::{HashKey, SentHop, Session},
    wire::{Cargo, HopWriter, RelayHeader, Reservation},
};

/// Room in a key file for its metadata, in bytes: what a hop needs beyond the unit is less.
pub(crate) const METADATA_ALLOWANCE_BYTES: u64 = 2048;

/// What a hop under AES needs at most: a hash key, a mask and a fresh key.
const AES_NEED_BYTES: u64 = 2 * TAG_BYTES as u64 + KEY_BYTES as u64;

/// Hops in flight towards one KMA, at most.
const IN_FLIGHT_MAX: usize = 256;

/// Tags under one hash key, at most: a forger's chance grows with them.
const TAGS_MAX: u64 = if cfg!(test) { 5 } else { 1 << 32 };

/// How a unit of this length can leave now: under one-time pad if that reaches, under AES if it does
/// not and both the source and this node allow it. `None`: it must wait.
pub(crate) fn method(
    cx: &Cx<'_>,
    session: &Session,
    leg: Leg<'_>,
    unit_bytes: usize,
) -> Option<RelayEncryption> {
    session.open_id()?;
    if session.sending.unacknowledged.len() >= IN_FLIGHT_MAX {
        return None;
    }
    let have = cx.store.available_bytes(&link_stream(cx, leg.next)?);
    let need = unit_bytes as u64 + METADATA_ALLOWANCE_BYTES + leg.floor_bytes;
    if have >= need {
        return Some(RelayEncryption::OneTimePad);
    }
    let falls_back = leg.may_fall_back && leg.falls_back && have >= AES_NEED_BYTES;
    falls_back.then_some(RelayEncryption::Aes256Gcm)
}

/// Encrypts `key_file` with bits of the link, and sends it.
///
/// # Errors
///
/// See [`HopError`]; `key_file` is wiped either way.
pub(crate) fn send(
    cx: &mut Cx<'_>,
    session: &mut Session,
    leg: Leg<'_>,
    method: RelayEncryption,
    key_file: KeyBuf,
) -> Result<(), HopError> {
    match method {
        RelayEncryption::OneTimePad => send_padded(cx, session, leg, key_file),
        _ => send_aes(cx, session, leg, &key_file),
    }
}

fn send_padded(
    cx: &mut Cx<'_>,
    session: &mut Session,
    leg: Leg<'_>,
    mut key_file: KeyBuf,
) -> Result<(), HopError> {
    let len = u32::try_from(key_file.len_bytes()).map_err(|_| HopError::Malformed)?;
    let mut pads = take(cx, session, leg, len, leg.floor_bytes, Purpose::Pad)?;
    // Pad is there again: the next fallback begins with a fresh key.
    session.sending.batch = None;
    let pad = pads.pad.take().ok_or(HopError::Malformed)?;
    let cipher_bytes = key_file.len_bytes();
    let cargo = (Cargo::Padded, cipher_bytes);
    depart(cx, session, leg, cargo, pads, |tag_key, header, out| {
        let mut pad = pad;
        let (data, pad) = (key_file.expose_mut(), pad.expose_mut());
        let tag = tag_key.encrypt_tag_and_wipe(header, data, pad);
        out.ciphertext(data);
        Ok(tag)
    })?;
    Ok(())
}

fn send_aes(
    cx: &mut Cx<'_>,
    session: &mut Session,
    leg: Leg<'_>,
    key_file: &KeyBuf,
) -> Result<(), HopError> {
    let batch = session.sending.batch.take();
    let batch = batch.filter(|batch| batch.hops < BATCH_MAX);
    let len = if batch.is_some() { 0 } else { KEY_BYTES };
    // This is what the floor is for.
    let mut pads = take(cx, session, leg, len, 0, Purpose::Pad)?;
    let mut batch = match (batch, pads.pad.take()) {
        (Some(batch), _) => batch,
        (None, Some(bytes)) => Batch {
            key: BatchKey::new(pads.pad_spans.clone(), &bytes)?,
            hops: 0,
        },
        (None, None) => return Err(HopError::Malformed),
    };
    pads.pad_spans.clone_from(&batch.key.spans);
    let nonce = batch.hops;
    batch.hops += 1;
    let cipher_bytes = key_file.len_bytes() + OVERHEAD_BYTES;
    let cargo = (Cargo::Aes256Gcm { nonce }, cipher_bytes);
    depart(cx, session, leg, cargo, pads, |tag_key, header, out| {
        let ciphertext = batch.key.encrypt(nonce, header, key_file)?;
        out.ciphertext(&ciphertext);
        Ok(tag_key.tag(header, &ciphertext))
    })?;
    session.sending.batch = Some(batch);
    Ok(())
}

/// Takes bits of the link out of the pad pool for one relay, and tells the other end. Returns them,
/// and the hop's sequence: once it is acknowledged, both ends have reserved durably.
///
/// # Errors
///
/// See [`HopError`].
pub(crate) fn reserve(
    cx: &mut Cx<'_>,
    session: &mut Session,
    leg: Leg<'_>,
    len_bytes: u32,
    reservation: Reservation,
) -> Result<(KeyBuf, u64), HopError> {
    let purpose = Purpose::Relay(reservation.relay);
    let mut pads = take(cx, session, leg, len_bytes, leg.floor_bytes, purpose)?;
    let bits = pads.pad.take().ok_or(HopError::Malformed)?;
    let cargo = (Cargo::Reservation(reservation), 0);
    let sequence = depart(cx, session, leg, cargo, pads, |tag_key, header, _| {
        Ok(tag_key.tag(header, &[]))
    })?;
    Ok((bits, sequence))
}

/// Bits of the link that one hop takes.
struct Pads {
    /// Of a fresh hash key.
    hash_spans: Vec<KeySpan>,
    mask_spans: Vec<KeySpan>,
    mask: KeyBuf,
    pad_spans: Vec<KeySpan>,
    pad: Option<KeyBuf>,
}

/// Takes mask and pad for a hop, and before them a hash key when it is time for another.
fn take(
    cx: &mut Cx<'_>,
    session: &mut Session,
    leg: Leg<'_>,
    len_bytes: u32,
    floor_bytes: u64,
    purpose: Purpose,
) -> Result<Pads, HopError> {
    let stream = link_stream(cx, leg.next).ok_or(HopError::Malformed)?;
    session.open_id().ok_or(HopError::Short)?;
    let rotate = session.sending.hash_key.is_none() || session.sending.tags >= TAGS_MAX;
    let tags = if rotate { 2 * TAG_BYTES } else { TAG_BYTES };
    let want = len_bytes.checked_add(tags).ok_or(HopError::Malformed)?;
    // Tags and hash keys are what the floor is for.
    let floor = floor_bytes.saturating_sub(u64::from(tags));
    let spans = cx.store.plan_pad(&stream, want, floor)?;
    let mut pad_spans = spans.clone();
    let hash_spans = split_off_front(&mut pad_spans, tags - TAG_BYTES);
    let mask_spans = split_off_front(&mut pad_spans, TAG_BYTES);
    let read = read(cx, &stream, [&hash_spans, &mask_spans, &pad_spans]);
    let (hash_key, mask, pad) = read.inspect_err(|error| {
        if matches!(error, HopError::Read) {
            cx.store.burn_unreadable(&stream, &spans);
        }
    })?;
    if purpose == Purpose::Pad {
        cx.store.take(&stream, &spans, purpose);
    } else {
        cx.store.take(&stream, &hash_spans, Purpose::Pad);
        cx.store.take(&stream, &mask_spans, Purpose::Pad);
        cx.store.take(&stream, &pad_spans, purpose);
    }
    if let Some(key) = hash_key {
        let spans = hash_spans.clone();
        session.sending.hash_key = Some(HashKey { spans, key });
        session.sending.tags = 0;
    }
    Ok(Pads {
        hash_spans,
        mask_spans,
        mask,
        pad_spans,
        pad,
    })
}

/// Hash key (if there is one to read), mask and pad of a hop.
fn read(
    cx: &mut Cx<'_>,
    stream: &StreamId,
    [hash_key, mask, pad]: [&[KeySpan]; 3],
) -> Result<(Option<TagKey>, KeyBuf, Option<KeyBuf>), HopError> {
    let fresh = match hash_key {
        [] => None,
        spans => Some(read_hash_key(cx, stream, spans)?),
    };
    let mask = cx.store.read_all(stream, mask)?;
    Ok((fresh, mask, read_some(cx, stream, pad)?))
}

/// Numbers a hop, seals it and sends it; keeps it until it is acknowledged.
fn depart(
    cx: &mut Cx<'_>,
    session: &mut Session,
    leg: Leg<'_>,
    (cargo, cipher_bytes): (Cargo, usize),
    pads: Pads,
    seal: impl FnOnce(&TagKey, &[u8], &mut HopWriter) -> Result<[u8; 16], HopError>,
) -> Result<u64, HopError> {
    let id = session.open_id().ok_or(HopError::Short)?;
    let stream = link_stream(cx, leg.next).ok_or(HopError::Malformed)?;
    let sending = &mut session.sending;
    let Some(hash_key) = &sending.hash_key else {
        return Err(HopError::Read);
    };
    let spans = [&hash_key.spans, &pads.mask_spans, &pads.pad_spans];
    let segments = spans.into_iter().flatten().map(|span| span.segment);
    let segments = segments.collect::<std::collections::BTreeSet<SegmentNumber>>();
    let method = match cargo {
        Cargo::Aes256Gcm { .. } => RelayEncryption::Aes256Gcm,
        _ => RelayEncryption::OneTimePad,
    };
    let named = [&pads.hash_spans[..], &pads.mask_spans, &pads.pad_spans].concat();
    let sequence = sending.next_sequence;
    let header = encode(&RelayHeader {
        session: id,
        sequence,
        route: leg.route.to_vec(),
        segment: leg.segment,
        may_fall_back: leg.may_fall_back,
        cargo,
        hash_key: hash_key.spans.clone(),
        mask: pads.mask_spans,
        pad: pads.pad_spans,
    });
    let mut writer = HopWriter::new(&header, cipher_bytes);
    let tag = seal(&hash_key.key, &header, &mut writer)?;
    cx.store
        .carried(leg.route, leg.segment, &stream, named, method);
    sending.next_sequence += 1;
    sending.tags += 1;
    let message = Bytes::from(writer.finish(masked(tag, pads.mask.expose())));
    cx.send_bytes(leg.next, message.clone());
    let hop = SentHop {
        message,
        segments,
        sent: cx.now.mono,
    };
    sending.unacknowledged.insert(sequence, hop);
    Ok(sequence)
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

fn encode(header: &RelayHeader) -> Vec<u8> {
    match postcard::to_allocvec(header) {
        Ok(bytes) => bytes,
        Err(error) => unreachable!("a header encodes into memory: {error}"),
    }
}

/// Takes bits of the first link that nothing else will use, as random bits of a unit. The other end
/// burns them when the segment ends.
///
/// # Errors
///
/// See [`HopError`]; nothing was taken.
pub(crate) fn take_as_random(
    cx: &mut Cx<'_>,
    leg: Leg<'_>,
    len_bytes: u32,
    relay: KmaKeyId,
) -> Result<KeyBuf, HopError> {
    let stream = link_stream(cx, leg.next).ok_or(HopError::Malformed)?;
    let spans = cx.store.plan_pad(&stream, len_bytes, leg.floor_bytes)?;
    let bits = cx.store.read_all(&stream, &spans);
    let bits = bits.map_err(HopError::from).inspect_err(|error| {
        if matches!(error, HopError::Read) {
            cx.store.burn_unreadable(&stream, &spans);
        }
    })?;
    cx.store.take(&stream, &spans, Purpose::Relay(relay));
    Ok(bits)
}

/// The weakest level of the link's bits that would be taken next: what a reservation is worth.
pub(crate) fn level_of_link(
    cx: &Cx<'_>,
    leg: Leg<'_>,
    len_bytes: u32,
) -> Option<qkd_keyfile::metadata::SecurityLevel> {
    let stream = link_stream(cx, leg.next)?;
    let entry = cx.store.stream(&stream)?;
    let mut left = u64::from(len_bytes) + u64::from(2 * TAG_BYTES);
    let mut levels = Vec::new();
    for number in &entry.open {
        let segment = entry.segments.get(number)?;
        levels.push(segment.level);
        left = left.saturating_sub(u64::from(segment.remaining_bytes()));
        if left == 0 {
            break;
        }
    }
    levels.into_iter().min()
}
