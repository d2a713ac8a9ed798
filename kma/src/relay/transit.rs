//! Units of others, on their way through.

use std::collections::{BTreeMap, VecDeque};

use qkd_keyfile::{KeyFile, KeyMetadata, Mono, NodeId, SegmentNumber, metadata::RelayEncryption};
use qkd_secmem::KeyBuf;

use super::{UNIT_TIMEOUT, WAITING_MAX, next_of, send_back, unit};
use crate::{
    hop::{self, HopError, Leg},
    io::{Cx, KmaConfig},
    session::Session,
    stock::{Flow, Stocks, Want},
    wire::RelayHeader,
};

/// Units that wait for pad, in order of arrival.
#[derive(Debug, Default)]
pub(super) struct Transits(VecDeque<Transit>);

/// A unit of others that waits for pad towards the next hop.
#[derive(Debug)]
struct Transit {
    from: NodeId,
    route: Vec<NodeId>,
    segment: SegmentNumber,
    may_fall_back: bool,
    key_file: KeyBuf,
    arrived: Mono,
}

impl Transit {
    fn flow(&self) -> Flow {
        Flow::through(&self.from, &self.route)
    }
}

impl Transits {
    pub(super) fn push(
        &mut self,
        cx: &mut Cx<'_>,
        from: &NodeId,
        header: RelayHeader,
        key_file: KeyBuf,
    ) {
        if self.0.iter().filter(|t| t.from == *from).count() >= WAITING_MAX {
            return send_back(cx, &header.route, header.segment);
        }
        self.0.push_back(Transit {
            from: from.clone(),
            route: header.route,
            segment: header.segment,
            may_fall_back: header.may_fall_back,
            key_file,
            arrived: cx.now.mono,
        });
    }

    /// What waits for the link to `next`.
    pub(super) fn wants(&self, me: &NodeId, next: &NodeId) -> Vec<Want> {
        let mut wants: Vec<Want> = Vec::new();
        let onwards = |transit: &&Transit| next_of(&transit.route, me).as_ref() == Some(next);
        for transit in self.0.iter().filter(onwards) {
            let (flow, unit_bytes) = (transit.flow(), transit.key_file.len_bytes() as u64);
            match wants.iter_mut().find(|want| want.flow == flow) {
                Some(want) => {
                    want.units += 1;
                    want.unit_bytes = want.unit_bytes.max(unit_bytes);
                }
                None => wants.push(Want {
                    flow,
                    units: 1,
                    unit_bytes,
                }),
            }
        }
        wants
    }

    /// Sends units of others onwards as far as pad allows: those of a pair in order of arrival, the
    /// pairs by turns.
    pub(super) fn carry_on(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &mut BTreeMap<NodeId, Session>,
        stocks: &mut Stocks,
    ) {
        let mut blocked: Vec<NodeId> = Vec::new();
        let mut waiting = VecDeque::new();
        for transit in std::mem::take(&mut self.0) {
            let next = next_of(&transit.route, cx.me).filter(|n| config.neighbours.contains_key(n));
            let Some(next) = next else {
                send_back(cx, &transit.route, transit.segment);
                continue;
            };
            if cx.now.mono.since(transit.arrived) > UNIT_TIMEOUT {
                send_back(cx, &transit.route, transit.segment);
                continue;
            }
            let flow = transit.flow();
            let has_turn = stocks.has_turn(&next, &flow);
            if blocked.contains(&next) {
                waiting.push_back(transit);
            } else if onward(cx, config, sessions, &transit, &next, has_turn) {
                stocks.sent(&next, &flow);
            } else {
                if has_turn {
                    blocked.push(next);
                }
                waiting.push_back(transit);
            }
        }
        self.0 = waiting;
    }
}

/// Sends a unit of others one hop further; `false` if it must wait.
fn onward(
    cx: &mut Cx<'_>,
    config: &KmaConfig,
    sessions: &mut BTreeMap<NodeId, Session>,
    transit: &Transit,
    next: &NodeId,
    has_turn: bool,
) -> bool {
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
    let ends = transit.route.first().zip(transit.route.last());
    let leg = Leg {
        next,
        floor_bytes: config.neighbours.get(next).map_or(0, |l| l.floor_bytes),
        route: &transit.route,
        segment: transit.segment,
        may_fall_back: transit.may_fall_back,
        falls_back: ends.is_some_and(|(a, b)| config.relay.of(a, b).aes_fallback),
    };
    let method = hop::method(cx, session, leg, key.len());
    // AES, for want of pad, is no turn's.
    let Some(method) = method.filter(|m| has_turn || *m != RelayEncryption::OneTimePad) else {
        return false;
    };
    let metadata = unit::one_hop_on(cx, metadata, &transit.route, method);
    let sent = unit::key_file(cx, metadata, key)
        .ok_or(HopError::Memory)
        .and_then(|file| hop::send(cx, session, leg, method, file));
    sent.is_ok()
}
