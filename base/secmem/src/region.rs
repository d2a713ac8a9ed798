//! The free list of one region: which of its blocks are free, and how long its blocks are.
//!
//! # Memory ordering
//!
//! | word    | written by                | read by        | the pair protects                    |
//! |---------|---------------------------|----------------|--------------------------------------|
//! | `state` | `give_back`, `claim`      | `take`, `claim`| that a reserved block has its bit set |
//! | `bits`  | `give_back`, `claim`      | `take`         | the block's bytes, wiped by the giver |
//!
//! `state` counts the free blocks that nobody has reserved. `take` reserves first and looks for a
//! bit second, `give_back` sets the bit first and counts second, so there are always at least as
//! many bits set as reservations held and every reservation finds its bit. There are no links, so
//! there is no ABA problem.

use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// Length of a region and of the longest block.
pub(crate) const REGION_BYTES: usize = 256 << 10;

/// Block lengths. 32 B is one 256-bit key, 4 KiB one bulk unit, 256 KiB one hand-off block; the
/// others keep the waste below three quarters.
pub(crate) const CLASS_BYTES: [usize; 8] = [
    32,
    64,
    256,
    1 << 10,
    4 << 10,
    16 << 10,
    64 << 10,
    REGION_BYTES,
];

/// The shortest class that holds `len_bytes`.
pub(crate) fn class_for(len_bytes: usize) -> Option<u8> {
    let class = CLASS_BYTES.iter().position(|&bytes| len_bytes <= bytes)?;
    (len_bytes > 0).then_some(u8::try_from(class).ok()?)
}

/// How many blocks of `class` a region has.
pub(crate) fn blocks_of(class: u8) -> u32 {
    u32::try_from(REGION_BYTES / CLASS_BYTES[usize::from(class)]).unwrap_or(u32::MAX)
}

/// One region's state and bits.
pub(crate) struct Region {
    state: AtomicU32,
    bits: Box<[AtomicU64]>,
}

impl Region {
    /// A region that belongs to no class yet, with room for `max_blocks`.
    pub(crate) fn new(max_blocks: u32) -> Self {
        let words = max_blocks.div_ceil(u64::BITS);
        Self {
            state: AtomicU32::new(State::UNUSED.0),
            bits: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Takes one block if this region belongs to `class` and has one.
    pub(crate) fn take(&self, class: u8) -> Option<u32> {
        // ORDERING: Relaxed; only a first guess, checked by the exchange in the loop.
        let mut seen = State(self.state.load(Ordering::Relaxed));
        loop {
            if seen.class() != class || seen.free() == 0 {
                return None;
            }
            let next = State::new(class, seen.free() - 1);
            // ORDERING: Acquire pairs with the Release add of `give_back` and the Release store of
            // `claim`: the bit that this reservation counts on is set for us.
            let swapped = self.state.compare_exchange_weak(
                seen.0,
                next.0,
                Ordering::Acquire,
                Ordering::Relaxed,
            );
            match swapped {
                Ok(_) => return Some(self.clear_some_bit()),
                Err(now) => seen = State(now),
            }
        }
    }

    /// Puts a block back that [`Region::take`] gave. Its bytes are wiped already.
    pub(crate) fn give_back(&self, block: u32) {
        let (word, bit) = place(block);
        // ORDERING: Release pairs with the Acquire of `clear_some_bit`: the wipe of the block
        // happens before its next owner sees it.
        let before = self.bits[word].fetch_or(bit, Ordering::Release);
        debug_assert_eq!(before & bit, 0, "a block comes back once");
        // ORDERING: Release pairs with the Acquire exchange of `take` and of `claim`: whoever
        // counts on this block finds its bit. The class part of the word cannot change while a
        // block is out.
        self.state.fetch_add(1, Ordering::Release);
    }

    /// Gives the region, if no block of it is out, to `class`, and takes its first block.
    pub(crate) fn claim(&self, class: u8) -> Option<u32> {
        self.claim_for(class, blocks_of(class))
    }

    fn claim_for(&self, class: u8, blocks: u32) -> Option<u32> {
        // ORDERING: Relaxed; only a first guess, checked by the exchange below.
        let seen = State(self.state.load(Ordering::Relaxed));
        if !seen.is_idle() {
            return None;
        }
        // ORDERING: Acquire pairs with the Release add of `give_back`: every block's bit is set,
        // and its wipe done, before we write the bits anew.
        self.state
            .compare_exchange(
                seen.0,
                State::CHANGING.0,
                Ordering::Acquire,
                Ordering::Relaxed,
            )
            .ok()?;
        for (word, bits) in (0u32..).zip(&self.bits) {
            let here = blocks.saturating_sub(word * u64::BITS).min(u64::BITS);
            let all = u64::MAX.checked_shr(u64::BITS - here).unwrap_or(0);
            // ORDERING: Relaxed; nobody looks at the bits of a region that is changing, and the
            // store below publishes them.
            bits.store(if word == 0 { all & !1 } else { all }, Ordering::Relaxed);
        }
        // ORDERING: Release pairs with the Acquire exchange of `take`: it finds the new bits, and
        // (through the exchange above) the blocks of the old class wiped.
        self.state
            .store(State::new(class, blocks - 1).0, Ordering::Release);
        Some(0)
    }

    /// Bytes of this region that are out. A snapshot.
    pub(crate) fn in_use_bytes(&self) -> usize {
        // ORDERING: Relaxed; a figure for the statistics, nothing depends on it.
        let seen = State(self.state.load(Ordering::Relaxed));
        let Some(&bytes) = CLASS_BYTES.get(usize::from(seen.class())) else {
            return 0;
        };
        (blocks_of(seen.class()) - seen.free()) as usize * bytes
    }

    fn clear_some_bit(&self) -> u32 {
        loop {
            for (word, bits) in (0u32..).zip(&self.bits) {
                // ORDERING: Relaxed; a guess that the `fetch_and` below checks.
                let mut seen = bits.load(Ordering::Relaxed);
                while seen != 0 {
                    let bit = seen & seen.wrapping_neg();
                    // ORDERING: Acquire pairs with the Release of `give_back`: the previous
                    // owner's wipe happens before our use of the block.
                    seen = bits.fetch_and(!bit, Ordering::Acquire);
                    if seen & bit != 0 {
                        return word * u64::BITS + bit.trailing_zeros();
                    }
                }
            }
            // Others took what we saw and gave back behind us; a bit for us is set by now.
            #[cfg(loom)]
            loom::thread::yield_now();
        }
    }
}

fn place(block: u32) -> (usize, u64) {
    ((block / u64::BITS) as usize, 1 << (block % u64::BITS))
}

/// Class in the second highest byte, number of free blocks in the low half.
#[derive(Clone, Copy, PartialEq, Eq)]
struct State(u32);

impl State {
    /// No class, no blocks; free to be claimed.
    const UNUSED: Self = Self(0xFF << 16);
    /// Being given to a class; of no use to anyone else.
    const CHANGING: Self = Self(0xFE << 16);

    fn new(class: u8, free: u32) -> Self {
        Self(u32::from(class) << 16 | free)
    }

    fn class(self) -> u8 {
        self.0.to_be_bytes()[1]
    }

    fn free(self) -> u32 {
        self.0 & 0xFFFF
    }

    fn is_idle(self) -> bool {
        self == Self::UNUSED
            || (usize::from(self.class()) < CLASS_BYTES.len()
                && self.free() == blocks_of(self.class()))
    }
}

#[cfg(all(test, loom))]
mod tests {
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    /// A region and what it accounts for. Loom fails a run in which two accesses to a cell are
    /// not ordered by what the region does.
    struct Model {
        region: Region,
        blocks: [UnsafeCell<u8>; 4],
    }

    impl Model {
        fn new(class: u8, blocks: u32) -> Arc<Self> {
            let region = Region::new(4);
            assert_eq!(region.claim_for(class, blocks), Some(0));
            region.give_back(0);
            Arc::new(Self {
                region,
                blocks: std::array::from_fn(|_| UnsafeCell::new(0)),
            })
        }

        /// What the owner of a block does.
        fn fill(&self, block: u32) {
            self.blocks[block as usize].with_mut(|bytes| {
                // SAFETY:
                // - Loom checks that no other access to the cell runs at the same time.
                unsafe { *bytes = bytes.read().wrapping_add(1) };
            });
        }

        fn fill_and_give_back(&self, block: u32) {
            self.fill(block);
            self.region.give_back(block);
        }
    }

    const LONGEST: u8 = 7;

    #[test]
    fn loom_one_block_has_one_owner_at_a_time() {
        loom::model(|| {
            let model = Model::new(LONGEST, 1);
            let other = Arc::clone(&model);
            let thread = thread::spawn(move || {
                other
                    .region
                    .take(LONGEST)
                    .map(|block| other.fill_and_give_back(block))
                    .is_some()
            });
            let here = model
                .region
                .take(LONGEST)
                .map(|block| model.fill_and_give_back(block));
            assert!(
                thread.join().unwrap() | here.is_some(),
                "one of the two was first"
            );
            assert_eq!(model.region.take(LONGEST), Some(0));
        });
    }

    #[test]
    fn loom_block_of_one_giver_is_found_through_the_count_of_another() {
        loom::model(|| {
            let model = Model::new(LONGEST, 2);
            let held = [(); 2].map(|()| model.region.take(LONGEST).unwrap());
            let threads = held.map(|block| {
                let model = Arc::clone(&model);
                thread::spawn(move || model.fill_and_give_back(block))
            });
            if let Some(block) = model.region.take(LONGEST) {
                model.fill_and_give_back(block);
            }
            for thread in threads {
                thread.join().unwrap();
            }
            let mut again = [(); 2].map(|()| model.region.take(LONGEST).unwrap());
            again.sort_unstable();
            assert_eq!(again, [0, 1]);
        });
    }

    #[test]
    fn loom_region_changes_class_only_when_every_block_is_back() {
        loom::model(|| {
            let model = Model::new(LONGEST, 1);
            let block = model.region.take(LONGEST).unwrap();
            let other = Arc::clone(&model);
            let thread = thread::spawn(move || other.fill_and_give_back(block));
            // The new class has four blocks where the old one had one.
            let claimed = model.region.claim(LONGEST - 1);
            if let Some(block) = claimed {
                model.fill(block);
            }
            thread.join().unwrap();
            assert_eq!(model.region.take(LONGEST).is_some(), claimed.is_none());
        });
    }

    #[test]
    fn loom_taker_after_a_change_sees_what_the_old_class_left() {
        loom::model(|| {
            let model = Model::new(LONGEST, 1);
            let block = model.region.take(LONGEST).unwrap();
            let (giver, claimer) = (Arc::clone(&model), Arc::clone(&model));
            let giver = thread::spawn(move || {
                // The long block lies where the four shorter ones will be.
                (0..4).for_each(|block| giver.fill(block));
                giver.region.give_back(block);
            });
            let claimer = thread::spawn(move || claimer.region.claim(LONGEST - 1));
            if let Some(block) = model.region.take(LONGEST - 1) {
                model.fill_and_give_back(block);
            }
            giver.join().unwrap();
            claimer.join().unwrap();
        });
    }
}
