//! Bit-exact copies: runs of key bits at any offset, from any offset.
//!
//! Bit 0 of a buffer is the top bit of its first byte, as in the key file. What moves is key, so
//! nothing here allocates: bytes go from block to block through registers.

/// A run of bits inside borrowed key bytes.
#[derive(Clone, Copy)]
pub struct Bits<'a> {
    bytes: &'a [u8],
    offset_bits: usize,
    len_bits: usize,
}

/// A run of bits reaches past the end of its buffer. Nothing was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len_bits} bits from bit {offset_bits} on do not fit into {buffer_bytes} bytes")]
pub struct BitRangeError {
    /// First bit of the run.
    pub offset_bits: usize,
    /// Length of the run, in bits.
    pub len_bits: usize,
    /// Length of the buffer.
    pub buffer_bytes: usize,
}

impl<'a> Bits<'a> {
    /// The run of `len_bits` from bit `offset_bits` of `bytes` on.
    ///
    /// # Errors
    ///
    /// [`BitRangeError`]: the run is not inside `bytes`.
    pub fn new(
        bytes: &'a [u8],
        offset_bits: usize,
        len_bits: usize,
    ) -> Result<Self, BitRangeError> {
        check(bytes.len(), offset_bits, len_bits)?;
        Ok(Self {
            bytes,
            offset_bits,
            len_bits,
        })
    }

    /// How many bits there are.
    #[must_use]
    pub const fn len_bits(&self) -> usize {
        self.len_bits
    }

    /// What is left once the first `skip_bits` are skipped, cut to `most_bits`.
    const fn part(self, skip_bits: usize, most_bits: usize) -> Self {
        let skip_bits = min(skip_bits, self.len_bits);
        Self {
            bytes: self.bytes,
            offset_bits: self.offset_bits + skip_bits,
            len_bits: min(self.len_bits - skip_bits, most_bits),
        }
    }
}

impl std::fmt::Debug for Bits<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bits({} from {})", self.len_bits, self.offset_bits)
    }
}

/// Joins `pieces` and copies up to `take_bits` to the front of `out`; returns how many were copied.
///
/// The bits of `out` past the copied ones stay as they were.
///
/// # Errors
///
/// [`BitRangeError`]: `out` is shorter than `take_bits`. Nothing was copied.
pub fn gather<'a>(
    pieces: impl IntoIterator<Item = Bits<'a>>,
    take_bits: usize,
    out: &mut [u8],
) -> Result<usize, BitRangeError> {
    check(out.len(), 0, take_bits)?;
    let mut copied = 0;
    for piece in pieces {
        let part = piece.part(0, take_bits - copied);
        copy_checked(part, out, copied);
        copied += part.len_bits;
    }
    Ok(copied)
}

/// Copies a run of bits to bit `at_bits` of `out`; every other bit of `out` stays as it was.
///
/// # Errors
///
/// [`BitRangeError`]: the run does not fit there. Nothing was copied.
pub fn copy_bits(from: Bits<'_>, out: &mut [u8], at_bits: usize) -> Result<(), BitRangeError> {
    check(out.len(), at_bits, from.len_bits)?;
    copy_checked(from, out, at_bits);
    Ok(())
}

fn check(buffer_bytes: usize, offset_bits: usize, len_bits: usize) -> Result<(), BitRangeError> {
    match offset_bits.checked_add(len_bits) {
        Some(end_bits) if end_bits.div_ceil(8) <= buffer_bytes => Ok(()),
        _ => Err(BitRangeError {
            offset_bits,
            len_bits,
            buffer_bytes,
        }),
    }
}

/// The copy itself, where both runs are known to be inside their buffers: up to the next byte
/// border of `out`, then whole bytes of `out`, then what is left.
fn copy_checked(from: Bits<'_>, out: &mut [u8], at_bits: usize) {
    let head_bits = min(at_bits.next_multiple_of(8) - at_bits, from.len_bits);
    put_few(from.part(0, head_bits), out, at_bits);

    let middle = from.part(head_bits, (from.len_bits - head_bits) / 8 * 8);
    let first_byte = (at_bits + head_bits) / 8;
    copy_to_bytes(middle, &mut out[first_byte..][..middle.len_bits / 8]);

    let done_bits = head_bits + middle.len_bits;
    put_few(from.part(done_bits, 7), out, at_bits + done_bits);
}

/// Copies at most 7 bits that stay inside one byte of `out`.
fn put_few(from: Bits<'_>, out: &mut [u8], at_bits: usize) {
    if from.len_bits == 0 {
        return;
    }
    let (byte, shift) = (from.offset_bits / 8, from.offset_bits % 8);
    let second = from.bytes.get(byte + 1).copied().unwrap_or(0);
    let [aligned, _] = (u16::from_be_bytes([from.bytes[byte], second]) << shift).to_be_bytes();
    let mask = !(u8::MAX >> from.len_bits) >> (at_bits % 8);
    let place = &mut out[at_bits / 8];
    *place = *place & !mask | aligned >> (at_bits % 8) & mask;
}

/// Fills `out` from a run of exactly as many bits.
fn copy_to_bytes(from: Bits<'_>, out: &mut [u8]) {
    let (first, shift) = (from.offset_bits / 8, from.offset_bits % 8);
    if shift == 0 {
        out.copy_from_slice(&from.bytes[first..][..out.len()]);
        return;
    }
    // An unaligned run of n bytes touches n + 1, so every output word has one more byte to read.
    let source = &from.bytes[first..][..out.len() + usize::from(!out.is_empty())];
    let mut words = out.chunks_exact_mut(8);
    let mut at = 0;
    for word in &mut words {
        let mut high = [0; 8];
        high.copy_from_slice(&source[at..at + 8]);
        let joined = u64::from_be_bytes(high) << shift | u64::from(source[at + 8] >> (8 - shift));
        word.copy_from_slice(&joined.to_be_bytes());
        at += 8;
    }
    for (byte, pair) in words
        .into_remainder()
        .iter_mut()
        .zip(source[at..].windows(2))
    {
        *byte = pair[0] << shift | pair[1] >> (8 - shift);
    }
}

/// `Ord::min` is not const.
const fn min(one: usize, other: usize) -> usize {
    if one < other { one } else { other }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bit(bytes: &[u8], at: usize) -> bool {
        bytes[at / 8] << (at % 8) & 0x80 != 0
    }

    fn set(bytes: &mut [u8], at: usize, value: bool) {
        let mask = 0x80 >> (at % 8);
        bytes[at / 8] = bytes[at / 8] & !mask | if value { mask } else { 0 };
    }

    /// The oracle: one bit at a time.
    fn slow_copy(from: &[u8], offset: usize, len: usize, out: &mut [u8], at: usize) {
        for i in 0..len {
            set(out, at + i, bit(from, offset + i));
        }
    }

    /// A buffer, a run inside it, and an output that has room for the run.
    fn run_and_place() -> impl Strategy<Value = (Vec<u8>, usize, usize, Vec<u8>, usize)> {
        prop::collection::vec(any::<u8>(), 1..80)
            .prop_flat_map(|bytes| {
                let bits = bytes.len() * 8;
                (Just(bytes), 0..=bits)
            })
            .prop_flat_map(|(bytes, offset)| {
                let most = bytes.len() * 8 - offset;
                (Just(bytes), Just(offset), 0..=most, 0_usize..70)
            })
            .prop_flat_map(|(bytes, offset, len, at)| {
                let out = prop::collection::vec(any::<u8>(), (at + len).div_ceil(8)..=90);
                (Just(bytes), Just(offset), Just(len), out, Just(at))
            })
    }

    proptest! {
        #[test]
        fn a_copy_equals_the_bit_by_bit_copy(
            (from, offset, len, out, at) in run_and_place()
        ) {
            let (mut fast, mut slow) = (out.clone(), out);
            copy_bits(Bits::new(&from, offset, len).unwrap(), &mut fast, at).unwrap();
            slow_copy(&from, offset, len, &mut slow, at);
            prop_assert_eq!(fast, slow);
        }

        #[test]
        fn gathering_loses_and_invents_no_bit(
            runs in prop::collection::vec(run_and_place(), 0..6),
            take in 0_usize..900,
        ) {
            let mut joined = Vec::new();
            for (from, offset, len, ..) in &runs {
                joined.extend((0..*len).map(|i| bit(from, offset + i)));
            }
            let expected: Vec<bool> = joined.into_iter().take(take).collect();

            let pieces = runs
                .iter()
                .map(|(from, offset, len, ..)| Bits::new(from, *offset, *len).unwrap());
            let mut out = vec![0; take.div_ceil(8)];
            let copied = gather(pieces, take, &mut out).unwrap();

            prop_assert_eq!(copied, expected.len());
            let got: Vec<bool> = (0..copied).map(|at| bit(&out, at)).collect();
            prop_assert_eq!(got, expected);
            prop_assert!((copied..out.len() * 8).all(|at| !bit(&out, at)), "spare bits are zero");
        }
    }

    #[test]
    fn every_alignment_and_short_length_agrees_with_the_oracle() {
        let from: Vec<u8> = (0..40_u8).map(|i| i.wrapping_mul(151) ^ 0x5a).collect();
        for offset in 0..9 {
            for at in 0..9 {
                for len in 0..200 {
                    let (mut fast, mut slow) = ([0xaa; 40], [0xaa; 40]);
                    copy_bits(Bits::new(&from, offset, len).unwrap(), &mut fast, at).unwrap();
                    slow_copy(&from, offset, len, &mut slow, at);
                    assert_eq!(fast, slow, "offset {offset}, at {at}, len {len}");
                }
            }
        }
    }

    #[test]
    fn a_run_past_the_end_is_refused() {
        assert!(Bits::new(&[0; 2], 9, 7).is_ok());
        assert_eq!(
            Bits::new(&[0; 2], 9, 8).unwrap_err(),
            BitRangeError {
                offset_bits: 9,
                len_bits: 8,
                buffer_bytes: 2
            }
        );
        assert!(Bits::new(&[0; 2], usize::MAX, 2).is_err());
        let run = Bits::new(&[0xff; 2], 0, 16).unwrap();
        let mut out = [0; 2];
        assert!(copy_bits(run, &mut out, 1).is_err());
        assert!(gather([run], 17, &mut out).is_err());
        assert_eq!(out, [0; 2]);
    }

    #[test]
    fn debug_of_a_run_shows_no_bit() {
        let run = Bits::new(&[0xab; 2], 3, 8).unwrap();
        assert_eq!(format!("{run:?}"), "Bits(8 from 3)");
    }
}
