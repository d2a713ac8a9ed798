//! In the steady state nothing is allocated per unit: a segment costs the same few allocations
//! whether it has eight units or eight thousand.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use common::{key, name, noise, order, pool};
use qkd_kernels::Backend;
use qkd_pipeline::{Hold, Stage, WaitingBound, handoff};
use qkd_secmem::{MAX_BLOCK_BYTES, Pool};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator; counts what each thread asks of it.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY:
// - Every call goes on to `System` unchanged; counting allocates nothing and does not unwind.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY:
        // - The caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY:
        // - `block` came from `System` with this `layout`, for `alloc` passes everything on.
        unsafe { System.dealloc(block, layout) }
    }
}

/// How often `work` allocates.
fn allocations<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let before = ALLOCATIONS.get();
    let made = work();
    (made, ALLOCATIONS.get() - before)
}

fn stage(pool: &Pool) -> Stage {
    let bound = WaitingBound {
        keys: 100,
        bytes: 4 << 20,
    };
    Stage::new(pool.clone(), bound, Backend::detect(), [7; 32])
}

#[test]
fn a_segment_of_many_units_allocates_no_more_than_one_of_few() {
    let pool = pool();
    let mut stage = stage(&pool);
    let held = stage.hold(key(&pool, "k1", &noise(MAX_BLOCK_BYTES, 1)));
    assert!(matches!(held, Hold::Held { .. }));
    let bits = u32::try_from(MAX_BLOCK_BYTES * 8).unwrap();

    let mut of_units = |unit_bytes| {
        let plan = order(&[("k1", 0, bits)], 32, unit_bytes);
        let (made, count) = allocations(|| stage.format(&plan));
        (made.unwrap().digests.len(), count)
    };
    of_units(4096);
    let (few_units, few) = of_units(32 << 10);
    let (many_units, many) = of_units(32);
    assert_eq!((few_units, many_units), (8, 8191));
    assert!(few > 0, "the digests are allocated, so counting works");
    assert_eq!(few, many);
}

#[test]
fn every_segment_of_a_long_run_costs_the_same_few_allocations() {
    let pool = pool();
    let mut stage = stage(&pool);
    let (pusher, mut popper) = handoff(4);
    let plan = order(&[("k1", 0, 64 << 13)], 32, 32);
    let mut round = |seed| {
        let descriptor = key(&pool, "k1", &noise(64 << 10, seed));
        allocations(|| {
            pusher.push(descriptor).unwrap();
            let held = stage.hold(popper.pop().unwrap());
            assert!(matches!(held, Hold::Held { .. }));
            drop(stage.format(&plan).unwrap());
            stage.settle(&name("k1"));
        })
        .1
    };
    round(1);
    let second = round(2);
    for seed in 3..100 {
        assert_eq!(round(seed), second);
    }
    assert!(second <= 20, "{second} allocations for 2,047 units");
}
