//! The store against a model that keeps every byte by itself, over a disk that loses power.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use qkd_keyfile::{
    KeySpan, KmaKeyId, KsaKeyId, LinkId, NodeId, SegmentNumber, StreamId,
    metadata::{KeyType, SecurityLevel},
};
use qkd_secmem::{Locking, Pool, PoolConfig};

use super::{KeyOrder, NewSegment, Store};
use crate::{
    record::{Binding, BurnReason, DiscardReason, Purpose, Stage},
    vault::sim::{Fault, SimDisk},
};

const HEAD_BYTES: u32 = 8;

#[derive(Debug, Clone)]
enum Op {
    Propose,
    Store {
        ours: bool,
        confirmed: bool,
        len: u32,
    },
    Confirm(usize),
    Discard(usize),
    TakePad {
        len: u32,
        floor: u64,
    },
    TakeKeys {
        number: u32,
        len: u32,
    },
    Acknowledge(u64),
    Follow {
        at: usize,
        offset: u32,
        len: u32,
    },
    BurnBelow {
        at: usize,
        mark: u32,
    },
    Receive {
        at: usize,
        offset: u32,
        len: u32,
    },
    Deliver(usize),
    Cede {
        want: u64,
        keep: u64,
    },
    Acquire(usize),
    CessionsAcknowledged(u64),
    Close,
    Void,
    Commit,
    Compact,
    Crash {
        after: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let at = 0..12_usize;
    let (offset, len) = (0..70_u32, 0..70_u32);
    prop_oneof![
        1 => Just(Op::Propose),
        6 => (any::<bool>(), any::<bool>(), 9..70_u32)
            .prop_map(|(ours, confirmed, len)| Op::Store { ours, confirmed, len }),
        3 => at.clone().prop_map(Op::Confirm),
        1 => at.clone().prop_map(Op::Discard),
        4 => (1..90_u32, 0..40_u64).prop_map(|(len, floor)| Op::TakePad { len, floor }),
        4 => (1..4_u32, 1..40_u32).prop_map(|(number, len)| Op::TakeKeys { number, len }),
        2 => (0..20_u64).prop_map(Op::Acknowledge),
        4 => (at.clone(), offset.clone(), len.clone())
            .prop_map(|(at, offset, len)| Op::Follow { at, offset, len }),
        1 => (at.clone(), 0..90_u32).prop_map(|(at, mark)| Op::BurnBelow { at, mark }),
        3 => (at.clone(), offset, len)
            .prop_map(|(at, offset, len)| Op::Receive { at, offset, len }),
        2 => at.clone().prop_map(Op::Deliver),
        3 => (0..200_u64, 0..100_u64).prop_map(|(want, keep)| Op::Cede { want, keep }),
        3 => at.prop_map(Op::Acquire),
        1 => (0..6_u64).prop_map(Op::CessionsAcknowledged),
        2 => Just(Op::Close),
        1 => Just(Op::Void),
        5 => Just(Op::Commit),
        1 => Just(Op::Compact),
        2 => (0..12_u64).prop_map(|after| Op::Crash { after }),
    ]
}

/// What ought to be: every byte of every segment, free or not.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    segments: BTreeMap<u64, ModelSegment>,
    next_segment: u64,
    proposed: BTreeSet<u64>,
    incarnation: u64,
    /// Sequence to segment.
    outbox: BTreeMap<u64, u64>,
    bound: u64,
    /// Key ID to (sequence, segment, application).
    received: BTreeMap<KsaKeyId, u64>,
    received_count: u64,
    /// Cessions that wait for an acknowledgement, and both counts.
    ceded: BTreeMap<u64, u64>,
    cessions_sent: u64,
    cessions_received: u64,
}

#[derive(Debug, Clone, PartialEq)]
struct ModelSegment {
    key: Vec<u8>,
    ours: bool,
    confirmed: bool,
    free: BTreeSet<u32>,
}

impl ModelSegment {
    fn is_untouched(&self) -> bool {
        self.free.len() + HEAD_BYTES as usize == self.key.len()
    }

    /// Uses bytes that must be free.
    fn use_up(&mut self, span: KeySpan) {
        for at in span.offset_bytes..span.offset_bytes + span.len_bytes {
            assert!(self.free.remove(&at), "byte {at} used twice");
        }
    }
}

impl Model {
    fn usable(&self) -> u64 {
        let ours = self.segments.values().filter(|s| s.ours && s.confirmed);
        ours.map(|s| s.free.len() as u64).sum()
    }

    fn nth(&self, at: usize) -> Option<u64> {
        self.segments.keys().nth(at).copied()
    }

    fn bindings(&self, number: u64) -> usize {
        let all = self.outbox.values().chain(self.received.values());
        all.filter(|&&n| n == number).count()
    }

    fn end(&mut self, number: u64) {
        self.segments.remove(&number);
        self.received.retain(|_, n| *n != number);
    }
}

struct Rig {
    disk: SimDisk,
    pool: Pool,
    store: Option<Store>,
    model: Model,
    /// The model as of the last commit.
    durable: Model,
    peer: NodeId,
    stream: StreamId,
    names: u8,
}

impl Rig {
    fn new(seed: u64) -> Self {
        let (me, peer): (NodeId, NodeId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let pool = Pool::new(PoolConfig {
            capacity_bytes: 1 << 20,
            locking: Locking::Unlocked,
        });
        let mut rig = Self {
            disk: SimDisk::new(seed),
            pool: pool.unwrap(),
            store: None,
            model: Model::default(),
            durable: Model::default(),
            stream: StreamId::Link(LinkId::between(&me, &peer).unwrap()),
            peer,
            names: 0,
        };
        rig.open();
        rig
    }

    fn open(&mut self) {
        let vault = Box::new(self.disk.open_sealed().unwrap());
        self.store = Some(Store::open(vault, self.pool.clone(), [7; 16]).unwrap());
    }

    fn store(&mut self) -> &mut Store {
        self.store.as_mut().unwrap()
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Propose => {
                let stream = self.stream.clone();
                let number = self.store().propose(&stream, None).0;
                assert_eq!(number, self.model.next_segment);
                self.model.proposed.insert(number);
                self.model.next_segment += 1;
            }
            Op::Store {
                ours,
                confirmed,
                len,
            } => self.store_one(ours, confirmed, len),
            Op::Confirm(at) => self.confirm(at),
            Op::Discard(at) => self.discard(at),
            Op::TakePad { len, floor } => self.take_pad(len, floor),
            Op::TakeKeys { number, len } => self.take_keys(number, len),
            Op::Acknowledge(through) => {
                let peer = self.peer.clone();
                self.store().bindings_acknowledged(&peer, through);
                if through < self.model.bound {
                    self.model.outbox.retain(|&sequence, _| sequence > through);
                }
            }
            Op::Follow { at, offset, len } => self.follow(at, offset, len),
            Op::BurnBelow { at, mark } => self.burn_below(at, mark),
            Op::Receive { at, offset, len } => self.receive(at, offset, len),
            Op::Deliver(at) => self.deliver(at),
            Op::Close => self.close(),
            Op::Void => self.void(),
            Op::Commit => {
                self.store().commit().unwrap();
                self.durable = self.model.clone();
            }
            Op::Compact => {
                assert!(self.store().compact_if_large(0).is_ok());
                self.store().compact_above_bytes = 0;
                assert!(self.store().compact_if_large(0).unwrap());
                self.durable = self.model.clone();
            }
            Op::Cede { want, keep } => self.cede(want, keep),
            Op::Acquire(at) => self.acquire(at),
            Op::CessionsAcknowledged(through) => {
                let peer = self.peer.clone();
                self.store().cessions_acknowledged(&peer, through);
                if through < self.model.cessions_sent {
                    self.model.ceded.retain(|&sequence, _| sequence > through);
                }
            }
            Op::Crash { after } => self.crash(after),
        }
    }

    fn store_one(&mut self, ours: bool, confirmed: bool, len: u32) {
        let number = self.model.proposed.pop_first().unwrap_or_else(|| {
            self.model.next_segment += 1;
            self.model.next_segment - 1
        });
        let key: Vec<u8> = (0..len)
            .map(|at| (number * 31 + u64::from(at)).to_le_bytes()[0])
            .collect();
        let new = NewSegment {
            relayed: None,
            stream: self.stream.clone(),
            number: SegmentNumber(number),
            stage: if confirmed {
                Stage::Confirmed
            } else {
                Stage::Answered
            },
            key_type: if ours {
                KeyType::Encrypting
            } else {
                KeyType::Decrypting
            },
            total_bits: len * 8 + 3,
            head_bytes: HEAD_BYTES,
            level: SecurityLevel::Qkd,
            kma_key_id: KmaKeyId([1; 16]),
            composition: None,
            key: self.store.as_ref().unwrap().pool().copy_of(&key).unwrap(),
        };
        self.store.as_mut().unwrap().store(new).unwrap();
        let free = (HEAD_BYTES..len).collect();
        let segment = ModelSegment {
            key,
            ours,
            confirmed,
            free,
        };
        self.model.segments.insert(number, segment);
    }

    fn confirm(&mut self, at: usize) {
        let Some(number) = self.model.nth(at) else {
            return;
        };
        let stream = self.stream.clone();
        let news = self.store().confirm(&stream, SegmentNumber(number));
        let segment = self.model.segments.get_mut(&number).unwrap();
        assert_eq!(news, !segment.confirmed);
        segment.confirmed = true;
    }

    fn discard(&mut self, at: usize) {
        let Some(number) = self.model.nth(at) else {
            return;
        };
        let stream = self.stream.clone();
        let reason = DiscardReason::PeerUnaware;
        let done = self.store().discard(&stream, SegmentNumber(number), reason);
        assert_eq!(done, !self.model.segments[&number].confirmed);
        if done {
            self.model.end(number);
        }
    }

    fn take_pad(&mut self, len: u32, floor: u64) {
        let stream = self.stream.clone();
        let plan = self.store().plan_pad(&stream, len, floor);
        assert_eq!(plan.is_ok(), self.model.usable() >= u64::from(len) + floor);
        let Ok(spans) = plan else { return };
        assert_eq!(spans.iter().map(|s| s.len_bytes).sum::<u32>(), len);
        self.check_bytes(&spans);
        self.store().take(&stream, &spans, Purpose::Pad);
        for span in spans {
            let segment = self.model.segments.get_mut(&span.segment.0).unwrap();
            assert!(segment.ours && segment.confirmed);
            segment.use_up(span);
        }
    }

    fn take_keys(&mut self, number: u32, len: u32) {
        let (stream, peer) = (self.stream.clone(), self.peer.clone());
        let order = KeyOrder {
            number,
            len_bytes: len,
            floor_bytes: 0,
            level: SecurityLevel::Qkd,
        };
        let Ok(plan) = self.store().plan_keys(&stream, order) else {
            return;
        };
        assert_eq!(plan.keys().count(), number as usize);
        self.check_bytes(&plan.keys().collect::<Vec<_>>());
        for (span, purpose) in plan.0 {
            let segment = self.model.segments.get_mut(&span.segment.0).unwrap();
            assert!(segment.ours && segment.confirmed);
            segment.use_up(span);
            self.store().take(&stream, &[span], purpose);
            if purpose == Purpose::Supply {
                assert_eq!(span.len_bytes, len);
                let binding = self.binding(span);
                self.store().bind(&peer, binding);
                self.model.outbox.insert(self.model.bound, span.segment.0);
                self.model.bound += 1;
            }
        }
    }

    fn check_bytes(&mut self, spans: &[KeySpan]) {
        let stream = self.stream.clone();
        let read = self.store().read_all(&stream, spans).unwrap();
        let expected: Vec<u8> = spans
            .iter()
            .flat_map(|s| {
                let key = &self.model.segments[&s.segment.0].key;
                key[s.offset_bytes as usize..(s.offset_bytes + s.len_bytes) as usize].to_vec()
            })
            .collect();
        assert_eq!(read.expose(), expected);
    }

    fn binding(&mut self, span: KeySpan) -> Binding {
        self.names = self.names.wrapping_add(1);
        Binding {
            key_id: KsaKeyId::from_random([self.names; 16]),
            stream: self.stream.clone(),
            span,
            master: "master".parse().unwrap(),
            applications: vec!["app".parse().unwrap()],
        }
    }

    /// The span, and whether the other end may name it.
    fn named(&self, at: usize, offset: u32, len: u32) -> Option<(KeySpan, bool)> {
        let number = self.model.nth(at)?;
        let segment = &self.model.segments[&number];
        let free = len > 0 && (offset..offset + len).all(|b| segment.free.contains(&b));
        let span = KeySpan {
            segment: SegmentNumber(number),
            offset_bytes: offset,
            len_bytes: len,
        };
        Some((span, free && !segment.ours))
    }

    fn follow(&mut self, at: usize, offset: u32, len: u32) {
        let Some((span, may)) = self.named(at, offset, len) else {
            return;
        };
        let stream = self.stream.clone();
        let segment = self.model.segments.get_mut(&span.segment.0).unwrap();
        let may = may && segment.confirmed;
        if may {
            segment.use_up(span);
        }
        assert_eq!(
            self.store().follow(&stream, &[span], Purpose::Pad).is_ok(),
            may
        );
        assert!(
            self.store().follow(&stream, &[span], Purpose::Pad).is_err(),
            "twice"
        );
    }

    fn burn_below(&mut self, at: usize, mark: u32) {
        let Some(number) = self.model.nth(at) else {
            return;
        };
        let stream = self.stream.clone();
        let reason = BurnReason::DeadLease;
        self.store()
            .burn_below(&stream, SegmentNumber(number), mark, reason);
        let segment = self.model.segments.get_mut(&number).unwrap();
        if !segment.ours {
            segment.free.retain(|&b| b >= mark);
        }
    }

    fn receive(&mut self, at: usize, offset: u32, len: u32) {
        let Some((span, may)) = self.named(at, offset, len) else {
            return;
        };
        let (peer, binding) = (self.peer.clone(), self.binding(span));
        let (sequence, key_id) = (self.model.received_count, binding.key_id);
        if self.model.received.contains_key(&key_id) {
            return;
        }
        let taken = self
            .store()
            .receive_binding(&peer, sequence, binding)
            .is_ok();
        assert_eq!(taken, may);
        if taken {
            self.model.received_count += 1;
            self.model.received.insert(key_id, span.segment.0);
            let segment = self.model.segments.get_mut(&span.segment.0).unwrap();
            segment.use_up(span);
        }
    }

    fn deliver(&mut self, at: usize) {
        let Some(&key_id) = self.model.received.keys().nth(at) else {
            return;
        };
        let peer = self.peer.clone();
        self.store().deliver(&peer, key_id, &"app".parse().unwrap());
        self.model.received.remove(&key_id);
    }

    fn cede(&mut self, want: u64, keep: u64) {
        let (stream, peer) = (self.stream.clone(), self.peer.clone());
        let before = self.model.usable();
        let plan = self.store().plan_cession(&stream, want, keep);
        for number in &plan {
            let segment = self.model.segments.get_mut(&number.0).unwrap();
            assert!(segment.is_untouched() && segment.ours && segment.confirmed);
            segment.ours = false;
            self.model.ceded.insert(self.model.cessions_sent, number.0);
            self.model.cessions_sent += 1;
            self.store().cede(&peer, &stream, *number);
        }
        let after = self.model.usable();
        assert!(plan.is_empty() || after >= keep, "{after} of {keep} kept");
        let last = plan
            .last()
            .map_or(0, |n| self.model.segments[&n.0].free.len() as u64);
        assert!(before - after < want + last.max(1), "more than asked for");
    }

    fn acquire(&mut self, at: usize) {
        let Some(number) = self.model.nth(at) else {
            return;
        };
        let (stream, peer) = (self.stream.clone(), self.peer.clone());
        let done = self.store().acquire(&peer, &stream, SegmentNumber(number));
        let segment = self.model.segments.get_mut(&number).unwrap();
        let may = !segment.ours && segment.confirmed && segment.is_untouched();
        assert_eq!(done.is_ok(), may);
        if may {
            segment.ours = true;
            self.model.cessions_received += 1;
        }
    }

    /// Closes what the lists say is done with; the model finds it by looking at every segment.
    fn close(&mut self) {
        let stream = self.stream.clone();
        let listed = self.store().stream(&stream).map_or_else(Vec::new, |entry| {
            entry.spent.iter().chain(&entry.finished).copied().collect()
        });
        let done = |(&n, s): (&u64, &ModelSegment)| {
            (s.confirmed && s.free.is_empty() && self.model.bindings(n) == 0).then_some(n)
        };
        let expected: BTreeSet<u64> = self.model.segments.iter().filter_map(done).collect();
        assert_eq!(
            listed.iter().map(|n| n.0).collect::<BTreeSet<_>>(),
            expected
        );
        for number in listed {
            self.store().close(&stream, number);
            self.model.end(number.0);
        }
    }

    /// The peer's store is replaced.
    fn void(&mut self) {
        let peer = self.peer.clone();
        self.model.incarnation += 1;
        let incarnation = self.model.incarnation;
        let replaced = self.store().peer_store(&peer, incarnation);
        if replaced {
            self.model = Model {
                next_segment: self.model.next_segment,
                incarnation,
                ..Model::default()
            };
        }
    }

    /// The power goes in the middle of a commit or a compaction, or just before.
    fn crash(&mut self, after: u64) {
        self.disk
            .fail_at(self.disk.operations() + 1 + after, Fault::PowerCut);
        let outcome = if after.is_multiple_of(2) {
            self.store().commit()
        } else {
            self.store().compact_above_bytes = 0;
            self.store().compact_if_large(0).map(|_| ())
        };
        if outcome.is_ok() {
            self.durable = self.model.clone();
        }
        self.store = None;
        self.disk.restart();
        self.open();
        // All of the batch, or nothing.
        if outcome.is_err() && self.matches(&self.model) {
            self.durable = self.model.clone();
        }
        self.model = self.durable.clone();
        self.model.proposed.clear();
        self.durable = self.model.clone();
    }

    fn matches(&self, model: &Model) -> bool {
        let state = self.store.as_ref().unwrap().state();
        let empty = BTreeMap::new();
        let entry = state.streams.get(&self.stream);
        let segments = entry.map_or(&empty, |entry| &entry.segments);
        let same = |(number, s): (&SegmentNumber, &crate::stream::Segment)| {
            model.segments.get(&number.0).is_some_and(|m| {
                let used = |b: &u32| match s.key_type {
                    KeyType::Encrypting => *b < s.mark_bytes,
                    KeyType::Decrypting => s.followed.contains(u64::from(*b)),
                };
                let free: BTreeSet<u32> = (0..s.len_bytes).filter(|b| !used(b)).collect();
                m.free == free
                    && m.ours == (s.key_type == KeyType::Encrypting)
                    && m.confirmed == (s.stage == Stage::Confirmed)
                    && s.bindings as usize == model.bindings(number.0)
            })
        };
        let peer = state.peers.get(&self.peer);
        entry.map_or(0, |e| e.next_segment) == model.next_segment
            && segments.len() == model.segments.len()
            && segments.iter().all(same)
            && state.received.len() == model.received.len()
            && peer.map_or(0, |p| p.bindings_sent) == model.bound
            && peer.map_or(0, |p| p.outbox.len()) == model.outbox.len()
            && peer.map_or(0, |p| p.undelivered.len()) == model.received.len()
            && peer.map_or(0, |p| p.cessions_sent) == model.cessions_sent
            && peer.map_or(0, |p| p.cessions_received) == model.cessions_received
            && peer.map_or(0, |p| p.ceded.len()) == model.ceded.len()
            && peer.and_then(|p| p.incarnation).unwrap_or(0) == model.incarnation
    }

    fn check(&self) {
        assert!(self.matches(&self.model), "{:?}", self.model);
        let store = self.store.as_ref().unwrap();
        assert_eq!(store.inconsistencies(), 0);
        assert_eq!(store.available_bytes(&self.stream), self.model.usable());
        assert_eq!(
            store.accounts(),
            store.audit(),
            "kept sums are those of a recount"
        );
        for books in store.audit() {
            assert_eq!(books.imbalance_bits, 0);
        }
        let held: u64 = self
            .model
            .segments
            .values()
            .map(|s| s.free.len() as u64)
            .sum();
        let entry = store.stream(&self.stream);
        assert_eq!(entry.map_or(0, |e| e.held_bytes), held);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 192 } else { 4096 }))]

    #[test]
    fn no_byte_is_used_twice_or_lost_over_any_crash(
        seed in any::<u64>(),
        ops in prop::collection::vec(op(), 1..60),
    ) {
        let mut rig = Rig::new(seed);
        for op in &ops {
            rig.apply(op);
            rig.check();
        }
        rig.apply(&Op::Crash { after: 1000 });
        rig.check();
    }
}
