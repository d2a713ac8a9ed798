//! The key block: what serial key frames and ring records carry.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0-7 | number | ascending, equal at both ends of the module pair, below 2^64 - 1 |
//! | 8-15 | generated at | signed nanoseconds since 1970-01-01 UTC; 0 if unknown |
//! | 16-19 | key length, bits | at most [`MAX_KEY_BITS`] |
//! | 20-23 | QBER, parts per million | 0xffffffff if unknown |
//! | 24- | key | first bit is the top bit of the first byte; unused bits of the last byte are 0 |
//!
//! All integers are little-endian. A block of zero bits says that its number was given up.

use qkd_keyfile::{QkdKeyId, UnixTime, units::bytes_for_bits};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 24;

/// Longest key of a block, in bits (256 KiB).
pub const MAX_KEY_BITS: u32 = 1 << 21;

/// Longest block, header and key, in bytes.
pub const MAX_BLOCK_BYTES: usize = HEADER_BYTES + bytes_for_bits(MAX_KEY_BITS);

const QBER_UNKNOWN: u32 = u32::MAX;
const MILLION: u32 = 1_000_000;

/// What is known of a key block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockHeader {
    /// Names the block at both ends. Never `u64::MAX`, which means "none" where numbers are acknowledged.
    pub number: u64,
    /// When the module made it, by the module's clock.
    pub generated_at: Option<UnixTime>,
    /// Length of the key, in bits.
    pub key_bits: u32,
    /// Quantum bit error rate of the block, in parts per million, at most a million.
    pub qber_ppm: Option<u32>,
}

/// Why bytes are not a key block. Nothing was consumed or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// Fewer bytes than a header has.
    #[error("{have} bytes are no key block, which has at least {HEADER_BYTES}")]
    Truncated {
        /// Bytes given.
        have: usize,
    },
    /// The number that means "none".
    #[error("block number {} is reserved", u64::MAX)]
    Number,
    /// More than [`MAX_KEY_BITS`].
    #[error("block {number}: {key_bits} key bits, {MAX_KEY_BITS} at most")]
    TooManyBits {
        /// The block.
        number: u64,
        /// The count found.
        key_bits: u32,
    },
    /// More than all bits were wrong.
    #[error("block {number}: error rate of {qber_ppm} parts per million")]
    Qber {
        /// The block.
        number: u64,
        /// The rate found.
        qber_ppm: u32,
    },
    /// The key is not as long as the bit count says.
    #[error("block {number}: {have} bytes of key, {need} expected")]
    KeyLength {
        /// The block.
        number: u64,
        /// Bytes given.
        have: usize,
        /// Bytes expected.
        need: usize,
    },
    /// An unused bit of the last byte is not zero.
    #[error("block {number}: unused bits after the key are not zero")]
    Padding {
        /// The block.
        number: u64,
    },
}

impl BlockHeader {
    /// Splits a block into header and key and checks one against the other.
    ///
    /// # Errors
    ///
    /// See [`BlockError`]: drop the block, it cannot be trusted in any part.
    pub fn decode(block: &[u8]) -> Result<(Self, &[u8]), BlockError> {
        let Some((head, key)) = block.split_first_chunk::<HEADER_BYTES>() else {
            return Err(BlockError::Truncated { have: block.len() });
        };
        let header = Self::decode_parts(head, key)?;
        Ok((header, key))
    }

    /// The same for a header and a key that do not lie together.
    ///
    /// # Errors
    ///
    /// As [`decode`](Self::decode).
    pub fn decode_parts(head: &[u8; HEADER_BYTES], key: &[u8]) -> Result<Self, BlockError> {
        let [
            n0,
            n1,
            n2,
            n3,
            n4,
            n5,
            n6,
            n7, //
            t0,
            t1,
            t2,
            t3,
            t4,
            t5,
            t6,
            t7, //
            b0,
            b1,
            b2,
            b3,
            q0,
            q1,
            q2,
            q3,
        ] = *head;
        let generated_at = i64::from_le_bytes([t0, t1, t2, t3, t4, t5, t6, t7]);
        let qber_ppm = u32::from_le_bytes([q0, q1, q2, q3]);
        let header = Self {
            number: u64::from_le_bytes([n0, n1, n2, n3, n4, n5, n6, n7]),
            generated_at: (generated_at != 0).then_some(UnixTime(generated_at)),
            key_bits: u32::from_le_bytes([b0, b1, b2, b3]),
            qber_ppm: (qber_ppm != QBER_UNKNOWN).then_some(qber_ppm),
        };
        header.check(key)?;
        Ok(header)
    }

    /// The header's bytes, which hold no key bit. A block is these bytes followed by the key.
    ///
    /// # Errors
    ///
    /// As [`decode`](Self::decode) would have for header and `key`.
    pub fn encode(&self, key: &[u8]) -> Result<[u8; HEADER_BYTES], BlockError> {
        self.check(key)?;
        let mut out = [0; HEADER_BYTES];
        out[0..8].copy_from_slice(&self.number.to_le_bytes());
        out[8..16].copy_from_slice(&self.generated_at.map_or(0, |time| time.0).to_le_bytes());
        out[16..20].copy_from_slice(&self.key_bits.to_le_bytes());
        out[20..24].copy_from_slice(&self.qber_ppm.unwrap_or(QBER_UNKNOWN).to_le_bytes());
        Ok(out)
    }

    /// The block's number in decimal: the QKD-key ID, equal at both ends.
    #[must_use]
    #[expect(clippy::missing_panics_doc, reason = "20 digits are always an ID")]
    pub fn qkd_key_id(&self) -> QkdKeyId {
        self.number
            .to_string()
            .parse()
            .expect("20 digits are an ID")
    }

    fn check(&self, key: &[u8]) -> Result<(), BlockError> {
        let Self {
            number, key_bits, ..
        } = *self;
        if number == u64::MAX {
            return Err(BlockError::Number);
        }
        if key_bits > MAX_KEY_BITS {
            return Err(BlockError::TooManyBits { number, key_bits });
        }
        if let Some(qber_ppm) = self.qber_ppm.filter(|&ppm| ppm > MILLION) {
            return Err(BlockError::Qber { number, qber_ppm });
        }
        let (have, need) = (key.len(), bytes_for_bits(key_bits));
        if have != need {
            return Err(BlockError::KeyLength { number, have, need });
        }
        let used = key_bits % 8;
        if used != 0 && key.last().is_some_and(|last| last << used != 0) {
            return Err(BlockError::Padding { number });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEADER: BlockHeader = BlockHeader {
        number: 0x0102_0304_0506_0708,
        generated_at: Some(UnixTime(-2)),
        key_bits: 12,
        qber_ppm: Some(25_000),
    };

    #[test]
    fn a_block_has_the_documented_bytes() {
        let head = HEADER.encode(&[0xab, 0xc0]).unwrap();
        assert_eq!(
            head,
            [
                8, 7, 6, 5, 4, 3, 2, 1, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 12, 0, 0,
                0, 0xa8, 0x61, 0, 0
            ]
        );
        let block = [&head[..], &[0xab, 0xc0]].concat();
        assert_eq!(BlockHeader::decode(&block), Ok((HEADER, &[0xab, 0xc0][..])));
    }

    #[test]
    fn the_number_in_decimal_is_the_key_id() {
        let last = BlockHeader {
            number: u64::MAX - 1,
            ..HEADER
        };
        assert_eq!(last.qkd_key_id().as_str(), "18446744073709551614");
    }

    #[test]
    fn what_is_unknown_stays_unknown() {
        let header = BlockHeader {
            generated_at: None,
            qber_ppm: None,
            key_bits: 0,
            ..HEADER
        };
        let head = header.encode(&[]).unwrap();
        assert_eq!(BlockHeader::decode(&head), Ok((header, &[][..])));
    }

    #[test]
    fn a_claim_that_does_not_fit_is_refused() {
        let number = HEADER.number;
        let with = |header: BlockHeader, key: &[u8]| header.encode(key).unwrap_err();
        assert_eq!(
            with(HEADER, &[0; 3]),
            BlockError::KeyLength {
                number,
                have: 3,
                need: 2
            }
        );
        assert_eq!(with(HEADER, &[0, 0x08]), BlockError::Padding { number });
        let header = BlockHeader {
            key_bits: MAX_KEY_BITS + 1,
            ..HEADER
        };
        let key_bits = header.key_bits;
        assert_eq!(
            with(header, &[]),
            BlockError::TooManyBits { number, key_bits }
        );
        let header = BlockHeader {
            qber_ppm: Some(1_000_001),
            ..HEADER
        };
        assert!(matches!(with(header, &[0; 2]), BlockError::Qber { .. }));
        let header = BlockHeader {
            number: u64::MAX,
            ..HEADER
        };
        assert_eq!(with(header, &[0; 2]), BlockError::Number);
    }

    proptest! {
        #[test]
        fn what_decodes_encodes_to_the_same_bytes(mut block: Vec<u8>, bits in 0..80_u32) {
            if block.len() >= HEADER_BYTES {
                block[16..20].copy_from_slice(&bits.to_le_bytes());
            }
            if let Ok((header, key)) = BlockHeader::decode(&block) {
                prop_assert_eq!(&header.encode(key).unwrap()[..], &block[..HEADER_BYTES]);
            }
        }
    }
}
