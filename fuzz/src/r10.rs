//! AIT R10's key records.
//!
//! - No claimed length is over its bound, so that nothing is allocated by it.
//! - A header that is taken encodes to the bytes that it came from, and no prefix of it is one.

use qkd_handover::r10::{
    Header, MAX_HEADER_BYTES, MAX_KEY_BYTES, MAX_SCHEME_BYTES, decode_key, encode_header,
    encode_key,
};

/// See the module.
pub fn run(input: &[u8]) {
    let mut rest = input;
    while let Ok(Some(header)) = Header::decode(rest) {
        let head_bytes = header.header_bytes();
        assert!(head_bytes <= MAX_HEADER_BYTES && header.key_bytes <= MAX_KEY_BYTES);
        assert!(header.incoming_bytes.max(header.outgoing_bytes) <= MAX_SCHEME_BYTES);
        let head = &rest[..head_bytes];
        assert_eq!(Header::decode(&head[..head_bytes - 1]), Ok(None));
        let incoming = str::from_utf8(&head[29..29 + header.incoming_bytes]);
        let outgoing = head_bytes - 8 - header.outgoing_bytes..head_bytes - 8;
        if let (Ok(incoming), Ok(outgoing)) = (incoming, str::from_utf8(&head[outgoing])) {
            assert_eq!(encode_header(&header, incoming, outgoing).unwrap(), head);
        }
        let Some((key, after)) = rest[head_bytes..].split_at_checked(header.key_bytes) else {
            return;
        };
        let (mut there, mut back) = (vec![0; key.len()], vec![0; key.len()]);
        decode_key(key, &mut there).unwrap();
        encode_key(&there, &mut back).unwrap();
        assert_eq!(back, key);
        rest = after;
    }
}
