//! The host's half of the exchange.

use std::time::Duration;

use qkd_keyfile::Mono;

use super::{Body, Credit, Frame, encode};
use crate::{block::BlockHeader, status::Status};

/// Takes blocks in order, counts what is not, and says which credit to send next.
///
/// The driver of the port gives it every frame that arrives and the time; after either it sends what
/// [`poll_transmit`](Self::poll_transmit) writes, until that returns `false`.
#[derive(Debug)]
pub struct Receiver {
    /// 0 until a device has said hello.
    session: u32,
    received: u64,
    durable: u64,
    window_blocks: u32,
    /// A hello has come since the port was opened.
    greeted: bool,
    /// The end of the session has come, and all blocks before it.
    ended: bool,
    owed: Owed,
    /// A resend was asked for when this was the last block received.
    asked_at: Option<u64>,
    retry_after: Duration,
    retry_at: Option<Mono>,
    counters: ReceiverCounters,
}

/// A place in a device's numbering. The last durable one is what a host had better remember when it
/// restarts.
///
/// A host that does not remember gets the blocks that it made durable last once more if the device
/// had not heard of it; their numbers tell them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The device's session.
    pub session: u32,
    /// The sequence number in it.
    pub seq: u64,
}

/// What a receiver has seen. Every key frame is in one of the first five.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReceiverCounters {
    /// Blocks taken.
    pub blocks: u64,
    /// Blocks that had been taken before; dropped.
    pub duplicates: u64,
    /// Blocks that came before one that is missing; dropped, they come again.
    pub out_of_order: u64,
    /// Blocks beyond the credit; dropped, they come again.
    pub beyond_window: u64,
    /// Blocks of a session whose hello has not come; dropped, they come again.
    pub foreign: u64,
    /// Blocks that the device has no more, though they never came: lost for good.
    pub missing: u64,
    /// Sessions begun by the device.
    pub sessions: u64,
    /// Frames that only a host sends, and hellos with impossible numbers; dropped.
    pub refused: u64,
}

/// What a frame meant.
#[derive(Clone, PartialEq, Eq)]
pub enum Event<'a> {
    /// The device said hello.
    Hello {
        /// Its own name.
        device: &'a str,
        /// It numbers its frames anew: it has restarted, or this host has not met it before.
        new_session: bool,
        /// Blocks of this session that never came and that it has no more.
        missing_blocks: u64,
    },
    /// The next block. Tell [`Receiver::settle`] when it is durable.
    Block {
        /// Its session and sequence number.
        position: Position,
        /// What is known of it.
        header: BlockHeader,
        /// Its key.
        key: &'a [u8],
    },
    /// How the device is.
    Status(Status),
    /// No more blocks come after those that are still missing.
    End {
        /// Blocks that are still to come.
        missing_blocks: u64,
    },
    /// Nothing to act upon; it was counted.
    Dropped,
}

/// No device gets so far by counting; a claim to have done so is refused, and nothing overflows.
const LAST_SEQ: u64 = u64::MAX / 2;

/// What the next credit frame has to say beyond the numbers.
#[derive(Debug, Clone, Copy, Default)]
struct Owed {
    credit: bool,
    resend: bool,
    greet: bool,
}

impl Receiver {
    /// A receiver for a port just opened; it takes no block before [`grant`](Self::grant).
    #[must_use]
    pub fn new(retry_after: Duration, resume: Option<Position>) -> Self {
        let Position { session, seq } = resume.unwrap_or(Position { session: 0, seq: 0 });
        let durable = seq.min(LAST_SEQ);
        let mut receiver = Self {
            session,
            received: durable,
            durable,
            window_blocks: 0,
            greeted: false,
            ended: false,
            owed: Owed::default(),
            asked_at: None,
            retry_after,
            retry_at: None,
            counters: ReceiverCounters::default(),
        };
        receiver.reopened();
        receiver
    }

    /// The port was opened anew: asks the device for a hello. Blocks taken stay taken.
    pub fn reopened(&mut self) {
        self.greeted = false;
        self.asked_at = None;
        self.retry_at = None;
        self.owed = Owed {
            credit: true,
            greet: true,
            resend: false,
        };
    }

    /// Takes so many blocks more.
    pub fn grant(&mut self, blocks: u32) {
        self.window_blocks = self.window_blocks.saturating_add(blocks);
        self.owed.credit = true;
    }

    /// Every block up to `position` is durable, or was dropped for good; the device may forget them.
    ///
    /// A position in a session that is over means nothing any more and changes nothing.
    pub fn settle(&mut self, position: Position) {
        if position.session == self.session {
            self.durable = self.durable.max(position.seq.min(self.received));
            self.owed.credit = true;
        }
    }

    /// The last durable block, to remember across a restart; `None` until a device has said hello.
    #[must_use]
    pub fn position(&self) -> Option<Position> {
        (self.session != 0).then_some(Position {
            session: self.session,
            seq: self.durable,
        })
    }

    /// Blocks that may still come under the credit given.
    #[must_use]
    pub fn window_blocks(&self) -> u32 {
        self.window_blocks
    }

    /// What it has seen.
    #[must_use]
    pub fn counters(&self) -> ReceiverCounters {
        self.counters
    }

    /// Takes a frame from the device and says what it means.
    pub fn receive<'a>(&mut self, frame: &Frame<'a>) -> Event<'a> {
        let known = self.greeted && frame.session == self.session;
        match &frame.body {
            Body::Hello { device } if frame.session != 0 && (1..=LAST_SEQ).contains(&frame.seq) => {
                self.hello(frame.session, frame.seq, device)
            }
            Body::Key { header, key } if known => self.key(frame.seq, *header, key),
            Body::Status(status) if known => Event::Status(status.clone()),
            Body::End if known => self.end(frame.seq),
            Body::Key { .. } | Body::Status(_) | Body::End => {
                self.counters.foreign += u64::from(matches!(frame.body, Body::Key { .. }));
                self.owe(Owed {
                    greet: true,
                    ..Owed::default()
                });
                Event::Dropped
            }
            Body::Hello { .. } | Body::Credit(_) => {
                self.counters.refused += 1;
                Event::Dropped
            }
        }
    }

    /// Appends the next frame to `out`, if there is one.
    #[expect(clippy::missing_panics_doc, reason = "a credit always fits")]
    pub fn poll_transmit(&mut self, now: Mono, out: &mut Vec<u8>) -> bool {
        let Owed {
            credit,
            resend,
            greet,
        } = std::mem::take(&mut self.owed);
        if !credit {
            return false;
        }
        let frame = Frame {
            session: if self.greeted { self.session } else { 0 },
            seq: 0,
            body: Body::Credit(Credit {
                durable: self.durable,
                received: self.received,
                window_blocks: self.window_blocks,
                resend,
                greet,
                end: self.ended,
            }),
        };
        encode(&frame, out).expect("a credit fits");
        self.retry_at = (!self.greeted).then(|| now.after(self.retry_after));
        true
    }

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called, if at all.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Mono> {
        self.retry_at
    }

    /// Asks again for a hello that has not come. Everything else the device asks for.
    pub fn handle_timeout(&mut self, now: Mono) {
        if self.retry_at.is_some_and(|at| now >= at) {
            self.retry_at = None;
            self.owe(Owed {
                greet: true,
                ..Owed::default()
            });
        }
    }

    fn hello<'a>(&mut self, session: u32, first_seq: u64, device: &'a str) -> Event<'a> {
        let new_session = session != self.session;
        let mut missing_blocks = 0;
        if new_session {
            self.session = session;
            self.ended = false;
            self.received = first_seq - 1;
            self.durable = first_seq - 1;
            self.counters.sessions += 1;
        } else if first_seq > self.received + 1 {
            missing_blocks = first_seq - 1 - self.received;
            self.received = first_seq - 1;
            self.counters.missing = self.counters.missing.saturating_add(missing_blocks);
        }
        // A device that repeats its hello has gone back to the first missing block by itself.
        let resend = new_session || !self.greeted;
        self.greeted = true;
        self.asked_at = None;
        self.retry_at = None;
        self.owe(Owed {
            resend,
            ..Owed::default()
        });
        Event::Hello {
            device,
            new_session,
            missing_blocks,
        }
    }

    fn key<'a>(&mut self, seq: u64, header: BlockHeader, key: &'a [u8]) -> Event<'a> {
        let resend = seq > self.received + 1 && self.asked_at != Some(self.received);
        self.owe(Owed {
            resend,
            ..Owed::default()
        });
        if seq <= self.received {
            self.counters.duplicates += 1;
            return Event::Dropped;
        }
        if seq > self.received + 1 {
            self.asked_at = Some(self.received);
            self.counters.out_of_order += 1;
            return Event::Dropped;
        }
        if self.window_blocks == 0 {
            self.counters.beyond_window += 1;
            return Event::Dropped;
        }
        self.window_blocks -= 1;
        self.received = seq;
        self.counters.blocks += 1;
        Event::Block {
            position: Position {
                session: self.session,
                seq,
            },
            header,
            key,
        }
    }

    fn end<'a>(&mut self, last_seq: u64) -> Event<'a> {
        let missing_blocks = last_seq.saturating_sub(self.received);
        let resend = missing_blocks > 0;
        self.ended = !resend;
        self.owe(Owed {
            resend,
            ..Owed::default()
        });
        Event::End { missing_blocks }
    }

    fn owe(&mut self, owed: Owed) {
        self.owed = Owed {
            credit: true,
            resend: self.owed.resend | owed.resend,
            greet: self.owed.greet | owed.greet,
        };
    }
}

impl std::fmt::Debug for Event<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Hello {
                device,
                new_session,
                missing_blocks,
            } => f
                .debug_struct("Hello")
                .field("device", device)
                .field("new_session", new_session)
                .field("missing_blocks", missing_blocks)
                .finish(),
            Self::Block {
                position, header, ..
            } => f
                .debug_struct("Block")
                .field("position", position)
                .field("header", header)
                .finish_non_exhaustive(),
            Self::Status(status) => status.fmt(f),
            Self::End { missing_blocks } => write!(f, "End(missing {missing_blocks})"),
            Self::Dropped => f.write_str("Dropped"),
        }
    }
}
