//! What hand-over files are.

use qkd_handover::{hex_lines, r10, type7::words_bytes, uuid_record};
use qkd_keyfile::{codec, units::bytes_for_bits};
use serde::Deserialize;

use super::DirectoryConfig;

/// What hand-over files are, and what of them is the key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// qcrypto's final keys ([`qkd_handover::type7`]), as the bit string that both ends have.
    #[default]
    Type7,
    /// The same files, with the bytes that S-Fifteen's consumer (guardian) takes of them: for a link
    /// whose other end reads them with it.
    Type7Guardian,
    /// Raw key of a fixed length ([`qkd_handover::cor`]).
    Cor,
    /// Key files of our own ([`qkd_keyfile::codec`]), called `<anything>.qkdkey`.
    KeyFile,
    /// 48-byte records of UUID and key, appended ([`qkd_handover::uuid_record`]).
    UuidRecords,
    /// Hexadecimal lines in files `<peer>_<n>` ([`qkd_handover::hex_lines`]). The QKD-key ID is the
    /// number of the key alone, since each end calls its peer otherwise.
    HexLines,
    /// AIT R10's key records, appended ([`qkd_handover::r10`]); only amplified and authenticated keys.
    R10,
}

impl Format {
    /// Whether names are epochs.
    pub(super) const fn has_epochs(self) -> bool {
        matches!(self, Self::Type7 | Self::Type7Guardian)
    }

    /// Whether a file holds many keys, and grows.
    pub(super) const fn has_records(self) -> bool {
        matches!(self, Self::UuidRecords | Self::HexLines | Self::R10)
    }
}

impl DirectoryConfig {
    /// Longest key that is delivered, in bits.
    pub(super) fn longest_key_bits(&self) -> u32 {
        let of_bytes = |bytes: usize| u32::try_from(bytes * 8).unwrap_or(u32::MAX);
        match self.format {
            Format::Cor => self.file_bytes * 8,
            Format::UuidRecords => uuid_record::KEY_BITS,
            Format::HexLines => self.max_block_bits.min(of_bytes(hex_lines::MAX_KEY_BYTES)),
            _ => self.max_block_bits,
        }
    }

    /// Memory for key on its way, in bytes.
    pub(super) fn scratch_bytes(&self) -> usize {
        let key_bytes = bytes_for_bits(self.max_block_bits);
        match self.format {
            Format::Type7 | Format::Type7Guardian => words_bytes(self.max_block_bits),
            Format::Cor => 0,
            Format::KeyFile => codec::HEADER_BYTES + codec::MAX_METADATA_BYTES + key_bytes,
            Format::UuidRecords => uuid_record::RECORD_BYTES,
            Format::HexLines => hex_lines::MAX_LINE_BYTES,
            Format::R10 => key_bytes.max(r10::MAX_HEADER_BYTES),
        }
    }
}
