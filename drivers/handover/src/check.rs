//! Check sequences: of frames and records CRC-32C (Castagnoli), as in iSCSI (RFC 3720, appendix B.4), of
//! `123456789` 0xe3069283; of a Clavis2's datagrams CRC-32/BZIP2, of the same 0xfc891918.

use crc_fast::{CrcAlgorithm, Digest, checksum};

/// CRC-32C of several pieces as if they were one.
pub(crate) fn crc32c(pieces: &[&[u8]]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    for piece in pieces {
        digest.update(piece);
    }
    low_word(digest.finalize())
}

/// CRC-32/BZIP2.
pub(crate) fn crc32_bzip2(bytes: &[u8]) -> u32 {
    low_word(checksum(CrcAlgorithm::Crc32Bzip2, bytes))
}

/// 32 bits, in a type that holds all lengths.
fn low_word(crc: u64) -> u32 {
    u32::try_from(crc).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_has_its_check_value_and_agrees_with_another_implementation() {
        assert_eq!(crc32c(&[b"123456789"]), 0xe306_9283);
        assert_eq!(crc32c(&[]), 0);
        let bytes: Vec<u8> = (0..70_000_u32)
            .map(|i| (i.wrapping_mul(i) >> 7).to_le_bytes()[0])
            .collect();
        for len in (0..600).chain([4095, 4096, 65_512, 70_000]) {
            for cut in [0, 1, 24, 48] {
                let (a, b) = bytes[..len].split_at(cut.min(len));
                assert_eq!(
                    crc32c(&[a, b]),
                    ::crc32c::crc32c(&bytes[..len]),
                    "{len} at {cut}"
                );
            }
        }
    }
}
