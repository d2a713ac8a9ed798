//! Key relay (Y.3803 clause 8.2.3; clause 9, case 2): random bits of the source, carried hop by hop
//! under one-time pad, checked end to end before anyone may use them.
//!
//! A *unit* is [`UNIT_HEAD_BYTES`] of check bits (POLYVAL key, mask 1, mask 2) and the key data. The
//! destination stores it and sends a *completion* over all its bits under mask 1; the source stores
//! it and sends the *release*, mask 2. A unit whose relay failed, or took too long, is discarded and
//! never sent again.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use qkd_keyfile::{
    Entropy, KeyFile, KeyMetadata, KeySpan, KmaKeyId, Mono, NodeId, SegmentNumber, StreamId,
    metadata::{
        KeyType, KmaKeyMetadata, RelayEncryption, RelayHop, RelayedKeyMetadata, SecurityLevel,
    },
};
use qkd_secmem::KeyBuf;
use subtle::ConstantTimeEq;

use crate::{
    digest::unit_key_id,
    hop::{self, HopError},
    io::{Alarm, Cx, KmaConfig, Output, RemoteConfig},
    record::{DiscardReason, Stage},
    session::Session,
    store::NewSegment,
    wire::{Message, RelayHeader},
};

/// Bytes at the head of a unit that are never supplied.
pub(crate) const UNIT_HEAD_BYTES: u32 = 48;

/// Units of one destination on their way at a time.
const WINDOW: usize = 16;

/// A unit that is not complete after this time is discarded.
const UNIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Units of others that wait here for pad, at most; the rest fail at once.
const TRANSIT_MAX: usize = 64;

/// KMAs on one route, at most.
const ROUTE_MAX: usize = 16;

/// Pause after a failure, doubled up to the longest.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));

/// How long an answer about a route is waited for before it is asked again.
const ROUTE_PATIENCE: Duration = Duration::from_secs(2);

/// The relay side of a KMA: source, way station and destination.
#[derive(Debug)]
pub(crate) struct Relay {
    incarnation: u64,
    remotes: BTreeMap<NodeId, Remote>,
    transit: VecDeque<Transit>,
}

/// Stock towards one destination.
#[derive(Debug)]
struct Remote {
    config: RemoteConfig,
    route: Option<Vec<NodeId>>,
    asked: Option<Mono>,
    on_the_way: BTreeMap<SegmentNumber, Departed>,
    pause: Duration,
    paused_until: Mono,
}

#[derive(Debug)]
struct Departed {
    unit: KeyBuf,
    kma_key_id: KmaKeyId,
    level: SecurityLevel,
    at: Mono,
}

/// A unit of others that waits for pad towards the next hop.
#[derive(Debug)]
struct Transit {
    route: Vec<NodeId>,
    segment: SegmentNumber,
    key_file: KeyBuf,
    arrived: Mono,
}

/// Which half of the end-to-end check a tag is.
const ROLE_COMPLETION: &[u8] = b"qkd-bridge/completion/1";

impl Relay {
    pub(crate) fn new(config: &KmaConfig, incarnation: u64) -> Self {
        let remotes = config.remotes.iter().map(|(node, config)| {
            let remote = Remote {
                config: config.clone(),
                route: config.route.clone(),
                asked: None,
                on_the_way: BTreeMap::new(),
                pause: BACK_OFF.0,
                paused_until: Mono::default(),
            };
            (node.clone(), remote)
        });
        Self {
            incarnation,
            remotes: remotes.collect(),
            transit: VecDeque::new(),
        }
    }

    /// The controller's answer.
    pub(crate) fn routed(&mut self, destination: &NodeId, route: Option<Vec<NodeId>>) {
        if let Some(remote) = self.remotes.get_mut(destination)
            && remote.config.route.is_none()
        {
            remote.route = route;
        }
    }

    /// Starts, gives up and carries on what is due.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &mut BTreeMap<NodeId, Session>,
        entropy: &mut dyn Entropy,
    ) {
        self.carry_on(cx, config, sessions);
        for destination in self.remotes.keys().cloned().collect::<Vec<_>>() {
            self.give_up(cx, &destination);
            while self.start(cx, config, sessions, entropy, &destination) {}
        }
    }

    /// Discards units that took too long.
    fn give_up(&mut self, cx: &mut Cx<'_>, destination: &NodeId) {
        let Some(remote) = self.remotes.get(destination) else {
            return;
        };
        let late: Vec<SegmentNumber> = remote
            .on_the_way
            .iter()
            .filter(|(_, unit)| cx.now.mono.since(unit.at) > UNIT_TIMEOUT)
            .map(|(&number, _)| number)
            .collect();
        for number in late {
            self.fail(cx, destination, number, DiscardReason::TimedOut);
        }
    }

    /// A unit will not arrive: void, here and wherever it is.
    fn fail(
        &mut self,
        cx: &mut Cx<'_>,
        destination: &NodeId,
        segment: SegmentNumber,
        reason: DiscardReason,
    ) {
        let Some(remote) = self.remotes.get_mut(destination) else {
            return;
        };
        if remote.on_the_way.remove(&segment).is_none() {
            return;
        }
        remote.paused_until = cx.now.mono.after(remote.pause);
        remote.pause = (remote.pause * 2).min(BACK_OFF.1);
        if remote.config.route.is_none() {
            remote.route = None;
        }
        let stream = stream_of(cx.me, destination);
        cx.store.discard(&stream, segment, reason);
        cx.send(destination, &Message::Void { stream, segment });
    }

    /// Sends one unit if the stock is below its target and nothing stands in the way.
    fn start(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &mut BTreeMap<NodeId, Session>,
        entropy: &mut dyn Entropy,
        destination: &NodeId,
    ) -> bool {
        let Some(remote) = self.remotes.get_mut(destination) else {
            return false;
        };
        let stream = stream_of(cx.me, destination);
        let coming = remote.on_the_way.len() as u64 * u64::from(remote.config.unit_bytes);
        let reached = sessions.get(destination).is_some_and(Session::is_up);
        if cx.store.available_bytes(&stream) + coming >= remote.config.target_bytes
            || remote.on_the_way.len() >= WINDOW
            || cx.now.mono < remote.paused_until
            || !reached
        {
            return false;
        }
        let Some(route) = remote.route.clone() else {
            if remote
                .asked
                .is_none_or(|at| cx.now.mono.since(at) >= ROUTE_PATIENCE)
            {
                remote.asked = Some(cx.now.mono);
                cx.out.push(Output::WantRoute {
                    destination: destination.clone(),
                });
            }
            return false;
        };
        let Some(next) = next_hop(config, &route, cx.me, destination) else {
            tracing::warn!(%destination, ?route, "route does not lead from here over a neighbour to there");
            remote.route.clone_from(&remote.config.route);
            remote.paused_until = cx.now.mono.after(BACK_OFF.1);
            return false;
        };
        let floor = config.neighbours.get(&next).map_or(0, |l| l.floor_bytes);
        let unit_bytes = (UNIT_HEAD_BYTES + remote.config.unit_bytes) as usize;
        // The random bits come last: nothing is drawn for a unit that cannot leave.
        let Some(session) = sessions.get_mut(&next) else {
            return false;
        };
        let (Some(()), Ok(mut unit)) = (
            hop::ready(cx, session, &next, unit_bytes, floor),
            cx.store.pool().take(unit_bytes),
        ) else {
            return false;
        };
        entropy.fill(unit.expose_mut());
        let segment = cx.store.propose(&stream, None);
        let kma_key_id = unit_key_id(cx.me, destination, self.incarnation, segment);
        let metadata = departure(cx, &route, kma_key_id, &unit);
        let sent = key_file(cx, metadata, unit.expose())
            .ok_or(HopError::Memory)
            .and_then(|file| hop::send(cx, session, &next, floor, &route, segment, file));
        if let Err(error) = sent {
            tracing::debug!(%destination, %error, "unit could not leave");
            cx.store
                .discard(&stream, segment, DiscardReason::RelayFailed);
            return false;
        }
        let departed = Departed {
            unit,
            kma_key_id,
            level: SecurityLevel::Any,
            at: cx.now.mono,
        };
        remote.on_the_way.insert(segment, departed);
        true
    }

    /// A hop has come.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn hop(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &mut BTreeMap<NodeId, Session>,
        peer: &NodeId,
        header: &[u8],
        ciphertext: &[u8],
        tag: &[u8; 16],
    ) {
        let Some(session) = sessions.get_mut(peer) else {
            return;
        };
        let (header, key_file) = match hop::receive(cx, session, peer, header, ciphertext, tag) {
            Ok(Some(arrived)) => arrived,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%peer, %error, "hop refused");
                match error {
                    HopError::BadTag => cx.alarm(Alarm::BadTag { peer: peer.clone() }),
                    HopError::Misuse(_) => cx.alarm(Alarm::PadMisuse { peer: peer.clone() }),
                    HopError::Malformed | HopError::Memory | HopError::Short | HopError::Read => {}
                }
                return;
            }
        };
        let at = header.route.iter().position(|node| node == cx.me);
        let from_here =
            at.filter(|&at| at > 0 && header.route[at - 1] == *peer && is_simple(&header.route));
        let Some(at) = from_here else {
            tracing::warn!(%peer, route = ?header.route, "unit on a route that does not lead here");
            return;
        };
        if at + 1 == header.route.len() {
            self.arrived(cx, sessions, &header, &key_file);
        } else if config.relay_for_others && self.transit.len() < TRANSIT_MAX {
            self.transit.push_back(Transit {
                route: header.route,
                segment: header.segment,
                key_file,
                arrived: cx.now.mono,
            });
            self.carry_on(cx, config, sessions);
        } else {
            send_back(cx, &header.route, header.segment);
        }
    }

    /// Sends units of others onwards, in order of arrival per next hop, as far as pad allows.
    fn carry_on(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &mut BTreeMap<NodeId, Session>,
    ) {
        let mut blocked: Vec<NodeId> = Vec::new();
        let mut waiting = VecDeque::new();
        for transit in std::mem::take(&mut self.transit) {
            let next = next_of(&transit.route, cx.me).filter(|n| config.neighbours.contains_key(n));
            let Some(next) = next else {
                send_back(cx, &transit.route, transit.segment);
                continue;
            };
            if cx.now.mono.since(transit.arrived) > UNIT_TIMEOUT {
                send_back(cx, &transit.route, transit.segment);
                continue;
            }
            if blocked.contains(&next) || !onward(cx, config, sessions, &transit, &next) {
                blocked.push(next);
                waiting.push_back(transit);
            }
        }
        self.transit = waiting;
    }

    /// A unit has come to its destination.
    fn arrived(
        &mut self,
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
        if cx.store.segment(&stream, header.segment).is_some() {
            tracing::warn!(%stream, segment = %header.segment, "unit number came twice");
            return;
        }
        let stored = cx.store.store(NewSegment {
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
        });
        if let Err(error) = stored {
            cx.failed.get_or_insert(error);
            return;
        }
        if sessions.get(source).is_some_and(Session::is_up) {
            let tag = completion_tag(cx, unit, relayed.kma_key.kma_key_id);
            let message = Message::Completion {
                stream,
                segment: header.segment,
                tag,
            };
            cx.send(source, &message);
        }
    }

    /// The destination holds a unit; or says so again.
    pub(crate) fn completed(
        &mut self,
        cx: &mut Cx<'_>,
        peer: &NodeId,
        segment: SegmentNumber,
        tag: &[u8; 16],
    ) {
        let stream = stream_of(cx.me, peer);
        let Some(remote) = self.remotes.get_mut(peer) else {
            return;
        };
        let Some(departed) = remote.on_the_way.remove(&segment) else {
            release_again(cx, &stream, segment);
            return;
        };
        let expected = completion_tag(cx, departed.unit.expose(), departed.kma_key_id);
        if !bool::from(expected.ct_eq(tag)) {
            cx.store.discard(&stream, segment, DiscardReason::Mismatch);
            cx.alarm(Alarm::UnitMismatch {
                stream: stream.clone(),
                segment,
            });
            cx.send(peer, &Message::Void { stream, segment });
            return;
        }
        remote.pause = BACK_OFF.0;
        let stored = cx.store.store(NewSegment {
            stream: stream.clone(),
            number: segment,
            stage: Stage::Confirmed,
            key_type: KeyType::Encrypting,
            total_bits: u32::try_from(departed.unit.len_bytes() * 8).unwrap_or(u32::MAX),
            head_bytes: UNIT_HEAD_BYTES,
            level: departed.level,
            kma_key_id: departed.kma_key_id,
            composition: None,
            key: departed.unit.expose(),
        });
        match stored {
            Ok(()) => release_again(cx, &stream, segment),
            Err(error) => {
                cx.failed.get_or_insert(error);
            }
        }
    }

    /// A unit could not be carried; here, or one hop further.
    pub(crate) fn failed(&mut self, cx: &mut Cx<'_>, route: &[NodeId], segment: SegmentNumber) {
        match (route.first(), route.last()) {
            (Some(source), Some(destination)) if source == cx.me => {
                self.fail(cx, destination, segment, DiscardReason::RelayFailed);
            }
            _ => send_back(cx, route, segment),
        }
    }

    /// The peer's store was replaced: what is on its way to it is void.
    pub(crate) fn peer_replaced(&mut self, cx: &mut Cx<'_>, peer: &NodeId) {
        let Some(remote) = self.remotes.get_mut(peer) else {
            return;
        };
        for segment in std::mem::take(&mut remote.on_the_way).into_keys() {
            cx.store.discard(
                &stream_of(cx.me, peer),
                segment,
                DiscardReason::PeerStoreReplaced,
            );
        }
    }
}

/// The end-to-end stream from here.
pub(crate) fn stream_of(me: &NodeId, destination: &NodeId) -> StreamId {
    StreamId::EndToEnd {
        source: me.clone(),
        destination: destination.clone(),
    }
}

/// The route's second node, if the route leads from here over a neighbour to the destination.
fn next_hop(
    config: &KmaConfig,
    route: &[NodeId],
    me: &NodeId,
    destination: &NodeId,
) -> Option<NodeId> {
    let fits = route.first() == Some(me) && route.last() == Some(destination) && is_simple(route);
    next_of(route, me).filter(|next| fits && config.neighbours.contains_key(next))
}

fn next_of(route: &[NodeId], me: &NodeId) -> Option<NodeId> {
    let at = route.iter().position(|node| node == me)?;
    route.get(at + 1).cloned()
}

/// At least two nodes, not too many, none twice.
fn is_simple(route: &[NodeId]) -> bool {
    let distinct: std::collections::BTreeSet<_> = route.iter().collect();
    (2..=ROUTE_MAX).contains(&route.len()) && distinct.len() == route.len()
}

/// Tells the KMA before this one that a unit is lost.
fn send_back(cx: &mut Cx<'_>, route: &[NodeId], segment: SegmentNumber) {
    let at = route.iter().position(|node| node == cx.me);
    if let Some(previous) = at.and_then(|at| at.checked_sub(1)).map(|at| &route[at]) {
        let message = Message::RelayFailed {
            route: route.to_vec(),
            segment,
        };
        cx.send(previous, &message);
    }
}

/// Metadata of a unit that leaves its source (Y.3803 clause 8.2.3 and Table 1 (3)).
fn departure(
    cx: &Cx<'_>,
    route: &[NodeId],
    kma_key_id: KmaKeyId,
    unit: &KeyBuf,
) -> RelayedKeyMetadata {
    let destination = route.last().unwrap_or(cx.me).clone();
    let kma_key = KmaKeyMetadata {
        key_bits: u32::try_from(unit.len_bytes() * 8).ok(),
        key_type: Some(KeyType::Encrypting),
        kma: Some(cx.me.clone()),
        generated_at: Some(cx.now.unix),
        ..KmaKeyMetadata::new(kma_key_id, destination)
    };
    let first = RelayedKeyMetadata {
        source_kma: None,
        destination_kma: None,
        relayed_at: None,
        encryption: None,
        kma_key,
        level: SecurityLevel::Any,
        hops: Vec::new(),
    };
    one_hop_on(cx, first, route)
}

/// The relay information of the next hop: replaced in the standard items, appended to the history.
fn one_hop_on(
    cx: &Cx<'_>,
    mut metadata: RelayedKeyMetadata,
    route: &[NodeId],
) -> RelayedKeyMetadata {
    let to = next_of(route, cx.me).unwrap_or_else(|| cx.me.clone());
    let encryption = RelayEncryption::OneTimePad;
    metadata.source_kma = Some(cx.me.clone());
    metadata.destination_kma = Some(to.clone());
    metadata.relayed_at = Some(cx.now.unix);
    metadata.encryption = Some(encryption);
    metadata.hops.push(RelayHop {
        from: cx.me.clone(),
        to,
        at: cx.now.unix,
        encryption,
    });
    metadata
}

/// A whole key file in key memory.
fn key_file(cx: &Cx<'_>, metadata: RelayedKeyMetadata, unit: &[u8]) -> Option<KeyBuf> {
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

/// Sends a unit of others one hop further; `false` if it must wait.
fn onward(
    cx: &mut Cx<'_>,
    config: &KmaConfig,
    sessions: &mut BTreeMap<NodeId, Session>,
    transit: &Transit,
    next: &NodeId,
) -> bool {
    let floor = config.neighbours.get(next).map_or(0, |l| l.floor_bytes);
    let Ok(KeyFile {
        metadata: KeyMetadata::Relayed(metadata),
        key,
        ..
    }) = KeyFile::decode(transit.key_file.expose())
    else {
        send_back(cx, &transit.route, transit.segment);
        return true;
    };
    let Some(session) = sessions.get_mut(next) else {
        return false;
    };
    let metadata = one_hop_on(cx, metadata, &transit.route);
    let sent = key_file(cx, metadata, key)
        .ok_or(HopError::Memory)
        .and_then(|file| {
            hop::send(
                cx,
                session,
                next,
                floor,
                &transit.route,
                transit.segment,
                file,
            )
        });
    sent.is_ok()
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

/// POLYVAL_H over all of the unit after its head, its ID and its role, under mask 1.
fn completion_tag(cx: &Cx<'_>, unit: &[u8], kma_key_id: KmaKeyId) -> [u8; 16] {
    let (head, rest) = unit.split_at(UNIT_HEAD_BYTES as usize);
    let mut h = [0; 16];
    h.copy_from_slice(&head[..16]);
    let aad = [ROLE_COMPLETION, &kma_key_id.0].concat();
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
    let unit = cx.store.read_all(stream, &[span]).ok()?;
    Some(Message::Completion {
        stream: stream.clone(),
        segment,
        tag: completion_tag(cx, unit.expose(), kma_key_id),
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
    let known = cx
        .store
        .read(stream, release_span(segment), &mut release)
        .is_ok();
    let stream = stream.clone();
    let message = if known {
        Message::Commit {
            stream,
            segment,
            release,
        }
    } else {
        Message::Void { stream, segment }
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
