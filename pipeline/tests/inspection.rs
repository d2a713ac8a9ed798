//! What a stage refuses: QKD-keys that fail a health test, and bits that have come before.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{key, name, noise, order, pool};
use qkd_kernels::Backend;
use qkd_pipeline::{Descriptor, Hold, RefuseReason, Stage, WaitingBound};
use qkd_secmem::Pool;

const ROOMY: WaitingBound = WaitingBound {
    keys: 1000,
    bytes: 4 << 20,
};

fn stages(pool: &Pool) -> Vec<Stage> {
    Backend::all()
        .map(|backend| Stage::new(pool.clone(), ROOMY, backend, [7; 32]))
        .collect()
}

/// Why the key was refused; `None` if it waits.
fn refusal(answer: Hold) -> Option<RefuseReason> {
    match answer {
        Hold::Held { .. } => None,
        Hold::Refused { reason, .. } => Some(reason),
        Hold::Busy(_) => panic!("there is room"),
    }
}

/// The same key of another module pair.
fn from_pair(pair: &str, mut key: Descriptor) -> Descriptor {
    key.name.module_pair = pair.parse().unwrap();
    key
}

/// Noise in which each bit is a one with a probability of `of_256` in 256.
fn biased(len: usize, of_256: u32) -> Vec<u8> {
    let fair = noise(len * 8, 11);
    let bit = |value: &u8| u8::from(u32::from(*value) < of_256);
    fair.chunks(8)
        .map(|bits| bits.iter().map(bit).fold(0, |byte, bit| byte << 1 | bit))
        .collect()
}

#[test]
fn healthy_keys_of_every_length_are_kept() {
    let pool = pool();
    for mut stage in stages(&pool) {
        for (seed, len) in (77..).zip([1, 15, 16, 32, 100, 512, 4096, 65_536, 100_000]) {
            let healthy = key(&pool, &format!("k{seed}"), &noise(len, seed));
            assert_eq!(refusal(stage.hold(healthy)), None, "{len} bytes");
        }
    }
}

#[test]
fn stuck_sources_are_refused_and_wiped() {
    let pool = pool();
    for mut stage in stages(&pool) {
        for bytes in [[0x00; 300], [0xFF; 300], [0xA5; 300]] {
            let answer = stage.hold(key(&pool, "stuck", &bytes));
            assert_eq!(refusal(answer), Some(RefuseReason::Repetition));
        }
        assert_eq!((stage.waiting().len(), pool.stats().in_use_bytes), (0, 0));
    }
}

#[test]
fn a_run_over_the_border_of_two_keys_refuses_the_second_and_not_the_third() {
    let pool = pool();
    for mut stage in stages(&pool) {
        let (mut one, mut two) = (noise(64, 1), noise(64, 2));
        one[60..].fill(0);
        two[..5].fill(0);
        assert_eq!(refusal(stage.hold(key(&pool, "k1", &one))), None);
        let of_another = from_pair("pair-2", key(&pool, "k1", &noise(64, 3)));
        assert_eq!(refusal(stage.hold(of_another)), None);
        assert_eq!(
            refusal(stage.hold(key(&pool, "k2", &two))),
            Some(RefuseReason::Repetition)
        );
        let mut three = noise(64, 4);
        three[0] = 0;
        assert_eq!(refusal(stage.hold(key(&pool, "k3", &three))), None);
    }
}

#[test]
fn runs_of_two_module_pairs_do_not_add_up() {
    let pool = pool();
    for mut stage in stages(&pool) {
        let (mut one, mut two) = (noise(64, 1), noise(64, 2));
        one[60..].fill(0);
        two[..5].fill(0);
        assert_eq!(refusal(stage.hold(key(&pool, "k1", &one))), None);
        let two = from_pair("pair-2", key(&pool, "k2", &two));
        assert_eq!(refusal(stage.hold(two)), None);
    }
}

#[test]
fn a_value_that_comes_too_often_is_refused_also_over_many_short_keys() {
    let pool = pool();
    // Every 19th byte is the same: 27 of 512, where chance brings two.
    let mut stream = noise(1024, 5);
    stream.iter_mut().step_by(19).for_each(|byte| *byte = 0x3C);
    for mut stage in stages(&pool) {
        let whole = stage.hold(key(&pool, "whole", &stream));
        assert_eq!(refusal(whole), Some(RefuseReason::Proportion));
        let refused: Vec<_> = stream
            .chunks(32)
            .enumerate()
            .filter_map(|(i, part)| refusal(stage.hold(key(&pool, &format!("k{i}"), part))))
            .collect();
        // The first is the fifteenth or sixteenth key of the window; then the window begins anew.
        assert_eq!(refused, [RefuseReason::Proportion]);
    }
}

#[test]
fn strong_bias_fails_a_window_and_weak_bias_a_long_key() {
    let pool = pool();
    for mut stage in stages(&pool) {
        let strong = stage.hold(key(&pool, "k1", &biased(1024, 180)));
        assert_eq!(refusal(strong), Some(RefuseReason::Proportion));
        let weak = stage.hold(key(&pool, "k2", &biased(65_536, 133)));
        assert_eq!(refusal(weak), Some(RefuseReason::Bias));
        // Nobody can tell from a short key.
        let short = stage.hold(key(&pool, "k3", &biased(256, 133)));
        assert_eq!(refusal(short), None);
    }
}

#[test]
fn bits_that_came_before_are_refused_under_any_name_even_when_the_first_are_gone() {
    let pool = pool();
    for mut stage in stages(&pool) {
        let bytes = noise(4096, 1);
        assert_eq!(refusal(stage.hold(key(&pool, "k1", &bytes))), None);
        let again = Some(RefuseReason::DuplicateBlock);
        assert_eq!(refusal(stage.hold(key(&pool, "k2", &bytes))), again);
        let other_pair = from_pair("pair-2", key(&pool, "k1", &bytes));
        assert_eq!(refusal(stage.hold(other_pair)), again);

        assert!(stage.settle(&name("k1")));
        assert_eq!(refusal(stage.hold(key(&pool, "k1", &bytes))), again);
        assert_eq!(
            refusal(stage.hold(key(&pool, "k3", &bytes[..4095]))),
            None,
            "another length is another key"
        );
    }
}

#[test]
fn bits_past_the_key_are_not_looked_at() {
    let pool = pool();
    for mut stage in stages(&pool) {
        let mut block = noise(300, 1);
        block[32..].fill(0);
        let mut short = key(&pool, "k1", &block);
        short.key_bits = 256 + 5;
        assert_eq!(refusal(stage.hold(short)), None);
        block[32..].fill(0xFF);
        let mut again = key(&pool, "k2", &block);
        again.key_bits = 256;
        assert_eq!(
            refusal(stage.hold(again)),
            Some(RefuseReason::DuplicateBlock)
        );
    }
}

#[test]
fn a_key_that_had_no_room_is_not_a_duplicate_of_itself() {
    let pool = pool();
    let one_key = WaitingBound { keys: 1, ..ROOMY };
    let mut stage = Stage::new(pool.clone(), one_key, Backend::detect(), [7; 32]);
    assert_eq!(refusal(stage.hold(key(&pool, "k1", &noise(64, 1)))), None);
    drop(stage.format(&order(&[("k1", 0, 512)], 32, 32)).unwrap());
    let Hold::Busy(back) = stage.hold(key(&pool, "k2", &noise(64, 2))) else {
        panic!("the only key is planned");
    };
    assert!(stage.settle(&name("k1")));
    assert_eq!(refusal(stage.hold(*back)), None);
}

#[test]
fn a_name_that_waits_is_refused_before_its_bits_are_looked_at() {
    let pool = pool();
    let mut stage = Stage::new(pool.clone(), ROOMY, Backend::detect(), [7; 32]);
    assert_eq!(refusal(stage.hold(key(&pool, "k1", &noise(64, 1)))), None);
    let other = key(&pool, "k1", &noise(64, 2));
    assert_eq!(refusal(stage.hold(other)), Some(RefuseReason::Duplicate));
    // Refused for its name, it has left no fingerprint.
    assert_eq!(refusal(stage.hold(key(&pool, "k2", &noise(64, 2)))), None);
}
