//! What many tests begin with, and what they end with.

use std::collections::BTreeMap;

use qkd_keyfile::{KeySpan, SegmentNumber, StreamId, metadata::KeyType};
use qkd_kma::{Purpose, Record};

use super::{Network, chain, node};

pub fn two() -> Network {
    let mut net = Network::new(chain(&["alice", "bob"], 0), 1);
    net.start_all();
    net
}

pub fn three(seed: u64) -> Network {
    let mut net = Network::new(chain(&["alice", "relay", "bob"], 4096), seed);
    net.start_all();
    net
}

pub fn feed(net: &mut Network, from: u64, count: u64) {
    for id in from..from + count {
        net.deliver_both("alice", "relay", id, 2048);
        net.deliver_both("relay", "bob", id, 2048);
    }
}

pub fn feed_chain(net: &mut Network, names: &[&str], from: u64, count: u64) {
    for id in from..from + count {
        for pair in names.windows(2) {
            net.deliver_both(pair[0], pair[1], id, 2048);
        }
    }
}

/// A message that carries a unit, sent from one node to another and not delivered yet.
pub fn hop_on_the_wire(net: &mut Network, from: &str, to: &str) -> Vec<u8> {
    for _ in 0..2000 {
        let hop = |(f, t, bytes): &(_, _, Vec<u8>)| {
            *f == node(from) && *t == node(to) && bytes.len() > 600
        };
        if let Some(at) = net.wires.iter().position(hop) {
            return net.wires.remove(at).expect("was just found").2;
        }
        match net.wires.pop_front() {
            Some((peer, to, bytes)) => {
                net.input(&to, qkd_kma::Input::Message { peer, bytes });
            }
            None => net.tick(),
        }
    }
    panic!("no hop from {from} to {to}");
}

/// Every span that the ledgers of both ends show, per stream: taken by the owner, each byte once;
/// followed by the other end, each byte once; pad and keys only where the owner took them. Whoever takes
/// owns at that moment, and no end acquires what the other has not ceded.
pub fn check_ledgers(net: &Network, names: &[&str]) {
    check_records(names.iter().map(|name| net.ledger(name)));
}

type Place = (StreamId, SegmentNumber);

/// The same, of the ledgers of all ends.
pub fn check_records(ledgers: impl Iterator<Item = Vec<Record>>) {
    type Bytes = BTreeMap<Place, BTreeMap<u32, Purpose>>;
    let spread = |into: &mut Bytes, stream: &StreamId, span: KeySpan, purpose: Purpose| {
        let bytes = into.entry((stream.clone(), span.segment)).or_default();
        for at in span.offset_bytes..span.end_bytes().expect("spans end") {
            let before = bytes.insert(at, purpose);
            assert_eq!(before, None, "{stream} {span:?} used twice");
        }
    };
    let (mut taken, mut followed) = (Bytes::new(), Bytes::new());
    let mut owners: BTreeMap<Place, i32> = BTreeMap::new();
    for records in ledgers {
        let owned = check_ownership(&records);
        for (at, _) in owned.into_iter().filter(|(_, owns)| *owns) {
            *owners.entry(at).or_default() += 1;
        }
        for record in records {
            match record {
                Record::Taken {
                    stream,
                    span,
                    purpose,
                } => spread(&mut taken, &stream, span, purpose),
                Record::Followed {
                    stream,
                    span,
                    purpose,
                } => spread(&mut followed, &stream, span, purpose),
                Record::BindingReceived { binding, .. } => {
                    let (stream, span) = (&binding.stream, binding.span);
                    spread(&mut followed, stream, span, Purpose::Supply);
                }
                _ => {}
            }
        }
    }
    for (at, count) in owners {
        assert!(count < 2, "{at:?} has two owners");
    }
    for (at, bytes) in &followed {
        for (offset, purpose) in bytes {
            if !matches!(purpose, Purpose::Burn(_)) {
                let owner = taken.get(at).and_then(|b| b.get(offset));
                assert_eq!(owner, Some(purpose), "{at:?} byte {offset}");
            }
        }
    }
}

/// Which segments one end owns in the end, by its own ledger; on the way it takes and gives away only
/// what it owns, and follows and acquires only what it does not.
fn check_ownership(records: &[Record]) -> BTreeMap<Place, bool> {
    let mut owned: BTreeMap<Place, bool> = BTreeMap::new();
    for record in records {
        let (stream, segment, before, after) = match record {
            Record::Stored {
                stream,
                segment,
                body,
            } => {
                let owns = body.key_type == KeyType::Encrypting;
                owned.insert((stream.clone(), *segment), owns);
                continue;
            }
            Record::Taken { stream, span, .. } => (stream, span.segment, true, true),
            Record::Followed { stream, span, .. } => (stream, span.segment, false, false),
            Record::BindingReceived { binding, .. } => {
                (&binding.stream, binding.span.segment, false, false)
            }
            Record::Ceded {
                stream, segment, ..
            } => (stream, *segment, true, false),
            Record::Acquired {
                stream, segment, ..
            } => (stream, *segment, false, true),
            _ => continue,
        };
        // One that a compacted journal shows no more is taken as it comes.
        let at = (stream.clone(), segment);
        let was = owned.insert(at, after).unwrap_or(before);
        assert_eq!(was, before, "{record:?}");
    }
    owned
}
