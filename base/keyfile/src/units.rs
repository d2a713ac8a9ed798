//! Quantities that carry their unit.

use serde::{Deserialize, Serialize};

/// The length of a key, in bits: a whole number of bytes, at least one.
///
/// Standards count bits, memory counts bytes; this type is where the two meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct KeyBits(u32);

/// Why a number is not the length of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyBitsError {
    /// Not a whole number of bytes.
    #[error("key size {bits} bits is not a multiple of 8")]
    NotWholeBytes {
        /// The length asked for, in bits.
        bits: u32,
    },
    /// Zero bits.
    #[error("a key has at least 8 bits")]
    Zero,
}

impl KeyBits {
    /// The length in bits.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The length in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        (self.0 / 8) as usize
    }
}

impl TryFrom<u32> for KeyBits {
    type Error = KeyBitsError;

    fn try_from(bits: u32) -> Result<Self, KeyBitsError> {
        match bits {
            0 => Err(KeyBitsError::Zero),
            _ if !bits.is_multiple_of(8) => Err(KeyBitsError::NotWholeBytes { bits }),
            _ => Ok(Self(bits)),
        }
    }
}

impl From<KeyBits> for u32 {
    fn from(bits: KeyBits) -> Self {
        bits.0
    }
}

/// Bytes that hold `bits` bits, the last one possibly in part.
#[must_use]
pub const fn bytes_for_bits(bits: u32) -> usize {
    bits.div_ceil(8) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_a_whole_number_of_bytes() {
        assert_eq!(KeyBits::try_from(256).unwrap().bytes(), 32);
        assert_eq!(
            KeyBits::try_from(257).unwrap_err().to_string(),
            "key size 257 bits is not a multiple of 8"
        );
        assert_eq!(KeyBits::try_from(0), Err(KeyBitsError::Zero));
    }

    #[test]
    fn odd_bit_counts_round_up_to_bytes() {
        assert_eq!([0, 1, 8, 9, 7636].map(bytes_for_bits), [0, 1, 1, 2, 955]);
    }
}
