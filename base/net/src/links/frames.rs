//! What is written next: messages with their lengths, without a copy of those that are long.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf, Bytes, BytesMut};

use crate::{Framing, frame::TooLong};

/// Shorter messages are copied behind one another: a slice of its own would cost more than that.
const SHORT_BYTES: usize = 4 << 10;

/// Framed messages, in order.
#[derive(Debug, Default)]
pub(super) struct Frames {
    pieces: VecDeque<Bytes>,
    /// The end, which grows.
    tail: BytesMut,
    remaining: usize,
}

impl Frames {
    /// Adds a message.
    ///
    /// # Errors
    ///
    /// [`TooLong`]: nothing was added.
    pub(super) fn push(&mut self, framing: Framing, message: Bytes) -> Result<(), TooLong> {
        if let Some(prefix) = framing.prefix(message.len())? {
            self.tail.extend_from_slice(&prefix);
            self.remaining += prefix.len();
        }
        if message.len() < SHORT_BYTES {
            self.tail.extend_from_slice(&message);
            self.remaining += message.len();
        } else {
            self.push_bytes(message);
        }
        Ok(())
    }

    /// Adds bytes that are framed already.
    pub(super) fn push_bytes(&mut self, bytes: Bytes) {
        if !self.tail.is_empty() {
            self.pieces.push_back(self.tail.split().freeze());
        }
        self.remaining += bytes.len();
        self.pieces.push_back(bytes);
    }
}

impl Buf for Frames {
    fn remaining(&self) -> usize {
        self.remaining
    }

    fn chunk(&self) -> &[u8] {
        self.pieces.front().map_or(&self.tail[..], |piece| piece)
    }

    fn chunks_vectored<'a>(&'a self, out: &mut [IoSlice<'a>]) -> usize {
        let pieces = self.pieces.iter().map(|piece| &piece[..]);
        let tail = (!self.tail.is_empty()).then_some(&self.tail[..]);
        let mut used = 0;
        for (slot, piece) in out.iter_mut().zip(pieces.chain(tail)) {
            *slot = IoSlice::new(piece);
            used += 1;
        }
        used
    }

    fn advance(&mut self, count: usize) {
        assert!(count <= self.remaining, "no more than there is");
        self.remaining -= count;
        let mut left = count;
        while let Some(first) = self.pieces.front_mut() {
            if left < first.len() {
                return first.advance(left);
            }
            left -= first.len();
            self.pieces.pop_front();
        }
        self.tail.advance(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_and_short_messages_leave_in_order_and_framed_however_they_are_written() {
        let lengths = [0, 1, 5000, 3, SHORT_BYTES - 1, SHORT_BYTES, 70_000, 2];
        let messages = lengths.map(|len| Bytes::from(vec![len.to_le_bytes()[0]; len]));
        let mut expected = Vec::new();
        for message in &messages {
            Framing::LENGTH.encode(message, &mut expected).unwrap();
        }
        for step in [1, 7, 4096, usize::MAX] {
            let mut frames = Frames::default();
            for message in &messages {
                frames.push(Framing::LENGTH, message.clone()).unwrap();
            }
            assert_eq!(frames.remaining(), expected.len());
            let mut written = Vec::new();
            while frames.has_remaining() {
                let mut slices = [IoSlice::new(&[]); 3];
                let used = frames.chunks_vectored(&mut slices);
                let joined: Vec<u8> = slices[..used]
                    .iter()
                    .flat_map(|s| s.iter().copied())
                    .collect();
                assert!(joined.starts_with(frames.chunk()));
                let step = step.min(joined.len());
                written.extend_from_slice(&joined[..step]);
                frames.advance(step);
            }
            assert!(written == expected);
        }
    }
}
