//! A device on a serial line, over the frames of [`qkd_handover::serial`].
//!
//! The line may break, and bytes on it may be lost or damaged. The device keeps each block until a
//! credit frame has said that it is durable, and that is only said of blocks that were settled:
//! whatever happens in between, a block comes again. [`Settlement::Quarantined`] is acknowledged as
//! [`Settlement::Dropped`] is, because a device has no place to set a block aside.
//!
//! End of file, EIO, ENXIO, ENODEV and a hang-up all mean that the device was unplugged. The port is
//! then closed first, since a device that is plugged in again gets another name while it is held,
//! and opened again by its path: give one that stays, as in `/dev/serial/by-id/`.

mod line;
mod port;

use std::{
    future::Future,
    ops::Range,
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use qkd_handover::{serial::MAX_KEY_BITS, wipe};
use qkd_keyfile::{ModuleId, QkdKeyId, units::bytes_for_bits};
use serde::Deserialize;
use tokio::time::{Instant, Sleep, sleep_until};

use self::{line::Line, port::Port};
use crate::{
    advice,
    config::OpenError,
    event::{DetachReason, Event},
    records::Limits,
    scratch::Scratch,
    source::{KeySource, ReadError, Settlement},
    waiting::Waiting,
};

/// Which device, and how its line is set.
///
/// ```toml
/// kind = "serial"
/// path = "/dev/serial/by-id/usb-Vendor_QKD_0001-if00-port0"  # the only setting without a default
/// baud = 3000000
/// rts_cts = true         # false only for a device without these lines
/// device = "tx-1"        # another device that answers is refused; if left out, any is taken
/// matching_module = "rx-1"  # for the metadata; may be left out
/// answer_timeout_ms = 500   # time after which a hello is asked for again
/// limits = { qber_warning_ppm = 80000, qber_absolute_ppm = 110000 }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// The port.
    pub path: PathBuf,
    /// Line rate in baud; 8 data bits, no parity, 1 stop bit.
    #[serde(default = "default_baud")]
    pub baud: u32,
    /// Whether RTS and CTS stop the sender before bytes are lost.
    #[serde(default = "yes")]
    pub rts_cts: bool,
    /// The device's own name, as its hello gives it.
    #[serde(default)]
    pub device: Option<String>,
    /// Matching QKD module ID for the metadata.
    #[serde(default)]
    pub matching_module: Option<ModuleId>,
    /// Time after which a device that has not said hello is asked again, in milliseconds.
    #[serde(default = "default_answer_timeout_ms")]
    pub answer_timeout_ms: u64,
    /// When values count as out of range.
    #[serde(default)]
    pub limits: Limits,
}

impl SerialConfig {
    /// The defaults for a port.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            baud: default_baud(),
            rts_cts: yes(),
            device: None,
            matching_module: None,
            answer_timeout_ms: default_answer_timeout_ms(),
            limits: Limits::default(),
        }
    }
}

/// The device at the other end of a serial line.
#[derive(Debug)]
pub struct SerialSource {
    config: SerialConfig,
    line: Line,
    port: Option<Port>,
    /// Bytes read and not yet decoded; wiped when used up.
    input: Scratch,
    unread: Range<usize>,
    /// Credit frames on their way. Never holds key.
    output: Vec<u8>,
    /// When to ask the device again, or to open the port again.
    alarm: Pin<Box<Sleep>>,
    backoff: Duration,
    waiting: Waiting,
}

impl SerialSource {
    /// Opens the port. A device that is not there now is waited for.
    ///
    /// # Errors
    ///
    /// [`OpenError::Port`]: something is at the path that cannot be used. Nothing is open.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn open(config: &SerialConfig) -> Result<Self, OpenError> {
        let mut source = Self {
            line: Line::new(config),
            port: None,
            input: Scratch::new(INPUT_BYTES),
            unread: 0..0,
            output: Vec::new(),
            alarm: Box::pin(sleep_until(Instant::now())),
            backoff: BACKOFF_FIRST,
            waiting: Waiting::default(),
            config: config.clone(),
        };
        match Port::open(&config.path, config.baud, config.rts_cts) {
            Ok(port) => source.port = Some(port),
            Err(error) if !config.path.exists() => {
                let error = error.kind();
                source.detach(DetachReason::CannotOpen { error });
            }
            Err(error) => {
                return Err(OpenError::Port {
                    path: config.path.clone(),
                    advice: advice::port(&config.path),
                    source: error,
                });
            }
        }
        Ok(source)
    }

    /// Closes the port and tries again after a while.
    fn detach(&mut self, reason: DetachReason) {
        self.port = None;
        self.output.clear();
        wipe(&mut self.input);
        self.unread = 0..0;
        if self.line.closed(reason) {
            self.backoff = BACKOFF_FIRST;
        }
        self.alarm.as_mut().reset(Instant::now() + self.backoff);
        self.backoff = (self.backoff * 2).min(BACKOFF_LAST);
    }

    /// Opens the port when its time has come.
    fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.port.is_none() {
            ready!(self.alarm.as_mut().poll(cx));
            let config = &self.config;
            match Port::open(&config.path, config.baud, config.rts_cts) {
                Ok(port) => {
                    self.port = Some(port);
                    self.line.reopened();
                }
                Err(error) => {
                    let error = error.kind();
                    self.detach(DetachReason::CannotOpen { error });
                }
            }
        }
        Poll::Ready(())
    }

    /// Sends what the device is owed, and asks again what it has not answered.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Result<(), DetachReason> {
        loop {
            self.poll_write(cx)?;
            let Some(at) = self.line.poll_timeout() else {
                return Ok(());
            };
            if self.alarm.deadline() != at {
                self.alarm.as_mut().reset(at);
            }
            if self.alarm.as_mut().poll(cx).is_pending() {
                return Ok(());
            }
            self.line.handle_timeout();
        }
    }

    /// Sends credit frames, as far as the line takes them.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Result<(), DetachReason> {
        let Some(port) = &mut self.port else {
            return Ok(());
        };
        loop {
            if self.output.is_empty() {
                self.line.transmit(&mut self.output);
                if self.output.is_empty() {
                    return Ok(());
                }
            }
            match port.poll_write(cx, &self.output) {
                Poll::Ready(written) => drop(self.output.drain(..written?)),
                Poll::Pending => return Ok(()),
            }
        }
    }

    /// Decodes what was read, and reads more, up to the next key block or other event.
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        out: &mut [u8],
    ) -> Poll<Result<Option<Event>, DetachReason>> {
        let Some(port) = &mut self.port else {
            return Poll::Pending;
        };
        loop {
            let mut unread = &self.input[self.unread.clone()];
            let key = self.line.decode(&mut unread, out)?;
            self.unread.start = self.unread.end - unread.len();
            if key.is_some() || self.line.has_event() {
                return Poll::Ready(Ok(key));
            }
            wipe(&mut self.input[..self.unread.end]);
            self.unread = 0..0;
            let read = ready!(port.poll_read(cx, &mut self.input))?;
            self.unread = 0..read;
        }
    }
}

impl KeySource for SerialSource {
    fn max_block_bytes(&self) -> usize {
        bytes_for_bits(MAX_KEY_BITS)
    }

    fn poll(&mut self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<Result<Event, ReadError>> {
        ReadError::check_buffer(out, self.max_block_bytes())?;
        self.waiting.register(cx);
        loop {
            if let Some(event) = self.line.next_event() {
                return Poll::Ready(Ok(event));
            }
            ready!(self.poll_open(cx));
            let read = match self.poll_answer(cx) {
                Ok(()) => self.poll_read(cx, out),
                Err(reason) => Poll::Ready(Err(reason)),
            };
            // What was read may have to be answered before this task sleeps.
            let asleep = match read {
                Poll::Ready(Ok(Some(key))) => return Poll::Ready(Ok(key)),
                Poll::Ready(Ok(None)) => Ok(false),
                Poll::Ready(Err(reason)) => Err(reason),
                Poll::Pending => self.poll_answer(cx).map(|()| true),
            };
            match asleep {
                Ok(true) => return Poll::Pending,
                Ok(false) => {}
                Err(reason) => self.detach(reason),
            }
        }
    }

    fn grant(&mut self, blocks: u32) {
        self.line.grant(blocks);
        self.waiting.wake();
    }

    fn settle(&mut self, id: &QkdKeyId, _outcome: Settlement) {
        self.line.settle(id);
        self.waiting.wake();
    }
}

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LAST: Duration = Duration::from_secs(5);

/// What Linux hands out in one read of a serial port.
const INPUT_BYTES: usize = 4096;

const fn yes() -> bool {
    true
}

const fn default_baud() -> u32 {
    3_000_000
}

const fn default_answer_timeout_ms() -> u64 {
    500
}
