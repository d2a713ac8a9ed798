//! A simulated QKD module pair that plays the hardware over the real transports.
//!
//! Both halves of a [`ModulePair`] draw the same bits from a shared seed, block by block, and know
//! the same plan of faults: blocks that only one half delivers, blocks that differ, blocks of no
//! bits. Each half runs over one transport, in a thread or process of its own: [`files`] writes
//! qcrypto's final-key files, [`serial`] is a device on a serial line, [`ring`] is a producer for
//! shared memory. [`run`] picks one from a [`SimConfig`].
//!
//! It knows nothing of the bridge: it speaks the formats of `qkd-handover` and could as well be
//! a vendor's program. It has no physics; block size, rate and error rate are what the configuration
//! says. Its key is as secret as its seed, so it is for tests and demonstrations only.
//!
//! # Invariants
//!
//! - The bits of a block follow from seed and number alone, so that a half that restarts makes the
//!   same block again.
//! - A number is delivered again only until the bridge has acknowledged it as durable.
#![forbid(unsafe_code)]

mod config;
mod faults;
mod feed;
pub mod files;
mod pair;
pub mod physics;
pub mod ring;
pub mod serial;
mod stats;

use std::sync::atomic::{AtomicBool, Ordering};

pub use config::{Pace, PaceError, PairConfig, Seed, SeedError, SimConfig, TransportConfig};
pub use faults::{Fault, FaultConfig};
pub use pair::{Block, Half, ModulePair, PairError, Role};
pub use stats::{Snapshot, Stats};

/// Why a half stopped before it was asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The configuration cannot be run.
    #[error(transparent)]
    Pair(#[from] PairError),
    /// Files could not be written.
    #[error(transparent)]
    Files(#[from] files::FilesError),
    /// The serial device cannot be played.
    #[error(transparent)]
    Serial(#[from] serial::SerialError),
    /// The ring cannot be filled.
    #[error(transparent)]
    Ring(#[from] ring::RingError),
}

/// Plays one half until `stop` is set, or until all its blocks are delivered; blocks the thread.
///
/// # Errors
///
/// See [`RunError`]: what a new start would not mend. A bridge that is not there is waited for.
pub fn run(config: &SimConfig, stop: &AtomicBool, stats: &Stats) -> Result<(), RunError> {
    let half = ModulePair::new(&config.pair)?.half(config.role);
    match &config.transport {
        TransportConfig::Files(transport) => files::run(half, transport, stop, stats)?,
        TransportConfig::Serial(transport) => serial::run(half, transport, stop, stats)?,
        TransportConfig::Ring(transport) => ring::run(half, transport, stop, stats)?,
    }
    Ok(())
}

fn is_stopped(stop: &AtomicBool) -> bool {
    // ORDERING: Relaxed; the flag stands by itself.
    stop.load(Ordering::Relaxed)
}
