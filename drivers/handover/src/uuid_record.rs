//! 48-byte records appended to one file: a UUID of 16 bytes, then a key of 32.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0-15 | UUID | raw bytes; equal at both ends |
//! | 16-47 | key | first bit is the top bit of the first byte |
//!
//! There is no header, end mark or check sequence: a reader keeps its place, and leaves a part of a
//! record at the end of the file for later.
//!
//! Source: the key file of ID Quantique's Clavis3, as an open reader of it (cqptoolkit) documents it;
//! the layout is a fact, this code is its own.

use std::fmt::Write as _;

use qkd_keyfile::QkdKeyId;

/// Bytes of a record.
pub const RECORD_BYTES: usize = 48;

/// Bytes of the UUID at the start of a record.
pub const UUID_BYTES: usize = 16;

/// Bytes of the key of a record.
pub const KEY_BYTES: usize = RECORD_BYTES - UUID_BYTES;

/// Bits of the key of a record.
pub const KEY_BITS: u32 = 256;

/// Splits a record into the UUID's bytes and the key.
#[must_use]
#[expect(
    clippy::missing_panics_doc,
    reason = "the parts are as long as the record"
)]
pub fn split(record: &[u8; RECORD_BYTES]) -> ([u8; UUID_BYTES], &[u8; KEY_BYTES]) {
    let (uuid, key) = record
        .split_first_chunk()
        .expect("a record begins with a UUID");
    (*uuid, key.try_into().expect("the rest is the key"))
}

/// The UUID in its usual form, which is the QKD-key ID.
#[must_use]
#[expect(
    clippy::missing_panics_doc,
    reason = "36 digits and dashes are always an ID"
)]
pub fn qkd_key_id(uuid: &[u8; UUID_BYTES]) -> QkdKeyId {
    let mut text = String::with_capacity(36);
    for (at, byte) in uuid.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        write!(text, "{byte:02x}").expect("a string takes all");
    }
    text.parse().expect("digits and dashes are an ID")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_a_uuid_and_a_key() {
        let mut record = [0; RECORD_BYTES];
        for (at, byte) in record.iter_mut().enumerate() {
            *byte = u8::try_from(at).unwrap();
        }
        let (uuid, key) = split(&record);
        let id = qkd_key_id(&uuid);
        assert_eq!(id.as_str(), "00010203-0405-0607-0809-0a0b0c0d0e0f");
        assert_eq!((key[0], key[31], key.len() * 8), (16, 47, 256));
    }
}
