//! The key file.
//!
//! - What is taken has a key as long as its bit count, unused bits zero, within the file.
//! - It encodes again, and that decodes to the same file.
//! - Metadata behind a right check sequence decodes or is refused, whatever it holds.

use qkd_keyfile::{
    KeyFile,
    codec::{HEADER_BYTES, MAGIC, MAX_METADATA_BYTES},
    units::bytes_for_bits,
};

use super::input::{Input, crc32c};

/// See the module.
pub fn run(input: &[u8]) {
    check(input);
    check(&with_checksum(&mut Input::new(input)));
}

fn check(bytes: &[u8]) {
    let Ok(file) = KeyFile::decode(bytes) else {
        return;
    };
    assert_eq!(file.key.len(), bytes_for_bits(file.key_bits));
    assert!(bytes.ends_with(file.key) && bytes.len() - file.key.len() >= HEADER_BYTES);
    let used = file.key_bits % 8;
    assert!(used == 0 || file.key.last().is_none_or(|last| last << used == 0));
    let again = [&file.encode_head().unwrap(), file.key].concat();
    assert_eq!(KeyFile::decode(&again).as_ref(), Ok(&file));
}

/// Two bytes of bit count, so many bytes of key, and the rest as metadata.
fn with_checksum(input: &mut Input<'_>) -> Vec<u8> {
    let key_bits = u32::from(input.u16());
    let mut key = input.take(bytes_for_bits(key_bits)).to_vec();
    key.resize(bytes_for_bits(key_bits), 0);
    let metadata = input.take(MAX_METADATA_BYTES);
    let metadata_bytes = u32::try_from(metadata.len()).unwrap();
    let head = [
        &MAGIC[..],
        &metadata_bytes.to_le_bytes(),
        &key_bits.to_le_bytes(),
    ]
    .concat();
    let crc = crc32c(&[&head[..], metadata].concat());
    [&head[..], &crc.to_le_bytes(), metadata, &key].concat()
}
