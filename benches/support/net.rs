//! Networks of whole nodes, a process each, on ports of the system's choice.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use qkd_bridge::{
    demo::{LinkPlan, Network, NodeFiles, PairPlan, Plan, Transport},
    node,
    process::{Process, last_lines},
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::ring::{Module, feed};

/// For what takes seconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Time between two looks at a node's status.
/// (A node counts every segment afresh to answer: looking more often would be measured.)
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// 64 KiB: the longest block that a node takes by default, and one of key memory's block sizes.
pub(crate) const BLOCK_BYTES: usize = 64 << 10;

/// Room for more blocks than are handed over ahead.
pub(crate) const RING_BYTES: usize = 4 << 20;

/// Where nodes keep key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    Memory,
    Lmdb,
}

impl Store {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Lmdb => "lmdb",
        }
    }
}

/// What every node says of itself.
pub(crate) type Statuses = Vec<(String, Value)>;

/// What a network is for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizing {
    pub(crate) store: Store,
    /// Key memory of each node.
    pub(crate) key_memory_mib: u32,
    /// Most key in stock on a link.
    pub(crate) capacity_mib: u64,
}

/// Nodes that run, each a process. Of end-to-end stock there is only that of node `a`. Dropped, they are killed and their files are gone.
pub(crate) struct Net {
    pub(crate) runtime: Runtime,
    pub(crate) network: Network,
    processes: Vec<Process>,
    _folder: TempDir,
}

/// A link with one module pair over shared memory, which the bench itself plays.
pub(crate) fn link(a: &str, b: &str) -> LinkPlan {
    LinkPlan {
        a: a.parse().unwrap(),
        b: b.parse().unwrap(),
        pairs: vec![PairPlan {
            name: pair_name(a, b),
            transport: Transport::SharedMemory,
            block_bits: 0,
            pace: 0.0,
        }],
    }
}

fn pair_name(a: &str, b: &str) -> String {
    format!("{a}-{b}")
}

impl Net {
    /// Makes a network and starts its nodes, not its controller.
    pub(crate) fn start(mut plan: Plan, sizing: Sizing) -> Self {
        plan.key_memory_mib = sizing.key_memory_mib;
        let folder = tempfile::Builder::new().prefix("qkd-bench-").tempdir();
        let folder = folder.unwrap();
        let network = plan.make(&folder.path().join("net")).unwrap();
        for node in &network.nodes {
            let text = fs::read_to_string(&node.config).unwrap();
            let mut text = sized(&text, sizing);
            let stock = network.plan().stock.as_ref();
            if stock.is_some_and(|stock| stock.b == node.id) {
                text = without_stock(&text);
            }
            fs::write(&node.config, text).unwrap();
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let mut net = Self {
            runtime,
            network,
            processes: Vec::new(),
            _folder: folder,
        };
        for at in 0..net.network.nodes.len() {
            let node = &net.network.nodes[at];
            let (id, config) = (node.id.to_string(), node.config.clone());
            net.spawn(&id, "run", &config);
        }
        net.wait_until("connections", |statuses| {
            let up = |(_, status): &(String, Value)| {
                let peers = status["peers"].as_object();
                peers.is_some_and(|peers| {
                    peers.len() + 1 == statuses.len() && peers.values().all(|up| up == true)
                })
            };
            statuses.iter().all(up)
        });
        net
    }

    /// Starts the controller, without which nothing is relayed.
    pub(crate) fn start_controller(&mut self) {
        let (config, _) = self.network.controller.clone().unwrap();
        self.spawn("controller", "controller", &config);
    }

    fn spawn(&mut self, name: &str, command: &str, config: &Path) {
        let mut args = vec![PathBuf::from(command), "--config".into(), config.to_owned()];
        args.push("--exit-with-stdin".into());
        let program = Path::new(env!("CARGO_BIN_EXE_qkd-bridge"));
        let log = self.network.dir.join(format!("{name}.log"));
        let _inside = self.runtime.enter();
        let process = Process::start(name, program, args, Some(&log)).unwrap();
        self.processes.push(process);
    }

    /// Both ends of the module pair of a link.
    pub(crate) fn modules(&self, a: &str, b: &str) -> [Module; 2] {
        [a, b].map(|node| {
            let socket = self
                .network
                .module(&pair_name(a, b), &node.parse().unwrap());
            Module::connect(&socket)
        })
    }

    /// Feeds a link and waits until all of it is confirmed at both ends.
    pub(crate) fn fill(
        &mut self,
        a: &str,
        b: &str,
        modules: &mut [Module; 2],
        key: &[u8],
    ) -> Statuses {
        feed(modules, key, BLOCK_BYTES);
        let blocks = modules[0].blocks();
        self.wait_until("confirmed key", |statuses| {
            let of = |node, what| of_link(statuses, node, a, b, what);
            let fed_bits = blocks * 8 * BLOCK_BYTES as u64;
            [a, b]
                .into_iter()
                .all(|node| of(node, "received_bits") == fed_bits)
                && of(a, "encrypting_bytes") == of(b, "decrypting_bytes")
                && of(b, "encrypting_bytes") == of(a, "decrypting_bytes")
        })
    }

    /// Looks at the nodes' status until it is as wanted; returns that status.
    pub(crate) fn wait_until(
        &mut self,
        what: &str,
        wanted: impl Fn(&[(String, Value)]) -> bool,
    ) -> Statuses {
        let start = Instant::now();
        loop {
            let now: Vec<_> = self.network.nodes.iter().filter_map(ask).collect();
            if now.len() == self.network.nodes.len() && wanted(&now) {
                return now;
            }
            self.check();
            if start.elapsed() > PATIENCE {
                let logs = self.logs();
                panic!("{what}: not in {PATIENCE:?}: {now:#?}\n{logs}");
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Processor time that the nodes have used since they began, in user and in the kernel. What a byte
    /// costs shows in it also on a machine that does other things beside.
    pub(crate) fn cpu_time(&self) -> Duration {
        let ticks: u64 = self.processes.iter().filter_map(cpu_ticks).sum();
        Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND)
    }

    fn logs(&self) -> String {
        let log = |process: &Process| last_lines(process.log().as_deref(), 20);
        let logs: Vec<String> = self.processes.iter().map(log).collect();
        logs.join("\n")
    }

    /// Fails if a process has ended.
    fn check(&mut self) {
        for process in &mut self.processes {
            let ended = process.ended().unwrap();
            let log = last_lines(process.log().as_deref(), 20);
            assert!(ended.is_none(), "{} has ended:\n{log}", process.name());
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for process in self.processes.drain(..) {
            let _ = self.runtime.block_on(process.kill());
        }
    }
}

/// USER_HZ, which Linux shows to programs whatever it counts in itself.
const TICKS_PER_SECOND: u64 = 100;

/// Fields 14 and 15 of proc_pid_stat(5), counted after the name, which may hold blanks.
fn cpu_ticks(process: &Process) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.id()?)).ok()?;
    let fields = stat.rsplit_once(')')?.1.split_whitespace();
    fields
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().ok())
        .sum()
}

fn sized(text: &str, sizing: Sizing) -> String {
    let capacity = format!("capacity_bytes = {}", sizing.capacity_mib << 20);
    let ring = format!(
        "kind = \"shared-memory\", capacity_bytes = {RING_BYTES}, heartbeat_timeout_ms = 0,"
    );
    let lines = text.lines().map(|line| match line {
        line if line.starts_with("capacity_bytes") => capacity.clone(),
        line => line.replace("kind = \"shared-memory\",", &ring),
    });
    let mut text: Vec<String> = lines.collect();
    // Memory that a node has used once costs it no page fault any more: that is what is measured.
    if let Some(node) = text.iter().position(|line| line == "[node]") {
        text.insert(node + 1, "populate_key_memory = true".to_owned());
    }
    let kind = sizing.store.name();
    format!("{}\n\n[store]\nkind = \"{kind}\"\n", text.join("\n"))
}

fn without_stock(text: &str) -> String {
    let tables = text.split("\n\n");
    let others: Vec<&str> = tables
        .filter(|table| !table.starts_with("[[stock]]"))
        .collect();
    others.join("\n\n")
}

fn ask(node: &NodeFiles) -> Option<(String, Value)> {
    let text = node::ask(&node.data.join("status.sock")).ok()?;
    Some((node.id.to_string(), serde_json::from_str(&text).ok()?))
}

/// A number of a node's link with another, out of its status.
pub(crate) fn of_link(
    statuses: &[(String, Value)],
    node: &str,
    a: &str,
    b: &str,
    what: &str,
) -> u64 {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    let status = statuses.iter().find(|(id, _)| id == node);
    let number = status.map(|(_, status)| &status["streams"][format!("{low}--{high}")][what]);
    number.and_then(Value::as_u64).unwrap_or(0)
}
