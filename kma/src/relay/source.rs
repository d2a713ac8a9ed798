//! The source of units: random bits towards every remote KMA, ahead of demand.

use std::{collections::BTreeMap, time::Duration};

use qkd_keyfile::{
    Entropy, KmaKeyId, Mono, NodeId, SegmentNumber,
    metadata::{KeyType, RelayedKeyMetadata, SecurityLevel},
};
use qkd_secmem::KeyBuf;
use subtle::ConstantTimeEq;

use super::{
    UNIT_HEAD_BYTES, UNIT_TIMEOUT, is_simple, next_of, store_unit, stream_of,
    unit::{self, completion_tag, release_again},
};
use crate::{
    digest::unit_key_id,
    hop::{self, HopError, Leg},
    io::{Alarm, Cx, KmaConfig, Output, RemoteConfig},
    record::{DiscardReason, Stage},
    session::Session,
    stock::{Flow, Stocks, Want},
    store::NewSegment,
    wire::Message,
};

/// Units of one destination on their way at a time.
const WINDOW: usize = 16;

/// Pause after a failure, doubled up to the longest.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));

/// How long an answer about a route is waited for before it is asked again.
const ROUTE_PATIENCE: Duration = Duration::from_secs(2);

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
    /// Of its first hop.
    metadata: Option<RelayedKeyMetadata>,
    at: Mono,
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
        let window = WINDOW.saturating_sub(self.on_the_way.len()) as u64;
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
    pub(super) fn poll(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &mut BTreeMap<NodeId, Session>,
        entropy: &mut dyn Entropy,
        stocks: &mut Stocks,
    ) {
        for destination in self.remotes.keys().cloned().collect::<Vec<_>>() {
            while self.start(cx, config, sessions, entropy, &destination, stocks) {}
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
            (next_hop(config, route, cx.me, destination).as_ref() == Some(next)).then_some(())?;
            Some(Want {
                flow: Flow::Own(destination.clone()),
                units: remote.missing_units(cx, sessions, stocks, destination),
                unit_bytes: u64::from(remote.config.unit_bytes + UNIT_HEAD_BYTES),
            })
        };
        self.remotes.iter().filter_map(want).collect()
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
        remote.pause(cx.now.mono);
        if remote.config.route.is_none() {
            remote.route = None;
        }
        let stream = stream_of(cx.me, destination);
        cx.store.discard(&stream, segment, reason);
        cx.send(destination, &Message::Void { stream, segment });
    }

    /// Sends one unit if the stock is below its target, it is its turn, and nothing stands in the way.
    fn start(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &mut BTreeMap<NodeId, Session>,
        entropy: &mut dyn Entropy,
        destination: &NodeId,
        stocks: &mut Stocks,
    ) -> bool {
        let Some(remote) = self.remotes.get_mut(destination) else {
            return false;
        };
        let stream = stream_of(cx.me, destination);
        if remote.missing_units(cx, sessions, stocks, destination) == 0 {
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
        let flow = Flow::Own(destination.clone());
        if !stocks.has_turn(&next, &flow) {
            return false;
        }
        let floor = config.neighbours.get(&next).map_or(0, |l| l.floor_bytes);
        let unit_bytes = UNIT_HEAD_BYTES.saturating_add(remote.config.unit_bytes) as usize;
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
        let metadata = unit::departure(cx, &route, kma_key_id, &unit);
        let leg = Leg {
            next: &next,
            floor_bytes: floor,
            route: &route,
            segment,
        };
        let sent = unit::key_file(cx, metadata.clone(), unit.expose())
            .ok_or(HopError::Memory)
            .and_then(|file| hop::send(cx, session, leg, file));
        if let Err(error) = sent {
            tracing::debug!(%destination, %error, "unit could not leave");
            cx.store
                .discard(&stream, segment, DiscardReason::RelayFailed);
            remote.pause(cx.now.mono);
            return false;
        }
        let departed = Departed {
            route,
            unit,
            kma_key_id,
            level: SecurityLevel::Any,
            metadata: Some(metadata),
            at: cx.now.mono,
        };
        remote.on_the_way.insert(segment, departed);
        stocks.sent(&next, &flow);
        true
    }

    /// The destination holds a unit; or says so again.
    pub(super) fn completed(
        &mut self,
        cx: &mut Cx<'_>,
        peer: &NodeId,
        segment: SegmentNumber,
        tag: &[u8; 16],
        stocks: &mut Stocks,
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
            remote.pause(cx.now.mono);
            cx.store.discard(&stream, segment, DiscardReason::Mismatch);
            cx.alarm(Alarm::UnitMismatch {
                stream: stream.clone(),
                segment,
            });
            cx.send(peer, &Message::Void { stream, segment });
            return;
        }
        remote.pause = BACK_OFF.0;
        let new = NewSegment {
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
            relayed: departed.metadata.as_ref(),
        };
        if store_unit(cx, new) {
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
