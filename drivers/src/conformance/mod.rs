//! What every driver promises, as a kit that runs any [`KeySource`] through it.
//!
//! A driver of your own comes with a [`Bench`]: something that plays its module, in a test. [`check`]
//! opens the driver on it again and again, and holds what it does against the contract of
//! [`KeySource`] and the invariants of this crate: key comes only for credit, unaltered, once per open;
//! a short buffer consumes nothing; what was not settled comes again after a restart, what was settled
//! does not; nothing of a key is left where it does not belong; and a source that has nothing to do
//! sleeps.
//!
//! It tries a contract; it does not prove a driver. Faults of your transport (torn reads, damage, a
//! hostile module) are yours to test. Its key is made up by the bench and no secret. It takes some
//! seconds, since to see that nothing comes is to wait; run it in real time, not in tokio's paused one.
//!
//! `examples/custom_driver.rs` in the root of the workspace is a driver, and `tests/custom_driver.rs` its
//! bench.

mod watch;

use std::{io, time::Duration};

use qkd_keyfile::QkdKeyId;

use self::watch::Watch;
use crate::{
    event::Event,
    source::{KeySource, ReadError, Settlement},
};

/// The module that a driver is tried on.
///
/// Where keys are fetched by ID ([`KeySource::request`]), the kit asks for all that is offered, more than
/// once, as the matching node does.
pub trait Bench {
    /// Opens the driver on the module, inside the runtime in which the kit runs.
    ///
    /// The first time the module has no block. Later times are restarts of the bridge: the source
    /// from before has been dropped, and the module still has all that was not settled, or not handed
    /// out ([`hands_out_once`](Self::hands_out_once)).
    fn open(&mut self) -> Box<dyn KeySource>;

    /// Whether the module forgets a block as soon as it has handed it out. Then what came does not come
    /// again, whether it was settled or not, what there is no credit for must still be with the module
    /// after a restart, and what a replug costs must be told, as a gap or as empty.
    fn hands_out_once(&self) -> bool {
        false
    }

    /// Has the module make more blocks, with IDs that it has not used and at least 16 bytes of key
    /// each; they stay until they are settled. Returns without waiting for the driver.
    fn offer(&mut self, blocks: u32) -> Vec<Offered>;

    /// Longer than anything takes that has to come, on a slow machine too.
    fn patience(&self) -> Duration {
        Duration::from_secs(20)
    }

    /// Has the module go away and come back, if it can. Returns whether it did; may do so while the
    /// source is not polled.
    fn replug(&mut self) -> bool {
        false
    }

    /// Breaks the module so that the source cannot go on ([`ReadError::Gone`]), if there is such a
    /// thing for this driver. Returns whether it did; the bench is not used any more afterwards.
    fn ruin(&mut self) -> bool {
        false
    }
}

/// A block that a bench has made.
#[derive(Clone, PartialEq, Eq)]
pub struct Offered {
    /// Its ID.
    pub id: QkdKeyId,
    /// Length of its key, in bits.
    pub key_bits: u32,
    /// Its key, as the driver is to deliver it.
    pub key: Vec<u8>,
}

impl std::fmt::Debug for Offered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Offered({}, {} bits)", self.id, self.key_bits)
    }
}

/// What [`check`] could try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    /// The module went away and came back.
    pub replugged: bool,
    /// The source was broken for good.
    pub ruined: bool,
}

/// What a driver did against its contract. Holds no key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// More key blocks than were granted.
    #[error("block {id} came without credit")]
    BeyondCredit {
        /// The block.
        id: QkdKeyId,
    },
    /// Blocks that were offered and granted did not come.
    #[error("{missing} blocks with credit did not come")]
    Missing {
        /// How many.
        missing: usize,
    },
    /// A block that was never offered.
    #[error("block {id} was never offered")]
    Unknown {
        /// The block.
        id: QkdKeyId,
    },
    /// A block came twice in one open, and the module had not gone away in between.
    #[error("block {id} came twice")]
    Repeated {
        /// The block.
        id: QkdKeyId,
    },
    /// A settled block came again after the source had been idle, or one that is handed out once.
    #[error("block {id} came again after it was settled")]
    SettledCameAgain {
        /// The block.
        id: QkdKeyId,
    },
    /// A block's key or its length is not what was offered, or its unused bits are not zero.
    #[error("block {id} is not what was offered")]
    Altered {
        /// The block.
        id: QkdKeyId,
    },
    /// The metadata contradicts the block.
    #[error("metadata of block {id} give another key length")]
    Metadata {
        /// The block.
        id: QkdKeyId,
    },
    /// Bytes of the buffer beyond the block are neither as they were nor zero.
    #[error("the buffer beyond block {id} was written to")]
    BeyondBlock {
        /// The block.
        id: QkdKeyId,
    },
    /// The buffer held key though no key was delivered.
    #[error("key was left in the buffer without being delivered")]
    LeftBehind,
    /// A buffer shorter than the longest block was not refused, or with other numbers.
    #[error(
        "a buffer of {have_bytes} bytes, where {need_bytes} may be needed, was not refused as such"
    )]
    ShortBuffer {
        /// Length of the buffer.
        have_bytes: usize,
        /// [`KeySource::max_block_bytes`].
        need_bytes: usize,
    },
    /// The longest block changed while the source was open.
    #[error("max_block_bytes changed from {before} to {after}")]
    MaxBlockChanged {
        /// At first.
        before: usize,
        /// Later.
        after: usize,
    },
    /// A source with nothing to do asked to be polled again and again.
    #[error("woken {wakes} times in {} ms with nothing to do", watch::IDLE.as_millis())]
    Spins {
        /// How often.
        wakes: u32,
    },
    /// A grant did not wake the task that waited for it.
    #[error("a grant does not wake the task that waits")]
    NotWoken,
    /// The driver told of damage or loss where there was none.
    #[error("told of damage or loss where there was none: {event:?}")]
    Complaint {
        /// What it told.
        event: Event,
    },
    /// The source was gone, though nothing had happened to its module.
    #[error("the source is gone for no reason")]
    Gone(#[source] io::Error),
    /// A source that was gone said something else later, or never was gone though its module is.
    #[error("gone, and then not gone")]
    NotLatched,
}

/// Runs a driver through the whole contract, one rule after the other, each on a newly opened source.
///
/// # Errors
///
/// The first [`Violation`]. The bench may be left with blocks; use another for the next run.
pub async fn check(bench: &mut dyn Bench) -> Result<Checked, Violation> {
    credit_is_all_that_key_comes_for(bench).await?;
    a_short_buffer_consumes_nothing(bench).await?;
    a_dropped_future_loses_nothing(bench).await?;
    settling_what_is_not_outstanding_is_ignored(bench).await?;
    what_was_not_settled_comes_again_and_nothing_else(bench).await?;
    a_source_with_nothing_to_do_sleeps(bench).await?;
    a_grant_wakes(bench).await?;
    Ok(Checked {
        replugged: a_replug_loses_nothing(bench).await?,
        ruined: a_source_that_is_gone_stays_gone(bench).await?,
    })
}

async fn credit_is_all_that_key_comes_for(bench: &mut dyn Bench) -> Result<(), Violation> {
    let mut watch = Watch::open(bench);
    watch.expect(bench.offer(7));
    watch.idle().await?;
    watch.grant(3);
    watch.take(3).await?;
    watch.idle().await?;
    watch.grant(1);
    watch.grant(1);
    watch.take(2).await?;
    watch.idle().await?;
    watch.grant(u32::MAX);
    watch.grant(u32::MAX);
    watch.take(2).await?;
    watch.finish().await
}

async fn a_short_buffer_consumes_nothing(bench: &mut dyn Bench) -> Result<(), Violation> {
    let mut watch = Watch::open(bench);
    watch.expect(bench.offer(3));
    watch.grant(3);
    for _ in 0..3 {
        watch.refuses_short_buffers().await?;
    }
    watch.take(1).await?;
    watch.refuses_short_buffers().await?;
    watch.take(2).await?;
    watch.finish().await
}

async fn a_dropped_future_loses_nothing(bench: &mut dyn Bench) -> Result<(), Violation> {
    let mut watch = Watch::open(bench);
    for _ in 0..5 {
        watch.expect(bench.offer(2));
        watch.grant(2);
        watch
            .take_in_glimpses(2, Duration::from_micros(200))
            .await?;
    }
    watch.finish().await
}

async fn settling_what_is_not_outstanding_is_ignored(
    bench: &mut dyn Bench,
) -> Result<(), Violation> {
    let mut watch = Watch::open(bench);
    let not_yet = bench.offer(2);
    watch.settle(&not_yet[0].id, Settlement::Stored);
    watch.expect(not_yet);
    watch.grant(4);
    let ids = watch.take(2).await?;
    for outcome in [
        Settlement::Stored,
        Settlement::Dropped,
        Settlement::Quarantined,
    ] {
        if let Ok(stranger) = "never-offered".parse() {
            watch.settle(&stranger, outcome);
        }
        watch.settle(&ids[0], outcome);
    }
    watch.expect(bench.offer(2));
    watch.take(2).await?;
    watch.finish().await
}

async fn what_was_not_settled_comes_again_and_nothing_else(
    bench: &mut dyn Bench,
) -> Result<(), Violation> {
    let mut watch = Watch::open(bench);
    watch.expect(bench.offer(9));
    watch.grant(7);
    let ids = watch.take(7).await?;
    let outcomes = [
        Settlement::Stored,
        Settlement::Dropped,
        Settlement::Quarantined,
    ];
    for (id, outcome) in ids.iter().zip(outcomes) {
        watch.settle(id, outcome);
    }
    watch.idle().await?;
    let mut watch = watch.reopen(bench);
    watch.grant(10);
    watch.take_the_rest().await?;
    watch.finish().await?;
    let mut watch = Watch::open(bench);
    watch.grant(10);
    watch.idle().await
}

async fn a_source_with_nothing_to_do_sleeps(bench: &mut dyn Bench) -> Result<(), Violation> {
    let mut watch = Watch::open(bench);
    // Blocks and no credit, then credit and no blocks.
    watch.expect(bench.offer(2));
    watch.idle().await?;
    watch.sleeps().await?;
    watch.grant(10);
    watch.take(2).await?;
    watch.idle().await?;
    watch.sleeps().await?;
    watch.finish().await
}

async fn a_grant_wakes(bench: &mut dyn Bench) -> Result<(), Violation> {
    let mut watch = Watch::open(bench);
    watch.expect(bench.offer(1));
    watch.idle().await?;
    watch.is_woken_by_a_grant().await?;
    watch.take(1).await?;
    watch.finish().await
}

async fn a_replug_loses_nothing(bench: &mut dyn Bench) -> Result<bool, Violation> {
    let mut watch = Watch::open(bench);
    watch.expect(bench.offer(6));
    watch.grant(4);
    let ids = watch.take(4).await?;
    watch.settle(&ids[0], Settlement::Stored);
    watch.settle(&ids[1], Settlement::Stored);
    watch.idle().await?;
    let replugged = bench.replug();
    if replugged {
        watch.was_replugged();
    }
    watch.grant(20);
    watch.take_the_rest().await?;
    watch.finish().await?;
    Ok(replugged)
}

async fn a_source_that_is_gone_stays_gone(bench: &mut dyn Bench) -> Result<bool, Violation> {
    let mut watch = Watch::open(bench);
    watch.idle().await?;
    if !bench.ruin() {
        return Ok(false);
    }
    watch.is_gone_for_good().await?;
    Ok(true)
}
