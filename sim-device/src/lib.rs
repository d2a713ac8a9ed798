//! A simulated QKD module pair that plays the hardware over the real transports.
//!
//! Both halves of a [`ModulePair`] draw the same bits from a shared seed, block by block, and know
//! the same plan of faults: blocks that only one half delivers, blocks that differ, blocks of no
//! bits. Each half runs over one transport, in a thread or process of its own: [`files`] writes
//! the files of five vendors, [`serial`] is a device on a serial line, [`ring`] is a producer for
//! shared memory, [`clavis2`] is a Clavis2's daemon. [`run`] picks one from a [`SimConfig`]; [`trace`]
//! is a module's trace, recorded and played again.
//!
//! Rate and error rate are what the configuration says, or follow from the optics of a [`LinkConfig`]
//! ([`physics`]), which drift and to which things happen ([`EventConfig`]). Faults come by plan
//! ([`FaultConfig`]): some are of the block, others happen to it on its way.
//!
//! It knows nothing of the bridge: it speaks the formats of `qkd-handover` and could as well be
//! a vendor's program. Its key is as secret as its seed, so it is for tests and demonstrations only.
//!
//! # Invariants
//!
//! - The bits of a block follow from seed and number alone, so that a half that restarts makes the
//!   same block again.
//! - A number is delivered again only until the bridge has acknowledged it as durable.
#![forbid(unsafe_code)]

pub mod clavis2;
mod config;
mod dynamics;
mod faults;
mod feed;
pub mod files;
mod pair;
pub mod physics;
pub mod ring;
mod script;
pub mod serial;
mod stats;
pub mod trace;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use feed::Feed;
use script::HalfScript;
use trace::{Trace, TraceScript};

pub use config::{Pace, PaceError, PairConfig, Seed, SeedError, SimConfig, TransportConfig};
pub use dynamics::{DriftConfig, EventConfig, LinkConfig};
pub use faults::{Fault, FaultConfig, WireFault};
pub use pair::{Block, Half, ModulePair, PairError, Role};
pub use stats::{Note, NoteKind, Snapshot, Stats};

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
    /// The daemon cannot be played.
    #[error(transparent)]
    Clavis2(#[from] clavis2::Clavis2Error),
}

/// Plays one half until `stop` is set, or until all its blocks are delivered; blocks the thread.
///
/// # Errors
///
/// See [`RunError`]: what a new start would not mend. A bridge that is not there is waited for.
pub fn run(config: &SimConfig, stop: &AtomicBool, stats: &Stats) -> Result<(), RunError> {
    let half = ModulePair::new(&config.pair)?.half(config.role);
    let stall = config.pair.faults.stall_ms.unwrap_or(DEFAULT_STALL_MS);
    let stall = Duration::from_millis(stall.into());
    let feed = Feed::new(Box::new(HalfScript::new(half)), stats);
    play(feed, &config.transport, stall, stop, stats)
}

/// Plays a trace until `stop` is set, or until all its blocks are delivered; blocks the thread.
/// `speed` seconds of the trace pass in a second.
///
/// # Errors
///
/// As [`run`].
pub fn replay(
    trace: &Trace,
    speed: f64,
    transport: &TransportConfig,
    stop: &AtomicBool,
    stats: &Stats,
) -> Result<(), RunError> {
    let feed = Feed::new(Box::new(TraceScript::new(trace, speed)), stats);
    let stall = Duration::from_millis(DEFAULT_STALL_MS.into());
    play(feed, transport, stall, stop, stats)
}

fn play(
    feed: Feed<'_>,
    transport: &TransportConfig,
    stall: Duration,
    stop: &AtomicBool,
    stats: &Stats,
) -> Result<(), RunError> {
    match transport {
        TransportConfig::Files(config) => files::run(feed, config, stall, stop, stats)?,
        TransportConfig::Serial(config) => serial::run(feed, config, stall, stop, stats)?,
        TransportConfig::Ring(config) => ring::run(feed, config, stall, stop, stats)?,
        TransportConfig::Clavis2(config) => clavis2::run(feed, config, stall, stop, stats)?,
    }
    Ok(())
}

/// How long a stall is if nobody says.
const DEFAULT_STALL_MS: u32 = 500;

fn is_stopped(stop: &AtomicBool) -> bool {
    // ORDERING: Relaxed; the flag stands by itself.
    stop.load(Ordering::Relaxed)
}
