//! A producer process that writes to a ring in shared memory ([`qkd_handover::ring`]).
//!
//! The bridge makes the ring and listens on a Unix socket; a producer connects, is known by its user
//! (`SO_PEERCRED`), and gets the ring's memory and an eventfd. It may be faulty or hostile: a ring
//! that breaks a rule is thrown away together with its connection, and the next connection gets a
//! new one of the next generation. The producer keeps its blocks until they are durable here and
//! sends again, in the new ring, what was not; blocks that this driver has delivered already are not
//! delivered twice. [`Settlement::Quarantined`] is acknowledged as [`Settlement::Dropped`] is.
//!
//! A closed connection is how the death of a producer is noticed; a heartbeat that stands still, how
//! it is noticed that one hangs. What a dead producer had written to the end is still read, as far
//! as there is credit.

mod numbers;
mod ring;
mod socket;

use std::{
    collections::VecDeque,
    future::Future,
    os::fd::OwnedFd,
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};

use qkd_handover::{
    block::BlockHeader,
    ring::{Consumer, MapError, ReadError as RingError, Record, greeting::Greeting},
    status::Severity,
    type7,
};
use qkd_keyfile::{ModuleId, QkdKeyId, units::bytes_for_bits};
use serde::Deserialize;
use tokio::time::{Instant, Sleep, sleep_until};
use zeroize::{Zeroize, Zeroizing};

use self::{
    numbers::Numbers,
    ring::Ring,
    socket::{Connection, Listener, is_trusted},
};
use crate::{
    advice,
    config::OpenError,
    event::{Alarm, AlarmCode, CorruptReason, DetachReason, Event},
    records::{Limits, key_block, tell_status},
    source::{KeySource, ReadError, Settlement},
    waiting::Waiting,
};

/// Where producers connect, and what they get.
///
/// ```toml
/// kind = "shared-memory"
/// socket = "/run/qkd/tx-1.sock"  # the only setting without a default
/// capacity_bytes = 4194304       # of the ring; a power of 2
/// max_block_bits = 524288        # a longer key is dropped
/// peer_uids = []                 # users who may connect, besides root and this user
/// heartbeat_timeout_ms = 10000   # 0: a producer that hangs is not noticed
/// device_id = 1                  # tells the producer whom it is taken for
/// module = "tx-1"                # for the metadata; may be left out, as may `matching_module`
/// matching_module = "rx-1"
/// limits = { qber_warning_ppm = 80000, qber_absolute_ppm = 110000 }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedMemoryConfig {
    /// Path of the socket. Its folder must be one that no stranger can write to.
    pub socket: PathBuf,
    /// Size of the ring's data, in bytes: a power of 2 from 4 KiB to 1 GiB.
    #[serde(default = "default_capacity_bytes")]
    pub capacity_bytes: usize,
    /// Longest key that is delivered, in bits.
    #[serde(default = "default_max_block_bits")]
    pub max_block_bits: u32,
    /// Users who may connect, besides root and the user of this process.
    #[serde(default)]
    pub peer_uids: Vec<u32>,
    /// Time after which a heartbeat that stands still means that the producer hangs, in
    /// milliseconds; 0 for never.
    #[serde(default = "default_heartbeat_timeout_ms")]
    pub heartbeat_timeout_ms: u64,
    /// Written into the ring: tells the producer whom it is taken for.
    #[serde(default)]
    pub device_id: u64,
    /// QKD module ID for the metadata; the ring does not tell it.
    #[serde(default)]
    pub module: Option<ModuleId>,
    /// Matching QKD module ID for the metadata.
    #[serde(default)]
    pub matching_module: Option<ModuleId>,
    /// When values count as out of range.
    #[serde(default)]
    pub limits: Limits,
}

impl SharedMemoryConfig {
    /// The defaults for a socket.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            capacity_bytes: default_capacity_bytes(),
            max_block_bits: default_max_block_bits(),
            peer_uids: Vec::new(),
            heartbeat_timeout_ms: default_heartbeat_timeout_ms(),
            device_id: 0,
            module: None,
            matching_module: None,
            limits: Limits::default(),
        }
    }
}

/// The producer at the other side of a ring.
#[derive(Debug)]
pub struct SharedMemorySource {
    config: SharedMemoryConfig,
    listener: Listener,
    /// For the next producer.
    spare: Option<(Consumer, OwnedFd)>,
    ring: Option<Ring>,
    numbers: Numbers,
    next_generation: u64,
    /// When to look at the producer's heartbeat, or to accept one again after a fault.
    alarm: Pin<Box<Sleep>>,
    backoff: Duration,
    events: VecDeque<Event>,
    credit_blocks: u32,
    waiting: Waiting,
}

impl SharedMemorySource {
    /// Makes the first ring and listens.
    ///
    /// # Errors
    ///
    /// [`OpenError::Socket`], [`OpenError::Ring`] or [`OpenError::Setting`]; nothing is open.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn open(config: &SharedMemoryConfig) -> Result<Self, OpenError> {
        if !(1..=type7::MAX_KEY_BITS).contains(&config.max_block_bits) {
            return Err(OpenError::Setting {
                setting: "max_block_bits",
                value: u64::from(config.max_block_bits),
                expected: "1 to 2097152",
            });
        }
        let generation = first_generation();
        let spare = new_ring(config, generation).map_err(|source| OpenError::Ring {
            path: config.socket.clone(),
            source,
        })?;
        let listener = Listener::new(&config.socket, !config.peer_uids.is_empty());
        Ok(Self {
            listener: listener.map_err(|source| OpenError::Socket {
                path: config.socket.clone(),
                advice: advice::new_socket(&config.socket),
                source,
            })?,
            spare: Some(spare),
            ring: None,
            numbers: Numbers::default(),
            next_generation: generation.wrapping_add(1),
            alarm: Box::pin(sleep_until(Instant::now())),
            backoff: BACKOFF_FIRST,
            events: VecDeque::new(),
            credit_blocks: 0,
            waiting: Waiting::default(),
            config: config.clone(),
        })
    }

    /// Takes the next producer in, unless one is there.
    fn poll_connect(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        ready!(self.alarm.as_mut().poll(cx));
        let Ok((socket, uid)) = ready!(self.listener.poll_accept(cx)) else {
            // Out of descriptors, most likely.
            self.hold_off();
            return Poll::Ready(());
        };
        if !is_trusted(uid, &self.config.peer_uids) {
            self.events.push_back(Event::Alarm(Alarm {
                code: AlarmCode::StrangerConnected { uid },
                severity: Severity::Security,
            }));
            return Poll::Ready(());
        }
        let spare = self.spare.take().map_or_else(|| self.make_ring(), Ok);
        let greeted = spare.and_then(|(consumer, memory)| {
            let greeting = Greeting {
                generation: consumer.generation(),
                last_durable: self.numbers.durable,
                session: self.numbers.session(),
            };
            let connection = Connection::greet(socket, &greeting.encode(), &memory)
                .map_err(|error| error.kind())?;
            Ok(Ring::new(consumer, connection))
        });
        match greeted {
            Ok(ring) => {
                self.numbers.begin_ring();
                self.ring = Some(ring);
            }
            Err(error) => {
                self.events.push_back(Event::Detached {
                    reason: DetachReason::Io { error },
                });
                self.hold_off();
            }
        }
        Poll::Ready(())
    }

    fn make_ring(&mut self) -> Result<(Consumer, OwnedFd), std::io::ErrorKind> {
        let generation = self.next_generation;
        self.next_generation = generation.wrapping_add(1);
        new_ring(&self.config, generation).map_err(|error| match error {
            MapError::Os { source, .. } => std::io::Error::from(source).kind(),
            _ => std::io::ErrorKind::InvalidInput,
        })
    }

    /// Notices that the producer is gone or hangs, and what it says of itself.
    fn look_at_producer(&mut self, cx: &mut Context<'_>) {
        let patience = Duration::from_millis(self.config.heartbeat_timeout_ms);
        let Some(ring) = &mut self.ring else {
            return;
        };
        if !ring.closed && ring.connection.poll_closed(cx).is_ready() {
            ring.closed = true;
            // Nobody keeps it alive: what it said last is all that it will say.
            ring.look(&mut self.events);
        }
        while !ring.closed && self.alarm.as_mut().poll(cx).is_ready() {
            ring.look(&mut self.events);
            if !patience.is_zero() && ring.heartbeat_at.elapsed() > patience {
                return self.detach(DetachReason::Silent);
            }
            let pause = match patience.is_zero() {
                true => LOOK_INTERVAL,
                false => LOOK_INTERVAL.min(patience / 4),
            };
            self.alarm.as_mut().reset(Instant::now() + pause);
        }
    }

    /// Reads records up to the next key block, which goes to `out`, or up to another event.
    fn poll_ring(&mut self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<Option<Event>> {
        let out = &mut out[..bytes_for_bits(self.config.max_block_bits)];
        let mut records = 0;
        while let Some(ring) = &mut self.ring {
            if !ring.attached {
                ready!(self.poll_session(cx));
                break;
            }
            if self.credit_blocks == 0 && !ring.closed {
                return Poll::Pending;
            }
            if self.credit_blocks == 0 {
                self.detach(DetachReason::Closed);
                break;
            }
            match ring.consumer.read(out) {
                Ok(Some(record)) => {
                    ring.spin();
                    records += 1;
                    let key = self.tell(&record);
                    if key.is_some() {
                        return Poll::Ready(key);
                    }
                    if let Record::Block(header) = record {
                        out[..bytes_for_bits(header.key_bits)].zeroize();
                    }
                }
                Ok(None) if ring.closed => self.detach(DetachReason::Closed),
                Ok(None) => ready!(ring.poll_more(cx)),
                Err(RingError::BufferTooSmall { need, .. }) => self.skip_long_block(need),
                Err(RingError::Block(error)) => self.tell_corrupt(None, error),
                Err(RingError::Status(error)) => self.tell_corrupt(None, error),
                Err(RingError::Corrupt(fault)) => {
                    self.tell_corrupt(None, fault);
                    self.detach(DetachReason::BrokeRules);
                }
                Err(_) => self.detach(DetachReason::BrokeRules),
            }
            if !self.events.is_empty() {
                break;
            }
            if records == RECORDS_PER_POLL {
                // Others want their turn.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        Poll::Ready(None)
    }

    /// Waits until the producer has said in which session it numbers its blocks. Ready when there is
    /// an event.
    fn poll_session(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(ring) = &mut self.ring {
            match ring.consumer.session() {
                Ok(Some(session)) => {
                    self.numbers.begin_session(session);
                    ring.attached = true;
                    ring.consumer.begin_session(session, self.numbers.durable);
                    self.events.push_back(Event::Attached {
                        device: self.config.socket.display().to_string(),
                        session: Some(session.get()),
                    });
                    break;
                }
                Ok(None) if ring.closed => self.detach(DetachReason::Closed),
                Ok(None) => ready!(ring.connection.poll_wakeup(cx)),
                Err(RingError::Corrupt(fault)) => {
                    self.tell_corrupt(None, fault);
                    self.detach(DetachReason::BrokeRules);
                }
                Err(_) => self.detach(DetachReason::BrokeRules),
            }
        }
        Poll::Ready(())
    }

    /// What a record says; a block's key is in the caller's buffer.
    fn tell(&mut self, record: &Record) -> Option<Event> {
        match record {
            Record::Block(header) => return self.tell_block(header),
            Record::Status(status) => tell_status(status, &self.config.limits, &mut self.events),
            // The producer stays connected until all is durable, and then goes.
            Record::End => {}
        }
        None
    }

    fn tell_block(&mut self, header: &BlockHeader) -> Option<Event> {
        let (id, number) = (header.qkd_key_id(), header.number);
        match self.numbers.take(number) {
            Ok(true) => {}
            Ok(false) => return None,
            Err(reason) => {
                self.tell_corrupt(Some(id), reason);
                return None;
            }
        }
        if header.key_bits == 0 {
            self.pass(number);
            self.events.push_back(Event::Empty { id });
            return None;
        }
        self.numbers.outstanding.push(number, id);
        self.credit_blocks -= 1;
        let qber = header.qber_ppm.map(|ppm| self.config.limits.qber(ppm));
        self.events.extend(qber);
        let mut block = key_block(header, None, self.config.matching_module.as_ref());
        block.metadata.module.clone_from(&self.config.module);
        Some(Event::Key(block))
    }

    /// Drops a block that the configuration does not allow, for good.
    fn skip_long_block(&mut self, need_bytes: usize) {
        let mut key = Zeroizing::new(vec![0; need_bytes]);
        let Some(ring) = &mut self.ring else {
            return;
        };
        // If there is anything else than that block now, the next read finds it.
        if let Ok(Some(Record::Block(header))) = ring.consumer.read(&mut key) {
            let (key_bits, max_bits) = (header.key_bits, self.config.max_block_bits);
            let reason = CorruptReason::TooManyBits { key_bits, max_bits };
            if self.numbers.take(header.number) == Ok(true) {
                self.pass(header.number);
            }
            self.tell_corrupt(Some(header.qkd_key_id()), reason);
        }
    }

    fn tell_corrupt(&mut self, id: Option<QkdKeyId>, reason: impl Into<CorruptReason>) {
        let reason = reason.into();
        self.events.push_back(Event::Corrupt { id, reason });
    }

    /// The layer above has nothing to settle about this number.
    fn pass(&mut self, number: u64) {
        let durable = self.numbers.outstanding.pass(number);
        self.set_durable(durable);
    }

    fn set_durable(&mut self, durable: Option<u64>) {
        let Some(number) = durable else {
            return;
        };
        self.numbers.durable = Some(number);
        // A ring whose session is not known is told when it is.
        if let Some(ring) = self.ring.as_mut().filter(|ring| ring.attached) {
            ring.consumer.set_durable(number);
        }
    }

    /// Closes the connection and throws the ring away.
    fn detach(&mut self, reason: DetachReason) {
        self.ring = None;
        if reason == DetachReason::Closed {
            self.backoff = BACKOFF_FIRST;
            self.alarm.as_mut().reset(Instant::now());
        } else {
            self.hold_off();
        }
        self.events.push_back(Event::Detached { reason });
    }

    /// Takes no producer in for a while, longer every time.
    fn hold_off(&mut self) {
        self.alarm.as_mut().reset(Instant::now() + self.backoff);
        self.backoff = (self.backoff * 2).min(BACKOFF_LAST);
    }
}

impl KeySource for SharedMemorySource {
    fn max_block_bytes(&self) -> usize {
        bytes_for_bits(self.config.max_block_bits)
    }

    fn poll(&mut self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<Result<Event, ReadError>> {
        ReadError::check_buffer(out, self.max_block_bytes())?;
        self.waiting.register(cx);
        loop {
            if let Some(event) = self.events.pop_front() {
                return Poll::Ready(Ok(event));
            }
            if self.ring.is_none() {
                ready!(self.poll_connect(cx));
                continue;
            }
            self.look_at_producer(cx);
            if !self.events.is_empty() {
                continue;
            }
            if let Some(key) = ready!(self.poll_ring(cx, out)) {
                return Poll::Ready(Ok(key));
            }
        }
    }

    fn grant(&mut self, blocks: u32) {
        self.credit_blocks = self.credit_blocks.saturating_add(blocks);
        self.waiting.wake();
    }

    fn settle(&mut self, id: &QkdKeyId, _outcome: Settlement) {
        let durable = self.numbers.outstanding.settle(id);
        self.set_durable(durable);
    }
}

fn new_ring(config: &SharedMemoryConfig, generation: u64) -> Result<(Consumer, OwnedFd), MapError> {
    let device = u128::from(config.device_id);
    Consumer::create(config.capacity_bytes, generation, device)
}

/// No ring before this one had this generation or a later one. Only has to differ: no decision
/// rests on the clock.
fn first_generation() -> u64 {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since_1970.map_or(1, |time| u64::try_from(time.as_nanos()).unwrap_or(1))
}

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LAST: Duration = Duration::from_secs(5);

/// Longest time between two looks at the producer's heartbeat.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Records that give no event, in one poll.
const RECORDS_PER_POLL: u32 = 256;

const fn default_capacity_bytes() -> usize {
    4 << 20
}

/// 64 KiB of key.
const fn default_max_block_bits() -> u32 {
    1 << 19
}

const fn default_heartbeat_timeout_ms() -> u64 {
    10_000
}
