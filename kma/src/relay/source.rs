//! The source of units: stock towards every remote KMA, ahead of demand.

use std::{collections::BTreeMap, time::Duration};

use qkd_keyfile::{
    Entropy, KmaKeyId, Mono, NodeId, SegmentNumber,
    metadata::{KeyType, RelayEncryption, SecurityLevel},
};
use qkd_secmem::KeyBuf;
use subtle::ConstantTimeEq;

use super::{
    UNIT_HEAD_BYTES, UNIT_TIMEOUT, link_key,
    physical::Physical,
    random,
    route::first_hop,
    store_unit, stream_of,
    unit::{self, completion_tag, release_again},
    xor::Xors,
};
use crate::{
    digest::unit_key_id,
    hop::{self, HopError, Leg},
    io::{Alarm, Cx, KmaConfig, Output, RemoteConfig},
    policy::{RandomSource, RelayScheme},
    record::{DiscardReason, RelayedWay, Stage},
    session::Session,
    stock::{Flow, Stocks, Want},
    store::NewSegment,
    wire::Message,
};

/// Units of one destination on their way at a time: as many as these bytes of key, within these
/// numbers. Four commits lie on a unit's way there and back; the way must stay filled meanwhile.
const WINDOW_BYTES: u64 = 8 << 20;
const WINDOW_UNITS: (u64, u64) = (16, 192);

/// The part of key memory that they may take.
const WINDOW_SHARE: usize = 8;

/// Pause after a failure, doubled up to the longest.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));

/// How long an answer about a route is waited for before it is asked again.
const ROUTE_PATIENCE: Duration = Duration::from_secs(2);

/// What the source works with besides the store.
pub(super) struct Around<'a> {
    pub(super) config: &'a KmaConfig,
    pub(super) sessions: &'a mut BTreeMap<NodeId, Session>,
    pub(super) entropy: &'a mut dyn Entropy,
    pub(super) stocks: &'a mut Stocks,
    pub(super) physical: &'a mut Physical,
    pub(super) xors: &'a mut Xors,
}

/// A unit that is about to leave.
#[derive(Debug, Clone, Copy)]
pub(super) struct Departure<'a> {
    /// Its first hop.
    pub(super) leg: Leg<'a>,
    /// Its length, check bits and all.
    pub(super) len_bytes: u32,
    /// Its ID, and that of its relay.
    pub(super) kma_key_id: KmaKeyId,
}

/// A destination's word that it holds a unit.
#[derive(Debug)]
pub(crate) struct Completion {
    pub(crate) segment: SegmentNumber,
    /// How the unit came there.
    pub(crate) way: RelayedWay,
    pub(crate) tag: [u8; 16],
}

/// All destinations.
#[derive(Debug)]
pub(super) struct Source {
    incarnation: u64,
    remotes: BTreeMap<NodeId, Remote>,
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
    route: Vec<NodeId>,
    unit: KeyBuf,
    kma_key_id: KmaKeyId,
    level: SecurityLevel,
    at: Mono,
}

/// Units on their way to one destination, at most.
fn window_units(unit_bytes: u32, memory_bytes: usize) -> u64 {
    let (least, most) = WINDOW_UNITS;
    let bytes = WINDOW_BYTES.min((memory_bytes / WINDOW_SHARE) as u64);
    (bytes / u64::from(unit_bytes).max(1)).clamp(least, most)
}

impl Remote {
    fn coming_bytes(&self) -> u64 {
        self.on_the_way.len() as u64 * u64::from(self.config.unit_bytes)
    }

    /// Units that could leave now and that the stock is short of.
    fn missing_units(
        &self,
        cx: &Cx<'_>,
        sessions: &BTreeMap<NodeId, Session>,
        stocks: &Stocks,
        destination: &NodeId,
    ) -> u64 {
        let reached = sessions.get(destination).is_some_and(Session::is_up);
        if !reached || cx.now.mono < self.paused_until {
            return 0;
        }
        let stock_bytes = cx.store.available_bytes(&stream_of(cx.me, destination));
        let missing_bytes = stocks
            .target_bytes(destination)
            .saturating_sub(stock_bytes + self.coming_bytes());
        let window = window_units(self.config.unit_bytes, cx.store.memory_bytes());
        let window = window.saturating_sub(self.on_the_way.len() as u64);
        missing_bytes
            .div_ceil(u64::from(self.config.unit_bytes).max(1))
            .min(window)
    }

    fn pause(&mut self, now: Mono) {
        self.paused_until = now.after(self.pause);
        self.pause = (self.pause * 2).min(BACK_OFF.1);
    }
}

impl Source {
    pub(super) fn new(config: &KmaConfig, incarnation: u64) -> Self {
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
        }
    }

    /// The controller's answer.
    pub(super) fn routed(&mut self, destination: &NodeId, route: Option<Vec<NodeId>>) {
        if let Some(remote) = self.remotes.get_mut(destination)
            && remote.config.route.is_none()
        {
            remote.route = route;
        }
    }

    /// Starts what is due and has its turn.
    pub(super) fn poll(&mut self, cx: &mut Cx<'_>, mut around: Around<'_>) {
        for destination in self.remotes.keys().cloned().collect::<Vec<_>>() {
            while self.start(cx, &mut around, &destination) {}
        }
    }

    /// Discards units that took too long.
    pub(super) fn give_up(&mut self, cx: &mut Cx<'_>) {
        let mut late: Vec<(NodeId, SegmentNumber)> = Vec::new();
        for (destination, remote) in &self.remotes {
            let units = remote.on_the_way.iter();
            let old = units.filter(|(_, unit)| cx.now.mono.since(unit.at) > UNIT_TIMEOUT);
            late.extend(old.map(|(&number, _)| (destination.clone(), number)));
        }
        for (destination, number) in late {
            self.fail(cx, &destination, number, DiscardReason::TimedOut);
        }
    }

    /// Bytes of key on their way to a destination.
    pub(super) fn coming_bytes(&self, destination: &NodeId) -> u64 {
        self.remotes
            .get(destination)
            .map_or(0, Remote::coming_bytes)
    }

    /// What would be sent over the link to `next` now.
    pub(super) fn wants(
        &self,
        cx: &Cx<'_>,
        config: &KmaConfig,
        sessions: &BTreeMap<NodeId, Session>,
        stocks: &Stocks,
        next: &NodeId,
    ) -> Vec<Want> {
        let want = |(destination, remote): (&NodeId, &Remote)| {
            let route = remote.route.as_ref()?;
            let policy = config.relay.of(cx.me, destination);
            let len_bytes = UNIT_HEAD_BYTES.saturating_add(remote.config.unit_bytes);
            (first_hop(config, route, destination).as_ref() == Some(next)).then_some(())?;
            Some(Want {
                flow: Flow::Own(destination.clone()),
                units: remote.missing_units(cx, sessions, stocks, destination),
                unit_bytes: need_bytes(len_bytes, &policy.scheme),
            })
        };
        self.remotes.iter().filter_map(want).collect()
    }

    /// A unit on its way is void.
    pub(super) fn suspect(&mut self, cx: &mut Cx<'_>, unit: KmaKeyId) {
        let remotes = self.remotes.iter();
        let found = remotes.flat_map(|(destination, remote)| {
            let units = remote.on_the_way.iter();
            let these = units.filter(|(_, departed)| departed.kma_key_id == unit);
            these.map(|(&number, _)| (destination.clone(), number))
        });
        for (destination, number) in found.collect::<Vec<_>>() {
            self.fail(cx, &destination, number, DiscardReason::Suspected);
        }
    }

    /// A unit will not arrive: void, here and wherever it is.
    pub(super) fn fail(
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
        remote.pause(cx.now.mono);
        if remote.config.route.is_none() {
            remote.route = None;
        }
        let stream = stream_of(cx.me, destination);
        cx.store.discard(&stream, segment, reason);
        cx.send(destination, &Message::Void { stream, segment });
    }

    /// Sends one unit if the stock is below its target, it is its turn, and nothing stands in the way.
    fn start(&mut self, cx: &mut Cx<'_>, around: &mut Around<'_>, destination: &NodeId) -> bool {
        let Some(remote) = self.remotes.get_mut(destination) else {
            return false;
        };
        let config = around.config;
        let stream = stream_of(cx.me, destination);
        if remote.missing_units(cx, around.sessions, around.stocks, destination) == 0 {
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
        let Some(next) = first_hop(config, &route, destination) else {
            tracing::warn!(%destination, ?route, "route does not lead from here over a neighbour to there, or is too long");
            remote.route.clone_from(&remote.config.route);
            remote.paused_until = cx.now.mono.after(BACK_OFF.1);
            return false;
        };
        let flow = Flow::Own(destination.clone());
        let policy = config.relay.of(cx.me, destination);
        let floor_bytes = config.neighbours.get(&next).map_or(0, |l| l.floor_bytes);
        let len_bytes = UNIT_HEAD_BYTES.saturating_add(remote.config.unit_bytes);
        let Some(session) = around.sessions.get_mut(&next) else {
            return false;
        };
        let mut leg = Leg {
            next: &next,
            floor_bytes,
            route: &route,
            segment: SegmentNumber(0),
            may_fall_back: policy.allows_aes(),
            falls_back: policy.allows_aes(),
        };
        let has_turn = around.stocks.has_turn(&next, &flow);
        if !is_ready(cx, session, leg, len_bytes, &policy.scheme, has_turn)
            || (policy.scheme.random() == Some(RandomSource::Physical)
                && !around.physical.has(cx, len_bytes as usize))
        {
            return false;
        }
        let segment = cx.store.propose(&stream, None);
        leg.segment = segment;
        let departure = Departure {
            leg,
            len_bytes,
            kma_key_id: unit_key_id(cx.me, destination, self.incarnation, segment),
        };
        let entropy: &mut dyn Entropy = &mut *around.entropy;
        let parts = (entropy, &mut *around.physical, &mut *around.xors);
        match depart(cx, session, &departure, &policy.scheme, parts) {
            Ok((unit, level)) => {
                let kma_key_id = departure.kma_key_id;
                let departed = Departed {
                    route,
                    unit,
                    kma_key_id,
                    level,
                    at: cx.now.mono,
                };
                remote.on_the_way.insert(segment, departed);
                around.stocks.sent(&next, &flow);
                true
            }
            Err(error) => {
                tracing::debug!(%destination, %error, "unit could not leave");
                let reason = DiscardReason::RelayFailed;
                cx.store.discard(&stream, segment, reason);
                remote.pause(cx.now.mono);
                false
            }
        }
    }

    /// The destination holds a unit; or says so again.
    pub(super) fn completed(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        peer: &NodeId,
        completion: Completion,
        stocks: &mut Stocks,
    ) {
        let Completion { segment, way, tag } = completion;
        let stream = stream_of(cx.me, peer);
        let Some(remote) = self.remotes.get_mut(peer) else {
            return;
        };
        let Some(departed) = remote.on_the_way.remove(&segment) else {
            release_again(cx, &stream, segment);
            return;
        };
        let bytes = departed.unit.expose();
        let expected = completion_tag(cx, bytes, departed.kma_key_id, &way);
        if !bool::from(expected.ct_eq(&tag)) {
            remote.pause(cx.now.mono);
            cx.store.discard(&stream, segment, DiscardReason::Mismatch);
            cx.alarm(Alarm::UnitMismatch {
                stream: stream.clone(),
                segment,
            });
            cx.send(peer, &Message::Void { stream, segment });
            return;
        }
        let level = departed.level.min(way.weakest());
        let (route, id) = (&departed.route, departed.kma_key_id);
        let relayed = unit::metadata(cx, route, id, bytes.len(), way);
        let new = NewSegment {
            stream: stream.clone(),
            number: segment,
            stage: Stage::Confirmed,
            key_type: KeyType::Encrypting,
            total_bits: u32::try_from(bytes.len() * 8).unwrap_or(u32::MAX),
            head_bytes: UNIT_HEAD_BYTES,
            level,
            kma_key_id: departed.kma_key_id,
            composition: None,
            key: departed.unit,
            relayed: Some(&relayed),
        };
        let is_worth_it = level >= config.relay.of(cx.me, peer).level;
        if is_worth_it && store_unit(cx, new) {
            remote.pause = BACK_OFF.0;
            stocks.arrived(peer, cx.now.mono.since(departed.at));
            release_again(cx, &stream, segment);
        } else {
            remote.pause(cx.now.mono);
            cx.store.discard(&stream, segment, DiscardReason::NotStored);
            cx.send(peer, &Message::Void { stream, segment });
        }
    }

    /// A KMA on the way could not carry a unit.
    pub(super) fn failed(&mut self, cx: &mut Cx<'_>, route: &[NodeId], segment: SegmentNumber) {
        let Some(destination) = route.last() else {
            return;
        };
        let remote = self.remotes.get(destination);
        let departed = remote.and_then(|remote| remote.on_the_way.get(&segment));
        if departed.is_some_and(|departed| departed.route == route) {
            self.fail(cx, destination, segment, DiscardReason::RelayFailed);
        }
    }

    /// The peer's store was replaced: what is on its way to it is void.
    pub(super) fn peer_replaced(&mut self, cx: &mut Cx<'_>, peer: &NodeId) {
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

/// Bits of the first link that a unit takes, besides tags and metadata.
fn need_bytes(len_bytes: u32, scheme: &RelayScheme) -> u64 {
    let twice = scheme.random() == Some(RandomSource::Qkd);
    u64::from(len_bytes) * (1 + u64::from(twice))
}

/// Whether a unit can leave now: in its turn, with enough of the first link for its scheme; or under
/// AES, which is no turn's, where there is not.
fn is_ready(
    cx: &Cx<'_>,
    session: &Session,
    leg: Leg<'_>,
    len_bytes: u32,
    scheme: &RelayScheme,
    has_turn: bool,
) -> bool {
    let relays_random = matches!(scheme, RelayScheme::Random(_));
    let takes_none = scheme.random() != Some(RandomSource::Qkd);
    let leg = Leg {
        falls_back: leg.falls_back && relays_random && takes_none,
        ..leg
    };
    let need = usize::try_from(need_bytes(len_bytes, scheme)).unwrap_or(usize::MAX);
    match hop::method(cx, session, leg, need) {
        Some(RelayEncryption::OneTimePad) => has_turn,
        Some(_) => true,
        None => false,
    }
}

/// Sends a unit on its way by its scheme. Returns its bits and their level so far.
fn depart(
    cx: &mut Cx<'_>,
    session: &mut Session,
    departure: &Departure<'_>,
    scheme: &RelayScheme,
    (entropy, physical, xors): (&mut dyn Entropy, &mut Physical, &mut Xors),
) -> Result<(KeyBuf, SecurityLevel), HopError> {
    let random = scheme
        .random()
        .map(|source| random::draw(cx, source, departure, (entropy, physical)))
        .transpose()?;
    let centre = match scheme {
        RelayScheme::AtCentre { centre, .. } => Some(centre),
        _ => None,
    };
    match (scheme, random) {
        (RelayScheme::Random(_), Some(bits)) => random::depart(cx, session, departure, bits),
        (RelayScheme::LinkKey | RelayScheme::Random(_), _) => {
            link_key::depart(cx, session, departure)
        }
        (_, random) => xors.depart(cx, session, departure, centre, random),
    }
}
