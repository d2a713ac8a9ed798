//! Key memory: locked, excluded from core dumps, wiped.
//!
//! A [`Pool`] maps its whole capacity once, locks it, keeps it out of core dumps and out of forked
//! children, and hands out blocks as [`KeyBuf`]. This crate knows nothing about what the bytes
//! mean, who owns a key or how long it lives.
//!
//! # Invariants
//!
//! - A block is all zero when it is taken, and wiped before anyone else can take it.
//! - No two live [`KeyBuf`]s overlap.
//! - A [`KeyBuf`] never prints its bytes, is never cloned implicitly, and shows its bytes only
//!   through [`KeyBuf::expose`] and [`KeyBuf::expose_mut`].
//! - A pool never grows past its capacity and never waits: with no block left, [`Pool::take`]
//!   fails, and the failure is counted.
//!
//! ```
//! use qkd_secmem::{Locking, Pool, PoolConfig};
//!
//! let pool = Pool::new(PoolConfig { capacity_bytes: 1 << 20, locking: Locking::Preferred })?;
//! let mut key = pool.take(32)?;
//! key.expose_mut().fill(7);
//! assert_eq!(format!("{key:?}"), "KeyBuf(32 bytes)");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod harden;
mod keybuf;
mod mapping;
mod pool;
mod region;
mod sync;

pub use harden::{HardenError, harden_process};
pub use keybuf::KeyBuf;
pub use mapping::PoolError;
pub use pool::{Locking, MAX_BLOCK_BYTES, Pool, PoolConfig, PoolExhausted, PoolStats};
