//! Key relay (Y.3803 clause 8.2.3; clause 9, case 2): random bits of the source, carried hop by hop
//! under one-time pad, checked end to end before anyone may use them.
//!
//! A *unit* is [`UNIT_HEAD_BYTES`] of check bits (POLYVAL key, mask 1, mask 2) and the key data. The
//! destination stores it and sends a *completion* over all its bits under mask 1; the source stores
//! it and sends the *release*, mask 2. A unit whose relay failed, or took too long, is discarded and
//! never sent again.

mod destination;
mod source;
mod transit;
mod unit;

use std::{collections::BTreeMap, time::Duration};

use qkd_keyfile::{Entropy, LinkId, Mono, NodeId, SegmentNumber, StreamId};

use crate::{
    hop::{self, HopError},
    io::{Alarm, Cx, KmaConfig, SupplyOrder},
    session::Session,
    stock::{StockStatus, Stocks},
    store::{NewSegment, Store},
    supply::Asked,
    wire::{Message, SealedHop},
};

pub(crate) use unit::{completion_again, release_again, release_fits};

use source::Source;
use transit::Transits;

/// Bytes at the head of a unit that are never supplied.
pub(crate) const UNIT_HEAD_BYTES: u32 = 48;

/// A unit that is not complete after this time is discarded, wherever it is.
const UNIT_TIMEOUT: Duration = Duration::from_secs(10);

/// KMAs on one route, at most.
const ROUTE_MAX: usize = 16;

/// The relay side of a KMA: source, way station and destination.
#[derive(Debug)]
pub(crate) struct Relay {
    source: Source,
    transits: Transits,
    stocks: Stocks,
}

impl Relay {
    pub(crate) fn new(config: &KmaConfig, incarnation: u64) -> Self {
        Self {
            source: Source::new(config, incarnation),
            transits: Transits::default(),
            stocks: Stocks::new(config),
        }
    }

    /// The controller's answer.
    pub(crate) fn routed(&mut self, destination: &NodeId, route: Option<Vec<NodeId>>) {
        self.source.routed(destination, route);
    }

    /// Starts, gives up and carries on what is due.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &mut BTreeMap<NodeId, Session>,
        entropy: &mut dyn Entropy,
    ) {
        self.stocks.tick(cx.now.mono);
        self.source.give_up(cx);
        for next in config.neighbours.keys() {
            self.share_out(cx, config, sessions, next);
        }
        let stocks = &mut self.stocks;
        self.transits.carry_on(cx, config, sessions, stocks);
        self.source.poll(cx, config, sessions, entropy, stocks);
    }

    /// Shares out the pad of a link among all that would send a unit over it.
    fn share_out(
        &mut self,
        cx: &Cx<'_>,
        config: &KmaConfig,
        sessions: &BTreeMap<NodeId, Session>,
        next: &NodeId,
    ) {
        let floor_bytes = config.neighbours.get(next).map_or(0, |l| l.floor_bytes);
        let pad = LinkId::between(cx.me, next).map(StreamId::Link);
        let pad_bytes = pad.map_or(0, |pad| cx.store.available_bytes(&pad));
        let mut wants = Vec::new();
        if sessions.get(next).is_some_and(|s| s.open_id().is_some()) {
            wants = self.source.wants(cx, config, sessions, &self.stocks, next);
            wants.extend(self.transits.wants(cx.me, next));
        }
        // What a hop asks for beyond its unit must be there too, or turns would be given that cannot
        // be taken, and taken in another order than given.
        let aside_bytes = floor_bytes.saturating_add(hop::METADATA_ALLOWANCE_BYTES);
        let free_bytes = pad_bytes.saturating_sub(aside_bytes);
        self.stocks.share_out(next, free_bytes, wants);
    }

    /// Applications asked for keys: the stock follows.
    pub(crate) fn asked(&mut self, now: Mono, order: &SupplyOrder, asked: Asked) {
        let bytes = u64::from(order.number) * order.size.bytes() as u64;
        match asked {
            Asked::Supplied(StreamId::EndToEnd { destination, .. }) => {
                self.stocks.supplied(now, &destination, bytes);
            }
            Asked::Supplied(StreamId::Link(_)) => {
                self.stocks
                    .supplied_from_link(now, &order.destination, bytes);
            }
            Asked::NotEnough => self.stocks.refused(now, &order.destination, bytes),
            Asked::InVain => {}
        }
    }

    /// What an operator sees of the end-to-end stocks.
    pub(crate) fn stocks(&self, store: &Store, me: &NodeId) -> Vec<StockStatus> {
        self.stocks.status(|with| {
            let stock_bytes = store.available_bytes(&stream_of(me, with));
            (stock_bytes, self.source.coming_bytes(with))
        })
    }

    /// A hop has come.
    pub(crate) fn hop(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &mut BTreeMap<NodeId, Session>,
        peer: &NodeId,
        hop: &SealedHop,
    ) {
        let Some(session) = sessions.get_mut(peer) else {
            return;
        };
        let (header, key_file) = match hop::receive(cx, session, peer, hop) {
            Ok(Some(arrived)) => arrived,
            Ok(None) => return,
            Err(error) => return refused(cx, peer, &error),
        };
        let me = is_simple(&header.route).then(|| place_in(&header.route, cx.me));
        let Some(at) = me
            .flatten()
            .filter(|&at| header.route[..at].last() == Some(peer))
        else {
            tracing::warn!(%peer, route = ?header.route, "unit on a route that does not lead here");
            return;
        };
        if at + 1 == header.route.len() {
            destination::arrived(cx, sessions, &header, &key_file);
        } else if config.relay_for_others {
            let next = next_of(&header.route, cx.me);
            self.transits.push(cx, peer, header, key_file);
            if let Some(next) = next {
                self.share_out(cx, config, sessions, &next);
            }
            self.transits
                .carry_on(cx, config, sessions, &mut self.stocks);
        } else {
            send_back(cx, &header.route, header.segment);
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
        self.source
            .completed(cx, peer, segment, tag, &mut self.stocks);
    }

    /// A unit could not be carried by `peer`, or further on. Only the KMA that a unit was sent to
    /// may say so.
    pub(crate) fn failed(
        &mut self,
        cx: &mut Cx<'_>,
        peer: &NodeId,
        route: &[NodeId],
        segment: SegmentNumber,
    ) {
        let next = next_of(route, cx.me);
        if !is_simple(route) || next.as_ref() != Some(peer) {
            tracing::warn!(%peer, ?route, "failure of a unit that was not sent there");
        } else if route.first() == Some(cx.me) {
            self.source.failed(cx, route, segment);
        } else {
            send_back(cx, route, segment);
        }
    }

    /// The peer's store was replaced: what is on its way to it is void.
    pub(crate) fn peer_replaced(&mut self, cx: &mut Cx<'_>, peer: &NodeId) {
        self.source.peer_replaced(cx, peer);
    }
}

/// The end-to-end stream from here.
pub(crate) fn stream_of(me: &NodeId, destination: &NodeId) -> StreamId {
    StreamId::EndToEnd {
        source: me.clone(),
        destination: destination.clone(),
    }
}

fn refused(cx: &mut Cx<'_>, peer: &NodeId, error: &HopError) {
    tracing::warn!(%peer, %error, "hop refused");
    let peer = peer.clone();
    match error {
        HopError::BadTag => cx.alarm(Alarm::BadTag { peer }),
        HopError::Misuse(_) => cx.alarm(Alarm::PadMisuse { peer }),
        HopError::Malformed | HopError::Memory | HopError::Short | HopError::Read => {}
    }
}

/// Stores a unit. Where there is no room for it, only this unit fails.
fn store_unit(cx: &mut Cx<'_>, new: NewSegment<'_>) -> bool {
    match cx.store.store(new) {
        Ok(()) => true,
        Err(error) => {
            tracing::error!(%error, "unit cannot be stored");
            cx.fail_if_final(error);
            false
        }
    }
}

/// Tells the KMA before this one that a unit is lost.
fn send_back(cx: &mut Cx<'_>, route: &[NodeId], segment: SegmentNumber) {
    let at = place_in(route, cx.me);
    if let Some(previous) = at.and_then(|at| at.checked_sub(1)).map(|at| &route[at]) {
        let message = Message::RelayFailed {
            route: route.to_vec(),
            segment,
        };
        cx.send(previous, &message);
    }
}

/// At least two nodes, not too many, none twice.
fn is_simple(route: &[NodeId]) -> bool {
    let bounded = (2..=ROUTE_MAX).contains(&route.len());
    let distinct = || {
        route
            .iter()
            .collect::<std::collections::BTreeSet<_>>()
            .len()
    };
    bounded && distinct() == route.len()
}

fn place_in(route: &[NodeId], node: &NodeId) -> Option<usize> {
    route.iter().position(|other| other == node)
}

fn next_of(route: &[NodeId], me: &NodeId) -> Option<NodeId> {
    route.get(place_in(route, me)? + 1).cloned()
}
