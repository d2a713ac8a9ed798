//! What users of the pool rely on.

use std::collections::HashMap;
use std::sync::Barrier;

use qkd_secmem::{KeyBuf, Locking, MAX_BLOCK_BYTES, Pool, PoolConfig, PoolError, PoolExhausted};

fn pool(capacity_bytes: usize) -> Pool {
    Pool::new(PoolConfig {
        capacity_bytes,
        locking: Locking::Unlocked,
    })
    .expect("1 byte to a few MiB can be mapped")
}

#[test]
fn debug_names_the_length_and_no_byte() {
    let key = pool(1).copy_of(&[0xAB; 32]).unwrap();
    assert_eq!(format!("{key:?}"), "KeyBuf(32 bytes)");
}

#[test]
fn key_crosses_threads() {
    fn send_and_sync<T: Send + Sync>() {}
    send_and_sync::<KeyBuf>();
    send_and_sync::<Pool>();
}

#[test]
fn every_length_is_served_exactly_and_all_zero() {
    let pool = pool(4 << 20);
    for len in (1..600).chain([4095, 4096, 4097, 65_536, 65_537, MAX_BLOCK_BYTES]) {
        let mut key = pool.take(len).unwrap();
        assert_eq!(key.len_bytes(), len);
        assert_eq!(key.expose().len(), len);
        assert!(key.expose().iter().all(|&b| b == 0), "length {len}");
        key.expose_mut().fill(0xFF);
    }
}

#[test]
fn block_is_wiped_before_it_is_taken_again() {
    let pool = pool(1);
    let mut key = pool.copy_of(&[0xFF; MAX_BLOCK_BYTES]).unwrap();
    let address = key.expose_mut().as_ptr();
    drop(key);
    let again = pool.take(MAX_BLOCK_BYTES).unwrap();
    assert_eq!(
        again.expose().as_ptr(),
        address,
        "the pool has one such block"
    );
    assert!(again.expose().iter().all(|&b| b == 0));
}

#[test]
fn truncating_wipes_the_tail() {
    let pool = pool(1);
    let mut key = pool.copy_of(&[0xFF; 32]).unwrap();
    let address = key.expose().as_ptr();
    key.truncate(40);
    assert_eq!(key.len_bytes(), 32);
    key.truncate(5);
    assert_eq!(key.expose(), [0xFF; 5]);
    key.truncate(0);
    assert_eq!(key.expose(), []);
    drop(key);
    let again = pool.take(32).unwrap();
    assert_eq!(again.expose().as_ptr(), address);
    assert_eq!(again.expose(), [0; 32]);
}

#[test]
fn exhaustion_is_an_error_and_is_counted() {
    let pool = pool(2 * MAX_BLOCK_BYTES);
    let held: Vec<_> = (0..2)
        .map(|_| pool.take(MAX_BLOCK_BYTES).unwrap())
        .collect();
    let refused = pool.take(32).unwrap_err();
    assert_eq!(
        refused,
        PoolExhausted {
            asked_bytes: 32,
            capacity_bytes: 2 * MAX_BLOCK_BYTES
        }
    );
    assert_eq!(pool.stats().in_use_bytes, 2 * MAX_BLOCK_BYTES);
    assert_eq!(pool.stats().exhausted, 1);
    drop(held);
    assert_eq!(pool.stats().in_use_bytes, 0);
    pool.take(32).unwrap();
}

#[test]
fn lengths_that_no_block_has_are_refused() {
    let pool = pool(1 << 20);
    assert!(pool.take(0).is_err());
    assert!(pool.take(MAX_BLOCK_BYTES + 1).is_err());
    assert!(pool.take(usize::MAX).is_err());
    assert!(pool.copy_of(&[]).is_err());
}

#[test]
fn small_keys_fill_the_pool_without_waste() {
    let pool = pool(1 << 20);
    let held: Vec<_> = (0..(1 << 20) / 32)
        .map(|_| pool.take(32).unwrap())
        .collect();
    assert_eq!(pool.stats().in_use_bytes, 1 << 20);
    assert!(pool.take(32).is_err());
    drop(held);
}

#[test]
fn emptied_regions_serve_another_length() {
    let pool = pool(1 << 20);
    for len in [32, MAX_BLOCK_BYTES, 64, 4096, 65_536, 256, MAX_BLOCK_BYTES] {
        let held: Vec<_> = std::iter::from_fn(|| pool.copy_of(&vec![1; len]).ok()).collect();
        assert_eq!(held.len(), (1 << 20) / len);
    }
}

#[test]
fn short_key_gets_a_longer_block_when_no_region_is_left() {
    let pool = pool(MAX_BLOCK_BYTES);
    let long = pool.take(65_536).unwrap();
    let short = pool.take(32).unwrap();
    assert_eq!(short.len_bytes(), 32);
    assert_eq!(pool.stats().in_use_bytes, 2 * 65_536);
    drop((long, short));
}

#[test]
fn live_keys_never_overlap() {
    let pool = pool(2 << 20);
    let lengths = [1, 32, 33, 100, 4096, 5000, 70_000];
    let mut held = HashMap::new();
    for (tag, len) in (0u8..=250).zip(lengths.iter().cycle()) {
        if let Ok(key) = pool.copy_of(&vec![tag; *len]) {
            held.insert(tag, key);
        }
        if tag % 3 == 0 {
            held.remove(&(tag / 2));
        }
    }
    assert!(held.len() > 50);
    for (tag, key) in &held {
        assert!(key.expose().iter().all(|b| b == tag));
    }
}

#[test]
fn key_outlives_the_pool() {
    let pool = pool(1);
    let key = pool.copy_of(b"still here").unwrap();
    drop(pool);
    assert_eq!(key.expose(), b"still here");
}

#[test]
fn equality_looks_at_bytes_and_length() {
    let pool = pool(1);
    let key = pool.copy_of(&[1, 2, 3]).unwrap();
    assert!(key.ct_eq(&pool.copy_of(&[1, 2, 3]).unwrap()));
    assert!(!key.ct_eq(&pool.copy_of(&[1, 2, 4]).unwrap()));
    assert!(!key.ct_eq(&pool.copy_of(&[1, 2]).unwrap()));
}

#[test]
fn threads_never_share_a_block_and_always_get_zeros() {
    const THREADS: u8 = 4;
    const ROUNDS: usize = if cfg!(miri) { 3 } else { 20_000 };
    // A region for every class and thread, so that racing claims leave one for everybody.
    let pool = pool(8 << 20);
    let start = Barrier::new(THREADS.into());
    std::thread::scope(|scope| {
        for mark in 1..=THREADS {
            let (pool, start) = (&pool, &start);
            scope.spawn(move || {
                start.wait();
                let mut held: [Option<KeyBuf>; 4] = Default::default();
                for round in 0..ROUNDS {
                    let len = [32, 48, 200, 4096][(round + usize::from(mark)) % 4];
                    let mut key = pool.take(len).unwrap();
                    assert!(key.expose().iter().all(|&b| b == 0));
                    key.expose_mut().fill(mark);
                    if let Some(old) = held[round % 4].replace(key) {
                        assert!(old.expose().iter().all(|&b| b == mark));
                    }
                }
            });
        }
    });
    assert_eq!(pool.stats().in_use_bytes, 0);
    assert_eq!(pool.stats().exhausted, 0);
}

#[test]
fn pool_without_bytes_or_beyond_the_machine_is_refused() {
    for capacity_bytes in [0, usize::MAX] {
        let config = PoolConfig {
            capacity_bytes,
            locking: Locking::Unlocked,
        };
        assert!(matches!(Pool::new(config), Err(PoolError::Capacity { .. })));
    }
}

#[test]
fn preferred_locking_always_gives_a_pool() {
    let config = PoolConfig {
        capacity_bytes: 1 << 20,
        locking: Locking::Preferred,
    };
    Pool::new(config).unwrap().take(32).unwrap();
}

#[test]
fn lock_limit_is_checked_at_the_start_and_the_error_names_the_limit_to_set() {
    let capacity_bytes = 1 << 20;
    let config = PoolConfig {
        capacity_bytes,
        locking: Locking::Required,
    };
    match Pool::new(config) {
        Ok(pool) => assert!(pool.stats().locked),
        Err(error @ PoolError::LockLimit { needed_bytes, .. }) => {
            assert!(needed_bytes >= capacity_bytes as u64);
            assert!(error.to_string().contains(&needed_bytes.to_string()));
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn a_pool_that_was_populated_is_present_zero_and_of_use() {
    let pool = pool(1 << 20);
    if let Err(error) = pool.populate() {
        println!("left out: this kernel does not populate memory: {error}");
        return;
    }
    let key = pool.copy_of(&[7; 4096]).unwrap();
    assert_eq!(key.expose(), [7; 4096]);
    let zero = pool.take(4096).unwrap();
    assert_eq!(zero.expose(), [0; 4096]);
}
