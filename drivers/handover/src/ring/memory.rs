//! Memory that two processes share, as words that are only ever accessed atomically.
//!
//! With [`copy`], the one place with unsafe code. There is no way from here to a `&[u8]`: the other process may
//! write at any time, and a reference would promise that nobody does.

use std::io;

use memmap2::{Advice, MmapRaw};
use nix::errno::Errno;

use super::{MAX_CAPACITY_BYTES, MIN_CAPACITY_BYTES, copy, fault::RingFault, sync::AtomicU64};

/// Why the memory of a ring could not be had. Nothing stays mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// Not a power of 2, or too small or too large.
    #[error(
        "ring of {capacity_bytes} bytes: a power of 2 from {MIN_CAPACITY_BYTES} to \
         {MAX_CAPACITY_BYTES} is needed"
    )]
    Capacity {
        /// The capacity asked for or found.
        capacity_bytes: usize,
    },
    /// The descriptor is not that of a memfd which is sealed against changes of size.
    #[error("the ring's memory is not sealed against changes of size")]
    NotSealed,
    /// The kernel refused a step.
    #[error("cannot {step} the ring's memory")]
    Os {
        /// What was to be done.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
    /// A file that was cut off while its header was written.
    #[error(transparent)]
    Unreachable(RingFault),
}

impl Memory {
    /// Copies `out.len()` bytes from the ring, starting at `position`, a multiple of 8.
    pub(super) fn copy_out(&self, capacity: usize, position: u64, out: &mut [u8]) {
        let runs = self.runs(capacity, position, out.len().div_ceil(8));
        let (front, back) = out.split_at_mut(out.len().min(8 * runs[0].len()));
        for (words, bytes) in runs.into_iter().zip([front, back]) {
            copy::copy_out(words, bytes);
        }
    }

    /// Copies `bytes` into the ring, starting at `position`, a multiple of 8; what is left of the
    /// last word becomes zero.
    pub(super) fn copy_in(&self, capacity: usize, position: u64, bytes: &[u8]) {
        let runs = self.runs(capacity, position, bytes.len().div_ceil(8));
        let (front, back) = bytes.split_at(bytes.len().min(8 * runs[0].len()));
        for (words, bytes) in runs.into_iter().zip([front, back]) {
            copy::copy_in(words, bytes);
        }
    }

    /// Makes `len_bytes` of the ring zero, starting at `position`, both multiples of 8.
    pub(super) fn wipe(&self, capacity: usize, position: u64, len_bytes: usize) {
        for words in self.runs(capacity, position, len_bytes / 8) {
            copy::wipe(words);
        }
    }

    /// The words from `position` on, around the ring: up to its end, and from its beginning. There
    /// are at most as many as the ring has.
    fn runs(&self, capacity: usize, position: u64, words: usize) -> [&[AtomicU64]; 2] {
        let all = self.data(capacity / 8);
        let (front, back) = all.split_at(place(position, capacity) / 8);
        let first = words.min(back.len());
        [&back[..first], &front[..words - first]]
    }
}

/// Where a position is in the data, and how many of `len_bytes` from there on are before the data's end.
pub(super) fn front(position: u64, capacity: usize, len_bytes: usize) -> (usize, usize) {
    let place = place(position, capacity);
    (place, len_bytes.min(capacity - place))
}

pub(super) fn check_capacity(capacity_bytes: usize) -> Result<(), MapError> {
    let fits = (MIN_CAPACITY_BYTES..=MAX_CAPACITY_BYTES).contains(&capacity_bytes);
    if fits && capacity_bytes.is_power_of_two() {
        Ok(())
    } else {
        Err(MapError::Capacity { capacity_bytes })
    }
}

/// Keeps key out of core dumps, and out of swap where the lock limit allows.
pub(super) fn protect(map: &MmapRaw) -> Result<(), MapError> {
    map.advise(Advice::DontDump).map_err(io_error("protect"))?;
    let locked = map.lock().map_err(|error| errno_of(&error));
    match locked {
        // The limit is for the key pool; what passes through here stays a moment.
        Ok(()) | Err(Errno::ENOMEM | Errno::EPERM | Errno::EAGAIN) => Ok(()),
        Err(source) => Err(MapError::Os {
            step: "lock",
            source,
        }),
    }
}

fn errno_of(error: &io::Error) -> Errno {
    error
        .raw_os_error()
        .map_or(Errno::UnknownErrno, Errno::from_raw)
}

pub(super) fn io_error(step: &'static str) -> impl FnOnce(io::Error) -> MapError {
    move |error| MapError::Os {
        step,
        source: errno_of(&error),
    }
}

/// Where a position is in the data.
#[expect(clippy::cast_possible_truncation, reason = "below the capacity")]
const fn place(position: u64, capacity: usize) -> usize {
    (position & (capacity as u64 - 1)) as usize
}

#[cfg(not(loom))]
pub(super) use mapped::Memory;
#[cfg(loom)]
pub(super) use modelled::Memory;

#[cfg(not(loom))]
#[allow(unsafe_code)]
mod mapped {
    use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

    use memmap2::{MmapOptions, MmapRaw};
    use nix::{
        errno::Errno,
        fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl},
        sys::{
            memfd::{MFdFlags, memfd_create},
            stat::fstat,
        },
        unistd::ftruncate,
    };

    use super::{super::HEADER_BYTES, AtomicU64, MapError};

    /// A shared mapping of a memfd that cannot shrink, or of a file that nobody should cut off.
    pub(in super::super) struct Memory(MmapRaw);

    impl Memory {
        /// Makes zeroed memory for a ring and seals its size.
        pub(in super::super) fn create(capacity_bytes: usize) -> Result<(Self, OwnedFd), MapError> {
            super::check_capacity(capacity_bytes)?;
            let len = i64::try_from(HEADER_BYTES + capacity_bytes)
                .map_err(|_| MapError::Capacity { capacity_bytes })?;
            let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
            let fd = memfd_create("qkd-ring", flags).map_err(os("create"))?;
            ftruncate(&fd, len).map_err(os("size"))?;
            // Takes the pages now: with none left this is an error, later it would be SIGBUS.
            fallocate(&fd, FallocateFlags::empty(), 0, len).map_err(os("reserve"))?;
            let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
            fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(os("seal"))?;
            Ok((Self::open(fd.as_fd())?.0, fd))
        }

        /// Maps the memory of a ring that another process made; also returns its capacity.
        pub(in super::super) fn open(fd: BorrowedFd<'_>) -> Result<(Self, usize), MapError> {
            // Of all descriptors only a memfd has seals.
            let seals = fcntl(fd, FcntlArg::F_GET_SEALS)
                .map_err(|_| MapError::NotSealed)
                .map(SealFlag::from_bits_truncate)?;
            if !seals.contains(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW) {
                return Err(MapError::NotSealed);
            }
            Self::open_unsealed(fd)
        }

        /// As [`open`](Self::open), for memory that whoever may write to it can cut off; after that, an access
        /// beyond its end ends this process (SIGBUS). For a producer, which rests on the bridge anyway; a
        /// consumer never does this.
        pub(in super::super) fn open_unsealed(
            fd: BorrowedFd<'_>,
        ) -> Result<(Self, usize), MapError> {
            let len = fstat(fd).map_err(os("examine"))?.st_size;
            let len = usize::try_from(len).unwrap_or(0);
            let capacity_bytes = len.saturating_sub(HEADER_BYTES);
            super::check_capacity(capacity_bytes)?;
            let map = MmapOptions::new().len(len).map_raw(fd.as_raw_fd());
            let memory = Self(map.map_err(super::io_error("map"))?);
            super::protect(&memory.0)?;
            Ok((memory, capacity_bytes))
        }

        /// The header's word at `offset_bytes`, a multiple of 8.
        pub(in super::super) fn word(&self, offset_bytes: usize) -> &AtomicU64 {
            assert!(offset_bytes.is_multiple_of(8));
            &self.words()[..HEADER_BYTES / 8][offset_bytes / 8]
        }

        /// The data, all of its `words`.
        pub(in super::super) fn data(&self, words: usize) -> &[AtomicU64] {
            &self.words()[HEADER_BYTES / 8..][..words]
        }

        fn words(&self) -> &[AtomicU64] {
            let words = self.0.len() / 8;
            // SAFETY:
            // - The pointer is aligned: the mapping begins at a page.
            // - It is valid for reads and writes of `words * 8` bytes, which are one mapping, for
            //   as long as `self`: the mapping is read-write, and the seals, checked in `open`,
            //   keep the file behind it from shrinking. Where there are none (`open_unsealed`), an access
            //   beyond the file's end has no result at all: the kernel ends the process. They are far fewer
            //   than `isize::MAX`.
            // - Every bit pattern is an `AtomicU64`, and the kernel gives initialised pages.
            // - This side's accesses are atomic, or the volatile ones of `copy`: all come through here.
            //   Another process cannot break the rules of this one's memory; to it a word is a word
            //   that may change at any time, which is what an atomic is.
            unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), words) }
        }
    }

    fn os(step: &'static str) -> impl FnOnce(Errno) -> MapError {
        move |source| MapError::Os { step, source }
    }
}

/// The same words where loom watches them.
#[cfg(loom)]
mod modelled {
    use std::os::fd::{BorrowedFd, OwnedFd};
    use std::sync::Arc;

    use super::{super::at, AtomicU64, MapError};

    #[derive(Clone)]
    pub(in super::super) struct Memory {
        header: Arc<[AtomicU64]>,
        data: Arc<[AtomicU64]>,
    }

    impl Memory {
        pub(in super::super) fn model(capacity_bytes: usize) -> Self {
            let zeros = |bytes: usize| (0..bytes / 8).map(|_| AtomicU64::new(0)).collect();
            Self {
                header: zeros(at::NEED_WAKEUP + 8),
                data: zeros(capacity_bytes),
            }
        }

        pub(in super::super) fn word(&self, offset_bytes: usize) -> &AtomicU64 {
            assert!(offset_bytes.is_multiple_of(8));
            &self.header[offset_bytes / 8]
        }

        pub(in super::super) fn data(&self, words: usize) -> &[AtomicU64] {
            &self.data[..words]
        }

        pub(in super::super) fn create(_: usize) -> Result<(Self, OwnedFd), MapError> {
            Err(MapError::NotSealed)
        }

        pub(in super::super) fn open(_: BorrowedFd<'_>) -> Result<(Self, usize), MapError> {
            Err(MapError::NotSealed)
        }

        pub(in super::super) fn open_unsealed(
            _: BorrowedFd<'_>,
        ) -> Result<(Self, usize), MapError> {
            Err(MapError::NotSealed)
        }
    }
}
