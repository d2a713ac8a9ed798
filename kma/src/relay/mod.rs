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

use qkd_keyfile::{Entropy, NodeId, SegmentNumber, StreamId};

use crate::{
    hop::{self, HopError},
    io::{Alarm, Cx, KmaConfig},
    session::Session,
    store::NewSegment,
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
}

impl Relay {
    pub(crate) fn new(config: &KmaConfig, incarnation: u64) -> Self {
        Self {
            source: Source::new(config, incarnation),
            transits: Transits::default(),
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
        self.transits.carry_on(cx, config, sessions);
        self.source.poll(cx, config, sessions, entropy);
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
            self.transits.push(cx, peer, header, key_file);
            self.transits.carry_on(cx, config, sessions);
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
        self.source.completed(cx, peer, segment, tag);
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
