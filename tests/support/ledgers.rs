//! What the ledgers of all nodes of a network, read together, must show.

#![allow(dead_code, reason = "every test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{collections::BTreeMap, fs};

use qkd_bridge::demo::Network;
use qkd_keyfile::{KeySpan, SegmentNumber, StreamId};
use qkd_kma::{Purpose, Record, store::read_ledger};

/// [`check`] over the ledgers of a network whose nodes have stopped.
pub(crate) fn check_all(network: &Network) -> (usize, usize) {
    let journals = network.nodes.iter().map(|node| {
        let journal = fs::read(node.data.join("store/journal")).unwrap();
        read_ledger(&journal).unwrap()
    });
    check(journals.flatten())
}

/// Bits of a stream, by segment: where they begin and end, and what they were used for.
type Spans = BTreeMap<(StreamId, SegmentNumber), Vec<(u32, u32, Purpose)>>;

/// No range was taken twice by its owner, none followed twice by the other end, and nothing was used
/// that the owner has not taken for the same purpose.
///
/// Returns how often a process took over a store, and how many uses were compared.
pub(crate) fn check(records: impl Iterator<Item = Record>) -> (usize, usize) {
    let (mut taken, mut followed) = (Spans::new(), Spans::new());
    let mut boots = 0;
    let add = |spans: &mut Spans, stream: StreamId, span: KeySpan, purpose: Purpose| {
        let end = span.end_bytes().unwrap();
        let entry = spans.entry((stream, span.segment)).or_default();
        entry.push((span.offset_bytes, end, purpose));
    };
    for record in records {
        match record {
            Record::Taken {
                stream,
                span,
                purpose,
            } => add(&mut taken, stream, span, purpose),
            Record::Followed {
                stream,
                span,
                purpose,
            } => add(&mut followed, stream, span, purpose),
            Record::BindingReceived { binding, .. } => {
                add(&mut followed, binding.stream, binding.span, Purpose::Supply);
            }
            Record::Boot { .. } => boots += 1,
            // The history before it is gone: a longer run than this test's.
            Record::Snapshot { .. } => panic!("the ledger was compacted"),
            _ => {}
        }
    }
    for (at, spans) in taken.iter_mut().chain(&mut followed) {
        spans.sort_unstable();
        for pair in spans.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "{at:?}: {pair:?} overlap");
        }
    }
    let mut used = 0;
    for (at, spans) in &followed {
        for &(start, end, purpose) in spans {
            if matches!(purpose, Purpose::Burn(_)) {
                continue;
            }
            used += 1;
            let mut from = start;
            for &(begin, until, of_owner) in taken.get(at).into_iter().flatten() {
                if begin <= from && from < until && of_owner == purpose {
                    from = until;
                }
            }
            assert!(from >= end, "{at:?}: {start}..{end} used as {purpose:?}");
        }
    }
    (boots, used)
}
