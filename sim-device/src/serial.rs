//! A device on a serial line.
//!
//! It keeps every block until the host has acknowledged it as durable, and sends again what a host
//! that died or a line that broke has lost; see [`qkd_handover::serial`]. A block counts as
//! delivered when it is durable at the host.

mod harm;
mod port;

use std::{
    collections::VecDeque,
    io,
    num::NonZeroU32,
    os::fd::BorrowedFd,
    path::PathBuf,
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use qkd_handover::serial::{Decoder, EncodeError, MAX_ENCODED_BYTES, OfferError, Sender};
use qkd_keyfile::Mono;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use serde::Deserialize;
use zeroize::{Zeroize, Zeroizing};

use self::{harm::Harm, port::Port};
use crate::{
    feed::{self, Feed, unix_now},
    is_stopped,
    pair::Block,
    stats::Stats,
};

/// Which line.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// The port; with `make_pty`, where to put a link to the host's end of a pseudo-terminal.
    pub path: PathBuf,
    /// Whether to make a pseudo-terminal, in place of a cable.
    #[serde(default)]
    pub make_pty: bool,
    /// Line rate in baud; 8 data bits, no parity, 1 stop bit. A pseudo-terminal has none.
    #[serde(default = "default_baud")]
    pub baud: u32,
    /// The device's own name.
    #[serde(default = "default_device")]
    pub device: String,
    /// Most blocks that the device keeps for the host; then it pauses.
    #[serde(default = "default_capacity_blocks")]
    pub capacity_blocks: u32,
    /// Silence of the host after which blocks are sent again, in milliseconds.
    #[serde(default = "default_retry_ms")]
    pub retry_ms: u32,
}

impl SerialConfig {
    /// The defaults for a port.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            make_pty: false,
            baud: default_baud(),
            device: default_device(),
            capacity_blocks: default_capacity_blocks(),
            retry_ms: default_retry_ms(),
        }
    }
}

/// Why the device cannot be played.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SerialError {
    /// The device's name is not one.
    #[error(transparent)]
    Name(#[from] EncodeError),
    /// The block does not fit a frame.
    #[error(transparent)]
    Block(OfferError),
    /// The port cannot be had, for a reason that waiting does not mend.
    #[error("cannot open {}", .path.display())]
    Port {
        /// The port, or the link to it.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

const fn default_baud() -> u32 {
    3_000_000
}

fn default_device() -> String {
    "sim".to_owned()
}

const fn default_capacity_blocks() -> u32 {
    256
}

const fn default_retry_ms() -> u32 {
    200
}

/// Time between two looks at a port that is not there.
const REOPEN_AFTER: Duration = Duration::from_millis(100);

/// How long a device that was pulled out stays away.
const UNPLUGGED: Duration = Duration::from_millis(50);

/// Time between two status frames.
const STATUS_EVERY: Duration = Duration::from_secs(1);

/// Frames are collected up to about this many bytes before they are written.
const BATCH_BYTES: usize = 32 * 1024;

/// Plays the device until `stop` is set, or until all blocks are durable at the host.
///
/// # Errors
///
/// See [`SerialError`]. A port that is not there, or is unplugged, is waited for.
pub(crate) fn run(
    feed: Feed<'_>,
    config: &SerialConfig,
    stall: Duration,
    stop: &AtomicBool,
    stats: &Stats,
) -> Result<(), SerialError> {
    let port_error = |source| SerialError::Port {
        path: config.path.clone(),
        source,
    };
    let mut device = Device::new(feed, config, stall, stats)?;
    let mut port = Port::new(config).map_err(port_error)?;
    while !is_stopped(stop) && !device.sender.is_done() {
        let Some(line) = port.open().map_err(port_error)? else {
            feed::sleep(REOPEN_AFTER, stop);
            continue;
        };
        stats.set_connected(true);
        let broken = device.talk(line, stop)?;
        stats.set_connected(false);
        match broken {
            Ok(()) => {}
            Err(Broken::Line(errno)) => {
                tracing::debug!(path = %config.path.display(), %errno, "serial line is gone");
                port.close();
            }
            Err(Broken::Unplugged) => {
                port.unplug();
                feed::sleep(UNPLUGGED, stop);
            }
        }
    }
    Ok(())
}

/// Why the conversation ended.
enum Broken {
    /// The line did, by itself.
    Line(Errno),
    /// The device was switched off, or pulled out.
    Unplugged,
}

struct Device<'a> {
    config: &'a SerialConfig,
    sender: Sender,
    decoder: Decoder,
    feed: Feed<'a>,
    stats: &'a Stats,
    start: Instant,
    /// Made, and refused by a sender that keeps as many as it may.
    waiting: Option<Block>,
    /// Lengths of the blocks that the sender keeps, in bits.
    kept_bits: VecDeque<u32>,
    resent: u64,
    out: Zeroizing<Vec<u8>>,
    written_bytes: usize,
    status_at: Instant,
    /// How often the module had been switched on, and had numbered anew, when it made its last block.
    restarts: (u32, u32),
    harm: Harm,
}

impl<'a> Device<'a> {
    fn new(
        feed: Feed<'a>,
        config: &'a SerialConfig,
        stall: Duration,
        stats: &'a Stats,
    ) -> Result<Self, SerialError> {
        let start = Instant::now();
        Ok(Self {
            config,
            sender: new_sender(config)?,
            decoder: Decoder::new(),
            feed,
            stats,
            start,
            waiting: None,
            kept_bits: VecDeque::new(),
            resent: 0,
            out: Zeroizing::new(Vec::with_capacity(BATCH_BYTES + 3 * MAX_ENCODED_BYTES)),
            written_bytes: 0,
            status_at: start,
            restarts: (0, 0),
            harm: Harm::new(stall),
        })
    }

    /// Switches the device off and on again. One that numbers anew has lost what it kept.
    fn restart(&mut self, restarts: (u32, u32)) -> Result<(), SerialError> {
        if restarts.1 != self.restarts.1 {
            self.sender = new_sender(self.config)?;
            self.kept_bits.clear();
            self.resent = 0;
            self.harm.forget();
        }
        self.restarts = restarts;
        Ok(())
    }

    /// Talks to the host until the line breaks (inner error), or there is nothing more to do.
    fn talk(
        &mut self,
        line: BorrowedFd<'_>,
        stop: &AtomicBool,
    ) -> Result<Result<(), Broken>, SerialError> {
        self.sender.reconnected();
        self.decoder.reset();
        self.wipe_out();
        self.harm.begin_line();
        while !is_stopped(stop) && !self.sender.is_done() {
            if !self.collect()? {
                return Ok(Err(Broken::Unplugged));
            }
            self.encode();
            if let Err(errno) = self.exchange(line) {
                return Ok(Err(Broken::Line(errno)));
            }
            if self.harm.hangs_up(self.written_bytes) {
                return Ok(Err(Broken::Unplugged));
            }
            self.account();
        }
        Ok(Ok(()))
    }

    /// Gives the sender the blocks whose time has come; `false` if the device is switched off and on.
    fn collect(&mut self) -> Result<bool, SerialError> {
        while let Some(block) = self.waiting.take().or_else(|| self.feed.poll_next()) {
            let restarts = (block.restarts, block.generation);
            if restarts != self.restarts {
                self.waiting = Some(block);
                self.restart(restarts)?;
                return Ok(false);
            }
            match self.sender.offer(block.header(unix_now()), block.key()) {
                Ok(seq) => {
                    self.kept_bits.push_back(block.key_bits);
                    self.harm.plan(seq, block.fault);
                }
                Err(OfferError::Full { .. }) => {
                    self.waiting = Some(block);
                    return Ok(true);
                }
                Err(error) => return Err(SerialError::Block(error)),
            }
        }
        if self.feed.is_finished() {
            self.sender.finish();
        }
        if self.status_at <= Instant::now() {
            self.status_at = Instant::now() + STATUS_EVERY;
            self.sender.set_status(self.feed.status());
        }
        Ok(true)
    }

    fn encode(&mut self) {
        let now = self.now();
        self.sender.handle_timeout(now);
        if self.written_bytes < self.out.len() {
            return;
        }
        self.wipe_out();
        while self.out.len() < BATCH_BYTES {
            let (start, sent) = (self.out.len(), self.sender.counters().sent);
            if !self.sender.poll_transmit(now, &mut self.out) {
                break;
            }
            let is_fresh = self.sender.counters().sent > sent;
            // Sequence numbers begin at 1: that of the last fresh frame is how many were sent.
            if is_fresh && self.harm.touch(sent + 1, start, &mut self.out) {
                break;
            }
        }
    }

    /// Waits for the line, then reads and writes what it takes.
    fn exchange(&mut self, line: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut flags = PollFlags::IN;
        let mut nap = self.feed.nap();
        let end = self.harm.may_write(self.written_bytes, self.out.len());
        if self.written_bytes < end {
            flags |= PollFlags::OUT;
        }
        if let Some(at) = self.sender.poll_timeout() {
            nap = nap.min(at.since(self.now()));
        }
        let mut fds = [PollFd::from_borrowed_fd(line, flags)];
        match poll(&mut fds, Timespec::try_from(nap).ok().as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let ready = fds[0].revents();
        if ready.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
            return Err(Errno::IO);
        }
        if ready.contains(PollFlags::IN) {
            self.read(line)?;
        }
        if ready.contains(PollFlags::OUT) {
            let unwritten = &self.out[self.written_bytes..end];
            self.written_bytes += would_block_is_zero(rustix::io::write(line, unwritten))?;
        }
        Ok(())
    }

    fn read(&mut self, line: BorrowedFd<'_>) -> Result<(), Errno> {
        // A line in echo mode gives back what was written to it: key.
        let mut bytes = Zeroizing::new([0; 4096]);
        let count = match rustix::io::read(line, &mut bytes[..]) {
            Ok(0) => return Err(Errno::IO),
            other => would_block_is_zero(other)?,
        };
        let now = self.now();
        let mut input = &bytes[..count];
        while let Some(frame) = self.decoder.next_frame(&mut input) {
            if let Ok(frame) = frame {
                self.sender.receive(now, &frame);
            }
        }
        Ok(())
    }

    fn account(&mut self) {
        while self.kept_bits.len() > self.sender.kept_blocks() {
            if let Some(bits) = self.kept_bits.pop_front() {
                self.stats.add_delivered(bits);
            }
        }
        let resent = self.sender.counters().resent;
        self.stats.add_sent_again(resent - self.resent);
        self.resent = resent;
    }

    fn wipe_out(&mut self) {
        self.out.as_mut_slice().zeroize();
        self.out.clear();
        self.written_bytes = 0;
    }

    fn now(&self) -> Mono {
        Mono(self.start.elapsed())
    }
}

fn new_sender(config: &SerialConfig) -> Result<Sender, EncodeError> {
    Sender::new(
        new_session(),
        &config.device,
        config.capacity_blocks as usize,
        Duration::from_millis(config.retry_ms.into()),
    )
}

fn would_block_is_zero(result: Result<usize, Errno>) -> Result<usize, Errno> {
    match result {
        Err(Errno::AGAIN | Errno::INTR) => Ok(0),
        other => other,
    }
}

/// A number that this device has not used for 49 days: the time in milliseconds.
fn new_session() -> NonZeroU32 {
    let ms = unix_now().map_or(1, |now| now.0 / 1_000_000);
    let [b0, b1, b2, b3, ..] = ms.to_le_bytes();
    NonZeroU32::new(u32::from_le_bytes([b0, b1, b2, b3])).unwrap_or(NonZeroU32::MIN)
}
