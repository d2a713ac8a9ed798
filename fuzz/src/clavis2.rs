//! Clavis2's datagrams.
//!
//! - A datagram that is taken has its length and check sequence, and encodes to its own fields again.
//! - The same bytes behind a right check sequence are taken or refused, and are never both a request
//!   and a response.

use qkd_handover::clavis2::{MAX_KEY_BYTES, REQUEST_BYTES, RESPONSE_BYTES, Request, Response};

/// See the module.
pub fn run(input: &[u8]) {
    either(input);
    for len_bytes in [REQUEST_BYTES, RESPONSE_BYTES] {
        let mut sealed = input.to_vec();
        sealed.resize(len_bytes, 0);
        let crc = crc32_bzip2(&sealed[..len_bytes - 4]).to_be_bytes();
        sealed[len_bytes - 4..].copy_from_slice(&crc);
        either(&sealed);
    }
}

fn either(datagram: &[u8]) {
    if let Ok(request) = Request::decode(datagram) {
        assert_eq!(datagram.len(), REQUEST_BYTES);
        assert_eq!(Request::decode(&request.encode()), Ok(request));
        assert!(Response::decode(datagram).is_err());
    }
    if let Ok((response, key)) = Response::decode(datagram) {
        assert!(key.len() <= MAX_KEY_BYTES && key.is_empty() == response.refusal.is_some());
        let mut again = [0xa5; RESPONSE_BYTES];
        response.encode(key, &mut again).unwrap();
        assert_eq!(Response::decode(&again), Ok((response, key)));
        // But for what is reserved, it is the same datagram.
        assert_eq!(again[..15], datagram[..15]);
    }
}

/// CRC-32/BZIP2, bit by bit: a second implementation.
fn crc32_bzip2(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte) << 24, |crc, _| {
            (crc << 1) ^ if crc >> 31 == 1 { 0x04c1_1db7 } else { 0 }
        })
    })
}
