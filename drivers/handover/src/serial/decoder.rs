//! From bytes off the line, in pieces of any size, to frames.

use memchr::memchr;
use zeroize::Zeroizing;

use super::{
    Body, CRC_BYTES, CREDIT, CREDIT_BYTES, Credit, END, END_HEARD, Frame, GREET, HEADER_BYTES,
    HELLO, KEY, MAX_DEVICE_BYTES, MAX_ENCODED_BYTES, MAX_PAYLOAD_BYTES, RESEND, STATUS, VERSION,
    cobs,
};
use crate::{
    block::{BlockError, BlockHeader},
    check::crc32c,
    status::{Status, StatusError},
    wipe,
};

/// Finds frames in a stream of bytes. Holds at most one frame, in memory that it wipes.
pub struct Decoder {
    /// What the bytes since the last zero stand for; never grows beyond its first capacity, which would
    /// leave copies.
    held: Zeroizing<Vec<u8>>,
    cobs: cobs::Decoder,
    /// Bytes since the last zero.
    line_bytes: usize,
    /// `held` has been handed out as a frame.
    spent: bool,
    /// What comes until the next zero is part of a frame that was too long.
    overrun: bool,
    counters: DecoderCounters,
}

/// What a decoder has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DecoderCounters {
    /// Good frames.
    pub frames: u64,
    /// Frames with a wrong check sequence.
    pub bad_crc: u64,
    /// Frames longer than any frame may be.
    pub oversize: u64,
    /// Anything else between two zero bytes that is no frame.
    pub garbage: u64,
}

/// Why what lay between two zero bytes is not a frame. It was dropped; the next call continues
/// after it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// More than [`MAX_ENCODED_BYTES`] without a zero byte.
    #[error("frame of more than {MAX_ENCODED_BYTES} bytes")]
    Oversize,
    /// Not COBS, or too short.
    #[error("no frame")]
    Garbage,
    /// Damaged on its way.
    #[error("frame check sequence {got:#010x}, expected {want:#010x}")]
    Checksum {
        /// In the frame.
        got: u32,
        /// Computed.
        want: u32,
    },
    /// A version that this code does not speak.
    #[error("frame version {version}, {VERSION} expected")]
    Version {
        /// The version found.
        version: u8,
    },
    /// The length field is not the length of the payload.
    #[error("payload of {have} bytes, {claimed} claimed")]
    Length {
        /// Bytes there are.
        have: usize,
        /// Bytes claimed.
        claimed: u32,
    },
    /// A type that this code does not know.
    #[error("frame type {kind}")]
    Kind {
        /// The type found.
        kind: u8,
    },
    /// The payload is not a key block.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The payload is not a status.
    #[error(transparent)]
    Status(#[from] StatusError),
    /// The payload of a hello or a credit cannot be read.
    #[error("payload of frame type {kind} cannot be read")]
    Payload {
        /// The frame's type.
        kind: u8,
    },
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder that has seen nothing; what comes before the first zero byte is most likely
    /// garbage and is counted as such.
    #[must_use]
    pub fn new() -> Self {
        Self {
            held: Zeroizing::new(Vec::with_capacity(MAX_ENCODED_BYTES)),
            cobs: cobs::Decoder::default(),
            line_bytes: 0,
            spent: false,
            overrun: false,
            counters: DecoderCounters::default(),
        }
    }

    /// The next frame, or what was in its place; `None` when all of `input` is used up.
    ///
    /// Takes from `input` what it needs and leaves the rest there, so that a caller holding many
    /// frames calls it until it returns `None`. The frame borrows the decoder's memory, which the
    /// next call wipes.
    ///
    /// # Errors
    ///
    /// The inner [`FrameError`]: what was there is dropped and counted; call again.
    pub fn next_frame(&mut self, input: &mut &[u8]) -> Option<Result<Frame<'_>, FrameError>> {
        self.wipe_spent();
        loop {
            let zero = memchr(0, input);
            let (piece, rest) = input.split_at(zero.unwrap_or(input.len()));
            self.hold(piece);
            *input = rest;
            // Past the delimiter; without one there is no more input.
            *input = input.split_first()?.1;
            if self.line_bytes > 0 {
                break;
            }
        }
        self.spent = true;
        Some(self.finish())
    }

    /// Forgets a half-received frame, for a port that was closed.
    pub fn reset(&mut self) {
        self.spent = true;
        self.wipe_spent();
    }

    /// What it has seen.
    #[must_use]
    pub fn counters(&self) -> DecoderCounters {
        self.counters
    }

    fn wipe_spent(&mut self) {
        if std::mem::take(&mut self.spent) {
            self.wipe();
            self.cobs = cobs::Decoder::default();
            self.line_bytes = 0;
            self.overrun = false;
        }
    }

    /// Wipes what was written; the rest of the capacity has been wiped before.
    fn wipe(&mut self) {
        wipe(&mut self.held);
        self.held.clear();
    }

    fn hold(&mut self, piece: &[u8]) {
        self.line_bytes = self.line_bytes.saturating_add(piece.len());
        if self.line_bytes > MAX_ENCODED_BYTES && !self.overrun {
            self.overrun = true;
            self.wipe();
        }
        if !self.overrun {
            // No longer than the bytes on the line, which fit.
            self.cobs.decode(piece, &mut self.held);
        }
    }

    fn finish(&mut self) -> Result<Frame<'_>, FrameError> {
        let Self { held, counters, .. } = self;
        let result = if std::mem::take(&mut self.overrun) {
            Err(FrameError::Oversize)
        } else if self.cobs.finish() {
            parse(held)
        } else {
            Err(FrameError::Garbage)
        };
        let counter = match &result {
            Ok(_) => &mut counters.frames,
            Err(FrameError::Checksum { .. }) => &mut counters.bad_crc,
            Err(FrameError::Oversize) => &mut counters.oversize,
            Err(_) => &mut counters.garbage,
        };
        *counter += 1;
        result
    }
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder")
            .field("held_bytes", &self.held.len())
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

fn parse(raw: &[u8]) -> Result<Frame<'_>, FrameError> {
    let (checked, crc) = raw
        .split_last_chunk::<CRC_BYTES>()
        .ok_or(FrameError::Garbage)?;
    let (header, payload) = checked
        .split_first_chunk::<HEADER_BYTES>()
        .ok_or(FrameError::Garbage)?;
    let (got, want) = (u32::from_le_bytes(*crc), crc32c(&[checked]));
    if got != want {
        return Err(FrameError::Checksum { got, want });
    }
    let [
        version,
        kind,
        f0,
        f1,
        s0,
        s1,
        s2,
        s3, //
        n0,
        n1,
        n2,
        n3,
        n4,
        n5,
        n6,
        n7,
        l0,
        l1,
        l2,
        l3,
    ] = *header;
    if version != VERSION {
        return Err(FrameError::Version { version });
    }
    let (have, claimed) = (payload.len(), u32::from_le_bytes([l0, l1, l2, l3]));
    if claimed as usize != have || have > MAX_PAYLOAD_BYTES {
        return Err(FrameError::Length { have, claimed });
    }
    Ok(Frame {
        session: u32::from_le_bytes([s0, s1, s2, s3]),
        seq: u64::from_le_bytes([n0, n1, n2, n3, n4, n5, n6, n7]),
        body: parse_body(kind, u16::from_le_bytes([f0, f1]), payload)?,
    })
}

fn parse_body(kind: u8, flags: u16, payload: &[u8]) -> Result<Body<'_>, FrameError> {
    let unreadable = FrameError::Payload { kind };
    Ok(match kind {
        HELLO => Body::Hello {
            device: str::from_utf8(payload)
                .ok()
                .filter(|name| !name.is_empty() && name.len() <= MAX_DEVICE_BYTES)
                .ok_or(unreadable)?,
        },
        KEY => {
            let (header, key) = BlockHeader::decode(payload)?;
            Body::Key { header, key }
        }
        STATUS => Body::Status(Status::decode(payload)?),
        CREDIT => {
            let payload = <[u8; CREDIT_BYTES]>::try_from(payload).map_err(|_| unreadable)?;
            let [
                d0,
                d1,
                d2,
                d3,
                d4,
                d5,
                d6,
                d7,
                r0,
                r1,
                r2,
                r3,
                r4,
                r5,
                r6,
                r7,
                w0,
                w1,
                w2,
                w3,
            ] = payload;
            Body::Credit(Credit {
                durable: u64::from_le_bytes([d0, d1, d2, d3, d4, d5, d6, d7]),
                received: u64::from_le_bytes([r0, r1, r2, r3, r4, r5, r6, r7]),
                window_blocks: u32::from_le_bytes([w0, w1, w2, w3]),
                resend: flags & RESEND != 0,
                greet: flags & GREET != 0,
                end: flags & END_HEARD != 0,
            })
        }
        END if payload.is_empty() => Body::End,
        END => return Err(unreadable),
        kind => return Err(FrameError::Kind { kind }),
    })
}
