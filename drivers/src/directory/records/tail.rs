//! From a place in a file to the record there.

use qkd_handover::{
    hex_lines::{self, HexLineError},
    r10,
    uuid_record::{self, KEY_BITS, RECORD_BYTES, UUID_BYTES},
};
use qkd_keyfile::QkdKeyId;
use zeroize::Zeroize;

use super::positions::Place;
use crate::{
    directory::{DirectoryConfig, Format, folder::OpenFile, reading::NoEvent},
    event::CorruptReason,
};

/// A file, and where in it the next record begins.
#[derive(Debug)]
pub(super) struct Tail {
    file: OpenFile,
    pub(super) place: Place,
    /// Of the file, where names have one.
    number: u64,
}

/// What stands at a place. The place is behind it then, but for what is not whole.
pub(super) enum Found {
    /// The key is in the caller's buffer.
    Key(FoundKey),
    /// A record of no bits.
    Empty { id: QkdKeyId },
    /// A record without usable key.
    Bad {
        id: Option<QkdKeyId>,
        reason: CorruptReason,
    },
    /// The record needs so many bytes, as far as can be told.
    Incomplete { need_bytes: usize },
}

pub(super) struct FoundKey {
    pub(super) id: QkdKeyId,
    pub(super) key_bits: u32,
    pub(super) qber_ppm: Option<u32>,
}

impl Tail {
    pub(super) const fn new(file: OpenFile, place: Place, number: u64) -> Self {
        Self {
            file,
            place,
            number,
        }
    }

    pub(super) fn size_bytes(&self) -> nix::Result<u64> {
        Ok(self.file.look()?.size_bytes)
    }

    /// Whether the last settled record still stands where it stood. Lines have no ID: of them only the
    /// length tells.
    pub(super) fn stands_where_it_stood(&self, config: &DirectoryConfig) -> bool {
        let Place {
            offset_bytes,
            last_bytes,
            last_id,
            ..
        } = &self.place;
        if self.file.identity.size_bytes < *offset_bytes {
            return false;
        }
        let Some(last_id) = last_id else {
            return true;
        };
        let at = usize::try_from(*last_bytes).unwrap_or(usize::MAX);
        let found = match config.format {
            Format::UuidRecords => {
                let mut uuid = [0; UUID_BYTES];
                let read = self.file.read_exact(&mut uuid, at);
                read.map(|()| uuid_record::qkd_key_id(&uuid))
            }
            Format::R10 => {
                let mut id = [0; 4];
                let read = self.file.read_exact(&mut id, at);
                read.map(|()| id_of_number(u32::from_be_bytes(id).into()))
            }
            _ => return true,
        };
        found.is_ok_and(|id| id.as_str() == last_id)
    }

    /// Reads the record here, of a file of that size; `scratch` holds no key afterwards.
    pub(super) fn next(
        &mut self,
        size_bytes: u64,
        config: &DirectoryConfig,
        scratch: &mut [u8],
        out: &mut [u8],
    ) -> Result<Found, NoEvent> {
        let left_bytes = size_bytes.saturating_sub(self.place.offset_bytes);
        let left_bytes = usize::try_from(left_bytes).unwrap_or(usize::MAX);
        let found = match config.format {
            Format::HexLines => self.line(left_bytes, config, scratch, out),
            Format::R10 => self.r10(left_bytes, config, scratch, out),
            _ => self.uuid_record(left_bytes, scratch, out),
        };
        scratch.zeroize();
        found
    }

    fn uuid_record(
        &mut self,
        left_bytes: usize,
        scratch: &mut [u8],
        out: &mut [u8],
    ) -> Result<Found, NoEvent> {
        let need_bytes = RECORD_BYTES;
        let Some(record) = scratch
            .first_chunk_mut::<RECORD_BYTES>()
            .filter(|_| left_bytes >= need_bytes)
        else {
            return Ok(Found::Incomplete { need_bytes });
        };
        self.file.read_exact(record, self.at())?;
        let (uuid, key) = uuid_record::split(record);
        if uuid == [0; UUID_BYTES] {
            // A hole: space that was set aside, and will be written to.
            return Ok(Found::Incomplete { need_bytes });
        }
        out[..key.len()].copy_from_slice(key);
        let id = uuid_record::qkd_key_id(&uuid);
        self.go_on(need_bytes, Some(&id));
        Ok(Found::Key(FoundKey {
            id,
            key_bits: KEY_BITS,
            qber_ppm: None,
        }))
    }

    fn r10(
        &mut self,
        left_bytes: usize,
        config: &DirectoryConfig,
        scratch: &mut [u8],
        out: &mut [u8],
    ) -> Result<Found, NoEvent> {
        let head = &mut scratch[..r10::MAX_HEADER_BYTES.min(left_bytes)];
        self.file.read_exact(head, self.at())?;
        let Some(header) = r10::Header::decode(head).map_err(CorruptReason::from)? else {
            let need_bytes = left_bytes + 1;
            return Ok(Found::Incomplete { need_bytes });
        };
        let need_bytes = header.record_bytes();
        let key_at = self.at() + header.header_bytes();
        if left_bytes < need_bytes {
            return Ok(Found::Incomplete { need_bytes });
        }
        let id = header.qkd_key_id();
        let key_bits = u32::try_from(header.key_bytes * 8).unwrap_or(u32::MAX);
        let max_bits = config.max_block_bits;
        let reason = if !header.state.is_final() {
            let state = header.state;
            Some(CorruptReason::R10State { state })
        } else if key_bits > max_bits {
            Some(CorruptReason::TooManyBits { key_bits, max_bits })
        } else {
            None
        };
        self.go_on(need_bytes, Some(&id));
        if let Some(reason) = reason {
            let id = Some(id);
            return Ok(Found::Bad { id, reason });
        }
        if key_bits == 0 {
            return Ok(Found::Empty { id });
        }
        let key = &mut scratch[..header.key_bytes];
        self.file.read_exact(key, key_at)?;
        r10::decode_key(key, &mut out[..header.key_bytes]).map_err(CorruptReason::from)?;
        Ok(Found::Key(FoundKey {
            id,
            key_bits,
            qber_ppm: Some(header.qber_ppm()),
        }))
    }

    fn line(
        &mut self,
        left_bytes: usize,
        config: &DirectoryConfig,
        scratch: &mut [u8],
        out: &mut [u8],
    ) -> Result<Found, NoEvent> {
        let line = self.place.line;
        if line >= config.block_keys {
            return Ok(Found::Incomplete { need_bytes: 0 });
        }
        let text = &mut scratch[..hex_lines::MAX_LINE_BYTES.min(left_bytes)];
        self.file.read_exact(text, self.at())?;
        let Some(end) = text.iter().position(|&byte| byte == b'\n') else {
            if text.len() == hex_lines::MAX_LINE_BYTES {
                let error = HexLineError::TooLong {
                    have_bytes: text.len() / 2,
                    max_bytes: hex_lines::MAX_KEY_BYTES,
                };
                return Err(CorruptReason::HexLine { line, error }.into());
            }
            let need_bytes = left_bytes + 1;
            return Ok(Found::Incomplete { need_bytes });
        };
        let number = hex_lines::key_number(self.number, line, config.block_keys);
        let number = number.ok_or(NoEvent::Skip)?;
        let key = hex_lines::decode(&text[..end], out);
        self.go_on(end + 1, None);
        self.place.line += 1;
        let id = id_of_number(number);
        Ok(match key {
            Ok(key_bytes) => Found::Key(FoundKey {
                id,
                key_bits: u32::try_from(key_bytes * 8).unwrap_or(u32::MAX),
                qber_ppm: None,
            }),
            Err(error) => Found::Bad {
                id: Some(id),
                reason: CorruptReason::HexLine { line, error },
            },
        })
    }

    fn at(&self) -> usize {
        usize::try_from(self.place.offset_bytes).unwrap_or(usize::MAX)
    }

    fn go_on(&mut self, record_bytes: usize, id: Option<&QkdKeyId>) {
        self.place.last_bytes = self.place.offset_bytes;
        self.place.offset_bytes += record_bytes as u64;
        self.place.last_id = id.map(|id| id.as_str().to_owned());
    }
}

fn id_of_number(number: u64) -> QkdKeyId {
    number
        .to_string()
        .parse()
        .unwrap_or_else(|_| unreachable!("20 digits are an ID"))
}
