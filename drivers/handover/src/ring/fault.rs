//! What can be wrong with a ring that is read.

use std::io;

use crate::{block::BlockError, status::StatusError};

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
    Corrupt(#[from] RingFault),
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
    /// Memory in a file that was cut off, or that the kernel does not give any more.
    #[error("the ring's memory is out of reach: {error}")]
    Memory {
        /// The kernel's answer; [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) if it was cut off.
        error: io::ErrorKind,
    },
}
