//! A producer for the shared-memory ring.
//!
//! It connects to the bridge's socket, takes the ring that it is sent, and begins with the first
//! block above the last one that the greeting names as durable; see
//! [`qkd_handover::ring::greeting`]. When the connection ends it connects anew. A block counts as
//! delivered when ring or greeting say that it is durable.

use std::{
    collections::VecDeque,
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use qkd_handover::{
    ring::{
        Producer, WriteError,
        greeting::{GREETING_BYTES, Greeting},
    },
    status::ModuleState,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix,
        SocketFlags, SocketType, connect, recvmsg, socket_with,
    },
};
use serde::Deserialize;

use crate::{
    feed::{self, Feed, unix_now},
    is_stopped,
    pair::{Block, Half},
    stats::Stats,
};

/// Where the bridge listens.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RingConfig {
    /// The bridge's socket.
    pub socket: PathBuf,
}

/// Why the ring cannot be filled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The socket cannot be connected to, for a reason that waiting does not mend.
    #[error("cannot connect to {}", .socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A block does not fit the ring.
    #[error(transparent)]
    Block(WriteError),
}

/// Time between two attempts to connect.
const RECONNECT_AFTER: Duration = Duration::from_millis(100);

/// Time between two signs of life, and looks whether the bridge still is there.
const BEAT_EVERY: Duration = Duration::from_millis(100);

/// Signs of life between two status records.
const BEATS_PER_STATUS: u32 = 10;

/// Pause when the ring is full.
const FULL_PAUSE: Duration = Duration::from_micros(100);

/// Most blocks that may wait to become durable; then the module pauses.
const MAX_UNSETTLED: usize = 1 << 16;

/// Fills rings until `stop` is set, or until all blocks are durable at the bridge.
///
/// # Errors
///
/// See [`RingError`]. A bridge that is not there is waited for.
pub fn run(
    half: Half,
    config: &RingConfig,
    stop: &AtomicBool,
    stats: &Stats,
) -> Result<(), RingError> {
    let mut module = Module {
        feed: Feed::new(half, stats),
        stats,
        unsettled: VecDeque::new(),
        start: Instant::now(),
    };
    while !is_stopped(stop) {
        let attached = attach(&config.socket, stop).map_err(|source| RingError::Connect {
            socket: config.socket.clone(),
            source,
        })?;
        let Some((greeting, ring)) = attached else {
            feed::sleep(RECONNECT_AFTER, stop);
            continue;
        };
        stats.set_connected(true);
        let is_done = module.fill(&greeting, ring, stop)?;
        stats.set_connected(false);
        if is_done {
            break;
        }
    }
    Ok(())
}

/// A ring that the bridge gave, for as long as the connection lasts.
struct Ring {
    producer: Producer,
    socket: OwnedFd,
    wakeup: OwnedFd,
}

struct Module<'a> {
    feed: Feed<'a>,
    stats: &'a Stats,
    /// Number and length in bits of the blocks that were written and are not known to be durable.
    unsettled: VecDeque<(u64, u32)>,
    start: Instant,
}

impl Module<'_> {
    /// Writes to one ring until the connection ends (`false`) or there is nothing more to do.
    fn fill(
        &mut self,
        greeting: &Greeting,
        mut ring: Ring,
        stop: &AtomicBool,
    ) -> Result<bool, RingError> {
        self.settle(greeting.last_durable);
        self.unsettled.clear();
        self.feed
            .seek(greeting.last_durable.map_or(0, |number| number + 1));
        let mut waiting = None;
        let (mut beats, mut beat_at, mut has_ended) = (0, Instant::now(), false);
        while !is_stopped(stop) {
            self.settle(ring.producer.durable());
            if beat_at <= Instant::now() {
                beat_at = Instant::now() + BEAT_EVERY;
                self.beat(&mut ring, beats);
                beats += 1;
                if ring.is_closed(Duration::ZERO) {
                    return Ok(false);
                }
            }
            if self.unsettled.len() < MAX_UNSETTLED
                && let Some(block) = waiting.take().or_else(|| self.feed.poll_next())
            {
                match self.write(&mut ring, &block)? {
                    Written::Yes => {}
                    Written::Full => waiting = Some(block),
                    Written::Broken => return Ok(false),
                }
                continue;
            }
            if self.feed.is_finished() && waiting.is_none() {
                has_ended = has_ended || ring.end();
                if has_ended && self.unsettled.is_empty() {
                    return Ok(true);
                }
            }
            if ring.is_closed(self.feed.nap()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn write(&mut self, ring: &mut Ring, block: &Block) -> Result<Written, RingError> {
        match ring
            .producer
            .write_block(&block.header(unix_now()), block.key())
        {
            Ok(sleeps) => {
                ring.wake_if(sleeps);
                self.unsettled.push_back((block.number, block.key_bits));
                Ok(Written::Yes)
            }
            Err(WriteError::Full { .. }) => {
                std::thread::sleep(FULL_PAUSE);
                Ok(Written::Full)
            }
            Err(WriteError::ReadPosition { .. }) => Ok(Written::Broken),
            Err(error) => Err(RingError::Block(error)),
        }
    }

    fn beat(&self, ring: &mut Ring, beats: u32) {
        let now_ns = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        // Nothing is dropped: a full ring makes this module wait.
        ring.producer.beat(now_ns, Some(ModuleState::Running), 0);
        // A status that finds no room is not missed: another follows.
        if beats.is_multiple_of(BEATS_PER_STATUS)
            && let Ok(sleeps) = ring.producer.write_status(&self.feed.status())
        {
            ring.wake_if(sleeps);
        }
    }

    fn settle(&mut self, durable: Option<u64>) {
        let Some(durable) = durable else { return };
        while let Some(&(number, key_bits)) = self.unsettled.front()
            && number <= durable
        {
            self.unsettled.pop_front();
            self.stats.add_delivered(key_bits);
        }
    }
}

enum Written {
    Yes,
    Full,
    Broken,
}

impl Ring {
    fn wake_if(&self, sleeps: bool) {
        if sleeps && let Err(errno) = rustix::io::write(&self.wakeup, &1_u64.to_ne_bytes()) {
            tracing::debug!(%errno, "cannot wake the bridge");
        }
    }

    /// Announces the end; `false` if there was no room for that.
    fn end(&mut self) -> bool {
        let Ok(sleeps) = self.producer.write_end() else {
            return false;
        };
        self.wake_if(sleeps);
        true
    }

    /// Waits so long for the connection to end. The bridge says nothing after its greeting.
    fn is_closed(&self, wait: Duration) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        let wait = Timespec::try_from(wait).ok();
        matches!(poll(&mut fds, wait.as_ref()), Ok(1..))
    }
}

/// Connects and takes the ring; `None` if there is no bridge, or none that speaks our language.
fn attach(path: &Path, stop: &AtomicBool) -> io::Result<Option<(Greeting, Ring)>> {
    let kind = SocketType::SEQPACKET;
    let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) => {}
        Err(Errno::NOENT | Errno::CONNREFUSED | Errno::INTR) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    }
    let mut fds = [PollFd::new(&socket, PollFlags::IN)];
    while !matches!(poll(&mut fds, Some(&NAP)), Ok(1..)) {
        if is_stopped(stop) {
            return Ok(None);
        }
    }
    let Some((greeting, ring, wakeup)) = receive(&socket) else {
        tracing::debug!("the bridge closed the connection, or sent something else than a greeting");
        return Ok(None);
    };
    match Producer::attach(ring.as_fd(), &greeting) {
        Ok(producer) => Ok(Some((
            greeting,
            Ring {
                producer,
                socket,
                wakeup,
            },
        ))),
        Err(error) => {
            tracing::warn!(%error, "the bridge sent a ring that cannot be used");
            Ok(None)
        }
    }
}

const NAP: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

fn receive(socket: &OwnedFd) -> Option<(Greeting, OwnedFd, OwnedFd)> {
    let mut bytes = [0; GREETING_BYTES + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )
    .ok()?;
    let mut fds = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
        _ => Vec::new(),
    });
    let (ring, wakeup) = (fds.next()?, fds.next()?);
    let greeting = Greeting::decode(&bytes[..received.bytes]).ok()?;
    Some((greeting, ring, wakeup))
}
