//! XORs of two link keys (Y.3803 clause 9, Fig. 7 and Fig. 8; C-04 to C-06): what the nodes of a
//! route do.
//!
//! The source reserves a range K1 of the first link; every node on the way reserves as many bits of
//! its next link, for the same relay. Once the node after it has acknowledged, a node has two keys, K
//! and K', that both their ends keep out of their pad pools: it sends K ⊕ K' and wipes both. So each
//! key but the first and the last is in exactly two ciphertexts, one from either end. With random
//! bits R of the source, the source sends R ⊕ K1, and the unit is R; without, the unit is K1.
//!
//! A ciphertext is said again, byte for byte, until it is taken.

use std::collections::BTreeMap;

use qkd_keyfile::{
    KmaKeyId, Mono, NodeId, SegmentNumber, StreamId,
    metadata::{RelayEncryption, RelayHop, SecurityLevel},
};
use qkd_secmem::KeyBuf;

use super::{
    UNIT_TIMEOUT, WAITING_MAX,
    centre::Centre,
    gather::{Gather, Gathers},
    next_of, send_back,
    source::Departure,
};
use crate::{
    RESEND_AFTER,
    hop::{self, HopError, Leg},
    io::{Cx, KmaConfig},
    record::RelayedWay,
    session::Session,
    stock::{Flow, Stocks, Want},
    wire::{Message, RelayHeader, Reservation, ReservedFor, XorPart, XorPlan},
};

/// Relays whose XORs this node makes, gathers or combines.
#[derive(Debug, Default)]
pub(super) struct Xors {
    waiting: Vec<Waiting>,
    leaving: Vec<Leaving>,
    gathers: Gathers,
    centre: Centre,
}

/// A key that was reserved here and waits for bits of the next link.
#[derive(Debug)]
struct Waiting {
    from: NodeId,
    header: RelayHeader,
    reservation: Reservation,
    plan: XorPlan,
    bits: KeyBuf,
    since: Mono,
}

/// An XOR on its way.
#[derive(Debug)]
struct Leaving {
    to: NodeId,
    part: XorPart,
    segment: Option<SegmentNumber>,
    /// The reservation that the node after this one has to acknowledge first, in its session.
    after: Option<(NodeId, (u64, u64))>,
    since: Mono,
    sent: Option<Mono>,
}

/// The places whose XORs make the unit, besides the last node's own key.
pub(super) fn places(plan: &XorPlan, route: &[NodeId]) -> std::ops::Range<u8> {
    let last = u8::try_from(route.len() - 1).unwrap_or(u8::MAX);
    u8::from(!plan.random)..last
}

/// Who XORs: the centre, or the destination.
fn target(plan: &XorPlan, route: &[NodeId]) -> Option<NodeId> {
    plan.centre.as_ref().or(route.last()).cloned()
}

impl Xors {
    /// The source's part: reserves the first key, and sends random bits under it if there are any.
    pub(super) fn depart(
        &mut self,
        cx: &mut Cx<'_>,
        session: &mut Session,
        departure: &Departure<'_>,
        centre: Option<&NodeId>,
        random: Option<(KeyBuf, SecurityLevel)>,
    ) -> Result<(KeyBuf, SecurityLevel), HopError> {
        let (leg, len) = (departure.leg, departure.len_bytes);
        let mut level = hop::level_of_link(cx, leg, len).ok_or(HopError::Short)?;
        if let Some((_, of_random)) = random {
            level = level.min(of_random);
        }
        let plan = XorPlan {
            centre: centre.cloned(),
            random: random.is_some(),
        };
        let to = target(&plan, leg.route).ok_or(HopError::Malformed)?;
        let mut way = RelayedWay::of_level(level);
        if plan.random {
            way = way.then(hop_of(cx, &to));
        }
        let reservation = Reservation {
            relay: departure.kma_key_id,
            scheme: ReservedFor::Xor(plan.clone()),
            way,
        };
        let id = session.open_id().ok_or(HopError::Short)?;
        let (mut first, sequence) = hop::reserve(cx, session, leg, len, reservation)?;
        let Some((random, _)) = random else {
            return Ok((first, level));
        };
        cx.backend.xor_in_place(first.expose_mut(), random.expose());
        let part = XorPart {
            relay: departure.kma_key_id,
            route: leg.route.to_vec(),
            plan,
            place: 0,
            ciphertext: first.expose().to_vec(),
        };
        let next = leg.next.clone();
        self.leave(
            cx,
            to,
            part,
            Some(leg.segment),
            Some((next, (id, sequence))),
        );
        Ok((random, level))
    }

    /// A neighbour has reserved a key of the link with this node: `at` is this node's place.
    #[allow(
        clippy::too_many_arguments,
        reason = "what came, and what it works with"
    )]
    pub(super) fn reserved(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &mut BTreeMap<NodeId, Session>,
        (from, at): (&NodeId, usize),
        header: RelayHeader,
        reservation: Reservation,
        bits: KeyBuf,
    ) {
        let ReservedFor::Xor(plan) = reservation.scheme.clone() else {
            return send_back(cx, &header.route, header.segment);
        };
        if at + 1 == header.route.len() {
            let gather = Gather::new(cx, header, reservation, plan, bits);
            return self.gathers.begin(cx, config, sessions, gather);
        }
        if self.waiting.iter().filter(|w| w.from == *from).count() >= WAITING_MAX {
            return send_back(cx, &header.route, header.segment);
        }
        self.waiting.push(Waiting {
            from: from.clone(),
            header,
            reservation,
            plan,
            bits,
            since: cx.now.mono,
        });
    }

    /// What waits for the link to `next`.
    pub(super) fn wants(&self, me: &NodeId, next: &NodeId) -> Vec<Want> {
        let onwards =
            |waiting: &&Waiting| next_of(&waiting.header.route, me).as_ref() == Some(next);
        let want = |waiting: &Waiting| Want {
            flow: waiting.flow(),
            units: 1,
            unit_bytes: waiting.bits.len_bytes() as u64,
        };
        self.waiting.iter().filter(onwards).map(want).collect()
    }

    /// Reserves, sends, repeats and gives up what is due.
    pub(super) fn poll(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &mut BTreeMap<NodeId, Session>,
        stocks: &mut Stocks,
    ) {
        for waiting in std::mem::take(&mut self.waiting) {
            if cx.now.mono.since(waiting.since) > UNIT_TIMEOUT {
                send_back(cx, &waiting.header.route, waiting.header.segment);
            } else if let Some(waiting) = self.reserve_next(cx, config, sessions, stocks, waiting) {
                self.waiting.push(waiting);
            }
        }
        for mut leaving in std::mem::take(&mut self.leaving) {
            if leaving.goes_on(cx, sessions) {
                self.leaving.push(leaving);
            } else if let Some(segment) = leaving.segment {
                send_back(cx, &leaving.part.route, segment);
            }
        }
        self.gathers.give_up(cx);
        self.centre.give_up(cx);
    }

    /// Reserves bits of the next link and makes the XOR; gives `waiting` back if that cannot be yet.
    fn reserve_next(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &mut BTreeMap<NodeId, Session>,
        stocks: &mut Stocks,
        mut waiting: Waiting,
    ) -> Option<Waiting> {
        let (header, plan) = (&waiting.header, &waiting.plan);
        let next = next_of(&header.route, cx.me)?;
        let to = target(plan, &header.route)?;
        let leg = Leg {
            next: &next,
            floor_bytes: config.neighbours.get(&next).map_or(0, |l| l.floor_bytes),
            route: &header.route,
            segment: header.segment,
            may_fall_back: false,
            falls_back: false,
        };
        let len_bytes = u32::try_from(waiting.bits.len_bytes()).ok()?;
        let Some(session) = sessions.get_mut(&next) else {
            return Some(waiting);
        };
        let flow = waiting.flow();
        let ready = hop::method(cx, session, leg, waiting.bits.len_bytes());
        let ready = ready.filter(|_| stocks.has_turn(&next, &flow));
        let (Some(_), Some(id)) = (ready, session.open_id()) else {
            return Some(waiting);
        };
        let mut way = waiting.reservation.way.clone().then(hop_of(cx, &to));
        way.level = way.level.min(hop::level_of_link(cx, leg, len_bytes)?);
        let reservation = Reservation {
            way,
            ..waiting.reservation.clone()
        };
        let Ok((bits, sequence)) = hop::reserve(cx, session, leg, len_bytes, reservation) else {
            return Some(waiting);
        };
        stocks.sent(&next, &flow);
        cx.backend
            .xor_in_place(waiting.bits.expose_mut(), bits.expose());
        let at = super::place_in(&header.route, cx.me)?;
        let part = XorPart {
            relay: waiting.reservation.relay,
            route: header.route.clone(),
            plan: plan.clone(),
            place: u8::try_from(at).ok()?,
            ciphertext: waiting.bits.expose().to_vec(),
        };
        let after = Some((next, (id, sequence)));
        self.leave(cx, to, part, Some(waiting.header.segment), after);
        None
    }

    fn leave(
        &mut self,
        cx: &Cx<'_>,
        to: NodeId,
        part: XorPart,
        segment: Option<SegmentNumber>,
        after: Option<(NodeId, (u64, u64))>,
    ) {
        self.leaving.push(Leaving {
            to,
            part,
            segment,
            after,
            since: cx.now.mono,
            sent: None,
        });
    }

    /// An XOR has come, to be combined here.
    pub(super) fn part(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &mut BTreeMap<NodeId, Session>,
        peer: &NodeId,
        part: XorPart,
        stocks: &mut Stocks,
    ) {
        let taken = Message::XorTaken {
            relay: part.relay,
            place: part.place,
        };
        if part.plan.centre.as_ref() == Some(cx.me) {
            let Some(combined) = self.centre.combine(cx, config, peer, part) else {
                return cx.send(peer, &taken);
            };
            if let Some(to) = combined.route.last().cloned() {
                self.leave(cx, to, combined, None, None);
                self.poll(cx, config, sessions, stocks);
            }
        } else {
            self.gathers.part(cx, config, sessions, peer, part);
        }
        cx.send(peer, &taken);
    }

    /// An XOR of this node arrived.
    pub(super) fn taken(&mut self, peer: &NodeId, relay: KmaKeyId, place: u8) {
        self.leaving.retain(|leaving| {
            let part = &leaving.part;
            let same = part.relay == relay && part.place == place && leaving.to == *peer;
            !same || leaving.sent.is_none()
        });
    }

    /// A node further on could not reserve: nothing more leaves for this unit.
    pub(super) fn failed(&mut self, route: &[NodeId], segment: SegmentNumber) {
        let this = |leaving: &Leaving| leaving.segment == Some(segment);
        self.leaving
            .retain(|leaving| !this(leaving) || leaving.part.route != route);
    }

    /// Nothing goes on with a unit here.
    pub(super) fn suspect(&mut self, cx: &mut Cx<'_>, unit: KmaKeyId) {
        self.leaving.retain(|leaving| leaving.part.relay != unit);
        for waiting in std::mem::take(&mut self.waiting) {
            if waiting.reservation.relay == unit {
                send_back(cx, &waiting.header.route, waiting.header.segment);
            } else {
                self.waiting.push(waiting);
            }
        }
        self.gathers.fail(cx, unit);
    }

    /// The source has given a unit up.
    pub(super) fn void(&mut self, stream: &StreamId, segment: SegmentNumber) {
        self.gathers.void(stream, segment);
    }
}

impl Waiting {
    fn flow(&self) -> Flow {
        Flow::through(&self.from, &self.header.route)
    }
}

impl Leaving {
    /// Sends what may be sent; `false` once it is given up.
    fn goes_on(&mut self, cx: &mut Cx<'_>, sessions: &BTreeMap<NodeId, Session>) -> bool {
        if cx.now.mono.since(self.since) > UNIT_TIMEOUT {
            return false;
        }
        if let Some((next, hop)) = &self.after {
            match sessions
                .get(next)
                .and_then(|session| session.is_taken(*hop))
            {
                // Another session: whether the other end has reserved is not known any more.
                None => return false,
                Some(false) => return true,
                Some(true) => self.after = None,
            }
        }
        let due = |sent| cx.now.mono.since(sent) >= RESEND_AFTER;
        let up = sessions.get(&self.to).is_some_and(Session::is_up);
        if up && self.sent.is_none_or(due) {
            self.sent = Some(cx.now.mono);
            cx.send(&self.to, &Message::Xor(self.part.clone()));
        }
        true
    }
}

/// The hop of an XOR, for the history: one-time pad, two keys of it.
pub(super) fn hop_of(cx: &Cx<'_>, to: &NodeId) -> RelayHop {
    RelayHop {
        from: cx.me.clone(),
        to: to.clone(),
        at: cx.now.unix,
        encryption: RelayEncryption::OneTimePad,
    }
}
