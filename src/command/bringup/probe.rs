//! `probe`: what a module does, through its real driver.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use qkd_drivers::Event;
use serde::Serialize;

use super::{
    BringUpError, DeviceArgs, runtime,
    seen::{Memory, band, class, detach, first_word, is_biased, value},
};
use crate::command::{
    Failure, log,
    randomness::{Randomness, Tally},
};

#[derive(Debug, clap::Args)]
pub(in crate::command) struct ProbeArgs {
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// What was seen.
#[derive(Debug, Default, Serialize)]
struct Report {
    device: String,
    kind: String,
    seconds: f64,
    /// Who the module says it is.
    module: Option<String>,
    session: Option<u64>,
    state: Option<String>,
    /// Times that it came within reach.
    attached: u64,
    detached: BTreeMap<&'static str, u64>,
    key_blocks: u64,
    key_bits: u64,
    key_bits_per_s: f64,
    shortest_block_bits: Option<u32>,
    longest_block_bits: Option<u32>,
    first_id: Option<String>,
    last_id: Option<String>,
    longest_pause_ms: u64,
    empty_blocks: u64,
    gap_blocks: u64,
    /// Blocks, frames and files that failed a check, by which.
    corrupt: BTreeMap<&'static str, u64>,
    alarms: BTreeMap<String, u64>,
    values: BTreeMap<String, Measured>,
    /// Over all keys, each by itself.
    randomness: Option<Randomness>,
    biased_blocks: u64,
    /// Blocks whose bits had come before.
    repeated_blocks: u64,
    /// Why it cannot be read any more.
    problem: Option<String>,
}

/// A measured value.
#[derive(Debug, Serialize)]
struct Measured {
    last: i64,
    least: i64,
    most: i64,
    band: &'static str,
}

impl ProbeArgs {
    pub(in crate::command) fn run(self, levels: Option<&str>) -> Result<(), Failure> {
        let _levels = log::start(levels.or(Some("warn")), None)?;
        let (kind, config) = self.device.driver()?;
        let runtime = runtime()?;
        let mut report = Report {
            device: self.device.name(),
            kind,
            ..Report::default()
        };
        let result = runtime.block_on(async {
            let mut source = config.open().map_err(BringUpError::from)?;
            report.watch(&self.device, &mut *source).await
        });
        match &result {
            Ok(()) => {}
            Err(error @ BringUpError::Read(_)) => {
                report.problem = Some(crate::command::chain(error));
            }
            Err(_) => return Ok(result?),
        }
        if self.json {
            let text = serde_json::to_string_pretty(&report).map_err(std::io::Error::from)?;
            println!("{text}");
        } else {
            report.print(self.device.consume);
        }
        result?;
        if report.attached == 0 && report.key_blocks == 0 {
            let seconds = self.device.seconds;
            return Err(BringUpError::Silent { seconds }.into());
        }
        Ok(())
    }
}

impl Report {
    async fn watch(
        &mut self,
        device: &DeviceArgs,
        source: &mut dyn qkd_drivers::KeySource,
    ) -> Result<(), BringUpError> {
        let (mut memory, mut tally) = (Memory::new(), Tally::default());
        let start = Instant::now();
        let mut last_key = None;
        let result = device
            .watch(source, |event, key| {
                if let Event::Key(block) = event {
                    let id = block.metadata.qkd_key_id.to_string();
                    tally.add(key, block.key_bits);
                    self.biased_blocks += u64::from(is_biased(key, block.key_bits));
                    self.repeated_blocks += u64::from(memory.seen(&id, key).is_some());
                    let now = Instant::now();
                    let before = last_key.replace(now).unwrap_or(now);
                    self.pause(now - before);
                }
                self.take(event);
                Ok(())
            })
            .await;
        self.seconds = start.elapsed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "for the eye")]
        let bits = self.key_bits as f64;
        self.key_bits_per_s = bits / self.seconds.max(1e-3);
        self.randomness = tally.randomness();
        result
    }

    fn pause(&mut self, pause: Duration) {
        let ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        self.longest_pause_ms = self.longest_pause_ms.max(ms);
    }

    fn take(&mut self, event: &Event) {
        match event {
            Event::Key(block) => {
                let bits = block.key_bits;
                self.key_blocks += 1;
                self.key_bits += u64::from(bits);
                self.shortest_block_bits =
                    Some(self.shortest_block_bits.map_or(bits, |b| b.min(bits)));
                self.longest_block_bits =
                    Some(self.longest_block_bits.map_or(bits, |b| b.max(bits)));
                let id = block.metadata.qkd_key_id.to_string();
                self.first_id.get_or_insert_with(|| id.clone());
                self.last_id = Some(id);
            }
            Event::Empty { .. } => self.empty_blocks += 1,
            Event::Metric(metric) => {
                let (name, now) = value(&metric.value);
                let band = band(metric.band);
                let measured = self.values.entry(name).or_insert(Measured {
                    last: now,
                    least: now,
                    most: now,
                    band,
                });
                measured.last = now;
                measured.least = measured.least.min(now);
                measured.most = measured.most.max(now);
                measured.band = band;
            }
            Event::State(state) => self.state = Some(state.name().to_owned()),
            Event::Alarm(alarm) => {
                let code = first_word(&format!("{:?}", alarm.code));
                *self.alarms.entry(code).or_default() += 1;
            }
            Event::Gap { blocks } => self.gap_blocks += blocks,
            Event::Corrupt { reason, .. } => *self.corrupt.entry(class(reason)).or_default() += 1,
            Event::Detached { reason } => {
                *self.detached.entry(detach(reason)).or_default() += 1;
            }
            Event::Attached { device, session } => {
                self.attached += 1;
                self.module = Some(device.clone());
                self.session = *session;
            }
            _ => {}
        }
    }

    fn print(&self, consumed: bool) {
        let line = |name: &str, value: String| println!("{name:<14} {value}");
        let counts = |counts: &BTreeMap<&str, u64>| {
            let parts = counts.iter().map(|(name, count)| format!("{count} {name}"));
            parts.collect::<Vec<_>>().join(", ")
        };
        line("device", format!("{} ({})", self.device, self.kind));
        line("looked for", format!("{:.1} s", self.seconds));
        match &self.module {
            Some(module) => line("module", module.clone()),
            None => line("module", "has not answered".to_owned()),
        }
        if let Some(state) = &self.state {
            line("state", state.clone());
        }
        if self.attached > 1 || !self.detached.is_empty() {
            let lost = counts(&self.detached);
            line(
                "reach",
                format!("attached {} times; lost: {lost}", self.attached),
            );
        }
        line(
            "key",
            format!(
                "{} blocks, {} bits, {:.0} bit/s; longest pause {} ms",
                self.key_blocks, self.key_bits, self.key_bits_per_s, self.longest_pause_ms
            ),
        );
        if let (Some(shortest), Some(longest)) = (self.shortest_block_bits, self.longest_block_bits)
        {
            line("block", format!("{shortest} to {longest} bits"));
        }
        if let (Some(first), Some(last)) = (&self.first_id, &self.last_id) {
            line("IDs", format!("{first} to {last}"));
        }
        line(
            "lost",
            format!("{} blocks, by the module's numbers", self.gap_blocks),
        );
        line("empty", format!("{} blocks", self.empty_blocks));
        let corrupt = if self.corrupt.is_empty() {
            "none".to_owned()
        } else {
            counts(&self.corrupt)
        };
        line("damaged", corrupt);
        for (code, count) in &self.alarms {
            line("alarm", format!("{code}, {count} times"));
        }
        for (name, measured) in &self.values {
            line(
                name,
                format!(
                    "{} ({} to {}; {})",
                    measured.last, measured.least, measured.most, measured.band
                ),
            );
        }
        if let Some(random) = &self.randomness {
            for (name, value) in random.lines() {
                line(name, value);
            }
            line(
                "suspicious",
                format!(
                    "{} biased, {} repeated blocks",
                    self.biased_blocks, self.repeated_blocks
                ),
            );
        }
        let fate = match consumed {
            true => "were taken and wiped",
            false => "stay with the module (--consume takes them)",
        };
        line("these keys", fate.to_owned());
        if let Some(problem) = &self.problem {
            line("problem", problem.clone());
        }
    }
}
