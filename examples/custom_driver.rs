//! A driver of your own, in a program of your own: `qkd-bridge` with one more way to hand over keys.
//!
//! The hand-over: key blocks as length-prefixed records over a Unix socket on which the module listens.
//!
//! | module to bridge | bridge to module |
//! |---|---|
//! | u32 length of the key in bytes, u64 number, key | u64 number of a block that is settled |
//!
//! All integers are little-endian. Numbers ascend from 1. The module keeps a block until its number has
//! come back, and after every connect sends all that it keeps, in order. That is all that such a
//! transport needs for the promises of a [`KeySource`]; `tests/custom_driver.rs` runs the driver through
//! the conformance kit, and a node with it.
//!
//! The program has all commands of `qkd-bridge`. In a node's file:
//!
//! ```toml
//! [[link.module_pair]]
//! name = "mp1"
//! driver = { kind = "custom", driver = "records", socket = "module.sock" }
//! ```
//!
//! ```sh
//! cargo run --example custom_driver -- run --config alice.toml
//! ```

use std::{
    collections::BTreeSet,
    future::Future,
    io,
    path::{Path, PathBuf},
    pin::Pin,
    process::ExitCode,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use qkd_drivers::{DetachReason, Event, KeyBlock, KeySource, Openers, ReadError, Settlement};
use qkd_keyfile::{QkdKeyId, metadata::QkdKeyMetadata};
use tokio::{net::UnixStream, time::sleep};
use zeroize::{Zeroize, Zeroizing};

const HEADER_BYTES: usize = 12;
const MAX_KEY_BYTES: usize = 4096;
const RETRY_AFTER: Duration = Duration::from_millis(100);

type Connecting = Pin<Box<dyn Future<Output = io::Result<UnixStream>> + Send>>;

enum Link {
    Down(Connecting),
    Up(UnixStream),
}

/// The driver.
pub struct RecordSource {
    path: PathBuf,
    link: Link,
    /// The record on its way, `have` bytes of it; wiped when it is delivered.
    record: Zeroizing<Vec<u8>>,
    have: usize,
    credit_blocks: u32,
    /// Highest number that was delivered: what comes again after a reconnect is not delivered again.
    delivered: u64,
    outstanding: BTreeSet<u64>,
    /// Settled numbers on their way to the module.
    answers: Vec<u8>,
    /// The task that waits; woken by a grant or a settlement.
    waiting: Option<Waker>,
}

impl RecordSource {
    /// A module that is not there yet is waited for. Needs the context of a tokio runtime.
    pub fn open(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            link: Link::Down(Box::pin(UnixStream::connect(path.to_owned()))),
            record: Zeroizing::new(vec![0; HEADER_BYTES + MAX_KEY_BYTES]),
            have: 0,
            credit_blocks: 0,
            delivered: 0,
            outstanding: BTreeSet::new(),
            answers: Vec::new(),
            waiting: None,
        }
    }

    fn wake(&mut self) {
        self.waiting.take().into_iter().for_each(Waker::wake);
    }

    /// Hangs up and tries again after a while, never at once: that would be a busy loop.
    fn detach(&mut self, error: &io::Error) -> Event {
        let path = self.path.clone();
        self.link = Link::Down(Box::pin(async move {
            sleep(RETRY_AFTER).await;
            UnixStream::connect(path).await
        }));
        self.record.as_mut_slice().zeroize();
        self.have = 0;
        self.answers.clear();
        let error = error.kind();
        Event::Detached {
            reason: DetachReason::Io { error },
        }
    }

    /// Sends answers, and reads records as far as there is credit; ready with the next event.
    fn talk(&mut self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<Event>> {
        let Link::Up(stream) = &self.link else {
            return Poll::Pending;
        };
        while !self.answers.is_empty() {
            match stream.try_write(&self.answers) {
                Ok(written) => drop(self.answers.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if stream.poll_write_ready(cx)?.is_pending() {
                        break;
                    }
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        while self.credit_blocks > 0 {
            let need = self.record_bytes()?;
            if self.have == need {
                if let Some(event) = self.take_record(out) {
                    return Poll::Ready(Ok(event));
                }
                // It had come before, and its answer was lost.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            ready!(stream.poll_read_ready(cx))?;
            match stream.try_read(&mut self.record[self.have..need]) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => self.have += read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Pending
    }

    /// How long the record on its way is, as far as is known. The length is a claim: bound it first.
    fn record_bytes(&self) -> io::Result<usize> {
        if self.have < HEADER_BYTES {
            return Ok(HEADER_BYTES);
        }
        let [a, b, c, d, ..] = self.record[..] else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        match u32::from_le_bytes([a, b, c, d]) as usize {
            len @ 1..=MAX_KEY_BYTES => Ok(HEADER_BYTES + len),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// The record is whole.
    fn take_record(&mut self, out: &mut [u8]) -> Option<Event> {
        let number = self.record[4..HEADER_BYTES].iter().rev();
        let number = number.fold(0, |n, &byte| n << 8 | u64::from(byte));
        let key = &self.record[HEADER_BYTES..self.have];
        let key_bytes = key.len();
        let is_new = number > self.delivered;
        if is_new {
            out[..key_bytes].copy_from_slice(key);
        }
        self.record[..self.have].zeroize();
        self.have = 0;
        if !is_new {
            if !self.outstanding.contains(&number) {
                self.answers.extend(number.to_le_bytes());
            }
            return None;
        }
        self.delivered = number;
        self.outstanding.insert(number);
        self.credit_blocks -= 1;
        let id = number.to_string().parse().ok()?;
        Some(Event::Key(KeyBlock {
            metadata: QkdKeyMetadata::new(id),
            key_bits: u32::try_from(8 * key_bytes).ok()?,
            qber_ppm: None,
        }))
    }
}

impl KeySource for RecordSource {
    fn max_block_bytes(&self) -> usize {
        MAX_KEY_BYTES
    }

    fn poll(&mut self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<Result<Event, ReadError>> {
        let (have_bytes, need_bytes) = (out.len(), MAX_KEY_BYTES);
        if have_bytes < need_bytes {
            return Poll::Ready(Err(ReadError::BufferTooSmall {
                have_bytes,
                need_bytes,
            }));
        }
        self.waiting = Some(cx.waker().clone());
        if let Link::Down(connecting) = &mut self.link {
            return Poll::Ready(Ok(match ready!(connecting.as_mut().poll(cx)) {
                Ok(stream) => {
                    self.link = Link::Up(stream);
                    Event::Attached {
                        device: self.path.display().to_string(),
                        session: None,
                    }
                }
                Err(error) => self.detach(&error),
            }));
        }
        let event = ready!(self.talk(cx, out));
        Poll::Ready(Ok(event.unwrap_or_else(|error| self.detach(&error))))
    }

    fn grant(&mut self, blocks: u32) {
        self.credit_blocks = self.credit_blocks.saturating_add(blocks);
        self.wake();
    }

    fn settle(&mut self, id: &QkdKeyId, _outcome: Settlement) {
        let number: Option<u64> = id.as_str().parse().ok();
        if let Some(number) = number.filter(|number| self.outstanding.remove(number)) {
            self.answers.extend(number.to_le_bytes());
            self.wake();
        }
    }
}

/// Not derived: the record on its way is key.
impl std::fmt::Debug for RecordSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecordSource")
            .field("path", &self.path)
            .field("delivered", &self.delivered)
            .finish_non_exhaustive()
    }
}

/// What the driver wants to know.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    socket: PathBuf,
}

/// All drivers of `qkd-bridge`, and this one.
pub fn openers() -> Openers {
    Openers::new().with("records", |entry| {
        let settings: Settings = entry.settings()?;
        let socket = entry.folder.join(settings.socket);
        Ok(Box::new(RecordSource::open(&socket)))
    })
}

fn main() -> ExitCode {
    qkd_bridge::command::main_with(openers())
}
