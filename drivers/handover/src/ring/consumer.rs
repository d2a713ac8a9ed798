//! The bridge's half of the ring, which trusts nothing it reads there.

use std::{fs::File, num::NonZeroU64, os::fd::OwnedFd};

use super::{
    KIND_END, KIND_KEY, KIND_STATUS, MAGIC, MAX_PAYLOAD_BYTES, NO_NUMBER, RECORD_ALIGN_BYTES,
    RECORD_HEADER_BYTES, VERSION_WORD, at, checked_head,
    fault::{ReadError, RingFault},
    memory::{MapError, Memory},
    reach::Reach,
    record_bytes,
    sync::{Ordering, fence},
};
use crate::{
    block::{self, BlockHeader},
    check::crc32c,
    status::{MAX_STATUS_BYTES, ModuleState, Status},
    wipe,
};

/// Reads records. Never waits.
///
/// All it goes by are its own copies: positions, sequence number, generation and capacity are never
/// read back from the shared memory.
pub struct Consumer {
    memory: Reach,
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
        let reach = Reach::Sealed(memory);
        let consumer = Self::over(reach, capacity_bytes, generation, device);
        Ok((consumer.map_err(MapError::Unreachable)?, fd))
    }

    /// Makes a ring in an empty file on a `tmpfs`. It cannot be sealed, so this side never maps it: see
    /// `reach`. When this returns, the header says all that a greeting would
    /// ([`begin_session`](Self::begin_session) gives it what is durable): now the file may get its name.
    ///
    /// # Errors
    ///
    /// See [`MapError`]; the file is of no use.
    pub fn in_file(
        file: File,
        capacity_bytes: usize,
        generation: u64,
        device: u128,
    ) -> Result<Self, MapError> {
        let reach = Reach::file(file, capacity_bytes)?;
        let consumer = Self::over(reach, capacity_bytes, generation, device);
        consumer.map_err(MapError::Unreachable)
    }

    pub(super) fn over(
        memory: Reach,
        capacity_bytes: usize,
        generation: u64,
        device: u128,
    ) -> Result<Self, RingFault> {
        let [d0, d1] = [0, 64].map(|shift| u64::try_from(device >> shift & u128::from(u64::MAX)));
        let words = [
            (at::MAGIC, u64::from_le_bytes(MAGIC)),
            (at::VERSION, VERSION_WORD),
            (at::CAPACITY, capacity_bytes as u64),
            (at::GENERATION, generation),
            (at::DEVICE, d0.unwrap_or(0)),
            (at::DEVICE + 8, d1.unwrap_or(0)),
        ];
        for (offset, value) in words {
            // ORDERING: Relaxed; the producer maps the memory after it is sent the descriptor, or finds
            // the file's name.
            memory.store(offset, value, Ordering::Relaxed)?;
        }
        memory.say(at::DURABLE, NO_NUMBER, Ordering::Relaxed)?;
        Ok(Self {
            memory,
            capacity_bytes,
            generation,
            read_pos: 0,
            write_seen: 0,
            seq: 0,
            session: None,
            wants_wakeup: false,
            fault: None,
        })
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
            let looked = self.pending_bytes().map(drop);
            self.latch(looked)?;
        }
        Ok(self.session)
    }

    /// From now on durable numbers are those of `session`, where `durable` is the highest; what was
    /// said of another session does not hold for this one's blocks.
    pub fn begin_session(&mut self, session: NonZeroU64, durable: Option<u64>) {
        self.set_durable(durable.unwrap_or(NO_NUMBER));
        // ORDERING: Release; pairs with the Acquire load in `Producer::durable`.
        let said = self
            .memory
            .say(at::DURABLE_SESSION, session.get(), Ordering::Release);
        // What cannot be said is latched, and the next `read` tells it.
        let _ = self.latch(said);
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
        let looked = self.is_empty_after_wish();
        // A faulty position is for `read` to find.
        self.latch(looked) == Ok(true) && self.fault.is_none()
    }

    fn is_empty_after_wish(&mut self) -> Result<bool, RingFault> {
        self.memory.check()?;
        self.set_need_wakeup(true)?;
        // ORDERING: pairs with the fence in `Producer::write`: either the load below sees its
        // record, or it sees our wish and wakes us.
        fence(Ordering::SeqCst);
        // ORDERING: Relaxed; ordered by the fence, and `read` looks again before it reads records.
        let write_pos = self.memory.load(at::WRITE_POS, Ordering::Relaxed)?;
        Ok(write_pos == self.read_pos)
    }

    /// Tells the producer that every block up to `number` is durable, in the session that
    /// [`begin_session`](Self::begin_session) named last.
    pub fn set_durable(&mut self, number: u64) {
        // ORDERING: Relaxed; the word stands by itself, see `Producer::durable`.
        let said = self.memory.say(at::DURABLE, number, Ordering::Relaxed);
        // What cannot be said is latched, and the next `read` tells it.
        let _ = self.latch(said);
    }

    /// What the producer says of itself.
    ///
    /// # Errors
    ///
    /// [`ReadError::Corrupt`], latched.
    pub fn producer_status(&mut self) -> Result<ProducerStatus, ReadError> {
        let status = self.memory.check().and_then(|()| self.said_of_itself());
        self.latch(status)
    }

    fn said_of_itself(&self) -> Result<ProducerStatus, RingFault> {
        // ORDERING: Relaxed; each word stands by itself, see `Producer::beat`.
        let word = |offset| self.memory.load(offset, Ordering::Relaxed);
        Ok(ProducerStatus {
            heartbeat_ns: word(at::HEARTBEAT)?,
            state: match word(at::STATE)? & u64::from(u32::MAX) {
                1 => Some(ModuleState::Starting),
                2 => Some(ModuleState::Running),
                3 => Some(ModuleState::Fault),
                4 => Some(ModuleState::Stopped),
                _ => None,
            },
            dropped_blocks: word(at::DROPPED)?,
        })
    }

    fn latch<T>(&mut self, result: Result<T, RingFault>) -> Result<T, ReadError> {
        Ok(result.inspect_err(|fault| self.fault = Some(*fault))?)
    }

    fn read_next(&mut self, key_out: &mut [u8]) -> Result<Option<Record>, ReadError> {
        let pending_bytes = self.pending_bytes()?;
        if pending_bytes == 0 {
            return Ok(None);
        }
        let claim = self.claim()?;
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
            self.copy_out(payload, &mut head)?;
            self.copy_out(payload + head.len() as u64, key)?;
            self.accept(&claim, crc32c(&[&checked, &head, key]))?;
            let header = BlockHeader::decode_parts(&head, key)?;
            return Ok(Some(Record::Block(header)));
        }
        let mut text = [0; MAX_STATUS_BYTES];
        let text = &mut text[..payload_bytes];
        self.copy_out(payload, text)?;
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
        let write_pos = self.memory.load(at::WRITE_POS, Ordering::Acquire)?;
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
        let got = self.memory.load(at::SESSION, Ordering::Relaxed)?;
        let want = self.session.map_or(0, NonZeroU64::get);
        if got != want && want != 0 || got == 0 && pending > 0 {
            return Err(RingFault::Session { got, want });
        }
        self.session = NonZeroU64::new(got);
        self.write_seen = write_pos;
        Ok(pending)
    }

    fn claim(&self) -> Result<Claim, RingFault> {
        let mut head = [0; RECORD_HEADER_BYTES];
        self.copy_out(self.read_pos, &mut head)?;
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
        Ok(Claim {
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            seq: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            generation: u64::from_le_bytes([g0, g1, g2, g3, g4, g5, g6, g7]),
            crc: u32::from_le_bytes([c0, c1, c2, c3]),
        })
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
        self.consume(record_bytes(claim.len as usize))?;
        if self.wants_wakeup {
            self.set_need_wakeup(false)?;
        }
        Ok(())
    }

    fn consume(&mut self, record_bytes: usize) -> Result<(), RingFault> {
        self.memory
            .wipe(self.capacity_bytes, self.read_pos, record_bytes)?;
        self.read_pos += record_bytes as u64;
        self.seq += 1;
        // ORDERING: Release gives the wiped room back; pairs with the Acquire load in
        // `Producer::look_at_reader`.
        self.memory
            .say(at::READ_POS, self.read_pos, Ordering::Release)
    }

    fn copy_out(&self, position: u64, out: &mut [u8]) -> Result<(), RingFault> {
        self.memory.copy_out(self.capacity_bytes, position, out)
    }

    fn set_need_wakeup(&mut self, wanted: bool) -> Result<(), RingFault> {
        self.wants_wakeup = wanted;
        // ORDERING: Relaxed; `prepare_wait` orders it with a fence, and taking the wish back late
        // costs a wake-up only.
        self.memory
            .store(at::NEED_WAKEUP, u64::from(wanted), Ordering::Relaxed)
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        // What was not read comes again in another ring. A file that was cut off has lost it already.
        if self.memory.check().is_ok() {
            let _ = self
                .memory
                .wipe(self.capacity_bytes, 0, self.capacity_bytes);
        }
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
