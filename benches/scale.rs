//! `scale`: one process with 1, 64 and 1,024 module pairs.
//!
//! Question: does a QKD-key cost more when many module pairs deliver in turns? The whole stage of
//! `pipeline`, with keys of 4 KiB, so that what is done once per key (names, maps, queue) weighs as
//! much as it ever does. Every pair has its own stream of health tests. One thread.
//!
//! `cargo bench --bench scale -- --graph` measures in turns and draws `docs/scale.svg`.

use std::{fmt::Write, hint::black_box, time::Duration};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use qkd_bridge::bench::{
    pipeline::{Bridge, Device},
    turns::{Case, in_turns},
};
use qkd_kernels::Backend;

const PAIRS: [(usize, &str); 6] = [
    (1, "1"),
    (4, "4"),
    (16, "16"),
    (64, "64"),
    (256, "256"),
    (1024, "1,024"),
];

/// One driver block, one unit.
const KEY_BYTES: usize = 4 << 10;

fn scale(c: &mut Criterion) {
    let mut group = c.benchmark_group("scale");
    for (pairs, _) in PAIRS {
        let mut device = Device::of(KEY_BYTES);
        let mut bridge = Bridge::of(Backend::detect(), KEY_BYTES, KEY_BYTES, pairs);
        group.throughput(Throughput::Bytes(KEY_BYTES as u64));
        group.bench_function(BenchmarkId::new("stage", pairs), |b| {
            b.iter(|| bridge.segment(black_box(device.next_key())));
        });
    }
    group.finish();
}

/// Nanoseconds for a QKD-key, by number of module pairs, drawn.
fn graph() -> String {
    let mut cases: Vec<Case> = PAIRS
        .into_iter()
        .map(|(pairs, name)| {
            let mut device = Device::of(KEY_BYTES);
            let mut bridge = Bridge::of(Backend::detect(), KEY_BYTES, KEY_BYTES, pairs);
            Case::new(name, move || drop(bridge.segment(device.next_key())))
        })
        .collect();
    let nanos: Vec<f64> = in_turns(&mut cases, Duration::from_secs(3))
        .into_iter()
        .map(|seconds| seconds * 1e9)
        .collect();
    let most = nanos.iter().copied().fold(0.0, f64::max) * 1.2;
    let mut svg = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"640\" height=\"320\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"640\" height=\"320\" fill=\"white\"/>\n\
         <text x=\"60\" y=\"24\">nanoseconds for a QKD-key of 4 KiB, by number of module pairs \
         in one process</text>\n\
         <path d=\"M60 40V270H620\" fill=\"none\" stroke=\"black\"/>\n",
    );
    let mut line = String::new();
    for ((case, nanos), at) in cases.iter().zip(&nanos).zip(0_u32..) {
        let (x, y) = (100.0 + 96.0 * f64::from(at), 270.0 - 220.0 * nanos / most);
        println!("{} module pairs: {nanos:.0} ns a QKD-key", case.name);
        let _ = writeln!(
            svg,
            "<circle cx=\"{x}\" cy=\"{y:.1}\" r=\"4\"/>\
             <text x=\"{x}\" y=\"{:.1}\" text-anchor=\"middle\">{nanos:.0}</text>\
             <text x=\"{x}\" y=\"290\" text-anchor=\"middle\">{}</text>",
            y - 10.0,
            case.name
        );
        let _ = write!(line, "{} {x} {y:.1} ", if at == 0 { "M" } else { "L" });
    }
    let _ = writeln!(
        svg,
        "<path d=\"{line}\" fill=\"none\" stroke=\"black\"/>\n</svg>"
    );
    svg
}

criterion_group!(benches, scale);

fn main() {
    if std::env::args().any(|arg| arg == "--graph") {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/scale.svg");
        std::fs::write(path, graph()).expect("docs can be written");
        return;
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
