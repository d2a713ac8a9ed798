//! Whole KMAs in one loop: a fake clock, a network that loses and repeats, a pipeline of a few lines.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    clippy::missing_panics_doc
)]

mod copyable;
mod scenes;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::PathBuf,
    time::Duration,
};

use qkd_kernels::Backend;
use qkd_keyfile::{
    AppId, Entropy, Generation, KeyBits, KsaKeyId, LinkId, ModulePairId, Mono, NodeId, Now,
    QkdKeyName, SegmentNumber, UnixTime,
    metadata::{QkdKeyMetadata, SecurityLevel},
};
use qkd_kma::{
    Alarm, FormattedSegment, Input, Kma, KmaConfig, LinkConfig, OperatorAct, OperatorAnswer,
    OperatorOrder, Output, Record, RelayPolicies, RelayPolicy, RemoteConfig, Settlement,
    StockLimits, SuppliedKey, SupplyByIdOrder, SupplyError, SupplyOrder,
    store::{Retention, Store},
    vault::{KekSource, LmdbOptions, Vault, open_lmdb, sim::SimDisk},
};
use qkd_secmem::{KeyBuf, Locking, Pool, PoolConfig};
use sha2::{Digest, Sha256};

pub use copyable::CopyableDisk;
#[allow(unused_imports)]
pub use scenes::{check_ledgers, check_records, feed, feed_chain, hop_on_the_wire, three, two};

/// A small generator; equal seeds give equal runs.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn pick<'a>(&mut self, names: &[&'a str]) -> &'a str {
        let at = self.below(names.len() as u64);
        names[usize::try_from(at).unwrap()]
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        n != 0 && self.below(n) == 0
    }
}

impl Entropy for Random {
    fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

/// What the network does to a message, one in so many; 0 is never.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    pub lose: u64,
    pub repeat: u64,
    pub overtake: u64,
}

/// One node: its agent (none while it is down), its disk, its pipeline.
pub struct Node {
    pub kma: Option<Kma>,
    pub disk: SimDisk,
    pub volatile: bool,
    /// Instead of `disk`: one that can be copied and restored.
    pub copyable: Option<CopyableDisk>,
    /// Instead of `disk`: a store in a folder of the real disk, its key-encryption key in `kek` beside it.
    pub dir: Option<PathBuf>,
    pub retention: Retention,
    pub journal_limit_bytes: u64,
    pub config: KmaConfig,
    pool: Pool,
    waiting: BTreeMap<QkdKeyName, (Vec<u8>, u32)>,
    pub settled: BTreeMap<QkdKeyName, Settlement>,
    /// What QKD-keys that come in now are called.
    pub generations: BTreeMap<ModulePairId, Generation>,
    pub alarms: Vec<Alarm>,
    pub answers: BTreeMap<u64, Result<Vec<SuppliedKey>, SupplyError>>,
    pub ordered: BTreeMap<u64, OperatorAnswer>,
    /// Bytes of the physical generator that were asked for.
    pub wanted_random: usize,
    random: Random,
}

/// Nodes and what lies between them.
pub struct Network {
    pub nodes: BTreeMap<NodeId, Node>,
    pub now: Now,
    pub faults: Faults,
    /// One in so many orders to a pipeline is carried out some ticks later.
    pub slow_formats: u64,
    pub late: Vec<(NodeId, Input)>,
    /// Pairs (smaller name first) whose connection is down.
    pub cut: BTreeSet<(NodeId, NodeId)>,
    pub wires: VecDeque<(NodeId, NodeId, Vec<u8>)>,
    /// Every message that a node sent, once switched on.
    pub heard: Option<Vec<(NodeId, NodeId, Vec<u8>)>>,
    /// The bits of every segment of every link.
    pub segments: BTreeMap<(LinkId, SegmentNumber), Vec<u8>>,
    pub random: Random,
    orders: u64,
    pub step: Duration,
}

pub fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

pub fn app(name: &str) -> AppId {
    name.parse().unwrap()
}

/// The same relay policy at every node.
pub fn with_policy(mut configs: Vec<KmaConfig>, policy: &RelayPolicy) -> Vec<KmaConfig> {
    for config in &mut configs {
        config.relay = RelayPolicies::new(policy.clone());
    }
    configs
}

/// A chain whose ends keep stock with each other also where they are neighbours, and a node beside it
/// that has no link, for a centre.
pub fn chain_and_centre(names: &[&str], centre: &str, policy: &RelayPolicy) -> Vec<KmaConfig> {
    let mut configs = chain(names, 4096);
    let last = names.len() - 1;
    let route: Vec<NodeId> = names.iter().map(|n| node(n)).collect();
    let back: Vec<NodeId> = route.iter().rev().cloned().collect();
    for (at, way) in [(0, route), (last, back)] {
        let remote = RemoteConfig {
            stock: StockLimits::fixed(4096),
            unit_bytes: 512,
            route: Some(way.clone()),
        };
        configs[at].remotes.insert(way[last].clone(), remote);
    }
    configs.push(KmaConfig {
        node: node(centre),
        neighbours: BTreeMap::new(),
        remotes: BTreeMap::new(),
        relay: RelayPolicies::default(),
        digest_unit_bytes: 32,
    });
    with_policy(configs, policy)
}

pub fn qkd_key(module_pair: &str, id: &str) -> QkdKeyName {
    QkdKeyName {
        module_pair: module_pair.parse().unwrap(),
        generation: Generation::default(),
        id: id.parse().unwrap(),
    }
}

/// The module pair between two nodes.
pub fn pair_name(a: &str, b: &str) -> String {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    format!("{low}-{high}")
}

/// A chain of nodes; the two ends keep end-to-end stock with each other if there are at least three.
pub fn chain(names: &[&str], target_bytes: u64) -> Vec<KmaConfig> {
    let route: Vec<NodeId> = names.iter().map(|n| node(n)).collect();
    let mut configs = Vec::new();
    for (at, name) in names.iter().enumerate() {
        let mut neighbours = BTreeMap::new();
        for other in [at.checked_sub(1), Some(at + 1)].into_iter().flatten() {
            if let Some(other) = names.get(other) {
                let pair: ModulePairId = pair_name(name, other).parse().unwrap();
                let link = LinkConfig {
                    module_pairs: vec![pair],
                    floor_bytes: 64,
                    capacity_bytes: 1 << 20,
                    segment_bytes: 1,
                    gather: Duration::ZERO,
                    mismatch_limit: 8,
                };
                neighbours.insert(node(other), link);
            }
        }
        let mut remotes = BTreeMap::new();
        if names.len() > 2 && (at == 0 || at + 1 == names.len()) {
            let mut way = route.clone();
            if at != 0 {
                way.reverse();
            }
            let remote = RemoteConfig {
                stock: StockLimits::fixed(target_bytes),
                unit_bytes: 512,
                route: Some(way.clone()),
            };
            remotes.insert(way.last().unwrap().clone(), remote);
        }
        configs.push(KmaConfig {
            node: node(name),
            neighbours,
            remotes,
            relay: RelayPolicies::default(),
            digest_unit_bytes: 32,
        });
    }
    configs
}

fn bit(bytes: &[u8], at: u32) -> bool {
    bytes[at as usize / 8] & 0x80 >> (at % 8) != 0
}

fn byte(bits: &[bool]) -> u8 {
    bits.iter().fold(0, |byte, &bit| byte << 1 | u8::from(bit))
}

impl Node {
    fn start(&mut self) {
        let vault: Box<dyn Vault> = if let Some(disk) = &self.copyable {
            Box::new(disk.open())
        } else if let Some(dir) = &self.dir {
            let kek = KekSource::File {
                path: dir.with_file_name("kek"),
                create: true,
            };
            let max_bytes = 64 << 20;
            Box::new(open_lmdb(dir, &kek, LmdbOptions { max_bytes }).unwrap())
        } else if self.volatile {
            Box::new(self.disk.open_memory(self.pool.clone()).unwrap())
        } else {
            Box::new(self.disk.open_sealed().unwrap())
        };
        let mut boot = [0; 16];
        self.random.fill(&mut boot);
        let store = Store::open(vault, self.pool.clone(), boot)
            .unwrap()
            .with_retention(self.retention);
        assert_eq!(store.inconsistencies(), 0);
        let links = self.config.neighbours.values();
        let pairs = links.flat_map(|link| &link.module_pairs);
        let generation = |pair: &ModulePairId| (pair.clone(), store.generation(pair));
        self.generations = pairs.map(generation).collect();
        let kma = Kma::new(self.config.clone(), store, boot, Backend::PORTABLE);
        self.kma = Some(kma.with_journal_limit(self.journal_limit_bytes));
    }

    /// Segment bits and digests, as the pipeline makes them.
    fn format(
        &self,
        composition: &qkd_keyfile::Composition,
        unit: usize,
    ) -> Option<FormattedSegment> {
        let mut bits = Vec::new();
        for piece in &composition.pieces {
            let name = QkdKeyName {
                module_pair: composition.module_pair.clone(),
                generation: composition.generation,
                id: piece.qkd_key.clone(),
            };
            let (key, key_bits) = self.waiting.get(&name)?;
            let end = piece.offset_bits + piece.len_bits;
            assert!(end <= *key_bits, "{name}: {end} of {key_bits} bits");
            bits.extend((piece.offset_bits..end).map(|at| bit(key, at)));
        }
        let bits: Vec<u8> = bits.chunks_exact(8).map(byte).collect();
        let digests = bits[32..].chunks(unit).map(|u| Sha256::digest(u).into());
        Some(FormattedSegment {
            digests: digests.collect(),
            bits: self.pool.copy_of(&bits).unwrap(),
        })
    }
}

impl Network {
    pub fn new(configs: Vec<KmaConfig>, seed: u64) -> Self {
        let mut random = Random(seed);
        let pool = Pool::new(PoolConfig {
            capacity_bytes: 16 << 20,
            locking: Locking::Unlocked,
        })
        .unwrap();
        let nodes = configs.into_iter().map(|config| {
            let node = Node {
                kma: None,
                disk: SimDisk::new(random.next()),
                volatile: false,
                copyable: None,
                dir: None,
                retention: Retention::default(),
                journal_limit_bytes: u64::MAX,
                pool: pool.clone(),
                waiting: BTreeMap::new(),
                settled: BTreeMap::new(),
                generations: BTreeMap::new(),
                alarms: Vec::new(),
                answers: BTreeMap::new(),
                ordered: BTreeMap::new(),
                wanted_random: 0,
                random: Random(random.next()),
                config: config.clone(),
            };
            (config.node, node)
        });
        Self {
            nodes: nodes.collect(),
            now: Now {
                mono: Mono(Duration::from_secs(1)),
                unix: UnixTime(0),
            },
            faults: Faults::default(),
            slow_formats: 0,
            late: Vec::new(),
            cut: BTreeSet::new(),
            wires: VecDeque::new(),
            heard: None,
            segments: BTreeMap::new(),
            random,
            orders: 0,
            step: Duration::from_millis(50),
        }
    }

    pub fn start_all(&mut self) {
        for name in self.nodes.keys().cloned().collect::<Vec<_>>() {
            self.start(&name);
        }
    }

    fn joined(&self, a: &NodeId, b: &NodeId) -> bool {
        let pair = if a < b {
            (a.clone(), b.clone())
        } else {
            (b.clone(), a.clone())
        };
        !self.cut.contains(&pair) && self.nodes[a].kma.is_some() && self.nodes[b].kma.is_some()
    }

    /// Starts a node, and its connections to all others that are up.
    pub fn start(&mut self, name: &NodeId) {
        self.nodes.get_mut(name).unwrap().start();
        for other in self.nodes.keys().cloned().collect::<Vec<_>>() {
            if other != *name {
                self.connect(name, &other);
            }
        }
    }

    pub fn connect(&mut self, a: &NodeId, b: &NodeId) {
        let pair = if a < b {
            (a.clone(), b.clone())
        } else {
            (b.clone(), a.clone())
        };
        self.cut.remove(&pair);
        if self.joined(a, b) {
            self.input(a, Input::PeerUp(b.clone()));
            self.input(b, Input::PeerUp(a.clone()));
        }
    }

    pub fn disconnect(&mut self, a: &NodeId, b: &NodeId) {
        let pair = if a < b {
            (a.clone(), b.clone())
        } else {
            (b.clone(), a.clone())
        };
        if self.joined(a, b) {
            self.input(a, Input::PeerDown(b.clone()));
            self.input(b, Input::PeerDown(a.clone()));
        }
        self.wires
            .retain(|(from, to, _)| !((from == a && to == b) || (from == b && to == a)));
        self.cut.insert(pair);
    }

    /// Ends a node without a word: what was not committed is gone, power and all.
    pub fn crash(&mut self, name: &NodeId) {
        let node = self.nodes.get_mut(name).unwrap();
        node.disk.cut_power();
        // A store in a folder keeps what was written, as when the process is killed.
        node.kma = None;
        node.waiting.clear();
        node.disk.restart();
        self.late.retain(|(at, _)| at != name);
        self.wires
            .retain(|(from, to, _)| from != name && to != name);
        for other in self.nodes.keys().cloned().collect::<Vec<_>>() {
            if self.nodes[&other].kma.is_some() {
                self.input(&other, Input::PeerDown(name.clone()));
            }
        }
    }

    /// Gives a QKD-key to a node, as its driver and pipeline would.
    pub fn deliver(&mut self, to: &NodeId, name: &QkdKeyName, key: &[u8]) {
        let key_bits = u32::try_from(key.len() * 8).unwrap();
        self.deliver_bits(to, name, key, key_bits);
    }

    /// Gives a QKD-key of so many bits to a node; its generation is the present one.
    pub fn deliver_bits(&mut self, to: &NodeId, name: &QkdKeyName, key: &[u8], key_bits: u32) {
        let node = self.nodes.get_mut(to).unwrap();
        let mut name = name.clone();
        if let Some(&generation) = node.generations.get(&name.module_pair) {
            name.generation = generation;
        }
        node.waiting.insert(name.clone(), (key.to_vec(), key_bits));
        let metadata = QkdKeyMetadata::new(name.id.clone());
        self.input(
            to,
            Input::Held {
                name,
                key_bits,
                metadata,
            },
        );
    }

    /// Gives a node the bits of a physical generator that it asked for.
    pub fn deliver_random(&mut self, to: &str) {
        let state = self.nodes.get_mut(&node(to)).unwrap();
        let bytes = std::mem::take(&mut state.wanted_random);
        for at in (0..bytes).step_by(1000) {
            let state = self.nodes.get_mut(&node(to)).unwrap();
            let mut bits = state.pool.take((bytes - at).min(1000)).unwrap();
            state.random.fill(bits.expose_mut());
            self.input(&node(to), Input::Random(bits));
        }
    }

    /// Gives both ends of a link the same QKD-key.
    pub fn deliver_both(&mut self, a: &str, b: &str, id: u64, len_bytes: usize) {
        let name = qkd_key(&pair_name(a, b), &id.to_string());
        let mut key = vec![0; len_bytes];
        self.random.fill(&mut key);
        self.deliver(&node(a), &name, &key);
        self.deliver(&node(b), &name, &key);
    }

    pub fn input(&mut self, to: &NodeId, input: Input) {
        let now = self.now;
        let node = self.nodes.get_mut(to).unwrap();
        let Some(kma) = node.kma.as_mut() else {
            return;
        };
        kma.handle(now, &mut node.random, input);
        let outputs = kma.commit().unwrap();
        for output in outputs {
            self.output(to, output);
        }
    }

    fn output(&mut self, from: &NodeId, output: Output) {
        match output {
            Output::Send { peer, bytes } => self.send(from, peer, bytes.into()),
            Output::Format {
                ticket,
                composition,
                unit_bytes,
            } => {
                let node = &self.nodes[from];
                let segment = node.format(&composition, unit_bytes as usize);
                if let Some(made) = &segment {
                    let bits = made.bits.expose().to_vec();
                    let link = LinkId::between(from, &ticket.peer).unwrap();
                    self.segments.insert((link, ticket.segment), bits);
                }
                let formatted = Input::Formatted { ticket, segment };
                if self.random.one_in(self.slow_formats) {
                    self.late.push((from.clone(), formatted));
                } else {
                    self.input(from, formatted);
                }
            }
            Output::Settle { name, outcome } => {
                let node = self.nodes.get_mut(from).unwrap();
                node.waiting.remove(&name);
                node.settled.insert(name, outcome);
            }
            Output::Elsewhere { .. } => {}
            Output::Numbering {
                module_pair,
                generation,
                ..
            } => {
                let node = self.nodes.get_mut(from).unwrap();
                node.generations.insert(module_pair, generation);
            }
            Output::Supplied { order, result } => {
                let node = self.nodes.get_mut(from).unwrap();
                node.answers.insert(order, result);
            }
            Output::Ordered { order, answer } => {
                let node = self.nodes.get_mut(from).unwrap();
                node.ordered.insert(order, answer);
            }
            Output::WantRoute { destination } => {
                self.input(
                    from,
                    Input::Route {
                        destination,
                        route: None,
                    },
                );
            }
            Output::WantRandom { bytes } => {
                let node = self.nodes.get_mut(from).unwrap();
                node.wanted_random += bytes;
            }
            Output::Alarm(alarm) => self.nodes.get_mut(from).unwrap().alarms.push(alarm),
        }
    }

    fn send(&mut self, from: &NodeId, to: NodeId, bytes: Vec<u8>) {
        if let Some(heard) = &mut self.heard {
            heard.push((from.clone(), to.clone(), bytes.clone()));
        }
        if !self.joined(from, &to) || self.random.one_in(self.faults.lose) {
            return;
        }
        let message = (from.clone(), to, bytes);
        if self.random.one_in(self.faults.repeat) {
            self.wires.push_back(message.clone());
        }
        if self.random.one_in(self.faults.overtake) {
            self.wires.push_front(message);
        } else {
            self.wires.push_back(message);
        }
    }

    /// Delivers what is on the wires, then lets time pass, `steps` times.
    pub fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            self.drain();
            self.tick();
        }
        self.drain();
    }

    /// Lets time pass; what is on the wires stays there.
    pub fn tick(&mut self) {
        self.now.mono = self.now.mono.after(self.step);
        for (at, formatted) in std::mem::take(&mut self.late) {
            if self.slow_formats > 0 && self.random.one_in(2) {
                self.late.push((at, formatted));
            } else {
                self.input(&at, formatted);
            }
        }
        for name in self.nodes.keys().cloned().collect::<Vec<_>>() {
            self.input(&name, Input::Tick);
        }
    }

    pub fn drain(&mut self) {
        // Bounded: a loop of messages without time passing would be a fault of the protocol.
        for _ in 0..1_000_000 {
            let Some((peer, to, bytes)) = self.wires.pop_front() else {
                return;
            };
            self.input(&to, Input::Message { peer, bytes });
        }
        panic!("messages without end");
    }

    pub fn supply(
        &mut self,
        from: &str,
        to: &str,
        number: u32,
        bits: u32,
    ) -> Result<Vec<SuppliedKey>, SupplyError> {
        self.supply_at(from, to, (number, bits), SecurityLevel::Any)
    }

    /// As [`Network::supply`], of a level.
    pub fn supply_at(
        &mut self,
        from: &str,
        to: &str,
        (number, bits): (u32, u32),
        level: SecurityLevel,
    ) -> Result<Vec<SuppliedKey>, SupplyError> {
        let order = self.next_order();
        let order_of = SupplyOrder {
            order,
            master: app(&format!("app-{from}")),
            destination: node(to),
            applications: vec![app(&format!("app-{to}"))],
            number,
            size: KeyBits::try_from(bits).unwrap(),
            level,
        };
        self.input(&node(from), Input::Supply(order_of));
        let answers = &mut self.nodes.get_mut(&node(from)).unwrap().answers;
        answers.remove(&order).expect("supply answers at once")
    }

    /// Asks by ID; the answer may need time ([`Network::answer`]).
    pub fn ask_by_id(&mut self, at: &str, application: &str, from: &str, ids: &[KsaKeyId]) -> u64 {
        let order = self.next_order();
        let order_of = SupplyByIdOrder {
            order,
            application: app(application),
            master: app(&format!("app-{from}")),
            source: node(from),
            key_ids: ids.to_vec(),
        };
        self.input(&node(at), Input::SupplyById(order_of));
        order
    }

    pub fn answer(
        &mut self,
        at: &str,
        order: u64,
    ) -> Option<Result<Vec<SuppliedKey>, SupplyError>> {
        let answers = &mut self.nodes.get_mut(&node(at)).unwrap().answers;
        answers.remove(&order)
    }

    pub fn fetch(
        &mut self,
        at: &str,
        from: &str,
        ids: &[KsaKeyId],
    ) -> Result<Vec<SuppliedKey>, SupplyError> {
        let order = self.ask_by_id(at, &format!("app-{at}"), from, ids);
        for _ in 0..100 {
            if let Some(answer) = self.answer(at, order) {
                return answer;
            }
            self.run(1);
        }
        panic!("no answer within 100 ticks");
    }

    /// An operator's order.
    pub fn order(&mut self, at: &str, act: OperatorAct) -> OperatorAnswer {
        let order = self.next_order();
        self.input(&node(at), Input::Order(OperatorOrder { order, act }));
        let ordered = &mut self.nodes.get_mut(&node(at)).unwrap().ordered;
        ordered
            .remove(&order)
            .expect("an order is answered at once")
    }

    fn next_order(&mut self) -> u64 {
        self.orders += 1;
        self.orders
    }

    pub fn kma(&self, name: &str) -> &Kma {
        self.nodes[&node(name)].kma.as_ref().unwrap()
    }

    /// Stock towards `to` that `from` owns, in bytes, end to end.
    pub fn stock(&self, from: &str, to: &str) -> u64 {
        self.kma(from)
            .store()
            .available_bytes(&qkd_keyfile::StreamId::EndToEnd {
                source: node(from),
                destination: node(to),
            })
    }

    pub fn link_stock(&self, at: &str, with: &str) -> u64 {
        let link = LinkId::between(&node(at), &node(with)).unwrap();
        self.kma(at)
            .store()
            .available_bytes(&qkd_keyfile::StreamId::Link(link))
    }

    /// The double entry of every node balances, and no record was out of place.
    pub fn check_books(&self) {
        for (name, node) in &self.nodes {
            let Some(kma) = &node.kma else { continue };
            let status = kma.status();
            assert_eq!(status.inconsistencies, 0, "{name}");
            for stream in status.streams {
                assert_eq!(stream.imbalance_bits, 0, "{name}: {stream:?}");
            }
        }
    }

    /// All records that a node's journal holds.
    pub fn ledger(&self, name: &str) -> Vec<Record> {
        qkd_kma::store::read_ledger(&self.nodes[&node(name)].disk.read("journal").unwrap())
            .expect("a journal that can be read")
    }
}

pub fn bytes(key: &KeyBuf) -> Vec<u8> {
    key.expose().to_vec()
}
