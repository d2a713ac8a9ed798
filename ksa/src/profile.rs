//! What one request may ask for.

use qkd_keyfile::KeyBits;
use qkd_secmem::MAX_BLOCK_BYTES;

/// The limits that "Get status" tells applications. One that exists is consistent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Profile {
    key_size: KeyBits,
    min_key_size: KeyBits,
    max_key_size: KeyBits,
    max_keys_per_request: u32,
    max_additional_applications: u32,
}

/// Why limits are not consistent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// The default size is outside the limits, or the limits are the wrong way round.
    #[error("default key size {default_bits} bits is not within {min_bits} to {max_bits}")]
    DefaultSize {
        /// Default size.
        default_bits: u32,
        /// Shortest key.
        min_bits: u32,
        /// Longest key.
        max_bits: u32,
    },
    /// No block of key memory holds a key that long.
    #[error("longest key of {max_bits} bits exceeds {} bits", MAX_BLOCK_BYTES * 8)]
    KeyTooLong {
        /// Longest key.
        max_bits: u32,
    },
    /// A request must be allowed to ask for one key.
    #[error("a request must be allowed at least one key")]
    NoKeys,
    /// The longest reply would take too much memory.
    #[error("{keys} keys of {max_bits} bits make a reply of more than {MAX_REPLY_BYTES} bytes")]
    ReplyTooLong {
        /// Keys in one request.
        keys: u32,
        /// Longest key.
        max_bits: u32,
    },
}

impl Profile {
    /// Sets the limits: the default size, the shortest and the longest key, how many keys a
    /// request may ask for, and how many applications besides the first may get the same keys
    /// (0 for none).
    ///
    /// # Errors
    ///
    /// [`ProfileError`] names the limit to change.
    pub fn new(
        key_size: KeyBits,
        min_key_size: KeyBits,
        max_key_size: KeyBits,
        max_keys_per_request: u32,
        max_additional_applications: u32,
    ) -> Result<Self, ProfileError> {
        let max_bits = max_key_size.get();
        if !(min_key_size..=max_key_size).contains(&key_size) {
            return Err(ProfileError::DefaultSize {
                default_bits: key_size.get(),
                min_bits: min_key_size.get(),
                max_bits,
            });
        }
        if max_key_size.bytes() > MAX_BLOCK_BYTES {
            return Err(ProfileError::KeyTooLong { max_bits });
        }
        if max_keys_per_request == 0 {
            return Err(ProfileError::NoKeys);
        }
        let reply_bytes = (max_keys_per_request as usize)
            .checked_mul(max_key_size.bytes().div_ceil(3) * 4 + KEY_OVERHEAD_BYTES);
        if reply_bytes.is_none_or(|bytes| bytes > MAX_REPLY_BYTES) {
            return Err(ProfileError::ReplyTooLong {
                keys: max_keys_per_request,
                max_bits,
            });
        }
        Ok(Self {
            key_size,
            min_key_size,
            max_key_size,
            max_keys_per_request,
            max_additional_applications,
        })
    }

    /// `key_size`: the length of a key where a request does not say.
    #[must_use]
    pub const fn key_size(&self) -> KeyBits {
        self.key_size
    }

    /// `min_key_size`: the shortest key.
    #[must_use]
    pub const fn min_key_size(&self) -> KeyBits {
        self.min_key_size
    }

    /// `max_key_size`: the longest key.
    #[must_use]
    pub const fn max_key_size(&self) -> KeyBits {
        self.max_key_size
    }

    /// `max_key_per_request`: keys in one request.
    #[must_use]
    pub const fn max_keys_per_request(&self) -> u32 {
        self.max_keys_per_request
    }

    /// `max_SAE_ID_count`: applications besides the first that may get the same keys.
    #[must_use]
    pub const fn max_additional_applications(&self) -> u32 {
        self.max_additional_applications
    }
}

/// 16 MiB: what one connection can make the node hold for it.
const MAX_REPLY_BYTES: usize = 16 << 20;
/// JSON around each key of a reply, rounded up.
const KEY_OVERHEAD_BYTES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(bits: u32) -> KeyBits {
        bits.try_into().unwrap()
    }

    fn profile(default: u32, min: u32, max: u32, keys: u32) -> Result<Profile, ProfileError> {
        Profile::new(bits(default), bits(min), bits(max), keys, 0)
    }

    #[test]
    fn inconsistent_limits_are_refused() {
        assert!(profile(256, 64, 65_536, 128).is_ok());
        assert!(profile(256, 256, 256, 1).is_ok());
        for (default, min, max) in [(56, 64, 1024), (2048, 64, 1024), (256, 1024, 64)] {
            let refused = profile(default, min, max, 1).unwrap_err();
            assert!(matches!(refused, ProfileError::DefaultSize { .. }));
        }
        assert_eq!(profile(256, 64, 1024, 0), Err(ProfileError::NoKeys));
        let max_bits = 256 * 1024 * 8 + 8;
        assert_eq!(
            profile(256, 64, max_bits, 1),
            Err(ProfileError::KeyTooLong { max_bits })
        );
        assert_eq!(
            profile(256, 64, 65_536, 100_000),
            Err(ProfileError::ReplyTooLong {
                keys: 100_000,
                max_bits: 65_536
            })
        );
    }
}
