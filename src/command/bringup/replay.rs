//! `replay`: a trace, over a real transport, to a bridge.

use std::{
    fs::File,
    io::{BufReader, IsTerminal},
    os::unix::fs::FileTypeExt,
    path::PathBuf,
    time::Duration,
};

use qkd_sim_device::{
    Seed, TransportConfig, clavis2::Clavis2Config, files::FilesConfig, ring::RingConfig,
    serial::SerialConfig, trace::Trace,
};

use super::{BringUpError, runtime};
use crate::command::{
    Failure, log,
    sim::{Style, Task, run_threads},
};

#[derive(Debug, clap::Args)]
pub(in crate::command) struct ReplayArgs {
    /// The trace.
    trace: PathBuf,
    /// Where to: a serial port that is there, the path at which a pseudo-terminal is to be, the
    /// socket of a bridge, a folder, or the address at which a Clavis2's daemon is to be.
    #[arg(long, value_name = "PATH")]
    to: PathBuf,
    /// Over another transport than the recorded one.
    #[arg(long)]
    over: Option<Over>,
    /// Seconds of the trace in a second.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = speed)]
    speed: f64,
    /// Make the keys from this seed, 64 hexadecimal digits, in place of the trace's.
    #[arg(long, value_name = "HEX")]
    seed: Option<Seed>,
    /// Stop after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// Print JSON documents, one a line.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Over {
    Serial,
    Directory,
    SharedMemory,
    SharedMemoryFile,
    Clavis2,
}

fn speed(text: &str) -> Result<f64, &'static str> {
    let speed: f64 = text.parse().map_err(|_| "not a number")?;
    if (1e-3..=1e6).contains(&speed) {
        Ok(speed)
    } else {
        Err("0.001 to 1000000")
    }
}

impl ReplayArgs {
    pub(in crate::command) fn run(self, levels: Option<&str>) -> Result<(), Failure> {
        let _levels = log::start(levels.or(Some("warn")), None)?;
        let mut trace = self.read()?;
        if let Some(seed) = &self.seed {
            trace.set_seed(seed.clone());
        }
        let transport = self.transport(&trace)?;
        let style = match self.json {
            true => Style::Json,
            false if std::io::stdout().is_terminal() => Style::Live,
            false => Style::Plain,
        };
        let time = self.seconds.map_or(Duration::MAX, Duration::from_secs);
        let speed = self.speed;
        let task = Task::new("replay", move |stop, stats| {
            qkd_sim_device::replay(&trace, speed, &transport, stop, stats)
        });
        runtime()?.block_on(run_threads(vec![task], style, time))
    }

    fn read(&self) -> Result<Trace, BringUpError> {
        let path = self.trace.clone();
        let file = match File::open(&path) {
            Ok(file) => BufReader::new(file),
            Err(source) => return Err(BringUpError::File { path, source }),
        };
        Trace::read(file).map_err(|source| BringUpError::Trace { path, source })
    }

    fn transport(&self, trace: &Trace) -> Result<TransportConfig, BringUpError> {
        let over = self.over.unwrap_or(match trace.kind.as_str() {
            "directory" => Over::Directory,
            "shared-memory" => Over::SharedMemory,
            "shared-memory-file" => Over::SharedMemoryFile,
            "clavis2" => Over::Clavis2,
            // A key manager, or a driver of somebody's own: played over a line.
            _ => Over::Serial,
        });
        Ok(match over {
            Over::Serial => {
                let is_port = |metadata: std::fs::Metadata| metadata.file_type().is_char_device();
                let is_port = !self.to.is_symlink() && self.to.metadata().is_ok_and(is_port);
                let mut config = SerialConfig::new(&self.to);
                config.make_pty = !is_port;
                "replay".clone_into(&mut config.device);
                TransportConfig::Serial(config)
            }
            Over::Directory => TransportConfig::Files(FilesConfig::new(&self.to)),
            Over::SharedMemory => TransportConfig::Ring(RingConfig::Socket(self.to.clone())),
            Over::SharedMemoryFile => TransportConfig::Ring(RingConfig::File(self.to.clone())),
            Over::Clavis2 => {
                let to = self.to.to_string_lossy();
                let listen = to
                    .parse()
                    .map_err(|_| BringUpError::Address(to.into_owned()))?;
                TransportConfig::Clavis2(Clavis2Config::new(listen))
            }
        })
    }
}
