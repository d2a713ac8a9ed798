//! A unit: its key file on the way, its check end to end.

use qkd_keyfile::{
    KeyFile, KeyMetadata, KeySpan, KmaKeyId, NodeId, SegmentNumber, StreamId,
    metadata::{KeyType, KmaKeyMetadata, RelayEncryption, RelayHop, RelayedKeyMetadata},
};
use qkd_secmem::KeyBuf;
use subtle::ConstantTimeEq;

use super::{UNIT_HEAD_BYTES, next_of};
use crate::{io::Cx, record::RelayedWay, store::ReadError, vault::GetError, wire::Message};

/// Which half of the end-to-end check a tag is.
const ROLE_COMPLETION: &[u8] = b"qkd-bridge/completion/2";

/// Metadata of a unit that came, or will go, this way (Y.3803 clause 8.2.3 and Table 1 (3)): the
/// standard items say the last hop.
pub(super) fn metadata(
    cx: &Cx<'_>,
    route: &[NodeId],
    kma_key_id: KmaKeyId,
    len_bytes: usize,
    way: RelayedWay,
) -> RelayedKeyMetadata {
    let destination = route.last().unwrap_or(cx.me).clone();
    let kma_key = KmaKeyMetadata {
        key_bits: u32::try_from(len_bytes * 8).ok(),
        key_type: Some(KeyType::Encrypting),
        kma: route.first().cloned(),
        generated_at: Some(cx.now.unix),
        ..KmaKeyMetadata::new(kma_key_id, destination)
    };
    let last = way.hops.last();
    RelayedKeyMetadata {
        source_kma: last.map(|hop| hop.from.clone()),
        destination_kma: last.map(|hop| hop.to.clone()),
        relayed_at: last.map(|hop| hop.at),
        encryption: last.map(|hop| hop.encryption),
        kma_key,
        level: way.level,
        hops: way.hops,
    }
}

/// The relay information of the next hop: replaced in the standard items, appended to the history;
/// the level falls to that of the method (Req_KMA1).
pub(super) fn one_hop_on(
    cx: &Cx<'_>,
    mut metadata: RelayedKeyMetadata,
    route: &[NodeId],
    encryption: RelayEncryption,
) -> RelayedKeyMetadata {
    let to = next_of(route, cx.me).unwrap_or_else(|| cx.me.clone());
    metadata.source_kma = Some(cx.me.clone());
    metadata.destination_kma = Some(to.clone());
    metadata.relayed_at = Some(cx.now.unix);
    metadata.encryption = Some(encryption);
    metadata.level = metadata.level.min(encryption.level());
    metadata.hops.push(RelayHop {
        from: cx.me.clone(),
        to,
        at: cx.now.unix,
        encryption,
    });
    metadata
}

/// A whole key file in key memory.
pub(super) fn key_file(cx: &Cx<'_>, metadata: RelayedKeyMetadata, unit: &[u8]) -> Option<KeyBuf> {
    let file = KeyFile {
        metadata: KeyMetadata::Relayed(metadata),
        key_bits: u32::try_from(unit.len() * 8).ok()?,
        key: unit,
    };
    let head = file.encode_head().ok()?;
    let mut whole = cx.store.pool().take(head.len() + unit.len()).ok()?;
    let (front, back) = whole.expose_mut().split_at_mut(head.len());
    front.copy_from_slice(&head);
    back.copy_from_slice(unit);
    Some(whole)
}

/// POLYVAL_H over all of the unit after its head, its ID, its way and its role, under mask 1.
pub(super) fn completion_tag(
    cx: &Cx<'_>,
    unit: &[u8],
    kma_key_id: KmaKeyId,
    way: &RelayedWay,
) -> [u8; 16] {
    let (head, rest) = unit.split_at(UNIT_HEAD_BYTES as usize);
    let mut h = [0; 16];
    h.copy_from_slice(&head[..16]);
    let way = match postcard::to_allocvec(way) {
        Ok(bytes) => bytes,
        Err(error) => unreachable!("names encode into memory: {error}"),
    };
    let aad = [ROLE_COMPLETION, &kma_key_id.0, &way].concat();
    let mut tag = cx.backend.tag(&h, &aad, rest);
    tag.iter_mut()
        .zip(&head[16..32])
        .for_each(|(t, mask)| *t ^= mask);
    qkd_kernels::wipe(&mut h);
    tag
}

/// A unit's completion, made again from the store.
pub(crate) fn completion_again(
    cx: &mut Cx<'_>,
    stream: &StreamId,
    segment: SegmentNumber,
) -> Option<Message> {
    let stored = cx.store.segment(stream, segment)?;
    let (kma_key_id, len_bytes) = (stored.kma_key_id, stored.len_bytes);
    let span = KeySpan {
        segment,
        offset_bytes: 0,
        len_bytes,
    };
    let way = cx.store.way(stream, segment)?.clone();
    let unit = cx.store.read_all(stream, &[span]).ok()?;
    let tag = completion_tag(cx, unit.expose(), kma_key_id, &way);
    Some(Message::Completion {
        stream: stream.clone(),
        segment,
        way,
        tag,
    })
}

/// Where mask 2 is in a unit.
fn release_span(segment: SegmentNumber) -> KeySpan {
    KeySpan {
        segment,
        offset_bytes: 32,
        len_bytes: 16,
    }
}

/// Tells the destination that it may use a unit, or that the unit is void.
pub(crate) fn release_again(cx: &mut Cx<'_>, stream: &StreamId, segment: SegmentNumber) {
    let Some(peer) = stream.peer_of(cx.me).cloned() else {
        return;
    };
    let mut release = [0; 16];
    let read = cx.store.read(stream, release_span(segment), &mut release);
    let stored = cx.store.segment(stream, segment);
    let is_bound = stored.is_some_and(|stored| stored.bindings > 0);
    let stream = stream.clone();
    let message = match read {
        Ok(()) => Message::Commit {
            stream,
            segment,
            release,
        },
        // It is here, and cannot be read now, or keys out of it are on their way: the destination, which
        // must not drop it before it has heard of them, asks again.
        Err(ReadError::Memory(_) | ReadError::Get(GetError::Vault { .. })) => return,
        Err(_) if is_bound => return,
        Err(_) => Message::Void { stream, segment },
    };
    cx.send(&peer, &message);
}

/// Whether a release is the unit's mask 2.
pub(crate) fn release_fits(
    cx: &mut Cx<'_>,
    stream: &StreamId,
    segment: SegmentNumber,
    release: &[u8; 16],
) -> bool {
    let mut expected = [0; 16];
    cx.store
        .read(stream, release_span(segment), &mut expected)
        .is_ok()
        && bool::from(expected.ct_eq(release))
}
