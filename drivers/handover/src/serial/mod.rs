//! Key blocks over a serial line: frames, and the two halves of their exchange.
//!
//! A frame is COBS-encoded (Cheshire and Baker 1999) between zero bytes, so that a reader finds the
//! next frame after any damage. Before COBS:
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0 | version | [`VERSION`] |
//! | 1 | type | 1 hello, 2 key, 3 status, 4 credit, 5 end |
//! | 2-3 | flags | of a credit: 1 resend, 2 greet, 4 end; else 0 |
//! | 4-7 | session | drawn by the device when it begins to number anew, never 0 |
//! | 8-15 | sequence number | see [`Body`] |
//! | 16-19 | payload length, bytes | at most [`MAX_PAYLOAD_BYTES`] |
//! | 20- | payload | |
//! | then | CRC-32C | of all before |
//!
//! All integers are little-endian.
//!
//! # The exchange
//!
//! The device numbers its key frames 1, 2, ... within a session and keeps each until the host has
//! said that it is durable. The host takes them in order only. Its credit frame says three things:
//! up to where blocks are durable, up to where they are received, and how many more it takes. What
//! is lost is sent again, from the first one missing, when the host asks or when a time-out passes; so
//! is the end.
//! [`Sender`] and [`Receiver`] are the two halves, without a port or a clock.
//!
//! A CRC finds damage, not an attacker: a line that leaves the cabinet needs more protection.

use crate::{
    block::{self, BlockError, BlockHeader},
    check::crc32c,
    status::Status,
};

mod cobs;
mod decoder;
mod receiver;
mod sender;
#[cfg(test)]
mod tests;

pub use decoder::{Decoder, DecoderCounters, FrameError};
pub use receiver::{Event, Position, Receiver, ReceiverCounters};
pub use sender::{OfferError, Sender, SenderCounters};

/// The version this code speaks.
pub const VERSION: u8 = 1;

/// Longest payload, in bytes.
pub const MAX_PAYLOAD_BYTES: usize = 64 * 1024;

/// Longest key of one frame, in bits: shorter than [`block::MAX_KEY_BITS`].
pub const MAX_KEY_BITS: u32 = (64 * 1024 - 24) * 8;

/// Longest frame on the line, in bytes, with both its zero bytes.
pub const MAX_ENCODED_BYTES: usize = 2 + MAX_RAW_BYTES + MAX_RAW_BYTES.div_ceil(254);

/// Longest name of a device, in bytes.
pub const MAX_DEVICE_BYTES: usize = 64;

const HEADER_BYTES: usize = 20;
const CRC_BYTES: usize = 4;
const CREDIT_BYTES: usize = 20;
const MAX_RAW_BYTES: usize = HEADER_BYTES + MAX_PAYLOAD_BYTES + CRC_BYTES;

/// One frame. Its key bytes stay in the buffer it was decoded from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The device's numbering that the frame belongs to; 0 only in a host's first credit.
    pub session: u32,
    /// See [`Body`].
    pub seq: u64,
    /// What it says.
    pub body: Body<'a>,
}

/// What a frame says.
#[derive(Clone, PartialEq, Eq)]
pub enum Body<'a> {
    /// Device to host: here I am. The sequence number is that of the first block still kept, or of
    /// the next to come.
    Hello {
        /// The device's own name, 1 to [`MAX_DEVICE_BYTES`] bytes.
        device: &'a str,
    },
    /// Device to host: a key block, with its own sequence number.
    Key {
        /// What is known of it.
        header: BlockHeader,
        /// Its key.
        key: &'a [u8],
    },
    /// Device to host: how it is. The sequence number is 0.
    Status(Status),
    /// Host to device: what has arrived and what may come. The sequence number is 0.
    Credit(Credit),
    /// Device to host: no more blocks. The sequence number is that of the last.
    End,
}

/// What a host has and takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Credit {
    /// Blocks up to this sequence number survive a crash of the host; the device may forget them.
    pub durable: u64,
    /// Blocks up to this sequence number have arrived.
    pub received: u64,
    /// How many blocks beyond `received` the host takes.
    pub window_blocks: u32,
    /// Send again from `received + 1`.
    pub resend: bool,
    /// Send a hello.
    pub greet: bool,
    /// The end has been heard, and nothing is missing before it.
    pub end: bool,
}

/// Why a frame cannot be encoded. Nothing was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The key is not as its header says.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The payload is longer than [`MAX_PAYLOAD_BYTES`].
    #[error("payload of {bytes} bytes, {MAX_PAYLOAD_BYTES} at most")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// The device's name is empty or longer than [`MAX_DEVICE_BYTES`].
    #[error("device name of {bytes} bytes, 1 to {MAX_DEVICE_BYTES} expected")]
    Device {
        /// Its length.
        bytes: usize,
    },
}

/// Appends a frame, with a zero byte before and after, to `out`.
///
/// `out` comes to hold key bytes: wipe it. It grows at most once, before anything is written, so
/// give it [`MAX_ENCODED_BYTES`] of room if what it held before is key too.
///
/// # Errors
///
/// See [`EncodeError`]; `out` is as it was.
pub fn encode(frame: &Frame<'_>, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let Payload {
        kind,
        flags,
        head,
        key,
    } = payload(&frame.body)?;
    let bytes = head.len() + key.len();
    let length = u32::try_from(bytes)
        .ok()
        .filter(|_| bytes <= MAX_PAYLOAD_BYTES)
        .ok_or(EncodeError::TooLong { bytes })?;
    let mut header = [0; HEADER_BYTES];
    header[..2].copy_from_slice(&[VERSION, kind]);
    header[2..4].copy_from_slice(&flags.to_le_bytes());
    header[4..8].copy_from_slice(&frame.session.to_le_bytes());
    header[8..16].copy_from_slice(&frame.seq.to_le_bytes());
    header[16..].copy_from_slice(&length.to_le_bytes());
    let crc = crc32c(&[&header, &head, key]).to_le_bytes();
    let raw_bytes = HEADER_BYTES + bytes + CRC_BYTES;
    out.reserve(2 + raw_bytes + raw_bytes.div_ceil(254));
    out.push(0);
    let mut encoder = cobs::Encoder::new(out);
    for piece in [&header, &head[..], key, &crc] {
        encoder.push(piece);
    }
    encoder.finish();
    out.push(0);
    Ok(())
}

struct Payload<'a> {
    kind: u8,
    flags: u16,
    /// All of it but the key, which is not copied.
    head: Vec<u8>,
    key: &'a [u8],
}

fn payload<'a>(body: &Body<'a>) -> Result<Payload<'a>, EncodeError> {
    let (kind, flags, head, key): (_, _, _, &[u8]) = match body {
        Body::Hello { device } if device.is_empty() || device.len() > MAX_DEVICE_BYTES => {
            return Err(EncodeError::Device {
                bytes: device.len(),
            });
        }
        Body::Hello { device } => (HELLO, 0, device.as_bytes().to_vec(), &[]),
        Body::Key { header, key } => (KEY, 0, header.encode(key)?.to_vec(), key),
        Body::Status(status) => (STATUS, 0, status.encode().into_bytes(), &[]),
        Body::Credit(credit) => (CREDIT, credit.flags(), credit.encode(), &[]),
        Body::End => (END, 0, Vec::new(), &[]),
    };
    Ok(Payload {
        kind,
        flags,
        head,
        key,
    })
}

impl Credit {
    fn flags(&self) -> u16 {
        let resend = if self.resend { RESEND } else { 0 };
        let greet = if self.greet { GREET } else { 0 };
        let end = if self.end { END_HEARD } else { 0 };
        resend | greet | end
    }

    fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(CREDIT_BYTES);
        payload.extend_from_slice(&self.durable.to_le_bytes());
        payload.extend_from_slice(&self.received.to_le_bytes());
        payload.extend_from_slice(&self.window_blocks.to_le_bytes());
        payload
    }
}

impl std::fmt::Debug for Body<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Hello { device } => write!(f, "Hello({device:?})"),
            Self::Key { header, .. } => write!(f, "Key({header:?}, withheld)"),
            Self::Status(status) => status.fmt(f),
            Self::Credit(credit) => credit.fmt(f),
            Self::End => f.write_str("End"),
        }
    }
}

const HELLO: u8 = 1;
const KEY: u8 = 2;
const STATUS: u8 = 3;
const CREDIT: u8 = 4;
const END: u8 = 5;

const RESEND: u16 = 1;
const GREET: u16 = 2;
const END_HEARD: u16 = 4;

const _: () = assert!(MAX_KEY_BITS as usize / 8 + block::HEADER_BYTES == MAX_PAYLOAD_BYTES);
