//! `sim`: module pairs that play the hardware.

use std::{
    collections::BTreeSet,
    fmt,
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use qkd_keyfile::{Entropy, ModulePairId};
use qkd_sim_device::{
    FaultConfig, ModulePair, Pace, PairConfig, Role, RunError, Seed, SimConfig, Snapshot, Stats,
    TransportConfig,
};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use zeroize::{Zeroize, Zeroizing};

use super::{Failure, log, run::Signals};
use crate::{
    config::{ConfigError, read_toml},
    env::SystemEntropy,
    process::{Process, end_with_stdin},
};

#[derive(Debug, clap::Args)]
pub(super) struct SimArgs {
    /// The module pairs.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Play this half only (`NAME:transmitter` or `NAME:receiver`); may be given several times.
    #[arg(long = "half", value_name = "NAME:ROLE")]
    halves: Vec<HalfName>,
    /// Play every half in a process of its own.
    #[arg(long)]
    processes: bool,
    /// Read the seed, 64 hexadecimal digits, from the first line of standard input.
    #[arg(long, hide = true)]
    seed_from_stdin: bool,
    /// Stop when standard input ends.
    #[arg(long, hide = true)]
    exit_with_stdin: bool,
}

/// A half, as the command line names it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct HalfName {
    pair: ModulePairId,
    role: Role,
}

impl FromStr for HalfName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let (pair, role) = text.rsplit_once(':').ok_or("a half is NAME:ROLE")?;
        let role = match role {
            "transmitter" => Role::Transmitter,
            "receiver" => Role::Receiver,
            _ => return Err("a role is transmitter or receiver"),
        };
        let pair = pair.parse().map_err(|_| "not the name of a module pair")?;
        Ok(Self { pair, role })
    }
}

impl fmt::Display for HalfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.role {
            Role::Transmitter => "transmitter",
            Role::Receiver => "receiver",
        };
        write!(f, "{}:{role}", self.pair)
    }
}

/// Module pairs, as their file describes them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SimFile {
    /// For runs that are to be repeated; without it a fresh one is drawn.
    seed: Option<MasterSeed>,
    #[serde(rename = "module_pair")]
    pairs: Vec<PairEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PairEntry {
    name: ModulePairId,
    /// Length of a block, in bits.
    block_bits: u32,
    /// Blocks per second, or "max".
    pace: Pace,
    /// Error rate to report, in parts per million.
    #[serde(default)]
    qber_ppm: u32,
    #[serde(default)]
    first_number: u64,
    blocks: Option<u64>,
    #[serde(default)]
    faults: FaultConfig,
    #[serde(rename = "half")]
    halves: Vec<HalfEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HalfEntry {
    role: Role,
    transport: TransportConfig,
}

/// The seed of all module pairs of a file.
#[derive(Deserialize)]
#[serde(try_from = "String")]
struct MasterSeed(Zeroizing<String>);

impl fmt::Debug for MasterSeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterSeed(withheld)")
    }
}

impl TryFrom<String> for MasterSeed {
    type Error = qkd_sim_device::SeedError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let mut text = Zeroizing::new(text);
        Seed::from_str(&text)?;
        text.make_ascii_lowercase();
        Ok(Self(text))
    }
}

impl MasterSeed {
    /// 256 bits of the operating system's.
    fn fresh() -> Self {
        let mut bytes = Zeroizing::new([0; 32]);
        SystemEntropy.fill(&mut *bytes);
        Self(hex(&*bytes))
    }

    /// The first line of standard input; past the library's buffer, which nobody wipes.
    fn from_stdin() -> io::Result<Self> {
        let mut text = String::with_capacity(80);
        let mut byte = [0];
        while nix::unistd::read(io::stdin(), &mut byte)? == 1 && byte != *b"\n" && text.len() < 80 {
            text.push(char::from(byte[0]));
        }
        Self::try_from(text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// A module pair's own: pairs of one file share no bit.
    fn of_pair(&self, name: &ModulePairId) -> Seed {
        let mut digest: [u8; 32] = Sha256::new()
            .chain_update(b"qkd-bridge/sim-seed/1")
            .chain_update(self.0.as_bytes())
            .chain_update(name.as_str())
            .finalize()
            .into();
        let text = hex(&digest);
        digest.zeroize();
        match text.parse() {
            Ok(seed) => seed,
            Err(_) => unreachable!("32 bytes are 64 digits"),
        }
    }
}

fn hex(bytes: &[u8]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(2 * bytes.len()));
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            text.extend(char::from_digit(u32::from(digit), 16));
        }
    }
    text
}

/// A half to be played.
struct Job {
    name: HalfName,
    config: SimConfig,
}

impl SimArgs {
    pub(super) fn run(self, levels: Option<&str>) -> Result<(), Failure> {
        let (mut file, _) = read_toml::<SimFile>(&self.config)?;
        let _levels = log::start(levels.or(Some("warn")), None)?;
        let seed = match file.seed.take() {
            _ if self.seed_from_stdin => MasterSeed::from_stdin()?,
            Some(seed) => seed,
            None => MasterSeed::fresh(),
        };
        let jobs = jobs(file, &seed, &self)?;
        if self.exit_with_stdin {
            end_with_stdin()?;
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        if self.processes {
            runtime.block_on(run_processes(&self, &jobs, &seed))
        } else {
            drop(seed);
            let live = io::stdout().is_terminal() && !self.exit_with_stdin;
            runtime.block_on(run_threads(jobs, live))
        }
    }
}

/// The halves to be played, checked.
fn jobs(file: SimFile, seed: &MasterSeed, args: &SimArgs) -> Result<Vec<Job>, ConfigError> {
    let refuse = |what: String| ConfigError::whole(&args.config, what);
    let base = args.config.parent().unwrap_or(Path::new("."));
    let mut names = BTreeSet::new();
    let mut jobs: Vec<Job> = Vec::new();
    for entry in file.pairs {
        let name = entry.name;
        if !names.insert(name.clone()) {
            return Err(refuse(format!("module pair {name} is listed twice")));
        }
        let pair = PairConfig {
            seed: seed.of_pair(&name),
            block_bits: entry.block_bits,
            pace: entry.pace,
            qber_ppm: entry.qber_ppm,
            first_number: entry.first_number,
            blocks: entry.blocks,
            faults: entry.faults,
        };
        ModulePair::new(&pair).map_err(|error| refuse(format!("module pair {name}: {error}")))?;
        for half in entry.halves {
            let half_name = HalfName {
                pair: name.clone(),
                role: half.role,
            };
            if jobs.iter().any(|job| job.name == half_name) {
                return Err(refuse(format!("half {half_name} is listed twice")));
            }
            let config = SimConfig {
                role: half.role,
                pair: pair.clone(),
                transport: resolved(half.transport, base),
            };
            jobs.push(Job {
                name: half_name,
                config,
            });
        }
    }
    if let Some(unknown) = args
        .halves
        .iter()
        .find(|name| jobs.iter().all(|job| job.name != **name))
    {
        return Err(refuse(format!("there is no half {unknown}")));
    }
    jobs.retain(|job| args.halves.is_empty() || args.halves.contains(&job.name));
    Ok(jobs)
}

fn resolved(mut transport: TransportConfig, base: &Path) -> TransportConfig {
    let path = match &mut transport {
        TransportConfig::Files(config) => &mut config.directory,
        TransportConfig::Serial(config) => &mut config.path,
        TransportConfig::Ring(config) => &mut config.socket,
    };
    *path = base.join(&*path);
    transport
}

/// Every half in a process of its own; the seed goes to each over a pipe.
async fn run_processes(args: &SimArgs, jobs: &[Job], seed: &MasterSeed) -> Result<(), Failure> {
    let mut signals = Signals::new()?;
    let program = std::env::current_exe()?;
    let mut children = Vec::new();
    for job in jobs {
        let name = job.name.to_string();
        let child_args = [
            "sim".as_ref(),
            "--config".as_ref(),
            args.config.as_os_str(),
            "--half".as_ref(),
            name.as_ref(),
            "--seed-from-stdin".as_ref(),
            "--exit-with-stdin".as_ref(),
        ];
        let mut child = Process::start(&name, &program, child_args, None)?;
        child.hand_over(seed.0.as_bytes()).await?;
        child.hand_over(b"\n").await?;
        children.push(child);
    }
    let mut look = tokio::time::interval(Duration::from_millis(100));
    let mut result = Ok(());
    while !children.is_empty() && result.is_ok() {
        tokio::select! {
            _ = signals.next() => break,
            _ = look.tick() => {}
        }
        let mut running = Vec::new();
        for mut child in children {
            match child.ended()? {
                None => running.push(child),
                Some(status) if status.success() => {}
                Some(_) => result = Err(Failure::SimProcess(child.name().to_owned())),
            }
        }
        children = running;
    }
    for child in children {
        child.stop().await?;
    }
    result
}

/// A half that plays in a thread.
struct Player {
    name: String,
    stats: Arc<Stats>,
    thread: thread::JoinHandle<()>,
    before: Snapshot,
}

/// Every half in a thread, until all are done or a signal comes.
async fn run_threads(jobs: Vec<Job>, live: bool) -> Result<(), Failure> {
    let mut signals = Signals::new()?;
    let stop = Arc::new(AtomicBool::new(false));
    let (ended, mut ends) = mpsc::unbounded_channel();
    let mut players = Vec::new();
    for job in jobs {
        players.push(Player::start(job, &stop, &ended)?);
    }
    drop(ended);
    let mut view = View::new(&players, live);
    let mut tick = tokio::time::interval(view.every());
    let mut result = Ok(());
    loop {
        tokio::select! {
            _ = signals.next() => break,
            _ = tick.tick() => view.show(&mut players),
            end = ends.recv() => match end {
                Some((_, Ok(()))) => {}
                Some((half, Err(source))) => {
                    result = Err(Failure::Sim { half, source });
                    break;
                }
                None => break,
            },
        }
    }
    // ORDERING: Relaxed; the flag stands by itself.
    stop.store(true, Ordering::Relaxed);
    view.show(&mut players);
    for player in players {
        if let Err(panic) = player.thread.join() {
            std::panic::resume_unwind(panic);
        }
    }
    result
}

type End = (String, Result<(), RunError>);

impl Player {
    fn start(
        job: Job,
        stop: &Arc<AtomicBool>,
        ended: &mpsc::UnboundedSender<End>,
    ) -> io::Result<Self> {
        let name = job.name.to_string();
        let stats = Arc::new(Stats::default());
        let (half, stop, ended) = (name.clone(), stop.clone(), ended.clone());
        let counters = stats.clone();
        let thread = thread::Builder::new().spawn(move || {
            let result = qkd_sim_device::run(&job.config, &stop, &counters);
            let _ = ended.send((half, result));
        })?;
        Ok(Self {
            name,
            stats,
            thread,
            before: Snapshot::default(),
        })
    }
}

/// One line per half: redrawn on a terminal, printed every few seconds elsewhere.
struct View {
    bars: Vec<ProgressBar>,
    shown: Instant,
}

impl View {
    fn new(players: &[Player], live: bool) -> Self {
        let mut bars = Vec::new();
        if live {
            let all = MultiProgress::new();
            let style = ProgressStyle::with_template("{spinner} {msg}");
            let style = style.unwrap_or_else(|_| ProgressStyle::default_spinner());
            for _ in players {
                bars.push(all.add(ProgressBar::new_spinner().with_style(style.clone())));
            }
        }
        Self {
            bars,
            shown: Instant::now(),
        }
    }

    fn every(&self) -> Duration {
        if self.bars.is_empty() {
            Duration::from_secs(5)
        } else {
            Duration::from_millis(250)
        }
    }

    fn show(&mut self, players: &mut [Player]) {
        let seconds = self.shown.elapsed().as_secs_f64();
        self.shown = Instant::now();
        for (at, player) in players.iter_mut().enumerate() {
            let now = player.stats.snapshot();
            let line = line(&player.name, &player.before, &now, seconds);
            player.before = now;
            match self.bars.get(at) {
                Some(bar) => {
                    bar.set_message(line);
                    bar.tick();
                }
                None => println!("{line}"),
            }
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "for the eye")]
fn line(name: &str, before: &Snapshot, now: &Snapshot, seconds: f64) -> String {
    let bits = (now.delivered_bits - before.delivered_bits) as f64;
    let rate = if seconds > 0.01 { bits / seconds } else { 0.0 };
    format!(
        "{name:<40} {:<12} made {:>8}  delivered {:>8}  {:>9.1} kbit/s",
        if now.connected {
            "connected"
        } else {
            "waiting"
        },
        now.made,
        now.delivered,
        rate / 1e3,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_half_is_named_as_it_prints() {
        for text in ["mp1:transmitter", "a:b:receiver"] {
            assert_eq!(text.parse::<HalfName>().unwrap().to_string(), text);
        }
        for text in ["mp1", "mp1:both", ":receiver"] {
            assert!(text.parse::<HalfName>().is_err(), "{text}");
        }
    }

    #[test]
    fn pairs_of_one_seed_share_no_bits() {
        let seed = MasterSeed::try_from("0aB1".repeat(16)).unwrap();
        let first_bits = |name: &str| {
            let pair = PairConfig {
                seed: seed.of_pair(&name.parse().unwrap()),
                block_bits: 128,
                pace: Pace::Max,
                qber_ppm: 0,
                first_number: 0,
                blocks: None,
                faults: FaultConfig::default(),
            };
            let half = ModulePair::new(&pair).unwrap().half(Role::Receiver);
            half.block(0).unwrap().key().to_vec()
        };
        assert_eq!(first_bits("mp1"), first_bits("mp1"));
        assert_ne!(first_bits("mp1"), first_bits("mp2"));
        assert_ne!(*MasterSeed::fresh().0, *MasterSeed::fresh().0);
    }
}
