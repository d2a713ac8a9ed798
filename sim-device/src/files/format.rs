//! Vendors' files: what they are called, and what is in them.

use qkd_handover::{
    cor, hex_lines,
    r10::{self, State},
    type7::{self, HEADER_BYTES, Header},
    uuid_record::{KEY_BITS, KEY_BYTES, RECORD_BYTES},
};
use serde::Deserialize;
use zeroize::Zeroizing;

use super::{FilesConfig, FilesError};
use crate::pair::Block;

/// In what form keys are handed over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileFormat {
    /// qcrypto's final keys: a file for each block, called by its epoch.
    #[default]
    Type7,
    /// Raw bytes: a file for each block (204,800 bytes in the field), `YYMMDD_HHMM_<8 digits>.cor`.
    Cor,
    /// Records of a UUID and 32 bytes, appended to one file (Clavis3).
    UuidRecords,
    /// Hexadecimal keys of 32 bytes, one a line: a file for each block, `<peer>_<n>`.
    HexLines,
    /// Records of the AIT R10 stack, appended to one file.
    R10,
}

impl FileFormat {
    /// Bits that a block has a multiple of; what is left over is not handed over.
    const fn unit_bits(self) -> u32 {
        match self {
            Self::Type7 => 1,
            Self::Cor | Self::R10 => 8,
            Self::UuidRecords | Self::HexLines => KEY_BITS,
        }
    }

    /// Whether blocks are appended to one file.
    pub(super) const fn is_appended(self) -> bool {
        matches!(self, Self::UuidRecords | Self::R10)
    }
}

/// A piece of a file.
pub(super) struct Piece {
    /// The file's name.
    pub(super) name: String,
    pub(super) bytes: Zeroizing<Vec<u8>>,
    /// Key bits in it.
    pub(super) key_bits: u32,
}

/// A block as it is handed over; `None` if there is nothing of it in this format.
pub(super) fn piece(config: &FilesConfig, block: &Block) -> Result<Option<Piece>, FilesError> {
    let format = config.format;
    let key_bits = block.key_bits - block.key_bits % format.unit_bits();
    // Only qcrypto says that there is nothing.
    if key_bits == 0 && format != FileFormat::Type7 {
        return Ok(None);
    }
    let key = &block.key()[..key_bits.div_ceil(8) as usize];
    let (name, bytes) = match format {
        FileFormat::Type7 => type7_file(block)?,
        FileFormat::Cor => (cor_name(block)?, Zeroizing::new(key.to_vec())),
        FileFormat::UuidRecords => (config.file_name("keys.dat"), uuid_records(block, key)),
        FileFormat::HexLines => {
            let peer = config.peer.as_deref().unwrap_or("peer");
            (hex_lines::file_name(peer, block.number), lines(key)?)
        }
        FileFormat::R10 => (config.file_name("keys.r10"), r10_record(block, key)?),
    };
    Ok(Some(Piece {
        name,
        bytes,
        key_bits,
    }))
}

/// Numbers of 32 bits.
fn small(block: &Block) -> Result<u32, FilesError> {
    let number = block.number;
    u32::try_from(number).map_err(|_| FilesError::Epoch { number })
}

fn type7_file(block: &Block) -> Result<(String, Zeroizing<Vec<u8>>), FilesError> {
    let header = Header {
        tag: type7::TAG,
        first_epoch: small(block)?,
        epochs: 1,
        key_bits: block.key_bits,
    };
    let mut bytes = Zeroizing::new(vec![0; HEADER_BYTES + type7::words_bytes(block.key_bits)]);
    bytes[..HEADER_BYTES].copy_from_slice(&header.encode());
    type7::encode_words(block.key_bits, block.key(), &mut bytes[HEADER_BYTES..])?;
    Ok((header.file_name(), bytes))
}

/// A day and minute of simulated time, which begins with 2026; months have 28 days there.
fn cor_name(block: &Block) -> Result<String, FilesError> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "simulated times are positive and small"
    )]
    let minutes = (block.due_s / 60.0) as u64;
    let (days, minute) = (minutes / 1440, minutes % 1440);
    let (month, day) = (days / 28 % 12 + 1, days % 28 + 1);
    // A pair that numbers anew gives other names.
    let digits = small(block)? ^ block.generation << 24;
    Ok(format!(
        "26{month:02}{day:02}_{:02}{:02}_{digits:08x}{}",
        minute / 60,
        minute % 60,
        cor::SUFFIX
    ))
}

fn uuid_records(block: &Block, key: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(key.len() / KEY_BYTES * RECORD_BYTES));
    for (index, key) in (1_u32..).zip(key.chunks_exact(KEY_BYTES)) {
        // No random UUID, but as unique, and the same at both halves; never zero, which would be a hole
        // in the file.
        bytes.extend_from_slice(&block.number.to_be_bytes());
        bytes.extend_from_slice(&block.generation.to_be_bytes());
        bytes.extend_from_slice(&index.to_be_bytes());
        bytes.extend_from_slice(key);
    }
    bytes
}

fn lines(key: &[u8]) -> Result<Zeroizing<Vec<u8>>, FilesError> {
    let line_bytes = 2 * KEY_BYTES + 1;
    let mut bytes = Zeroizing::new(vec![0; key.len() / KEY_BYTES * line_bytes]);
    for (key, line) in key
        .chunks_exact(KEY_BYTES)
        .zip(bytes.chunks_exact_mut(line_bytes))
    {
        hex_lines::encode(key, line)?;
    }
    Ok(bytes)
}

fn r10_record(block: &Block, key: &[u8]) -> Result<Zeroizing<Vec<u8>>, FilesError> {
    let header = r10::Header {
        id: small(block)?,
        state: State::Authenticated,
        disclosed_bits: 0,
        error_rate: f64::from(block.qber_ppm.unwrap_or(0)) / 1e6,
        incoming_bytes: 0,
        outgoing_bytes: 0,
        key_bytes: key.len(),
    };
    let head = r10::encode_header(&header, "", "")?;
    let mut bytes = Zeroizing::new(vec![0; head.len() + key.len()]);
    bytes[..head.len()].copy_from_slice(&head);
    r10::encode_key(key, &mut bytes[head.len()..])?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::tests::config,
        pair::{ModulePair, Role},
    };

    fn block(bits: u32, number: u64) -> Block {
        let mut pair = config();
        pair.block_bits = bits;
        let half = ModulePair::new(&pair).unwrap().half(Role::Transmitter);
        half.block(number).unwrap()
    }

    fn made(format: FileFormat, block: &Block) -> Piece {
        let config = FilesConfig {
            format,
            ..FilesConfig::new("/nowhere")
        };
        piece(&config, block).unwrap().unwrap()
    }

    #[test]
    fn raw_files_hold_the_key_under_a_name_that_a_reader_knows() {
        let block = block(1001, 7);
        let piece = made(FileFormat::Cor, &block);
        assert_eq!(
            (piece.key_bits, &piece.bytes[..]),
            (1000, &block.key()[..125])
        );
        assert_eq!(piece.name, "260101_0000_00000007.cor");
        assert_eq!(cor::id_of_name(&piece.name), Some("260101_0000_00000007"));
    }

    #[test]
    fn uuid_records_read_back_each_with_an_id_of_its_own() {
        let block = block(1001, 7);
        let piece = made(FileFormat::UuidRecords, &block);
        assert_eq!((piece.key_bits, piece.bytes.len()), (768, 3 * RECORD_BYTES));
        let (records, _) = piece.bytes.as_chunks::<RECORD_BYTES>();
        let mut ids = Vec::new();
        for (record, key) in records.iter().zip(block.key().chunks(KEY_BYTES)) {
            let (uuid, found) = qkd_handover::uuid_record::split(record);
            assert_eq!(found, key);
            ids.push(uuid);
        }
        ids.dedup();
        assert_eq!(ids.len(), 3);
    }

    #[test]
    fn hexadecimal_lines_read_back() {
        let block = block(1001, 12);
        let piece = made(FileFormat::HexLines, &block);
        assert_eq!(hex_lines::parse_name(&piece.name), Some(("peer", 12)));
        let lines: Vec<_> = piece.bytes.split(|byte| *byte == b'\n').collect();
        assert_eq!((lines.len(), lines[3]), (4, &b""[..]));
        for (line, expected) in lines.iter().zip(block.key().chunks_exact(KEY_BYTES)) {
            let mut key = [0; KEY_BYTES];
            assert_eq!(hex_lines::decode(line, &mut key), Ok(KEY_BYTES));
            assert_eq!(key, expected);
        }
    }

    #[test]
    fn r10_records_read_back_with_their_error_rate() {
        let block = block(1001, 12);
        let piece = made(FileFormat::R10, &block);
        let header = r10::Header::decode(&piece.bytes).unwrap().unwrap();
        assert_eq!((header.id, header.qber_ppm()), (12, 20_000));
        assert!(header.state.is_final());
        let mut key = [0; 125];
        r10::decode_key(&piece.bytes[header.header_bytes()..], &mut key).unwrap();
        assert_eq!(key, block.key()[..125]);
    }

    #[test]
    fn a_block_shorter_than_a_key_is_not_handed_over() {
        let config = FilesConfig {
            format: FileFormat::UuidRecords,
            ..FilesConfig::new("/nowhere")
        };
        assert!(piece(&config, &block(255, 1)).unwrap().is_none());
    }
}
