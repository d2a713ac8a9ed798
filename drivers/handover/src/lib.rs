//! The formats and the ring that QKD hardware and the bridge share.
//!
//! - [`type7`]: qcrypto's final-key files.
//! - [`cor`], [`uuid_record`], [`hex_lines`], [`r10`]: other files that keys are handed over in.
//! - [`clavis2`]: datagrams of a Clavis2's daemon.
//! - [`block`] and [`status`]: the records that the next two carry.
//! - [`serial`]: frames and their exchange over a serial line.
//! - [`ring`]: records through shared memory; `include/qkd_ring.h` is its C side.
//!
//! It knows nothing of sockets, files, devices, clocks or what happens to a key afterwards: bytes
//! come in and go out in buffers that the caller owns and wipes. Only the ring maps memory itself,
//! so that no caller needs unsafe code.
//!
//! # Invariants
//!
//! - What comes from hardware is a claim until it is decoded, and no decoder reads, allocates or
//!   loops by a length that it has not bounded first.
//! - Equal keys are equal bytes: the first bit is the top bit of the first byte, unused bits of the
//!   last byte are zero, and a record that breaks this is refused.
//! - No error holds a key byte.
#![deny(unsafe_code)]

pub mod block;
mod check;
pub mod clavis2;
pub mod cor;
pub mod hex_lines;
pub mod r10;
pub mod ring;
pub mod serial;
pub mod status;
pub mod type7;
pub mod uuid_record;
mod wipe;

pub use wipe::wipe;
