//! Key records of the AIT QKD R10 stack, one after another in a file or stream.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 4 | key ID | |
//! | 1 | state | see [`State`]; only amplified and authenticated keys are keys |
//! | 8 | disclosed bits | |
//! | 8 | error rate | IEEE 754 double; **little-endian**, as the machine that wrote it |
//! | 8 + n | incoming crypto scheme | length in bytes, then text |
//! | 8 + m | outgoing crypto scheme | length in bytes, then text |
//! | 8 + k | key | length in bytes, then bytes; the first bit is the **lowest** bit of a byte |
//!
//! All other integers are big-endian. The lengths have no bound in the original; here
//! [`MAX_SCHEME_BYTES`] and [`MAX_KEY_BYTES`] bound them before anything is read by them.
//!
//! The canonical key has its first bit in the top bit of a byte, so the bits of every byte are
//! reversed on the way.
//!
//! Source: the published record format of AIT QKD R10; the layout is a fact, this code is its own.

use qkd_keyfile::QkdKeyId;

/// Longest name of a crypto scheme, in bytes.
pub const MAX_SCHEME_BYTES: usize = 1024;

/// Longest key that is read or written, in bytes (256 KiB).
pub const MAX_KEY_BYTES: usize = 1 << 18;

/// Bytes of a record before the name of the incoming scheme, with its length.
const FIXED_BYTES: usize = 29;

/// How far a key has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// None of the others.
    Other = 0,
    /// As detected.
    Raw = 1,
    /// After sifting.
    Sifted = 2,
    /// After error correction.
    Corrected = 3,
    /// Error correction failed.
    Uncorrected = 4,
    /// Equal at both ends.
    Confirmed = 5,
    /// Not shown to be equal at both ends.
    Unconfirmed = 6,
    /// After privacy amplification.
    Amplified = 7,
    /// Made over an authenticated channel.
    Authenticated = 8,
    /// Told to others.
    Disclosed = 9,
}

impl State {
    /// Whether a key of this state may become a QKD-key.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Amplified | Self::Authenticated)
    }

    const fn of(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Other,
            1 => Self::Raw,
            2 => Self::Sifted,
            3 => Self::Corrected,
            4 => Self::Uncorrected,
            5 => Self::Confirmed,
            6 => Self::Unconfirmed,
            7 => Self::Amplified,
            8 => Self::Authenticated,
            9 => Self::Disclosed,
            _ => return None,
        })
    }
}

/// What a record says of its key.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Header {
    /// Names the key at both ends.
    pub id: u32,
    /// How far the key has come.
    pub state: State,
    /// Bits that were told to others on the way.
    pub disclosed_bits: u64,
    /// Quantum bit error rate, 0 to 1.
    pub error_rate: f64,
    /// Length of the name of the incoming crypto scheme, in bytes.
    pub incoming_bytes: usize,
    /// Length of the name of the outgoing crypto scheme, in bytes.
    pub outgoing_bytes: usize,
    /// Length of the key, in bytes.
    pub key_bytes: usize,
}

/// Why bytes are not a record. Nothing was consumed; there is no way to find the next record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum R10Error {
    /// A state that there is not.
    #[error("key {id:#010x}: unknown state {state}")]
    State {
        /// The key.
        id: u32,
        /// The state found.
        state: u8,
    },
    /// An error rate outside of 0 to 1.
    #[error("key {id:#010x}: the error rate is no rate")]
    ErrorRate {
        /// The key.
        id: u32,
    },
    /// A length beyond its bound.
    #[error("key {id:#010x}: {field} of {have_bytes} bytes, {max_bytes} at most")]
    TooLong {
        /// The key.
        id: u32,
        /// Which length.
        field: &'static str,
        /// The length found, in bytes.
        have_bytes: u64,
        /// The bound, in bytes.
        max_bytes: usize,
    },
    /// The buffer for the key, or the key given, is not as long as the record says.
    #[error("{have_bytes} bytes of key, {need_bytes} expected")]
    KeyLength {
        /// Bytes given.
        have_bytes: usize,
        /// Bytes expected.
        need_bytes: usize,
    },
}

impl Header {
    /// Reads what stands before the key.
    ///
    /// `Ok(None)`: the bytes end before that; come again with more, [`MAX_HEADER_BYTES`] at most.
    /// The key begins [`header_bytes`](Self::header_bytes) after the start.
    ///
    /// # Errors
    ///
    /// [`R10Error`]: this is no record, or not one to read.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, R10Error> {
        let mut rest = Rest(bytes);
        let Some(id) = rest.take().map(u32::from_be_bytes) else {
            return Ok(None);
        };
        let Some([state]) = rest.take() else {
            return Ok(None);
        };
        let state = State::of(state).ok_or(R10Error::State { id, state })?;
        let (Some(disclosed), Some(rate)) = (rest.take(), rest.take()) else {
            return Ok(None);
        };
        let error_rate = f64::from_le_bytes(rate);
        if !(0.0..=1.0).contains(&error_rate) {
            return Err(R10Error::ErrorRate { id });
        }
        let mut length = |field, max_bytes, skip: bool| {
            let Some(have_bytes) = rest.take().map(u64::from_be_bytes) else {
                return Ok(None);
            };
            let len = usize::try_from(have_bytes)
                .ok()
                .filter(|&len| len <= max_bytes)
                .ok_or(R10Error::TooLong {
                    id,
                    field,
                    have_bytes,
                    max_bytes,
                })?;
            Ok((!skip || rest.skip(len)).then_some(len))
        };
        let Some(incoming_bytes) = length("incoming scheme", MAX_SCHEME_BYTES, true)? else {
            return Ok(None);
        };
        let Some(outgoing_bytes) = length("outgoing scheme", MAX_SCHEME_BYTES, true)? else {
            return Ok(None);
        };
        let Some(key_bytes) = length("key", MAX_KEY_BYTES, false)? else {
            return Ok(None);
        };
        Ok(Some(Self {
            id,
            state,
            disclosed_bits: u64::from_be_bytes(disclosed),
            error_rate,
            incoming_bytes,
            outgoing_bytes,
            key_bytes,
        }))
    }

    /// Bytes before the key.
    #[must_use]
    pub const fn header_bytes(&self) -> usize {
        FIXED_BYTES + self.incoming_bytes + 8 + self.outgoing_bytes + 8
    }

    /// Bytes of the whole record.
    #[must_use]
    pub const fn record_bytes(&self) -> usize {
        self.header_bytes() + self.key_bytes
    }

    /// Error rate in parts per million, rounded.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the rate is between 0 and 1"
    )]
    pub fn qber_ppm(&self) -> u32 {
        (self.error_rate * 1e6).round() as u32
    }

    /// The key ID in decimal: the QKD-key ID, equal at both ends.
    #[must_use]
    #[expect(clippy::missing_panics_doc, reason = "ten digits are always an ID")]
    pub fn qkd_key_id(&self) -> QkdKeyId {
        self.id.to_string().parse().expect("ten digits are an ID")
    }
}

/// Longest possible header, in bytes.
pub const MAX_HEADER_BYTES: usize = FIXED_BYTES + 2 * MAX_SCHEME_BYTES + 16;

/// Turns a record's key bytes into the canonical key.
///
/// # Errors
///
/// [`R10Error::KeyLength`]; nothing was written.
pub fn decode_key(record_key: &[u8], out: &mut [u8]) -> Result<(), R10Error> {
    if record_key.len() != out.len() {
        return Err(R10Error::KeyLength {
            have_bytes: out.len(),
            need_bytes: record_key.len(),
        });
    }
    for (to, from) in out.iter_mut().zip(record_key) {
        *to = from.reverse_bits();
    }
    Ok(())
}

/// Turns a canonical key into a record's key bytes; the opposite of [`decode_key`], and the same.
///
/// # Errors
///
/// As [`decode_key`].
pub fn encode_key(key: &[u8], out: &mut [u8]) -> Result<(), R10Error> {
    decode_key(key, out)
}

/// The bytes before a key of `key_bytes`: a record is these bytes followed by the key.
///
/// # Errors
///
/// [`R10Error::TooLong`] or [`R10Error::ErrorRate`], as [`Header::decode`] would have.
pub fn encode_header(header: &Header, incoming: &str, outgoing: &str) -> Result<Vec<u8>, R10Error> {
    let id = header.id;
    if !(0.0..=1.0).contains(&header.error_rate) {
        return Err(R10Error::ErrorRate { id });
    }
    let fits = |field, len: usize, max_bytes| {
        if len <= max_bytes {
            return Ok((len as u64).to_be_bytes());
        }
        Err(R10Error::TooLong {
            id,
            field,
            have_bytes: len as u64,
            max_bytes,
        })
    };
    let mut out = Vec::with_capacity(FIXED_BYTES + incoming.len() + outgoing.len() + 16);
    out.extend_from_slice(&id.to_be_bytes());
    out.push(header.state as u8);
    out.extend_from_slice(&header.disclosed_bits.to_be_bytes());
    out.extend_from_slice(&header.error_rate.to_le_bytes());
    out.extend_from_slice(&fits("incoming scheme", incoming.len(), MAX_SCHEME_BYTES)?);
    out.extend_from_slice(incoming.as_bytes());
    out.extend_from_slice(&fits("outgoing scheme", outgoing.len(), MAX_SCHEME_BYTES)?);
    out.extend_from_slice(outgoing.as_bytes());
    out.extend_from_slice(&fits("key", header.key_bytes, MAX_KEY_BYTES)?);
    Ok(out)
}

/// Bytes not read yet.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    fn skip(&mut self, len: usize) -> bool {
        match self.0.get(len..) {
            Some(rest) => {
                self.0 = rest;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEADER: Header = Header {
        id: 0x0102_0304,
        state: State::Amplified,
        disclosed_bits: 5,
        error_rate: 0.03125,
        incoming_bytes: 2,
        outgoing_bytes: 0,
        key_bytes: 32,
    };

    #[test]
    fn a_record_has_the_documented_bytes() {
        let head = encode_header(&HEADER, "in", "").unwrap();
        assert_eq!(
            head,
            [
                1, 2, 3, 4, 7, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0xa0, 0x3f, //
                0, 0, 0, 0, 0, 0, 0, 2, b'i', b'n', 0, 0, 0, 0, 0, 0, 0, 0, //
                0, 0, 0, 0, 0, 0, 0, 32
            ]
        );
        assert_eq!(Header::decode(&head), Ok(Some(HEADER)));
        assert_eq!(HEADER.header_bytes(), head.len());
        assert_eq!(HEADER.qber_ppm(), 31_250);
        assert_eq!(HEADER.qkd_key_id().as_str(), "16909060");
    }

    #[test]
    fn the_first_bit_of_a_record_is_the_lowest() {
        let mut key = [0; 2];
        decode_key(&[0b0000_0001, 0b1100_0000], &mut key).unwrap();
        assert_eq!(key, [0b1000_0000, 0b0000_0011]);
        assert_eq!(
            decode_key(&[1], &mut key),
            Err(R10Error::KeyLength {
                have_bytes: 2,
                need_bytes: 1
            })
        );
    }

    #[test]
    fn a_length_of_two_to_the_63_is_refused_before_it_is_used() {
        let mut head = encode_header(&HEADER, "in", "").unwrap();
        let at = head.len() - 8;
        head[at..].copy_from_slice(&(1_u64 << 63).to_be_bytes());
        assert_eq!(
            Header::decode(&head),
            Err(R10Error::TooLong {
                id: HEADER.id,
                field: "key",
                have_bytes: 1 << 63,
                max_bytes: MAX_KEY_BYTES
            })
        );
        head[21..29].copy_from_slice(&u64::MAX.to_be_bytes());
        assert!(matches!(
            Header::decode(&head),
            Err(R10Error::TooLong {
                field: "incoming scheme",
                ..
            })
        ));
    }

    #[test]
    fn only_amplified_and_authenticated_keys_are_keys() {
        let finals: Vec<_> = (0..=255)
            .filter_map(State::of)
            .filter(|s| s.is_final())
            .collect();
        assert_eq!(finals, [State::Amplified, State::Authenticated]);
        assert_eq!((0..=255).filter_map(State::of).count(), 10);
    }

    #[test]
    fn an_error_rate_that_is_no_rate_is_refused() {
        for rate in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
            let mut head = encode_header(&HEADER, "in", "").unwrap();
            head[13..21].copy_from_slice(&rate.to_le_bytes());
            let id = HEADER.id;
            assert_eq!(Header::decode(&head), Err(R10Error::ErrorRate { id }));
        }
    }

    proptest! {
        #[test]
        fn every_prefix_of_a_header_asks_for_more(cut in 0..47_usize) {
            let head = encode_header(&HEADER, "in", "").unwrap();
            prop_assert_eq!(Header::decode(&head[..cut]), Ok(None));
        }

        #[test]
        fn any_bytes_are_a_record_within_bounds_or_none(bytes: Vec<u8>) {
            if let Ok(Some(header)) = Header::decode(&bytes) {
                prop_assert!(header.header_bytes() <= bytes.len());
                prop_assert!(header.key_bytes <= MAX_KEY_BYTES);
            }
        }
    }
}
