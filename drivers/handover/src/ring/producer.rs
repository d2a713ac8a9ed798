//! The hardware's half of the ring.

use std::{num::NonZeroU64, os::fd::BorrowedFd};

use zeroize::Zeroizing;

use super::{
    COPY_BYTES, KIND_END, KIND_KEY, KIND_STATUS, MAGIC, MAX_PAYLOAD_BYTES, NO_NUMBER,
    RECORD_ALIGN_BYTES, RECORD_HEADER_BYTES, VERSION_WORD, at, checked_head,
    greeting::Greeting,
    memory::{MapError, Memory},
    record_bytes,
    sync::{Ordering, fence},
};
use crate::{
    block::{BlockError, BlockHeader},
    check::crc32c,
    status::{ModuleState, Status},
};

/// Writes records. Never waits.
pub struct Producer {
    memory: Memory,
    capacity_bytes: usize,
    /// The consumer's words stand twice.
    in_file: bool,
    generation: u64,
    session: NonZeroU64,
    write_pos: u64,
    /// The consumer is at least this far.
    read_seen: u64,
    seq: u64,
}

/// Why a ring cannot be written to. Nothing was written; close the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The memory cannot be had.
    #[error(transparent)]
    Map(#[from] MapError),
    /// What the header says is not this ring.
    #[error("the ring's header has an unexpected {field}")]
    Header {
        /// The first field that differs.
        field: &'static str,
    },
}

/// Why a record was not written. Nothing was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// No room until the consumer has read more; try again.
    #[error("ring has {free_bytes} bytes free, {need_bytes} needed")]
    Full {
        /// Bytes that the record takes.
        need_bytes: usize,
        /// Bytes there are.
        free_bytes: usize,
    },
    /// More than this ring can ever take.
    #[error("record of {need_bytes} bytes in a ring of {capacity_bytes}")]
    TooLong {
        /// Bytes that the record takes.
        need_bytes: usize,
        /// Size of the ring.
        capacity_bytes: usize,
    },
    /// The key is not as its header says.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The read position is one that no consumer can have; close the connection.
    #[error("read position {read_pos} with write position {write_pos}")]
    ReadPosition {
        /// What was found.
        read_pos: u64,
        /// What this producer has written.
        write_pos: u64,
    },
}

/// What a broken producer does to a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harm {
    /// A bit of the key is changed after the check sequence was computed; counted around.
    Flip {
        /// The bit.
        bit: usize,
    },
    /// Only the first [`RECORD_ALIGN_BYTES`] of it are published.
    Short,
    /// It is written and not published, as when the producer dies.
    Unfinished,
}

impl Producer {
    /// Begins to write to the ring that came with `greeting`. `session` is drawn anew whenever the
    /// device begins to number its blocks anew, and at no other time. Wake the consumer once after this:
    /// it then knows of the session before there is a block.
    ///
    /// # Errors
    ///
    /// See [`AttachError`]; nothing was written.
    pub fn attach(
        fd: BorrowedFd<'_>,
        greeting: &Greeting,
        session: NonZeroU64,
    ) -> Result<Self, AttachError> {
        let (memory, capacity_bytes) = Memory::open(fd)?;
        Self::over(memory, capacity_bytes, greeting.generation, session)
    }

    /// As [`attach`](Self::attach), to a ring in a file; also returns the greeting, which its header holds.
    /// Lock the file (`flock`) and open its FIFO before, so that no other producer writes to it and the
    /// consumer hears when this one is gone.
    ///
    /// # Errors
    ///
    /// See [`AttachError`]; nothing was written. A ring that another producer has used is refused: the
    /// consumer puts a new one in its place.
    pub fn attach_file(
        fd: BorrowedFd<'_>,
        session: NonZeroU64,
    ) -> Result<(Self, Greeting), AttachError> {
        let (memory, capacity_bytes) = Memory::open_unsealed(fd)?;
        // ORDERING: Acquire, as in `durable`; the rest was written before the file had a name.
        let word = |offset| memory.word(offset).load(Ordering::Acquire);
        let said = |field, offset| {
            let value = word(offset);
            let is_whole = value == word(offset + COPY_BYTES);
            is_whole
                .then_some(value)
                .ok_or(AttachError::Header { field })
        };
        if word(at::SESSION) != 0 {
            return Err(AttachError::Header { field: "session" });
        }
        let durable_session = said("durable number's session", at::DURABLE_SESSION)?;
        let last_durable = said("durable number", at::DURABLE)?;
        let greeting = Greeting {
            generation: word(at::GENERATION),
            last_durable: (last_durable != NO_NUMBER).then_some(last_durable),
            session: durable_session,
        };
        let mut producer = Self::over(memory, capacity_bytes, greeting.generation, session)?;
        producer.in_file = true;
        Ok((producer, greeting))
    }

    pub(super) fn over(
        memory: Memory,
        capacity_bytes: usize,
        generation: u64,
        session: NonZeroU64,
    ) -> Result<Self, AttachError> {
        // ORDERING: Relaxed; the consumer wrote these before it sent the descriptor.
        let word = |offset| memory.word(offset).load(Ordering::Relaxed);
        let expected = [
            ("magic", at::MAGIC, u64::from_le_bytes(MAGIC)),
            ("version", at::VERSION, VERSION_WORD),
            ("capacity", at::CAPACITY, capacity_bytes as u64),
            ("generation", at::GENERATION, generation),
            ("write position", at::WRITE_POS, 0),
            ("read position", at::READ_POS, 0),
        ];
        for (field, offset, value) in expected {
            if word(offset) != value {
                return Err(AttachError::Header { field });
            }
        }
        // ORDERING: Relaxed; the first record's Release store comes after it.
        memory
            .word(at::SESSION)
            .store(session.get(), Ordering::Relaxed);
        Ok(Self {
            memory,
            capacity_bytes,
            in_file: false,
            generation,
            session,
            write_pos: 0,
            read_seen: 0,
            seq: 0,
        })
    }

    /// Writes a key block. Returns whether the consumer sleeps: then wake it through the eventfd.
    ///
    /// # Errors
    ///
    /// See [`WriteError`]; nothing was written.
    pub fn write_block(&mut self, header: &BlockHeader, key: &[u8]) -> Result<bool, WriteError> {
        let head = header.encode(key)?;
        self.write(KIND_KEY, &head, key)
    }

    /// Writes a status; as [`write_block`](Self::write_block).
    ///
    /// # Errors
    ///
    /// [`WriteError::Full`], [`WriteError::ReadPosition`]; nothing was written.
    pub fn write_status(&mut self, status: &Status) -> Result<bool, WriteError> {
        // One byte at least: a record of no bytes is none.
        let text = status.encode();
        let text = if text.is_empty() { "\n" } else { &text };
        self.write(KIND_STATUS, text.as_bytes(), &[])
    }

    /// Writes that no more blocks come; as [`write_block`](Self::write_block).
    ///
    /// # Errors
    ///
    /// [`WriteError::Full`], [`WriteError::ReadPosition`]; nothing was written.
    pub fn write_end(&mut self) -> Result<bool, WriteError> {
        self.write(KIND_END, &[0], &[])
    }

    /// Tells the consumer that this process lives, what it does, and how many blocks it had to drop.
    pub fn beat(&mut self, monotonic_ns: u64, state: Option<ModuleState>, dropped_blocks: u64) {
        let words = [
            (at::HEARTBEAT, monotonic_ns),
            (at::STATE, state.map_or(0, state_code)),
            (at::DROPPED, dropped_blocks),
        ];
        for (offset, value) in words {
            // ORDERING: Relaxed; each word stands by itself, see `Consumer::producer_status`.
            self.memory.word(offset).store(value, Ordering::Relaxed);
        }
    }

    /// The highest block number of this session that the consumer holds durably: it and all before may
    /// be forgotten. `None` says nothing new.
    #[must_use]
    pub fn durable(&self) -> Option<u64> {
        // ORDERING: Acquire pairs with the Release store in `Consumer::begin_session`: a number that was
        // left from the session before is not seen after this.
        let session = self.heard(at::DURABLE_SESSION, Ordering::Acquire)?;
        if session != self.session.get() {
            return None;
        }
        // ORDERING: Relaxed; within a session the word stands by itself, see `Consumer::set_durable`.
        let number = self.heard(at::DURABLE, Ordering::Relaxed)?;
        (number != NO_NUMBER).then_some(number)
    }

    /// A word of the consumer's; `None` while it is being written, which takes a moment in a file.
    fn heard(&self, offset_bytes: usize, order: Ordering) -> Option<u64> {
        let value = self.memory.word(offset_bytes).load(order);
        if self.in_file {
            // ORDERING: as the first; what was read before is older than both.
            let copy = self.memory.word(offset_bytes + COPY_BYTES).load(order);
            return (copy == value).then_some(value);
        }
        Some(value)
    }

    /// Whether the consumer has read everything. That it has does not make it durable.
    ///
    /// # Errors
    ///
    /// [`WriteError::ReadPosition`]: close the connection.
    pub fn is_drained(&mut self) -> Result<bool, WriteError> {
        self.look_at_reader()?;
        Ok(self.read_seen == self.write_pos)
    }

    /// Writes a key block as a broken producer would, for tests and simulated devices; as
    /// [`write_block`](Self::write_block).
    ///
    /// # Errors
    ///
    /// See [`WriteError`]; nothing was written.
    pub fn write_block_with(
        &mut self,
        header: &BlockHeader,
        key: &[u8],
        harm: Harm,
    ) -> Result<bool, WriteError> {
        let head = header.encode(key)?;
        self.write_with(KIND_KEY, &head, key, Some(harm))
    }

    fn write(&mut self, kind: u32, head: &[u8], tail: &[u8]) -> Result<bool, WriteError> {
        self.write_with(kind, head, tail, None)
    }

    fn write_with(
        &mut self,
        kind: u32,
        head: &[u8],
        tail: &[u8],
        harm: Option<Harm>,
    ) -> Result<bool, WriteError> {
        let payload_bytes = head.len() + tail.len();
        let need_bytes = record_bytes(payload_bytes);
        self.make_room(need_bytes)?;
        debug_assert!(payload_bytes <= MAX_PAYLOAD_BYTES && (tail.is_empty() || head.len() == 24));
        // `make_room` bounds the length by the ring's, which is far below 4 GiB.
        let len = u32::try_from(payload_bytes).map_err(|_| WriteError::TooLong {
            need_bytes,
            capacity_bytes: self.capacity_bytes,
        })?;
        let record = checked_head(len, kind, self.seq, self.generation);
        let crc = crc32c(&[&record, head, tail]);

        let (capacity, start) = (self.capacity_bytes, self.write_pos);
        let payload = start + RECORD_HEADER_BYTES as u64;
        let memory = &self.memory;
        memory.copy_in(capacity, payload, head);
        match harm {
            Some(Harm::Flip { bit }) if !tail.is_empty() => {
                let mut tail = Zeroizing::new(tail.to_vec());
                let byte = bit / 8 % tail.len();
                tail[byte] ^= 0x80 >> (bit % 8);
                memory.copy_in(capacity, payload + head.len() as u64, &tail);
            }
            _ => memory.copy_in(capacity, payload + head.len() as u64, tail),
        }
        memory.copy_in(capacity, start + 24, &u64::from(crc).to_le_bytes());
        memory.copy_in(capacity, start, &record);

        if harm == Some(Harm::Unfinished) {
            return Ok(false);
        }
        self.seq += 1;
        self.write_pos += need_bytes as u64;
        let published = match harm {
            Some(Harm::Short) => start + RECORD_ALIGN_BYTES as u64,
            _ => self.write_pos,
        };
        // ORDERING: Release publishes the record; pairs with the Acquire load in `Consumer::read`.
        memory
            .word(at::WRITE_POS)
            .store(published, Ordering::Release);
        // ORDERING: pairs with the fence in `Consumer::prepare_wait`: either the load below sees
        // that it wants to sleep, or its look at the write position sees the record.
        fence(Ordering::SeqCst);
        // ORDERING: Relaxed; ordered by the fence.
        Ok(memory.word(at::NEED_WAKEUP).load(Ordering::Relaxed) != 0)
    }

    fn make_room(&mut self, need_bytes: usize) -> Result<(), WriteError> {
        if need_bytes > self.capacity_bytes {
            return Err(WriteError::TooLong {
                need_bytes,
                capacity_bytes: self.capacity_bytes,
            });
        }
        if self.free_bytes() < need_bytes {
            self.look_at_reader()?;
        }
        let free_bytes = self.free_bytes();
        if free_bytes < need_bytes {
            return Err(WriteError::Full {
                need_bytes,
                free_bytes,
            });
        }
        Ok(())
    }

    fn free_bytes(&self) -> usize {
        let used = self.write_pos - self.read_seen;
        // `used` is at most the capacity: `make_room` came before every write.
        usize::try_from(used).map_or(0, |used| self.capacity_bytes - used)
    }

    fn look_at_reader(&mut self) -> Result<(), WriteError> {
        // ORDERING: Acquire pairs with the Release store in `Consumer::consume`: its wiping of the
        // room happens before our writing to it.
        let Some(read_pos) = self.heard(at::READ_POS, Ordering::Acquire) else {
            return Ok(());
        };
        if read_pos < self.read_seen || read_pos > self.write_pos {
            return Err(WriteError::ReadPosition {
                read_pos,
                write_pos: self.write_pos,
            });
        }
        self.read_seen = read_pos;
        Ok(())
    }
}

impl std::fmt::Debug for Producer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Producer")
            .field("capacity_bytes", &self.capacity_bytes)
            .field("generation", &self.generation)
            .field("write_pos", &self.write_pos)
            .field("seq", &self.seq)
            .finish_non_exhaustive()
    }
}

const fn state_code(state: ModuleState) -> u64 {
    match state {
        ModuleState::Starting => 1,
        ModuleState::Running => 2,
        ModuleState::Fault => 3,
        ModuleState::Stopped => 4,
    }
}
