//! Two-phase confirmation and the end of segments, for links and for end-to-end units alike.
//!
//! Only the end that numbers a stream's segments confirms and voids them; only the owner of one says
//! that it is spent. No third node has a say in either.

use std::{collections::BTreeMap, ops::Bound};

use qkd_keyfile::{NodeId, SegmentNumber, StreamId, metadata::KeyType};

use crate::{
    io::Cx,
    record::{BurnReason, DiscardReason, Stage},
    relay::{completion_again, release_again, release_fits},
    session::Session,
    stream::Stream,
    wire::{MAX_ITEMS, Message},
};

/// The other end has stored a segment that this end answered: it may be used.
pub(crate) fn commit(
    cx: &mut Cx<'_>,
    peer: &NodeId,
    stream: &StreamId,
    segment: SegmentNumber,
    release: &[u8; 16],
) {
    if !numbers(stream, peer, cx.me) {
        return;
    }
    let proven = match stream {
        StreamId::Link(_) => true,
        StreamId::EndToEnd { .. } => {
            cx.store.segment(stream, segment).is_none()
                || release_fits(cx, stream, segment, release)
        }
    };
    if !proven {
        tracing::error!(%peer, %stream, %segment, "release does not fit the unit");
        cx.alarm(crate::io::Alarm::UnitMismatch {
            stream: stream.clone(),
            segment,
        });
        return;
    }
    cx.store.confirm(stream, segment);
}

/// The other end waits for commits: say them again, or that there is nothing to commit.
pub(crate) fn pending(
    cx: &mut Cx<'_>,
    peer: &NodeId,
    stream: &StreamId,
    segments: &[SegmentNumber],
) {
    if !numbers(stream, cx.me, peer) {
        return;
    }
    for &segment in segments {
        let known = cx.store.segment(stream, segment).is_some();
        let open = cx
            .store
            .stream(stream)
            .is_some_and(|s| s.proposed.contains(&segment));
        match (stream, known) {
            // Still under way here: the answer or completion will settle it.
            _ if open => {}
            (StreamId::EndToEnd { .. }, _) => release_again(cx, stream, segment),
            (StreamId::Link(_), true) => cx.send(
                peer,
                &Message::Commit {
                    stream: stream.clone(),
                    segment,
                    release: [0; 16],
                },
            ),
            (StreamId::Link(_), false) => cx.send(
                peer,
                &Message::Void {
                    stream: stream.clone(),
                    segment,
                },
            ),
        }
    }
}

/// The end that numbers the stream's segments says that one is void.
pub(crate) fn void(cx: &mut Cx<'_>, peer: &NodeId, stream: &StreamId, segment: SegmentNumber) {
    if numbers(stream, peer, cx.me) {
        cx.store
            .discard(stream, segment, DiscardReason::PeerUnaware);
    }
}

/// Whether `one`, which shares the stream with `other`, numbers and confirms its segments.
fn numbers(stream: &StreamId, one: &NodeId, other: &NodeId) -> bool {
    let first = match stream {
        StreamId::Link(link) => link.proposer(),
        StreamId::EndToEnd { source, .. } => source,
    };
    first == one && stream.peer_of(one) == Some(other)
}

/// The owner is done with segments: what it did not name is burned. One that is not confirmed here is
/// not closed yet, for bindings of it may wait.
pub(crate) fn spent(
    cx: &mut Cx<'_>,
    peer: &NodeId,
    stream: StreamId,
    mut segments: Vec<SegmentNumber>,
) {
    if stream.peer_of(cx.me) != Some(peer) {
        return;
    }
    segments.retain(|&number| {
        cx.store.segment(&stream, number).is_none_or(|segment| {
            segment.key_type == KeyType::Decrypting && segment.stage == Stage::Confirmed
        })
    });
    for &segment in &segments {
        cx.store
            .burn_below(&stream, segment, u32::MAX, BurnReason::Closed);
    }
    cx.send(peer, &Message::SpentTaken { stream, segments });
}

/// Both ends are done with segments of this end.
pub(crate) fn spent_taken(
    cx: &mut Cx<'_>,
    peer: &NodeId,
    stream: &StreamId,
    segments: &[SegmentNumber],
) {
    if stream.peer_of(cx.me) != Some(peer) {
        return;
    }
    for &segment in segments {
        let entry = cx.store.stream(stream);
        if entry.is_some_and(|entry| entry.spent.contains(&segment)) {
            cx.store.close(stream, segment);
        }
    }
}

/// What this end answered and the other has not confirmed, and what the other has not acknowledged.
pub(crate) fn say_pending(cx: &mut Cx<'_>, sessions: &BTreeMap<NodeId, Session>) {
    for (peer, _, stream, segments) in listed(cx, sessions, |_, s| first_of(&s.answered)) {
        // A completion that was lost would leave the source waiting until it gives up.
        if matches!(stream, StreamId::EndToEnd { .. }) {
            for &segment in &segments {
                if let Some(message) = completion_again(cx, &stream, segment) {
                    cx.send(&peer, &message);
                }
            }
        }
        cx.send(&peer, &Message::Pending { stream, segments });
    }
}

/// Segments of this end that are taken to the last byte, with nothing of them in flight.
pub(crate) fn say_spent(cx: &mut Cx<'_>, sessions: &BTreeMap<NodeId, Session>) {
    for (peer, session, stream, mut segments) in listed(cx, sessions, |_, s| first_of(&s.spent)) {
        let in_flight = session.in_flight();
        segments.retain(|number| !in_flight.contains(number));
        if !segments.is_empty() {
            cx.send(&peer, &Message::Spent { stream, segments });
        }
    }
}

/// The other end has reason to believe that others know segments.
pub(crate) fn suspected(
    cx: &mut Cx<'_>,
    peer: &NodeId,
    stream: &StreamId,
    segments: &[SegmentNumber],
) {
    if stream.peer_of(cx.me) != Some(peer) {
        return;
    }
    for &segment in segments {
        if cx.store.suspect(stream, segment) {
            tracing::error!(%peer, %stream, %segment, "peer suspects a segment; it is void");
        }
    }
}

/// Segments that others may know, until both ends are done with them: of each stream as many as one message
/// takes, those after the last that was said.
pub(crate) fn say_suspected(
    cx: &mut Cx<'_>,
    sessions: &BTreeMap<NodeId, Session>,
    said: &mut BTreeMap<StreamId, SegmentNumber>,
) {
    let after_the_last = |id: &StreamId, stream: &Stream| {
        let after = said.get(id).copied();
        let after = after.map_or(Bound::Unbounded, Bound::Excluded);
        let rest = stream.suspected.range((after, Bound::Unbounded));
        let segments = first_of(rest);
        match segments.last().filter(|_| segments.len() == MAX_ITEMS) {
            Some(&last) => said.insert(id.clone(), last),
            None => said.remove(id),
        };
        segments
    };
    for (peer, _, stream, segments) in listed(cx, sessions, after_the_last) {
        cx.send(&peer, &Message::Suspected { stream, segments });
    }
}

/// As many as one message takes.
fn first_of<'n>(segments: impl IntoIterator<Item = &'n SegmentNumber>) -> Vec<SegmentNumber> {
    segments.into_iter().take(MAX_ITEMS).copied().collect()
}

/// Of every stream with a node that is there, some segments, unless there are none.
fn listed<'s>(
    cx: &Cx<'_>,
    sessions: &'s BTreeMap<NodeId, Session>,
    mut some: impl FnMut(&StreamId, &Stream) -> Vec<SegmentNumber>,
) -> Vec<(NodeId, &'s Session, StreamId, Vec<SegmentNumber>)> {
    let mut found = Vec::new();
    for (id, stream) in &cx.store.state().streams {
        let peer = id.peer_of(cx.me);
        let Some((peer, session)) = peer.and_then(|peer| sessions.get_key_value(peer)) else {
            continue;
        };
        if !session.is_up() {
            continue;
        }
        let segments = some(id, stream);
        if !segments.is_empty() {
            found.push((peer.clone(), session, id.clone(), segments));
        }
    }
    found
}

/// Forgets segments of the other end whose every byte was used or burned and fetched.
pub(crate) fn close_finished(cx: &mut Cx<'_>) {
    let streams = cx.store.state().streams.iter();
    let finished: Vec<(StreamId, SegmentNumber)> = streams
        .flat_map(|(id, stream)| stream.finished.iter().map(|&number| (id.clone(), number)))
        .collect();
    for (stream, segment) in finished {
        cx.store.close(&stream, segment);
    }
}
