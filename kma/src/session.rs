//! The link session: two processes, whatever happens to the connections between them.
//!
//! Inside a session nothing is burned on reconnect: hops that were not acknowledged are sent again,
//! byte for byte, and one that was accepted already is acknowledged again. A new session begins when
//! a process of either end does; each end then tells the marks of the segments it owns, the other
//! burns what lies below and was never used (dead leases), and only then is pad taken. Nothing is
//! sent again across sessions.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use qkd_kernels::TagKey;
use qkd_keyfile::{KeySpan, Mono, NodeId, SegmentNumber, StreamId, metadata::KeyType};
use serde::{Deserialize, Serialize};

use crate::{
    RESEND_AFTER,
    digest::session_id,
    hop::{Batch, BatchKey},
    io::{Alarm, Cx},
    ranges::RangeSet,
    record::BurnReason,
    wire::{MAX_ITEMS, Mark, Marks, Message, VERSION},
};

/// Parts of one round of marks, at most.
const PARTS_MAX: u32 = 1 << 12;

/// The last two link sessions with a KMA.
///
/// The ledgers of both ends never differ by more than the later one of the two, because none begins
/// before each end has heard what the other's ledger has, and none is used before both have it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LastSessions {
    /// The last one that both ledgers have. Bits may have been used in it.
    pub(crate) agreed: Option<u64>,
    /// One after it that the other ledger may lack. Nothing was used in it.
    pub(crate) begun: Option<u64>,
}

impl LastSessions {
    /// Whether the ledger that has `theirs` can be at the other end of this one. (An end that has
    /// agreed on none leaves that to the other: its store, or the other's, may have been replaced.)
    pub(crate) fn meet(&self, theirs: &Self) -> bool {
        let known = |session: Option<u64>| session.is_some() && theirs.has(session);
        self.agreed.is_none() || known(self.agreed) || known(self.begun)
    }

    fn has(&self, session: Option<u64>) -> bool {
        self.agreed == session || self.begun == session
    }
}

/// Who this process is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Boot {
    /// Of the store.
    pub(crate) incarnation: u64,
    /// Of the process.
    pub(crate) boot: [u8; 16],
}

/// What this end knows about its conversation with one node.
#[derive(Debug)]
pub(crate) struct Session {
    peer: NodeId,
    connected: bool,
    id: Option<u64>,
    /// When the marks were said last, until the peer has taken them.
    marks_said: Option<Mono>,
    /// Counts the times that they were said.
    round: u32,
    marks_seen: bool,
    /// Parts of the round of marks that is coming in.
    parts_seen: (u32, BTreeSet<u32>),
    /// The peer took our marks once since this process began: they are not behind what it saw.
    vouched: bool,
    /// One store is behind what the other saw used: nothing goes on between them.
    quarantined: bool,
    pub(crate) sending: Sending,
    pub(crate) receiving: Receiving,
}

/// Hops towards the peer.
#[derive(Debug, Default)]
pub(crate) struct Sending {
    pub(crate) next_sequence: u64,
    pub(crate) hash_key: Option<HashKey>,
    /// Tags made with the hash key.
    pub(crate) tags: u64,
    /// The batch under AES that goes on, if pad is short.
    pub(crate) batch: Option<Batch>,
    pub(crate) unacknowledged: BTreeMap<u64, SentHop>,
    /// Hops that the peer cannot take any more, for their pad is void: not said again, never taken.
    given_up: RangeSet,
}

/// A hash key, and the pad that it was.
#[derive(Debug)]
pub(crate) struct HashKey {
    pub(crate) spans: Vec<KeySpan>,
    pub(crate) key: TagKey,
}

/// A hop that the peer has yet to acknowledge.
#[derive(Debug)]
pub(crate) struct SentHop {
    pub(crate) message: Bytes,
    /// Segments that its pad is from.
    pub(crate) segments: BTreeSet<SegmentNumber>,
    pub(crate) sent: Mono,
}

/// Hops from the peer.
#[derive(Debug, Default)]
pub(crate) struct Receiving {
    /// The last two: hops under the one before may come after the first under the last.
    pub(crate) hash_keys: Vec<HashKey>,
    /// Likewise the keys of batches under AES.
    pub(crate) batches: Vec<BatchKey>,
    /// Sequences accepted.
    pub(crate) accepted: RangeSet,
}

impl Receiving {
    /// Keeps the fresh keys of a hop, and of those before the last one only.
    pub(crate) fn keep(&mut self, hash_key: Option<HashKey>, batch: Option<BatchKey>) {
        if let Some(key) = hash_key {
            self.hash_keys.truncate(1);
            self.hash_keys.insert(0, key);
        }
        if let Some(key) = batch {
            self.batches.truncate(1);
            self.batches.insert(0, key);
        }
    }
}

/// What a hello brought about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Greeting {
    /// The peer speaks another version; nothing more is said.
    Refused,
    /// The session goes on.
    Same,
    /// A new session.
    New,
    /// A new session, with a store that shares nothing with ours.
    Replaced,
}

impl Session {
    pub(crate) fn new(peer: &NodeId) -> Self {
        Self {
            peer: peer.clone(),
            connected: false,
            id: None,
            marks_said: None,
            round: 0,
            marks_seen: false,
            parts_seen: (0, BTreeSet::new()),
            vouched: false,
            quarantined: false,
            sending: Sending::default(),
            receiving: Receiving::default(),
        }
    }

    /// The connection is there: greet.
    pub(crate) fn up(&mut self, cx: &mut Cx<'_>, me: Boot) {
        self.connected = false;
        let hello = Message::Hello {
            version: VERSION,
            incarnation: me.incarnation,
            boot: me.boot,
            sessions: cx.store.last_sessions(&self.peer),
        };
        cx.send(&self.peer, &hello);
    }

    pub(crate) fn down(&mut self) {
        self.connected = false;
    }

    /// Greeted and connected.
    pub(crate) fn is_up(&self) -> bool {
        self.connected
    }

    /// The session, if pad may be taken in it now.
    pub(crate) fn open_id(&self) -> Option<u64> {
        self.id
            .filter(|_| self.connected && self.marks_said.is_none() && !self.quarantined)
    }

    /// The session, if hops and bindings may be accepted in it now: after the peer's marks, so that
    /// whatever is followed afterwards lies above them.
    pub(crate) fn accepting_id(&self) -> Option<u64> {
        self.id.filter(|_| self.marks_seen && !self.quarantined)
    }

    /// Whether keys may be cut for applications, also while the peer is out of reach: not before it
    /// took this process's marks once, for a store restored from a copy would give out old bits.
    pub(crate) fn may_supply(&self) -> bool {
        self.vouched && !self.quarantined
    }

    /// Whether nothing is agreed with the peer any more.
    pub(crate) fn is_quarantined(&self) -> bool {
        self.quarantined
    }

    /// The peer's greeting.
    pub(crate) fn greeted(
        &mut self,
        cx: &mut Cx<'_>,
        me: Boot,
        version: u16,
        (incarnation, boot): (u64, [u8; 16]),
        theirs: &LastSessions,
    ) -> Greeting {
        if version != VERSION {
            tracing::warn!(peer = %self.peer, version, ours = VERSION, "peer speaks another version of Kx");
            return Greeting::Refused;
        }
        let replaced = cx.store.peer_store(&self.peer, incarnation);
        let id = session_id(
            (cx.me, me.incarnation, me.boot),
            (&self.peer, incarnation, boot),
        );
        self.connected = true;
        if self.id == Some(id) {
            self.send_again(cx, true);
            return Greeting::Same;
        }
        self.id = Some(id);
        self.marks_seen = false;
        self.quarantined = false;
        self.parts_seen = (0, BTreeSet::new());
        self.sending = Sending::default();
        self.receiving = Receiving::default();
        self.begin(cx, id, theirs);
        if replaced {
            cx.alarm(Alarm::PeerStoreReplaced {
                peer: self.peer.clone(),
            });
            Greeting::Replaced
        } else {
            Greeting::New
        }
    }

    /// Begins a session, if the two ledgers know each other from the last.
    fn begin(&mut self, cx: &mut Cx<'_>, session: u64, theirs: &LastSessions) {
        let ours = cx.store.last_sessions(&self.peer);
        if !ours.meet(theirs) {
            let peer = self.peer.clone();
            self.quarantine(cx, Alarm::SessionsApart { peer });
            return cx.send(&self.peer, &Message::RolledBack { session });
        }
        // The peer used what is only begun here: its word that this end had it was lost.
        if let Some(agreed) = theirs.agreed {
            cx.store.agree_session(&self.peer, agreed);
        }
        cx.store.begin_session(&self.peer, session);
        self.say_marks(cx, session);
    }

    /// Of every segment owned and not taken to the end: the mark, and the first byte of a binding
    /// that is on its way. Counted anew whenever they are said: keys may be bound meanwhile.
    fn say_marks(&mut self, cx: &mut Cx<'_>, session: u64) {
        let marks = self.marks_now(cx);
        let peer = cx.store.state().peers.get(&self.peer);
        let bindings_next = peer.map_or(0, |p| p.bindings_sent);
        let first = peer.and_then(|p| p.outbox.first_key_value());
        let bindings_known = first.map_or(bindings_next, |(&first, _)| first);
        let (cessions_known, cessions_next) = cx.store.cessions_told(&self.peer);
        self.round = self.round.wrapping_add(1);
        let mut chunks: Vec<Vec<Mark>> = marks.chunks(MAX_ITEMS).map(<[Mark]>::to_vec).collect();
        if chunks.is_empty() {
            chunks.push(Vec::new());
        }
        let parts = u32::try_from(chunks.len()).unwrap_or(u32::MAX);
        for (part, marks) in (0..parts).zip(chunks) {
            let message = Message::Marks(Marks {
                session,
                round: self.round,
                part,
                parts,
                bindings_known,
                bindings_next,
                cessions_known,
                cessions_next,
                marks,
            });
            cx.send(&self.peer, &message);
        }
        self.marks_said = Some(cx.now.mono);
    }

    fn marks_now(&self, cx: &Cx<'_>) -> Vec<Mark> {
        let outbox = cx.store.state().peers.get(&self.peer).map(|p| &p.outbox);
        let mut bound: BTreeMap<(&StreamId, SegmentNumber), u32> = BTreeMap::new();
        for binding in outbox.into_iter().flat_map(BTreeMap::values) {
            let at = (&binding.stream, binding.span.segment);
            let first = bound.entry(at).or_insert(u32::MAX);
            *first = (*first).min(binding.span.offset_bytes);
        }
        let mut marks = Vec::new();
        for (id, stream) in &cx.store.state().streams {
            if id.peer_of(cx.me) != Some(&self.peer) {
                continue;
            }
            for &number in &stream.open {
                let mark_bytes = stream.segments.get(&number).map_or(0, |s| s.mark_bytes);
                let limit = bound.get(&(id, number)).copied().unwrap_or(u32::MAX);
                marks.push(Mark {
                    stream: id.clone(),
                    segment: number,
                    mark_bytes,
                    dead_below_bytes: mark_bytes.min(limit),
                });
            }
        }
        marks
    }

    /// A part of the peer's marks: burns its dead leases, or finds that a store went back in time.
    pub(crate) fn marks(&mut self, cx: &mut Cx<'_>, marks: &Marks) {
        if self.id != Some(marks.session) || marks.parts > PARTS_MAX || marks.part >= marks.parts {
            return;
        }
        let session = marks.session;
        if !self.marks_seen && !self.quarantined {
            if self.are_behind(cx, marks) {
                let peer = self.peer.clone();
                self.quarantine(cx, Alarm::PeerRolledBack { peer });
            } else {
                // Said after the session was recorded there.
                cx.store.agree_session(&self.peer, session);
                self.burn_dead(cx, marks);
            }
        }
        if self.quarantined {
            cx.send(&self.peer, &Message::RolledBack { session });
        } else if self.marks_seen {
            cx.send(&self.peer, &Message::MarksTaken { session });
        }
    }

    fn burn_dead(&mut self, cx: &mut Cx<'_>, marks: &Marks) {
        let me = cx.me;
        for mark in marks.marks.iter().filter(|mark| self.shares(me, mark)) {
            cx.store.burn_below(
                &mark.stream,
                mark.segment,
                mark.dead_below_bytes,
                BurnReason::DeadLease,
            );
        }
        let (round, parts) = &mut self.parts_seen;
        if *round != marks.round {
            *round = marks.round;
            parts.clear();
        }
        parts.insert(marks.part);
        self.marks_seen = parts.len() >= marks.parts as usize;
    }

    /// Whether the marks cannot be, unless one of the two stores was restored from a copy: what was
    /// used once is used, and the owner forgets a segment after the other end, never before.
    fn are_behind(&self, cx: &Cx<'_>, marks: &Marks) -> bool {
        let received = cx.store.state().peers.get(&self.peer);
        let received = received.map_or(0, |p| p.bindings_received);
        let acquired = cx.store.cessions_received(&self.peer);
        let behind = |mark: &Mark| match cx.store.segment(&mark.stream, mark.segment) {
            // It has forgotten that it ceded the segment.
            Some(segment) if segment.key_type == KeyType::Encrypting => true,
            Some(segment) => segment.is_used_beyond(mark.mark_bytes),
            None => true,
        };
        received > marks.bindings_next
            || received < marks.bindings_known
            || acquired > marks.cessions_next
            || acquired < marks.cessions_known
            || marks
                .marks
                .iter()
                .any(|mark| self.shares(cx.me, mark) && behind(mark))
    }

    fn shares(&self, me: &NodeId, mark: &Mark) -> bool {
        mark.stream.peer_of(me) == Some(&self.peer)
    }

    fn quarantine(&mut self, cx: &mut Cx<'_>, alarm: Alarm) {
        if !self.quarantined {
            self.quarantined = true;
            tracing::error!(
                peer = %self.peer,
                "one of the two stores went back in time: give the node that was restored or cloned \
                 an empty store, and the other one voids what they shared"
            );
            cx.store.quarantined(&self.peer);
            cx.alarm(alarm);
        }
    }

    /// The peer saw more used than our marks say.
    pub(crate) fn rolled_back(&mut self, cx: &mut Cx<'_>, session: u64) {
        if self.id == Some(session) {
            let peer = self.peer.clone();
            self.quarantine(cx, Alarm::PeerRolledBack { peer });
        }
    }

    /// The peer took our marks: pad may be taken.
    pub(crate) fn marks_taken(&mut self, cx: &mut Cx<'_>, session: u64) {
        if self.id == Some(session) && !self.quarantined {
            cx.store.agree_session(&self.peer, session);
            self.marks_said = None;
            self.vouched = true;
        }
    }

    /// How a hop of a session is: `None` if the session has ended, else whether the peer has
    /// acknowledged it.
    pub(crate) fn is_taken(&self, (session, sequence): (u64, u64)) -> Option<bool> {
        let sending = &self.sending;
        let waits = sending.unacknowledged.contains_key(&sequence);
        (self.id == Some(session)).then(|| !waits && !sending.given_up.contains(sequence))
    }

    /// The peer accepted a hop.
    pub(crate) fn hop_taken(&mut self, session: u64, sequence: u64) {
        if self.id == Some(session) {
            self.sending.unacknowledged.remove(&sequence);
        }
    }

    /// Others may know segments: what was drawn from them for more than one hop is drawn anew, and hops
    /// in flight with their pad are given up.
    pub(crate) fn forget_keys_of(&mut self, stream: &StreamId, segments: &[SegmentNumber]) {
        let of_link = matches!(stream, StreamId::Link(_));
        let known =
            |spans: &[KeySpan]| of_link && spans.iter().any(|s| segments.contains(&s.segment));
        let sending = &mut self.sending;
        sending.hash_key.take_if(|key| known(&key.spans));
        sending.batch.take_if(|batch| known(batch.spans()));
        let void = |hop: &SentHop| of_link && segments.iter().any(|n| hop.segments.contains(n));
        let given_up = &mut sending.given_up;
        sending.unacknowledged.retain(|&sequence, hop| {
            let void = void(hop);
            if void {
                given_up.insert(sequence, sequence + 1);
            }
            !void
        });
    }

    /// Segments that hops in flight carry pad of.
    pub(crate) fn in_flight(&self) -> BTreeSet<SegmentNumber> {
        let hops = self.sending.unacknowledged.values();
        hops.flat_map(|hop| &hop.segments).copied().collect()
    }

    /// Repeats what is due: all of it when the connection is new.
    pub(crate) fn send_again(&mut self, cx: &mut Cx<'_>, everything: bool) {
        if !self.connected {
            return;
        }
        let now = cx.now.mono;
        let due = |sent: Mono| everything || now.since(sent) >= RESEND_AFTER;
        if let (Some(said), Some(session)) = (self.marks_said, self.id)
            && due(said)
            && !self.quarantined
        {
            self.say_marks(cx, session);
        }
        for hop in self.sending.unacknowledged.values_mut() {
            if due(hop.sent) {
                hop.sent = now;
                cx.send_bytes(&self.peer, hop.message.clone());
            }
        }
    }
}
