//! The groups of kernels and stage, with the goals that are promised for them.

use std::{hint::black_box, rc::Rc, time::Duration};

use qkd_kernels::{Backend, HealthState};

use super::{
    health, noise, otp_relay, pipeline, sha256_units,
    turns::{Case, in_turns},
};

/// Cases that do the same work.
#[derive(Debug)]
pub struct Group {
    /// What the work is.
    pub name: &'static str,
    /// Which size of it, in bytes: of a unit, of an operand.
    pub size_bytes: usize,
    /// Payload of doing it once.
    pub payload_bytes: usize,
    /// The rivals and ours.
    pub cases: Vec<Case>,
    /// What is promised.
    pub goals: Vec<Goal>,
}

/// `fast` is at least `least` times as fast as `slow`.
#[derive(Debug, Clone, Copy)]
pub struct Goal {
    /// Name of a case; nothing is promised where the CPU has no such backend.
    pub fast: &'static str,
    /// Name of a case.
    pub slow: &'static str,
    /// The ratio.
    pub least: f64,
}

/// How fast a case is.
#[derive(Debug, Clone, Copy)]
pub struct Speed {
    /// Name of the case.
    pub name: &'static str,
    /// 10^9 bytes of payload per second.
    pub gb_per_s: f64,
}

impl Group {
    /// Times the cases in turns for about so long.
    pub fn measure(&mut self, budget: Duration) -> Vec<Speed> {
        let times = in_turns(&mut self.cases, budget);
        let cases = self.cases.iter().zip(times);
        cases
            .map(|(case, seconds)| Speed {
                name: case.name,
                gb_per_s: self.payload_bytes as f64 / seconds / 1e9,
            })
            .collect()
    }

    /// The goals that can be judged here, and the ratios that were reached.
    #[must_use]
    pub fn judge(&self, speeds: &[Speed]) -> Vec<(Goal, f64)> {
        let of = |name| Some(speeds.iter().find(|speed| speed.name == name)?.gb_per_s);
        let ratio = |goal: &Goal| Some((*goal, of(goal.fast)? / of(goal.slow)?));
        self.goals.iter().filter_map(ratio).collect()
    }
}

const fn goal(fast: &'static str, least: f64, slow: &'static str) -> Goal {
    Goal { fast, slow, least }
}

/// Makes a group when it is its turn, so that only one group's data is there at a time.
pub type Make = Box<dyn FnOnce() -> Group>;

/// All groups, in the order of a key's journey.
#[must_use]
pub fn all() -> Vec<Make> {
    let mut groups: Vec<Make> = Vec::new();
    for size in [4 << 10, 64 << 10] {
        groups.push(Box::new(move || health(size)));
    }
    for unit_bytes in [32, 256, 4 << 10, 64 << 10] {
        groups.push(Box::new(move || sha256(unit_bytes)));
    }
    for unit_bytes in [32, 256, 4 << 10] {
        groups.push(Box::new(move || stage(unit_bytes)));
    }
    for size in [64 << 10, 1 << 20] {
        groups.push(Box::new(move || xor(size)));
    }
    for size in [4 << 10, 64 << 10, 1 << 20] {
        groups.push(Box::new(move || relay(size)));
    }
    groups
}

fn xor(size: usize) -> Group {
    let pad: Rc<[u8]> = noise(size, 1).into();
    let (other, mut copy, mut data) = (pad.clone(), noise(size, 2), noise(size, 3));
    let backend = Backend::detect();
    Group {
        name: "xor",
        size_bytes: size,
        payload_bytes: size,
        cases: vec![
            Case::new("memcpy", move || {
                black_box(&mut copy[..]).copy_from_slice(black_box(&other));
            }),
            Case::new("best", move || {
                backend.xor_in_place(black_box(&mut data), black_box(&pad));
            }),
        ],
        goals: vec![goal("best", 0.9, "memcpy")],
    }
}

fn sha256(unit_bytes: usize) -> Group {
    let units = (pipeline::PAYLOAD_BYTES / unit_bytes).max(16);
    let data: Rc<[u8]> = noise(units * unit_bytes, 1).into();
    let (all, mut digests) = (data.clone(), vec![[0; 32]; units]);
    let mut cases = vec![Case::new("sha2", move || {
        sha256_units::one_by_one(black_box(&all), unit_bytes, black_box(&mut digests));
    })];
    for backend in Backend::all() {
        sha256_units::check(backend, &data, unit_bytes);
        let (data, mut digests) = (data.clone(), vec![[0; 32]; units]);
        cases.push(Case::new(backend.name(), move || {
            backend.sha256_units(black_box(&data), unit_bytes, black_box(&mut digests));
        }));
    }
    let with_avx512 = if unit_bytes == 32 { 2.8 } else { 2.0 };
    Group {
        name: "sha256_units",
        size_bytes: unit_bytes,
        payload_bytes: data.len(),
        cases,
        goals: vec![
            goal("avx512", with_avx512, "sha2"),
            goal("sha_ni", 1.2, "sha2"),
            // The same code in the end: 1, up to what two runs differ by.
            goal("avx2", 0.98, "sha2"),
            goal("portable", 0.98, "sha2"),
        ],
    }
}

fn relay(size: usize) -> Group {
    let backend = Backend::detect();
    let key = Rc::new(backend.tag_key(&otp_relay::KEY));
    let (hmac, polyval) = (otp_relay::hmac(), otp_relay::polyval());
    otp_relay::check(backend, &key, &polyval, size);
    let (passes, fused) = (key.clone(), key);
    let mut goals = vec![
        goal("fused", 15.0, "naive"),
        goal("fused", 3.0, "zip_polyval"),
        goal("fused", 1.3, "passes"),
    ];
    if size > 64 << 10 {
        // Beyond the second-level cache all of them wait for memory.
        goals.drain(..2);
    }
    Group {
        name: "otp_relay",
        size_bytes: size,
        payload_bytes: size,
        cases: vec![
            hop("naive", size, move |data, pad| {
                black_box(otp_relay::naive(&hmac, data, pad));
            }),
            hop("zip_polyval", size, move |data, pad| {
                black_box(otp_relay::zip_polyval(&polyval, data, pad));
            }),
            hop("passes", size, move |data, pad| {
                black_box(otp_relay::passes(backend, &passes, data, pad));
            }),
            hop("fused", size, move |data, pad| {
                black_box(fused.encrypt_tag_and_wipe(&otp_relay::HEADER, data, pad));
            }),
        ],
        goals,
    }
}

/// A relay's step on buffers of its own.
fn hop(name: &'static str, size: usize, step: impl Fn(&mut [u8], &mut [u8]) + 'static) -> Case {
    let (mut data, mut pad) = (noise(size, 1), noise(size, 2));
    Case::new(name, move || {
        step(black_box(&mut data), black_box(&mut pad));
    })
}

fn health(size: usize) -> Group {
    let data: Rc<[u8]> = noise(size, 1).into();
    let (all, mut textbook) = (data.clone(), health::Textbook::default());
    let mut cases = vec![Case::new("bytes", move || {
        black_box(textbook.health(black_box(&all)));
    })];
    for backend in Backend::all() {
        health::check(backend, &data);
        let (data, mut state) = (data.clone(), HealthState::new());
        cases.push(Case::new(backend.name(), move || {
            black_box(backend.health(&mut state, black_box(&data)));
        }));
    }
    let goals = ["avx512", "avx2", "portable"].map(|name| goal(name, 5.0, "bytes"));
    Group {
        name: "health",
        size_bytes: size,
        payload_bytes: size,
        cases,
        goals: goals.into(),
    }
}

fn stage(unit_bytes: usize) -> Group {
    let backend = Backend::detect();
    pipeline::check(backend, unit_bytes);
    let (mut device, mut naive) = (pipeline::Device::new(), pipeline::Naive::default());
    let mut other = pipeline::Device::new();
    let mut bridge = pipeline::Bridge::new(backend, unit_bytes);
    let data = noise(pipeline::PAYLOAD_BYTES, 1);
    let mut digests = vec![[0; 32]; data.len() / unit_bytes];
    let least = if unit_bytes == 32 { 8.0 } else { 4.0 };
    Group {
        name: "pipeline",
        size_bytes: unit_bytes,
        payload_bytes: pipeline::PAYLOAD_BYTES,
        cases: vec![
            Case::new("naive", move || {
                naive.segment(black_box(device.next_key()), unit_bytes);
            }),
            Case::new("batch", move || {
                backend.sha256_units(black_box(&data), unit_bytes, black_box(&mut digests));
            }),
            Case::new("stage", move || {
                black_box(bridge.segment(black_box(other.next_key())));
            }),
        ],
        goals: vec![goal("stage", least, "naive"), goal("stage", 0.75, "batch")],
    }
}
