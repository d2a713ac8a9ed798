//! The destination of units: stores them, says so, and waits for the release.

use std::collections::BTreeMap;

use qkd_keyfile::{
    KeyFile, KeyMetadata, NodeId, StreamId,
    metadata::{KeyType, RelayedKeyMetadata},
};
use qkd_secmem::KeyBuf;

use super::{UNIT_HEAD_BYTES, send_back, store_unit, unit::completion_tag};
use crate::{
    io::Cx,
    record::Stage,
    session::Session,
    store::NewSegment,
    wire::{Message, RelayHeader},
};

/// Units of one source that it has not released, at most.
const ANSWERED_MAX: usize = 256;

/// Key of one source in stock, at most, in bytes.
const CAPACITY_BYTES: u64 = 1 << 30;

/// A unit has come to its destination.
pub(super) fn arrived(
    cx: &mut Cx<'_>,
    sessions: &BTreeMap<NodeId, Session>,
    header: &RelayHeader,
    key_file: &KeyBuf,
) {
    let Some((source, relayed, unit)) = unit_of(header, key_file) else {
        send_back(cx, &header.route, header.segment);
        return;
    };
    let stream = StreamId::EndToEnd {
        source: source.clone(),
        destination: cx.me.clone(),
    };
    // The source is told end to end; one that is not there cannot release the unit. What it has sent
    // without releasing it, and what waits here for applications, is bounded.
    let answered = cx.store.stream(&stream).map_or(0, |s| s.answered.len());
    if !sessions.get(source).is_some_and(Session::is_up)
        || answered >= ANSWERED_MAX
        || cx.store.is_full(&stream, CAPACITY_BYTES)
    {
        return send_back(cx, &header.route, header.segment);
    }
    if cx.store.segment(&stream, header.segment).is_some() {
        tracing::warn!(%stream, segment = %header.segment, "unit number came twice");
        return;
    }
    let new = NewSegment {
        stream: stream.clone(),
        number: header.segment,
        stage: Stage::Answered,
        key_type: KeyType::Decrypting,
        total_bits: u32::try_from(unit.len() * 8).unwrap_or(u32::MAX),
        head_bytes: UNIT_HEAD_BYTES,
        level: relayed.level,
        kma_key_id: relayed.kma_key.kma_key_id,
        composition: None,
        key: unit,
        relayed: Some(&relayed),
    };
    if !store_unit(cx, new) {
        return send_back(cx, &header.route, header.segment);
    }
    let tag = completion_tag(cx, unit, relayed.kma_key.kma_key_id);
    let message = Message::Completion {
        stream,
        segment: header.segment,
        tag,
    };
    cx.send(source, &message);
}

/// Source, metadata and bytes of a unit at its destination, if it is one.
fn unit_of<'a>(
    header: &'a RelayHeader,
    key_file: &'a KeyBuf,
) -> Option<(&'a NodeId, RelayedKeyMetadata, &'a [u8])> {
    let source = header.route.first()?;
    let file = KeyFile::decode(key_file.expose()).ok()?;
    match file.metadata {
        KeyMetadata::Relayed(relayed) if file.key.len() > UNIT_HEAD_BYTES as usize => {
            Some((source, relayed, file.key))
        }
        _ => None,
    }
}
