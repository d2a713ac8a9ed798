//! A producer process that writes to a ring in shared memory ([`qkd_handover::ring`]).
//!
//! The bridge makes the ring and listens on a Unix socket; a producer connects, is known by its user
//! (`SO_PEERCRED`), and gets the ring's memory and an eventfd. It may be faulty or hostile: a ring
//! that breaks a rule is thrown away together with its connection, and the next connection gets a
//! new one of the next generation. Or the ring is a file, for a producer that is trusted with memory that it
//! can take away ([`SharedMemoryConfig::in_file`]); everything else is the same. The producer keeps its blocks until they are durable here and
//! sends again, in the new ring, what was not; blocks that this driver has delivered already are not
//! delivered twice. [`Settlement::Quarantined`] is acknowledged as [`Settlement::Dropped`] is.
//!
//! A closed connection is how the death of a producer is noticed; a heartbeat that stands still, how
//! it is noticed that one hangs. What a dead producer had written to the end is still read, as far
//! as there is credit.

mod config;
mod door;
mod file;
mod name;
mod numbers;
mod ring;
mod socket;

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use qkd_handover::{
    block::BlockHeader,
    ring::{ReadError as RingError, Record},
    status::Severity,
    type7,
};
use qkd_keyfile::{QkdKeyId, units::bytes_for_bits};
use tokio::time::{Instant, Sleep, sleep_until};
use zeroize::{Zeroize, Zeroizing};

pub use self::{
    config::{PlaceError, SharedMemoryConfig},
    file::FileError,
};
use self::{
    door::{Door, Refused},
    numbers::Numbers,
    ring::Ring,
};
use crate::{
    config::OpenError,
    event::{Alarm, AlarmCode, CorruptReason, DetachReason, Event},
    records::{key_block, tell_status},
    source::{KeySource, ReadError, Settlement},
    waiting::Waiting,
};

/// The producer at the other side of a ring.
#[derive(Debug)]
pub struct SharedMemorySource {
    config: SharedMemoryConfig,
    door: Door,
    ring: Option<Ring>,
    numbers: Numbers,
    /// When to look at the producer's heartbeat, or to accept one again after a fault.
    alarm: Pin<Box<Sleep>>,
    backoff: Duration,
    events: VecDeque<Event>,
    credit_blocks: u32,
    waiting: Waiting,
}

impl SharedMemorySource {
    /// Makes the first ring, and listens or gives it its name.
    ///
    /// # Errors
    ///
    /// [`OpenError::Socket`], [`OpenError::Ring`], [`OpenError::RingFile`], [`OpenError::Place`] or
    /// [`OpenError::Setting`]; nothing is open.
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
        let door = Door::open(config)?;
        let not_sealed = door.rests_on_trust().then_some(Event::Alarm(Alarm {
            code: AlarmCode::RingNotSealed,
            severity: Severity::Warning,
        }));
        Ok(Self {
            door,
            ring: None,
            numbers: Numbers::default(),
            alarm: Box::pin(sleep_until(Instant::now())),
            backoff: BACKOFF_FIRST,
            events: not_sealed.into_iter().collect(),
            credit_blocks: 0,
            waiting: Waiting::default(),
            config: config.clone(),
        })
    }

    /// Takes the next producer in, unless one is there.
    fn poll_connect(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        ready!(self.alarm.as_mut().poll(cx));
        match ready!(self.door.poll(cx, &self.numbers)) {
            Ok(ring) => {
                self.numbers.begin_ring();
                self.ring = Some(ring);
            }
            Err(Refused::Stranger { uid }) => self.events.push_back(Event::Alarm(Alarm {
                code: AlarmCode::StrangerConnected { uid },
                severity: Severity::Security,
            })),
            Err(Refused::Failed(error)) => {
                let reason = error.map(|error| DetachReason::Io { error });
                let detached = reason.map(|reason| Event::Detached { reason });
                self.events.extend(detached);
                self.hold_off();
            }
        }
        Poll::Ready(())
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
            if let Err(error) = ring.look(&mut self.events) {
                return self.break_off(error);
            }
        }
        while let Some(ring) = self.ring.as_mut().filter(|ring| !ring.closed)
            && self.alarm.as_mut().poll(cx).is_ready()
        {
            if let Err(error) = ring.look(&mut self.events) {
                return self.break_off(error);
            }
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
                Err(error) => self.break_off(error),
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
                    let path = self
                        .config
                        .path_mut()
                        .map(|path| path.display().to_string());
                    self.events.push_back(Event::Attached {
                        device: path.unwrap_or_default(),
                        session: Some(session.get()),
                    });
                    break;
                }
                Ok(None) if ring.closed => self.detach(DetachReason::Closed),
                Ok(None) => ready!(ring.connection.poll_wakeup(cx)),
                Err(error) => self.break_off(error),
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
        match &mut self.ring {
            Some(ring) if ring.attached => ring.consumer.set_durable(number),
            // A ring whose session is not known is told when it is.
            Some(_) => {}
            None => self.door.set_durable(number),
        }
    }

    /// The producer broke the rules of its ring.
    fn break_off(&mut self, error: RingError) {
        if let RingError::Corrupt(fault) = error {
            self.tell_corrupt(None, fault);
        }
        self.detach(DetachReason::BrokeRules);
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

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LAST: Duration = Duration::from_secs(5);

/// Longest time between two looks at the producer's heartbeat.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Records that give no event, in one poll.
const RECORDS_PER_POLL: u32 = 256;
