//! What is shown of halves that play: a table that is redrawn on a terminal, lines elsewhere, or JSON.

use std::{
    fmt::Display,
    io::{self, Write},
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use qkd_sim_device::{Note, NoteKind, Snapshot, Stats};
use serde_json::{Value, json};

/// How it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::command) enum Style {
    /// A table that is redrawn.
    Live,
    /// A line per half every few seconds.
    Plain,
    /// JSON documents, one a line.
    Json,
}

/// A half, as far as it is shown.
pub(super) struct Shown<'a> {
    pub(super) name: &'a str,
    pub(super) stats: &'a Stats,
    pub(super) before: &'a mut Snapshot,
}

/// One line per half, and one for whatever happened.
pub(super) struct View {
    style: Style,
    all: MultiProgress,
    bars: Vec<ProgressBar>,
    shown: Instant,
}

const HEADING: &str = "half                             state       key rate      QBER %  visib. %    °C      \
                       made  delivered   again  faults  events";

impl View {
    pub(super) fn new(halves: usize, style: Style) -> Self {
        let all = MultiProgress::new();
        let mut bars = Vec::new();
        if style == Style::Live {
            let plain = ProgressStyle::with_template("{msg}");
            let plain = plain.unwrap_or_else(|_| ProgressStyle::default_spinner());
            for _ in 0..=halves {
                bars.push(all.add(ProgressBar::new_spinner().with_style(plain.clone())));
            }
            bars[0].set_message(HEADING);
            bars[0].tick();
        }
        Self {
            style,
            all,
            bars,
            shown: Instant::now(),
        }
    }

    pub(super) fn every(&self) -> Duration {
        match self.style {
            Style::Live => Duration::from_millis(250),
            Style::Plain => Duration::from_secs(5),
            Style::Json => Duration::from_secs(1),
        }
    }

    /// Shows what the halves have done since the last time.
    pub(super) fn show<'a>(&mut self, halves: impl Iterator<Item = Shown<'a>>) {
        let seconds = self.shown.elapsed().as_secs_f64();
        self.shown = Instant::now();
        for (at, half) in halves.enumerate() {
            for note in half.stats.take_notes() {
                self.note(half.name, &note);
            }
            let now = half.stats.snapshot();
            let rate = rate(half.before, &now, seconds);
            match self.style {
                Style::Live => {
                    if let Some(bar) = self.bars.get(at + 1) {
                        bar.set_message(line(half.name, &now, rate));
                        bar.tick();
                    }
                }
                Style::Plain => say(&line(half.name, &now, rate)),
                Style::Json => say(&document(half.name, &now, rate)),
            }
            *half.before = now;
        }
    }

    fn note(&self, half: &str, note: &Note) {
        let text = match note.what {
            NoteKind::Fault { number, name } => {
                format!("{half}: {:.1} s: fault {name}, block {number}", note.at_s)
            }
            NoteKind::Event { name } => format!("{half}: {:.1} s: event {name}", note.at_s),
        };
        match self.style {
            // That the terminal has gone away is no reason to stop.
            Style::Live => self.all.println(text).unwrap_or(()),
            Style::Plain => say(&text),
            Style::Json => say(&note_document(half, note)),
        }
    }
}

/// Prints a line. That nobody reads it any more is no reason to stop playing.
pub(super) fn say(line: &impl Display) {
    let _ = writeln!(io::stdout().lock(), "{line}");
}

#[expect(clippy::cast_precision_loss, reason = "for the eye")]
fn rate(before: &Snapshot, now: &Snapshot, seconds: f64) -> f64 {
    let bits = (now.delivered_bits - before.delivered_bits) as f64;
    if seconds > 0.01 { bits / seconds } else { 0.0 }
}

fn line(name: &str, now: &Snapshot, rate: f64) -> String {
    let percent = |ppm: Option<u32>| match ppm {
        Some(ppm) => format!("{:.2}", f64::from(ppm) / 1e4),
        None => "-".to_owned(),
    };
    let temperature = match now.status.temperature_milli_celsius {
        Some(t) => format!("{:.1}", f64::from(t) / 1e3),
        None => "-".to_owned(),
    };
    let state = match (now.connected, now.status.state) {
        (false, _) => "waiting",
        (true, Some(state)) => state.name(),
        (true, None) => "connected",
    };
    format!(
        "{name:<32} {state:<10} {:>9.1} kb/s {:>6} {:>9} {temperature:>5} {:>9} {:>10} {:>7} {:>7} {:>7}",
        rate / 1e3,
        percent(now.status.qber_ppm),
        percent(now.status.visibility_ppm),
        now.made,
        now.delivered,
        now.sent_again,
        now.faults,
        now.events,
    )
}

fn document(name: &str, now: &Snapshot, rate: f64) -> Value {
    json!({
        "half": name,
        "connected": now.connected,
        "connections": now.connections,
        "state": now.status.state.map(|state| state.name()),
        "qber_ppm": now.status.qber_ppm,
        "key_rate_bits_per_s": now.status.key_rate_bits_per_s,
        "visibility_ppm": now.status.visibility_ppm,
        "temperature_milli_celsius": now.status.temperature_milli_celsius,
        "made": now.made,
        "withheld": now.withheld,
        "sent_again": now.sent_again,
        "delivered": now.delivered,
        "delivered_bits": now.delivered_bits,
        "delivered_bits_per_s": rate,
        "faults": now.faults,
        "events": now.events,
    })
}

fn note_document(half: &str, note: &Note) -> Value {
    match note.what {
        NoteKind::Fault { number, name } => {
            json!({"half": half, "at_s": note.at_s, "fault": name, "number": number})
        }
        NoteKind::Event { name } => json!({"half": half, "at_s": note.at_s, "event": name}),
    }
}
