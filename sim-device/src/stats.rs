//! What a half has done so far, readable while it runs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

// ORDERING, for the whole file: Relaxed. Each counter stands by itself.

/// Live counters; share them with the thread that runs the half.
#[derive(Debug, Default)]
pub struct Stats {
    connected: AtomicBool,
    connections: AtomicU64,
    made: AtomicU64,
    withheld: AtomicU64,
    sent_again: AtomicU64,
    delivered: AtomicU64,
    delivered_bits: AtomicU64,
}

/// [`Stats`] at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Someone listens.
    pub connected: bool,
    /// Times that someone began to listen.
    pub connections: u64,
    /// Blocks made and handed to the transport.
    pub made: u64,
    /// Blocks that this half does not deliver, by the plan of faults.
    pub withheld: u64,
    /// Blocks handed to the transport again.
    pub sent_again: u64,
    /// Blocks that arrived: written files, or acknowledged as durable.
    pub delivered: u64,
    /// Key bits in these.
    pub delivered_bits: u64,
}

impl Stats {
    /// The counters now; each is exact, together they may be of slightly different moments.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Snapshot {
            connected: self.connected.load(Ordering::Relaxed),
            connections: get(&self.connections),
            made: get(&self.made),
            withheld: get(&self.withheld),
            sent_again: get(&self.sent_again),
            delivered: get(&self.delivered),
            delivered_bits: get(&self.delivered_bits),
        }
    }

    pub(crate) fn set_connected(&self, connected: bool) {
        let before = self.connected.swap(connected, Ordering::Relaxed);
        if connected && !before {
            self.connections.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn add_made(&self) {
        self.made.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_withheld(&self) {
        self.withheld.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_sent_again(&self, blocks: u64) {
        self.sent_again.fetch_add(blocks, Ordering::Relaxed);
    }

    pub(crate) fn add_delivered(&self, key_bits: u32) {
        self.delivered.fetch_add(1, Ordering::Relaxed);
        self.delivered_bits
            .fetch_add(u64::from(key_bits), Ordering::Relaxed);
    }
}
