//! Three whole key managers (or two) in one loop, whose messages are lost, repeated, damaged, forged
//! and said by the wrong one, while modules deliver, applications ask and nodes crash.
//!
//! - No message from a peer makes a key manager panic, or its store fail.
//! - The books of every stream balance after every step, and every journal record fits.
//! - By the ledger of each node, no byte of a segment is taken twice and none followed twice.
//! - Unless somebody altered or forged a message, a key ID stands for the same bytes at both ends,
//!   is fetched once per application, and nothing is called a forgery.
//! - Key memory comes back: none is held when all nodes are gone.
//! - Messages come to rest without time passing.
//!
//! An input is a shape (two nodes or three in a row, disks or memory) and steps; see [`Step`]. Peers
//! are real key managers, so that a message before its damage is a good one, tags and all.

mod node;
mod step;
mod wire;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use qkd_keyfile::{
    Entropy, Generation, KeyBits, KsaKeyId, Mono, Now, QkdKeyName, UnixTime,
    metadata::{QkdKeyMetadata, SecurityLevel},
};
use qkd_kma::{
    Alarm, Input as KmaInput, Output, SuppliedKey, SupplyByIdOrder, SupplyError, SupplyOrder,
};

use self::{
    node::{NAMES, Node, Random, app, name, pair, pool},
    step::Step,
};
use super::input::Input;

/// See the module.
pub fn run(input: &[u8]) {
    play(input);
}

/// What came of an input, so that a test can tell whether anything does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    /// Keys given to applications that asked for new ones.
    pub supplied: usize,
    /// Those of them that were fetched by ID at the other node.
    pub fetched: usize,
}

/// Runs an input.
pub fn play(input: &[u8]) -> Tally {
    let mut input = Input::new(input);
    let mut network = Network::new(input.byte());
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        network.step(&mut input);
        network.check_books();
    }
    network.finish();
    let tally = Tally {
        supplied: network.keys.len(),
        fetched: network.fetched.len(),
    };
    drop(network);
    assert_eq!(pool().stats().in_use_bytes, 0, "key memory is leaked");
    tally
}

/// So that an input takes milliseconds.
const MAX_STEPS: usize = 100;

/// A message on its way: from, to, bytes.
type Wire = (usize, usize, Vec<u8>);

/// What an order was for.
enum Asked {
    /// Keys that this node's application is to fetch.
    New { to: usize },
    /// The key of that index.
    ById(usize),
}

struct Network {
    nodes: Vec<Node>,
    now: Now,
    wires: VecDeque<Wire>,
    /// The last messages said, the newest first, for replays.
    said: VecDeque<Vec<u8>>,
    cut: BTreeSet<(usize, usize)>,
    /// Nobody has altered or forged a message.
    honest: bool,
    /// Keys given out, by ID: where they can be fetched, from whom, their bytes.
    keys: Vec<(KsaKeyId, usize, usize, Vec<u8>)>,
    /// Orders without an answer.
    asked: BTreeMap<u64, Asked>,
    fetched: BTreeSet<usize>,
    next_id: u64,
}

impl Network {
    fn new(shape: u8) -> Self {
        let names = &NAMES[..2 + usize::from(shape & 1)];
        let volatile = shape & 2 == 2;
        let nodes = (0..names.len()).map(|at| Node::new(names, at, volatile));
        let mut network = Self {
            nodes: nodes.collect(),
            now: Now {
                mono: Mono(Duration::from_secs(1)),
                unix: UnixTime(0),
            },
            wires: VecDeque::new(),
            said: VecDeque::new(),
            cut: BTreeSet::new(),
            honest: true,
            keys: Vec::new(),
            asked: BTreeMap::new(),
            fetched: BTreeSet::new(),
            next_id: 0,
        };
        for at in 0..names.len() {
            network.connect_all(at, at + 1..names.len());
        }
        network
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match Step::of(input.byte()) {
            Step::Deliver => {
                let next = self.wires.pop_front();
                self.deliver(next);
            }
            Step::Drain => self.drain(),
            Step::Wait => self.wait(1 + input.byte() % 8),
            Step::Lose => drop(self.wires.pop_front()),
            Step::Repeat => {
                let next = self.wires.pop_front();
                self.deliver(next.clone());
                self.deliver(next);
            }
            Step::Damage => self.damage(input),
            Step::Forge => {
                let (from, to) = self.two(input.byte());
                self.honest = false;
                self.deliver(Some((from, to, input.long().to_vec())));
            }
            Step::Tell => {
                let (from, to) = self.two(input.byte());
                let keys: Vec<KsaKeyId> = self.keys.iter().map(|key| key.0).collect();
                self.honest = false;
                self.deliver(Some((from, to, wire::message(input, &keys))));
            }
            Step::Replay => {
                let (from, to) = self.two(input.byte());
                let back = usize::from(input.byte());
                if let Some(bytes) = self.said.get(back).cloned() {
                    self.honest = false;
                    self.deliver(Some((from, to, bytes)));
                }
            }
            Step::Key => self.qkd_key(input, false),
            Step::OddKey => self.qkd_key(input, true),
            Step::Supply => self.supply(input),
            Step::Fetch => self.fetch(input),
            Step::Connection => self.connection(input.byte()),
            Step::Crash => self.crash(input.byte()),
        }
    }

    /// Lets all be said that is to be said, and looks at what came of it.
    fn finish(&mut self) {
        self.wait(8);
        self.check_books();
        for at in 0..self.nodes.len() {
            for key in 0..self.keys.len() {
                if self.keys[key].1 == at && !self.fetched.contains(&key) {
                    self.fetch_key(key);
                }
            }
        }
        self.wait(8);
        self.check_books();
        self.nodes.iter().for_each(Node::check_ledger);
    }

    fn damage(&mut self, input: &mut Input<'_>) {
        let Some((from, to, mut bytes)) = self.wires.pop_front() else {
            return;
        };
        for _ in 0..=input.byte() % 4 {
            let (at, value) = (usize::from(input.u16()), input.byte());
            let len = bytes.len().max(1);
            if let Some(byte) = bytes.get_mut(at % len) {
                *byte = value;
            }
        }
        match input.byte() {
            cut @ 1..64 => bytes.truncate(bytes.len().saturating_sub(usize::from(cut))),
            64..128 => bytes.extend_from_slice(input.short()),
            _ => {}
        }
        self.honest = false;
        self.deliver(Some((from, to, bytes)));
    }

    fn qkd_key(&mut self, input: &mut Input<'_>, odd: bool) {
        let (link, len) = (usize::from(input.byte()), usize::from(input.byte()));
        let a = link % (self.nodes.len() - 1);
        let len_bytes = (1 + len) * 16;
        self.next_id += 1;
        let name = QkdKeyName {
            module_pair: pair(a).parse().unwrap(),
            generation: Generation::default(),
            id: self.next_id.to_string().parse().unwrap(),
        };
        let mut key = vec![0; len_bytes];
        Random(self.next_id).fill(&mut key);
        let how = if odd { input.byte() % 3 } else { 3 };
        if how != 0 {
            self.hold(a, &name, key.clone());
        }
        if how == 2 {
            key[len_bytes / 2] ^= 1;
        }
        if how != 1 {
            self.hold(a + 1, &name, key);
        }
    }

    fn hold(&mut self, at: usize, name: &QkdKeyName, key: Vec<u8>) {
        let mut name = name.clone();
        name.generation = self.nodes[at].kma.store().generation(&name.module_pair);
        let key_bits = u32::try_from(key.len() * 8).unwrap();
        self.nodes[at].waiting.insert(name.clone(), key);
        self.input(
            at,
            KmaInput::Held {
                name: name.clone(),
                key_bits,
                metadata: QkdKeyMetadata::new(name.id.clone()),
            },
        );
    }

    fn supply(&mut self, input: &mut Input<'_>) {
        let (from, to) = self.two(input.byte());
        self.next_id += 1;
        let size = 8 * (1 + u32::from(input.byte() % 64));
        let order = SupplyOrder {
            order: self.next_id,
            master: app(from),
            destination: name(to),
            applications: vec![app(to)],
            number: u32::from(input.byte() % 5),
            size: KeyBits::try_from(size).unwrap(),
            level: SecurityLevel::Any,
        };
        self.asked.insert(order.order, Asked::New { to });
        self.input(from, KmaInput::Supply(order));
    }

    fn fetch(&mut self, input: &mut Input<'_>) {
        let which = usize::from(input.byte());
        if !self.keys.is_empty() {
            self.fetch_key(which % self.keys.len());
        }
    }

    fn fetch_key(&mut self, key: usize) {
        let (key_id, at, from, _) = &self.keys[key];
        let (at, from) = (*at, *from);
        self.next_id += 1;
        let order = SupplyByIdOrder {
            order: self.next_id,
            application: app(at),
            master: app(from),
            source: name(from),
            key_ids: vec![*key_id],
        };
        self.asked.insert(order.order, Asked::ById(key));
        self.input(at, KmaInput::SupplyById(order));
    }

    fn supplied(&mut self, at: usize, order: u64, result: Result<Vec<SuppliedKey>, SupplyError>) {
        let asked = self
            .asked
            .remove(&order)
            .expect("an answer to a question, once");
        let Ok(given) = result else {
            return;
        };
        match asked {
            Asked::ById(key) => {
                let (key_id, _, _, bytes) = &self.keys[key];
                assert!(given.len() == 1 && given[0].key_id == *key_id);
                let first = self.fetched.insert(key);
                assert!(first || !self.honest, "a key is fetched twice");
                assert!(
                    given[0].key.expose() == bytes || !self.honest,
                    "two ends differ"
                );
            }
            Asked::New { to } => {
                for key in given {
                    let known = self.keys.iter().any(|(id, ..)| *id == key.key_id);
                    assert!(!known, "a key ID is given out twice");
                    self.keys
                        .push((key.key_id, to, at, key.key.expose().to_vec()));
                }
            }
        }
    }

    fn connection(&mut self, which: u8) {
        let (a, b) = self.two(which);
        if self.cut.remove(&(a.min(b), a.max(b))) {
            self.connect_all(a, b..=b);
        } else {
            self.cut.insert((a.min(b), a.max(b)));
            self.wires
                .retain(|(from, to, _)| (*from, *to) != (a, b) && (*from, *to) != (b, a));
            self.input(a, KmaInput::PeerDown(name(b)));
            self.input(b, KmaInput::PeerDown(name(a)));
        }
    }

    fn connect_all(&mut self, at: usize, others: impl IntoIterator<Item = usize>) {
        for other in others {
            if other != at && !self.cut.contains(&(at.min(other), at.max(other))) {
                self.input(at, KmaInput::PeerUp(name(other)));
                self.input(other, KmaInput::PeerUp(name(at)));
            }
        }
    }

    fn crash(&mut self, which: u8) {
        let at = usize::from(which) % self.nodes.len();
        self.nodes[at].crash();
        self.wires.retain(|(from, to, _)| *from != at && *to != at);
        // Questions end with the process that they were put to.
        let keys = &self.keys;
        self.asked
            .retain(|_, asked| !matches!(asked, Asked::ById(key) if keys[*key].1 == at));
        for other in 0..self.nodes.len() {
            if other != at {
                self.input(other, KmaInput::PeerDown(name(at)));
            }
        }
        self.connect_all(at, 0..self.nodes.len());
    }

    fn wait(&mut self, ticks: u8) {
        for _ in 0..ticks {
            self.drain();
            self.now.mono = self.now.mono.after(Duration::from_millis(250));
            for at in 0..self.nodes.len() {
                self.input(at, KmaInput::Tick);
            }
        }
        self.drain();
    }

    fn drain(&mut self) {
        for _ in 0..100_000 {
            let Some(next) = self.wires.pop_front() else {
                return;
            };
            self.deliver(Some(next));
        }
        panic!("messages without end");
    }

    fn deliver(&mut self, wire: Option<Wire>) {
        if let Some((from, to, bytes)) = wire {
            self.input(
                to,
                KmaInput::Message {
                    peer: name(from),
                    bytes,
                },
            );
        }
    }

    fn input(&mut self, at: usize, input: KmaInput) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let node = &mut self.nodes[at];
            node.kma.handle(self.now, &mut node.random, input);
            for output in node.kma.commit().expect("no peer can break the store") {
                inputs.extend(self.output(at, output));
            }
        }
    }

    /// Carries an output out; what comes of it goes in again.
    fn output(&mut self, at: usize, output: Output) -> Option<KmaInput> {
        match output {
            Output::Send { peer, bytes } => {
                let to = NAMES.iter().position(|name| *name == peer.as_str());
                let to = to.filter(|to| *to < self.nodes.len());
                if let Some(to) = to.filter(|to| !self.cut.contains(&(at.min(*to), at.max(*to)))) {
                    let bytes = Vec::from(bytes);
                    self.said.push_front(bytes.clone());
                    self.said.truncate(256);
                    self.wires.push_back((at, to, bytes));
                }
                None
            }
            Output::Format {
                ticket,
                composition,
                unit_bytes,
            } => {
                let segment = self.nodes[at].format(&composition, unit_bytes);
                Some(KmaInput::Formatted { ticket, segment })
            }
            Output::Settle { name, .. } => {
                self.nodes[at].waiting.remove(&name);
                None
            }
            Output::Numbering { .. } | Output::Elsewhere { .. } | Output::Ordered { .. } => None,
            Output::Supplied { order, result } => {
                self.supplied(at, order, result);
                None
            }
            Output::WantRoute { destination } => Some(KmaInput::Route {
                destination,
                route: None,
            }),
            // No policy draws from a physical generator.
            Output::WantRandom { .. } => None,
            Output::Alarm(alarm) => {
                let forgery = matches!(alarm, Alarm::BadTag { .. } | Alarm::PadMisuse { .. });
                assert!(!(forgery && self.honest), "{alarm:?} among the honest");
                None
            }
        }
    }

    fn check_books(&self) {
        self.nodes.iter().for_each(Node::check_books);
    }

    /// Two different nodes, by a byte.
    fn two(&self, which: u8) -> (usize, usize) {
        let (n, which) = (self.nodes.len(), usize::from(which));
        let from = which % n;
        (from, (from + 1 + which / n % (n - 1)) % n)
    }
}
