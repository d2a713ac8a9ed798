//! `sim`: module pairs that play the hardware.

mod file;
mod rate;
mod view;

use std::{
    ffi::OsStr,
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use qkd_sim_device::{RunError, Snapshot, Stats};
use tokio::sync::mpsc;

use super::{Failure, log, run::Signals};
use crate::{
    config::read_toml,
    process::{Process, end_with_stdin},
};
use file::{HalfName, Job, MasterSeed, SimFile};
pub(super) use view::Style;
use view::{Shown, View, say};

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct SimArgs {
    #[command(subcommand)]
    command: Option<SimCommand>,
    /// The module pairs.
    #[arg(long, value_name = "FILE", required_unless_present = "example")]
    config: Option<PathBuf>,
    /// Print a file of module pairs with every setting explained.
    #[arg(long)]
    example: bool,
    /// Draw everything from this seed, 64 hexadecimal digits, in place of the file's.
    #[arg(long, value_name = "HEX")]
    seed: Option<MasterSeed>,
    /// Stop after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// Print JSON documents, one a line: every fault and event, and every second how each half is.
    #[arg(long)]
    json: bool,
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
            _ if self.example => {
                print!("{EXAMPLE}");
                Ok(())
            }
            (None, Some(config)) => self.play(config, levels),
            // The command line was not accepted without one of them.
            (None, None) => Ok(()),
        }
    }

    fn play(&self, config: &Path, levels: Option<&str>) -> Result<(), Failure> {
        let (mut file, _) = read_toml::<SimFile>(config)?;
        let _levels = log::start(levels.or(Some("warn")), None)?;
        let seed = match (self.seed.clone(), file.seed.take()) {
            _ if self.seed_from_stdin => MasterSeed::from_stdin()?,
            (Some(seed), _) | (None, Some(seed)) => seed,
            (None, None) => MasterSeed::fresh(),
        };
        let jobs = file::jobs(config, file, &seed, &self.halves)?;
        if self.exit_with_stdin {
            end_with_stdin()?;
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        // Whoever hands the seed over in secret does not want it told.
        if !self.seed_from_stdin {
            self.tell_seed(&seed);
        }
        let time = self.seconds.map_or(Duration::MAX, Duration::from_secs);
        if self.processes {
            runtime.block_on(run_processes(self, config, &jobs, &seed, time))
        } else {
            drop(seed);
            let style = match self.json {
                true => Style::Json,
                false if io::stdout().is_terminal() && !self.exit_with_stdin => Style::Live,
                false => Style::Plain,
            };
            let tasks = jobs.into_iter().map(Task::from).collect();
            runtime.block_on(run_threads(tasks, style, time))
        }
    }

    fn tell_seed(&self, seed: &MasterSeed) {
        let digits = seed.text();
        if self.json {
            say(&serde_json::json!({"seed": digits}));
        } else {
            say(&format!(
                "seed {digits} (with --seed it makes the same blocks and faults again)"
            ));
        }
    }
}

/// A file of module pairs, explained.
const EXAMPLE: &str = include_str!("example.toml");

/// Every half in a process of its own; the seed goes to each over a pipe.
async fn run_processes(
    args: &SimArgs,
    config: &Path,
    jobs: &[Job],
    seed: &MasterSeed,
    time: Duration,
) -> Result<(), Failure> {
    let mut signals = Signals::new()?;
    let program = std::env::current_exe()?;
    let mut children = Vec::new();
    for job in jobs {
        let name = job.name.to_string();
        let mut child_args: Vec<&OsStr> = vec![
            "sim".as_ref(),
            "--config".as_ref(),
            config.as_os_str(),
            "--half".as_ref(),
            name.as_ref(),
            "--seed-from-stdin".as_ref(),
            "--exit-with-stdin".as_ref(),
        ];
        if args.json {
            child_args.push("--json".as_ref());
        }
        let mut child = Process::start(&name, &program, child_args, None)?;
        child.hand_over(seed.digits()).await?;
        child.hand_over(b"\n").await?;
        children.push(child);
    }
    let mut look = tokio::time::interval(Duration::from_millis(100));
    let mut end = pin!(tokio::time::sleep(time));
    let mut result = Ok(());
    while !children.is_empty() && result.is_ok() {
        tokio::select! {
            _ = signals.next() => break,
            () = &mut end => break,
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

/// Something that plays until it is asked to stop.
pub(super) struct Task {
    name: String,
    play: Box<Play>,
}

type Play = dyn FnOnce(&AtomicBool, &Stats) -> Result<(), RunError> + Send;

impl Task {
    pub(super) fn new(
        name: impl Into<String>,
        play: impl FnOnce(&AtomicBool, &Stats) -> Result<(), RunError> + Send + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            play: Box::new(play),
        }
    }
}

impl From<Job> for Task {
    fn from(job: Job) -> Self {
        let config = job.config;
        Self::new(job.name.to_string(), move |stop, stats| {
            qkd_sim_device::run(&config, stop, stats)
        })
    }
}

/// A task in its thread.
struct Player {
    name: String,
    stats: Arc<Stats>,
    thread: Option<thread::JoinHandle<()>>,
    before: Snapshot,
}

/// Every task in a thread, until all are done or a signal comes.
pub(super) async fn run_threads(
    tasks: Vec<Task>,
    style: Style,
    time: Duration,
) -> Result<(), Failure> {
    let mut signals = Signals::new()?;
    let stop = Arc::new(AtomicBool::new(false));
    let (ended, mut ends) = mpsc::unbounded_channel();
    let mut players = Vec::new();
    for task in tasks {
        players.push(Player::start(task, &stop, &ended)?);
    }
    drop(ended);
    let mut view = View::new(players.len(), style);
    let mut end = pin!(tokio::time::sleep(time));
    let mut tick = tokio::time::interval(view.every());
    let mut result = Ok(());
    loop {
        tokio::select! {
            _ = signals.next() => break,
            () = &mut end => break,
            _ = tick.tick() => view.show(players.iter_mut().map(Player::shown)),
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
    for player in &mut players {
        if let Some(Err(panic)) = player.thread.take().map(thread::JoinHandle::join) {
            std::panic::resume_unwind(panic);
        }
    }
    view.show(players.iter_mut().map(Player::shown));
    result
}

type End = (String, Result<(), RunError>);

impl Player {
    fn start(
        task: Task,
        stop: &Arc<AtomicBool>,
        ended: &mpsc::UnboundedSender<End>,
    ) -> io::Result<Self> {
        let Task { name, play } = task;
        let stats = Arc::new(Stats::default());
        let (half, stop, ended) = (name.clone(), stop.clone(), ended.clone());
        let counters = stats.clone();
        let thread = thread::Builder::new().spawn(move || {
            let result = play(&stop, &counters);
            let _ = ended.send((half, result));
        })?;
        Ok(Self {
            name,
            stats,
            thread: Some(thread),
            before: Snapshot::default(),
        })
    }

    fn shown(&mut self) -> Shown<'_> {
        Shown {
            name: &self.name,
            stats: &self.stats,
            before: &mut self.before,
        }
    }
}
