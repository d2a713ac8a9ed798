//! `record`: a trace of what a module does, without its keys.

use std::{
    fs::OpenOptions,
    io::{BufWriter, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    time::Instant,
};

use qkd_keyfile::Entropy;
use qkd_sim_device::trace::{Entry, Recorder, TraceError};

use super::{
    BringUpError, DeviceArgs, runtime,
    seen::{Memory, what},
};
use crate::{
    command::{Failure, log},
    env::SystemEntropy,
};

#[derive(Debug, clap::Args)]
pub(in crate::command) struct RecordArgs {
    #[command(flatten)]
    device: DeviceArgs,
    /// The trace; a file that is there is not overwritten.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// What the keys of a replay are made from, 64 hexadecimal digits; give both ends of a module pair
    /// the same. Without it, a fresh one.
    #[arg(long, value_name = "HEX")]
    seed: Option<String>,
}

impl RecordArgs {
    pub(in crate::command) fn run(self, levels: Option<&str>) -> Result<(), Failure> {
        let _levels = log::start(levels.or(Some("warn")), None)?;
        let (kind, config) = self.device.driver()?;
        let trace_error = |source| BringUpError::Trace {
            path: self.output.clone(),
            source,
        };
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.output)
            .map_err(|error| trace_error(error.into()))?;
        let seed = self.seed.clone().unwrap_or_else(fresh_seed);
        let recorder = Recorder::new(BufWriter::new(file), &kind, &seed);
        let mut recorder = recorder.map_err(trace_error)?;
        let mut memory = Memory::new();
        let mut first = None;
        let mut events = 0_u64;
        runtime()?.block_on(async {
            let mut source = config.open().map_err(BringUpError::from)?;
            let record = self.device.watch(&mut *source, |event, key| {
                let now = Instant::now();
                let since = now - *first.get_or_insert(now);
                events += 1;
                let entry = Entry {
                    t_us: u64::try_from(since.as_micros()).unwrap_or(u64::MAX),
                    what: what(event, key, &mut memory),
                };
                recorder.write(&entry).map_err(trace_error)
            });
            record.await
        })?;
        let mut file = recorder.finish().map_err(trace_error)?;
        file.flush()
            .map_err(|error| trace_error(TraceError::Read(error)))?;
        println!(
            "{events} events in {}; no key is in it",
            self.output.display()
        );
        Ok(())
    }
}

fn fresh_seed() -> String {
    use std::fmt::Write as _;
    let mut bytes = [0; 32];
    SystemEntropy.fill(&mut bytes);
    bytes.iter().fold(String::new(), |mut text, byte| {
        // A string takes all.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
