//! qcrypto's final-key files: 16 bytes of header, then key words.
//!
//! - A header that is taken encodes to the bytes that it came from and says a bounded length.
//! - Words that are taken become a key of exactly `key_bits` bits, unused bits zero, and encode to
//!   the words that they came from.
//! - Words or a key buffer of another length are refused, and nothing is written.

use qkd_handover::type7::{
    HEADER_BYTES, Header, MAX_KEY_BITS, decode_key, encode_words, words_bytes,
};
use qkd_keyfile::units::bytes_for_bits;

/// See the module.
pub fn run(input: &[u8]) {
    let Some((head, words)) = input.split_first_chunk::<HEADER_BYTES>() else {
        return;
    };
    let Ok(header) = Header::decode(head) else {
        return;
    };
    assert_eq!(header.encode(), *head);
    assert!(header.key_bits <= MAX_KEY_BITS && header.epochs > 0);
    assert_eq!(header.check_name(&header.file_name()), Ok(()));
    assert_eq!(
        header.file_bytes(),
        HEADER_BYTES + words_bytes(header.key_bits)
    );

    let mut key = vec![0xa5; bytes_for_bits(header.key_bits)];
    if words.len() != words_bytes(header.key_bits) {
        assert!(decode_key(&header, words, &mut key).is_err());
        assert!(key.iter().all(|&byte| byte == 0xa5));
    }
    // The same words at the length that the header asks for, so that keys of every size are read.
    let mut words = words.to_vec();
    words.resize(words_bytes(header.key_bits), 0);
    assert!(decode_key(&header, &words, &mut vec![0; key.len() + 1]).is_err());
    if decode_key(&header, &words, &mut key).is_err() {
        assert!(key.iter().all(|&byte| byte == 0xa5));
        return;
    }
    let used = header.key_bits % 8;
    assert!(used == 0 || key.last().is_none_or(|last| last << used == 0));
    let mut again = vec![0xa5; words.len()];
    encode_words(header.key_bits, &key, &mut again).unwrap();
    assert_eq!(again, words);
}
