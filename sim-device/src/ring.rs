//! A producer for the shared-memory ring.
//!
//! It connects to the bridge's socket and takes the ring that it is sent, or maps the file that the bridge
//! has put at a path, and begins with the first block above the last one that the greeting names as durable;
//! see [`qkd_handover::ring::greeting`]. When the connection ends it connects anew. A block counts as
//! delivered when ring or greeting say that it is durable.

use std::{
    collections::{BTreeSet, VecDeque},
    fs::File,
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    num::NonZeroU64,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use qkd_handover::{
    ring::{
        Harm, IDENTITY_BYTES, Producer, WriteError, fifo_path, generation_in,
        greeting::{GREETING_BYTES, Greeting},
    },
    status::{ModuleState, Status},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, Mode, OFlags, flock, open},
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix,
        SocketFlags, SocketType, connect, recvmsg, socket_with,
    },
};
use serde::Deserialize;

use crate::{
    faults::WireFault,
    feed::{self, Feed, unix_now},
    is_stopped,
    pair::Block,
    stats::Stats,
};

/// Where the bridge has its ring.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RingConfig {
    /// Behind this socket.
    Socket(PathBuf),
    /// In this file.
    File(PathBuf),
}

impl RingConfig {
    /// The socket or file.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Socket(path) | Self::File(path) => path,
        }
    }

    /// The same, for whoever resolves relative paths.
    pub fn path_mut(&mut self) -> &mut PathBuf {
        match self {
            Self::Socket(path) | Self::File(path) => path,
        }
    }
}

/// Why the ring cannot be filled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The socket cannot be connected to, or the file not used, for a reason that waiting does not mend.
    #[error("cannot connect to {}", .path.display())]
    Connect {
        /// The socket or file.
        path: PathBuf,
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

/// How long half a record stands in the ring.
const SPLIT_PAUSE: Duration = Duration::from_millis(20);

/// Most blocks that may wait to become durable; then the module pauses.
const MAX_UNSETTLED: usize = 1 << 16;

/// Fills rings until `stop` is set, or until all blocks are durable at the bridge.
///
/// # Errors
///
/// See [`RingError`]. A bridge that is not there is waited for.
pub(crate) fn run(
    feed: Feed<'_>,
    config: &RingConfig,
    stall: Duration,
    stop: &AtomicBool,
    stats: &Stats,
) -> Result<(), RingError> {
    let mut module = Module {
        feed,
        stats,
        unsettled: VecDeque::new(),
        start: Instant::now(),
        stall,
        restarts: 0,
        dropped: BTreeSet::new(),
        dropped_blocks: 0,
        waiting: None,
        held: None,
        silent_until: None,
    };
    while !is_stopped(stop) {
        let session = module.feed.session();
        let attached = match config {
            RingConfig::Socket(path) => attach(path, session, stop),
            RingConfig::File(path) => attach_file(path, session),
        };
        let attached = attached.map_err(|source| RingError::Connect {
            path: config.path().to_owned(),
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
    /// The socket, or the FIFO: readable or broken once the bridge has ended the ring.
    end: OwnedFd,
    /// The eventfd, or the FIFO once more.
    wakeup: OwnedFd,
    /// The file, locked for as long as the ring is used.
    _file: Option<File>,
}

struct Module<'a> {
    feed: Feed<'a>,
    stats: &'a Stats,
    /// Number and length in bits of the blocks that were written and are not known to be durable.
    unsettled: VecDeque<(u64, u32)>,
    start: Instant,
    /// How long a stall is.
    stall: Duration,
    /// How often the module had been switched on when it made its last block.
    restarts: u32,
    /// Blocks that were dropped: they do not come again.
    dropped: BTreeSet<u64>,
    dropped_blocks: u64,
    /// A block that found no room, or that is the first after a restart.
    waiting: Option<Block>,
    /// A block that the next overtakes.
    held: Option<Block>,
    silent_until: Option<Instant>,
}

impl Module<'_> {
    /// Writes to one ring until the connection ends (`false`) or there is nothing more to do.
    fn fill(
        &mut self,
        greeting: &Greeting,
        mut ring: Ring,
        stop: &AtomicBool,
    ) -> Result<bool, RingError> {
        let durable = greeting.durable_in(self.feed.session());
        self.settle(durable);
        self.unsettled.clear();
        self.held = None;
        // It comes again.
        self.waiting = None;
        self.feed.seek_after(durable);
        // What the last ring was told of is told.
        self.dropped_blocks = 0;
        let (mut beats, mut beat_at, mut has_ended) = (0, Instant::now(), false);
        while !is_stopped(stop) {
            self.settle(ring.producer.durable());
            if self.is_silent() {
                if ring.is_closed(FULL_PAUSE) {
                    return Ok(false);
                }
                continue;
            }
            if beat_at <= Instant::now() {
                beat_at = Instant::now() + BEAT_EVERY;
                self.beat(&mut ring, beats);
                beats += 1;
                if ring.is_closed(Duration::ZERO) {
                    return Ok(false);
                }
            }
            if self.unsettled.len() < MAX_UNSETTLED
                && let Some(block) = self.waiting.take().or_else(|| self.feed.poll_next())
            {
                if block.restarts != self.restarts {
                    self.restarts = block.restarts;
                    // Their numbers may be given again.
                    self.dropped.clear();
                    return Ok(false);
                }
                match self.deliver(&mut ring, block)? {
                    Written::Broken => return Ok(false),
                    Written::Yes | Written::Full => continue,
                }
            }
            if self.feed.is_finished() && self.waiting.is_none() {
                if let Some(held) = self.held.take() {
                    self.waiting = Some(held);
                    continue;
                }
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

    fn is_silent(&mut self) -> bool {
        self.silent_until = self.silent_until.filter(|until| Instant::now() < *until);
        self.silent_until.is_some()
    }

    /// Writes a block, with what is planned to happen to it.
    fn deliver(&mut self, ring: &mut Ring, mut block: Block) -> Result<Written, RingError> {
        if self.dropped.contains(&block.number) {
            return Ok(Written::Yes);
        }
        let fault = block.fault.take();
        let mut times = 1;
        let mut harm = None;
        match fault {
            Some(WireFault::Drop) => {
                self.dropped.insert(block.number);
                self.dropped_blocks += 1;
                self.beat(ring, 1);
                return Ok(Written::Yes);
            }
            Some(WireFault::Stall) => {
                self.silent_until = Some(Instant::now() + self.stall);
                self.waiting = Some(block);
                return Ok(Written::Full);
            }
            Some(WireFault::Reorder) if self.held.is_none() => {
                self.held = Some(block);
                return Ok(Written::Yes);
            }
            // One at a time.
            Some(WireFault::Reorder) => {}
            Some(WireFault::Duplicate) => times = 2,
            Some(WireFault::Flip(pick)) => harm = Some(Harm::Flip { bit: pick as usize }),
            Some(WireFault::Split) => harm = Some(Harm::Short),
            Some(WireFault::HangUp) => harm = Some(Harm::Unfinished),
            None => {}
        }
        for _ in 0..times {
            match self.write(ring, &block, harm)? {
                Written::Yes => {}
                Written::Full => {
                    block.fault = fault;
                    self.waiting = Some(block);
                    return Ok(Written::Full);
                }
                Written::Broken => return Ok(Written::Broken),
            }
        }
        match fault {
            Some(WireFault::HangUp) => return Ok(Written::Broken),
            // Long enough that it is seen.
            Some(WireFault::Split) => std::thread::sleep(SPLIT_PAUSE),
            _ => {}
        }
        let Some(held) = self.held.take() else {
            return Ok(Written::Yes);
        };
        let written = self.write(ring, &held, None)?;
        if let Written::Full = written {
            self.waiting = Some(held);
        }
        Ok(written)
    }

    fn write(
        &mut self,
        ring: &mut Ring,
        block: &Block,
        harm: Option<Harm>,
    ) -> Result<Written, RingError> {
        let header = block.header(unix_now());
        let written = match harm {
            None => ring.producer.write_block(&header, block.key()),
            Some(harm) => ring.producer.write_block_with(&header, block.key(), harm),
        };
        match written {
            Ok(sleeps) => {
                ring.wake_if(sleeps);
                let entry = (block.number, block.key_bits);
                if self.unsettled.back() != Some(&entry) {
                    self.unsettled.push_back(entry);
                }
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

    fn beat(&mut self, ring: &mut Ring, beats: u32) {
        let now_ns = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let status = self.feed.status();
        let state = status.state.or(Some(ModuleState::Running));
        ring.producer.beat(now_ns, state, self.dropped_blocks);
        // A status that finds no room is not missed: another follows.
        if beats.is_multiple_of(BEATS_PER_STATUS) {
            self.tell(ring, &status);
        }
    }

    fn tell(&self, ring: &mut Ring, status: &Status) {
        if let Ok(sleeps) = ring.producer.write_status(status) {
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
        self.dropped = self.dropped.split_off(&durable);
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
        let mut fds = [PollFd::new(&self.end, PollFlags::IN)];
        let wait = Timespec::try_from(wait).ok();
        matches!(poll(&mut fds, wait.as_ref()), Ok(1..))
    }
}

/// Connects and takes the ring; `None` if there is no bridge, or none that speaks our language.
fn attach(
    path: &Path,
    session: NonZeroU64,
    stop: &AtomicBool,
) -> io::Result<Option<(Greeting, Ring)>> {
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
    match Producer::attach(ring.as_fd(), &greeting, session) {
        Ok(producer) => {
            // The bridge hears of the session; one that is gone already is noticed later.
            let _ = rustix::io::write(&wakeup, &1_u64.to_ne_bytes());
            Ok(Some((
                greeting,
                Ring {
                    producer,
                    end: socket,
                    wakeup,
                    _file: None,
                },
            )))
        }
        Err(error) => {
            tracing::warn!(%error, "the bridge sent a ring that cannot be used");
            Ok(None)
        }
    }
}

/// Takes the ring that stands at `path`; `None` if there is none, or one that is in use or used up.
fn attach_file(path: &Path, session: NonZeroU64) -> io::Result<Option<(Greeting, Ring)>> {
    let flags = OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = match open(path, flags | OFlags::RDWR, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(None);
    }
    let mut head = [0; IDENTITY_BYTES];
    let generation = match file.read_exact_at(&mut head, 0) {
        Ok(()) => generation_in(&head),
        Err(_) => None,
    };
    let Some(generation) = generation else {
        return Ok(None);
    };
    // Nobody reads the FIFO of a bridge that is gone, and it cannot be opened then.
    let flags = flags | OFlags::WRONLY | OFlags::NONBLOCK;
    let Ok(end) = open(fifo_path(path, generation), flags, Mode::empty()) else {
        return Ok(None);
    };
    match Producer::attach_file(file.as_fd(), session) {
        Ok((producer, greeting)) => {
            let wakeup = end.try_clone()?;
            let ring = Ring {
                producer,
                end,
                wakeup,
                _file: Some(file),
            };
            ring.wake_if(true);
            Ok(Some((greeting, ring)))
        }
        Err(error) => {
            tracing::debug!(%error, "the ring is used up, or none");
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
