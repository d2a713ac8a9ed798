//! A chain of three agents, one of which is a process that is killed, and what must hold all along.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io::{BufReader, BufWriter, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use qkd_keyfile::{KsaKeyId, NodeId, QkdKeyName};
use qkd_kma::{
    BurnReason, KmaConfig, Purpose, Record,
    store::read_ledger,
    vault::{JournalView, sim::SimDisk},
};

use super::{
    CHILD,
    agent::{Agent, Order, Reply, read, write},
    common::{Random, chain, check_records, node, pair_name, qkd_key},
};

pub const NAMES: [&str; 3] = ["alice", "relay", "bob"];

/// What runs the child instead of the test program itself: a tracer, say.
pub type Wrapper = Vec<String>;

/// Keys, or why there are none.
type Answer = Result<Vec<(KsaKeyId, Vec<u8>)>, String>;

/// The victim's process, and the way to it.
struct Process {
    child: Child,
    orders: BufWriter<UnixStream>,
    replies: BufReader<UnixStream>,
}

enum Side {
    Here(Box<Agent>),
    There(Process),
    Dead,
}

pub struct World {
    configs: BTreeMap<NodeId, KmaConfig>,
    sides: BTreeMap<NodeId, Side>,
    disks: BTreeMap<NodeId, SimDisk>,
    pub victim: NodeId,
    pub dir: PathBuf,
    queue: VecDeque<(NodeId, NodeId, Vec<u8>)>,
    now_ms: u64,
    next_key: u64,
    next_order: u64,
    boots: u64,
    pub random: Random,
    answers: BTreeMap<u64, Answer>,
    /// Keys that an application has: source, destination, bytes.
    given: BTreeMap<KsaKeyId, (NodeId, NodeId, Vec<u8>)>,
    pub fetched: BTreeSet<KsaKeyId>,
    stored: BTreeMap<NodeId, BTreeSet<QkdKeyName>>,
    pub alarms: Vec<String>,
    /// Why there was no key when it was asked for last.
    refused: String,
    pub deaths: u32,
    /// The victim is killed so long after its next order, in microseconds.
    pub kill_after_us: Option<u64>,
}

impl World {
    /// Agents over fresh stores; the victim's is in `dir`.
    pub fn new(victim: &str, dir: &Path, seed: u64, wrapper: &Wrapper) -> Self {
        let configs: BTreeMap<NodeId, KmaConfig> = chain(&NAMES, 4096)
            .into_iter()
            .map(|config| (config.node.clone(), config))
            .collect();
        let mut world = Self {
            sides: BTreeMap::new(),
            disks: BTreeMap::new(),
            victim: node(victim),
            dir: dir.join("store"),
            queue: VecDeque::new(),
            now_ms: 1000,
            next_key: 0,
            next_order: 0,
            boots: seed << 20,
            random: Random(seed),
            answers: BTreeMap::new(),
            given: BTreeMap::new(),
            fetched: BTreeSet::new(),
            stored: BTreeMap::new(),
            alarms: Vec::new(),
            refused: String::new(),
            deaths: 0,
            kill_after_us: None,
            configs,
        };
        for (name, config) in world.configs.clone() {
            if name != world.victim {
                let disk = SimDisk::new(seed);
                let vault = Box::new(disk.open_sealed().unwrap());
                let agent =
                    Agent::new(config, vault, seed ^ u64::from(name.as_str().as_bytes()[0]));
                world
                    .sides
                    .insert(name.clone(), Side::Here(Box::new(agent)));
                world.disks.insert(name, disk);
            }
        }
        world.sides.insert(world.victim.clone(), Side::Dead);
        world.start(wrapper);
        let locals: Vec<NodeId> = world.disks.keys().cloned().collect();
        world.order(&locals[0], &Order::Up(locals[1].clone()));
        world.order(&locals[1], &Order::Up(locals[0].clone()));
        world.pump();
        world
    }

    /// Starts the victim's process, and its connections.
    pub fn start(&mut self, wrapper: &Wrapper) {
        self.boots += 1;
        let socket = self.dir.with_file_name(format!("socket-{}", self.boots));
        let listener = UnixListener::bind(&socket).unwrap();
        let me = std::env::current_exe().unwrap();
        let mut words = wrapper.iter().cloned();
        let mut command = match words.next() {
            Some(program) => Command::new(program),
            None => Command::new(&me),
        };
        if !wrapper.is_empty() {
            command.args(words).arg(&me);
        }
        let child = command
            .args(["child", "--exact", "--nocapture"])
            .env(CHILD, &self.dir)
            .env("QKD_TEST_SOCKET", &socket)
            .env("QKD_TEST_VICTIM", self.victim.as_str())
            .env("QKD_TEST_BOOT", self.boots.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // A child that dies before it connects must not leave us waiting for ever.
        listener.set_nonblocking(true).unwrap();
        let mut child = child;
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break Some(stream),
                Err(_) if child.try_wait().unwrap().is_some() => break None,
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
            }
        };
        std::fs::remove_file(&socket).unwrap();
        let victim = self.victim.clone();
        let Some(stream) = stream else {
            return self.died();
        };
        stream.set_nonblocking(false).unwrap();
        let mut replies = BufReader::new(stream.try_clone().unwrap());
        let orders = BufWriter::new(stream);
        let opened = read::<Reply>(&mut replies).is_ok();
        let process = Process {
            child,
            orders,
            replies,
        };
        self.sides.insert(victim.clone(), Side::There(process));
        if !opened {
            return self.died();
        }
        let tick = Order::Tick(self.now_ms);
        self.order(&victim, &tick);
        for other in self.disks.keys().cloned().collect::<Vec<_>>() {
            self.order(&victim, &Order::Up(other.clone()));
            if self.is_alive() {
                self.order(&other, &Order::Up(victim.clone()));
            }
        }
    }

    pub fn is_alive(&self) -> bool {
        matches!(self.sides[&self.victim], Side::There(_))
    }

    /// The process ended: its connections with it.
    fn died(&mut self) {
        let victim = self.victim.clone();
        if let Some(Side::There(mut process)) = self.sides.insert(victim.clone(), Side::Dead) {
            let _ = process.child.kill();
            process.child.wait().unwrap();
        }
        self.deaths += 1;
        self.queue
            .retain(|(from, to, _)| *from != victim && *to != victim);
        for other in self.disks.keys().cloned().collect::<Vec<_>>() {
            self.order(&other, &Order::Down(victim.clone()));
        }
    }

    /// Kills the victim's process.
    pub fn kill(&mut self) {
        if self.is_alive() {
            self.died();
        }
    }

    pub fn order(&mut self, to: &NodeId, order: &Order) {
        let mut replies = Vec::new();
        let alive = match self.sides.get_mut(to) {
            Some(Side::Here(agent)) => {
                agent.take(order.clone(), &mut |reply| replies.push(reply));
                true
            }
            Some(Side::There(process)) => {
                let after = self.kill_after_us.take();
                let told = process.tell(order, after, &mut |reply| replies.push(reply));
                told.is_ok()
            }
            _ => true,
        };
        for reply in replies {
            self.reply(to, reply);
        }
        if !alive {
            self.died();
        }
    }

    fn reply(&mut self, from: &NodeId, reply: Reply) {
        match reply {
            Reply::Send(to, bytes) => self.queue.push_back((from.clone(), to, bytes)),
            Reply::Supplied(order, keys) => {
                self.answers.insert(order, keys);
            }
            Reply::Settled(name, true) => {
                self.stored.entry(from.clone()).or_default().insert(name);
            }
            Reply::Alarm(alarm) => self.alarms.push(format!("{from}: {alarm}")),
            Reply::Report(balanced) => assert!(balanced, "the books of {from} do not balance"),
            Reply::Settled(..) | Reply::Done => {}
        }
    }

    /// Delivers every message that is on its way.
    pub fn pump(&mut self) {
        while let Some((from, to, bytes)) = self.queue.pop_front() {
            self.order(&to, &Order::Message(from, bytes));
        }
    }

    pub fn tick(&mut self) {
        self.now_ms += 100;
        let tick = Order::Tick(self.now_ms);
        for name in self.configs.keys().cloned().collect::<Vec<_>>() {
            self.order(&name, &tick);
        }
        self.pump();
    }

    /// One key more on both links.
    pub fn deliver(&mut self) {
        for pair in NAMES.windows(2) {
            let name = qkd_key(&pair_name(pair[0], pair[1]), &self.next_key.to_string());
            let mut key = vec![0; 2048];
            qkd_keyfile::Entropy::fill(&mut self.random, &mut key);
            for end in pair {
                self.order(&node(end), &Order::Deliver(name.clone(), key.clone()));
            }
        }
        self.next_key += 1;
        self.pump();
    }

    fn ends(&mut self) -> (NodeId, NodeId) {
        if self.random.one_in(2) {
            (node("alice"), node("bob"))
        } else {
            (node("bob"), node("alice"))
        }
    }

    /// Asks for keys; whoever gets an answer has the keys.
    pub fn supply(&mut self) {
        let (from, to) = self.ends();
        self.next_order += 1;
        let order = self.next_order;
        self.order(&from, &Order::Supply(order, to.clone(), 3));
        self.pump();
        match self.answers.remove(&order) {
            Some(Ok(keys)) => {
                for (id, bytes) in keys {
                    let before = self.given.insert(id, (from.clone(), to.clone(), bytes));
                    assert!(before.is_none(), "an ID was given twice");
                }
            }
            answer => self.refused = format!("{from} to {to}: {answer:?}"),
        }
    }

    /// Fetches the keys that were given and not fetched.
    pub fn fetch(&mut self) {
        let waiting: Vec<KsaKeyId> = self.given.keys().copied().collect();
        for id in waiting
            .into_iter()
            .filter(|id| !self.fetched.contains(id))
            .take(4)
            .collect::<Vec<_>>()
        {
            let (from, to, bytes) = self.given[&id].clone();
            if let Some(Ok(keys)) = self.ask(&from, &to, id) {
                assert_eq!(keys, [(id, bytes)], "the two ends differ");
                self.fetched.insert(id);
                // At most once, also when it is asked for again at once.
                if let Some(again) = self.ask(&from, &to, id) {
                    assert!(again.is_err(), "{id} was given out twice");
                }
            }
        }
    }

    fn ask(&mut self, from: &NodeId, to: &NodeId, id: KsaKeyId) -> Option<Answer> {
        self.next_order += 1;
        let order = self.next_order;
        self.order(to, &Order::Fetch(order, from.clone(), vec![id]));
        self.pump();
        let answer = self.answers.remove(&order);
        if answer.is_none() && (*to != self.victim || self.is_alive()) {
            for _ in 0..60 {
                self.tick();
                if let Some(answer) = self.answers.remove(&order) {
                    return Some(answer);
                }
            }
        }
        answer
    }

    /// Something that happens in the life of a node.
    pub fn live(&mut self) {
        match self.random.below(8) {
            0..3 => self.deliver(),
            3..5 => self.tick(),
            5 | 6 => self.supply(),
            _ => self.fetch(),
        }
        if self.is_alive() {
            let victim = self.victim.clone();
            self.order(&victim, &Order::Report);
        }
    }

    /// Faults are over: keys flow, every key that was given out can be fetched, and the ledgers of all
    /// three prove that no bit was used twice.
    pub fn settle(&mut self) {
        // A process that no fail point waits in.
        self.kill();
        self.start(&Wrapper::new());
        for _ in 0..8 {
            self.deliver();
            self.tick();
        }
        // Units that were lost on their way are given up after ten seconds.
        for _ in 0..130 {
            self.tick();
        }
        // A key whose destination died between recording the fetch and telling it is burned: at most
        // one for each death.
        let mut burned = 0;
        let missing: Vec<KsaKeyId> = self.given.keys().copied().collect();
        for id in missing {
            if self.fetched.contains(&id) {
                continue;
            }
            let (from, to, bytes) = self.given[&id].clone();
            match self.ask(&from, &to, id) {
                Some(Ok(keys)) => {
                    assert_eq!(keys, [(id, bytes)]);
                    self.fetched.insert(id);
                }
                answer => {
                    assert!(to == self.victim, "{id} from {from} to {to}: {answer:?}");
                    burned += 1;
                }
            }
        }
        assert!(
            burned <= self.deaths,
            "{burned} keys lost in {} deaths",
            self.deaths
        );
        assert!(self.alarms.is_empty(), "{:?}", self.alarms);
        let before = self.given.len();
        for _ in 0..12 {
            self.supply();
            self.tick();
        }
        let refused = self.describe();
        assert!(
            self.given.len() > before,
            "no key flows after the faults: {refused}"
        );
        for name in self.configs.keys().cloned().collect::<Vec<_>>() {
            self.order(&name, &Order::Report);
        }
        self.check();
    }

    /// How things are at those that live here, for whoever looks into a failure.
    fn describe(&self) -> String {
        let sides = self.sides.iter().filter_map(|(name, side)| match side {
            Side::Here(agent) => Some(format!("{name}: {}", agent.describe())),
            _ => None,
        });
        let sides: Vec<String> = sides.collect();
        format!("{}; {}", self.refused, sides.join("; "))
    }

    /// Every record of all three, archives first.
    fn ledgers(&self) -> BTreeMap<NodeId, Vec<Record>> {
        let mut ledgers = BTreeMap::new();
        for (name, disk) in &self.disks {
            let mut records = Vec::new();
            for file in disk.names() {
                if file.starts_with("archive-") {
                    records.extend(read_ledger(&disk.read(&file).unwrap()).unwrap());
                }
            }
            records.extend(read_ledger(&disk.read("journal").unwrap()).unwrap());
            ledgers.insert(name.clone(), records);
        }
        let mut records = Vec::new();
        let mut each = |bytes: &[u8]| records.push(postcard::from_bytes(bytes).unwrap());
        let journal = JournalView::read(&self.dir).unwrap();
        journal.each_archived_record(&mut each).unwrap();
        journal.each_record(&mut each);
        ledgers.insert(self.victim.clone(), records);
        ledgers
    }

    fn check(&self) {
        let ledgers = self.ledgers();
        check_records(ledgers.values().cloned());
        let mut dead_bytes = 0;
        for (name, records) in &ledgers {
            // What hardware was told is stored, is: it was acknowledged.
            let mut stored: BTreeSet<QkdKeyName> = BTreeSet::new();
            for record in records {
                match record {
                    Record::Stored { body, .. } => {
                        if let Some(composition) = &body.composition {
                            stored.extend(composition.pieces.iter().map(|piece| QkdKeyName {
                                module_pair: composition.module_pair.clone(),
                                generation: composition.generation,
                                id: piece.qkd_key.clone(),
                            }));
                        }
                    }
                    Record::Followed {
                        span,
                        purpose: Purpose::Burn(BurnReason::DeadLease),
                        ..
                    } => dead_bytes += span.len_bytes,
                    _ => {}
                }
            }
            let told = self.stored.get(name).cloned().unwrap_or_default();
            assert!(
                told.is_subset(&stored),
                "{name}: {:?}",
                told.difference(&stored)
            );
        }
        // A crash loses what one batch took, in each of at most two directions, and what was on the
        // wire: with this load not more than a few units with their metadata.
        let bound = (self.deaths + 1) * 16 * 1024;
        assert!(
            dead_bytes <= bound,
            "{dead_bytes} bytes lost in {} deaths",
            self.deaths
        );
    }
}

impl Process {
    /// Gives an order and takes what comes back; an error when the process is gone.
    fn tell(
        &mut self,
        order: &Order,
        kill_after_us: Option<u64>,
        take: &mut dyn FnMut(Reply),
    ) -> std::io::Result<()> {
        write(&mut self.orders, order)?;
        self.orders.flush()?;
        if let Some(us) = kill_after_us {
            std::thread::sleep(std::time::Duration::from_micros(us));
            self.child.kill()?;
        }
        loop {
            match read(&mut self.replies)? {
                Reply::Done => return Ok(()),
                reply => take(reply),
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(Side::There(process)) = self.sides.get_mut(&self.victim) {
            let _ = process.child.kill();
            let _ = process.child.wait();
        }
    }
}
