//! A key manager and a controller in one loop, with a time that we set.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use qkd_control::{
    AlarmReport, AskError, Client, ClientConfig, ClientEvent, Controller, Destination, LinkReport,
    LinkState, Message, NetworkLink, RouteFailure, Session, Topology,
    client::{BadRoute, QueryId},
    messages::{Fault, SUCCESS},
};
use qkd_keyfile::{Entropy, Mono, NodeId, Now, Protocol, UnixTime, signal};

fn node(id: &str) -> NodeId {
    id.parse().unwrap()
}

fn to(id: &str) -> Destination {
    Destination::Node(node(id))
}

fn at(seconds: u64) -> Now {
    Now {
        mono: Mono(Duration::from_secs(seconds)),
        unix: UnixTime(0),
    }
}

/// Bytes that count up, so that every ID is another one.
struct Counting(u8);

impl Entropy for Counting {
    fn fill(&mut self, out: &mut [u8]) {
        self.0 = self.0.wrapping_add(1);
        out.fill(self.0);
    }
}

/// a - b - c - d in a row, a - e - d around it; the application "video" at d, "lonely" has no route.
fn controller(strict: bool) -> Arc<Controller> {
    let links = [
        ("a", "b", 1),
        ("b", "c", 1),
        ("c", "d", 1),
        ("a", "e", 2),
        ("e", "d", 2),
        ("x", "y", 1),
    ];
    let links = links.map(|(a, b, weight)| NetworkLink {
        a: node(a),
        b: node(b),
        weight,
    });
    let apps = [("video", "d"), ("lonely", "x"), ("own", "a")];
    let apps: BTreeMap<_, _> = apps
        .map(|(app, at)| (app.parse().unwrap(), node(at)))
        .into();
    let topology = Topology::new(links.into(), apps, 1000).unwrap();
    Controller::new(topology, Box::new(Counting(0)), strict)
}

struct Pair {
    controller: Arc<Controller>,
    km: Client,
    session: Session,
    now: Now,
}

impl Pair {
    fn new(strict: bool) -> Self {
        let neighbours = ["b", "e"].map(node).into();
        let config = ClientConfig {
            strict,
            ..ClientConfig::new(node("a"), neighbours)
        };
        let controller = controller(strict);
        let session = controller.session(node("a"));
        let mut km = Client::new(config, u32::MAX);
        km.connected(at(0));
        Self {
            controller,
            km,
            session,
            now: at(0),
        }
    }

    /// Carries every message to the other end until both are quiet.
    fn drive(&mut self) {
        loop {
            if let Some(message) = self.km.poll_transmit(self.now) {
                self.session.receive(self.now, &message).unwrap();
            } else if let Some(message) = self.session.poll_transmit(self.now) {
                self.km.receive(self.now, &message).unwrap();
            } else {
                return;
            }
        }
    }

    fn event(&mut self) -> ClientEvent {
        self.drive();
        self.km.poll_event().unwrap()
    }

    fn ask_route(&mut self, destination: Destination) -> QueryId {
        self.km.ask_route(self.now, destination).unwrap()
    }

    /// The controller says `message` as the answer to the question that is on its way.
    fn answer(&mut self, message: &Message) {
        let asked = self.km.poll_transmit(self.now).unwrap();
        self.km
            .receive(self.now, &message.encode(id_of(&asked)).unwrap())
            .unwrap();
    }
}

fn id_of(message: &[u8]) -> u32 {
    u32::from_be_bytes(message[2..6].try_into().unwrap())
}

fn failure(event: ClientEvent) -> RouteFailure {
    match event {
        ClientEvent::Failed { failure, .. } => failure,
        other => panic!("{other:?}"),
    }
}

fn refused(reason: &str) -> RouteFailure {
    RouteFailure::Refused {
        reason: reason.to_owned(),
    }
}

#[test]
fn a_whole_route_is_asked_told_and_answered() {
    let mut pair = Pair::new(true);
    let query = pair.ask_route(Destination::App("video".parse().unwrap()));
    let transit = vec![node("b"), node("c")];
    assert_eq!(
        pair.event(),
        ClientEvent::Route {
            query,
            destination: node("d"),
            transit
        }
    );
    pair.km.relay_ended(query, Ok(()));
    pair.km.relay_ended(query, Ok(()));
    pair.drive();
    let second = pair.ask_route(to("b"));
    let neighbour = ClientEvent::Route {
        query: second,
        destination: node("b"),
        transit: vec![],
    };
    assert_eq!(pair.event(), neighbour);
    pair.km.relay_ended(second, Err("no pad"));
    pair.drive();
    let counters = pair.controller.counters();
    assert_eq!(
        (
            counters.routes,
            counters.relays_done,
            counters.relays_failed
        ),
        (2, 1, 1)
    );
    assert_eq!(counters.unknown_results, 0);
}

#[test]
fn the_request_id_is_a_uuid_and_comes_back() {
    let mut pair = Pair::new(true);
    let query = pair.ask_route(to("d"));
    let asked = pair.km.poll_transmit(pair.now).unwrap();
    assert_eq!(
        id_of(&asked),
        0x7fff_ffff,
        "a key manager's ID has no top bit"
    );
    pair.session.receive(pair.now, &asked).unwrap();
    let order = pair.session.poll_transmit(pair.now).unwrap();
    assert_eq!(id_of(&order), id_of(&asked));
    assert_eq!(order[6..8], [0, 4]);
    let text = std::str::from_utf8(&order[10..]).unwrap();
    let uuid = "\"key_relay_request_id\":\"01010101-0101-4101-8101-010101010101\"";
    assert!(text.contains(uuid), "{text}");
    pair.km.receive(pair.now, &order).unwrap();
    pair.km.relay_ended(query, Ok(()));
    let result = pair.km.poll_transmit(pair.now).unwrap();
    assert_eq!(id_of(&result), id_of(&asked));
    assert!(std::str::from_utf8(&result[10..]).unwrap().contains(uuid));
}

#[test]
fn next_hops_are_told_hop_by_hop() {
    let mut pair = Pair::new(true);
    let video = Destination::App("video".parse().unwrap());
    let query = pair
        .km
        .ask_next_hops(pair.now, Some(node("a")), video)
        .unwrap();
    let expected = ClientEvent::NextHops {
        query,
        destination: Some(node("d")),
        next: vec![node("b"), node("e")],
    };
    assert_eq!(pair.event(), expected);
    assert_eq!(pair.controller.counters().next_hops, 1);
}

#[test]
fn no_route_is_said_with_a_reason() {
    let mut pair = Pair::new(true);
    let app = |name: &str| Destination::App(name.parse().unwrap());
    let cases = [
        (to("x"), "no-route"),
        (app("lonely"), "no-route"),
        (app("own"), "no-route"),
        (to("a"), "no-route"),
        (to("nowhere"), "unknown-destination"),
        (app("unknown"), "unknown-destination"),
    ];
    for (destination, reason) in cases {
        pair.ask_route(destination.clone());
        assert_eq!(failure(pair.event()), refused(reason), "{destination:?}");
        pair.km.ask_next_hops(pair.now, None, destination).unwrap();
        assert_eq!(failure(pair.event()), refused(reason));
    }
    assert_eq!(pair.controller.counters().no_routes, 12);
}

#[test]
fn answers_are_paired_by_message_id_in_any_order() {
    let mut pair = Pair::new(true);
    let first = pair.ask_route(to("d"));
    let second = pair.ask_route(to("c"));
    let asked: Vec<_> = std::iter::from_fn(|| pair.km.poll_transmit(pair.now)).collect();
    for message in asked.iter().rev() {
        pair.session.receive(pair.now, message).unwrap();
    }
    for (expected, end) in [(second, "c"), (first, "d")] {
        let answer = pair.session.poll_transmit(pair.now).unwrap();
        pair.km.receive(pair.now, &answer).unwrap();
        let ClientEvent::Route {
            query, destination, ..
        } = pair.km.poll_event().unwrap()
        else {
            panic!("no route");
        };
        assert_eq!((query, destination), (expected, node(end)));
    }
}

#[test]
fn a_question_times_out_after_ten_seconds_and_its_late_answer_is_refused() {
    let mut pair = Pair::new(true);
    let query = pair.ask_route(to("d"));
    let asked = pair.km.poll_transmit(pair.now).unwrap();
    assert_eq!(pair.km.poll_timeout(), Some(at(10).mono));
    pair.km.handle_timeout(at(9));
    assert_eq!(pair.km.poll_event(), None);
    pair.km.handle_timeout(at(10));
    let failure = RouteFailure::TimedOut;
    assert_eq!(
        pair.km.poll_event(),
        Some(ClientEvent::Failed { query, failure })
    );
    assert_eq!(pair.km.poll_event(), Some(ClientEvent::Unresponsive));
    assert_eq!(pair.km.poll_timeout(), None);

    pair.session.receive(pair.now, &asked).unwrap();
    pair.drive();
    assert_eq!(pair.km.poll_event(), None);
    assert_eq!(
        pair.controller.counters().relays_failed,
        1,
        "the controller knows it too"
    );
}

#[test]
fn reports_and_alarms_change_the_route() {
    let mut pair = Pair::new(false);
    let report = LinkReport {
        peer: node("b"),
        outgoing_bits: 0,
        incoming_bits: 0,
        key_rate_bits_per_second: 0,
        state: LinkState::Up,
    };
    let full = LinkReport {
        outgoing_bits: 5000,
        ..report.clone()
    };
    let alarm = AlarmReport {
        peer: node("b"),
        raised: true,
        text: "QBER 0.12".to_owned(),
    };
    let over = AlarmReport {
        raised: false,
        ..alarm.clone()
    };
    let direct = vec![node("b"), node("c")];
    let around = vec![node("e")];
    let transit = |pair: &mut Pair| {
        pair.ask_route(to("d"));
        match pair.event() {
            ClientEvent::Route { transit, .. } => transit,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(transit(&mut pair), direct);
    pair.km.report_status(pair.now, vec![report]);
    assert_eq!(transit(&mut pair), around);
    pair.km.report_status(pair.now, vec![full]);
    assert_eq!(transit(&mut pair), direct);
    pair.km.report_alarm(pair.now, alarm);
    assert_eq!(transit(&mut pair), around);
    pair.km.report_alarm(pair.now, over);
    assert_eq!(transit(&mut pair), direct);
    let counters = pair.controller.counters();
    assert_eq!((counters.status_reports, counters.alarms), (2, 2));
}

#[test]
fn many_links_are_reported_in_several_messages() {
    let mut pair = Pair::new(false);
    let links = (0..300).map(|i| LinkReport {
        peer: node(&format!("n{i}")),
        outgoing_bits: 1,
        incoming_bits: 1,
        key_rate_bits_per_second: 1,
        state: LinkState::Up,
    });
    pair.km.report_status(pair.now, links.collect());
    pair.drive();
    assert_eq!(pair.controller.counters().status_reports, 3);
    let refused = ClientEvent::ReportRefused {
        reason: "unknown-link".to_owned(),
    };
    assert_eq!(pair.event(), refused);
}

#[test]
fn the_last_reports_go_out_again_on_the_next_connection() {
    let mut pair = Pair::new(false);
    pair.km.connection_lost();
    let alarm = AlarmReport {
        peer: node("b"),
        raised: true,
        text: "fibre cut".to_owned(),
    };
    pair.km.report_alarm(pair.now, alarm);
    let down = LinkReport {
        peer: node("e"),
        outgoing_bits: 1,
        incoming_bits: 1,
        key_rate_bits_per_second: 1,
        state: LinkState::Down,
    };
    pair.km.report_status(pair.now, vec![down]);
    assert_eq!(pair.km.poll_transmit(pair.now), None);
    assert_eq!(
        pair.km.ask_route(pair.now, to("d")),
        Err(AskError::NotConnected)
    );
    pair.km.connected(pair.now);
    pair.ask_route(to("d"));
    assert_eq!(failure(pair.event()), refused("no-route"));
}

#[test]
fn strict_mode_has_no_private_codes() {
    let mut pair = Pair::new(true);
    let alarm = AlarmReport {
        peer: node("b"),
        raised: true,
        text: "alarm".to_owned(),
    };
    pair.km.report_alarm(pair.now, alarm.clone());
    assert_eq!(pair.km.poll_transmit(pair.now), None);
    let private = Message::AlarmReport(alarm).encode(1).unwrap();
    let fault = pair.session.receive(pair.now, &private);
    assert_eq!(fault, Err(Fault::UnknownCommand { code: 0x8003 }));
}

#[test]
fn a_lost_connection_fails_what_is_open() {
    let mut pair = Pair::new(true);
    let query = pair.ask_route(to("d"));
    pair.km.connection_lost();
    let failure = RouteFailure::Lost;
    assert_eq!(
        pair.km.poll_event(),
        Some(ClientEvent::Failed { query, failure })
    );
    assert_eq!(pair.km.poll_transmit(pair.now), None);
}

#[test]
fn questions_are_bounded() {
    let mut pair = Pair::new(true);
    for _ in 0..1024 {
        pair.ask_route(to("d"));
    }
    assert_eq!(pair.km.ask_route(pair.now, to("d")), Err(AskError::Busy));
    pair.drive();
    let events = std::iter::from_fn(|| pair.km.poll_event());
    assert_eq!(
        events
            .filter(|e| matches!(e, ClientEvent::Route { .. }))
            .count(),
        1024
    );
}

#[test]
fn a_route_that_must_not_be_taken_is_not() {
    let order = |destination: &str, transit: &[&str]| Message::RelayRequest {
        source: Some(node("a")),
        destination: node(destination),
        transit: transit.iter().map(|id| node(id)).collect(),
        request_id: Some("r1".parse().unwrap()),
        error: None,
    };
    let long: Vec<String> = (0..17).map(|i| format!("n{i}")).collect();
    let long: Vec<&str> = long.iter().map(String::as_str).collect();
    let cases = [
        (order("c", &["b"]), BadRoute::WrongEnd { node: node("c") }),
        (
            order("d", &["c"]),
            BadRoute::NoNeighbour { node: node("c") },
        ),
        (order("d", &[]), BadRoute::NoNeighbour { node: node("d") }),
        (
            order("d", &["b", "c", "b"]),
            BadRoute::Repeats { node: node("b") },
        ),
        (
            order("d", &["b", "a", "c"]),
            BadRoute::Repeats { node: node("a") },
        ),
        (
            order("d", &["b", "d", "c"]),
            BadRoute::Repeats { node: node("d") },
        ),
        (order("d", &long), BadRoute::TooLong { transit: 17 }),
    ];
    for (order, bad) in cases {
        let mut pair = Pair::new(true);
        pair.ask_route(to("d"));
        pair.answer(&order);
        let event = pair.km.poll_event().unwrap();
        assert_eq!(failure(event), RouteFailure::Unacceptable(bad));
        let result = pair.km.poll_transmit(pair.now).unwrap();
        assert_eq!(result[6..8], [0, 5]);
        assert!(
            !std::str::from_utf8(&result[10..])
                .unwrap()
                .contains(SUCCESS)
        );
    }
}

#[test]
fn next_hops_that_are_no_neighbours_are_left_out() {
    let mut pair = Pair::new(true);
    let hops = |next: &[&str], destination: Option<&str>| Message::NextHopResponse {
        source: None,
        destination: destination.map(node),
        next: next.iter().map(|id| node(id)).collect(),
        error: None,
    };
    let query = pair.km.ask_next_hops(pair.now, None, to("d")).unwrap();
    pair.answer(&hops(&["z", "e", "e", "b"], None));
    let next = vec![node("e"), node("b")];
    let expected = ClientEvent::NextHops {
        query,
        destination: None,
        next,
    };
    assert_eq!(pair.km.poll_event(), Some(expected));

    pair.km.ask_next_hops(pair.now, None, to("d")).unwrap();
    pair.answer(&hops(&["z"], None));
    let bad = BadRoute::NoNeighbour { node: node("z") };
    let event = pair.km.poll_event().unwrap();
    assert_eq!(failure(event), RouteFailure::Unacceptable(bad));

    // Whoever asks for an application must be told its node.
    let video = Destination::App("video".parse().unwrap());
    pair.km.ask_next_hops(pair.now, None, video).unwrap();
    pair.answer(&hops(&["b"], None));
    assert_eq!(
        failure(pair.km.poll_event().unwrap()),
        RouteFailure::Malformed
    );
}

#[test]
fn an_order_that_nobody_asked_for_is_declined() {
    let mut pair = Pair::new(true);
    let order = Message::RelayRequest {
        source: Some(node("a")),
        destination: node("b"),
        transit: vec![],
        request_id: Some("r1".parse().unwrap()),
        error: None,
    };
    pair.km
        .receive(pair.now, &order.encode(1 << 31).unwrap())
        .unwrap();
    assert_eq!(pair.km.poll_event(), None);
    let result = pair.km.poll_transmit(pair.now).unwrap();
    let text = std::str::from_utf8(&result[10..]).unwrap();
    assert!(
        text.contains("unknown-request") && text.contains("\"r1\""),
        "{text}"
    );
    assert_eq!(id_of(&result), 1 << 31);
}

#[test]
fn an_answer_of_another_kind_answers_nothing() {
    let mut pair = Pair::new(true);
    pair.ask_route(to("d"));
    let hops = Message::NextHopResponse {
        source: None,
        destination: None,
        next: vec![node("b")],
        error: None,
    };
    pair.answer(&hops);
    assert_eq!(pair.km.poll_event(), None);
    assert!(pair.km.poll_timeout().is_some());
}

#[test]
fn bad_requests_are_answered_and_bad_answers_fail_their_question() {
    let mut pair = Pair::new(false);
    for code in [0x0001_u16, 0x0003, 0x8001, 0x8003] {
        let bad = signal::encode_message(77, code, b"{\"x\":").unwrap();
        pair.session.receive(pair.now, &bad).unwrap();
        let answer = pair.session.poll_transmit(pair.now).unwrap();
        assert_eq!(id_of(&answer), 77);
        assert!(
            std::str::from_utf8(&answer[10..])
                .unwrap()
                .contains("malformed JSON")
        );
    }
    let bad_result = signal::encode_message(78, 0x0005, b"{}").unwrap();
    pair.session.receive(pair.now, &bad_result).unwrap();
    assert_eq!(pair.session.poll_transmit(pair.now), None);
    assert_eq!(pair.controller.counters().refused, 5);

    pair.ask_route(to("d"));
    let asked = pair.km.poll_transmit(pair.now).unwrap();
    let bad = signal::encode_message(id_of(&asked), 0x0004, b"{}").unwrap();
    pair.km.receive(pair.now, &bad).unwrap();
    assert_eq!(
        failure(pair.km.poll_event().unwrap()),
        RouteFailure::Malformed
    );
}

#[test]
fn a_route_that_begins_elsewhere_is_not_told() {
    let mut pair = Pair::new(true);
    let message = Message::NotifyRelayRequest {
        source: Some(node("b")),
        destination: to("d"),
    };
    pair.session
        .receive(pair.now, &message.encode(1).unwrap())
        .unwrap();
    let answer = pair.session.poll_transmit(pair.now).unwrap();
    assert!(
        std::str::from_utf8(&answer[10..])
            .unwrap()
            .contains("not-the-source")
    );
}

#[test]
fn results_that_nobody_waits_for_are_counted() {
    let mut pair = Pair::new(true);
    let result = Message::RelayResponse {
        response: SUCCESS.to_owned(),
        request_id: None,
    };
    pair.session
        .receive(pair.now, &result.encode(5).unwrap())
        .unwrap();
    assert_eq!(pair.controller.counters().unknown_results, 1);
    // Without a request ID the message ID pairs it.
    pair.ask_route(to("d"));
    let asked = pair.km.poll_transmit(pair.now).unwrap();
    pair.session.receive(pair.now, &asked).unwrap();
    pair.session
        .receive(pair.now, &result.encode(id_of(&asked)).unwrap())
        .unwrap();
    assert_eq!(pair.controller.counters().relays_done, 1);
}
