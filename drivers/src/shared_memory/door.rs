//! The two ways in for a producer, and what is the same in both.

use std::{
    io,
    os::fd::OwnedFd,
    task::{Context, Poll},
    time::SystemTime,
};

use qkd_handover::ring::{Consumer, MapError};

use super::{
    config::{Place, SharedMemoryConfig},
    file::{Fifo, FileDoor},
    numbers::Numbers,
    ring::Ring,
    socket::{SocketConnection, SocketDoor},
};
use crate::config::OpenError;

/// Where producers come from.
#[derive(Debug)]
pub(super) enum Door {
    Socket(SocketDoor),
    File(FileDoor),
}

/// Why no producer came in.
pub(super) enum Refused {
    /// A user who is not trusted with keys.
    Stranger {
        /// The user's number.
        uid: u32,
    },
    /// Nobody, and it is better not to ask again at once.
    Failed(Option<io::ErrorKind>),
}

impl Door {
    pub(super) fn open(config: &SharedMemoryConfig) -> Result<Self, OpenError> {
        Ok(match config.place()? {
            Place::Socket(path) => Self::Socket(SocketDoor::open(config, path)?),
            Place::File(path) => Self::File(FileDoor::open(config, path)?),
        })
    }

    /// The next producer, in its ring, which tells it what is durable.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        numbers: &Numbers,
    ) -> Poll<Result<Ring, Refused>> {
        match self {
            Self::Socket(door) => door.poll(cx, numbers),
            Self::File(door) => door.poll(cx, numbers),
        }
    }

    /// Whether producers find rings that are not sealed.
    pub(super) const fn rests_on_trust(&self) -> bool {
        matches!(self, Self::File(_))
    }

    /// A ring that waits for its producer says what is durable.
    pub(super) fn set_durable(&mut self, number: u64) {
        if let Self::File(door) = self {
            door.set_durable(number);
        }
    }
}

/// How a producer wakes this side, and how its end is noticed.
#[derive(Debug)]
pub(super) enum Connection {
    Socket(SocketConnection),
    Fifo(Fifo),
}

impl Connection {
    /// Ready once the connection is of no more use.
    pub(super) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Socket(socket) => socket.poll_closed(cx),
            Self::Fifo(fifo) => fifo.poll_closed(cx),
        }
    }

    /// Ready when the producer has woken this side since this was ready before.
    pub(super) fn poll_wakeup(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Socket(socket) => socket.poll_wakeup(cx),
            Self::Fifo(fifo) => fifo.poll_wakeup(cx),
        }
    }
}

/// Makes rings, every one of the next generation.
#[derive(Debug)]
pub(super) struct Rings {
    pub(super) capacity_bytes: usize,
    pub(super) device: u128,
    next_generation: u64,
}

impl Rings {
    pub(super) fn new(config: &SharedMemoryConfig) -> Self {
        Self {
            capacity_bytes: config.capacity_bytes,
            device: u128::from(config.device_id),
            next_generation: first_generation(),
        }
    }

    pub(super) const fn next_generation(&mut self) -> u64 {
        let generation = self.next_generation;
        self.next_generation = generation.wrapping_add(1);
        generation
    }

    pub(super) fn in_memory(&mut self) -> Result<(Consumer, OwnedFd), MapError> {
        Consumer::create(self.capacity_bytes, self.next_generation(), self.device)
    }
}

/// No ring before this one had this generation or a later one. Only has to differ: no decision
/// rests on the clock.
fn first_generation() -> u64 {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since_1970.map_or(1, |time| u64::try_from(time.as_nanos()).unwrap_or(1))
}
