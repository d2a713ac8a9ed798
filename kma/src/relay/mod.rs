//! Key relay (Y.3803 clauses 8.2.3 and 9): units travel to another KMA and are checked end to end
//! before anyone may use them.
//!
//! A *unit* is [`UNIT_HEAD_BYTES`] of check bits (POLYVAL key, mask 1, mask 2) and the key data. The
//! destination stores it and sends a *completion* over all its bits under mask 1; the source stores
//! it and sends the *release*, mask 2. A unit whose relay failed, or took too long, is discarded and
//! never sent again.
//!
//! How the bits get to the destination is the scheme's: [`random`] (case 2), [`link_key`] (case 1),
//! [`xor`] (Fig. 7 and 8, with [`gather`] at the destination and [`centre`] in the middle). Bits that
//! a scheme uses otherwise than as pad of one hop are *reserved* first, at both ends of their link.

mod centre;
mod destination;
mod gather;
mod link_key;
mod physical;
mod random;
mod route;
mod source;
mod transit;
mod unit;
mod xor;

use std::{collections::BTreeMap, time::Duration};

use qkd_keyfile::{Entropy, KmaKeyId, LinkId, Mono, NodeId, SegmentNumber, StreamId};
use qkd_secmem::KeyBuf;

use crate::{
    hop::{self, Arrived, HopError},
    io::{Alarm, Cx, KmaConfig, SupplyOrder},
    record::DiscardReason,
    session::Session,
    stock::{PadNeed, StockStatus, Stocks},
    store::{NewSegment, Store},
    supply::Asked,
    wire::{HopRef, Message, RelayHeader, ReservedFor, XorPart},
};

pub(crate) use route::stream_of;
pub(crate) use source::Completion;
pub(crate) use unit::{completion_again, release_again, release_fits};

use physical::Physical;
use route::{is_short_enough, is_simple, next_of, place_after, place_in};
use source::Source;
use transit::Transits;
use xor::Xors;

/// Bytes at the head of a unit that are never supplied.
pub(crate) const UNIT_HEAD_BYTES: u32 = 48;

/// A unit that is not complete after this time is discarded, wherever it is.
const UNIT_TIMEOUT: Duration = Duration::from_secs(10);

/// What waits here of one neighbour, at most, of each kind; the rest fails at once. Each has its own
/// share, so that none can fill the way for the others.
const WAITING_MAX: usize = 64;

/// The relay side of a KMA: source, way station, centre and destination.
#[derive(Debug)]
pub(crate) struct Relay {
    source: Source,
    transits: Transits,
    stocks: Stocks,
    xors: Xors,
    physical: Physical,
}

impl Relay {
    pub(crate) fn new(config: &KmaConfig, incarnation: u64) -> Self {
        Self {
            source: Source::new(config, incarnation),
            transits: Transits::default(),
            stocks: Stocks::new(config),
            xors: Xors::default(),
            physical: Physical::default(),
        }
    }

    /// The controller's answer.
    pub(crate) fn routed(&mut self, destination: &NodeId, route: Option<Vec<NodeId>>) {
        self.source.routed(destination, route);
    }

    /// Bits of the physical generator.
    pub(crate) fn random(&mut self, bits: KeyBuf) {
        self.physical.add(bits);
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
            let pad = LinkId::between(cx.me, next).map(StreamId::Link);
            let pad = pad.and_then(|pad| cx.store.stream(&pad));
            let used_bytes = pad.map_or(0, |pad| pad.used_bytes);
            self.stocks.used(cx.now.mono, next, used_bytes);
            self.share_out(cx, config, sessions, next);
        }
        let stocks = &mut self.stocks;
        self.transits.carry_on(cx, config, sessions, stocks);
        self.xors.poll(cx, config, sessions, stocks);
        let around = source::Around {
            config,
            sessions,
            entropy,
            stocks,
            physical: &mut self.physical,
            xors: &mut self.xors,
        };
        self.source.poll(cx, around);
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
            wants.extend(self.xors.wants(cx.me, next));
        }
        // What a hop asks for beyond its unit must be there too, or turns would be given that cannot
        // be taken, and taken in another order than given.
        let aside_bytes = floor_bytes.saturating_add(hop::METADATA_ALLOWANCE_BYTES);
        let free_bytes = pad_bytes.saturating_sub(aside_bytes);
        self.stocks.share_out(next, free_bytes, wants);
    }

    /// Sends on what waits, after something has come that goes to `next`.
    fn carry_on(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &mut BTreeMap<NodeId, Session>,
        next: Option<NodeId>,
    ) {
        if let Some(next) = next {
            self.share_out(cx, config, sessions, &next);
        }
        let stocks = &mut self.stocks;
        self.transits.carry_on(cx, config, sessions, stocks);
        self.xors.poll(cx, config, sessions, stocks);
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

    /// What this end needs of the bits of the link with a neighbour.
    pub(crate) fn pad_need(&self, next: &NodeId) -> PadNeed {
        self.stocks.pad_need(next, hop::METADATA_ALLOWANCE_BYTES)
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
        hop: HopRef<'_>,
    ) {
        let Some(session) = sessions.get_mut(peer) else {
            return;
        };
        let arrived = match hop::receive(cx, session, peer, hop) {
            Ok(Some(arrived)) => arrived,
            Ok(None) => return,
            Err(error) => return refused(cx, peer, &error),
        };
        let (Arrived::File(header, _) | Arrived::Reserved(header, ..)) = &arrived;
        let Some(at) = place_after(config, &header.route, peer) else {
            tracing::warn!(%peer, route = ?header.route, "unit on a route that does not lead here");
            return refuse_back(cx, peer, header);
        };
        let (source, last) = (&header.route[0], header.route.len() - 1);
        let transit = config.relay.of(source, &header.route[last]).transit;
        if !is_short_enough(config, &header.route) || (at < last && !transit) {
            return send_back(cx, &header.route, header.segment);
        }
        match arrived {
            Arrived::File(header, file) if at == last => {
                destination::file_arrived(cx, config, sessions, &header, &file);
            }
            Arrived::File(header, file) => {
                let next = next_of(&header.route, cx.me);
                self.transits.push(cx, peer, header, file);
                self.carry_on(cx, config, sessions, next);
            }
            Arrived::Reserved(header, reservation, bits) => match &reservation.scheme {
                ReservedFor::LinkKey if at == 1 => {
                    let Some(file) = link_key::reserved(cx, &header, &reservation, &bits) else {
                        return send_back(cx, &header.route, header.segment);
                    };
                    if at == last {
                        destination::file_arrived(cx, config, sessions, &header, &file);
                    } else {
                        let next = next_of(&header.route, cx.me);
                        self.transits.push(cx, peer, header, file);
                        self.carry_on(cx, config, sessions, next);
                    }
                }
                ReservedFor::LinkKey => send_back(cx, &header.route, header.segment),
                ReservedFor::Xor(_) => {
                    let next = next_of(&header.route, cx.me);
                    let place = (peer, at);
                    self.xors
                        .reserved(cx, config, sessions, place, header, reservation, bits);
                    self.carry_on(cx, config, sessions, next);
                }
            },
        }
    }

    /// A neighbour has acknowledged a hop: XORs that waited for it may leave.
    pub(crate) fn hop_taken(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &mut BTreeMap<NodeId, Session>,
    ) {
        let stocks = &mut self.stocks;
        self.xors.poll(cx, config, sessions, stocks);
    }

    /// An XOR of two keys has come.
    pub(crate) fn xor(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &mut BTreeMap<NodeId, Session>,
        peer: &NodeId,
        part: XorPart,
    ) {
        let stocks = &mut self.stocks;
        self.xors.part(cx, config, sessions, peer, part, stocks);
    }

    /// The other end has an XOR, or does not want it any more.
    pub(crate) fn xor_taken(&mut self, peer: &NodeId, relay: KmaKeyId, place: u8) {
        self.xors.taken(peer, relay, place);
    }

    /// The destination holds a unit; or says so again.
    pub(crate) fn completed(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        peer: &NodeId,
        completion: Completion,
    ) {
        let stocks = &mut self.stocks;
        self.source.completed(cx, config, peer, completion, stocks);
    }

    /// The source has given a unit up.
    pub(crate) fn void(&mut self, stream: &StreamId, segment: SegmentNumber) {
        self.xors.void(stream, segment);
    }

    /// Others may know a unit of this node that is on its way.
    pub(crate) fn suspect_segment(
        &mut self,
        cx: &mut Cx<'_>,
        stream: &StreamId,
        segment: SegmentNumber,
    ) {
        if let StreamId::EndToEnd { destination, .. } = stream
            && *stream == stream_of(cx.me, destination)
        {
            self.source
                .fail(cx, destination, segment, DiscardReason::Suspected);
        }
    }

    /// Others may know a unit that is on its way from here, or in the making here.
    pub(crate) fn suspect_unit(&mut self, cx: &mut Cx<'_>, unit: KmaKeyId) {
        self.source.suspect(cx, unit);
        self.xors.suspect(cx, unit);
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
            self.xors.failed(route, segment);
            send_back(cx, route, segment);
        }
    }

    /// The peer's store was replaced: what is on its way to it is void.
    pub(crate) fn peer_replaced(&mut self, cx: &mut Cx<'_>, peer: &NodeId) {
        self.source.peer_replaced(cx, peer);
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

/// A neighbour that sends a unit where it cannot go on is told, if the route says that it was it.
fn refuse_back(cx: &mut Cx<'_>, peer: &NodeId, header: &RelayHeader) {
    let at = place_in(&header.route, cx.me);
    let before = at
        .and_then(|at| at.checked_sub(1))
        .map(|at| &header.route[at]);
    if is_simple(&header.route) && before == Some(peer) {
        send_back(cx, &header.route, header.segment);
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
