//! Cuts a byte stream into messages, and puts bounds on their length and their time.
//!
//! A peer that sends half a header and then nothing holds a task and a buffer for
//! [`Limits::header_within`], no longer.

use std::{io, time::Duration};

use qkd_keyfile::signal::{HEADER_BYTES, Header};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::{Instant, timeout_at},
};

/// Bytes of the length before a message of [`Framing::Length`].
pub const PREFIX_BYTES: usize = 4;

/// A message's buffer grows by at most this much ahead of what has arrived.
const STEP_BYTES: usize = 64 << 10;

/// How messages follow each other on a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// A big-endian `u32` length, then the message. For our own protocols.
    Length {
        /// Longest message, in bytes.
        max_bytes: u32,
    },
    /// The 10-byte header of the signalling protocols ([`qkd_keyfile::signal`]), which is part of
    /// the message, then its payload. At most 65 545 bytes.
    Signal,
}

impl Framing {
    /// Length-prefixed messages of up to 1 MiB.
    pub const LENGTH: Self = Self::Length { max_bytes: 1 << 20 };

    /// Appends `message` to `out` as it goes over the stream.
    ///
    /// # Errors
    ///
    /// [`TooLong`]: nothing was appended.
    pub fn encode(self, message: &[u8], out: &mut Vec<u8>) -> Result<(), TooLong> {
        out.extend(self.prefix(message.len())?.into_iter().flatten());
        out.extend_from_slice(message);
        Ok(())
    }

    /// What goes over the stream before a message of so many bytes.
    pub(crate) fn prefix(self, bytes: usize) -> Result<Option<[u8; PREFIX_BYTES]>, TooLong> {
        let Self::Length { max_bytes } = self else {
            return Ok(None);
        };
        let length = u32::try_from(bytes).ok();
        let length = length.filter(|&length| length <= max_bytes);
        let length = length.ok_or(TooLong { bytes, max_bytes })?;
        Ok(Some(length.to_be_bytes()))
    }

    fn head_bytes(self) -> usize {
        match self {
            Self::Length { .. } => PREFIX_BYTES,
            Self::Signal => HEADER_BYTES,
        }
    }
}

/// Time and silence allowed to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// From the first byte of a header to its last.
    pub header_within: Duration,
    /// From the end of the header to the last byte of the payload.
    pub payload_within: Duration,
    /// From the end of a message to the first byte of the next; `None`: for ever.
    pub idle_within: Option<Duration>,
    /// For the peer to take what is written to it ([`crate::drive()`] only).
    pub write_within: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            header_within: Duration::from_secs(5),
            payload_within: Duration::from_secs(20),
            idle_within: None,
            write_within: Duration::from_secs(20),
        }
    }
}

/// A message is longer than the framing allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("message of {bytes} bytes, {max_bytes} at most")]
pub struct TooLong {
    /// Length of the message, in bytes.
    pub bytes: usize,
    /// Longest message, in bytes.
    pub max_bytes: u32,
}

/// Why no further message can be read. Close the connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The peer announces a message that is too long. Nothing of it was read.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// The stream ended inside a message.
    #[error("the stream ended inside a message")]
    Truncated,
    /// A header, a payload or the next message did not come in time.
    #[error("the peer was silent for too long ({phase})")]
    TimedOut {
        /// What was waited for: "header", "payload" or "next message".
        phase: &'static str,
    },
    /// The stream failed.
    #[error("reading: {0}")]
    Io(#[from] io::Error),
}

/// Reads messages; keeps its place when a read is abandoned, so it can stand in a `select!`.
#[derive(Debug)]
pub struct FrameReader {
    framing: Framing,
    limits: Limits,
    head: [u8; HEADER_BYTES],
    head_filled: usize,
    /// The message so far, `body_filled` bytes of it valid.
    body: Vec<u8>,
    body_filled: usize,
    deadline: Option<Instant>,
}

impl FrameReader {
    /// A reader at the start of a message.
    #[must_use]
    pub fn new(framing: Framing, limits: Limits) -> Self {
        Self {
            framing,
            limits,
            head: [0; HEADER_BYTES],
            head_filled: 0,
            body: Vec::new(),
            body_filled: 0,
            deadline: None,
        }
    }

    /// The next message; `None` when the stream has ended between messages.
    ///
    /// Cancel-safe: what a dropped call has read, the next one goes on with, under the same deadline.
    ///
    /// # Errors
    ///
    /// [`FrameError`]: the reader has lost its place for good; close the connection.
    pub async fn next(
        &mut self,
        stream: &mut (impl AsyncRead + Unpin),
    ) -> Result<Option<Vec<u8>>, FrameError> {
        let head_bytes = self.framing.head_bytes();
        while self.head_filled < head_bytes {
            let rest = &mut self.head[self.head_filled..head_bytes];
            let started = self.head_filled > 0;
            let within = match started {
                true => Some(self.limits.header_within),
                false => self.limits.idle_within,
            };
            let phase = if started { "header" } else { "next message" };
            let read = read(stream, rest, &mut self.deadline, within, phase).await?;
            match (read, started) {
                (0, false) => return Ok(None),
                (0, true) => return Err(FrameError::Truncated),
                _ => self.head_filled += read,
            }
            if !started || self.head_filled == head_bytes {
                self.deadline = None;
            }
        }
        let total = self.open()?;
        while self.body_filled < total {
            let until = total.min(self.body_filled + STEP_BYTES);
            self.body.resize(until, 0);
            let rest = &mut self.body[self.body_filled..];
            let within = Some(self.limits.payload_within);
            let read = read(stream, rest, &mut self.deadline, within, "payload").await?;
            if read == 0 {
                return Err(FrameError::Truncated);
            }
            self.body_filled += read;
        }
        self.deadline = None;
        self.head_filled = 0;
        self.body_filled = 0;
        Ok(Some(std::mem::take(&mut self.body)))
    }

    /// Length of the whole message, in bytes; begins it with the header where that is part of it.
    fn open(&mut self) -> Result<usize, FrameError> {
        match self.framing {
            Framing::Length { max_bytes } => {
                let [a, b, c, d, ..] = self.head;
                let length = u32::from_be_bytes([a, b, c, d]);
                let bytes = length as usize;
                if length > max_bytes {
                    return Err(TooLong { bytes, max_bytes }.into());
                }
                Ok(bytes)
            }
            Framing::Signal => {
                if self.body_filled == 0 {
                    self.body.extend_from_slice(&self.head);
                    self.body_filled = HEADER_BYTES;
                }
                Ok(HEADER_BYTES + usize::from(Header::decode(&self.head).payload_bytes))
            }
        }
    }
}

async fn read(
    stream: &mut (impl AsyncRead + Unpin),
    out: &mut [u8],
    deadline: &mut Option<Instant>,
    within: Option<Duration>,
    phase: &'static str,
) -> Result<usize, FrameError> {
    let Some(within) = within else {
        return Ok(stream.read(out).await?);
    };
    let deadline = *deadline.get_or_insert_with(|| Instant::now() + within);
    match timeout_at(deadline, stream.read(out)).await {
        Ok(read) => Ok(read?),
        Err(_) => Err(FrameError::TimedOut { phase }),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, duplex};

    use super::*;

    fn limits() -> Limits {
        Limits {
            header_within: Duration::from_millis(50),
            payload_within: Duration::from_millis(50),
            ..Limits::default()
        }
    }

    async fn read_all(framing: Framing, bytes: &[u8]) -> Result<Vec<Vec<u8>>, FrameError> {
        let (mut ours, mut theirs) = duplex(16);
        let writing = async {
            // A reader that gives up closes the pipe; what is left then is nobody's.
            let _ = theirs.write_all(bytes).await;
            drop(theirs);
        };
        let reading = async {
            let mut reader = FrameReader::new(framing, limits());
            let mut all = Vec::new();
            while let Some(message) = reader.next(&mut ours).await? {
                all.push(message);
            }
            drop(ours);
            Ok(all)
        };
        tokio::join!(writing, reading).1
    }

    #[tokio::test]
    async fn messages_come_out_as_they_went_in() {
        let messages = [vec![], vec![7], vec![1; 70_000], vec![]];
        let mut bytes = Vec::new();
        for message in &messages {
            Framing::LENGTH.encode(message, &mut bytes).unwrap();
        }
        assert_eq!(read_all(Framing::LENGTH, &bytes).await.unwrap(), messages);
    }

    #[tokio::test]
    async fn signalling_messages_keep_their_header() {
        let first = qkd_keyfile::signal::encode_message(1, 0x2101, b"{}").unwrap();
        let second = qkd_keyfile::signal::encode_message(2, 3, &[b' '; 65_535]).unwrap();
        let third = qkd_keyfile::signal::encode_message(3, 4, b"").unwrap();
        let bytes = [&first[..], &second, &third].concat();
        assert_eq!(
            read_all(Framing::Signal, &bytes).await.unwrap(),
            [first, second, third]
        );
    }

    #[tokio::test]
    async fn one_byte_over_the_limit_is_refused_before_it_is_read() {
        let framing = Framing::Length { max_bytes: 4 };
        assert_eq!(
            framing.encode(&[0; 5], &mut Vec::new()),
            Err(TooLong {
                bytes: 5,
                max_bytes: 4
            })
        );
        let refused = read_all(framing, &[0, 0, 0, 5]).await;
        assert!(matches!(
            refused,
            Err(FrameError::TooLong(TooLong { bytes: 5, .. }))
        ));
        assert_eq!(read_all(framing, &[0, 0, 0, 1, 9]).await.unwrap(), [[9]]);
    }

    #[tokio::test]
    async fn an_end_inside_a_message_is_an_error() {
        for cut in [&[0, 0][..], &[0, 0, 0, 2], &[0, 0, 0, 2, 1]] {
            let read = read_all(Framing::LENGTH, cut).await;
            assert!(matches!(read, Err(FrameError::Truncated)), "{cut:?}");
        }
    }

    #[tokio::test]
    async fn half_a_header_and_half_a_payload_time_out() {
        for (sent, expected) in [(&[0, 0][..], "header"), (&[0, 0, 0, 2, 1], "payload")] {
            let (mut ours, mut theirs) = duplex(16);
            theirs.write_all(sent).await.unwrap();
            let mut reader = FrameReader::new(Framing::LENGTH, limits());
            let read = reader.next(&mut ours).await;
            assert!(matches!(read, Err(FrameError::TimedOut { phase }) if phase == expected));
        }
    }

    #[tokio::test]
    async fn an_abandoned_read_goes_on_where_it_was() {
        let (mut ours, mut theirs) = duplex(16);
        let mut reader = FrameReader::new(Framing::LENGTH, Limits::default());
        for part in [&[0, 0][..], &[0, 2, 8]] {
            theirs.write_all(part).await.unwrap();
            let abandoned =
                tokio::time::timeout(Duration::from_millis(20), reader.next(&mut ours)).await;
            assert!(abandoned.is_err());
        }
        theirs.write_all(&[9]).await.unwrap();
        assert_eq!(reader.next(&mut ours).await.unwrap(), Some(vec![8, 9]));
    }
}
