//! Fig. 7 and Fig. 8 (C-04 to C-06), at the destination: XORs of link keys, and the last link's key,
//! become the unit.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use qkd_keyfile::{KmaKeyId, Mono, NodeId, SegmentNumber, StreamId};
use qkd_secmem::KeyBuf;

use super::{
    UNIT_TIMEOUT, WAITING_MAX,
    destination::{self, Arrival},
    send_back, stream_of, unit,
    xor::{hop_of, places},
};
use crate::{
    io::{Cx, KmaConfig},
    record::RelayedWay,
    session::Session,
    wire::{CENTRE_PLACE, RelayHeader, Reservation, XorPart, XorPlan},
};

/// Relays that ended last: XORs of them that come again are acknowledged and nothing more.
const ENDED_MAX: usize = 1024;

/// Relays whose last key is reserved here, and XORs that came before that.
#[derive(Debug, Default)]
pub(super) struct Gathers {
    open: BTreeMap<KmaKeyId, Gather>,
    early: Vec<(NodeId, XorPart, Mono)>,
    ended: VecDeque<KmaKeyId>,
}

/// A unit in the making.
#[derive(Debug)]
pub(super) struct Gather {
    relay: KmaKeyId,
    from: NodeId,
    route: Vec<NodeId>,
    segment: SegmentNumber,
    plan: XorPlan,
    way: RelayedWay,
    /// The last link's key, and every XOR so far.
    bits: KeyBuf,
    missing: BTreeSet<u8>,
    since: Mono,
}

impl Gather {
    pub(super) fn new(
        cx: &Cx<'_>,
        header: RelayHeader,
        reservation: Reservation,
        plan: XorPlan,
        bits: KeyBuf,
    ) -> Self {
        let mut way = reservation.way;
        let mut missing: BTreeSet<u8> = places(&plan, &header.route).collect();
        if let Some(centre) = &plan.centre
            && !missing.is_empty()
        {
            missing = BTreeSet::from([CENTRE_PLACE]);
            let mut hop = hop_of(cx, cx.me);
            hop.from = centre.clone();
            way = way.then(hop);
        }
        let before = header.route.len().checked_sub(2);
        Self {
            relay: reservation.relay,
            from: before.map_or_else(|| cx.me.clone(), |at| header.route[at].clone()),
            route: header.route,
            segment: header.segment,
            plan,
            way,
            bits,
            missing,
            since: cx.now.mono,
        }
    }

    /// Who may send the XOR of a place.
    fn sender(&self, place: u8) -> Option<&NodeId> {
        match place {
            CENTRE_PLACE => self.plan.centre.as_ref(),
            place => self.route.get(usize::from(place)),
        }
    }
}

impl Gathers {
    /// The last link's key is reserved.
    pub(super) fn begin(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &BTreeMap<NodeId, Session>,
        gather: Gather,
    ) {
        let relay = gather.relay;
        let same = self.open.values().filter(|open| open.from == gather.from);
        if same.count() >= WAITING_MAX || self.open.contains_key(&relay) {
            return send_back(cx, &gather.route, gather.segment);
        }
        self.open.insert(relay, gather);
        let (early, rest) = std::mem::take(&mut self.early)
            .into_iter()
            .partition(|(_, part, _)| part.relay == relay);
        self.early = rest;
        for (peer, part, _) in early {
            self.add(cx, &peer, &part);
        }
        self.finish(cx, config, sessions, relay);
    }

    /// An XOR has come.
    pub(super) fn part(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &BTreeMap<NodeId, Session>,
        peer: &NodeId,
        part: XorPart,
    ) {
        let relay = part.relay;
        if self.open.contains_key(&relay) {
            self.add(cx, peer, &part);
            self.finish(cx, config, sessions, relay);
        } else if !self.ended.contains(&relay)
            && self.early.iter().filter(|(from, ..)| from == peer).count() < WAITING_MAX
        {
            self.early.push((peer.clone(), part, cx.now.mono));
        }
    }

    fn add(&mut self, cx: &Cx<'_>, peer: &NodeId, part: &XorPart) {
        let Some(gather) = self.open.get_mut(&part.relay) else {
            return;
        };
        let fits = gather.sender(part.place) == Some(peer)
            && part.route == gather.route
            && part.plan == gather.plan
            && part.ciphertext.len() == gather.bits.len_bytes();
        if fits && gather.missing.remove(&part.place) {
            let bits = gather.bits.expose_mut();
            cx.backend.xor_in_place(bits, &part.ciphertext);
        } else if !fits {
            tracing::warn!(%peer, place = part.place, "XOR that fits no relay");
        }
    }

    /// Once no XOR is missing, the bits are the unit.
    fn finish(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &BTreeMap<NodeId, Session>,
        relay: KmaKeyId,
    ) {
        let complete = |gather: &Gather| gather.missing.is_empty();
        if !self.open.get(&relay).is_some_and(complete) {
            return;
        }
        let Some(gather) = self.open.remove(&relay) else {
            return;
        };
        self.end(relay);
        let (len, way) = (gather.bits.len_bytes(), gather.way);
        let relayed = unit::metadata(cx, &gather.route, relay, len, way);
        let arrival = Arrival {
            route: &gather.route,
            segment: gather.segment,
            relayed: &relayed,
            unit: gather.bits.expose(),
        };
        destination::arrived(cx, config, sessions, arrival);
    }

    fn end(&mut self, relay: KmaKeyId) {
        if self.ended.len() >= ENDED_MAX {
            self.ended.pop_front();
        }
        self.ended.push_back(relay);
    }

    pub(super) fn give_up(&mut self, cx: &mut Cx<'_>) {
        let now = cx.now.mono;
        let late = |since| now.since(since) > UNIT_TIMEOUT;
        self.early.retain(|(_, _, since)| !late(*since));
        let ended = self.open.values().filter(|open| late(open.since));
        for relay in ended.map(|open| open.relay).collect::<Vec<_>>() {
            self.fail(cx, relay);
        }
    }

    /// A unit in the making is given up, and those before this node are told.
    pub(super) fn fail(&mut self, cx: &mut Cx<'_>, relay: KmaKeyId) {
        if let Some(gather) = self.open.remove(&relay) {
            self.end(relay);
            send_back(cx, &gather.route, gather.segment);
        }
    }

    /// The source has given a unit up.
    pub(super) fn void(&mut self, stream: &StreamId, segment: SegmentNumber) {
        let this = |open: &Gather| {
            let (first, last) = (open.route.first(), open.route.last());
            let same = first.zip(last).map(|(a, b)| stream_of(a, b));
            open.segment == segment && same.as_ref() == Some(stream)
        };
        let found = self.open.values().find(|open| this(open));
        if let Some(relay) = found.map(|open| open.relay) {
            self.open.remove(&relay);
            self.end(relay);
        }
    }
}
