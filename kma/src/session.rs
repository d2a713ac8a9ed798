//! The link session: two processes, whatever happens to the connections between them.
//!
//! Inside a session nothing is burned on reconnect: hops that were not acknowledged are sent again,
//! byte for byte, and one that was accepted already is acknowledged again. A new session begins when
//! a process of either end does; each end then tells the marks of the segments it owns, the other
//! burns what lies below and was never used (dead leases), and only then is pad taken. Nothing is
//! sent again across sessions.

use std::collections::BTreeMap;

use qkd_kernels::TagKey;
use qkd_keyfile::{KeySpan, Mono, NodeId, SegmentNumber, StreamId, metadata::KeyType};

use crate::{
    RESEND_AFTER,
    digest::session_id,
    io::{Alarm, Cx},
    ranges::RangeSet,
    record::{BurnReason, Stage},
    wire::{MAX_ITEMS, Mark, Message, VERSION},
};

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
    marks_seen: bool,
    /// The peer used more than its durable mark says: nothing goes on with it.
    quarantined: bool,
    pub(crate) sending: Sending,
    pub(crate) receiving: Receiving,
}

/// Hops towards the peer.
#[derive(Debug, Default)]
pub(crate) struct Sending {
    pub(crate) next_sequence: u64,
    pub(crate) hash_key: Option<(KeySpan, TagKey)>,
    pub(crate) unacknowledged: BTreeMap<u64, SentHop>,
}

/// A hop that the peer has yet to acknowledge.
#[derive(Debug)]
pub(crate) struct SentHop {
    pub(crate) message: Vec<u8>,
    /// Segments that its pad is from.
    pub(crate) segments: Vec<SegmentNumber>,
    pub(crate) sent: Mono,
}

/// Hops from the peer.
#[derive(Debug, Default)]
pub(crate) struct Receiving {
    pub(crate) hash_key: Option<(KeySpan, TagKey)>,
    /// Sequences accepted.
    pub(crate) accepted: RangeSet,
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
            marks_seen: false,
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

    /// The peer's greeting.
    pub(crate) fn greeted(
        &mut self,
        cx: &mut Cx<'_>,
        me: Boot,
        version: u16,
        incarnation: u64,
        boot: [u8; 16],
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
        self.sending = Sending::default();
        self.receiving = Receiving::default();
        self.say_marks(cx, id);
        if replaced {
            cx.alarm(Alarm::PeerStoreReplaced {
                peer: self.peer.clone(),
            });
            Greeting::Replaced
        } else {
            Greeting::New
        }
    }

    /// Of every segment owned: the mark, and the first byte of a binding that is on its way. Counted
    /// anew whenever they are said: keys may be bound meanwhile.
    fn say_marks(&mut self, cx: &mut Cx<'_>, session: u64) {
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
            for (&number, segment) in &stream.segments {
                let owned =
                    segment.key_type == KeyType::Encrypting && segment.stage == Stage::Confirmed;
                if owned && marks.len() < MAX_ITEMS {
                    let limit = bound.get(&(id, number)).copied().unwrap_or(u32::MAX);
                    marks.push(Mark {
                        stream: id.clone(),
                        segment: number,
                        mark_bytes: segment.mark_bytes,
                        dead_below_bytes: segment.mark_bytes.min(limit),
                    });
                }
            }
        }
        cx.send(&self.peer, &Message::Marks { session, marks });
        self.marks_said = Some(cx.now.mono);
    }

    /// The peer's marks: burns its dead leases, or finds that its store went back in time.
    pub(crate) fn marks(&mut self, cx: &mut Cx<'_>, session: u64, marks: &[Mark]) {
        if self.id != Some(session) {
            return;
        }
        if !self.marks_seen {
            for mark in marks {
                self.mark(cx, mark);
            }
            self.marks_seen = true;
        }
        if !self.quarantined {
            cx.send(&self.peer, &Message::MarksTaken { session });
        }
    }

    fn mark(&mut self, cx: &mut Cx<'_>, mark: &Mark) {
        if mark.stream.peer_of(cx.me) != Some(&self.peer) {
            return;
        }
        let Some(segment) = cx.store.segment(&mark.stream, mark.segment) else {
            return;
        };
        if segment.key_type != KeyType::Decrypting {
            return;
        }
        if segment.followed.end() > u64::from(mark.mark_bytes) {
            self.quarantined = true;
            cx.alarm(Alarm::PeerRolledBack {
                peer: self.peer.clone(),
            });
            return;
        }
        cx.store.burn_below(
            &mark.stream,
            mark.segment,
            mark.dead_below_bytes,
            BurnReason::DeadLease,
        );
    }

    /// The peer took our marks: pad may be taken.
    pub(crate) fn marks_taken(&mut self, session: u64) {
        if self.id == Some(session) {
            self.marks_said = None;
        }
    }

    /// The peer accepted a hop.
    pub(crate) fn hop_taken(&mut self, session: u64, sequence: u64) {
        if self.id == Some(session) {
            self.sending.unacknowledged.remove(&sequence);
        }
    }

    /// Whether a hop in flight carries pad of this segment.
    pub(crate) fn in_flight(&self, segment: SegmentNumber) -> bool {
        self.sending
            .unacknowledged
            .values()
            .any(|hop| hop.segments.contains(&segment))
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
