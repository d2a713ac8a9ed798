//! qcrypto final-key files (type 7): a 16-byte header, then the key in 32-bit words.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0-3 | tag | 7, or 0x107 with epochs counted from 1970 |
//! | 4-7 | first epoch | the file's name, as eight lower-case hexadecimal digits |
//! | 8-11 | number of epochs | at least 1 |
//! | 12-15 | key length, bits | signed in the original, never negative |
//! | 16- | key words | bit 0 is the top bit of the first word; unused bits of the last are 0 |
//!
//! All integers are in the byte order of the machine that wrote them and the format has no mark of
//! it; this code takes little-endian, which is what every supported machine writes, and names a
//! big-endian file as such. A file has neither check sequence nor link, nor says on which side it
//! is; and it is written in place, so its reader waits until [`Header::file_bytes`] are there.
//!
//! Source: the format description and the behaviour of qcrypto (kurtsiefer, S-Fifteen); the layout
//! is a fact, this code is its own.
//!
//! The canonical key is the bit string: bit `i` is the bit `7 - i % 8` of byte `i / 8`. S-Fifteen's
//! guardian takes other bits of the same file: see [`decode_guardian_key`]. Both ends of a link have to
//! take the same.

use qkd_keyfile::units::bytes_for_bits;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;

/// Longest key that is read or written, in bits (256 KiB). qcrypto's blocks stay below 2^16.
pub const MAX_KEY_BITS: u32 = 1 << 21;

/// Tag of a final-key file.
pub const TAG: u32 = 7;

/// The same with epochs counted from 1970; qcrypto itself writes [`TAG`] for these too.
pub const TAG_EXTENDED: u32 = 0x107;

/// One epoch, in nanoseconds.
pub const EPOCH_NS: u64 = 1 << 29;

/// What a final-key file says of itself. Equal in both files of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Header {
    /// [`TAG`] or [`TAG_EXTENDED`].
    pub tag: u32,
    /// First epoch the key was made in. Epochs of the shorter kind repeat every 19.5 hours.
    pub first_epoch: u32,
    /// Epochs the key was made in, at least 1.
    pub epochs: u32,
    /// Length of the key, in bits; 0 for a block that was given up.
    pub key_bits: u32,
}

/// Why bytes are not a final-key file. Nothing was consumed or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Type7Error {
    /// The first word is a known tag backwards.
    #[error("the file is big-endian; only little-endian files are read")]
    BigEndian,
    /// Another type of file.
    #[error("tag {tag:#x} is not that of a final-key file (0x7 or 0x107)")]
    Tag {
        /// The tag found.
        tag: u32,
    },
    /// A block of no epochs.
    #[error("a block covers at least one epoch")]
    NoEpochs,
    /// The bit count is negative in the original's signed integer.
    #[error("{bits} key bits")]
    NegativeBits {
        /// The count found.
        bits: i32,
    },
    /// More than [`MAX_KEY_BITS`].
    #[error("{bits} key bits, {MAX_KEY_BITS} at most")]
    TooManyBits {
        /// The count found.
        bits: u32,
    },
    /// The file is called something other than its first epoch.
    #[error("file name is not the first epoch, {epoch:08x}")]
    Name {
        /// The first epoch in the header.
        epoch: u32,
    },
    /// The words are not as many as the bit count needs.
    #[error("{have} bytes of key words, {need} expected")]
    WordsLength {
        /// Bytes given.
        have: usize,
        /// Bytes expected.
        need: usize,
    },
    /// The canonical key is not as long as the bit count says.
    #[error("{have} bytes of key, {need} expected")]
    KeyLength {
        /// Bytes given.
        have: usize,
        /// Bytes expected.
        need: usize,
    },
    /// An unused bit is not zero.
    #[error("unused bits after the key are not zero")]
    Padding,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    ///
    /// [`Type7Error::BigEndian`], [`Type7Error::Tag`], [`Type7Error::NoEpochs`],
    /// [`Type7Error::NegativeBits`] or [`Type7Error::TooManyBits`]: the file is not one to read.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Type7Error> {
        let word =
            |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let header = Self {
            tag: word(0),
            first_epoch: word(4),
            epochs: word(8),
            key_bits: word(12),
        };
        match header.tag {
            TAG | TAG_EXTENDED => {}
            tag if matches!(tag.swap_bytes(), TAG | TAG_EXTENDED) => {
                return Err(Type7Error::BigEndian);
            }
            tag => return Err(Type7Error::Tag { tag }),
        }
        if header.epochs == 0 {
            return Err(Type7Error::NoEpochs);
        }
        if header.key_bits.cast_signed() < 0 {
            return Err(Type7Error::NegativeBits {
                bits: header.key_bits.cast_signed(),
            });
        }
        check_bits(header.key_bits)?;
        Ok(header)
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0..4].copy_from_slice(&self.tag.to_le_bytes());
        out[4..8].copy_from_slice(&self.first_epoch.to_le_bytes());
        out[8..12].copy_from_slice(&self.epochs.to_le_bytes());
        out[12..16].copy_from_slice(&self.key_bits.to_le_bytes());
        out
    }

    /// Length of the whole file, in bytes. A shorter file is still being written.
    #[must_use]
    pub const fn file_bytes(&self) -> usize {
        HEADER_BYTES + words_bytes(self.key_bits)
    }

    /// What the file is called.
    #[must_use]
    pub fn file_name(&self) -> String {
        format!("{:08x}", self.first_epoch)
    }

    /// Compares the file's name with the first epoch; the name is the key's ID at both ends.
    ///
    /// # Errors
    ///
    /// [`Type7Error::Name`]: the file was renamed or is another's; set it aside.
    pub fn check_name(&self, name: &str) -> Result<(), Type7Error> {
        if name == self.file_name() {
            Ok(())
        } else {
            Err(Type7Error::Name {
                epoch: self.first_epoch,
            })
        }
    }
}

/// Bytes of the key words of `key_bits` bits.
#[must_use]
pub const fn words_bytes(key_bits: u32) -> usize {
    key_bits.div_ceil(32) as usize * 4
}

/// Turns the file's words into the canonical key. Holds no copy: key bytes are in `words` and `out`.
///
/// # Errors
///
/// [`Type7Error::TooManyBits`], [`Type7Error::WordsLength`], [`Type7Error::KeyLength`] (`out` is not
/// exactly as long as the key) or [`Type7Error::Padding`]. Nothing was written.
pub fn decode_key(header: &Header, words: &[u8], out: &mut [u8]) -> Result<(), Type7Error> {
    check_lengths(header.key_bits, words.len(), out.len())?;
    check_words(header.key_bits, words)?;
    for (word, bytes) in words.chunks_exact(4).zip(out.chunks_mut(4)) {
        for (byte, from) in bytes.iter_mut().zip(word.iter().rev()) {
            *byte = *from;
        }
    }
    Ok(())
}

/// Turns a canonical key into the file's words; the opposite of [`decode_key`].
///
/// # Errors
///
/// As [`decode_key`], with the lengths of `out` and `key` exchanged. Nothing was written.
pub fn encode_words(key_bits: u32, key: &[u8], out: &mut [u8]) -> Result<(), Type7Error> {
    check_lengths(key_bits, out.len(), key.len())?;
    if key.last().is_some_and(|last| {
        let used = key_bits % 8;
        used != 0 && last << used != 0
    }) {
        return Err(Type7Error::Padding);
    }
    for (word, bytes) in out.chunks_exact_mut(4).zip(key.chunks(4)) {
        word.fill(0);
        for (to, byte) in word.iter_mut().rev().zip(bytes) {
            *to = *byte;
        }
    }
    Ok(())
}

/// Length in bits of the key that S-Fifteen's guardian takes from a file of `key_bits` bits.
///
/// That is all whole words but the last one, which guardian drops even where it is full.
#[must_use]
pub const fn guardian_key_bits(key_bits: u32) -> u32 {
    key_bits.div_ceil(32).saturating_sub(1) * 32
}

/// Takes the key as S-Fifteen's guardian does: the bytes of the words as they lie in the file,
/// without the last word. For a link whose other end gets its keys from guardian.
///
/// # Errors
///
/// As [`decode_key`], with `out` as long as [`guardian_key_bits`] says. Nothing was written.
pub fn decode_guardian_key(
    header: &Header,
    words: &[u8],
    out: &mut [u8],
) -> Result<(), Type7Error> {
    let need = bytes_for_bits(guardian_key_bits(header.key_bits));
    if out.len() != need {
        let have = out.len();
        return Err(Type7Error::KeyLength { have, need });
    }
    check_words(header.key_bits, words)?;
    out.copy_from_slice(&words[..need]);
    Ok(())
}

fn check_bits(bits: u32) -> Result<(), Type7Error> {
    if bits > MAX_KEY_BITS {
        return Err(Type7Error::TooManyBits { bits });
    }
    Ok(())
}

fn check_lengths(key_bits: u32, words: usize, key: usize) -> Result<(), Type7Error> {
    check_bits(key_bits)?;
    let need = words_bytes(key_bits);
    if words != need {
        return Err(Type7Error::WordsLength { have: words, need });
    }
    let need = bytes_for_bits(key_bits);
    if key != need {
        return Err(Type7Error::KeyLength { have: key, need });
    }
    Ok(())
}

fn check_words(key_bits: u32, words: &[u8]) -> Result<(), Type7Error> {
    let need = words_bytes(key_bits);
    if words.len() != need {
        let have = words.len();
        return Err(Type7Error::WordsLength { have, need });
    }
    if words
        .last_chunk()
        .is_some_and(|&last| u32::from_le_bytes(last) & !used_of_last_word(key_bits) != 0)
    {
        return Err(Type7Error::Padding);
    }
    Ok(())
}

/// Mask of the bits of the last word that are key.
const fn used_of_last_word(key_bits: u32) -> u32 {
    match key_bits % 32 {
        0 => u32::MAX,
        used => u32::MAX << (32 - used),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: [u8; 24] = [
        7, 0, 0, 0, 0x47, 0xbf, 0x4e, 0xc7, 1, 0, 0, 0, 40, 0, 0, 0, //
        0xef, 0xbe, 0xad, 0xde, 0, 0, 0, 0xa5,
    ];
    const B: [u8; 16] = [7, 0, 0, 0, 0x37, 0xbe, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0];

    fn header(key_bits: u32) -> Header {
        Header {
            tag: TAG,
            first_epoch: 1,
            epochs: 1,
            key_bits,
        }
    }

    #[test]
    fn golden_vector_a_decodes_and_encodes() {
        let (head, words) = A.split_first_chunk().unwrap();
        let header = Header::decode(head).unwrap();
        assert_eq!((header.first_epoch, header.key_bits), (0xc74e_bf47, 40));
        assert_eq!(header.file_bytes(), A.len());
        assert_eq!(header.check_name("c74ebf47"), Ok(()));
        let mut key = [0; 5];
        decode_key(&header, words, &mut key).unwrap();
        assert_eq!(key, [0xde, 0xad, 0xbe, 0xef, 0xa5]);
        let mut again = [0xff; 8];
        encode_words(40, &key, &mut again).unwrap();
        assert_eq!((&header.encode(), &again[..]), (head, words));
    }

    #[test]
    fn guardian_takes_golden_vector_a_without_its_last_word() {
        let (head, words) = A.split_first_chunk().unwrap();
        let header = Header::decode(head).unwrap();
        let mut key = [0; 4];
        assert_eq!(guardian_key_bits(header.key_bits), 32);
        decode_guardian_key(&header, words, &mut key).unwrap();
        assert_eq!(key, [0xef, 0xbe, 0xad, 0xde]);
        assert_eq!([0, 1, 32, 33, 64].map(guardian_key_bits), [0, 0, 0, 32, 32]);
        assert_eq!(
            decode_guardian_key(&header, words, &mut [0; 5]),
            Err(Type7Error::KeyLength { have: 5, need: 4 })
        );
    }

    #[test]
    fn golden_vector_b_is_an_empty_block() {
        let header = Header::decode(&B).unwrap();
        assert_eq!((header.epochs, header.key_bits), (4, 0));
        assert_eq!(header.file_bytes(), 16);
        assert_eq!(header.file_name(), "0000be37");
        assert_eq!(decode_key(&header, &[], &mut []), Ok(()));
    }

    #[test]
    fn damaged_headers_are_refused_by_name() {
        let with = |at: usize, bytes: [u8; 4]| {
            let mut head = B;
            head[at..at + 4].copy_from_slice(&bytes);
            Header::decode(&head)
        };
        assert_eq!(with(0, [3, 1, 0, 0]), Err(Type7Error::Tag { tag: 0x103 }));
        assert_eq!(with(0, [0, 0, 0, 7]), Err(Type7Error::BigEndian));
        assert_eq!(with(0, [0, 0, 1, 7]), Err(Type7Error::BigEndian));
        assert_eq!(with(8, [0; 4]), Err(Type7Error::NoEpochs));
        assert_eq!(
            with(12, [0xff; 4]),
            Err(Type7Error::NegativeBits { bits: -1 })
        );
        assert_eq!(
            with(12, (MAX_KEY_BITS + 1).to_le_bytes()),
            Err(Type7Error::TooManyBits {
                bits: MAX_KEY_BITS + 1
            })
        );
        assert!(with(0, [7, 1, 0, 0]).is_ok());
        assert!(with(12, MAX_KEY_BITS.to_le_bytes()).is_ok());
    }

    #[test]
    fn a_file_of_another_name_is_refused() {
        let header = Header::decode(&B).unwrap();
        for name in ["be37", "0000BE37", "0000be38", "0000be37.tmp", ""] {
            assert_eq!(
                header.check_name(name),
                Err(Type7Error::Name { epoch: 0xbe37 })
            );
        }
    }

    #[test]
    fn a_size_that_does_not_fit_the_bit_count_is_refused() {
        assert_eq!(
            decode_key(&header(64), &[0; 4], &mut [0; 8]),
            Err(Type7Error::WordsLength { have: 4, need: 8 })
        );
        assert_eq!(
            decode_key(&header(40), &[0; 8], &mut [0; 8]),
            Err(Type7Error::KeyLength { have: 8, need: 5 })
        );
    }

    #[test]
    fn set_padding_is_refused_and_nothing_is_written() {
        let mut out = [0x55; 5];
        let words = [1, 2, 3, 4, 0, 0, 1, 0xa5];
        assert_eq!(
            decode_key(&header(40), &words, &mut out),
            Err(Type7Error::Padding)
        );
        assert_eq!(out, [0x55; 5]);
        assert_eq!(
            encode_words(33, &[0, 0, 0, 0, 0x40], &mut [0; 8]),
            Err(Type7Error::Padding)
        );
    }

    proptest! {
        #[test]
        fn every_bit_lands_where_the_format_says(key_bits in 1..200_u32, seed: u64) {
            let bit = |i: u32| seed.rotate_left(i * 7) & 1 == 1;
            let mut words = vec![0; words_bytes(key_bits)];
            for i in (0..key_bits).filter(|&i| bit(i)) {
                words[(4 * (i / 32) + 3 - i % 32 / 8) as usize] |= 0x80 >> (i % 8);
            }
            let mut key = vec![0xff; bytes_for_bits(key_bits)];
            decode_key(&header(key_bits), &words, &mut key).unwrap();
            for i in 0..key_bits {
                prop_assert_eq!(key[(i / 8) as usize] >> (7 - i % 8) & 1 == 1, bit(i));
            }
            let mut again = vec![0xff; words.len()];
            encode_words(key_bits, &key, &mut again).unwrap();
            prop_assert_eq!(again, words);
        }
    }
}
