//! What a peer can say that no honest one would: nothing of it moves a bit, and nothing panics.

use qkd_keyfile::{
    Composition, Generation, KeySpan, KsaKeyId, LinkId, Piece, SegmentNumber, StreamId,
    metadata::{KeyType, SecurityLevel},
};

use sha2::{Digest, Sha256};

use crate::{
    Alarm, Input, Settlement,
    common::{Network, app, chain, node, qkd_key},
    digest::link_key_id,
    record::{Binding, RelayedWay, Stage},
    wire::{Mark, Marks, Message, Propose, RelayHeader, SealedHop, Verdict},
};

fn two() -> Network {
    let mut net = Network::new(chain(&["alice", "bob"], 0), 1);
    net.start_all();
    for id in 0..6 {
        net.deliver_both("alice", "bob", id, 1024);
    }
    net.run(20);
    net
}

fn three() -> Network {
    let mut net = Network::new(chain(&["alice", "relay", "bob"], 4096), 2);
    net.start_all();
    for id in 0..16 {
        net.deliver_both("alice", "relay", id, 2048);
        net.deliver_both("relay", "bob", id, 2048);
    }
    net
}

pub(crate) fn link(a: &str, b: &str) -> StreamId {
    StreamId::Link(LinkId::between(&node(a), &node(b)).unwrap())
}

pub(crate) fn end_to_end(source: &str, destination: &str) -> StreamId {
    StreamId::EndToEnd {
        source: node(source),
        destination: node(destination),
    }
}

pub(crate) fn say(net: &mut Network, from: &str, to: &str, message: &Message) {
    let (peer, bytes) = (node(from), message.encode());
    net.input(&node(to), Input::Message { peer, bytes });
}

/// What a node's durable state is, in short.
pub(crate) fn state(net: &Network, at: &str) -> [u8; 32] {
    let bytes = postcard::to_allocvec(net.kma(at).store().state()).unwrap();
    Sha256::digest(bytes).into()
}

/// Lets time pass, losing every message that `lost` names.
pub(crate) fn run_without(net: &mut Network, ticks: usize, lost: impl Fn(&Message) -> bool) {
    for _ in 0..ticks {
        while let Some((peer, to, bytes)) = net.wires.pop_front() {
            if !Message::decode(&bytes).is_some_and(|message| lost(&message)) {
                net.input(&to, Input::Message { peer, bytes });
            }
        }
        net.tick();
    }
}

/// The first message on the wires that fits, taken off them.
pub(crate) fn take<T>(net: &mut Network, fits: impl Fn(&str, &str, Message) -> Option<T>) -> T {
    for _ in 0..5000 {
        match net.wires.pop_front() {
            Some((peer, to, bytes)) => {
                let message = Message::decode(&bytes).unwrap();
                if let Some(found) = fits(peer.as_str(), to.as_str(), message) {
                    return found;
                }
                net.input(&to, Input::Message { peer, bytes });
            }
            None => net.tick(),
        }
    }
    panic!("no such message");
}

/// Everything that can be said of a stream's segments.
fn all_about(stream: &StreamId, numbers: &[SegmentNumber]) -> Vec<Message> {
    let mut messages = vec![
        Message::Pending {
            stream: stream.clone(),
            segments: numbers.to_vec(),
        },
        Message::Spent {
            stream: stream.clone(),
            segments: numbers.to_vec(),
        },
        Message::SpentTaken {
            stream: stream.clone(),
            segments: numbers.to_vec(),
        },
    ];
    for &segment in numbers {
        let stream = || stream.clone();
        let (release, tag) = ([0; 16], [0; 16]);
        messages.push(Message::Commit {
            stream: stream(),
            segment,
            release,
        });
        messages.push(Message::Void {
            stream: stream(),
            segment,
        });
        messages.push(Message::Completion {
            stream: stream(),
            segment,
            way: RelayedWay::of_level(SecurityLevel::Qkd),
            tag,
        });
    }
    messages
}

fn numbers(net: &Network, at: &str, stream: &StreamId) -> Vec<SegmentNumber> {
    let stored = net.kma(at).store().stream(stream);
    let mut numbers: Vec<_> =
        stored.map_or_else(Vec::new, |s| s.segments.keys().copied().collect());
    numbers.extend([0, 1, u64::MAX - 1, u64::MAX].map(SegmentNumber));
    numbers
}

#[test]
fn a_third_node_has_no_say_over_a_stream_it_is_no_end_of() {
    let mut net = three();
    // Bob holds units that wait for the release, and segments that are in use.
    run_without(&mut net, 20, |m| {
        matches!(
            m,
            Message::Commit {
                stream: StreamId::EndToEnd { .. },
                ..
            }
        )
    });
    net.supply("alice", "relay", 3, 256).unwrap();
    net.wires.clear();
    let waiting = |net: &Network| {
        let stream = net.kma("bob").store().stream(&end_to_end("alice", "bob"));
        stream.map_or(0, |s| s.answered.len())
    };
    assert!(waiting(&net) > 0);
    let streams = [
        (end_to_end("alice", "bob"), "relay", ["alice", "bob"]),
        (end_to_end("bob", "alice"), "relay", ["alice", "bob"]),
        (link("alice", "relay"), "bob", ["alice", "relay"]),
        (link("relay", "bob"), "alice", ["bob", "relay"]),
    ];
    for (stream, third, ends) in streams {
        for end in ends {
            let before = state(&net, end);
            for message in all_about(&stream, &numbers(&net, end, &stream)) {
                say(&mut net, third, end, &message);
                assert_eq!(state(&net, end), before, "{third} to {end}: {message:?}");
            }
        }
    }
    assert!(waiting(&net) > 0);
    net.wires.clear();
    net.run(40);
    assert_eq!(waiting(&net), 0, "the source releases them");
    net.check_books();
}

#[test]
fn only_the_end_that_numbers_a_streams_segments_confirms_and_voids_them() {
    let mut net = three();
    run_without(&mut net, 20, |m| matches!(m, Message::Commit { .. }));
    net.wires.clear();
    for (stream, from, to) in [
        (link("alice", "relay"), "relay", "alice"),
        (link("relay", "bob"), "relay", "bob"),
        (end_to_end("alice", "bob"), "bob", "alice"),
        (end_to_end("bob", "alice"), "alice", "bob"),
    ] {
        let before = state(&net, to);
        for segment in numbers(&net, to, &stream) {
            let release = [0; 16];
            for message in [
                Message::Commit {
                    stream: stream.clone(),
                    segment,
                    release,
                },
                Message::Void {
                    stream: stream.clone(),
                    segment,
                },
            ] {
                say(&mut net, from, to, &message);
                assert_eq!(state(&net, to), before, "{message:?}");
            }
        }
    }
}

#[test]
fn a_release_that_is_not_mask_2_releases_nothing() {
    let mut net = three();
    run_without(&mut net, 20, |m| {
        matches!(
            m,
            Message::Commit {
                stream: StreamId::EndToEnd { .. },
                ..
            }
        )
    });
    let stream = end_to_end("alice", "bob");
    let segment = *net
        .kma("bob")
        .store()
        .stream(&stream)
        .unwrap()
        .answered
        .first()
        .unwrap();
    let before = state(&net, "bob");
    let release = [0; 16];
    let commit = Message::Commit {
        stream: stream.clone(),
        segment,
        release,
    };
    say(&mut net, "alice", "bob", &commit);
    assert_eq!(state(&net, "bob"), before);
    assert_eq!(
        net.nodes[&node("bob")].alarms,
        [Alarm::UnitMismatch { stream, segment }]
    );
}

#[test]
fn a_completion_over_other_bits_makes_no_stock_at_the_source() {
    let mut net = three();
    let (segment, way, mut tag) = take(&mut net, |from, _, message| match message {
        Message::Completion {
            segment, way, tag, ..
        } if from == "bob" => Some((segment, way, tag)),
        _ => None,
    });
    tag[3] ^= 4;
    let stream = end_to_end("alice", "bob");
    say(
        &mut net,
        "bob",
        "alice",
        &Message::Completion {
            stream: stream.clone(),
            segment,
            way,
            tag,
        },
    );
    assert!(net.kma("alice").store().segment(&stream, segment).is_none());
    let alarm = Alarm::UnitMismatch {
        stream: stream.clone(),
        segment,
    };
    assert_eq!(net.nodes[&node("alice")].alarms, [alarm]);
    net.run(20);
    assert!(
        net.kma("bob").store().segment(&stream, segment).is_none(),
        "void there too"
    );
    net.check_books();
}

#[test]
fn a_unit_fails_only_if_the_next_kma_on_its_route_says_so() {
    let mut net = three();
    let header = take(&mut net, |from, _, message| match message {
        Message::Relay(hop) if from == "alice" => {
            postcard::from_bytes::<RelayHeader>(&hop.header).ok()
        }
        _ => None,
    });
    let (route, segment) = (header.route, header.segment);
    let before = state(&net, "alice");
    let other = vec![node("alice"), node("bob")];
    let looped = vec![node("alice"), node("bob"), node("alice"), node("bob")];
    for (from, route) in [
        ("bob", &route),
        ("bob", &other),
        ("bob", &looped),
        ("relay", &other),
    ] {
        let failed = Message::RelayFailed {
            route: route.clone(),
            segment,
        };
        say(&mut net, from, "alice", &failed);
        assert_eq!(state(&net, "alice"), before, "{from} {route:?}");
    }
    say(
        &mut net,
        "relay",
        "alice",
        &Message::RelayFailed { route, segment },
    );
    assert_ne!(state(&net, "alice"), before);
}

#[test]
fn an_answered_segment_is_not_said_to_be_closed_for_keys_of_it_may_wait() {
    let mut net = three();
    // Releases are lost; bindings arrive.
    run_without(&mut net, 20, |m| {
        matches!(
            m,
            Message::Commit {
                stream: StreamId::EndToEnd { .. },
                ..
            }
        )
    });
    let keys = net.supply("alice", "bob", 128, 256).unwrap();
    run_without(&mut net, 40, |m| {
        matches!(
            m,
            Message::Commit {
                stream: StreamId::EndToEnd { .. },
                ..
            }
        )
    });
    assert_eq!(net.kma("bob").status().waiting_bindings, 128);
    let ids: Vec<_> = keys.iter().map(|k| k.key_id).collect();
    net.run(40);
    let fetched = net.fetch("bob", "alice", &ids).unwrap();
    assert!(keys.iter().zip(&fetched).all(|(a, b)| a.key.ct_eq(&b.key)));
    net.run(40);
    net.check_books();
}

#[test]
fn no_node_stands_in_the_way_of_anothers_key_id() {
    let mut net = three();
    net.run(40);
    net.supply("alice", "bob", 1, 256).unwrap();
    let (first, bindings) = take(&mut net, |from, to, message| match message {
        Message::Bindings { first, bindings } if (from, to) == ("alice", "bob") => {
            Some((first, bindings))
        }
        _ => None,
    });
    let key_id = bindings[0].key_id;
    let stream = link("relay", "bob");
    let entry = net.kma("bob").store().stream(&stream).unwrap();
    let theirs = entry.segments.iter().find(|(_, s)| {
        s.key_type == KeyType::Decrypting && s.stage == Stage::Confirmed && s.followed.end() < 100
    });
    let span = KeySpan {
        segment: *theirs.unwrap().0,
        offset_bytes: 1000,
        len_bytes: 32,
    };
    let binding = Binding {
        key_id,
        stream,
        span,
        master: app("app-relay"),
        applications: vec![app("app-bob")],
    };
    say(
        &mut net,
        "relay",
        "bob",
        &Message::Bindings {
            first: 0,
            bindings: vec![binding],
        },
    );
    assert_eq!(net.kma("bob").status().waiting_bindings, 1);
    say(
        &mut net,
        "alice",
        "bob",
        &Message::Bindings { first, bindings },
    );
    assert!(net.fetch("bob", "alice", &[key_id]).is_ok());
}

fn binding(stream: StreamId, segment: u64, offset_bytes: u32, len_bytes: u32) -> Binding {
    Binding {
        key_id: KsaKeyId::from_random([9; 16]),
        stream,
        span: KeySpan {
            segment: SegmentNumber(segment),
            offset_bytes,
            len_bytes,
        },
        master: app("m"),
        applications: vec![app("a")],
    }
}

#[test]
fn bindings_to_bits_that_are_not_the_senders_are_refused() {
    for (from, to) in [("alice", "bob"), ("bob", "alice")] {
        let mut net = two();
        let (ours, theirs) = {
            let entry = net.kma(to).store().stream(&link("alice", "bob")).unwrap();
            let of = |key_type| {
                let mut segments = entry.segments.iter();
                segments.find(|(_, s)| s.key_type == key_type).unwrap().0.0
            };
            (of(KeyType::Encrypting), of(KeyType::Decrypting))
        };
        let stream = || link("alice", "bob");
        let before = state(&net, to);
        let mut bad = vec![
            binding(stream(), ours, 40, 32),
            binding(stream(), theirs, 0, 32),
            binding(stream(), theirs, 31, 2),
            binding(stream(), theirs, 1000, 25),
            binding(stream(), theirs, u32::MAX, 2),
            binding(stream(), theirs, 40, 0),
            binding(stream(), theirs, 40, u32::MAX),
            binding(stream(), u64::MAX, 40, 32),
            binding(link("alice", "carol"), theirs, 40, 32),
            binding(end_to_end(from, to), theirs, 40, 32),
        ];
        bad.push(Binding {
            applications: vec![],
            ..binding(stream(), theirs, 40, 32)
        });
        bad.push(Binding {
            applications: vec![app("a"); 65],
            ..binding(stream(), theirs, 40, 32)
        });
        for binding in bad {
            for first in [0, 1, u64::MAX] {
                let bindings = vec![binding.clone(), binding.clone()];
                say(&mut net, from, to, &Message::Bindings { first, bindings });
                assert_eq!(state(&net, to), before, "{first} {binding:?}");
            }
        }
        let good = vec![binding(stream(), theirs, 40, 32)];
        say(
            &mut net,
            from,
            to,
            &Message::Bindings {
                first: 0,
                bindings: good,
            },
        );
        assert_ne!(state(&net, to), before);
    }
}

#[test]
fn acknowledgements_of_what_was_never_said_change_nothing() {
    let mut net = two();
    net.supply("alice", "bob", 2, 256).unwrap();
    net.wires.clear();
    let before = state(&net, "alice");
    for next in [0, 3, u64::MAX] {
        say(&mut net, "bob", "alice", &Message::BindingsTaken { next });
    }
    for session in [0, u64::MAX] {
        say(&mut net, "bob", "alice", &Message::MarksTaken { session });
        say(&mut net, "bob", "alice", &Message::RolledBack { session });
        say(
            &mut net,
            "bob",
            "alice",
            &Message::HopTaken {
                session,
                sequence: session,
            },
        );
    }
    for verdict in [
        Verdict::Match,
        Verdict::Differ,
        Verdict::Missing,
        Verdict::Full,
    ] {
        for segment in [0, 99, u64::MAX].map(SegmentNumber) {
            say(
                &mut net,
                "bob",
                "alice",
                &Message::Answer {
                    segment,
                    verdict,
                    tag: [0; 16],
                    missing: vec!["0".parse().unwrap()],
                },
            );
        }
    }
    let open = numbers(&net, "alice", &link("alice", "bob"));
    let taken = Message::SpentTaken {
        stream: link("alice", "bob"),
        segments: open,
    };
    say(&mut net, "bob", "alice", &taken);
    assert_eq!(state(&net, "alice"), before);
    assert!(net.nodes[&node("alice")].alarms.is_empty());
}

#[test]
fn proposals_that_cannot_be_are_refused() {
    let mut net = two();
    let name = qkd_key("alice-bob", "77");
    net.deliver(&node("bob"), &name, &[7; 1024]);
    net.run(2);
    let piece = |offset_bits, len_bits| Piece {
        qkd_key: name.id.clone(),
        offset_bits,
        len_bits,
    };
    let propose = |number, generation, pieces: Vec<Piece>, unit_bytes| {
        let composition = Composition {
            module_pair: name.module_pair.clone(),
            generation: Generation(generation),
            pieces,
        };
        let link = LinkId::between(&node("alice"), &node("bob")).unwrap();
        let segment = SegmentNumber(number);
        Message::Propose(Propose {
            segment,
            kma_key_id: link_key_id(&link, segment, &composition),
            composition,
            proposer_key_type: KeyType::Encrypting,
            unit_bytes,
            tag: [0; 16],
        })
    };
    let whole = || vec![piece(0, 8192)];
    let before = state(&net, "bob");
    for message in [
        propose(u64::MAX, 0, whole(), 32),
        propose(100, 0, whole(), 0),
        propose(100, 0, whole(), 1),
        propose(100, 0, whole(), u32::MAX),
        propose(101, 0, vec![], 32),
        // A number that is in use, for other bits: the proposer's store went back in time.
        propose(0, 0, vec![], 32),
    ] {
        say(&mut net, "alice", "bob", &message);
        assert_eq!(state(&net, "bob"), before, "{message:?}");
    }
    let alarms = std::mem::take(&mut net.nodes.get_mut(&node("bob")).unwrap().alarms);
    assert_eq!(
        alarms,
        [Alarm::PeerRolledBack {
            peer: node("alice")
        }]
    );
    // These name a QKD-key that waits here, wrongly: both ends drop it, for the proposer has.
    say(
        &mut net,
        "alice",
        "bob",
        &propose(102, 0, vec![piece(u32::MAX, u32::MAX); 2], 32),
    );
    assert_eq!(net.nodes[&node("bob")].settled[&name], Settlement::Dropped);
    assert_eq!(
        net.kma("bob")
            .store()
            .stream(&link("alice", "bob"))
            .unwrap()
            .segments
            .len(),
        6
    );
    net.check_books();
}

#[test]
fn marks_of_anothers_stream_or_beyond_all_bounds_move_nothing() {
    let mut net = three();
    net.run(40);
    net.crash(&node("relay"));
    net.start(&node("relay"));
    let session = take(&mut net, |from, to, message| match message {
        Message::Marks(marks) if (from, to) == ("relay", "bob") => Some(marks.session),
        _ => None,
    });
    // That marks come shows that the relay's ledger has the session.
    let none = Message::Marks(Marks {
        session,
        round: 8,
        part: 0,
        parts: 2,
        bindings_known: 0,
        bindings_next: u64::MAX,
        cessions_known: 0,
        cessions_next: u64::MAX,
        marks: Vec::new(),
    });
    say(&mut net, "relay", "bob", &none);
    let before = state(&net, "bob");
    let said = |part, parts, stream: StreamId| {
        Message::Marks(Marks {
            session,
            round: 9,
            part,
            parts,
            bindings_known: 0,
            bindings_next: u64::MAX,
            cessions_known: 0,
            cessions_next: u64::MAX,
            marks: vec![Mark {
                stream,
                segment: SegmentNumber(0),
                mark_bytes: u32::MAX,
                dead_below_bytes: u32::MAX,
            }],
        })
    };
    for (part, parts) in [(0, 0), (1, 1), (u32::MAX, u32::MAX), (0, u32::MAX)] {
        let message = said(part, parts, link("relay", "bob"));
        say(&mut net, "relay", "bob", &message);
        assert_eq!(state(&net, "bob"), before, "{part} of {parts}");
    }
    for stream in [
        end_to_end("alice", "bob"),
        end_to_end("bob", "alice"),
        link("alice", "relay"),
    ] {
        say(&mut net, "relay", "bob", &said(0, 2, stream.clone()));
        assert_eq!(state(&net, "bob"), before, "{stream}");
    }
}

#[test]
fn a_hash_key_is_rotated_and_hops_under_the_one_before_are_still_taken() {
    let mut net = three();
    net.heard = Some(Vec::new());
    net.faults.overtake = 3;
    net.run(60);
    assert_eq!(net.stock("alice", "bob"), 4096);
    let mut keys = std::collections::BTreeSet::new();
    for (from, to, bytes) in net.heard.take().unwrap() {
        if let Some(Message::Relay(hop)) = Message::decode(&bytes)
            && (from, to) == (node("alice"), node("relay"))
        {
            let header: RelayHeader = postcard::from_bytes(&hop.header).unwrap();
            keys.insert(header.hash_key);
        }
    }
    assert!(keys.len() > 1, "{} hash keys", keys.len());
    assert!(net.nodes[&node("relay")].alarms.is_empty());
    net.check_books();
}

#[test]
fn keys_that_nobody_fetches_make_room_for_later_ones() {
    let mut net = two();
    let keys: Vec<_> = (0..3)
        .flat_map(|_| net.supply("alice", "bob", 100, 64).unwrap())
        .collect();
    net.run(2);
    let status = net.kma("bob").status();
    assert_eq!(
        (status.waiting_bindings, status.forgotten_bindings),
        (256, 44)
    );
    let gone = net.fetch("bob", "alice", &[keys[43].key_id]);
    assert_eq!(gone.unwrap_err(), crate::SupplyError::UnknownKeyId);
    let kept = net.fetch("bob", "alice", &[keys[44].key_id]).unwrap();
    assert!(kept[0].key.ct_eq(&keys[44].key));
    net.run(20);
    net.check_books();
}

#[test]
fn hops_whose_header_cannot_be_burn_nothing_and_open_no_row() {
    let mut net = three();
    let hop = take(&mut net, |from, _, message| match message {
        Message::Relay(hop) if from == "alice" => Some(hop),
        _ => None,
    });
    let header: RelayHeader = postcard::from_bytes(&hop.header).unwrap();
    let before = state(&net, "relay");
    let span = header.pad[0];
    let with = |change: &dyn Fn(&mut RelayHeader)| {
        let mut header = header.clone();
        change(&mut header);
        let header = postcard::to_allocvec(&header).unwrap();
        Message::Relay(SealedHop {
            header,
            ..hop.clone()
        })
    };
    let bad: [&dyn Fn(&mut RelayHeader); 12] = [
        &|h| h.sequence = u64::MAX,
        &|h| h.segment = SegmentNumber(u64::MAX),
        &|h| h.pad.clear(),
        &|h| {
            h.pad.push(KeySpan {
                len_bytes: 0,
                ..span
            })
        },
        &|h| h.pad[0].len_bytes = u32::MAX,
        &|h| h.pad[0].offset_bytes = u32::MAX,
        &|h| h.pad[0].segment = SegmentNumber(u64::MAX),
        &|h| h.mask.clear(),
        &|h| h.mask = vec![span; 3],
        &|h| h.hash_key.clear(),
        &|h| h.hash_key = h.mask.clone(),
        &|h| {
            h.pad = (0..9000)
                .map(|at| KeySpan {
                    offset_bytes: at,
                    len_bytes: 1,
                    ..span
                })
                .collect()
        },
    ];
    for (at, change) in bad.iter().enumerate() {
        say(&mut net, "alice", "relay", &with(change));
        assert_eq!(state(&net, "relay"), before, "{at}");
    }
    for header in [vec![], vec![0xff; 300]] {
        say(
            &mut net,
            "alice",
            "relay",
            &Message::Relay(SealedHop {
                header,
                ..hop.clone()
            }),
        );
        assert_eq!(state(&net, "relay"), before);
    }
    say(&mut net, "alice", "relay", &Message::Relay(hop));
    assert_ne!(state(&net, "relay"), before);
}

#[test]
fn a_unit_from_a_source_that_cannot_be_asked_is_sent_back() {
    let mut net = three();
    net.disconnect(&node("alice"), &node("bob"));
    net.run(5);
    net.connect(&node("alice"), &node("bob"));
    // Bob loses sight of alice while a unit is between them.
    let hop = take(&mut net, |from, to, message| match message {
        Message::Relay(hop) if (from, to) == ("relay", "bob") => Some(hop),
        _ => None,
    });
    net.disconnect(&node("alice"), &node("bob"));
    say(&mut net, "relay", "bob", &Message::Relay(hop));
    assert!(
        net.kma("bob")
            .store()
            .stream(&end_to_end("alice", "bob"))
            .is_none()
    );
    net.run(5);
    let stream = end_to_end("alice", "bob");
    let proposed = &net.kma("alice").store().stream(&stream).unwrap().proposed;
    assert!(proposed.is_empty(), "alice heard of it over the relay");
}
