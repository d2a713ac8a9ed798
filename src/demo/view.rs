//! What is shown: a live line on a terminal, plain lines elsewhere.

use std::{
    io::{self, IsTerminal},
    path::Path,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::{
    Network, Running,
    load::{Counts, Tally},
    stock_bytes,
};

/// Time between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(2);

pub(super) struct View {
    start: Instant,
    /// None where standard output is no terminal.
    bar: Option<ProgressBar>,
    said: Option<Instant>,
    before: (Instant, u64),
}

type Statuses = [(String, Value)];

impl View {
    pub(super) fn new() -> Self {
        let style = ProgressStyle::with_template("{spinner} {msg}");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_spinner());
        let bar = io::stdout()
            .is_terminal()
            .then(|| ProgressBar::new_spinner().with_style(style));
        Self {
            start: Instant::now(),
            bar,
            said: None,
            before: (Instant::now(), 0),
        }
    }

    /// A line that stays.
    pub(super) fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| println!("{text}")),
            None => println!("{text}"),
        }
    }

    /// What is going on: redrawn on a terminal, a line now and then elsewhere.
    fn progress(&mut self, text: impl FnOnce() -> String) {
        if let Some(bar) = &self.bar {
            bar.set_message(text());
            bar.tick();
        } else if self.said.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
            self.said = Some(Instant::now());
            println!("[{:5.1} s] {}", self.start.elapsed().as_secs_f64(), text());
        }
    }

    pub(super) fn processes(&self, running: &Running) {
        let list = running
            .processes()
            .map(|(name, id)| format!("{name} ({id})"));
        let list: Vec<String> = list.collect();
        self.line(&format!("processes: {}", list.join(", ")));
    }

    pub(super) fn filling(&mut self, statuses: &Statuses, stock_bytes: u64, target_bytes: u64) {
        self.progress(|| {
            format!(
                "filling: {} of {} KiB end to end; {}",
                stock_bytes >> 10,
                target_bytes >> 10,
                state(statuses)
            )
        });
    }

    pub(super) fn memory(&self, statuses: &Statuses) {
        let unlocked: Vec<&str> = statuses
            .iter()
            .filter(|(_, status)| status["key_memory"]["locked"] == false)
            .map(|(node, _)| node.as_str())
            .collect();
        if !unlocked.is_empty() {
            self.line(&format!(
                "key memory of {} is NOT locked: the limit is too low (`ulimit -l`); \
                 the demonstration goes on, a real node would not start",
                unlocked.join(", ")
            ));
        }
    }

    pub(super) fn load(&mut self, counts: &Counts, statuses: &Statuses) {
        let (then, equal) = self.before;
        let seconds = then.elapsed().as_secs_f64();
        let text = format!(
            "{} keys compared, {:.0}/s; stock alice->bob {} KiB",
            counts.equal,
            rate(counts.equal - equal, seconds),
            stock_bytes(statuses, "alice", "bob") >> 10,
        );
        if seconds >= 1.0 {
            self.before = (Instant::now(), counts.equal);
        }
        self.progress(|| text);
    }

    pub(super) fn summary(&mut self, statuses: &Statuses, tally: &Tally, seconds: u64) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        println!(
            "\n{:<14} {:<6} {:>13} {:>10} {:>11} {:>13} {:>13}",
            "link", "at", "received KiB", "confirmed", "mismatched", "used as pad", "in stock KiB"
        );
        for (node, status) in statuses {
            for (stream, s) in status["streams"].as_object().into_iter().flatten() {
                print_stream(stream, node, s);
            }
        }
        let counts = tally.counts();
        println!(
            "\n{:<14} {:<6} {:>13} {:>10} {:>11} {:>13} {:>13}",
            "application", "at", "keys", "requests", "requests/s", "p50 ms", "p99 ms"
        );
        let given = [
            counts.equal + counts.different + counts.missing,
            counts.equal,
        ];
        let names = [("app-a", "alice"), ("app-b", "bob")];
        for (((app, node), keys), times) in names.into_iter().zip(given).zip(tally.times()) {
            println!(
                "{app:<14} {node:<6} {keys:>13} {:>10} {:>11.1} {:>13.2} {:>13.2}",
                times.requests,
                rate(times.requests as u64, seconds.max(1) as f64),
                times.p50.as_secs_f64() * 1e3,
                times.p99.as_secs_f64() * 1e3,
            );
        }
        println!(
            "\n{} relayed 256-bit keys in {seconds} s, compared: {} equal, {} different, {} at one \
             end only",
            given[0], counts.equal, counts.different, counts.missing
        );
        if counts.shortages + counts.breaks > 0 {
            println!(
                "{} requests came when there was not enough key (503), {} connections broke",
                counts.shortages, counts.breaks
            );
        }
    }

    /// Lines to paste.
    pub(super) fn how_to_go_on(&self, network: &Network, program: &Path) {
        let (program, dir) = (program.display(), network.dir.display());
        println!("\nThe network runs until Ctrl-C; its files stay in {dir}. Try:\n");
        let ends = ["app-a", "app-b"].map(|id| network.app(id));
        if let [Some(a), Some(b)] = ends {
            let curl = |app: &super::AppFiles, path: &str, body: &str| {
                let https = network.node(app.node.as_str()).map(|node| node.https);
                let https = https.map(|address| address.to_string()).unwrap_or_default();
                println!(
                    "curl --cacert {} --cert {} --key {} -H 'Content-Type: application/json' \\\n  \
                     -d '{body}' https://{https}/api/v1/keys/{path}",
                    network.ca.display(),
                    app.certificate.display(),
                    app.key.display(),
                );
            };
            curl(
                a,
                &format!("{}/enc_keys", b.id),
                r#"{"number": 1, "size": 256}"#,
            );
            println!("# and with the key_ID of its answer:");
            curl(
                b,
                &format!("{}/dec_keys", a.id),
                r#"{"key_IDs": [{"key_ID": "..."}]}"#,
            );
        }
        println!("{program} status --config {dir}/relay.toml");
        println!("# kill a node with `kill -9`, and start it again:");
        println!("{program} run --config {dir}/relay.toml\n");
    }
}

fn print_stream(stream: &str, node: &str, s: &Value) {
    let number = |name: &str| s[name].as_u64().unwrap_or(0);
    let stock = number("encrypting_bytes") + number("decrypting_bytes");
    println!(
        "{stream:<14} {node:<6} {:>13} {:>10} {:>11} {:>13} {:>13}",
        number("received_bits") >> 13,
        number("confirmed_segments"),
        number("mismatched_segments"),
        number("pad_bits") >> 13,
        stock >> 10,
    );
}

/// What nodes have and lack, in a few words.
pub(super) fn state(statuses: &Statuses) -> String {
    let mut words = Vec::new();
    for (node, status) in statuses {
        let links = status["streams"].as_object().into_iter().flatten();
        for (stream, s) in links.filter(|(stream, _)| stream.starts_with(&format!("{node}--"))) {
            let bytes = |name: &str| s[name].as_u64().unwrap_or(0);
            let stock = bytes("encrypting_bytes") + bytes("decrypting_bytes");
            words.push(format!("{stream} {} KiB", stock >> 10));
        }
        for (peer, up) in status["peers"].as_object().into_iter().flatten() {
            if up == false {
                words.push(format!("{node} has no connection to {peer}"));
            }
        }
    }
    if words.is_empty() {
        return "no node answers".to_owned();
    }
    words.join(", ")
}

#[expect(clippy::cast_precision_loss, reason = "for the eye")]
fn rate(count: u64, seconds: f64) -> f64 {
    count as f64 / seconds.max(0.01)
}
