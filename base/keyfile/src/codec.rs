//! The key file (Y.3803 clause 10): key data of a prescribed size, with its metadata.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0-7 | magic | `QKDKEYF1` |
//! | 8-11 | metadata length, bytes | little-endian, at most [`MAX_METADATA_BYTES`] |
//! | 12-15 | key length, bits | little-endian |
//! | 16-19 | CRC-32C | of bytes 0-15 and of the metadata |
//! | 20- | metadata | [`KeyMetadata`] as postcard |
//! | then | key data | first bit is the top bit of the first byte; unused bits of the last byte are 0 |
//!
//! The CRC finds a damaged header; it says nothing about the key data, on purpose: a check sequence
//! of key bits is a function of them that a file would give away. What protects the data on its way
//! is the tag of the relay hop or the comparison with the matching node.

use crate::{metadata::KeyMetadata, units::bytes_for_bits};

/// First bytes of a key file.
pub const MAGIC: [u8; 8] = *b"QKDKEYF1";

/// Bytes before the metadata.
pub const HEADER_BYTES: usize = 20;

/// Longest metadata that is read or written, in bytes.
pub const MAX_METADATA_BYTES: usize = 16 * 1024;

/// A key file whose key data stays where it was read.
#[derive(PartialEq, Eq)]
pub struct KeyFile<'a> {
    /// What is known about the key.
    pub metadata: KeyMetadata,
    /// Length of the key, in bits.
    pub key_bits: u32,
    /// The key data, `key_bits` rounded up to whole bytes.
    pub key: &'a [u8],
}

impl std::fmt::Debug for KeyFile<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyFile")
            .field("metadata", &self.metadata)
            .field("key_bits", &self.key_bits)
            .finish_non_exhaustive()
    }
}

/// Why bytes are not a key file, or a key does not fit in one. Nothing was consumed or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFileError {
    /// The first bytes are another format's.
    #[error("does not begin with the key-file magic")]
    Magic,
    /// Fewer bytes than the header speaks of. More may still come.
    #[error("{have} bytes of a key file of {need}")]
    Truncated {
        /// Bytes there are.
        have: usize,
        /// Bytes there should be.
        need: usize,
    },
    /// Bytes after the key data.
    #[error("{extra} bytes after the key data")]
    TrailingBytes {
        /// How many.
        extra: usize,
    },
    /// Header or metadata were damaged.
    #[error("header check sequence {got:#010x}, expected {want:#010x}")]
    Checksum {
        /// In the file.
        got: u32,
        /// Computed.
        want: u32,
    },
    /// The metadata is longer than [`MAX_METADATA_BYTES`].
    #[error("metadata of {bytes} bytes, {MAX_METADATA_BYTES} at most")]
    MetadataTooLong {
        /// Its length.
        bytes: usize,
    },
    /// The metadata does not decode.
    #[error("metadata cannot be read")]
    Metadata,
    /// An unused bit of the last byte is not zero.
    #[error("unused bits after the key are not zero")]
    Padding,
    /// The key data is not as long as its bit count says.
    #[error("{have} bytes of key data for {key_bits} bits")]
    KeyLength {
        /// Bytes of key data given.
        have: usize,
        /// Bits announced.
        key_bits: u32,
    },
}

impl<'a> KeyFile<'a> {
    /// Reads the key file that `bytes` are, to the last byte.
    ///
    /// # Errors
    ///
    /// See [`KeyFileError`]; nothing was consumed.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, KeyFileError> {
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Err(if MAGIC.starts_with(&bytes[..bytes.len().min(8)]) {
                KeyFileError::Truncated {
                    have: bytes.len(),
                    need: HEADER_BYTES,
                }
            } else {
                KeyFileError::Magic
            });
        };
        if header[..8] != MAGIC {
            return Err(KeyFileError::Magic);
        }
        let metadata_bytes = u32_at(header, 8) as usize;
        if metadata_bytes > MAX_METADATA_BYTES {
            return Err(KeyFileError::MetadataTooLong {
                bytes: metadata_bytes,
            });
        }
        let key_bits = u32_at(header, 12);
        let need = HEADER_BYTES + metadata_bytes + bytes_for_bits(key_bits);
        if bytes.len() < need {
            return Err(KeyFileError::Truncated {
                have: bytes.len(),
                need,
            });
        }
        if bytes.len() > need {
            return Err(KeyFileError::TrailingBytes {
                extra: bytes.len() - need,
            });
        }
        let (metadata, key) = rest.split_at(metadata_bytes);
        let (got, want) = (u32_at(header, 16), checksum(&header[..16], metadata));
        if got != want {
            return Err(KeyFileError::Checksum { got, want });
        }
        check_padding(key, key_bits)?;
        let (metadata, left) =
            postcard::take_from_bytes(metadata).map_err(|_| KeyFileError::Metadata)?;
        if !left.is_empty() {
            return Err(KeyFileError::Metadata);
        }
        Ok(Self {
            metadata,
            key_bits,
            key,
        })
    }

    /// Everything before the key data: header and metadata, which hold no key bit.
    ///
    /// A key file is these bytes followed by [`key`](Self::key); the caller joins them in memory
    /// that it wipes.
    ///
    /// # Errors
    ///
    /// [`KeyFileError::KeyLength`], [`KeyFileError::Padding`] or
    /// [`KeyFileError::MetadataTooLong`]; nothing was written.
    pub fn encode_head(&self) -> Result<Vec<u8>, KeyFileError> {
        if self.key.len() != bytes_for_bits(self.key_bits) {
            return Err(KeyFileError::KeyLength {
                have: self.key.len(),
                key_bits: self.key_bits,
            });
        }
        check_padding(self.key, self.key_bits)?;
        let metadata = postcard::to_allocvec(&self.metadata).map_err(|_| KeyFileError::Metadata)?;
        let metadata_bytes = u32::try_from(metadata.len())
            .ok()
            .filter(|_| metadata.len() <= MAX_METADATA_BYTES)
            .ok_or(KeyFileError::MetadataTooLong {
                bytes: metadata.len(),
            })?;
        let mut head = Vec::with_capacity(HEADER_BYTES + metadata.len());
        head.extend_from_slice(&MAGIC);
        head.extend_from_slice(&metadata_bytes.to_le_bytes());
        head.extend_from_slice(&self.key_bits.to_le_bytes());
        head.extend_from_slice(&checksum(&head, &metadata).to_le_bytes());
        head.extend_from_slice(&metadata);
        Ok(head)
    }
}

/// Unused bits of the last byte are zero, so that equal keys are equal bytes.
fn check_padding(key: &[u8], key_bits: u32) -> Result<(), KeyFileError> {
    let used = key_bits % 8;
    match key.last() {
        Some(last) if used != 0 && last << used != 0 => Err(KeyFileError::Padding),
        _ => Ok(()),
    }
}

fn u32_at(bytes: &[u8; HEADER_BYTES], offset: usize) -> u32 {
    let [a, b, c, d] = [0, 1, 2, 3].map(|i| bytes[offset + i]);
    u32::from_le_bytes([a, b, c, d])
}

fn checksum(head: &[u8], metadata: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(head), metadata)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::samples;

    fn encoded(metadata: &KeyMetadata, key_bits: u32, key: &[u8]) -> Vec<u8> {
        let file = KeyFile {
            metadata: metadata.clone(),
            key_bits,
            key,
        };
        [&file.encode_head().unwrap(), key].concat()
    }

    #[test]
    fn all_26_items_survive_the_key_file() {
        for metadata in samples::all() {
            let bytes = encoded(&metadata, 13, &[0xab, 0b1100_1000]);
            let file = KeyFile::decode(&bytes).unwrap();
            assert_eq!(file.metadata, metadata);
            assert_eq!((file.key_bits, file.key), (13, &[0xab, 0b1100_1000][..]));
        }
    }

    #[test]
    fn every_truncation_says_how_much_is_missing_or_that_it_is_no_key_file() {
        let bytes = encoded(&samples::all()[2], 64, &[5; 8]);
        for have in 0..bytes.len() {
            match KeyFile::decode(&bytes[..have]) {
                Err(KeyFileError::Truncated { have: h, need }) => {
                    assert_eq!(h, have);
                    assert!(need == HEADER_BYTES || need == bytes.len());
                }
                other => panic!("{have} bytes: {other:?}"),
            }
        }
    }

    #[test]
    fn every_flipped_bit_before_the_key_is_refused() {
        let metadata = &samples::all()[1];
        let bytes = encoded(metadata, 64, &[5; 8]);
        for bit in 0..(bytes.len() - 8) * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(KeyFile::decode(&damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_length_that_no_file_can_have_allocates_nothing() {
        let mut bytes = encoded(&samples::all()[0], 8, &[1]);
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(
            KeyFile::decode(&bytes),
            Err(KeyFileError::MetadataTooLong { .. })
        ));
    }

    #[test]
    fn key_bits_and_key_bytes_must_agree_and_spare_bits_must_be_zero() {
        let file = |key_bits, key| KeyFile {
            metadata: samples::all()[0].clone(),
            key_bits,
            key,
        };
        assert!(matches!(
            file(9, &[1]).encode_head(),
            Err(KeyFileError::KeyLength { .. })
        ));
        assert_eq!(
            file(9, &[1, 0x40]).encode_head(),
            Err(KeyFileError::Padding)
        );
        let mut bytes = encoded(&samples::all()[0], 9, &[1, 0x80]);
        *bytes.last_mut().unwrap() |= 1;
        assert_eq!(KeyFile::decode(&bytes), Err(KeyFileError::Padding));
    }

    #[test]
    fn debug_shows_no_key_byte() {
        let bytes = encoded(&samples::all()[0], 16, &[0xde, 0xad]);
        let text = format!("{:?}", KeyFile::decode(&bytes).unwrap());
        assert!(!text.contains("222") && !text.contains("dead"), "{text}");
    }
}
