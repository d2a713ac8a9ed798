//! The formats and the ring that QKD hardware and the bridge share.
//!
//! - [`type7`]: qcrypto's final-key files.
//!
//! It knows nothing of sockets, files, devices, clocks or what happens to a key afterwards: bytes
//! come in and go out in buffers that the caller owns and wipes.
//!
//! # Invariants
//!
//! - What comes from hardware is a claim until it is decoded, and no decoder reads, allocates or
//!   loops by a length that it has not bounded first.
//! - Equal keys are equal bytes: the first bit is the top bit of the first byte, unused bits of the
//!   last byte are zero, and a record that breaks this is refused.
//! - No error holds a key byte.
#![deny(unsafe_code)]

pub mod type7;
