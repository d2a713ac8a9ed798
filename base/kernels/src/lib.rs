//! Bulk operations on key bytes, with SIMD chosen at run time.
//!
//! One-time-pad XOR, the one-time POLYVAL tag, both in one pass, SHA-256 of many units at once,
//! health statistics in one pass, and wiping. This crate knows nothing about keys, pads or
//! messages: it sees slices, allocates nothing that outlives a call but the powers inside a
//! [`TagKey`], and keeps no state; the caller keeps the [`HealthState`] of a stream.
//!
//! # Invariants
//!
//! - A [`Backend`] value proves that the CPU has its instructions.
//! - Every backend gives the same bytes as [`Backend::PORTABLE`], for every length and alignment.
//! - No branch and no index depends on a byte of the data, only on lengths.
//! - Copies of key or pad that a function makes are wiped before it returns. Registers, and what
//!   the compiler spills of them to the stack, are beyond its reach.
//!
//! ```
//! use qkd_kernels::Backend;
//!
//! let backend = Backend::detect(); // once, at the start
//! let (mut data, mut pad) = (*b"sixteen byte key", [0x5A; 16]);
//! let tag_key = backend.tag_key(&[0xA5; 16]);
//! let tag = tag_key.encrypt_tag_and_wipe(b"header", &mut data, &mut pad);
//! assert_eq!(tag, tag_key.tag(b"header", &data));
//! assert_eq!(pad, [0; 16]);
//! ```

mod backend;
mod health;
mod portable;
mod tag;
mod wipe;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use backend::Backend;
pub use health::{
    HealthState, HealthStats, PROPORTION_WINDOW_BITS, PROPORTION_WINDOW_BYTES, REPETITION_BITS,
    REPETITION_BYTES,
};
pub use tag::TagKey;
pub use wipe::wipe;
