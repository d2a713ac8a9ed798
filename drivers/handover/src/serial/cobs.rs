//! Consistent overhead byte stuffing (Cheshire and Baker 1999): bytes without zeros, so that a zero
//! ends a frame.
//!
//! A group is a code, 1 to 255, and `code - 1` bytes that are not zero; a group stands for its bytes and
//! a zero after them, without that zero where the code is 255 or the group is the last. Both directions
//! work in runs between zeros, not byte by byte.

use memchr::memchr;

/// Most bytes of a group.
const GROUP_BYTES: usize = 254;

/// Appends the encoding of what is pushed to a buffer.
pub(super) struct Encoder<'a> {
    out: &'a mut Vec<u8>,
    /// Where the code of the open group is.
    code_at: usize,
    /// Bytes in the open group.
    group_bytes: u8,
}

impl<'a> Encoder<'a> {
    pub(super) fn new(out: &'a mut Vec<u8>) -> Self {
        let code_at = out.len();
        out.push(0);
        Self {
            out,
            code_at,
            group_bytes: 0,
        }
    }

    pub(super) fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = GROUP_BYTES - usize::from(self.group_bytes);
            if room == 0 {
                // Full, and not the last.
                self.next_group();
                continue;
            }
            let window = &bytes[..room.min(bytes.len())];
            let zero = memchr(0, window);
            let run = &window[..zero.unwrap_or(window.len())];
            self.out.extend_from_slice(run);
            // At most 254 in a group.
            self.group_bytes += u8::try_from(run.len()).unwrap_or(0);
            bytes = &bytes[run.len()..];
            if zero.is_some() {
                self.next_group();
                bytes = &bytes[1..];
            }
        }
    }

    pub(super) fn finish(self) {
        self.out[self.code_at] = self.group_bytes + 1;
    }

    fn next_group(&mut self) {
        self.out[self.code_at] = self.group_bytes + 1;
        self.code_at = self.out.len();
        self.out.push(0);
        self.group_bytes = 0;
    }
}

/// Where the decoding of a frame is.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    /// Bytes of the open group that have not come.
    left: u8,
    /// A zero comes before the next group.
    zero_due: bool,
}

impl Decoder {
    /// Appends what `bytes`, which hold no zero, stand for: never more than they are.
    pub(super) fn decode(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) {
        while let Some((&code, rest)) = bytes.split_first() {
            if self.left == 0 {
                if self.zero_due {
                    out.push(0);
                }
                self.left = code.saturating_sub(1);
                self.zero_due = code != u8::MAX;
                bytes = rest;
            }
            let (run, rest) = bytes.split_at(bytes.len().min(usize::from(self.left)));
            out.extend_from_slice(run);
            self.left -= u8::try_from(run.len()).unwrap_or(self.left);
            bytes = rest;
        }
    }

    /// Whether the frame may end here; the next one begins anew.
    pub(super) fn finish(&mut self) -> bool {
        std::mem::take(self).left == 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(pieces: &[&[u8]]) -> Vec<u8> {
        let mut out = vec![9];
        let mut encoder = Encoder::new(&mut out);
        pieces.iter().for_each(|piece| encoder.push(piece));
        encoder.finish();
        out.split_off(1)
    }

    fn decoded(bytes: &[u8], step: usize) -> Option<Vec<u8>> {
        let (mut decoder, mut out) = (Decoder::default(), Vec::new());
        bytes
            .chunks(step)
            .for_each(|piece| decoder.decode(piece, &mut out));
        decoder.finish().then_some(out)
    }

    #[test]
    fn the_examples_of_the_paper() {
        let long: Vec<u8> = (1..=254).collect();
        let longer: Vec<u8> = (1..=255).collect();
        let cases: [(&[u8], Vec<u8>); 5] = [
            (&[], vec![1]),
            (&[0], vec![1, 1]),
            (&[0x11, 0x22, 0, 0x33], vec![3, 0x11, 0x22, 2, 0x33]),
            (&long, [&[255], &long[..]].concat()),
            (&longer, [&[255], &long[..], &[2, 255]].concat()),
        ];
        for (plain, expected) in cases {
            assert_eq!(encoded(&[plain]), expected);
            assert_eq!(decoded(&expected, 7).unwrap(), plain);
        }
        assert_eq!(decoded(&[3, 1], 1), None, "a group that is cut off");
    }

    proptest! {
        #[test]
        fn any_bytes_come_back_and_another_decoder_reads_them(
            bytes in prop::collection::vec(prop_oneof![3 => Just(0_u8), 7 => Just(7), 1 => any::<u8>()], 0..1500),
            cut in 0..1500_usize,
            step in 1..600_usize,
        ) {
            let (a, b) = bytes.split_at(cut.min(bytes.len()));
            let line = encoded(&[a, b]);
            prop_assert!(!line.contains(&0));
            prop_assert_eq!(&decoded(&line, step).unwrap(), &bytes);
            prop_assert_eq!(&::cobs::decode_vec(&line).unwrap(), &bytes);
            let theirs = ::cobs::encode_vec(&bytes);
            prop_assert_eq!(&decoded(&theirs, step).unwrap(), &bytes);
        }

        #[test]
        fn whatever_comes_is_no_longer_decoded_than_it_was(
            bytes in prop::collection::vec(1..=255_u8, 0..1500),
        ) {
            let (mut decoder, mut out) = (Decoder::default(), Vec::new());
            decoder.decode(&bytes, &mut out);
            prop_assert!(out.len() <= bytes.len());
        }
    }
}
