//! `sim`: module pairs that play the hardware.

mod file;
mod rate;

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use qkd_sim_device::{RunError, Snapshot, Stats};
use tokio::sync::mpsc;

use super::{Failure, log, run::Signals};
use crate::{
    config::read_toml,
    process::{Process, end_with_stdin},
};
use file::{HalfName, Job, MasterSeed, SimFile};

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct SimArgs {
    #[command(subcommand)]
    command: Option<SimCommand>,
    /// The module pairs.
    #[arg(long, value_name = "FILE", required = true)]
    config: Option<PathBuf>,
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

/// What there is beside playing.
#[derive(Debug, clap::Subcommand)]
enum SimCommand {
    /// Print the secret key rate of a system over distance.
    #[command(after_help = "Examples:\n  qkd-bridge sim rate --preset gys\n  \
        qkd-bridge sim rate --list\n  \
        qkd-bridge sim rate --preset lim2014 --detections 1e9 --to 150 --step 10 --json\n  \
        qkd-bridge sim rate --preset geneva-2023 --svg rate.svg\n\n\
        A preset is paper-locked, with no parameter but its source's, or fitted to published rates: \
        then that it meets them says nothing.")]
    Rate(rate::RateArgs),
}

impl SimArgs {
    pub(super) fn run(self, levels: Option<&str>) -> Result<(), Failure> {
        match (&self.command, &self.config) {
            (Some(SimCommand::Rate(args)), _) => args.run(),
            (None, Some(config)) => self.play(config, levels),
            // The command line was not accepted without one of them.
            (None, None) => Ok(()),
        }
    }

    fn play(&self, config: &Path, levels: Option<&str>) -> Result<(), Failure> {
        let (mut file, _) = read_toml::<SimFile>(config)?;
        let _levels = log::start(levels.or(Some("warn")), None)?;
        let seed = match file.seed.take() {
            _ if self.seed_from_stdin => MasterSeed::from_stdin()?,
            Some(seed) => seed,
            None => MasterSeed::fresh(),
        };
        let jobs = file::jobs(config, file, &seed, &self.halves)?;
        if self.exit_with_stdin {
            end_with_stdin()?;
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        if self.processes {
            runtime.block_on(run_processes(config, &jobs, &seed))
        } else {
            drop(seed);
            let live = io::stdout().is_terminal() && !self.exit_with_stdin;
            runtime.block_on(run_threads(jobs, live))
        }
    }
}

/// Every half in a process of its own; the seed goes to each over a pipe.
async fn run_processes(config: &Path, jobs: &[Job], seed: &MasterSeed) -> Result<(), Failure> {
    let mut signals = Signals::new()?;
    let program = std::env::current_exe()?;
    let mut children = Vec::new();
    for job in jobs {
        let name = job.name.to_string();
        let child_args = [
            "sim".as_ref(),
            "--config".as_ref(),
            config.as_os_str(),
            "--half".as_ref(),
            name.as_ref(),
            "--seed-from-stdin".as_ref(),
            "--exit-with-stdin".as_ref(),
        ];
        let mut child = Process::start(&name, &program, child_args, None)?;
        child.hand_over(seed.digits()).await?;
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
