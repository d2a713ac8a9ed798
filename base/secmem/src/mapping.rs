use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use nix::sys::resource::{Resource, getrlimit};

/// Why a pool could not be made. Nothing stays mapped or locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The capacity is 0 or more than a pool can address.
    #[error("a key pool of {capacity_bytes} bytes is not possible (1 byte to {max_bytes} bytes)")]
    Capacity {
        /// The capacity asked for.
        capacity_bytes: usize,
        /// The largest capacity.
        max_bytes: usize,
    },
    /// The kernel gave no memory.
    #[error("cannot map {capacity_bytes} bytes of key memory")]
    Map {
        /// The capacity asked for, in whole regions.
        capacity_bytes: usize,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
    /// The lock limit is too small. Set `RLIMIT_MEMLOCK` (`ulimit -l` counts KiB, `LimitMEMLOCK=`
    /// of systemd counts bytes) to `needed_bytes` and start again.
    #[error(
        "cannot lock {capacity_bytes} bytes of key memory: RLIMIT_MEMLOCK is {limit_bytes} bytes, \
         set it to {needed_bytes} bytes"
    )]
    LockLimit {
        /// The capacity asked for, in whole regions.
        capacity_bytes: usize,
        /// The soft limit of this process.
        limit_bytes: u64,
        /// The limit that would do: the capacity and what this process has locked already.
        needed_bytes: u64,
    },
    /// The kernel would not keep the memory out of core dumps.
    #[error("cannot keep key memory out of core dumps")]
    Dump(#[source] Errno),
}

/// Anonymous private memory, all zero at first, absent from core dumps and from forked children.
///
/// Pages come into being when they are first touched; the lock is charged for all of them at the
/// start, so a pool that starts can be used to its last byte.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len_bytes: NonZeroUsize,
}

// SAFETY:
// - A `Mapping` owns its memory and has no thread affinity: `munmap` works from any thread.
unsafe impl Send for Mapping {}
// SAFETY:
// - A shared `Mapping` only gives out its address; access to the memory behind it is argued where
//   it happens, in `KeyBuf`.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn new(len_bytes: NonZeroUsize) -> Result<Self, PoolError> {
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY:
        // - The kernel picks the address, so nothing that is in use gets replaced.
        let base = unsafe { mmap_anonymous(None, len_bytes, prot, MapFlags::MAP_PRIVATE) }
            .map_err(|source| PoolError::Map {
                capacity_bytes: len_bytes.get(),
                source,
            })?;
        let mapping = Self {
            base: base.cast(),
            len_bytes,
        };
        mapping
            .advise(MmapAdvise::MADV_DONTDUMP)
            .map_err(PoolError::Dump)?;
        if let Err(errno) = mapping.advise(MmapAdvise::MADV_WIPEONFORK) {
            tracing::debug!(%errno, "kernel cannot wipe key memory in forked children");
        }
        // Stock that grows touches every page once: a fault for each 4 KiB costs more than all that
        // is done with the key in it. Small pools stay as small as they are.
        if len_bytes.get() >= HUGE_FROM_BYTES
            && let Err(errno) = mapping.advise(MmapAdvise::MADV_HUGEPAGE)
        {
            tracing::debug!(%errno, "kernel has no huge pages for key memory");
        }
        Ok(mapping)
    }

    /// Locks all of the memory, each page from its first use on.
    pub(crate) fn lock(&self) -> Result<(), PoolError> {
        let len = self.len_bytes.get();
        let at = self.base.as_ptr().cast();
        // SAFETY:
        // - `at..at + len` is the mapping that `self` owns; locking changes no byte of it.
        let answer = unsafe { libc::mlock2(at, len, libc::MLOCK_ONFAULT) };
        if answer == 0 {
            return Ok(());
        }
        let (limit_bytes, _) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap_or((0, 0));
        let needed_bytes = locked_bytes() + len as u64;
        Err(PoolError::LockLimit {
            capacity_bytes: len,
            limit_bytes,
            needed_bytes,
        })
    }

    /// Makes every page present now.
    pub(crate) fn populate(&self) -> Result<(), Errno> {
        self.advise(MmapAdvise::MADV_POPULATE_WRITE)
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.len_bytes.get()
    }

    /// The address `offset_bytes` into the mapping.
    pub(crate) fn at(&self, offset_bytes: usize) -> NonNull<u8> {
        assert!(
            offset_bytes < self.len_bytes.get(),
            "offset outside the key pool"
        );
        // SAFETY:
        // - The sum stays inside one mapping, as asserted, and a mapping is shorter than
        //   `isize::MAX`.
        unsafe { self.base.add(offset_bytes) }
    }

    /// How far `address`, which [`Mapping::at`] gave, is into the mapping.
    pub(crate) fn offset_of(&self, address: NonNull<u8>) -> usize {
        address.as_ptr() as usize - self.base.as_ptr() as usize
    }

    fn advise(&self, advice: MmapAdvise) -> Result<(), Errno> {
        if cfg!(miri) {
            // Miri knows no such call.
            return Ok(());
        }
        // SAFETY:
        // - The range is the mapping that `self` owns. The advices used concern dumps, forks, presence
        //   and size of pages only; the contents stay.
        unsafe { madvise(self.base.cast(), self.len_bytes.get(), advice) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY:
        // - The range is exactly what `mmap_anonymous` gave.
        // - Every `KeyBuf` keeps the pool alive, so no reference into the range is left.
        let unmapped = unsafe { munmap(self.base.cast(), self.len_bytes.get()) };
        debug_assert!(unmapped.is_ok(), "a mapping of our own can be unmapped");
    }
}

/// Pools from this size on are in huge pages, where the kernel has some to give.
const HUGE_FROM_BYTES: usize = 32 << 20;

/// What this process has locked so far; 0 where the kernel does not say.
fn locked_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
