//! A stage without its thread: what is kept, what is cut, what each error leaves behind.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{key, name, noise, order, pool};
use proptest::prelude::*;
use qkd_kernels::Backend;
use qkd_keyfile::{Generation, QkdKeyName};
use qkd_pipeline::{FormatError, Hold, RefuseReason, Stage, WaitingBound};
use qkd_secmem::{MAX_BLOCK_BYTES, Pool};
use sha2::{Digest, Sha256};

const ROOMY: WaitingBound = WaitingBound {
    keys: 1000,
    bytes: 4 << 20,
};

fn stage(pool: &Pool, bound: WaitingBound) -> Stage {
    Stage::new(pool.clone(), bound, Backend::detect(), [7; 32])
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// The names that `hold` dropped; panics unless the key was held.
fn dropped(answer: Hold) -> Vec<QkdKeyName> {
    match answer {
        Hold::Held { dropped } => dropped,
        other => panic!("not held: {other:?}"),
    }
}

#[test]
fn a_segment_is_mask_then_body_then_one_digest_per_unit() {
    let pool = pool();
    let mut stage = stage(&pool, ROOMY);
    let (one, two) = (noise(100, 1), noise(60, 2));
    dropped(stage.hold(key(&pool, "k1", &one)));
    dropped(stage.hold(key(&pool, "k2", &two)));

    let plan = order(&[("k2", 0, 480), ("k1", 0, 800)], 32, 50);
    let made = stage.format(&plan).unwrap();

    let segment = [two, one].concat();
    assert_eq!(made.segment.expose(), &segment);
    assert_eq!(made.spare_bits, 0);
    let expected: Vec<_> = segment[32..].chunks(50).map(sha256).collect();
    assert_eq!(made.digests, expected, "50 + 50 + 28 bytes");
}

#[test]
fn pieces_start_and_end_at_any_bit() {
    let pool = pool();
    let mut stage = stage(&pool, ROOMY);
    dropped(stage.hold(key(&pool, "k1", &[0b1010_1100, 0b0101_0011, 0xff])));
    let plan = order(&[("k1", 3, 12), ("k1", 16, 8)], 1, 1);
    let made = stage.format(&plan).unwrap();
    // Bits 3..15 are 0110 0010 1001, then eight ones: two bytes and four spare bits.
    assert_eq!(made.segment.expose(), &[0b0110_0010, 0b1001_1111]);
    assert_eq!(made.spare_bits, 4);
    assert_eq!(
        made.digests,
        [sha256(&[0b1001_1111])],
        "the mask is not hashed"
    );
}

#[test]
fn a_key_whose_bits_end_inside_a_byte_gives_no_bit_more() {
    let pool = pool();
    let mut stage = stage(&pool, ROOMY);
    let mut odd = key(&pool, "k1", &[0xff; 4]);
    odd.key_bits = 29;
    dropped(stage.hold(odd));
    assert_eq!(
        stage.format(&order(&[("k1", 0, 30)], 1, 1)).unwrap_err(),
        FormatError::OutsideKey {
            name: name("k1"),
            offset_bits: 0,
            len_bits: 30,
            key_bits: 29
        }
    );
    let made = stage.format(&order(&[("k1", 0, 29)], 1, 1)).unwrap();
    assert_eq!((made.segment.len_bytes(), made.spare_bits), (3, 5));
}

#[test]
fn plans_that_cannot_be_met_are_refused_and_consume_nothing() {
    let pool = pool();
    let one_key = WaitingBound { keys: 1, ..ROOMY };
    let mut stage = stage(&pool, one_key);
    dropped(stage.hold(key(&pool, "k1", &noise(64, 1))));
    let before = pool.stats().in_use_bytes;

    let far = order(&[("k1", u32::MAX, u32::MAX)], 32, 32);
    assert!(matches!(
        stage.format(&far),
        Err(FormatError::TooLong { .. })
    ));
    let far = order(&[("k1", u32::MAX, 300)], 32, 32);
    assert!(matches!(
        stage.format(&far),
        Err(FormatError::OutsideKey { .. })
    ));
    assert_eq!(
        stage.format(&order(&[("k2", 0, 512)], 32, 32)).unwrap_err(),
        FormatError::UnknownQkdKey { name: name("k2") }
    );
    assert_eq!(
        stage.format(&order(&[("k1", 0, 263)], 32, 32)).unwrap_err(),
        FormatError::TooShort {
            segment_bits: 263,
            mask_bytes: 32
        }
    );
    assert!(matches!(
        stage.format(&order(&[], 32, 32)),
        Err(FormatError::TooShort { .. })
    ));
    for (mask_bytes, unit_bytes) in [(0, 32), (32, 0)] {
        assert_eq!(
            stage
                .format(&order(&[("k1", 0, 512)], mask_bytes, unit_bytes))
                .unwrap_err(),
            FormatError::EmptyMaskOrUnit {
                mask_bytes,
                unit_bytes
            }
        );
    }
    let mut other_generation = order(&[("k1", 0, 512)], 32, 32);
    other_generation.composition.generation = Generation(1);
    assert!(matches!(
        stage.format(&other_generation),
        Err(FormatError::UnknownQkdKey { .. })
    ));

    assert_eq!(pool.stats().in_use_bytes, before);
    // None of the refused plans pinned k1: it still makes room for a newer key.
    let gone = dropped(stage.hold(key(&pool, "k2", &noise(64, 2))));
    assert_eq!(gone, [name("k1")]);
}

#[test]
fn no_bit_is_in_a_segment_twice() {
    let pool = pool();
    let mut stage = stage(&pool, ROOMY);
    dropped(stage.hold(key(&pool, "k1", &noise(64, 1))));
    let twice = order(&[("k1", 256, 256), ("k1", 0, 257)], 1, 1);
    assert_eq!(
        stage.format(&twice).unwrap_err(),
        FormatError::Overlap {
            name: name("k1"),
            bit: 256
        }
    );
    let touching = order(&[("k1", 256, 256), ("k1", 10, 0), ("k1", 0, 256)], 1, 1);
    assert!(stage.format(&touching).is_ok());
}

#[test]
fn a_segment_fits_one_block_of_key_memory() {
    let pool = pool();
    let mut stage = stage(&pool, ROOMY);
    dropped(stage.hold(key(&pool, "k1", &noise(MAX_BLOCK_BYTES, 1))));
    dropped(stage.hold(key(&pool, "k2", &noise(40, 2))));
    let most = u32::try_from(MAX_BLOCK_BYTES * 8).unwrap();
    let fits = order(&[("k1", 0, most)], 32, 4096);
    assert_eq!(
        stage.format(&fits).unwrap().segment.len_bytes(),
        MAX_BLOCK_BYTES
    );
    let one_byte_more = order(&[("k1", 0, most), ("k2", 0, 8)], 32, 4096);
    assert_eq!(
        stage.format(&one_byte_more).unwrap_err(),
        FormatError::TooLong {
            segment_bits: u64::from(most) + 8
        }
    );
}

#[test]
fn an_exhausted_pool_fails_the_plan_and_keeps_the_keys() {
    let pool = pool();
    let mut stage = stage(&pool, ROOMY);
    dropped(stage.hold(key(&pool, "k1", &noise(64, 1))));
    let mut hog = Vec::new();
    while let Ok(block) = pool.take(32) {
        hog.push(block);
    }
    let plan = order(&[("k1", 0, 512)], 32, 32);
    assert!(matches!(stage.format(&plan), Err(FormatError::Pool(_))));
    hog.clear();
    assert!(stage.format(&plan).is_ok());
}

#[test]
fn a_planned_key_leaves_only_when_it_is_settled() {
    let pool = pool();
    let mut stage = stage(&pool, WaitingBound { keys: 2, ..ROOMY });
    dropped(stage.hold(key(&pool, "k1", &noise(64, 1))));
    dropped(stage.hold(key(&pool, "k2", &noise(64, 2))));
    let plan = order(&[("k1", 0, 512)], 32, 32);
    drop(stage.format(&plan).unwrap());

    // The older k1 is planned, so k2 goes.
    assert_eq!(
        dropped(stage.hold(key(&pool, "k3", &noise(64, 3)))),
        [name("k2")]
    );
    drop(stage.format(&order(&[("k3", 0, 512)], 32, 32)).unwrap());
    let Hold::Busy(k4) = stage.hold(key(&pool, "k4", &noise(64, 4))) else {
        panic!("both keys that wait are planned");
    };
    assert!(stage.format(&plan).is_ok(), "k1 is still there to examine");

    assert!(stage.settle(&name("k1")));
    assert!(!stage.settle(&name("k1")), "it is gone");
    assert_eq!(dropped(stage.hold(*k4)), []);
    assert_eq!(stage.waiting().len(), 2);
}

#[test]
fn settling_wipes_and_frees_the_block() {
    let pool = pool();
    let mut stage = stage(&pool, ROOMY);
    dropped(stage.hold(key(&pool, "k1", &noise(64, 1))));
    assert!(pool.stats().in_use_bytes > 0);
    assert!(stage.settle(&name("k1")));
    assert_eq!(pool.stats().in_use_bytes, 0);
    assert_eq!((stage.waiting().len(), stage.waiting().bytes()), (0, 0));
}

#[test]
fn the_oldest_unconfirmed_make_room_by_count_and_by_bytes() {
    let pool = pool();
    let mut stage = stage(
        &pool,
        WaitingBound {
            keys: 3,
            bytes: 350,
        },
    );
    for (text, seed) in [("k1", 1), ("k2", 2), ("k3", 3)] {
        assert_eq!(dropped(stage.hold(key(&pool, text, &noise(50, seed)))), []);
    }
    let by_count = stage.hold(key(&pool, "k4", &noise(50, 4)));
    assert_eq!(dropped(by_count), [name("k1")]);
    let by_bytes = stage.hold(key(&pool, "k5", &noise(120, 5)));
    assert_eq!(dropped(by_bytes), [name("k2"), name("k3")]);
    assert_eq!(
        stage.waiting().bytes(),
        64 + 256,
        "blocks of key memory, not keys"
    );
}

#[test]
fn keys_that_cannot_be_kept_are_refused_by_name() {
    let pool = pool();
    let mut stage = stage(&pool, WaitingBound { keys: 9, bytes: 64 });
    let refused = |answer: Hold| match answer {
        Hold::Refused { name, reason } => (name.id.to_string(), reason),
        other => panic!("not refused: {other:?}"),
    };

    dropped(stage.hold(key(&pool, "k1", &[1; 8])));
    let again = refused(stage.hold(key(&pool, "k1", &[2; 8])));
    assert_eq!(again, ("k1".to_owned(), RefuseReason::Duplicate));
    let kept = stage.waiting().get(&name("k1")).unwrap();
    assert_eq!(kept.block.expose(), &[1; 8], "the first one stays");

    for key_bits in [0, 65] {
        let mut odd = key(&pool, "k2", &[0; 8]);
        odd.key_bits = key_bits;
        let reason = RefuseReason::Length {
            key_bits,
            block_bytes: 8,
        };
        assert_eq!(refused(stage.hold(odd)), ("k2".to_owned(), reason));
    }
    let reason = RefuseReason::TooLong {
        block_bytes: 256,
        bound_bytes: 64,
    };
    let long = stage.hold(key(&pool, "k3", &[0; 65]));
    assert_eq!(refused(long), ("k3".to_owned(), reason));
}

proptest! {
    /// Two ends that hold the same keys make the same segment, and it equals the oracle's.
    #[test]
    fn a_segment_is_what_its_plan_says_bit_by_bit(
        lens in prop::collection::vec(1_usize..40, 1..5),
        cuts in prop::collection::vec((any::<u32>(), any::<u32>()), 1..5),
        mask_bytes in 1_u32..10,
        unit_bytes in 1_u32..9,
    ) {
        let pool = pool();
        let mut stage = stage(&pool, ROOMY);
        let mut bits = Vec::new();
        let mut plan = order(&[], mask_bytes, unit_bytes);
        for (i, (len, (from, take))) in lens.iter().zip(&cuts).enumerate() {
            let bytes = noise(*len, u32::try_from(i).unwrap());
            let text = format!("k{i}");
            dropped(stage.hold(key(&pool, &text, &bytes)));
            let key_bits = u32::try_from(len * 8).unwrap();
            let offset = from % key_bits;
            let take = take % (key_bits - offset + 1);
            plan.composition.pieces.extend(order(&[(&text, offset, take)], 1, 1).composition.pieces);
            bits.extend((offset..offset + take).map(|at| bytes[at as usize / 8] << (at % 8) >> 7));
        }
        let made = stage.format(&plan);
        let segment_bytes = bits.len() / 8;
        if segment_bytes <= mask_bytes as usize {
            let too_short = matches!(made, Err(FormatError::TooShort { .. }));
            prop_assert!(too_short);
            return Ok(());
        }
        let made = made.unwrap();
        let byte = |chunk: &[u8]| chunk.iter().enumerate().fold(0, |b, (i, bit)| b | bit << (7 - i));
        let segment: Vec<u8> = bits[..segment_bytes * 8].chunks(8).map(byte).collect();
        prop_assert_eq!(made.segment.expose(), &segment);
        prop_assert_eq!(usize::from(made.spare_bits), bits.len() % 8);
        let units = segment[mask_bytes as usize..].chunks(unit_bytes as usize);
        let digests: Vec<_> = units.map(sha256).collect();
        prop_assert_eq!(made.digests, digests);
    }
}
