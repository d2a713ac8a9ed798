//! Traces: what a driver saw of a hand-over, with the key left out, so that it can be sent to someone
//! and played again.
//!
//! A trace is lines of JSON. The first says what it is:
//!
//! ```json
//! {"format":"qkd-bridge-trace","version":1,"kind":"serial","seed":"<64 digits>"}
//! ```
//!
//! Each further line is an event of the driver, `t_us` microseconds after the first:
//!
//! | `event` | fields |
//! |---|---|
//! | `key` | `id`, `bits`; `qber_ppm`, `generated_at_unix_ns`, `defect`, `repeats` where there is something to tell |
//! | `empty` | `id` |
//! | `corrupt` | `class` (`checksum`, `incomplete`, `format`, `order`, `rights`, `ring`), `id` where known |
//! | `gap` | `blocks` |
//! | `attached` | `device`, `session` where it is told |
//! | `detached` | `reason` |
//! | `state` | `state` |
//! | `metric` | `name`, `value`, `band` |
//! | `alarm` | `code`, `severity` |
//!
//! No line holds a key bit, nor anything that was computed from key bits: of a damaged frame there is no
//! check sequence, and of a key only that it is `biased`, or that it `repeats` the bits of another ID.
//! The keys of a replay are made from `seed`, number and length. Two traces with equal seeds give equal
//! keys for equal numbers, so that two ends can be played.

use std::{
    io::{self, BufRead, Write},
    num::NonZeroU64,
};

use aws_lc_rs::cipher::DecryptingKey;
use qkd_handover::{
    block::MAX_KEY_BITS,
    status::{ModuleState, Status},
};
use qkd_keyfile::units::bytes_for_bits;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{
    config::Seed,
    dynamics::{EventConfig, Moment},
    faults::{Fault, WireFault},
    pair::{self, Block, Role, bias, generator, key_stream, mask_unused},
    script::Script,
};

/// The version that is written.
pub const VERSION: u32 = 1;

const FORMAT: &str = "qkd-bridge-trace";

/// Longest line, in bytes.
const MAX_LINE_BYTES: u64 = 64 * 1024;

/// Most lines that are read.
const MAX_ENTRIES: usize = 10_000_000;

/// What a trace begins with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Head {
    format: String,
    version: u32,
    /// The driver: `serial`, `shared-memory`, `directory` or another.
    pub kind: String,
    /// What the keys of a replay are made from.
    seed: String,
}

/// Something that a driver saw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Microseconds since the first.
    pub t_us: u64,
    /// What.
    #[serde(flatten)]
    pub what: What,
}

/// What a driver saw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum What {
    /// A key block.
    Key {
        /// Its ID.
        id: String,
        /// Its length.
        bits: u32,
        /// Its error rate.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        qber_ppm: Option<u32>,
        /// When the module made it, by the module's clock.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        generated_at_unix_ns: Option<i64>,
        /// `biased`, if it has far too many ones or zeros.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        defect: Option<String>,
        /// The ID of a key before that had the same bits.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        repeats: Option<String>,
    },
    /// A block without key.
    Empty {
        /// Its ID.
        id: String,
    },
    /// A block, frame or file that failed a check.
    Corrupt {
        /// Which check.
        class: String,
        /// Its ID, where it is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<String>,
    },
    /// Blocks were lost.
    Gap {
        /// How many.
        blocks: u64,
    },
    /// The module came within reach.
    Attached {
        /// Who it says it is.
        device: String,
        /// Its numbering.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        session: Option<u64>,
    },
    /// The module went out of reach.
    Detached {
        /// Why.
        reason: String,
    },
    /// What the module does.
    State {
        /// `starting`, `running`, `fault` or `stopped`.
        state: String,
    },
    /// A measured value.
    Metric {
        /// What was measured, with its unit.
        name: String,
        /// The value.
        value: i64,
        /// `ok`, `operation-out-of-range` or `absolute-out-of-range`.
        band: String,
    },
    /// Something that an operator should know.
    Alarm {
        /// What.
        code: String,
        /// How bad.
        severity: String,
    },
    /// Something that a later version has.
    #[serde(other)]
    Unknown,
}

/// A trace, read.
#[derive(Debug, Clone)]
pub struct Trace {
    /// What it is of.
    pub kind: String,
    seed: Seed,
    entries: Vec<Entry>,
}

/// Why a file is not a trace that can be played.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// It cannot be read.
    #[error("cannot be read")]
    Read(#[from] io::Error),
    /// Its first line is not that of a trace.
    #[error("not a trace: the first line does not say {{\"format\":\"{FORMAT}\",...}}")]
    NotATrace,
    /// A later version.
    #[error("a trace of version {found}; this program reads version {VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// The seed is none.
    #[error("the seed is not 64 hexadecimal digits")]
    Seed,
    /// A line cannot be read.
    #[error("line {line}: {what}")]
    Line {
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        what: String,
    },
}

/// Writes a trace.
#[derive(Debug)]
pub struct Recorder<W> {
    out: W,
}

impl<W: Write> Recorder<W> {
    /// Begins a trace; `seed`, 64 hexadecimal digits, makes the keys of a replay.
    ///
    /// # Errors
    ///
    /// The seed is none, or the file cannot be written.
    pub fn new(mut out: W, kind: &str, seed: &str) -> Result<Self, TraceError> {
        seed.parse::<Seed>().map_err(|_| TraceError::Seed)?;
        let head = Head {
            format: FORMAT.to_owned(),
            version: VERSION,
            kind: kind.to_owned(),
            seed: seed.to_owned(),
        };
        write_line(&mut out, &head)?;
        Ok(Self { out })
    }

    /// Adds an event.
    ///
    /// # Errors
    ///
    /// The file cannot be written; it ends with a line that may be incomplete.
    pub fn write(&mut self, entry: &Entry) -> Result<(), TraceError> {
        Ok(write_line(&mut self.out, entry)?)
    }

    /// Ends the trace, and gives back what it was written to.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn finish(mut self) -> Result<W, TraceError> {
        self.out.flush()?;
        Ok(self.out)
    }
}

fn write_line(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    out.write_all(&line)
}

impl Trace {
    /// Reads a trace.
    ///
    /// # Errors
    ///
    /// See [`TraceError`].
    pub fn read(mut file: impl BufRead) -> Result<Self, TraceError> {
        let head = next_line(&mut file, 1)?.ok_or(TraceError::NotATrace)?;
        let head: Head = serde_json::from_slice(&head).map_err(|_| TraceError::NotATrace)?;
        if head.format != FORMAT {
            return Err(TraceError::NotATrace);
        }
        if head.version != VERSION {
            return Err(TraceError::Version {
                found: head.version,
            });
        }
        let mut entries: Vec<Entry> = Vec::new();
        while let Some(bytes) = next_line(&mut file, entries.len() + 2)? {
            let line = entries.len() + 2;
            let refuse = |what: String| TraceError::Line { line, what };
            let entry: Entry =
                serde_json::from_slice(&bytes).map_err(|error| refuse(error.to_string()))?;
            if entries
                .last()
                .is_some_and(|before| before.t_us > entry.t_us)
            {
                return Err(refuse("before the line before".to_owned()));
            }
            if matches!(entry.what, What::Key { bits, .. } if bits == 0 || bits > MAX_KEY_BITS) {
                return Err(refuse(format!("a key has 1 to {MAX_KEY_BITS} bits")));
            }
            if entries.len() == MAX_ENTRIES {
                return Err(refuse(format!("more than {MAX_ENTRIES} events")));
            }
            entries.push(entry);
        }
        Ok(Self {
            kind: head.kind,
            seed: head.seed.parse().map_err(|_| TraceError::Seed)?,
            entries,
        })
    }

    /// What the driver saw, in order.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Makes the keys of a replay from another seed.
    pub fn set_seed(&mut self, seed: Seed) {
        self.seed = seed;
    }
}

fn next_line(file: &mut impl BufRead, line: usize) -> Result<Option<Vec<u8>>, TraceError> {
    let mut bytes = Vec::new();
    io::Read::take(&mut *file, MAX_LINE_BYTES).read_until(b'\n', &mut bytes)?;
    if bytes.is_empty() {
        return Ok(None);
    }
    if bytes.last() != Some(&b'\n') {
        let what = "cut off, or too long".to_owned();
        return Err(TraceError::Line { line, what });
    }
    Ok(Some(bytes))
}

/// A trace that is played.
pub(crate) struct TraceScript {
    generator: DecryptingKey,
    moments: Vec<(Moment, Play)>,
    /// From when on which status holds.
    statuses: Vec<(f64, Status)>,
    next: usize,
    speed: f64,
}

/// What is to be made at a moment.
#[derive(Debug, Clone, Copy, Default)]
struct Play {
    fault: Option<WireFault>,
    biased: bool,
    /// The number whose bits it has, if not its own.
    bits_of: Option<u64>,
}

impl TraceScript {
    /// `speed` seconds of the trace pass in a second.
    pub(crate) fn new(trace: &Trace, speed: f64) -> Self {
        let mut reader = Reader::new(trace);
        for entry in &trace.entries {
            reader.take(entry);
        }
        Self {
            generator: generator(&trace.seed),
            moments: reader.moments,
            statuses: reader.statuses,
            next: 0,
            speed,
        }
    }

    fn play(&self, moment: &Moment) -> Play {
        let at = usize::try_from(moment.index).ok();
        let found = at.and_then(|at| self.moments.get(at));
        found.map_or(Play::default(), |(_, play)| *play)
    }
}

/// Turns entries into what is to be played.
struct Reader {
    /// Whether IDs are hexadecimal epochs.
    is_hex: bool,
    /// Whether what failed a check is played by itself: files do not come again.
    has_files: bool,
    moments: Vec<(Moment, Play)>,
    statuses: Vec<(f64, Status)>,
    status: Status,
    session: Option<u64>,
    restarts: u32,
    generation: u32,
    number: Option<u64>,
    damage_next: bool,
    gap: u64,
}

impl Reader {
    fn new(trace: &Trace) -> Self {
        let has_files = trace.kind == "directory";
        Self {
            is_hex: has_files,
            has_files,
            moments: Vec::new(),
            statuses: Vec::new(),
            status: Status::default(),
            session: None,
            restarts: 0,
            generation: 0,
            number: None,
            damage_next: false,
            gap: 0,
        }
    }

    fn take(&mut self, entry: &Entry) {
        #[expect(
            clippy::cast_precision_loss,
            reason = "285 years have 2^53 microseconds"
        )]
        let at_s = entry.t_us as f64 / 1e6;
        match &entry.what {
            What::Key {
                id,
                bits,
                qber_ppm,
                defect,
                repeats,
                ..
            } => {
                let bits_of = repeats.as_deref().and_then(|id| self.parse(id));
                let fault =
                    std::mem::take(&mut self.damage_next).then_some(WireFault::Flip(1 << 31));
                let biased = defect.as_deref() == Some("biased");
                let play = Play {
                    fault,
                    biased,
                    bits_of,
                };
                let qber_ppm = qber_ppm.or(self.status.qber_ppm).unwrap_or(0);
                self.add(at_s, id, *bits, qber_ppm, play);
            }
            What::Empty { id } => self.add(at_s, id, 0, 0, Play::default()),
            What::Corrupt { id: Some(id), .. } if self.has_files => {
                let play = Play {
                    fault: Some(WireFault::HangUp),
                    ..Play::default()
                };
                self.add(at_s, id, 256, 0, play);
            }
            What::Corrupt { class, .. } => {
                self.damage_next |= matches!(class.as_str(), "checksum" | "ring");
            }
            What::Gap { blocks } => self.gap += blocks,
            What::Attached { session, .. } => {
                if self.session.is_some() && session.is_some() && *session != self.session {
                    self.generation += 1;
                    self.restarts += 1;
                }
                self.session = session.or(self.session);
            }
            What::Detached { .. } => self.restarts += u32::from(!self.damage_next),
            What::State { state } => {
                self.status.state = ModuleState::from_name(state);
                self.statuses.push((at_s, self.status.clone()));
            }
            What::Metric { name, value, .. } => {
                match name.as_str() {
                    "qber_ppm" => self.status.qber_ppm = u32::try_from(*value).ok(),
                    "key_rate_bps" => self.status.key_rate_bits_per_s = u64::try_from(*value).ok(),
                    "visibility_ppm" => self.status.visibility_ppm = u32::try_from(*value).ok(),
                    "temperature_mc" => {
                        self.status.temperature_milli_celsius = i32::try_from(*value).ok();
                    }
                    _ => {}
                }
                self.statuses.push((at_s, self.status.clone()));
            }
            What::Alarm { .. } | What::Unknown => {}
        }
    }

    fn parse(&self, id: &str) -> Option<u64> {
        let number = if self.is_hex {
            u64::from_str_radix(id, 16)
        } else {
            id.parse()
        };
        number.ok().filter(|number| *number < u64::MAX)
    }

    fn add(&mut self, at_s: f64, id: &str, key_bits: u32, qber_ppm: u32, play: Play) {
        // IDs that are no numbers are numbered in their order.
        let following = self.number.map_or(0, |number| number + 1);
        let number = self.parse(id).unwrap_or(following);
        // Blocks that the module dropped had numbers in between.
        for lost in following..number.min(following.saturating_add(std::mem::take(&mut self.gap))) {
            let play = Play {
                fault: Some(WireFault::Drop),
                ..Play::default()
            };
            self.push(at_s, lost, 256, qber_ppm, play);
        }
        self.push(at_s, number, key_bits, qber_ppm, play);
        self.number = Some(number);
    }

    fn push(&mut self, due_s: f64, number: u64, key_bits: u32, qber_ppm: u32, play: Play) {
        let moment = Moment {
            index: self.moments.len() as u64,
            number,
            generation: self.generation,
            restarts: self.restarts,
            due_s,
            key_bits,
            qber_ppm,
            clock_s: 0.0,
        };
        self.moments.push((moment, play));
    }
}

impl Script for TraceScript {
    fn session(&self, generation: u32) -> NonZeroU64 {
        pair::session(&self.generator, generation)
    }

    fn next(&mut self) -> Option<Moment> {
        let (moment, _) = self.moments.get(self.next)?;
        self.next += 1;
        Some(*moment)
    }

    fn rewind(&mut self) {
        self.next = 0;
    }

    fn make(&self, moment: &Moment) -> Option<Block> {
        let play = self.play(moment);
        let mut key = Zeroizing::new(vec![0; bytes_for_bits(moment.key_bits)]);
        let number = play.bits_of.unwrap_or(moment.number);
        key_stream(&self.generator, number, moment.generation, 0, &mut key);
        if play.biased {
            bias(&self.generator, number, moment.generation, &mut key);
        }
        mask_unused(&mut key, moment.key_bits);
        Some(Block::new(moment, moment.key_bits, play.fault, key))
    }

    fn fault(&self, moment: &Moment) -> Option<Fault> {
        let fault = self.play(moment).fault?;
        let role = Role::Transmitter;
        Some(Fault::OnTheWay { role, fault })
    }

    fn status(&self, at_s: f64) -> Status {
        let told = self.statuses.partition_point(|(from_s, _)| *from_s <= at_s);
        let status = told.checked_sub(1).map(|at| self.statuses[at].1.clone());
        status.unwrap_or_default()
    }

    fn events(&self) -> &[EventConfig] {
        &[]
    }

    fn time_scale(&self) -> f64 {
        self.speed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = r#"{"format":"qkd-bridge-trace","version":1,"kind":"serial","seed":"SEED"}"#;

    fn head() -> String {
        HEAD.replace("SEED", &"ab".repeat(32))
    }

    fn read(lines: &[&str]) -> Result<Trace, TraceError> {
        let text = [&[head().as_str()], lines].concat().join("\n") + "\n";
        Trace::read(text.as_bytes())
    }

    #[test]
    fn what_is_recorded_reads_back() {
        let entries = [
            What::Attached {
                device: "tx".to_owned(),
                session: Some(7),
            },
            What::Key {
                id: "12".to_owned(),
                bits: 1001,
                qber_ppm: Some(21_000),
                generated_at_unix_ns: None,
                defect: None,
                repeats: Some("3".to_owned()),
            },
            What::Corrupt {
                class: "checksum".to_owned(),
                id: None,
            },
            What::Gap { blocks: 2 },
        ];
        let mut recorder = Recorder::new(Vec::new(), "serial", &"ab".repeat(32)).unwrap();
        for (t_us, what) in (0..).zip(entries.clone()) {
            recorder.write(&Entry { t_us, what }).unwrap();
        }
        let bytes = recorder.finish().unwrap();
        let trace = Trace::read(&bytes[..]).unwrap();
        assert_eq!(trace.kind, "serial");
        let read: Vec<_> = trace
            .entries()
            .iter()
            .map(|entry| entry.what.clone())
            .collect();
        assert_eq!(read, entries);
    }

    #[test]
    fn what_is_no_trace_is_refused_with_its_line() {
        assert!(matches!(Trace::read(&b""[..]), Err(TraceError::NotATrace)));
        assert!(matches!(
            Trace::read(&b"{}\n"[..]),
            Err(TraceError::NotATrace)
        ));
        let later = head().replace("\"version\":1", "\"version\":2") + "\n";
        assert!(matches!(
            Trace::read(later.as_bytes()),
            Err(TraceError::Version { found: 2 })
        ));
        let good = r#"{"t_us":5,"event":"gap","blocks":1}"#;
        for bad in [
            r#"{"t_us":4,"event":"gap","blocks":1}"#,
            r#"{"t_us":9,"event":"gap"}"#,
            r#"{"t_us":9,"event":"key","id":"1","bits":0}"#,
            r#"{"t_us":9,"event":"key","id":"1","bits":4000000}"#,
            "no json",
        ] {
            let error = read(&[good, bad]).unwrap_err();
            assert!(
                matches!(error, TraceError::Line { line: 3, .. }),
                "{bad}: {error}"
            );
        }
        let cut = head() + "\n" + good;
        assert!(matches!(
            Trace::read(cut.as_bytes()),
            Err(TraceError::Line { line: 2, .. })
        ));
        let later = r#"{"t_us":9,"event":"news","of":"tomorrow"}"#;
        assert_eq!(
            read(&[good, later]).unwrap().entries()[1].what,
            What::Unknown
        );
    }

    #[test]
    fn a_replay_has_the_lengths_numbers_times_and_defects_of_the_trace() {
        let trace = read(&[
            r#"{"t_us":0,"event":"attached","device":"tx","session":1}"#,
            r#"{"t_us":1000000,"event":"key","id":"5","bits":1001,"qber_ppm":30000}"#,
            r#"{"t_us":1000001,"event":"corrupt","class":"checksum"}"#,
            r#"{"t_us":2000000,"event":"key","id":"6","bits":800,"defect":"biased"}"#,
            r#"{"t_us":2000001,"event":"gap","blocks":2}"#,
            r#"{"t_us":3000000,"event":"key","id":"9","bits":1001,"repeats":"5"}"#,
            r#"{"t_us":3500000,"event":"attached","device":"tx","session":2}"#,
            r#"{"t_us":4000000,"event":"empty","id":"0"}"#,
        ])
        .unwrap();
        let mut script = TraceScript::new(&trace, 1.0);
        let moments: Vec<_> = std::iter::from_fn(|| script.next()).collect();
        let numbers: Vec<_> = moments.iter().map(|moment| moment.number).collect();
        assert_eq!(numbers, [5, 6, 7, 8, 9, 0]);
        assert!((moments[1].due_s - 2.0).abs() < 1e-9);
        let blocks: Vec<_> = moments
            .iter()
            .map(|moment| script.make(moment).unwrap())
            .collect();
        assert_eq!(
            (blocks[0].key_bits, blocks[0].qber_ppm),
            (1001, Some(30_000))
        );
        assert!(matches!(blocks[1].fault, Some(WireFault::Flip(_))));
        let ones: u32 = blocks[1].key().iter().map(|byte| byte.count_ones()).sum();
        assert!((250..370).contains(&ones), "{ones}");
        assert_eq!(blocks[2].fault, Some(WireFault::Drop));
        assert_eq!(blocks[4].key(), blocks[0].key());
        assert_eq!(
            (
                moments[5].generation,
                moments[5].restarts,
                blocks[5].key_bits
            ),
            (1, 1, 0)
        );
        assert_eq!(
            TraceScript::new(&trace, 1.0)
                .make(&moments[0])
                .unwrap()
                .key(),
            blocks[0].key()
        );
    }
}
