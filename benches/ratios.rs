//! `ratios`: the goals of `docs/benchmarks.md`, in half a minute and on a machine that is not idle.
//!
//! Question: do the promised ratios hold here? The cases of a group take turns in short bursts, and
//! the fastest burst of each counts: what else runs on the machine slows all cases alike, and the
//! minimum sees through it. Criterion's benches measure the same code one case after another, with
//! statistics, and want an idle machine. `-- --test` runs every case once.

mod cases;

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use cases::{health, noise, otp_relay, pipeline, sha256_units};
use qkd_kernels::{Backend, HealthState};

/// Long enough for the clock, short enough to fall between two time slices.
const BURST: Duration = Duration::from_micros(500);
const ROUNDS: usize = 150;

/// What is timed, by name.
type Case<'a> = (&'a str, Box<dyn FnMut() + 'a>);

/// `fast` is at least `least` times as fast as `slow`.
struct Goal {
    fast: &'static str,
    slow: &'static str,
    least: f64,
}

const fn goal(fast: &'static str, least: f64, slow: &'static str) -> Goal {
    Goal { fast, slow, least }
}

fn main() {
    let once = std::env::args().any(|arg| arg == "--test");
    let backend = Backend::detect();
    println!("backend {}", backend.name());
    xor(once);
    sha256(once);
    otp(once);
    health(once);
    stage(once);
}

fn xor(once: bool) {
    for size in [64 << 10, 1 << 20] {
        let pad = noise(size, 1);
        let (mut copy, mut data) = (noise(size, 2), noise(size, 3));
        let cases: Vec<Case<'_>> = vec![
            (
                "memcpy",
                Box::new(|| black_box(&mut copy[..]).copy_from_slice(black_box(&pad))),
            ),
            (
                "best",
                Box::new(|| Backend::detect().xor_in_place(black_box(&mut data), black_box(&pad))),
            ),
        ];
        report(
            "xor",
            size,
            size,
            cases,
            &[goal("best", 0.9, "memcpy")],
            once,
        );
    }
}

fn sha256(once: bool) {
    for unit_bytes in [32, 256, 4 << 10, 64 << 10] {
        let units = ((128 << 10) / unit_bytes).max(16);
        let data = noise(units * unit_bytes, 1);
        let mut rival = vec![[0; 32]; units];
        let (data, bytes) = (&data[..], data.len());
        let mut cases: Vec<Case<'_>> = vec![(
            "sha2",
            Box::new(move || sha256_units::one_by_one(black_box(data), unit_bytes, &mut rival)),
        )];
        for backend in Backend::all() {
            sha256_units::check(backend, data, unit_bytes);
            let mut digests = vec![[0; 32]; units];
            cases.push((
                backend.name(),
                Box::new(move || {
                    backend.sha256_units(black_box(data), unit_bytes, black_box(&mut digests));
                }),
            ));
        }
        let with_avx512 = if unit_bytes == 32 { 2.8 } else { 2.0 };
        let goals = [
            goal("avx512", with_avx512, "sha2"),
            goal("sha_ni", 1.2, "sha2"),
            // The same code in the end: 1, up to what two runs differ by.
            goal("portable", 0.98, "sha2"),
        ];
        report("sha256_units", unit_bytes, bytes, cases, &goals, once);
    }
}

fn otp(once: bool) {
    let backend = Backend::detect();
    let key = backend.tag_key(&otp_relay::KEY);
    let (hmac, polyval) = (otp_relay::hmac(), otp_relay::polyval());
    for size in [4 << 10, 64 << 10, 1 << 20] {
        otp_relay::check(backend, &key, &polyval, size);
        let cases: Vec<Case<'_>> = vec![
            hop("naive", size, |data, pad| {
                black_box(otp_relay::naive(&hmac, data, pad));
            }),
            hop("zip_polyval", size, |data, pad| {
                black_box(otp_relay::zip_polyval(&polyval, data, pad));
            }),
            hop("passes", size, |data, pad| {
                black_box(otp_relay::passes(backend, &key, data, pad));
            }),
            hop("fused", size, |data, pad| {
                black_box(key.encrypt_tag_and_wipe(&otp_relay::HEADER, data, pad));
            }),
        ];
        let goals = [
            goal("fused", 15.0, "naive"),
            goal("fused", 3.0, "zip_polyval"),
            goal("fused", 1.3, "passes"),
        ];
        // What is larger than the caches is bound by memory, and has no goal but the last.
        let goals = if size > 64 << 10 {
            &goals[2..]
        } else {
            &goals[..]
        };
        report("otp_relay", size, size, cases, goals, once);
    }
}

/// A relay's step on buffers of its own.
fn hop<'a>(name: &'a str, size: usize, step: impl Fn(&mut [u8], &mut [u8]) + 'a) -> Case<'a> {
    let (mut data, mut pad) = (noise(size, 1), noise(size, 2));
    let hop = move || step(black_box(&mut data), black_box(&mut pad));
    (name, Box::new(hop))
}

fn health(once: bool) {
    for size in [4 << 10, 64 << 10] {
        let data = noise(size, 1);
        let data = &data[..];
        let mut textbook = health::Textbook::default();
        let mut cases: Vec<Case<'_>> = vec![(
            "bytes",
            Box::new(move || {
                black_box(textbook.health(black_box(data)));
            }),
        )];
        for backend in Backend::all() {
            health::check(backend, data);
            let mut state = HealthState::new();
            cases.push((
                backend.name(),
                Box::new(move || {
                    black_box(backend.health(&mut state, black_box(data)));
                }),
            ));
        }
        let goals = [
            goal("avx512", 5.0, "bytes"),
            goal("avx2", 5.0, "bytes"),
            goal("portable", 5.0, "bytes"),
        ];
        report("health", size, size, cases, &goals, once);
    }
}

fn stage(once: bool) {
    let backend = Backend::detect();
    for unit_bytes in [32, 256, 4 << 10] {
        pipeline::check(backend, unit_bytes);
        let (mut device, mut naive) = (pipeline::Device::new(), pipeline::Naive::new());
        let (mut other, mut bridge) = (
            pipeline::Device::new(),
            pipeline::Bridge::new(backend, unit_bytes),
        );
        let data = noise(pipeline::PAYLOAD_BYTES, 1);
        let mut digests = vec![[0; 32]; data.len() / unit_bytes];
        let cases: Vec<Case<'_>> = vec![
            (
                "naive",
                Box::new(|| naive.segment(black_box(device.next_key()), unit_bytes)),
            ),
            (
                "batch",
                Box::new(|| {
                    backend.sha256_units(black_box(&data), unit_bytes, black_box(&mut digests));
                }),
            ),
            (
                "stage",
                Box::new(|| {
                    black_box(bridge.segment(black_box(other.next_key())));
                }),
            ),
        ];
        let least = if unit_bytes == 32 { 8.0 } else { 4.0 };
        let goals = [goal("stage", least, "naive"), goal("stage", 0.75, "batch")];
        let bytes = pipeline::PAYLOAD_BYTES;
        report("pipeline", unit_bytes, bytes, cases, &goals, once);
    }
}

/// Times the cases in turns and prints the speed of each and every ratio that has a goal.
fn report(
    group: &str,
    size: usize,
    bytes: usize,
    cases: Vec<Case<'_>>,
    goals: &[Goal],
    once: bool,
) {
    if once {
        for (_, mut case) in cases {
            case();
        }
        println!("{group}/{size}: runs");
        return;
    }
    let speeds = in_turns(bytes, cases);
    let list: Vec<_> = speeds
        .iter()
        .map(|(name, speed)| format!("{name} {speed:.2}"))
        .collect();
    println!("{group}/{size}: {} GB/s", list.join(", "));
    let of = |wanted: &&str| speeds.iter().find(|(name, _)| name == wanted);
    for Goal { fast, slow, least } in goals {
        if let (Some((_, one)), Some((_, other))) = (of(fast), of(slow)) {
            let ratio = one / other;
            let verdict = if ratio >= *least { "holds" } else { "missed" };
            println!("  {fast} / {slow} = {ratio:.2}, goal {least}: {verdict}");
        }
    }
}

/// The best speed of each case, in GB/s.
fn in_turns<'a>(bytes: usize, mut cases: Vec<Case<'a>>) -> Vec<(&'a str, f64)> {
    let mut runs = Vec::new();
    for (_, case) in &mut cases {
        case();
        let start = Instant::now();
        case();
        let once = start.elapsed().max(Duration::from_nanos(50));
        runs.push((BURST.as_nanos() / once.as_nanos()).max(1));
    }
    let mut best = vec![f64::MAX; cases.len()];
    for _ in 0..ROUNDS {
        for (((_, case), runs), best) in cases.iter_mut().zip(&runs).zip(&mut best) {
            let start = Instant::now();
            for _ in 0..*runs {
                case();
            }
            *best = best.min(start.elapsed().as_secs_f64() / *runs as f64);
        }
    }
    let speeds = best.iter().map(|seconds| bytes as f64 / seconds / 1e9);
    cases.iter().map(|(name, _)| *name).zip(speeds).collect()
}
