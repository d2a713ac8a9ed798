//! Datagrams of the IDQ3P protocol, by which a Clavis2's daemon hands over keys (UDP, port 5323).
//!
//! | request | response | field | |
//! |---|---|---|---|
//! | 0 | 0 | type | 0 request, 1 response |
//! | 1-8 | 1-8 | key ID | upper word, then lower word; 0 in a request: a new key |
//! | 9 | 9 | key length, bytes | 1 to 32 |
//! | 10-13 | 10-13 | request ID | echoed; the original counts it in 8 bits |
//! | | 14 | error | 0, or see [`Refusal`] |
//! | 14 | 47 | device ID | 1 to 12, of who asks |
//! | | 15-46 | key | first bit is the top bit of the first byte; zero beyond its length |
//! | 15-24 | 48-57 | reserved | zero |
//! | 25-28 | 58-61 | check sequence | CRC-32/BZIP2 of all before it, **big-endian** |
//!
//! All other integers are little-endian, as the only open client writes them; no document of the
//! vendor confirms it. One datagram carries one key. Nothing is authenticated: the protocol is for a
//! cable between two boxes, and its user checks the sender's address.
//!
//! Source: the layout that an open client of the daemon (cqptoolkit) documents; the layout is a
//! fact, this code is its own.

use qkd_keyfile::QkdKeyId;

use crate::check::crc32_bzip2;

/// Bytes of a request.
pub const REQUEST_BYTES: usize = 29;

/// Bytes of a response.
pub const RESPONSE_BYTES: usize = 62;

/// Longest key of a datagram, in bytes.
pub const MAX_KEY_BYTES: usize = 32;

/// The daemon's port.
pub const PORT: u16 = 5323;

/// Asks for a new key, or for one that the other end has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The key asked for; 0 for a new one.
    pub key_id: u64,
    /// Length of the key, 1 to [`MAX_KEY_BYTES`].
    pub key_bytes: u8,
    /// Chosen by who asks, and echoed.
    pub request_id: u32,
    /// Who asks, 1 to 12.
    pub device: u8,
}

/// What a response says, besides its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Response {
    /// The key.
    pub key_id: u64,
    /// Length of the key, 1 to [`MAX_KEY_BYTES`].
    pub key_bytes: u8,
    /// Of the request.
    pub request_id: u32,
    /// Why there is no key, if there is none.
    pub refusal: Option<Refusal>,
    /// Who asked.
    pub device: u8,
}

/// Why the daemon gives no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[repr(u8)]
pub enum Refusal {
    /// None is there now.
    #[error("no more keys")]
    NoMoreKeys = 1,
    /// There is no key of that ID.
    #[error("no key has that ID")]
    UnknownId = 2,
    /// The key is not of that length.
    #[error("wrong key length")]
    KeyLength = 3,
    /// The request makes no sense.
    #[error("invalid request")]
    Request = 4,
}

/// Why bytes are no datagram of this protocol. Nothing was consumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Clavis2Error {
    /// Too few or too many bytes.
    #[error("a datagram of {have_bytes} bytes, {need_bytes} expected")]
    Length {
        /// Bytes given.
        have_bytes: usize,
        /// Bytes expected.
        need_bytes: usize,
    },
    /// Damaged on the way.
    #[error("the check sequence does not fit")]
    Crc,
    /// A request where a response is expected, or the other way round.
    #[error("datagram of type {found}")]
    Type {
        /// The type found.
        found: u8,
    },
    /// A key length that there is not.
    #[error("a key of {found} bytes, 1 to {MAX_KEY_BYTES} expected")]
    KeyLength {
        /// The length found.
        found: u8,
    },
    /// An error code that there is not.
    #[error("unknown error code {found}")]
    Code {
        /// The code found.
        found: u8,
    },
}

impl Request {
    /// The datagram.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut out = [0; REQUEST_BYTES];
        head(&mut out, 0, self.key_id, self.key_bytes, self.request_id);
        out[14] = self.device;
        seal(&mut out);
        out
    }

    /// Reads a datagram.
    ///
    /// # Errors
    ///
    /// [`Clavis2Error`]: drop the datagram.
    pub fn decode(datagram: &[u8]) -> Result<Self, Clavis2Error> {
        let bytes: &[u8; REQUEST_BYTES] = checked(datagram, 0)?;
        let (key_id, key_bytes, request_id) = parse_head(bytes)?;
        Ok(Self {
            key_id,
            key_bytes,
            request_id,
            device: bytes[14],
        })
    }
}

impl Response {
    /// Writes the datagram to `out`, which holds key afterwards.
    ///
    /// # Errors
    ///
    /// [`Clavis2Error::KeyLength`] if `key` is not as long as the response says, or not empty in a
    /// refusal; nothing was written.
    pub fn encode(&self, key: &[u8], out: &mut [u8; RESPONSE_BYTES]) -> Result<(), Clavis2Error> {
        let need = if self.refusal.is_some() {
            0
        } else {
            self.key_bytes.into()
        };
        if key.len() != need || need > MAX_KEY_BYTES {
            let found = self.key_bytes;
            return Err(Clavis2Error::KeyLength { found });
        }
        out.fill(0);
        head(out, 1, self.key_id, self.key_bytes, self.request_id);
        out[14] = self.refusal.map_or(0, |refusal| refusal as u8);
        out[15..15 + key.len()].copy_from_slice(key);
        out[47] = self.device;
        seal(out);
        Ok(())
    }

    /// Reads a datagram; the key is empty in a refusal.
    ///
    /// # Errors
    ///
    /// [`Clavis2Error`]: drop the datagram, and wipe it.
    pub fn decode(datagram: &[u8]) -> Result<(Self, &[u8]), Clavis2Error> {
        let bytes: &[u8; RESPONSE_BYTES] = checked(datagram, 1)?;
        let (key_id, key_bytes, request_id) = parse_head(bytes)?;
        let refusal = match bytes[14] {
            0 => None,
            1 => Some(Refusal::NoMoreKeys),
            2 => Some(Refusal::UnknownId),
            3 => Some(Refusal::KeyLength),
            4 => Some(Refusal::Request),
            found => return Err(Clavis2Error::Code { found }),
        };
        let len = if refusal.is_some() {
            0
        } else {
            usize::from(key_bytes)
        };
        let response = Self {
            key_id,
            key_bytes,
            request_id,
            refusal,
            device: bytes[47],
        };
        Ok((response, &bytes[15..15 + len]))
    }

    /// The key ID in decimal: the QKD-key ID, equal at both ends.
    #[must_use]
    #[expect(clippy::missing_panics_doc, reason = "20 digits are always an ID")]
    pub fn qkd_key_id(&self) -> QkdKeyId {
        self.key_id
            .to_string()
            .parse()
            .expect("20 digits are an ID")
    }
}

fn head(out: &mut [u8], kind: u8, key_id: u64, key_bytes: u8, request_id: u32) {
    let [high, low] = [(key_id >> 32), key_id & u64::from(u32::MAX)];
    out[0] = kind;
    out[1..5].copy_from_slice(&high.to_le_bytes()[..4]);
    out[5..9].copy_from_slice(&low.to_le_bytes()[..4]);
    out[9] = key_bytes;
    out[10..14].copy_from_slice(&request_id.to_le_bytes());
}

fn parse_head(bytes: &[u8]) -> Result<(u64, u8, u32), Clavis2Error> {
    let word =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let found = bytes[9];
    if !(1..=MAX_KEY_BYTES).contains(&found.into()) {
        return Err(Clavis2Error::KeyLength { found });
    }
    let key_id = u64::from(word(1)) << 32 | u64::from(word(5));
    Ok((key_id, found, word(10)))
}

/// Writes the check sequence to the last four bytes.
fn seal(out: &mut [u8]) {
    let at = out.len() - 4;
    let crc = crc32_bzip2(&out[..at]);
    out[at..].copy_from_slice(&crc.to_be_bytes());
}

fn checked<const N: usize>(datagram: &[u8], kind: u8) -> Result<&[u8; N], Clavis2Error> {
    let bytes: &[u8; N] = datagram.try_into().map_err(|_| Clavis2Error::Length {
        have_bytes: datagram.len(),
        need_bytes: N,
    })?;
    let (body, crc) = bytes.split_at(N - 4);
    if crc32_bzip2(body).to_be_bytes() != crc {
        return Err(Clavis2Error::Crc);
    }
    if bytes[0] != kind {
        return Err(Clavis2Error::Type { found: bytes[0] });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REQUEST: Request = Request {
        key_id: 0x0102_0304_0506_0708,
        key_bytes: 32,
        request_id: 9,
        device: 3,
    };
    const RESPONSE: Response = Response {
        key_id: REQUEST.key_id,
        key_bytes: 4,
        request_id: 9,
        refusal: None,
        device: 3,
    };

    fn response(key: &[u8]) -> [u8; RESPONSE_BYTES] {
        let mut out = [0xff; RESPONSE_BYTES];
        RESPONSE.encode(key, &mut out).unwrap();
        out
    }

    #[test]
    fn the_check_sequence_is_that_of_bzip2_big_endian() {
        assert_eq!(
            crc32_bzip2(b"123456789").to_be_bytes(),
            [0xfc, 0x89, 0x19, 0x18]
        );
    }

    #[test]
    fn a_request_has_the_documented_bytes() {
        let bytes = REQUEST.encode();
        assert_eq!(bytes[..15], [0, 4, 3, 2, 1, 8, 7, 6, 5, 32, 9, 0, 0, 0, 3]);
        assert_eq!(bytes[15..25], [0; 10]);
        assert_eq!(Request::decode(&bytes), Ok(REQUEST));
    }

    #[test]
    fn a_response_carries_its_key() {
        let bytes = response(&[1, 2, 3, 4]);
        assert_eq!(
            (bytes[14], &bytes[15..20], bytes[47]),
            (0, &[1, 2, 3, 4, 0][..], 3)
        );
        assert_eq!(Response::decode(&bytes), Ok((RESPONSE, &[1, 2, 3, 4][..])));
        assert_eq!(RESPONSE.qkd_key_id().as_str(), "72623859790382856");
    }

    #[test]
    fn every_refusal_comes_back_without_a_key() {
        use Refusal::{KeyLength, NoMoreKeys, Request, UnknownId};
        for (code, refusal) in (1..).zip([NoMoreKeys, UnknownId, KeyLength, Request]) {
            let refused = Response {
                refusal: Some(refusal),
                ..RESPONSE
            };
            let mut bytes = [0; RESPONSE_BYTES];
            refused.encode(&[], &mut bytes).unwrap();
            assert_eq!(bytes[14], code);
            assert_eq!(Response::decode(&bytes), Ok((refused, &[][..])));
        }
        let mut bytes = response(&[1, 2, 3, 4]);
        bytes[14] = 5;
        seal(&mut bytes);
        assert_eq!(
            Response::decode(&bytes),
            Err(Clavis2Error::Code { found: 5 })
        );
    }

    #[test]
    fn what_is_no_response_is_refused() {
        let bytes = response(&[1, 2, 3, 4]);
        for have_bytes in [0, 29, 61, 63] {
            let datagram = &[&bytes[..], &[0]].concat()[..have_bytes];
            let need_bytes = RESPONSE_BYTES;
            assert_eq!(
                Response::decode(datagram),
                Err(Clavis2Error::Length {
                    have_bytes,
                    need_bytes
                })
            );
        }
        for (at, value) in [(0, 0), (9, 0), (9, 33)] {
            let mut damaged = bytes;
            damaged[at] = value;
            seal(&mut damaged);
            assert!(Response::decode(&damaged).is_err());
        }
        assert_eq!(
            RESPONSE.encode(&[0; 3], &mut [0; RESPONSE_BYTES]),
            Err(Clavis2Error::KeyLength { found: 4 })
        );
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_noticed(at in 0..RESPONSE_BYTES * 8) {
            let mut bytes = response(&[1, 2, 3, 4]);
            bytes[at / 8] ^= 1 << (at % 8);
            prop_assert_eq!(Response::decode(&bytes), Err(Clavis2Error::Crc));
        }
    }
}
