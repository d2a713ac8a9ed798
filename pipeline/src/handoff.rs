//! The hand-off: descriptors of key blocks on their way from driver tasks to the stage thread.
//!
//! A bounded lock-free queue carries handles, never key bytes. A full queue is back-pressure: the
//! pusher gets its descriptor back and stops granting credit to its device. The popper spins for
//! some microseconds after the last descriptor, then parks, so that a busy node pays no wake-up
//! and an idle one no CPU time.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use crossbeam::{
    queue::ArrayQueue,
    sync::{Parker, Unparker},
    utils::Backoff,
};
use qkd_keyfile::{QkdKeyName, metadata::QkdKeyMetadata};
use qkd_secmem::KeyBuf;

/// One QKD-key, where its bytes are and what its module said about it.
///
/// `key_bits` is the driver's claim until [`Waiting`](crate::Waiting) has checked it against the
/// block.
#[derive(Debug)]
pub struct Descriptor {
    /// What the key is called, unique on its link.
    pub name: QkdKeyName,
    /// Length of the key, in bits.
    pub key_bits: u32,
    /// The key, from the top bit of the first byte on.
    pub block: KeyBuf,
    /// Y.3803 Table 1 (1).
    pub metadata: QkdKeyMetadata,
}

/// Why a descriptor was not taken; it comes back, so nothing is lost.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The queue is full: keep the descriptor, stop granting credit, try again.
    #[error("the hand-off is full")]
    Full(Box<Descriptor>),
    /// The stage has stopped: nobody will take it.
    #[error("the stage has stopped")]
    Stopped(Box<Descriptor>),
}

/// A hand-off for at most `capacity` descriptors (at least one).
#[must_use]
pub fn handoff(capacity: usize) -> (Pusher, Popper) {
    let parker = Parker::new();
    let unparker = parker.unparker().clone();
    let shared = Arc::new(Shared {
        queue: ArrayQueue::new(capacity.max(1)),
        refused: AtomicU64::new(0),
        stopped: AtomicBool::new(false),
    });
    let pusher = Pusher {
        shared: Arc::clone(&shared),
        unparker,
    };
    let popper = Popper {
        shared,
        parker,
        backoff: Backoff::new(),
    };
    (pusher, popper)
}

/// The drivers' end; clones push into the same queue.
#[derive(Debug, Clone)]
pub struct Pusher {
    shared: Arc<Shared>,
    unparker: Unparker,
}

impl Pusher {
    /// Hands one descriptor on. Never waits.
    ///
    /// # Errors
    ///
    /// - [`PushError::Full`]: back-pressure, counted. The descriptor comes back.
    /// - [`PushError::Stopped`]: latched. The descriptor comes back.
    pub fn push(&self, descriptor: Descriptor) -> Result<(), PushError> {
        // ORDERING: Relaxed; only a later push need see it, and the popper's drop drains the queue.
        if self.shared.stopped.load(Ordering::Relaxed) {
            return Err(PushError::Stopped(Box::new(descriptor)));
        }
        match self.shared.queue.push(descriptor) {
            Ok(()) => {
                // After the push: a popper that found the queue empty before it finds this token.
                self.unparker.unpark();
                Ok(())
            }
            Err(descriptor) => {
                // ORDERING: Relaxed; a counter of its own.
                self.shared.refused.fetch_add(1, Ordering::Relaxed);
                Err(PushError::Full(Box::new(descriptor)))
            }
        }
    }

    /// How often a full queue refused a descriptor.
    #[must_use]
    pub fn refused(&self) -> u64 {
        // ORDERING: Relaxed; a figure for the statistics.
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// How many descriptors are in the queue now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shared.queue.len()
    }

    /// Whether the queue is empty now.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shared.queue.is_empty()
    }
}

/// The stage's end.
#[derive(Debug)]
pub struct Popper {
    shared: Arc<Shared>,
    parker: Parker,
    backoff: Backoff,
}

impl Popper {
    /// The next descriptor, if there is one.
    pub fn pop(&mut self) -> Option<Descriptor> {
        let descriptor = self.shared.queue.pop()?;
        self.backoff.reset();
        Some(descriptor)
    }

    /// Lets a little time pass: spins at first, and parks once it has found nothing for long.
    ///
    /// Returns after a push or [`Waker::wake`] at the latest, and may return early: look again.
    pub fn idle(&mut self) {
        if self.backoff.is_completed() {
            self.parker.park();
            self.backoff.reset();
        } else {
            self.backoff.snooze();
        }
    }

    /// Tells [`Popper::idle`] that there was work, which need not have been a descriptor.
    pub fn worked(&mut self) {
        self.backoff.reset();
    }

    /// Ends a park for a reason other than a push.
    #[must_use]
    pub fn waker(&self) -> Waker {
        Waker(self.parker.unparker().clone())
    }
}

impl Drop for Popper {
    /// Wipes what is still queued: pushers may live on for long and would keep it.
    fn drop(&mut self) {
        // ORDERING: Relaxed; a push that does not see it yet leaves its descriptor to the queue's
        // own drop, with the last pusher.
        self.shared.stopped.store(true, Ordering::Relaxed);
        while self.shared.queue.pop().is_some() {}
    }
}

/// Wakes the [`Popper`] it came from.
#[derive(Debug, Clone)]
pub struct Waker(Unparker);

impl Waker {
    /// Ends the popper's present park, or its next one.
    pub fn wake(&self) {
        self.0.unpark();
    }
}

struct Shared {
    queue: ArrayQueue<Descriptor>,
    refused: AtomicU64,
    stopped: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {}", self.queue.len(), self.queue.capacity())
    }
}
