//! What the bridge says on the Unix socket when a producer connects.
//!
//! The socket is `SOCK_SEQPACKET`; the bridge listens. To each producer whose user it trusts
//! (`SO_PEERCRED`) it sends one message of these 40 bytes with two descriptors (`SCM_RIGHTS`), first
//! the sealed memfd of the ring, then the eventfd that the producer writes to wake the bridge. The
//! producer sends nothing; either side ends the connection by closing it.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0-7 | magic | `QKDGREET` |
//! | 8-11 | version | [`VERSION`] |
//! | 12-15 | reserved | 0 |
//! | 16-23 | generation | of the ring, equal to that in its header |
//! | 24-31 | last durable block number | 2^64 - 1 if there is none |
//! | 32-39 | session | that the number belongs to; 0 if the bridge knows of none |
//!
//! All integers are little-endian. **The rule of resending**: blocks go into a ring in ascending
//! order of number, and after a greeting the producer begins with the first block above the last
//! durable number, or with the oldest that it has if the session is not its own. It may forget a block only when a greeting, or the ring's `durable` field, has
//! named it or a later one; that the consumer has read a block is not enough.

#![forbid(unsafe_code)]

/// First bytes of a greeting.
pub const MAGIC: [u8; 8] = *b"QKDGREET";

/// The version of greeting and ring that this code speaks.
pub const VERSION: u32 = 1;

/// Bytes of a greeting.
pub const GREETING_BYTES: usize = 40;

const NONE: u64 = u64::MAX;

/// The bridge's first and only message to a producer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// Generation of the ring that comes with it.
    pub generation: u64,
    /// Highest block number of the session that the bridge holds durably; `None` if it holds none.
    pub last_durable: Option<u64>,
    /// The device's numbering that the bridge knows; 0 if it knows none.
    pub session: u64,
}

impl Greeting {
    /// Highest block number that the bridge holds durably, to a device in `session`.
    #[must_use]
    pub fn durable_in(&self, session: std::num::NonZeroU64) -> Option<u64> {
        self.last_durable.filter(|_| self.session == session.get())
    }
}

/// Why bytes are not a greeting. Close the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GreetingError {
    /// Not as long as a greeting.
    #[error("greeting of {bytes} bytes, {GREETING_BYTES} expected")]
    Length {
        /// Bytes given.
        bytes: usize,
    },
    /// The first bytes are another protocol's.
    #[error("does not begin with the greeting magic")]
    Magic,
    /// A version that this code does not speak.
    #[error("greeting version {version}, {VERSION} expected")]
    Version {
        /// The version found.
        version: u32,
    },
}

impl Greeting {
    /// The greeting's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; GREETING_BYTES] {
        let mut out = [0; GREETING_BYTES];
        out[0..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[16..24].copy_from_slice(&self.generation.to_le_bytes());
        out[24..32].copy_from_slice(&self.last_durable.unwrap_or(NONE).to_le_bytes());
        out[32..40].copy_from_slice(&self.session.to_le_bytes());
        out
    }

    /// Reads a greeting.
    ///
    /// # Errors
    ///
    /// See [`GreetingError`]: close the connection.
    pub fn decode(bytes: &[u8]) -> Result<Self, GreetingError> {
        let Ok(bytes) = <&[u8; GREETING_BYTES]>::try_from(bytes) else {
            return Err(GreetingError::Length { bytes: bytes.len() });
        };
        let word = |at: usize| {
            bytes[at..at + 8]
                .iter()
                .rev()
                .fold(0_u64, |value, &byte| value << 8 | u64::from(byte))
        };
        if bytes[..8] != MAGIC {
            return Err(GreetingError::Magic);
        }
        let version = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        if version != VERSION {
            return Err(GreetingError::Version { version });
        }
        let last_durable = word(24);
        Ok(Self {
            generation: word(16),
            last_durable: (last_durable != NONE).then_some(last_durable),
            session: word(32),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_reads_back() {
        for last_durable in [None, Some(0), Some(u64::MAX - 1)] {
            let greeting = Greeting {
                generation: 0x0102_0304_0506_0708,
                last_durable,
                session: 0x1112_1314_1516_1718,
            };
            let bytes = greeting.encode();
            assert_eq!(bytes[16..24], [8, 7, 6, 5, 4, 3, 2, 1]);
            assert_eq!(Greeting::decode(&bytes), Ok(greeting));
        }
    }

    #[test]
    fn another_protocol_length_or_version_is_refused() {
        let good = Greeting {
            generation: 1,
            last_durable: None,
            session: 0,
        }
        .encode();
        assert_eq!(
            Greeting::decode(&good[..39]),
            Err(GreetingError::Length { bytes: 39 })
        );
        let mut bad = good;
        bad[0] = b'q';
        assert_eq!(Greeting::decode(&bad), Err(GreetingError::Magic));
        bad = good;
        bad[8] = 2;
        assert_eq!(
            Greeting::decode(&bad),
            Err(GreetingError::Version { version: 2 })
        );
    }
}
