//! How the consumer gets at a ring's memory: mapped where it is sealed, by system calls where it is a file.
//!
//! Whoever may write to a file may cut it off, and touching a mapping beyond the file's end is SIGBUS, at
//! any moment: no look at the length before an access can rule it out, and a handler for the signal
//! would be the whole process's. `pread` and `pwrite` go to the same pages as the producer's mapping, and a
//! file that was cut off is an error there. That costs some system calls a record, and two things:
//!
//! - **A word that is copied by the kernel need not be copied whole.** Where the consumer reads one, it
//!   reads until it finds the same twice. Where it writes one that the producer goes by, the word stands
//!   twice, [`COPY_BYTES`] apart, the copy written first; the producer takes it where both agree and goes by
//!   what it saw before otherwise. A position that comes out wrong all the same leads to a record that is
//!   not there: generation, sequence number or check sequence find it, and the ring is thrown away.
//! - **System calls promise no order.** Fences stand around them in the places of the mapped case's
//!   orderings, which the models check: a fence orders what the processor did before against what it does
//!   after, whether this program did it or the kernel for it. Records that came too early all the same fail
//!   their check sequence.
//!
//! The file is mapped all the same, and that mapping never touched: it keeps key out of swap.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use memmap2::{MmapOptions, MmapRaw};
use nix::{errno::Errno, fcntl::FallocateFlags};

use super::{
    COPY_BYTES, HEADER_BYTES,
    fault::RingFault,
    memory::{self, MapError, Memory},
    sync::{Ordering, fence},
};

/// A consumer's way to its memory. What is mapped and sealed is always in reach.
pub(super) enum Reach {
    Sealed(Memory),
    File(RingFile),
}

/// A file on a `tmpfs` that the producer maps and may cut off.
pub(super) struct RingFile {
    file: File,
    len_bytes: u64,
    /// Never read or written: it only locks the pages.
    _locked: MmapRaw,
}

impl Reach {
    /// Gives an empty file its length and its pages: with none left this is an error, later it would be
    /// the producer's SIGBUS.
    pub(super) fn file(file: File, capacity_bytes: usize) -> Result<Self, MapError> {
        memory::check_capacity(capacity_bytes)?;
        let len_bytes = (HEADER_BYTES + capacity_bytes) as u64;
        let end = i64::try_from(len_bytes).map_err(|_| MapError::Capacity { capacity_bytes })?;
        let os = |step| move |source: Errno| MapError::Os { step, source };
        nix::fcntl::fallocate(&file, FallocateFlags::empty(), 0, end).map_err(os("reserve"))?;
        let map = MmapOptions::new().map_raw(file.as_raw_fd());
        let locked = map.map_err(memory::io_error("map"))?;
        memory::protect(&locked)?;
        Ok(Self::File(RingFile {
            file,
            len_bytes,
            _locked: locked,
        }))
    }

    /// Whether all of the memory is there still.
    pub(super) fn check(&self) -> Result<(), RingFault> {
        match self {
            Self::Sealed(_) => Ok(()),
            Self::File(file) => file.check(),
        }
    }

    /// The header's word at `offset_bytes`, a multiple of 8.
    pub(super) fn load(&self, offset_bytes: usize, order: Ordering) -> Result<u64, RingFault> {
        match self {
            Self::Sealed(memory) => Ok(memory.word(offset_bytes).load(order)),
            Self::File(file) => file.load(offset_bytes, order),
        }
    }

    /// Stores a word of the header that the producer reads once, or of which one byte matters.
    pub(super) fn store(
        &self,
        offset_bytes: usize,
        value: u64,
        order: Ordering,
    ) -> Result<(), RingFault> {
        match self {
            Self::Sealed(memory) => memory.word(offset_bytes).store(value, order),
            Self::File(file) => file.store(offset_bytes, value, order)?,
        }
        Ok(())
    }

    /// Stores a word of the consumer's line, which the producer goes by.
    pub(super) fn say(
        &self,
        offset_bytes: usize,
        value: u64,
        order: Ordering,
    ) -> Result<(), RingFault> {
        if let Self::File(file) = self {
            file.store(offset_bytes + COPY_BYTES, value, order)?;
        }
        // ORDERING: at least Release in a file, so that the copy is there first; `Producer::heard` looks at
        // the two the other way round.
        self.store(offset_bytes, value, order)
    }

    /// Copies `out.len()` bytes from the ring, starting at `position`, a multiple of 8.
    pub(super) fn copy_out(
        &self,
        capacity: usize,
        position: u64,
        out: &mut [u8],
    ) -> Result<(), RingFault> {
        match self {
            Self::Sealed(memory) => memory.copy_out(capacity, position, out),
            Self::File(file) => {
                let (place, first) = memory::front(position, capacity, out.len());
                let (front, back) = out.split_at_mut(first);
                file.read(HEADER_BYTES + place, front)?;
                file.read(HEADER_BYTES, back)?;
            }
        }
        Ok(())
    }

    /// Makes `len_bytes` of the ring zero, starting at `position`, both multiples of 8.
    pub(super) fn wipe(
        &self,
        capacity: usize,
        position: u64,
        len_bytes: usize,
    ) -> Result<(), RingFault> {
        match self {
            Self::Sealed(memory) => memory.wipe(capacity, position, len_bytes),
            Self::File(file) => {
                let (place, first) = memory::front(position, capacity, len_bytes);
                file.wipe(HEADER_BYTES + place, first)?;
                file.wipe(HEADER_BYTES, len_bytes - first)?;
            }
        }
        Ok(())
    }
}

impl RingFile {
    fn check(&self) -> Result<(), RingFault> {
        let len_bytes = self.file.metadata().map_err(out_of_reach)?.len();
        if len_bytes < self.len_bytes {
            return Err(out_of_reach(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(())
    }

    fn load(&self, offset_bytes: usize, order: Ordering) -> Result<u64, RingFault> {
        let word = || {
            let mut word = [0; 8];
            self.read(offset_bytes, &mut word)?;
            Ok(u64::from_le_bytes(word))
        };
        let mut value = word()?;
        for _ in 0..LOOKS {
            let again = word()?;
            if again == value {
                break;
            }
            value = again;
        }
        if order != Ordering::Relaxed {
            // ORDERING: in place of the load's own: what is read from here on is read after it.
            fence(order);
        }
        Ok(value)
    }

    fn store(&self, offset_bytes: usize, value: u64, order: Ordering) -> Result<(), RingFault> {
        // ORDERING: in place of the store's own: what was written before is written first.
        fence(match order {
            Ordering::Relaxed => Ordering::Release,
            order => order,
        });
        self.write(offset_bytes, &value.to_le_bytes())
    }

    fn read(&self, at: usize, out: &mut [u8]) -> Result<(), RingFault> {
        self.file
            .read_exact_at(out, at as u64)
            .map_err(out_of_reach)
    }

    fn write(&self, at: usize, bytes: &[u8]) -> Result<(), RingFault> {
        self.file
            .write_all_at(bytes, at as u64)
            .map_err(out_of_reach)
    }

    fn wipe(&self, at: usize, len_bytes: usize) -> Result<(), RingFault> {
        for start in (0..len_bytes).step_by(ZEROS.len()) {
            let len = ZEROS.len().min(len_bytes - start);
            self.write(at + start, &ZEROS[..len])?;
        }
        Ok(())
    }
}

fn out_of_reach(error: io::Error) -> RingFault {
    let error = error.kind();
    RingFault::Memory { error }
}

/// Looks at a word that changes all the time before it is taken as it is.
const LOOKS: u32 = 8;

static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
