//! The device's half of the exchange.

use std::{collections::VecDeque, num::NonZeroU32, time::Duration};

use qkd_keyfile::Mono;
use zeroize::Zeroizing;

use super::{Body, Credit, EncodeError, Frame, MAX_DEVICE_BYTES, MAX_KEY_BITS, encode};
use crate::{
    block::{BlockError, BlockHeader},
    status::Status,
};

/// Keeps blocks until the host holds them durably, and says which frame to send next.
///
/// The driver of the port gives it every frame that arrives and the time; after either it sends what
/// [`poll_transmit`](Self::poll_transmit) writes, until that returns `false`.
pub struct Sender {
    session: NonZeroU32,
    device: String,
    capacity_blocks: usize,
    retry_after: Duration,
    /// Blocks `first_seq..first_seq + kept.len()`: not yet durable at the host.
    kept: VecDeque<(BlockHeader, Zeroizing<Box<[u8]>>)>,
    first_seq: u64,
    /// Next block to put on the line.
    next_seq: u64,
    /// One past the last block that was ever put on the line.
    fresh_seq: u64,
    received: u64,
    /// Last block the host takes.
    window_end: u64,
    greeted: bool,
    hello_due: bool,
    status_due: Option<Status>,
    end: End,
    retry_at: Option<Mono>,
    counters: SenderCounters,
}

/// What a sender has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SenderCounters {
    /// Key frames sent for the first time.
    pub sent: u64,
    /// Key frames sent again.
    pub resent: u64,
    /// Times that nothing was heard for too long.
    pub timeouts: u64,
    /// Credits that name blocks never sent, and frames that only a device sends. Not acted upon.
    pub refused: u64,
}

/// Why a block was not taken. Nothing was kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OfferError {
    /// As many blocks are kept as may be; offer again when the host has settled one.
    #[error("{kept} blocks wait for the host already")]
    Full {
        /// Blocks kept.
        kept: usize,
    },
    /// The key is not as its header says.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// More than one frame holds.
    #[error("{key_bits} key bits, {MAX_KEY_BITS} at most in a frame")]
    TooManyBits {
        /// Length of the key, in bits.
        key_bits: u32,
    },
    /// No block comes after the end.
    #[error("the end has been announced")]
    Ended,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    No,
    Due,
    Sent,
    Heard,
}

impl Sender {
    /// A sender that begins `session`, a number that this device has not used lately.
    ///
    /// # Errors
    ///
    /// [`EncodeError::Device`]: the device's name is empty or longer than [`MAX_DEVICE_BYTES`].
    pub fn new(
        session: NonZeroU32,
        device: &str,
        capacity_blocks: usize,
        retry_after: Duration,
    ) -> Result<Self, EncodeError> {
        if device.is_empty() || device.len() > MAX_DEVICE_BYTES {
            return Err(EncodeError::Device {
                bytes: device.len(),
            });
        }
        Ok(Self {
            session,
            device: device.to_owned(),
            capacity_blocks,
            retry_after,
            kept: VecDeque::new(),
            first_seq: 1,
            next_seq: 1,
            fresh_seq: 1,
            received: 0,
            window_end: 0,
            greeted: false,
            hello_due: true,
            status_due: None,
            end: End::No,
            retry_at: None,
            counters: SenderCounters::default(),
        })
    }

    /// Takes a block to deliver; the key is copied into memory that is wiped. Returns its sequence
    /// number.
    ///
    /// # Errors
    ///
    /// See [`OfferError`]; nothing was kept.
    pub fn offer(&mut self, header: BlockHeader, key: &[u8]) -> Result<u64, OfferError> {
        header.encode(key)?;
        if header.key_bits > MAX_KEY_BITS {
            return Err(OfferError::TooManyBits {
                key_bits: header.key_bits,
            });
        }
        if self.end != End::No {
            return Err(OfferError::Ended);
        }
        if self.kept.len() >= self.capacity_blocks {
            return Err(OfferError::Full {
                kept: self.kept.len(),
            });
        }
        self.kept.push_back((header, Zeroizing::new(key.into())));
        Ok(self.last_seq())
    }

    /// Announces the status, in place of one that has not been sent yet.
    pub fn set_status(&mut self, status: Status) {
        self.status_due = Some(status);
    }

    /// Announces that no more blocks come.
    pub fn finish(&mut self) {
        if self.end == End::No {
            self.end = End::Due;
        }
    }

    /// The port was opened anew: nothing is known of the host until it answers a hello.
    pub fn reconnected(&mut self) {
        self.greeted = false;
        self.hello_due = true;
        self.window_end = 0;
        self.retry_at = None;
        self.rewind();
    }

    /// Blocks that the host does not hold durably yet.
    #[must_use]
    pub fn kept_blocks(&self) -> usize {
        self.kept.len()
    }

    /// Last sequence number that is durable at the host; 0 if none is.
    #[must_use]
    pub fn durable_seq(&self) -> u64 {
        self.first_seq - 1
    }

    /// The host has heard the end, and every block is durable there.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.end == End::Heard && self.kept.is_empty()
    }

    /// What it has done.
    #[must_use]
    pub fn counters(&self) -> SenderCounters {
        self.counters
    }

    /// Takes a frame from the host. Frames for another session are not for this sender.
    pub fn receive(&mut self, now: Mono, frame: &Frame<'_>) {
        let Body::Credit(credit) = frame.body else {
            self.counters.refused += 1;
            return;
        };
        self.hello_due |= credit.greet;
        if frame.session != self.session.get() {
            return;
        }
        if credit.durable > credit.received || credit.received >= self.fresh_seq {
            self.counters.refused += 1;
            return;
        }
        self.take(&credit);
        self.retry_at = self.is_waiting().then(|| now.after(self.retry_after));
    }

    /// Appends the next frame to `out`, if there is one; `out` comes to hold key (see [`encode`]).
    #[expect(
        clippy::missing_panics_doc,
        reason = "what is encoded was checked on its way in"
    )]
    pub fn poll_transmit(&mut self, now: Mono, out: &mut Vec<u8>) -> bool {
        let Some((seq, body)) = self.next_body() else {
            return false;
        };
        let frame = Frame {
            session: self.session.get(),
            seq,
            body,
        };
        encode(&frame, out).expect("name and blocks were checked");
        match frame.body {
            Body::Hello { .. } => self.hello_due = false,
            Body::Status(_) => self.status_due = None,
            Body::Key { .. } => self.count_sent(),
            Body::End | Body::Credit(_) => self.end = End::Sent,
        }
        if self.is_waiting() {
            self.retry_at = Some(now.after(self.retry_after));
        }
        true
    }

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called, if at all.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Mono> {
        self.retry_at
    }

    /// Sends again what the host has not confirmed, once it has been silent for too long.
    pub fn handle_timeout(&mut self, now: Mono) {
        if self.retry_at.is_none_or(|at| now < at) {
            return;
        }
        self.retry_at = None;
        self.counters.timeouts += 1;
        // Answered with a credit, which may be all that was lost.
        self.hello_due = true;
        self.rewind();
        if self.end == End::Sent {
            self.end = End::Due;
        }
    }

    fn take(&mut self, credit: &Credit) {
        self.greeted = true;
        // Also backwards: a host that was restarted has lost what it had received. What it lacks
        // and is gone here the hello tells it.
        self.received = credit.received;
        self.hello_due |= credit.received + 1 < self.first_seq;
        if credit.resend {
            self.rewind();
        }
        while self.first_seq <= credit.durable {
            self.kept.pop_front();
            self.first_seq += 1;
        }
        if credit.end && self.end == End::Sent && self.received == self.last_seq() {
            self.end = End::Heard;
        }
        self.window_end = credit
            .received
            .saturating_add(u64::from(credit.window_blocks));
        self.next_seq = self.next_seq.max(self.received + 1).max(self.first_seq);
    }

    fn next_body(&self) -> Option<(u64, Body<'_>)> {
        if self.hello_due {
            let device = &self.device;
            return Some((self.first_seq, Body::Hello { device }));
        }
        if let Some(status) = &self.status_due {
            return Some((0, Body::Status(status.clone())));
        }
        if !self.greeted {
            return None;
        }
        if self.next_seq <= self.last_seq() {
            if self.next_seq > self.window_end {
                return None;
            }
            let at = usize::try_from(self.next_seq - self.first_seq).ok()?;
            let (header, key) = self.kept.get(at)?;
            let header = *header;
            return Some((self.next_seq, Body::Key { header, key }));
        }
        (self.end == End::Due).then_some((self.last_seq(), Body::End))
    }

    fn count_sent(&mut self) {
        if self.next_seq == self.fresh_seq {
            self.fresh_seq += 1;
            self.counters.sent += 1;
        } else {
            self.counters.resent += 1;
        }
        self.next_seq += 1;
    }

    fn rewind(&mut self) {
        self.next_seq = self.first_seq.max(self.received + 1);
    }

    fn last_seq(&self) -> u64 {
        self.first_seq + self.kept.len() as u64 - 1
    }

    /// The host owes an answer.
    fn is_waiting(&self) -> bool {
        !self.greeted || !self.kept.is_empty() || self.end == End::Sent
    }
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender")
            .field("session", &self.session)
            .field("kept_blocks", &self.kept.len())
            .field("first_seq", &self.first_seq)
            .field("next_seq", &self.next_seq)
            .field("window_end", &self.window_end)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}
