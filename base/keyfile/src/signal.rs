//! The 10-byte header of the signalling protocols (Q.4161 Appendix I, Q.4164 draft Annex A).
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0-1 | version | [`VERSION`] |
//! | 2-5 | message ID | a response repeats that of its request |
//! | 6-7 | command code | `0x21..` application to KM, `0x12..` KM to application, `0x00..` Ck |
//! | 8-9 | length | of the payload that follows, in bytes |
//!
//! The documents leave the byte order open; here it is the network's (big-endian), in which the
//! direction is the first byte of the code, as their tables read.

/// Bytes of a header.
pub const HEADER_BYTES: usize = 10;

/// The version this code speaks. The documents name no value; this is the smallest that is not zero.
pub const VERSION: u16 = 1;

/// A message's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Version of the message format.
    pub version: u16,
    /// Pairs a response with its request.
    pub message_id: u32,
    /// What the message is.
    pub command: u16,
    /// Length of the payload, in bytes.
    pub payload_bytes: u16,
}

/// The payload does not fit the header's 16-bit length. Nothing was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("payload of {bytes} bytes, 65535 at most in one message")]
pub struct PayloadTooLong {
    /// Length of the payload, in bytes.
    pub bytes: usize,
}

impl Header {
    /// The header's bytes.
    #[must_use]
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0..2].copy_from_slice(&self.version.to_be_bytes());
        out[2..6].copy_from_slice(&self.message_id.to_be_bytes());
        out[6..8].copy_from_slice(&self.command.to_be_bytes());
        out[8..10].copy_from_slice(&self.payload_bytes.to_be_bytes());
        out
    }

    /// Reads a header; every ten bytes are one, whether the version and code are known or not.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let [v0, v1, m0, m1, m2, m3, c0, c1, l0, l1] = *bytes;
        Self {
            version: u16::from_be_bytes([v0, v1]),
            message_id: u32::from_be_bytes([m0, m1, m2, m3]),
            command: u16::from_be_bytes([c0, c1]),
            payload_bytes: u16::from_be_bytes([l0, l1]),
        }
    }
}

/// A whole message of this [`VERSION`]: header and payload.
///
/// # Errors
///
/// [`PayloadTooLong`]: nothing was written; send less (the protocols cannot continue a message).
pub fn encode_message(
    message_id: u32,
    command: u16,
    payload: &[u8],
) -> Result<Vec<u8>, PayloadTooLong> {
    let payload_bytes = u16::try_from(payload.len()).map_err(|_| PayloadTooLong {
        bytes: payload.len(),
    })?;
    let header = Header {
        version: VERSION,
        message_id,
        command,
        payload_bytes,
    };
    Ok([&header.encode(), payload].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_request_has_the_bytes_of_the_worked_example() {
        let payload =
            br#"{"application_destination_id":"app-b","number_of_keys":2,"size_of_key":256}"#;
        let message = encode_message(1, 0x2101, payload).unwrap();
        assert_eq!(message[..10], [0, 1, 0, 0, 0, 1, 0x21, 0x01, 0, 0x4b]);
        assert_eq!(message[10..], payload[..]);
    }

    #[test]
    fn every_ten_bytes_decode_to_the_header_that_encodes_to_them() {
        let bytes = [0xff, 0x01, 2, 3, 4, 5, 0x12, 0x0a, 0xff, 0xfe];
        assert_eq!(Header::decode(&bytes).encode(), bytes);
    }

    #[test]
    fn the_longest_payload_fits_and_one_byte_more_is_refused() {
        assert!(encode_message(0, 1, &vec![b' '; 65_535]).is_ok());
        assert_eq!(
            encode_message(0, 1, &vec![b' '; 65_536]),
            Err(PayloadTooLong { bytes: 65_536 })
        );
    }
}
