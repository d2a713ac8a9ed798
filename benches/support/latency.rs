//! Percentiles of response times, beside what criterion writes.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::json;

use super::{is_trial, output_folder};

/// Response times of one benchmark, in nanoseconds.
pub(crate) struct Latency(Histogram<u64>);

impl Latency {
    /// Three digits, from a microsecond to a minute.
    pub(crate) fn new() -> Self {
        Self(Histogram::new_with_bounds(1_000, 60_000_000_000, 3).unwrap())
    }

    pub(crate) fn record(&mut self, time: Duration) {
        self.0
            .saturating_record(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.0.add(&other.0).unwrap();
    }

    /// Prints the percentiles and writes `latency.json` into the benchmark's folder.
    pub(crate) fn write(&self, group: &str, benchmark: &str) {
        if self.0.is_empty() || is_trial() {
            return;
        }
        let at = |quantile| self.0.value_at_quantile(quantile) as f64 / 1e3;
        let [p50, p90, p99, p999] = [0.5, 0.9, 0.99, 0.999].map(at);
        println!("{group}/{benchmark}: p50 {p50:.0} us, p99 {p99:.0} us");
        let report = json!({
            "unit": "us", "requests": self.0.len(), "mean": self.0.mean() / 1e3,
            "p50": p50, "p90": p90, "p99": p99, "p99.9": p999, "max": self.0.max() as f64 / 1e3,
        });
        let folder = output_folder().join(group).join(benchmark);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("latency.json"), format!("{report:#}\n")).unwrap();
    }
}
