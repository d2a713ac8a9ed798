//! The bridge's half of the ring, which trusts nothing it reads there.

use std::{num::NonZeroU64, os::fd::OwnedFd};

use super::{
    KIND_END, KIND_KEY, KIND_STATUS, MAGIC, MAX_PAYLOAD_BYTES, NO_NUMBER, RECORD_ALIGN_BYTES,
    RECORD_HEADER_BYTES, VERSION_WORD, at, checked_head,
    memory::{MapError, Memory},
    record_bytes,
    sync::{Ordering, fence},
};
use crate::{
    block::{self, BlockError, BlockHeader},
    check::crc32c,
    status::{MAX_STATUS_BYTES, ModuleState, Status, StatusError},
    wipe,
};

/// Reads records. Never waits.
///
/// All it goes by are its own copies: positions, sequence number, generation and capacity are never
/// read back from the shared memory.
pub struct Consumer {
    memory: Memory,
    capacity_bytes: usize,
    generation: u64,
    read_pos: u64,
    /// The producer claimed to be this far.
    write_seen: u64,
    seq: u64,
    /// The numbering that the producer's blocks belong to, once it has said so.
    session: Option<NonZeroU64>,
    wants_wakeup: bool,
    fault: Option<RingFault>,
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A key block; its key is in the first bytes of the caller's buffer.
    Block(BlockHeader),
    /// How the module is.
    Status(Status),
    /// No more blocks come.
    End,
}

/// Why no record was read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The buffer cannot hold the next key. Nothing was consumed; call again with a longer one.
    #[error("buffer holds {have} bytes, the next key has {need}")]
    BufferTooSmall {
        /// Length of the buffer.
        have: usize,
        /// Length of the key.
        need: usize,
    },
    /// An intact record holds no valid block. It was dropped; the next call reads the next.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// An intact record holds no valid status. It was dropped; the next call reads the next.
    #[error(transparent)]
    Status(#[from] StatusError),
    /// The ring cannot be read any more. Latched: close the connection and make a new ring.
    #[error("the ring is corrupt")]
    Corrupt(#[source] RingFault),
}

/// How a producer broke the rules of the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingFault {
    /// The write position went back, jumped ahead, or is not that of a record.
    #[error("write position {write_pos} after {seen}, read position {read_pos}")]
    WritePosition {
        /// What was found.
        write_pos: u64,
        /// What had been found before.
        seen: u64,
        /// What has been read.
        read_pos: u64,
    },
    /// A payload that is empty, too long for its kind, or longer than what was written.
    #[error("record {seq}: payload of {len} bytes")]
    Length {
        /// The record.
        seq: u64,
        /// The length found.
        len: u32,
    },
    /// A kind that does not exist.
    #[error("record {seq}: kind {kind}")]
    Kind {
        /// The record.
        seq: u64,
        /// The kind found.
        kind: u32,
    },
    /// A record that is not the next.
    #[error("record {got} where {want} is due")]
    Sequence {
        /// The number found.
        got: u64,
        /// The number due.
        want: u64,
    },
    /// Records without a session, or with another one than before in the same ring.
    #[error("session {got} in a ring of session {want}")]
    Session {
        /// The session found.
        got: u64,
        /// The one before; 0 if there was none.
        want: u64,
    },
    /// A record of another ring.
    #[error("record of generation {got} in a ring of generation {want}")]
    Generation {
        /// The generation found.
        got: u64,
        /// The ring's.
        want: u64,
    },
    /// A record that is not what was written, or was not written whole.
    #[error("record {seq}: check sequence {got:#010x}, expected {want:#010x}")]
    Checksum {
        /// The record.
        seq: u64,
        /// In the record.
        got: u32,
        /// Computed.
        want: u32,
    },
}

/// What the producer says of itself. Claims, each for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProducerStatus {
    /// The producer's monotonic clock when it last wrote here, in ns: alive while this changes.
    pub heartbeat_ns: u64,
    /// What the module is doing.
    pub state: Option<ModuleState>,
    /// Blocks that it dropped for want of room.
    pub dropped_blocks: u64,
}

/// What a record's header says, copied out once and not believed yet.
struct Claim {
    len: u32,
    kind: u32,
    seq: u64,
    generation: u64,
    crc: u32,
}

impl Consumer {
    /// Makes a ring and the descriptor of its memory, which goes to the producer.
    ///
    /// `generation` is one that no earlier ring of this device had; `device` tells the producer
    /// whom it is taken for.
    ///
    /// # Errors
    ///
    /// See [`MapError`]; nothing stays mapped.
    pub fn create(
        capacity_bytes: usize,
        generation: u64,
        device: u128,
    ) -> Result<(Self, OwnedFd), MapError> {
        let (memory, fd) = Memory::create(capacity_bytes)?;
        Ok((Self::over(memory, capacity_bytes, generation, device), fd))
    }

    pub(super) fn over(
        memory: Memory,
        capacity_bytes: usize,
        generation: u64,
        device: u128,
    ) -> Self {
        let [d0, d1] = [0, 64].map(|shift| u64::try_from(device >> shift & u128::from(u64::MAX)));
        let words = [
            (at::MAGIC, u64::from_le_bytes(MAGIC)),
            (at::VERSION, VERSION_WORD),
            (at::CAPACITY, capacity_bytes as u64),
            (at::GENERATION, generation),
            (at::DEVICE, d0.unwrap_or(0)),
            (at::DEVICE + 8, d1.unwrap_or(0)),
            (at::DURABLE, NO_NUMBER),
        ];
        for (offset, value) in words {
            // ORDERING: Relaxed; the producer maps the memory after it is sent the descriptor.
            memory.word(offset).store(value, Ordering::Relaxed);
        }
        Self {
            memory,
            capacity_bytes,
            generation,
            read_pos: 0,
            write_seen: 0,
            seq: 0,
            session: None,
            wants_wakeup: false,
            fault: None,
        }
    }

    /// The ring's generation, for the greeting.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The numbering that the producer's blocks belong to; `None` while it has not said so. From then on
    /// it does not change.
    ///
    /// # Errors
    ///
    /// [`ReadError::Corrupt`], latched.
    pub fn session(&mut self) -> Result<Option<NonZeroU64>, ReadError> {
        if let Some(fault) = self.fault {
            return Err(ReadError::Corrupt(fault));
        }
        if self.session.is_none() {
            self.pending_bytes()
                .inspect_err(|fault| self.fault = Some(*fault))
                .map_err(ReadError::Corrupt)?;
        }
        Ok(self.session)
    }

    /// From now on durable numbers are those of `session`, where `durable` is the highest; what was
    /// said of another session does not hold for this one's blocks.
    pub fn begin_session(&mut self, session: NonZeroU64, durable: Option<u64>) {
        self.set_durable(durable.unwrap_or(NO_NUMBER));
        // ORDERING: Release; pairs with the Acquire load in `Producer::durable`.
        self.memory
            .word(at::DURABLE_SESSION)
            .store(session.get(), Ordering::Release);
    }

    /// Reads the next record; `None` if there is none. A block's key goes to the front of
    /// `key_out`, whose other bytes may be overwritten.
    ///
    /// What was read is wiped from the shared memory before the producer may write there again.
    ///
    /// # Errors
    ///
    /// See [`ReadError`]; except after `BufferTooSmall`, `key_out` holds no key.
    pub fn read(&mut self, key_out: &mut [u8]) -> Result<Option<Record>, ReadError> {
        if let Some(fault) = self.fault {
            return Err(ReadError::Corrupt(fault));
        }
        let result = self.read_next(key_out);
        match &result {
            Ok(_) | Err(ReadError::BufferTooSmall { .. }) => {}
            Err(error) => {
                if let ReadError::Corrupt(fault) = error {
                    self.fault = Some(*fault);
                }
                wipe(key_out);
            }
        }
        result
    }

    /// Call before sleeping on the eventfd: asks the producer to write to it, and returns whether
    /// there is nothing to read, so that it is safe to sleep.
    ///
    /// The wish ends with the next record that is read.
    pub fn prepare_wait(&mut self) -> bool {
        self.set_need_wakeup(true);
        // ORDERING: pairs with the fence in `Producer::write`: either the load below sees its
        // record, or it sees our wish and wakes us.
        fence(Ordering::SeqCst);
        // ORDERING: Relaxed; ordered by the fence, and `read` looks again before it reads records.
        let write_pos = self.memory.word(at::WRITE_POS).load(Ordering::Relaxed);
        // A faulty position is for `read` to find.
        write_pos == self.read_pos && self.fault.is_none()
    }

    /// Tells the producer that every block up to `number` is durable, in the session that
    /// [`begin_session`](Self::begin_session) named last.
    pub fn set_durable(&mut self, number: u64) {
        // ORDERING: Relaxed; the word stands by itself, see `Producer::durable`.
        self.memory
            .word(at::DURABLE)
            .store(number, Ordering::Relaxed);
    }

    /// What the producer says of itself.
    #[must_use]
    pub fn producer_status(&self) -> ProducerStatus {
        // ORDERING: Relaxed; each word stands by itself, see `Producer::beat`.
        let word = |offset| self.memory.word(offset).load(Ordering::Relaxed);
        ProducerStatus {
            heartbeat_ns: word(at::HEARTBEAT),
            state: match word(at::STATE) & u64::from(u32::MAX) {
                1 => Some(ModuleState::Starting),
                2 => Some(ModuleState::Running),
                3 => Some(ModuleState::Fault),
                4 => Some(ModuleState::Stopped),
                _ => None,
            },
            dropped_blocks: word(at::DROPPED),
        }
    }

    fn read_next(&mut self, key_out: &mut [u8]) -> Result<Option<Record>, ReadError> {
        let pending_bytes = self.pending_bytes().map_err(ReadError::Corrupt)?;
        if pending_bytes == 0 {
            return Ok(None);
        }
        let claim = self.claim();
        let payload_bytes = self.check(&claim, pending_bytes)?;
        let payload = self.read_pos + RECORD_HEADER_BYTES as u64;
        let checked = checked_head(claim.len, claim.kind, claim.seq, claim.generation);
        if claim.kind == KIND_KEY {
            let mut head = [0; block::HEADER_BYTES];
            let need = payload_bytes - head.len();
            let have = key_out.len();
            let Some(key) = key_out.get_mut(..need) else {
                return Err(ReadError::BufferTooSmall { have, need });
            };
            self.copy_out(payload, &mut head);
            self.copy_out(payload + head.len() as u64, key);
            self.accept(&claim, crc32c(&[&checked, &head, key]))?;
            let header = BlockHeader::decode_parts(&head, key)?;
            return Ok(Some(Record::Block(header)));
        }
        let mut text = [0; MAX_STATUS_BYTES];
        let text = &mut text[..payload_bytes];
        self.copy_out(payload, text);
        self.accept(&claim, crc32c(&[&checked, text]))?;
        Ok(Some(if claim.kind == KIND_STATUS {
            // A lone line end stands for an empty status.
            Record::Status(Status::decode(text.strip_prefix(b"\n").unwrap_or(text))?)
        } else {
            Record::End
        }))
    }

    /// How far the producer claims to be ahead, checked against what can be. Looks at its words only
    /// when all that it claimed before is read: they change with every record, and fetching them costs
    /// as much as a record does.
    fn pending_bytes(&mut self) -> Result<u64, RingFault> {
        if self.read_pos != self.write_seen {
            return Ok(self.write_seen - self.read_pos);
        }
        // ORDERING: Acquire pairs with the Release store in `Producer::write`: the records before
        // this position are written.
        let write_pos = self.memory.word(at::WRITE_POS).load(Ordering::Acquire);
        let pending = write_pos.wrapping_sub(self.read_pos);
        let possible = write_pos >= self.write_seen
            && pending <= self.capacity_bytes as u64
            && pending.is_multiple_of(RECORD_ALIGN_BYTES as u64);
        if !possible {
            return Err(RingFault::WritePosition {
                write_pos,
                seen: self.write_seen,
                read_pos: self.read_pos,
            });
        }
        // ORDERING: Relaxed; written before the first record, and published with it.
        let got = self.memory.word(at::SESSION).load(Ordering::Relaxed);
        let want = self.session.map_or(0, NonZeroU64::get);
        if got != want && want != 0 || got == 0 && pending > 0 {
            return Err(RingFault::Session { got, want });
        }
        self.session = NonZeroU64::new(got);
        self.write_seen = write_pos;
        Ok(pending)
    }

    fn claim(&self) -> Claim {
        let mut head = [0; RECORD_HEADER_BYTES];
        self.copy_out(self.read_pos, &mut head);
        let [
            l0,
            l1,
            l2,
            l3,
            k0,
            k1,
            k2,
            k3, //
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7, //
            g0,
            g1,
            g2,
            g3,
            g4,
            g5,
            g6,
            g7, //
            c0,
            c1,
            c2,
            c3,
            ..,
        ] = head;
        Claim {
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            seq: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            generation: u64::from_le_bytes([g0, g1, g2, g3, g4, g5, g6, g7]),
            crc: u32::from_le_bytes([c0, c1, c2, c3]),
        }
    }

    /// The payload's length in bytes, if the claim fits this ring at this place.
    fn check(&self, claim: &Claim, pending_bytes: u64) -> Result<usize, ReadError> {
        let Claim { len, kind, .. } = *claim;
        let corrupt = |fault| Err(ReadError::Corrupt(fault));
        let (got, want) = (claim.generation, self.generation);
        if got != want {
            return corrupt(RingFault::Generation { got, want });
        }
        let (got, want) = (claim.seq, self.seq);
        if got != want {
            return corrupt(RingFault::Sequence { got, want });
        }
        let seq = want;
        let (min, max) = match kind {
            KIND_KEY => (block::HEADER_BYTES, MAX_PAYLOAD_BYTES),
            KIND_STATUS => (1, MAX_STATUS_BYTES),
            KIND_END => (1, 1),
            kind => return corrupt(RingFault::Kind { seq, kind }),
        };
        let payload_bytes = len as usize;
        let fits = (min..=max).contains(&payload_bytes)
            && record_bytes(payload_bytes) as u64 <= pending_bytes;
        if !fits {
            return corrupt(RingFault::Length { seq, len });
        }
        Ok(payload_bytes)
    }

    /// Consumes the record whose copy has this check sequence, if it is the one claimed.
    fn accept(&mut self, claim: &Claim, want: u32) -> Result<(), ReadError> {
        if claim.crc != want {
            return Err(ReadError::Corrupt(RingFault::Checksum {
                seq: self.seq,
                got: claim.crc,
                want,
            }));
        }
        self.consume(record_bytes(claim.len as usize));
        if self.wants_wakeup {
            self.set_need_wakeup(false);
        }
        Ok(())
    }

    fn consume(&mut self, record_bytes: usize) {
        self.memory
            .wipe(self.capacity_bytes, self.read_pos, record_bytes);
        self.read_pos += record_bytes as u64;
        self.seq += 1;
        // ORDERING: Release gives the wiped room back; pairs with the Acquire load in
        // `Producer::look_at_reader`.
        self.memory
            .word(at::READ_POS)
            .store(self.read_pos, Ordering::Release);
    }

    fn copy_out(&self, position: u64, out: &mut [u8]) {
        self.memory.copy_out(self.capacity_bytes, position, out);
    }

    fn set_need_wakeup(&mut self, wanted: bool) {
        self.wants_wakeup = wanted;
        // ORDERING: Relaxed; `prepare_wait` orders it with a fence, and taking the wish back late
        // costs a wake-up only.
        self.memory
            .word(at::NEED_WAKEUP)
            .store(u64::from(wanted), Ordering::Relaxed);
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        // What was not read comes again in another ring.
        self.memory
            .wipe(self.capacity_bytes, 0, self.capacity_bytes);
    }
}

impl std::fmt::Debug for Consumer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Consumer")
            .field("capacity_bytes", &self.capacity_bytes)
            .field("generation", &self.generation)
            .field("read_pos", &self.read_pos)
            .field("seq", &self.seq)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}
