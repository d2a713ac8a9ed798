//! `sim rate`: the secret key rate of a system over distance.

use std::{fmt::Write as _, fs, io, path::PathBuf};

use qkd_sim_device::physics::{
    link::{Disturbance, Model, Rates, System},
    preset::{Preset, Score},
};
use serde_json::{Value, json};

use crate::command::Failure;

#[derive(Debug, clap::Args)]
pub(super) struct RateArgs {
    /// The system.
    #[arg(long, value_name = "NAME", required_unless_present = "list", value_parser = preset)]
    preset: Option<&'static Preset>,
    /// List the systems, each beside what was published of it.
    #[arg(long)]
    list: bool,
    /// First length of the fibre, in km.
    #[arg(long, value_name = "KM", default_value_t = 0.0, value_parser = not_negative)]
    from: f64,
    /// Last length, in km; where the key ends if left out.
    #[arg(long, value_name = "KM", value_parser = not_negative)]
    to: Option<f64>,
    /// Step, in km; a twentieth of the way if left out.
    #[arg(long, value_name = "KM", value_parser = positive)]
    step: Option<f64>,
    /// Pulses per second, in place of the system's.
    #[arg(long, value_name = "HZ", value_parser = positive)]
    clock: Option<f64>,
    /// Detections per block, in place of the system's (finite-size models).
    #[arg(long, value_name = "N", value_parser = positive)]
    detections: Option<f64>,
    /// Dead time of a detector, in nanoseconds, in place of the system's.
    #[arg(long, value_name = "NS", value_parser = not_negative)]
    dead_ns: Option<f64>,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    /// Write a plot to this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

fn preset(name: &str) -> Result<&'static Preset, String> {
    Preset::named(name).ok_or_else(|| {
        let names: Vec<_> = Preset::ALL.iter().map(|preset| preset.name).collect();
        format!("there are {}", names.join(", "))
    })
}

fn positive(text: &str) -> Result<f64, &'static str> {
    let number: f64 = text.parse().map_err(|_| "not a number")?;
    if number > 0.0 && number.is_finite() {
        Ok(number)
    } else {
        Err("must be above 0")
    }
}

fn not_negative(text: &str) -> Result<f64, &'static str> {
    if text.parse() == Ok(0.0) {
        return Ok(0.0);
    }
    positive(text)
}

/// Most lengths that are worked out.
const MAX_POINTS: usize = 10_000;

/// A length of fibre, and what the system delivers over it.
struct Point {
    km: f64,
    loss_db: f64,
    rates: Rates,
}

impl RateArgs {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let Some(preset) = self.preset.filter(|_| !self.list) else {
            return self.print_list();
        };
        let mut system = preset.system;
        self.change(&mut system);
        let points = self.points(&system);
        if let Some(path) = &self.svg {
            fs::write(path, svg(preset, &points))?;
        }
        if self.json {
            print_json(&json!({
                "preset": preset.name,
                "score": preset.score.name(),
                "changed": system != preset.system,
                "source": preset.source,
                "points": points.iter().map(Point::json).collect::<Vec<_>>(),
            }))?;
        } else {
            self.print_table(preset, &system, &points);
        }
        Ok(())
    }

    fn change(&self, system: &mut System) {
        system.clock_hz = self.clock.unwrap_or(system.clock_hz);
        system.dead_time.dead_ns = self.dead_ns.unwrap_or(system.dead_time.dead_ns);
        if let (Model::Finite { block, .. }, Some(detections)) =
            (&mut system.model, self.detections)
        {
            block.detections = detections;
        }
    }

    fn points(&self, system: &System) -> Vec<Point> {
        let to = self.to.unwrap_or_else(|| system.reach_km()).max(self.from);
        let step = self.step.unwrap_or_else(|| nice((to - self.from) / 20.0));
        let mut points = Vec::new();
        while points.len() < MAX_POINTS {
            #[expect(clippy::cast_precision_loss, reason = "at most MAX_POINTS")]
            let km = self.from + step * points.len() as f64;
            if km > to + step * 1e-9 && !points.is_empty() {
                break;
            }
            let loss_db = system.loss_db(km);
            points.push(Point {
                km,
                loss_db,
                rates: system.over(loss_db).rates(&Disturbance::default()),
            });
        }
        points
    }

    fn print_table(&self, preset: &Preset, system: &System, points: &[Point]) {
        println!("{}: {}", preset.name, preset.title);
        println!("{}", preset.source);
        match preset.score {
            Score::PaperLocked => println!("paper-locked: every parameter is its source's"),
            Score::Fitted(names) => {
                println!("fitted to the published rates: {}", names.join(", "));
            }
        }
        if *system != preset.system {
            println!("changed on the command line: no longer the published system");
        }
        println!();
        println!(
            "{:>8} {:>8} {:>12} {:>12} {:>12} {:>8} {:>8}",
            "km", "dB", "secret b/s", "sifted b/s", "per pulse", "QBER %", "live %"
        );
        for Point { km, loss_db, rates } in points {
            println!(
                "{km:>8.2} {loss_db:>8.2} {:>12} {:>12} {:>12.3e} {:>8.2} {:>8.1}",
                with_prefix(rates.secret_bits_per_s),
                with_prefix(rates.sifted_bits_per_s),
                rates.secret_per_pulse,
                rates.qber * 100.0,
                rates.live * 100.0,
            );
        }
        println!("\n{}", plot(points));
        if let Some(path) = &self.svg {
            println!("plot written to {}", path.display());
        }
    }

    fn print_list(&self) -> Result<(), Failure> {
        let mut list = Vec::new();
        // Of paper-locked and fitted presets: figures within a hundredth, and all.
        let mut scores = [[0_u32; 2]; 2];
        for preset in Preset::ALL {
            let comparisons = preset.compare();
            for comparison in &comparisons {
                let score = &mut scores[usize::from(preset.score != Score::PaperLocked)];
                score[0] += u32::from(comparison.deviation().abs() <= 0.01);
                score[1] += 1;
            }
            list.push((preset, comparisons));
        }
        let [[locked, locked_of], [fitted, fitted_of]] = scores;
        if self.json {
            let presets = list.iter().map(|(preset, comparisons)| {
                let figures = comparisons.iter().map(|c| {
                    json!({"what": c.what, "published": c.published, "computed": c.computed,
                        "deviation": c.deviation()})
                });
                json!({"name": preset.name, "title": preset.title, "source": preset.source,
                    "score": preset.score.name(), "figures": figures.collect::<Vec<_>>()})
            });
            return print_json(&json!({
                "presets": presets.collect::<Vec<_>>(),
                "within_1_percent": {
                    "paper-locked": {"figures": locked, "of": locked_of},
                    "fitted": {"figures": fitted, "of": fitted_of},
                },
            }));
        }
        for (preset, comparisons) in list {
            println!("{:<14} {}", preset.name, preset.title);
            println!("{:<14} {}: {}", "", preset.score.name(), preset.source);
            for c in comparisons {
                println!(
                    "{:<14} {:<52} published {:>10}, here {:>10} ({:+.1} %)",
                    "",
                    c.what,
                    short(c.published),
                    short(c.computed),
                    c.deviation() * 100.0
                );
            }
            println!();
        }
        println!("paper-locked: {locked} of {locked_of} published figures within 1 %");
        println!(
            "fitted: {fitted} of {fitted_of} within 1 %, which says nothing of the model: its \
             parameters were chosen for that"
        );
        Ok(())
    }
}

impl Point {
    fn json(&self) -> Value {
        let rates = &self.rates;
        json!({
            "km": self.km,
            "loss_db": self.loss_db,
            "secret_bits_per_s": rates.secret_bits_per_s,
            "secret_bits_per_pulse": rates.secret_per_pulse,
            "sifted_bits_per_s": rates.sifted_bits_per_s,
            "qber": rates.qber,
            "live": rates.live,
        })
    }
}

fn print_json(value: &Value) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(io::Error::from)?;
    println!("{text}");
    Ok(())
}

/// 1, 2 or 5 times a power of 10, at least `x`.
fn nice(x: f64) -> f64 {
    if x <= 0.0 {
        return 1.0;
    }
    let power = 10_f64.powf(x.log10().floor());
    let times = [1.0, 2.0, 5.0, 10.0].into_iter().find(|t| t * power >= x);
    times.unwrap_or(10.0) * power
}

fn with_prefix(rate: f64) -> String {
    for (unit, prefix) in [(1e9, "G"), (1e6, "M"), (1e3, "k")] {
        if rate >= unit {
            return format!("{:.3} {prefix}", rate / unit);
        }
    }
    format!("{rate:.3}  ")
}

/// A number of any size in few digits.
fn short(x: f64) -> String {
    if (1e-2..1e4).contains(&x.abs()) {
        format!("{x:.4}")
    } else {
        format!("{x:.4e}")
    }
}

/// Decades that a plot shows: from that of the least rate above 0 to that of the most.
fn decades(points: &[Point]) -> Option<(i32, i32)> {
    let logs = || {
        let rates = points.iter().map(|point| point.rates.secret_bits_per_s);
        rates.filter(|rate| *rate > 1e-6).map(f64::log10)
    };
    let (low, high) = (logs().reduce(f64::min)?, logs().reduce(f64::max)?);
    #[expect(clippy::cast_possible_truncation, reason = "logarithms are small")]
    let (low, high) = (low.floor() as i32, high.ceil() as i32);
    Some((low, high.max(low + 1)))
}

/// A logarithmic plot in letters.
fn plot(points: &[Point]) -> String {
    const ROWS: i32 = 16;
    let Some((low, high)) = decades(points) else {
        return "no key over any of these lengths".to_owned();
    };
    let mut text = String::new();
    let per_row = f64::from(high - low) / f64::from(ROWS);
    for row in (0..ROWS).rev() {
        let bottom = f64::from(low) + per_row * f64::from(row);
        let _ = write!(text, "{:>9} |", format!("1e{bottom:.1}"));
        for point in points {
            let rate = point.rates.secret_bits_per_s;
            let here = rate > 0.0 && rate.log10() >= bottom && rate.log10() < bottom + per_row;
            text.push_str(if here { " * " } else { "   " });
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    let _ = write!(text, "{:>9} +{}", "bit/s", "-".repeat(3 * points.len()));
    if let (Some(first), Some(last)) = (points.first(), points.last()) {
        let _ = write!(text, "\n{:>9}  {} to {:.1} km", "", first.km, last.km);
    }
    text
}

/// A logarithmic plot as a picture.
fn svg(preset: &Preset, points: &[Point]) -> String {
    const WIDTH: f64 = 640.0;
    const HEIGHT: f64 = 400.0;
    let (low, high) = decades(points).unwrap_or((0, 1));
    let first = points.first().map_or(0.0, |point| point.km);
    let last = points
        .last()
        .map_or(1.0, |point| point.km)
        .max(first + 1e-9);
    let x = |km: f64| 70.0 + (km - first) / (last - first) * WIDTH;
    let y = |log: f64| 40.0 + (f64::from(high) - log) / f64::from(high - low) * HEIGHT;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 740 500\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"740\" height=\"500\" fill=\"white\"/>\n\
         <text x=\"70\" y=\"24\">{} ({}): secret key rate, bit/s, over km of fibre</text>\n",
        preset.name,
        preset.score.name()
    );
    for decade in low..=high {
        let at = y(f64::from(decade));
        let _ = writeln!(
            text,
            "<path d=\"M70 {at:.1}H710\" stroke=\"#ddd\"/><text x=\"62\" y=\"{:.1}\" \
             text-anchor=\"end\">1e{decade}</text>",
            at + 4.0
        );
    }
    for tenth in 0..=10 {
        let km = first + (last - first) * f64::from(tenth) / 10.0;
        let at = x(km);
        let _ = writeln!(
            text,
            "<path d=\"M{at:.1} 40V440\" stroke=\"#eee\"/><text x=\"{at:.1}\" y=\"458\" \
             text-anchor=\"middle\">{km:.0}</text>"
        );
    }
    let mut line = String::new();
    for point in points {
        let rate = point.rates.secret_bits_per_s;
        if rate > 1e-6 {
            let step = if line.is_empty() { 'M' } else { 'L' };
            let _ = write!(line, "{step}{:.1} {:.1}", x(point.km), y(rate.log10()));
        }
    }
    let _ = writeln!(
        text,
        "<path d=\"{line}\" fill=\"none\" stroke=\"#06c\" stroke-width=\"2\"/>\n</svg>"
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round() {
        for (x, step) in [
            (7.1, 10.0),
            (0.3, 0.5),
            (1.0, 1.0),
            (15.0, 20.0),
            (0.0, 1.0),
        ] {
            assert!((nice(x) - step).abs() < 1e-9, "{x}");
        }
    }

    #[test]
    fn rates_have_a_prefix() {
        assert_eq!(with_prefix(115.8e6), "115.800 M");
        assert_eq!(with_prefix(12.0), "12.000  ");
    }
}
