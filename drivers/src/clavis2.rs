//! A Clavis2's daemon, over UDP ([`qkd_handover::clavis2`]).
//!
//! One end of the module pair *pulls* new keys, the other *fetches* the same keys by their IDs once it has
//! heard of them ([`KeySource::request`]). One key is asked for at a time.
//!
//! Datagrams are neither authenticated nor encrypted: **the daemon belongs on this machine, or on a cable
//! of its own.** Those of other senders do not reach the driver; one that answers nothing that was asked
//! is counted and dropped.
//!
//! An answer that is lost may lose its key: the daemon has given it out, and nobody knows its ID. Requests
//! for new keys that were not answered are told as a gap with the next answer. A key that was fetched comes
//! again when it is asked for again.

use std::{
    collections::VecDeque,
    io,
    net::{SocketAddr, UdpSocket as StdUdpSocket},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use qkd_handover::clavis2::{MAX_KEY_BYTES, RESPONSE_BYTES, Refusal, Request, Response};
use qkd_keyfile::{ModuleId, QkdKeyId, metadata::QkdKeyMetadata};
use serde::Deserialize;
use tokio::{
    io::ReadBuf,
    net::UdpSocket,
    time::{Instant, Sleep, sleep},
};
use zeroize::Zeroize;

pub use crate::wanted::Role;
use crate::{
    config::OpenError,
    event::{Alarm, AlarmCode, CorruptReason, DetachReason, Event, KeyBlock, Severity},
    scratch::Scratch,
    source::{KeySource, ReadError, Settlement},
    waiting::Waiting,
    wanted::Wanted,
};

/// Which daemon, and as whom.
///
/// ```toml
/// kind = "clavis2"
/// address = "127.0.0.1:5323"  # the daemon
/// role = "pull"               # "fetch" at the other end
/// device = 1                  # 1 to 12: who asks
/// key_bytes = 32              # equal at both ends
/// poll_interval_ms = 10000    # pause when there is no key
/// timeout_ms = 5000           # a request that is not answered is made again
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clavis2Config {
    /// The daemon.
    pub address: SocketAddr,
    /// Which end this is.
    pub role: Role,
    /// Number by which the daemon knows who asks, 1 to 12.
    #[serde(default = "default_device")]
    pub device: u8,
    /// Length of a key, in bytes, 1 to 32.
    #[serde(default = "default_key_bytes")]
    pub key_bytes: u8,
    /// Pause after an answer without key, in milliseconds.
    #[serde(default = "default_poll_interval_ms")]
    pub poll_interval_ms: u64,
    /// Time after which a request is made again, in milliseconds.
    #[serde(default = "default_timeout_ms")]
    pub timeout_ms: u64,
    /// QKD module ID for the metadata; may be left out.
    #[serde(default)]
    pub module: Option<ModuleId>,
    /// Matching QKD module ID for the metadata; may be left out.
    #[serde(default)]
    pub matching_module: Option<ModuleId>,
}

impl Clavis2Config {
    fn check(&self) -> Result<(), OpenError> {
        let refuse = |setting, value, expected| {
            Err(OpenError::Setting {
                setting,
                value,
                expected,
            })
        };
        if !(1..=12).contains(&self.device) {
            return refuse("device", self.device.into(), "1 to 12");
        }
        if !(1..=MAX_KEY_BYTES).contains(&self.key_bytes.into()) {
            return refuse("key_bytes", self.key_bytes.into(), "1 to 32");
        }
        for (setting, ms) in [
            ("poll_interval_ms", self.poll_interval_ms),
            ("timeout_ms", self.timeout_ms),
        ] {
            if !(10..=3_600_000).contains(&ms) {
                return refuse(setting, ms, "10 to 3600000");
            }
        }
        Ok(())
    }
}

/// What was asked last.
#[derive(Debug)]
struct Asked {
    request_id: u32,
    /// Whether the request has left.
    sent: bool,
    /// `None` for a new key.
    key: Option<(QkdKeyId, u64)>,
}

/// The daemon at one end.
#[derive(Debug)]
pub struct Clavis2Source {
    config: Clavis2Config,
    socket: UdpSocket,
    /// One datagram, and one byte more to see that it is too long.
    datagram: Scratch,
    asked: Option<Asked>,
    request_id: u32,
    /// When the request is made again, or the pause is over.
    alarm: Pin<Box<Sleep>>,
    rests: bool,
    wanted: Wanted,
    events: VecDeque<Event>,
    attached: Option<bool>,
    /// Requests for new keys whose answers did not come, or were of no use, since the last gap.
    unanswered: u64,
    refused: Option<Refusal>,
    credit_blocks: u32,
    waiting: Waiting,
}

impl Clavis2Source {
    /// Makes the socket; nothing is sent before there is credit.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: a setting is out of range, or the system gives no socket.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn open(config: &Clavis2Config) -> Result<Self, OpenError> {
        config.check()?;
        let socket = socket(config.address).map_err(|source| OpenError::Datagrams {
            address: config.address,
            source,
        })?;
        Ok(Self {
            socket,
            datagram: Scratch::new(RESPONSE_BYTES + 1),
            asked: None,
            request_id: 0,
            alarm: Box::pin(sleep(Duration::ZERO)),
            rests: false,
            wanted: Wanted::default(),
            events: VecDeque::new(),
            attached: None,
            unanswered: 0,
            refused: None,
            credit_blocks: 0,
            waiting: Waiting::default(),
            config: config.clone(),
        })
    }

    /// Chooses what to ask for, if there is credit and nothing is asked for.
    fn choose(&mut self) -> bool {
        if self.asked.is_some() {
            return true;
        }
        if self.credit_blocks == 0 {
            return false;
        }
        let key = match self.config.role {
            Role::Pull => None,
            Role::Fetch => loop {
                let Some(id) = self.wanted.next(1).pop() else {
                    return false;
                };
                match id.as_str().parse() {
                    Ok(number) => break Some((id, number)),
                    // No key of such a device is called so.
                    Err(_) => self.wanted.done(id),
                }
            },
        };
        let (request_id, sent) = (0, false);
        self.asked = Some(Asked {
            request_id,
            sent,
            key,
        });
        self.ask_again();
        true
    }

    /// Has the request sent, under a new number: answers to earlier ones are stale.
    fn ask_again(&mut self) {
        self.request_id = self.request_id.wrapping_add(1);
        let Some(asked) = &mut self.asked else {
            return;
        };
        (asked.request_id, asked.sent) = (self.request_id, false);
        self.set_alarm(self.config.timeout_ms);
    }

    fn send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(asked) = self.asked.as_mut().filter(|asked| !asked.sent) else {
            return Poll::Ready(Ok(()));
        };
        let request = Request {
            key_id: asked.key.as_ref().map_or(0, |(_, number)| *number),
            key_bytes: self.config.key_bytes,
            request_id: asked.request_id,
            device: self.config.device,
        };
        ready!(self.socket.poll_send(cx, &request.encode()))?;
        asked.sent = true;
        Poll::Ready(Ok(()))
    }

    /// The daemon is not there: it is asked again, not at once.
    fn miss_daemon(&mut self, error: io::ErrorKind) {
        let asked = self.asked.take();
        // A port that is closed has given nothing out.
        if asked.as_ref().is_some_and(|asked| asked.sent)
            && error != io::ErrorKind::ConnectionRefused
        {
            self.miss();
        }
        self.detach(DetachReason::Io { error });
        self.rest();
        if let Some((id, _)) = asked.and_then(|asked| asked.key) {
            self.wanted.again(vec![id]);
        }
    }

    fn rest(&mut self) {
        self.rests = true;
        self.set_alarm(self.config.poll_interval_ms);
    }

    fn set_alarm(&mut self, ms: u64) {
        let at = Instant::now() + Duration::from_millis(ms);
        self.alarm.as_mut().reset(at);
    }

    /// The answer to what was asked last did not come, or is of no use.
    fn miss(&mut self) {
        self.unanswered += u64::from(self.config.role == Role::Pull);
    }

    fn attach(&mut self) {
        if self.attached.replace(true) != Some(true) {
            self.events.push_back(Event::Attached {
                device: self.config.address.to_string(),
                session: None,
            });
        }
        let blocks = std::mem::take(&mut self.unanswered);
        if blocks > 0 {
            self.events.push_back(Event::Gap { blocks });
        }
    }

    fn detach(&mut self, reason: DetachReason) {
        if self.attached.replace(false) != Some(false) {
            self.events.push_back(Event::Detached { reason });
        }
    }

    /// A datagram of the daemon's address; the key goes to `out`.
    fn take(&mut self, len_bytes: usize, out: &mut [u8]) -> Option<Event> {
        let decoded = Response::decode(&self.datagram[..len_bytes]);
        let (response, key) = match decoded {
            Ok(decoded) => decoded,
            Err(error) => return Some(corrupt(None, error.into())),
        };
        let is_answer = self.asked.as_ref().is_some_and(|asked| {
            asked.request_id == response.request_id
                && asked
                    .key
                    .as_ref()
                    .is_none_or(|(_, number)| *number == response.key_id)
        });
        if !is_answer {
            return Some(corrupt(None, CorruptReason::Unasked));
        }
        let key_bytes = usize::from(self.config.key_bytes);
        let is_key = response.key_id != 0 && key.len() == key_bytes;
        if is_key {
            out[..key_bytes].copy_from_slice(key);
        }
        self.attach();
        let fetched = self.asked.take().and_then(|asked| asked.key);
        if let Some(refusal) = response.refusal {
            self.refuse(refusal, fetched.map(|(id, _)| id));
            return None;
        }
        let id = response.qkd_key_id();
        if !is_key {
            self.miss();
            let fetched = fetched.map(|(id, _)| id);
            self.wanted.failed(fetched.into_iter(), &mut self.events);
            self.rest();
            return Some(corrupt(Some(id), CorruptReason::Unasked));
        }
        if let Some((id, _)) = fetched {
            self.wanted.done(id);
        }
        self.refused = None;
        self.credit_blocks -= 1;
        let key_bits = u32::from(self.config.key_bytes) * 8;
        Some(Event::Key(KeyBlock {
            metadata: QkdKeyMetadata {
                key_bits: Some(key_bits),
                module: self.config.module.clone(),
                matching_module: self.config.matching_module.clone(),
                ..QkdKeyMetadata::new(id)
            },
            key_bits,
            qber_ppm: None,
        }))
    }

    fn refuse(&mut self, reason: Refusal, id: Option<QkdKeyId>) {
        self.wanted.failed(id.into_iter(), &mut self.events);
        let is_wrong = matches!(reason, Refusal::KeyLength | Refusal::Request);
        if is_wrong && self.refused.replace(reason) != Some(reason) {
            self.events.push_back(Event::Alarm(Alarm {
                code: AlarmCode::DeviceRefuses { reason },
                severity: Severity::Error,
            }));
        }
        self.rest();
    }
}

impl KeySource for Clavis2Source {
    fn max_block_bytes(&self) -> usize {
        self.config.key_bytes.into()
    }

    fn poll(&mut self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<Result<Event, ReadError>> {
        ReadError::check_buffer(out, self.max_block_bytes())?;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Poll::Ready(Ok(event));
            }
            self.waiting.register(cx);
            if self.rests {
                ready!(self.alarm.as_mut().poll(cx));
                self.rests = false;
            }
            if !self.choose() {
                return Poll::Pending;
            }
            if let Err(error) = ready!(self.send(cx)) {
                self.miss_daemon(error.kind());
                continue;
            }
            let mut buffer = ReadBuf::new(&mut self.datagram);
            match self.socket.poll_recv(cx, &mut buffer) {
                Poll::Ready(Ok(())) => {
                    let len_bytes = buffer.filled().len();
                    let event = self.take(len_bytes, out);
                    self.datagram.zeroize();
                    // A key is told at once: it is in the caller's buffer.
                    match event {
                        Some(event @ Event::Key(_)) => return Poll::Ready(Ok(event)),
                        event => self.events.extend(event),
                    }
                }
                Poll::Ready(Err(error)) => self.miss_daemon(error.kind()),
                Poll::Pending => {
                    // That the port is closed wakes nobody who waits for a datagram: the system is asked.
                    if let Ok(Some(error)) = self.socket.take_error() {
                        self.miss_daemon(error.kind());
                        continue;
                    }
                    ready!(self.alarm.as_mut().poll(cx));
                    self.miss();
                    self.detach(DetachReason::NoAnswer);
                    self.ask_again();
                }
            }
        }
    }

    fn grant(&mut self, blocks: u32) {
        self.credit_blocks = self.credit_blocks.saturating_add(blocks);
        self.waiting.wake();
    }

    /// The daemon keeps what it has given out; there is nothing to tell it.
    fn settle(&mut self, _: &QkdKeyId, _: Settlement) {}

    fn request(&mut self, ids: &[QkdKeyId]) {
        if self.config.role == Role::Fetch {
            self.wanted.add(ids);
            self.waiting.wake();
        }
    }
}

fn corrupt(id: Option<QkdKeyId>, reason: CorruptReason) -> Event {
    Event::Corrupt { id, reason }
}

/// Connected: the kernel drops what other senders send.
fn socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        SocketAddr::V6(_) => ([0_u16; 8], 0).into(),
    };
    let socket = StdUdpSocket::bind(any)?;
    socket.connect(address)?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

const fn default_device() -> u8 {
    1
}

const fn default_key_bytes() -> u8 {
    32
}

const fn default_poll_interval_ms() -> u64 {
    10_000
}

const fn default_timeout_ms() -> u64 {
    5000
}
