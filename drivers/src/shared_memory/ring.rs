//! A ring in use, and what its producer says of itself.

use std::{
    collections::VecDeque,
    task::{Context, Poll, ready},
};

use qkd_handover::{
    ring::{Consumer, ReadError},
    status::ModuleState,
};
use tokio::time::Instant;

use super::door::Connection;
use crate::event::Event;

/// A ring in use.
#[derive(Debug)]
pub(super) struct Ring {
    pub(super) consumer: Consumer,
    pub(super) connection: Connection,
    /// The layer above was told who writes to it.
    pub(super) attached: bool,
    /// The producer is gone; what it wrote is still read.
    pub(super) closed: bool,
    /// Reads of the empty ring before this task sleeps.
    spins_left: u32,
    heartbeat_ns: u64,
    pub(super) heartbeat_at: Instant,
    state: Option<ModuleState>,
    dropped_blocks: u64,
}

impl Ring {
    pub(super) fn new(consumer: Consumer, connection: Connection) -> Self {
        Self {
            consumer,
            connection,
            attached: false,
            closed: false,
            spins_left: 0,
            heartbeat_ns: 0,
            heartbeat_at: Instant::now(),
            state: None,
            dropped_blocks: 0,
        }
    }

    /// A record was read: the next may come at once.
    pub(super) const fn spin(&mut self) {
        self.spins_left = SPINS;
    }

    /// Ready when there may be something to read again. A producer that is in the middle of a burst
    /// is waited for shortly without asking it for a wake-up, which would cost it a system call.
    pub(super) fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.spins_left > 0 {
            self.spins_left -= 1;
            std::hint::spin_loop();
            return Poll::Ready(());
        }
        while self.consumer.prepare_wait() {
            ready!(self.connection.poll_wakeup(cx));
        }
        Poll::Ready(())
    }

    /// Takes note of what the producer says of itself.
    pub(super) fn look(&mut self, events: &mut VecDeque<Event>) -> Result<(), ReadError> {
        let status = self.consumer.producer_status()?;
        if status.heartbeat_ns != self.heartbeat_ns {
            self.heartbeat_ns = status.heartbeat_ns;
            self.heartbeat_at = Instant::now();
        }
        if status.state != self.state {
            self.state = status.state;
            events.extend(status.state.map(Event::State));
        }
        let blocks = status.dropped_blocks.saturating_sub(self.dropped_blocks);
        self.dropped_blocks = status.dropped_blocks;
        if blocks > 0 {
            events.push_back(Event::Gap { blocks });
        }
        Ok(())
    }
}

/// Reads of an empty ring in the middle of a burst before this task sleeps: a microsecond or so.
const SPINS: u32 = 100;
