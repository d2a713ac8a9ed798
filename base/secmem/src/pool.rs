use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::keybuf::KeyBuf;
use crate::mapping::{Mapping, PoolError};
use crate::region::{CLASS_BYTES, REGION_BYTES, Region, blocks_of, class_for};

/// The longest [`KeyBuf`].
pub const MAX_BLOCK_BYTES: usize = REGION_BYTES;

/// Size and protection of a [`Pool`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolConfig {
    /// Most key bytes that live at once, rounded up to whole regions of 256 KiB. A region serves
    /// one block length at a time, so a pool for mixed lengths wants 2 MiB and more.
    pub capacity_bytes: usize,
    /// Whether the memory may be swapped out.
    pub locking: Locking,
}

/// What to do where the process may not lock as much memory as the pool has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locking {
    /// Locked, or no pool.
    Required,
    /// Locked if the limit allows; otherwise one warning in the log, with the limit to set.
    Preferred,
    /// Not locked. For tests, and for hosts without swap.
    Unlocked,
}

/// A bounded supply of key memory.
///
/// Clones share the memory. The memory lives until the last clone and the last [`KeyBuf`] are gone.
///
/// Blocks come in eight lengths from 32 bytes to 256 KiB. A region of 256 KiB serves one length;
/// once all its blocks are back, it may serve another. No call waits or takes a lock.
#[derive(Clone)]
pub struct Pool(Arc<Shared>);

/// A reading of [`Pool::stats`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolStats {
    /// Size of the pool.
    pub capacity_bytes: usize,
    /// Bytes of the blocks that are out, by block length, not by key length.
    pub in_use_bytes: usize,
    /// Whether the memory is locked.
    pub locked: bool,
    /// How often [`Pool::take`] has failed.
    pub exhausted: u64,
}

/// The pool has no block that long. Nothing was taken; try again when keys have been dropped.
///
/// A length of 0 or above [`MAX_BLOCK_BYTES`] is refused in the same way, for no pool has such a
/// block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("key pool of {capacity_bytes} bytes has no block for {asked_bytes} bytes")]
pub struct PoolExhausted {
    /// The length asked for.
    pub asked_bytes: usize,
    /// Size of the pool.
    pub capacity_bytes: usize,
}

impl Pool {
    /// Maps, protects and locks a pool's memory.
    ///
    /// # Errors
    ///
    /// - [`PoolError::Capacity`]: the configuration is wrong.
    /// - [`PoolError::LockLimit`]: only with [`Locking::Required`]; it names the limit to set.
    /// - [`PoolError::Map`], [`PoolError::Dump`]: the kernel refused.
    pub fn new(config: PoolConfig) -> Result<Self, PoolError> {
        let wrong = PoolError::Capacity {
            capacity_bytes: config.capacity_bytes,
            max_bytes: MAX_POOL_BYTES,
        };
        if config.capacity_bytes > MAX_POOL_BYTES {
            return Err(wrong);
        }
        let regions = config.capacity_bytes.div_ceil(REGION_BYTES);
        let len_bytes = NonZeroUsize::new(regions * REGION_BYTES).ok_or(wrong)?;
        let mapping = Mapping::new(len_bytes)?;
        let locked = lock(&mapping, config.locking)?;
        Ok(Self(Arc::new(Shared {
            mapping,
            regions: (0..regions).map(|_| Region::new(blocks_of(0))).collect(),
            hints: Default::default(),
            locked,
            exhausted: AtomicU64::new(0),
        })))
    }

    /// A block of exactly `len_bytes`, all zero.
    ///
    /// # Errors
    ///
    /// [`PoolExhausted`]: no block is free, or `len_bytes` is not in `1..=MAX_BLOCK_BYTES`.
    /// Nothing was taken.
    pub fn take(&self, len_bytes: usize) -> Result<KeyBuf, PoolExhausted> {
        let found = class_for(len_bytes).and_then(|class| self.0.take_block(class));
        let Some((address, class)) = found else {
            // ORDERING: Relaxed; a counter of its own.
            self.0.exhausted.fetch_add(1, Ordering::Relaxed);
            let capacity_bytes = self.0.mapping.len_bytes();
            return Err(PoolExhausted {
                asked_bytes: len_bytes,
                capacity_bytes,
            });
        };
        Ok(KeyBuf::new(Arc::clone(&self.0), address, len_bytes, class))
    }

    /// A block that holds a copy of `bytes`. Wiping the original is the caller's business.
    ///
    /// # Errors
    ///
    /// As [`Pool::take`].
    pub fn copy_of(&self, bytes: &[u8]) -> Result<KeyBuf, PoolExhausted> {
        let mut key = self.take(bytes.len())?;
        key.expose_mut().copy_from_slice(bytes);
        Ok(key)
    }

    /// Makes all of the memory present now, instead of each page at its first use, for which a key
    /// would wait then. Takes a second for some GiB.
    ///
    /// # Errors
    ///
    /// The kernel's: there is not so much memory, or Linux is older than 5.14. Nothing has changed for
    /// the pool's users.
    pub fn populate(&self) -> std::io::Result<()> {
        self.0.mapping.populate().map_err(std::io::Error::from)
    }

    /// Size, use and failures, as a snapshot.
    pub fn stats(&self) -> PoolStats {
        PoolStats {
            capacity_bytes: self.0.mapping.len_bytes(),
            in_use_bytes: self.0.regions.iter().map(Region::in_use_bytes).sum(),
            locked: self.0.locked,
            // ORDERING: Relaxed; a figure for the statistics.
            exhausted: self.0.exhausted.load(Ordering::Relaxed),
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Pool").field(&self.stats()).finish()
    }
}

/// What the clones of a pool and its blocks share.
pub(crate) struct Shared {
    mapping: Mapping,
    regions: Box<[Region]>,
    /// Per class, the region where a block was last taken or given back.
    hints: [AtomicUsize; CLASS_BYTES.len()],
    locked: bool,
    exhausted: AtomicU64,
}

impl Shared {
    /// A block of `class`, or of a longer class when no region can serve `class`.
    fn take_block(&self, class: u8) -> Option<(NonNull<u8>, u8)> {
        let longer = class + 1..u8::try_from(CLASS_BYTES.len()).unwrap_or(u8::MAX);
        let own = self
            .search(class, Region::take)
            .or_else(|| self.search(class, Region::claim));
        let (region, block, class) =
            own.map(|(region, block)| (region, block, class))
                .or_else(|| {
                    longer.into_iter().find_map(|class| {
                        let (region, block) = self.search(class, Region::take)?;
                        Some((region, block, class))
                    })
                })?;
        let offset = region * REGION_BYTES + block as usize * CLASS_BYTES[usize::from(class)];
        Some((self.mapping.at(offset), class))
    }

    /// Asks the regions one by one, from the class's hint on.
    fn search(&self, class: u8, ask: impl Fn(&Region, u8) -> Option<u32>) -> Option<(usize, u32)> {
        let hint = &self.hints[usize::from(class)];
        // ORDERING: Relaxed; a hint that is old costs time and nothing else.
        let first = hint.load(Ordering::Relaxed);
        let (before, after) = self.regions.split_at(first);
        let from_hint = (first..).zip(after).chain((0..).zip(before));
        let found = from_hint
            .into_iter()
            .find_map(|(index, region)| Some((index, ask(region, class)?)))?;
        if found.0 != first {
            // ORDERING: Relaxed, as above.
            hint.store(found.0, Ordering::Relaxed);
        }
        Some(found)
    }

    /// Takes back a block that [`Shared::take_block`] gave and its owner has wiped.
    pub(crate) fn give_back(&self, address: NonNull<u8>, class: u8) {
        let offset = self.mapping.offset_of(address);
        let region = offset / REGION_BYTES;
        let block = offset % REGION_BYTES / CLASS_BYTES[usize::from(class)];
        self.regions[region].give_back(u32::try_from(block).unwrap_or(u32::MAX));
        // ORDERING: Relaxed; see `search`.
        self.hints[usize::from(class)].store(region, Ordering::Relaxed);
    }
}

fn lock(mapping: &Mapping, locking: Locking) -> Result<bool, PoolError> {
    if locking == Locking::Unlocked {
        return Ok(false);
    }
    match mapping.lock() {
        Err(error) if locking == Locking::Preferred => {
            tracing::warn!("{error}; going on with key memory that may be swapped out");
            Ok(false)
        }
        answer => answer.map(|()| true),
    }
}

/// 1 TiB: beyond any host this runs on, and far from overflow.
const MAX_POOL_BYTES: usize = 1 << 40;
