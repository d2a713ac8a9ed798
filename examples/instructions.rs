//! One kernel, or the whole stage, some times over, for `benches/instructions.sh` to count.
//!
//! `instructions CASE BACKEND TIMES`; without arguments it lists the cases.

#![allow(clippy::unwrap_used, reason = "a tool that cannot go on has failed")]

use std::hint::black_box;

use qkd_bridge::bench::{
    noise,
    pipeline::{Bridge, Device},
};
use qkd_kernels::{Backend, HealthState};

/// In key memory's usual block, so that the ends of loops weigh little.
const BYTES: usize = 64 << 10;

/// The lengths of the units that the stage cuts.
const UNIT_BYTES: usize = 256;

const CASES: [&str; 6] = ["xor", "wipe", "tag", "fused", "health", "stage"];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [case, backend, times] = &args[..] else {
        println!("{}", CASES.join("\n"));
        return;
    };
    let backend = Backend::all().find(|b| b.name() == backend).unwrap();
    let times: u32 = times.parse().unwrap();
    let (mut data, mut pad) = (noise(BYTES, 1), noise(BYTES, 2));
    let key = backend.tag_key(b"a key for a tag ");
    let mut state = HealthState::new();
    let mut device = Device::new();
    let mut bridge = Bridge::new(backend, UNIT_BYTES);
    let mut once: Box<dyn FnMut()> = match case.as_str() {
        "xor" => Box::new(|| backend.xor_in_place(black_box(&mut data), black_box(&pad))),
        "wipe" => Box::new(|| qkd_kernels::wipe(black_box(&mut data))),
        "tag" => Box::new(|| {
            black_box(key.tag(&[], black_box(&data)));
        }),
        "fused" => Box::new(|| {
            let (data, pad) = (black_box(&mut data), black_box(&mut pad));
            black_box(key.encrypt_tag_and_wipe(&[], data, pad));
        }),
        "health" => Box::new(|| {
            black_box(backend.health(&mut state, black_box(&data)));
        }),
        "stage" => Box::new(|| {
            black_box(bridge.segment(black_box(device.next_key())));
        }),
        other => panic!("no case {other}: {CASES:?}"),
    };
    for _ in 0..times {
        once();
    }
}
