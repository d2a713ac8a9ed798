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

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use qkd_kernels::Backend;
use qkd_keyfile::{
    Composition, Entropy, Generation, KeyBits, KsaKeyId, Mono, NodeId, Now, QkdKeyName, StreamId,
    UnixTime, metadata::SecurityLevel,
};
use qkd_kma::{
    Alarm, FormattedSegment, Input as KmaInput, Kma, KmaConfig, LinkConfig, Output, Record,
    RemoteConfig, SuppliedKey, SupplyByIdOrder, SupplyError, SupplyOrder,
    store::{Store, read_ledger},
    vault::{Vault, sim::SimDisk},
};
use qkd_secmem::{Locking, Pool, PoolConfig};
use sha2::{Digest, Sha256};

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

const NAMES: [&str; 3] = ["alice", "bob", "carol"];

/// What a step is, by its first byte.
enum Step {
    /// The next message arrives.
    Deliver,
    /// All messages arrive, and those that answer them.
    Drain,
    /// Time passes, a quarter of a second at once: all messages arrive, and again, up to 8 times.
    Wait,
    /// The next message is lost.
    Lose,
    /// The next message arrives twice.
    Repeat,
    /// Bytes of the next message are changed, and its length.
    Damage,
    /// Any bytes arrive, from any peer.
    Forge,
    /// An earlier message arrives again, from whoever, wherever.
    Replay,
    /// A module pair delivers a QKD-key at both ends.
    Key,
    /// It delivers at one end, or unlike bits.
    OddKey,
    /// An application asks for keys.
    Supply,
    /// An application asks for keys by ID.
    Fetch,
    /// A connection ends, or comes back.
    Connection,
    /// A node loses power, and starts again.
    Crash,
}

impl Step {
    fn of(byte: u8) -> Self {
        match byte % 16 {
            0 => Self::Deliver,
            1 | 14 => Self::Drain,
            2 | 15 => Self::Wait,
            3 => Self::Lose,
            4 => Self::Repeat,
            5 => Self::Damage,
            6 => Self::Forge,
            7 => Self::Replay,
            8 => Self::Key,
            9 => Self::OddKey,
            10 => Self::Supply,
            11 => Self::Fetch,
            12 => Self::Connection,
            _ => Self::Crash,
        }
    }
}

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

struct Node {
    config: KmaConfig,
    disk: SimDisk,
    volatile: bool,
    random: Random,
    waiting: BTreeMap<QkdKeyName, Vec<u8>>,
    kma: Kma,
}

impl Network {
    fn new(shape: u8) -> Self {
        let names = &NAMES[..2 + usize::from(shape & 1)];
        let volatile = shape & 2 == 2;
        let nodes = (0..names.len()).map(|at| {
            let (config, disk) = (config(names, at), SimDisk::new(at as u64));
            let mut random = Random(at as u64);
            let kma = open(&config, &disk, volatile, &mut random);
            Node {
                config,
                disk,
                volatile,
                random,
                waiting: BTreeMap::new(),
                kma,
            }
        });
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
        for node in &self.nodes {
            check_ledger(&node.disk);
        }
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
        let key_bits = u32::try_from(key.len() * 8).unwrap();
        self.nodes[at].waiting.insert(name.clone(), key);
        self.input(
            at,
            KmaInput::Held {
                name: name.clone(),
                key_bits,
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
        let node = &mut self.nodes[at];
        node.disk.cut_power();
        node.disk.restart();
        node.waiting.clear();
        node.kma = open(&node.config, &node.disk, node.volatile, &mut node.random);
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
            Output::Supplied { order, result } => {
                self.supplied(at, order, result);
                None
            }
            Output::WantRoute { destination } => Some(KmaInput::Route {
                destination,
                route: None,
            }),
            Output::Alarm(alarm) => {
                let forgery = matches!(alarm, Alarm::BadTag { .. } | Alarm::PadMisuse { .. });
                assert!(!(forgery && self.honest), "{alarm:?} among the honest");
                None
            }
        }
    }

    fn check_books(&self) {
        for node in &self.nodes {
            let status = node.kma.status();
            assert_eq!(status.inconsistencies, 0);
            for stream in status.streams {
                assert_eq!(stream.imbalance_bits, 0, "{stream:?}");
            }
        }
    }

    /// Two different nodes, by a byte.
    fn two(&self, which: u8) -> (usize, usize) {
        let (n, which) = (self.nodes.len(), usize::from(which));
        let from = which % n;
        (from, (from + 1 + which / n % (n - 1)) % n)
    }
}

impl Node {
    /// As the pipeline does: bits of all pieces, and SHA-256 of every unit after the masks.
    fn format(&self, composition: &Composition, unit_bytes: u32) -> Option<FormattedSegment> {
        let mut bits = Vec::new();
        for piece in &composition.pieces {
            let name = QkdKeyName {
                module_pair: composition.module_pair.clone(),
                generation: composition.generation,
                id: piece.qkd_key.clone(),
            };
            let key = self.waiting.get(&name)?;
            assert!(piece.offset_bits % 8 == 0 && piece.len_bits % 8 == 0);
            let (offset, len) = (piece.offset_bits / 8, piece.len_bits / 8);
            bits.extend_from_slice(key.get(offset as usize..)?.get(..len as usize)?);
        }
        let units = bits.get(32..)?.chunks(unit_bytes as usize);
        let digests = units.map(|unit| Sha256::digest(unit).into()).collect();
        Some(FormattedSegment {
            digests,
            bits: pool().copy_of(&bits).ok()?,
        })
    }
}

/// No byte of a segment is taken twice, or followed twice.
fn check_ledger(disk: &SimDisk) {
    let ledger = read_ledger(&disk.read("journal").unwrap()).unwrap();
    let mut used: BTreeMap<(StreamId, u64, bool), Vec<(u32, u32)>> = BTreeMap::new();
    for record in ledger {
        let (stream, span, taken) = match record {
            Record::Taken { stream, span, .. } => (stream, span, true),
            Record::Followed { stream, span, .. } => (stream, span, false),
            _ => continue,
        };
        let end = span.end_bytes().expect("a span that can be counted");
        let spans = used.entry((stream, span.segment.0, taken)).or_default();
        spans.push((span.offset_bytes, end));
    }
    for (segment, mut spans) in used {
        spans.sort_unstable();
        let apart = spans.windows(2).all(|two| two[0].1 <= two[1].0);
        assert!(apart, "{segment:?}: {spans:?}");
    }
}

fn open(config: &KmaConfig, disk: &SimDisk, volatile: bool, random: &mut Random) -> Kma {
    let vault: Box<dyn Vault> = if volatile {
        Box::new(disk.open_memory(pool()).unwrap())
    } else {
        Box::new(disk.open_sealed().unwrap())
    };
    let mut boot = [0; 16];
    random.fill(&mut boot);
    let store = Store::open(vault, pool(), boot).unwrap();
    Kma::new(config.clone(), store, boot, Backend::PORTABLE)
}

/// One for all inputs of a thread, so that key memory which is not given back shows.
fn pool() -> Pool {
    thread_local! {
        static POOL: Pool = Pool::new(PoolConfig {
            capacity_bytes: 8 << 20,
            locking: Locking::Unlocked,
        })
        .unwrap();
    }
    POOL.with(Pool::clone)
}

/// A row of nodes; the ends of three keep end-to-end stock with each other.
fn config(names: &[&str], at: usize) -> KmaConfig {
    let link = |a: usize| LinkConfig {
        module_pairs: vec![pair(a).parse().unwrap()],
        floor_bytes: 64,
        capacity_bytes: 1 << 16,
    };
    let before = at.checked_sub(1).map(|before| (name(before), link(before)));
    let after = (at + 1 < names.len()).then(|| (name(at + 1), link(at)));
    let mut route: Vec<NodeId> = (0..names.len()).map(name).collect();
    if at > 0 {
        route.reverse();
    }
    let remote = RemoteConfig {
        target_bytes: 512,
        unit_bytes: 128,
        route: Some(route.clone()),
    };
    let is_end = names.len() == 3 && at != 1;
    let remotes = is_end.then(|| (route[2].clone(), remote));
    KmaConfig {
        node: name(at),
        neighbours: before.into_iter().chain(after).collect(),
        remotes: remotes.into_iter().collect(),
        relay_for_others: true,
        digest_unit_bytes: 32,
    }
}

fn name(at: usize) -> NodeId {
    NAMES[at].parse().unwrap()
}

fn app(at: usize) -> qkd_keyfile::AppId {
    format!("app-{}", NAMES[at]).parse().unwrap()
}

/// The module pair between a node and the next.
fn pair(at: usize) -> String {
    format!("pair-{at}")
}

/// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
struct Random(u64);

impl Entropy for Random {
    fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let bytes = (z ^ (z >> 31)).to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}
