//! Cessions that are lost, come twice or late, or that nobody may make.

use qkd_keyfile::{KeySpan, SegmentNumber, StreamId, metadata::KeyType};

use crate::{
    Alarm,
    common::{Network, chain, check_ledgers, node},
    hostile::{end_to_end, link, run_without, say, state, take},
    record::Purpose,
    wire::Message,
};

/// Alice and bob, with 16 segments each.
fn rich() -> Network {
    let mut net = Network::new(chain(&["alice", "bob"], 0), 61);
    net.start_all();
    for id in 0..32 {
        net.deliver_both("alice", "bob", id, 544);
    }
    net.run(20);
    net
}

/// Segments that a node owns, untouched or not.
fn owned(net: &Network, at: &str) -> Vec<SegmentNumber> {
    let stream = net.kma(at).store().stream(&link("alice", "bob")).unwrap();
    let segments = stream.segments.iter();
    let ours = segments.filter(|(_, s)| s.key_type == KeyType::Encrypting);
    ours.map(|(number, _)| *number).collect()
}

/// Alice asks for more than she has; the message in which she asks bob.
fn ask(net: &mut Network) -> Message {
    assert!(net.supply("alice", "bob", 500, 256).is_err());
    take(net, |from, _, message| {
        (from == "alice" && matches!(message, Message::Want { .. })).then_some(message)
    })
}

fn cessions(net: &mut Network) -> Message {
    take(net, |from, _, message| {
        (from == "bob" && matches!(message, Message::Cessions { .. })).then_some(message)
    })
}

#[test]
fn a_segment_whose_cession_is_on_its_way_belongs_to_nobody_and_arrives_over_any_restart() {
    for victims in [&["bob"][..], &["alice"], &["alice", "bob"]] {
        let mut net = rich();
        let lost = |message: &Message| matches!(message, Message::Cessions { .. });
        let want = ask(&mut net);
        say(&mut net, "alice", "bob", &want);
        let (alice, bob) = (owned(&net, "alice"), owned(&net, "bob"));
        assert!(bob.len() < 16, "bob has ceded");
        run_without(&mut net, 20, lost);
        for victim in victims {
            net.crash(&node(victim));
            net.start(&node(victim));
            run_without(&mut net, 20, lost);
        }
        assert_eq!(owned(&net, "alice"), alice);
        assert_eq!(owned(&net, "bob"), bob, "nothing goes back");
        net.run(30);
        let alice = owned(&net, "alice");
        assert!(alice.len() + bob.len() == 32, "{victims:?}");
        assert!(
            net.kma("bob").store().state().peers[&node("alice")]
                .ceded
                .is_empty()
        );
        check_ledgers(&net, &["alice", "bob"]);
        assert!(net.nodes.values().all(|node| node.alarms.is_empty()));
    }
}

#[test]
fn questions_and_cessions_that_come_again_and_late_move_nothing() {
    let mut net = rich();
    let want = ask(&mut net);
    say(&mut net, "alice", "bob", &want);
    let given = cessions(&mut net);
    // Before it is known whether the first answer has come.
    let before = state(&net, "bob");
    say(&mut net, "alice", "bob", &want);
    assert_eq!(state(&net, "bob"), before);
    say(&mut net, "bob", "alice", &given);
    net.run(20);
    // A question from before the cession is of no use.
    let before = ["alice", "bob"].map(|end| state(&net, end));
    say(&mut net, "alice", "bob", &want);
    say(&mut net, "bob", "alice", &given);
    assert_eq!(["alice", "bob"].map(|end| state(&net, end)), before);
    // Not even when the segments have gone back.
    let Message::Cessions { first: 0, segments } = &given else {
        panic!("{given:?}");
    };
    let back = Message::Cessions {
        first: 0,
        segments: segments.clone(),
    };
    for (stream, segment) in segments {
        let store = &mut net.nodes.get_mut(&node("alice")).unwrap().kma;
        let store = store.as_mut().unwrap().store_mut();
        store.cede(&node("bob"), stream, *segment);
    }
    say(&mut net, "alice", "bob", &back);
    let alice = owned(&net, "alice");
    say(&mut net, "bob", "alice", &given);
    assert_eq!(owned(&net, "alice"), alice);
    assert_eq!(owned(&net, "bob").len() + alice.len(), 32);
    net.run(20);
    check_ledgers(&net, &["alice", "bob"]);
    assert!(net.nodes.values().all(|node| node.alarms.is_empty()));
}

#[test]
fn a_segment_that_is_not_the_senders_to_give_or_not_whole_is_not_taken_over() {
    let mut net = rich();
    net.supply("bob", "alice", 1, 256).unwrap();
    net.run(20);
    let bobs = owned(&net, "bob");
    let cases = [
        // Alice's own; one that bob has begun to use; one that does not exist; of other streams.
        (link("alice", "bob"), owned(&net, "alice")[0]),
        (link("alice", "bob"), bobs[0]),
        (link("alice", "bob"), SegmentNumber(999)),
        (link("bob", "carol"), bobs[3]),
        (end_to_end("bob", "alice"), bobs[3]),
    ];
    let before = state(&net, "alice");
    for (stream, segment) in cases {
        let segments: Vec<(StreamId, SegmentNumber)> = vec![(stream.clone(), segment)];
        say(
            &mut net,
            "bob",
            "alice",
            &Message::Cessions { first: 0, segments },
        );
        assert_eq!(state(&net, "alice"), before, "{stream} {segment}");
        let alarms = std::mem::take(&mut net.nodes.get_mut(&node("alice")).unwrap().alarms);
        assert_eq!(
            alarms,
            [Alarm::PadMisuse { peer: node("bob") }],
            "{stream} {segment}"
        );
    }
    // Out of sequence; acknowledged without having been ceded.
    for first in [1, u64::MAX] {
        let segments = vec![(link("alice", "bob"), bobs[3])];
        say(
            &mut net,
            "bob",
            "alice",
            &Message::Cessions { first, segments },
        );
    }
    for next in [0, 1, u64::MAX] {
        say(&mut net, "bob", "alice", &Message::CessionsTaken { next });
    }
    assert_eq!(state(&net, "alice"), before);
    // However much is asked for, what bob uses and the floor stay with him, and what he began.
    let bytes = u64::MAX;
    for acquired in [1, u64::MAX] {
        say(&mut net, "alice", "bob", &Message::Want { acquired, bytes });
    }
    assert_eq!(owned(&net, "bob"), bobs);
    say(
        &mut net,
        "alice",
        "bob",
        &Message::Want { acquired: 0, bytes },
    );
    let left = net.link_stock("bob", "alice");
    assert!((64..16 * 512).contains(&left), "{left}");
}

#[test]
fn a_suspected_segment_that_changes_its_owner_is_burned_by_the_new_one() {
    let mut net = rich();
    let want = ask(&mut net);
    say(&mut net, "alice", "bob", &want);
    let given = cessions(&mut net);
    let Message::Cessions { segments, .. } = &given else {
        panic!("{given:?}");
    };
    let (stream, segment) = segments[0].clone();
    let alice = net.nodes.get_mut(&node("alice")).unwrap();
    let store = alice.kma.as_mut().unwrap().store_mut();
    assert!(store.suspect(&stream, segment));
    say(&mut net, "bob", "alice", &given);
    net.run(40);
    for end in ["alice", "bob"] {
        let store = net.kma(end).store();
        assert!(store.segment(&stream, segment).is_none(), "{end}");
    }
    net.check_books();
    check_ledgers(&net, &["alice", "bob"]);
}

#[test]
fn what_the_other_end_used_it_has_acquired_whatever_became_of_its_acknowledgement() {
    let mut net = rich();
    let want = ask(&mut net);
    say(&mut net, "alice", "bob", &want);
    let Message::Cessions { segments, .. } = cessions(&mut net) else {
        panic!("no cessions");
    };
    let bob = net.nodes.get_mut(&node("bob")).unwrap();
    let store = bob.kma.as_mut().unwrap().store_mut();
    let next = segments.len() as u64;
    assert_eq!(store.cessions_told(&node("alice")), (0, next));
    let (stream, segment) = segments[2].clone();
    let span = KeySpan {
        segment,
        offset_bytes: 32,
        len_bytes: 16,
    };
    store.follow(&stream, &[span], Purpose::Pad).unwrap();
    // A copy of alice's store from before would be told of three, and know of none.
    assert_eq!(store.cessions_told(&node("alice")), (3, next));
}
