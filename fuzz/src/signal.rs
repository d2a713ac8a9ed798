//! The signalling header and the messages of Ck, at both ends, strict and not.
//!
//! - Ten bytes are a header that encodes to them.
//! - A message that is taken has the sender and the code that it should; with strict codes, no
//!   private one. It encodes again, and that is taken as the same message (routes apart, whose ends
//!   may be named twice).
//! - A key manager and a controller that hear anything at all answer, refuse or end the connection;
//!   what they say in turn is a message that the other end can read.
//! - A route that the key manager believes begins at a neighbour and visits nobody twice.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use qkd_control::{
    Client, ClientConfig, ClientEvent, Controller, Destination, LinkReport, LinkState, Message,
    NetworkLink, Session, Topology,
    messages::{COMMANDS, End, receive},
};
use qkd_keyfile::{
    Entropy, Mono, NodeId, Now, Protocol, UnixTime,
    signal::{HEADER_BYTES, Header, VERSION, encode_message},
};

use super::input::Input;

/// See the module.
pub fn run(input: &[u8]) {
    if let Some(head) = input.first_chunk::<HEADER_BYTES>() {
        assert_eq!(Header::decode(head).encode(), *head);
    }
    check(input);
    let mut input = Input::new(input);
    let mut pair = Pair::new(input.byte() & 1 == 1);
    while !input.is_empty() {
        pair.step(&mut input);
    }
}

fn check(bytes: &[u8]) {
    for sender in [End::Km, End::Controller] {
        let loose = receive(bytes, sender, false);
        let strict = receive(bytes, sender, true);
        let Ok(received) = loose else {
            assert!(strict.is_err());
            continue;
        };
        assert_eq!(received.command.sender(), sender);
        assert_eq!(strict.is_err(), received.command.is_private());
        let Ok(message) = received.content else {
            continue;
        };
        assert_eq!(message.command(), received.command);
        let Ok(again) = message.encode(received.message_id) else {
            continue;
        };
        let again = receive(&again, sender, false).unwrap();
        assert_eq!(again.message_id, received.message_id);
        let again = again.content.unwrap();
        if !matches!(message, Message::RelayRequest { .. }) {
            assert_eq!(again, message);
        }
    }
}

struct Pair {
    km: Client,
    session: Session,
    strict: bool,
    now: Now,
    /// Header of the last message that each end said.
    last: [Option<Header>; 2],
}

impl Pair {
    fn new(strict: bool) -> Self {
        let config = ClientConfig {
            strict,
            ..ClientConfig::new(node("a"), neighbours())
        };
        let mut km = Client::new(config, 7);
        let now = Now {
            mono: Mono::default(),
            unix: UnixTime(0),
        };
        km.connected(now);
        let session = controller(strict).session(node("a"));
        Self {
            km,
            session,
            strict,
            now,
            last: [None; 2],
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 6 {
            0 => {
                let destination =
                    Destination::Node(node(["b", "d", "x"][usize::from(input.byte() % 3)]));
                let _ = self.km.ask_route(self.now, destination);
            }
            1 => {
                let destination = Destination::App("video".parse().unwrap());
                let _ = self.km.ask_next_hops(self.now, None, destination);
            }
            2 => {
                let report = LinkReport {
                    peer: node("b"),
                    outgoing_bits: input.u64(),
                    incoming_bits: input.u64(),
                    key_rate_bits_per_second: input.u64(),
                    state: if input.byte() & 1 == 0 {
                        LinkState::Up
                    } else {
                        LinkState::Down
                    },
                };
                self.km.report_status(self.now, vec![report]);
            }
            3 => {
                let seconds = std::time::Duration::from_secs(u64::from(input.byte()));
                self.now.mono = self.now.mono.after(seconds);
                self.km.handle_timeout(self.now);
                self.session.handle_timeout(self.now);
            }
            4 => {
                // Any message, to either end, perhaps as the answer to its last question.
                let (to_km, code) = (input.byte() & 1 == 1, input.byte());
                let command = COMMANDS[usize::from(code) % COMMANDS.len()].code();
                let asked = self.last[usize::from(!to_km)].map_or(1, |header| header.message_id);
                let id = asked.wrapping_add(u32::from(input.byte() / 64));
                let message = encode_message(id, command, input.long()).unwrap();
                self.tell(to_km, &message);
            }
            _ => {
                let to_km = input.byte() & 1 == 1;
                let bytes = input.long().to_vec();
                self.tell(to_km, &bytes);
            }
        }
        self.carry();
    }

    /// An end that ends the connection for what it heard is connected anew.
    fn tell(&mut self, to_km: bool, message: &[u8]) {
        if to_km {
            if self.km.receive(self.now, message).is_err() {
                self.km.connection_lost();
                self.km.connected(self.now);
            }
        } else {
            let _ = self.session.receive(self.now, message);
        }
        while let Some(event) = self.km.poll_event() {
            if let ClientEvent::Route {
                destination,
                transit,
                query,
            } = event
            {
                let first = transit.first().unwrap_or(&destination);
                assert!(neighbours().contains(first));
                let all: BTreeSet<_> = transit.iter().chain([&destination]).collect();
                assert!(all.len() == transit.len() + 1 && !all.contains(&node("a")));
                self.km.relay_ended(query, Ok(()));
            }
        }
    }

    /// Carries what both say, for a while: an answer is not answered, so they come to rest.
    fn carry(&mut self) {
        for _ in 0..10_000 {
            if let Some(message) = self.km.poll_transmit(self.now) {
                self.heard(&message, End::Km);
                self.tell(false, &message);
            } else if let Some(message) = self.session.poll_transmit(self.now) {
                self.heard(&message, End::Controller);
                self.tell(true, &message);
            } else {
                return;
            }
        }
        panic!("messages without end");
    }

    fn heard(&mut self, message: &[u8], sender: End) {
        let received = receive(message, sender, self.strict).unwrap();
        assert!(received.content.is_ok(), "{received:?}");
        let header = Header::decode(message.first_chunk().unwrap());
        assert_eq!(header.version, VERSION);
        self.last[usize::from(sender == End::Controller)] = Some(header);
    }
}

fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

fn neighbours() -> BTreeSet<NodeId> {
    ["b", "e"].map(node).into()
}

/// a - b - c - d in a row, a - e - d around it; the application "video" at d.
fn controller(strict: bool) -> Arc<Controller> {
    let links = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "e"), ("e", "d")];
    let links = links.map(|(a, b)| NetworkLink {
        a: node(a),
        b: node(b),
        weight: 1,
    });
    let apps: BTreeMap<_, _> = [("video".parse().unwrap(), node("d"))].into();
    let topology = Topology::new(links.into(), apps, 1000).unwrap();
    Controller::new(topology, Box::new(Counting(0)), strict)
}

struct Counting(u8);

impl Entropy for Counting {
    fn fill(&mut self, out: &mut [u8]) {
        self.0 = self.0.wrapping_add(1);
        out.fill(self.0);
    }
}
