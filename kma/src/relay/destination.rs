//! The destination of units: stores them, says so, and waits for the release.

use std::collections::BTreeMap;

use qkd_keyfile::{
    KeyFile, KeyMetadata, NodeId, SegmentNumber, StreamId,
    metadata::{KeyType, RelayedKeyMetadata},
};
use qkd_secmem::KeyBuf;

use super::{UNIT_HEAD_BYTES, send_back, store_unit, unit::completion_tag};
use crate::{
    io::{Cx, KmaConfig},
    record::{RelayedWay, Stage},
    session::Session,
    store::NewSegment,
    wire::{Message, RelayHeader},
};

/// Units of one source that it has not released, at most.
const ANSWERED_MAX: usize = 256;

/// Key of one source in stock, at most, in bytes.
const CAPACITY_BYTES: u64 = 1 << 30;

/// A unit at its destination.
#[derive(Debug)]
pub(super) struct Arrival<'a> {
    /// All KMAs from source to destination.
    pub(super) route: &'a [NodeId],
    /// The unit's number.
    pub(super) segment: SegmentNumber,
    /// Its ID, and how it came.
    pub(super) relayed: &'a RelayedKeyMetadata,
    /// Its bytes, check bits first.
    pub(super) unit: &'a [u8],
}

/// A unit has come as a key file.
pub(super) fn file_arrived(
    cx: &mut Cx<'_>,
    config: &KmaConfig,
    sessions: &BTreeMap<NodeId, Session>,
    header: &RelayHeader,
    key_file: &KeyBuf,
) {
    let Ok(KeyFile {
        metadata: KeyMetadata::Relayed(relayed),
        key,
        ..
    }) = KeyFile::decode(key_file.expose())
    else {
        return send_back(cx, &header.route, header.segment);
    };
    let arrival = Arrival {
        route: &header.route,
        segment: header.segment,
        relayed: &relayed,
        unit: key,
    };
    arrived(cx, config, sessions, arrival);
}

/// A unit has come to its destination.
pub(super) fn arrived(
    cx: &mut Cx<'_>,
    config: &KmaConfig,
    sessions: &BTreeMap<NodeId, Session>,
    arrival: Arrival<'_>,
) {
    let Arrival {
        route,
        segment,
        relayed,
        unit,
    } = arrival;
    let (way, kma_key_id) = (RelayedWay::from(relayed), relayed.kma_key.kma_key_id);
    let Some(source) = route.first() else {
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
        || unit.len() <= UNIT_HEAD_BYTES as usize
        || answered >= ANSWERED_MAX
        || way.weakest() < config.relay.of(source, cx.me).level
        || cx.store.is_full(&stream, CAPACITY_BYTES)
    {
        return send_back(cx, route, segment);
    }
    if cx.store.segment(&stream, segment).is_some() {
        tracing::warn!(%stream, %segment, "unit number came twice");
        return;
    }
    let Ok(key) = cx.store.pool().copy_of(unit) else {
        return send_back(cx, route, segment);
    };
    let new = NewSegment {
        stream: stream.clone(),
        number: segment,
        stage: Stage::Answered,
        key_type: KeyType::Decrypting,
        total_bits: u32::try_from(unit.len() * 8).unwrap_or(u32::MAX),
        head_bytes: UNIT_HEAD_BYTES,
        level: way.weakest(),
        kma_key_id,
        composition: None,
        key,
        relayed: Some(relayed),
    };
    if !store_unit(cx, new) {
        return send_back(cx, route, segment);
    }
    let tag = completion_tag(cx, unit, kma_key_id, &way);
    let message = Message::Completion {
        stream,
        segment,
        way,
        tag,
    };
    cx.send(source, &message);
}
