//! Key blocks through shared memory: a ring of records with one producer and one consumer.
//!
//! The bridge is the consumer. It makes the ring, a sealed memfd, anew for every connection of a
//! producer and hands it over with a [`greeting`]. The producer is the vendor's process, in any
//! language (`include/qkd_ring.h`), and may be faulty or hostile: whatever it writes, the consumer
//! reads valid records or stops with a [`RingFault`].
//!
//! A ring may also be a file that producers find by its name ([`Consumer::in_file`],
//! [`Producer::attach_file`]). Such memory cannot be sealed; the consumer reads and writes it by system
//! calls, so that a producer that cuts it off ends its ring and nothing else.
//!
//! # Layout
//!
//! All integers are little-endian, all fields naturally aligned.
//!
//! | byte | field | written by |
//! |---|---|---|
//! | 0x000 | magic `QKDRING1` | consumer, once |
//! | 0x008 | u32 layout version, u32 header length ([`HEADER_BYTES`]) | consumer, once |
//! | 0x010 | u64 capacity in bytes, a power of 2 | consumer, once |
//! | 0x018 | u64 generation | consumer, once |
//! | 0x020 | u128 device ID | consumer, once |
//! | 0x080 | u64 write position | producer |
//! | 0x088 | u64 heartbeat, ns of the producer's monotonic clock | producer |
//! | 0x090 | u32 state: 0 unknown, 1 starting, 2 running, 3 fault, 4 stopped; u32 0 | producer |
//! | 0x098 | u64 blocks that the producer dropped for want of room | producer |
//! | 0x0a0 | u64 session: drawn by the device when it begins to number anew, never 0 | producer, once |
//! | 0x100 | u64 read position | consumer |
//! | 0x110 | u64 highest block number that is durable; 2^64 - 1 if none is | consumer |
//! | 0x118 | u64 session that the durable number belongs to; 0 if none is known | consumer |
//! | 0x140 | in a file: copies of 0x100, 0x110 and 0x118, 0x40 further on; else 0 | consumer |
//! | 0x180 | u32 need-wakeup, u32 0 | consumer |
//! | 0x1000 | data, `capacity` bytes | both |
//!
//! Positions count bytes from the beginning of the ring's life and never wrap; a position's place is
//! `position % capacity`. A record begins at a multiple of [`RECORD_ALIGN_BYTES`] and may run over
//! the end of the data to its beginning:
//!
//! | byte | field | |
//! |---|---|---|
//! | 0-3 | payload length, bytes | 1 to [`MAX_PAYLOAD_BYTES`] |
//! | 4-7 | kind | 1 key block ([`crate::block`]), 2 status ([`crate::status`]), 3 end (one zero byte) |
//! | 8-15 | sequence number | 0, 1, 2, ... in every ring |
//! | 16-23 | generation | that of the ring |
//! | 24-27 | CRC-32C | of bytes 0-23 and the payload |
//! | 28-31 | 0 | |
//! | 32- | payload | then up to the next multiple of 64, unused |
//!
//! # Memory ordering
//!
//! | word | written by | read by | the pair protects |
//! |---|---|---|---|
//! | write position | producer | consumer | records, on their way out |
//! | read position | consumer | producer | room, wiped, on its way back |
//! | session of the durable number | consumer | producer | the number: that of a session before is gone |
//! | need-wakeup | consumer | producer | with two fences: no record is left unread by a sleeper |
//!
//! The consumer sets need-wakeup, then looks at the write position again before it sleeps; the
//! producer moves the write position, then looks at need-wakeup. Between the two steps both have a
//! sequentially consistent fence, so at least one of them sees what the other did.

mod consumer;
mod copy;
mod fault;
pub mod greeting;
mod memory;
mod producer;
mod reach;
mod sync;
#[cfg(test)]
mod tests;

pub use consumer::{Consumer, ProducerStatus, Record};
pub use fault::{ReadError, RingFault};
pub use memory::MapError;
pub use producer::{AttachError, Harm, Producer, WriteError};

use std::path::{Path, PathBuf};

use crate::block;

/// First bytes of a ring.
pub const MAGIC: [u8; 8] = *b"QKDRING1";

/// Bytes before the data.
pub const HEADER_BYTES: usize = 4096;

/// Records begin at multiples of this, in bytes.
pub const RECORD_ALIGN_BYTES: usize = 64;

/// Bytes of a record before its payload.
pub const RECORD_HEADER_BYTES: usize = 32;

/// Longest payload, in bytes: the longest key block.
pub const MAX_PAYLOAD_BYTES: usize = block::MAX_BLOCK_BYTES;

/// Smallest ring, in bytes of data.
pub const MIN_CAPACITY_BYTES: usize = 4096;

/// Largest ring, in bytes of data.
pub const MAX_CAPACITY_BYTES: usize = 1 << 30;

/// Bytes of a ring in a file that tell which one it is.
pub const IDENTITY_BYTES: usize = 32;

/// The generation of the ring that begins with these bytes; `None` if they are no ring's of this version.
#[must_use]
pub fn generation_in(head: &[u8; IDENTITY_BYTES]) -> Option<u64> {
    let words: [u64; 4] = std::array::from_fn(|i| {
        let bytes = head[8 * i..].first_chunk().copied();
        u64::from_le_bytes(bytes.unwrap_or_default())
    });
    (words[0] == u64::from_le_bytes(MAGIC) && words[1] == VERSION_WORD).then_some(words[3])
}

/// The FIFO of a ring in a file: beside it, with the ring's generation, in decimal, behind a dot.
#[must_use]
pub fn fifo_path(ring: &Path, generation: u64) -> PathBuf {
    let mut path = ring.as_os_str().to_owned();
    path.push(format!(".{generation}"));
    path.into()
}

/// Where the header's words are, in bytes.
mod at {
    pub(super) const MAGIC: usize = 0x000;
    pub(super) const VERSION: usize = 0x008;
    pub(super) const CAPACITY: usize = 0x010;
    pub(super) const GENERATION: usize = 0x018;
    pub(super) const DEVICE: usize = 0x020;
    pub(super) const WRITE_POS: usize = 0x080;
    pub(super) const HEARTBEAT: usize = 0x088;
    pub(super) const STATE: usize = 0x090;
    pub(super) const DROPPED: usize = 0x098;
    pub(super) const SESSION: usize = 0x0a0;
    pub(super) const READ_POS: usize = 0x100;
    pub(super) const DURABLE: usize = 0x110;
    pub(super) const DURABLE_SESSION: usize = 0x118;
    /// On a line of its own: the producer reads it after every record, and the consumer hardly ever
    /// writes it.
    pub(super) const NEED_WAKEUP: usize = 0x180;
}

/// In a file, a word of the consumer's line stands once more so many bytes further on.
const COPY_BYTES: usize = 0x40;

const KIND_KEY: u32 = 1;
const KIND_STATUS: u32 = 2;
const KIND_END: u32 = 3;

const NO_NUMBER: u64 = u64::MAX;

/// Layout version and header length, as one word.
const VERSION_WORD: u64 = (HEADER_BYTES as u64) << 32 | greeting::VERSION as u64;

/// Bytes that a record takes in the ring.
const fn record_bytes(payload_bytes: usize) -> usize {
    (RECORD_HEADER_BYTES + payload_bytes).next_multiple_of(RECORD_ALIGN_BYTES)
}

/// The first 24 bytes of a record, which its check sequence covers.
fn checked_head(len: u32, kind: u32, seq: u64, generation: u64) -> [u8; 24] {
    let mut head = [0; 24];
    head[0..4].copy_from_slice(&len.to_le_bytes());
    head[4..8].copy_from_slice(&kind.to_le_bytes());
    head[8..16].copy_from_slice(&seq.to_le_bytes());
    head[16..24].copy_from_slice(&generation.to_le_bytes());
    head
}
