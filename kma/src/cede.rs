//! Ceding: bits of a link that one end owns and does not need go to the end that is short of them.
//!
//! The end that is short asks; the other gives whole segments that it never touched, as long as it keeps
//! what it needs itself and the floor. What it gave it says again, in sequence, until it is acknowledged,
//! also after a restart: nothing but the ledger knows what was ceded. An end that does not know yet that
//! it owns a segment follows, and so does the one that has given it away.

use std::{collections::BTreeMap, time::Duration};

use qkd_keyfile::{Mono, NodeId, SegmentNumber, StreamId};

use crate::{
    RESEND_AFTER,
    hop::link_stream,
    io::{Alarm, Cx, LinkConfig},
    session::Session,
    stock::PadNeed,
    store::FollowError,
    wire::Message,
};

/// An end that asked in vain asks again after this time at most.
const ASK_EVERY_MAX: Duration = Duration::from_secs(8);

/// What was asked for and given on the links of a node, as far as it has to be said again.
#[derive(Debug, Default)]
pub(crate) struct Ceding {
    asked: BTreeMap<NodeId, Asked>,
    said: BTreeMap<NodeId, Mono>,
    /// When a question was looked at last.
    looked: BTreeMap<NodeId, Mono>,
}

/// Questions of one neighbour that come faster are not looked at: an honest one asks once a tick at most.
const LOOK_EVERY: Duration = Duration::from_millis(25);

/// A question that is open.
#[derive(Debug, Clone, Copy)]
struct Asked {
    at: Mono,
    /// Until it is asked again.
    wait: Duration,
    /// Segments acquired before it.
    acquired: u64,
}

impl Ceding {
    /// Asks a neighbour for bits where this end is short, and repeats what it was given.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Cx<'_>,
        (peer, link): (&NodeId, &LinkConfig),
        session: &Session,
        need: PadNeed,
    ) {
        if session.open_id().is_none() {
            return;
        }
        let said = self.said.get(peer);
        if said.is_none_or(|&said| cx.now.mono.since(said) >= RESEND_AFTER) {
            self.say(cx, peer);
        }
        self.ask_if_short(cx, peer, link.floor_bytes, need);
    }

    fn ask_if_short(&mut self, cx: &mut Cx<'_>, peer: &NodeId, floor_bytes: u64, need: PadNeed) {
        let Some(stream) = link_stream(cx, peer) else {
            return;
        };
        let entry = cx.store.stream(&stream);
        let (mine, held) = entry.map_or((0, 0), |entry| (entry.open_bytes, entry.held_bytes));
        // The other end keeps the floor, too.
        if mine >= need.low_bytes(floor_bytes) || held - mine <= floor_bytes {
            self.asked.remove(peer);
            return;
        }
        let (now, acquired) = (cx.now.mono, cx.store.cessions_received(peer));
        let before = self.asked.get(peer).copied();
        let before = before.filter(|asked| asked.acquired == acquired);
        if before.is_some_and(|asked| now.since(asked.at) < asked.wait) {
            return;
        }
        let wait = before.map_or(RESEND_AFTER, |asked| (asked.wait * 2).min(ASK_EVERY_MAX));
        let asked = Asked {
            at: now,
            wait,
            acquired,
        };
        self.asked.insert(peer.clone(), asked);
        let bytes = need.level_bytes(floor_bytes).saturating_sub(mine);
        cx.send(peer, &Message::Want { acquired, bytes });
    }

    /// A neighbour is short: gives it what this end does not need, once for every question. What it has
    /// not heard of yet might be enough.
    pub(crate) fn wanted(
        &mut self,
        cx: &mut Cx<'_>,
        (peer, link): (&NodeId, &LinkConfig),
        session: &Session,
        need: PadNeed,
        (acquired, bytes): (u64, u64),
    ) {
        let Some(stream) = link_stream(cx, peer).filter(|_| session.open_id().is_some()) else {
            return;
        };
        taken(cx, peer, acquired);
        let now = cx.now.mono;
        let looked = self.looked.get(peer);
        if looked.is_some_and(|&at| now.since(at) < LOOK_EVERY) {
            return;
        }
        self.looked.insert(peer.clone(), now);
        if cx.store.cessions_told(peer) != (acquired, acquired) {
            return;
        }
        let keep_bytes = need.level_bytes(link.floor_bytes);
        let plan = cx.store.plan_cession(&stream, bytes, keep_bytes);
        for &number in &plan {
            cx.store.cede(peer, &stream, number);
        }
        if !plan.is_empty() {
            let segments = plan.len();
            tracing::debug!(%peer, bytes, segments, "ceded to the end that is short");
            self.say(cx, peer);
        }
    }

    /// Says what was ceded and not acknowledged.
    fn say(&mut self, cx: &mut Cx<'_>, peer: &NodeId) {
        self.said.insert(peer.clone(), cx.now.mono);
        let ceded = cx.store.state().peers.get(peer).map(|peer| &peer.ceded);
        let ceded = ceded.filter(|ceded| !ceded.is_empty());
        let Some((&first, _)) = ceded.and_then(BTreeMap::first_key_value) else {
            return;
        };
        let segments = ceded.into_iter().flat_map(BTreeMap::values).cloned();
        let segments = segments.collect();
        cx.send(peer, &Message::Cessions { first, segments });
    }
}

/// A neighbour ceded segments: this end owns them.
pub(crate) fn cessions(
    cx: &mut Cx<'_>,
    peer: &NodeId,
    first: u64,
    segments: Vec<(StreamId, SegmentNumber)>,
) {
    let link = link_stream(cx, peer);
    for (at, (stream, segment)) in (0..).zip(segments) {
        let next = cx.store.cessions_received(peer);
        match first.checked_add(at) {
            Some(sequence) if sequence < next => continue,
            Some(sequence) if sequence == next => {}
            _ => break,
        }
        let acquired = if link.as_ref() == Some(&stream) {
            cx.store.acquire(peer, &stream, segment)
        } else {
            Err(FollowError::NotTheirs)
        };
        match acquired {
            Ok(()) => {}
            // The commit is on its way; the cession comes again.
            Err(FollowError::Unconfirmed) => break,
            Err(error) => {
                tracing::error!(%peer, %stream, %segment, %error, "cession refused");
                cx.alarm(Alarm::PadMisuse { peer: peer.clone() });
                break;
            }
        }
    }
    let next = cx.store.cessions_received(peer);
    cx.send(peer, &Message::CessionsTaken { next });
}

/// A neighbour has acquired all cessions before `next`.
pub(crate) fn taken(cx: &mut Cx<'_>, peer: &NodeId, next: u64) {
    if let Some(through) = next.checked_sub(1) {
        cx.store.cessions_acknowledged(peer, through);
    }
}
