//! Files of hexadecimal keys, one a line, called `<peer>_<n>`.
//!
//! File `n` holds the keys `n * block` to `n * block + block - 1` of the peer, where the block is a
//! setting of both ends (4,096 in the original). A line's number is therefore a key's number: the
//! QKD-key ID is `<peer>_<number>`. A line ends with a line feed, with a carriage return before it
//! or without; the first digit of a line holds the first bits of the key.
//!
//! Source: the key files that the QLL key provider reads (`qllBlockSz`); the layout is a fact, this
//! code is its own.

/// Keys of a file, where nothing else is configured.
pub const USUAL_BLOCK_KEYS: u32 = 4096;

/// Longest key that is read or written, in bytes.
pub const MAX_KEY_BYTES: usize = 4096;

/// Longest line, with its end, in bytes.
pub const MAX_LINE_BYTES: usize = 2 * MAX_KEY_BYTES + 2;

/// Why a line is no key. Nothing was written that is not wiped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HexLineError {
    /// Half a byte is missing.
    #[error("{digits} hexadecimal digits, an even number expected")]
    OddDigits {
        /// Digits of the line.
        digits: usize,
    },
    /// The line has no key.
    #[error("the line is empty")]
    Empty,
    /// The key is longer than [`MAX_KEY_BYTES`] or than `out`.
    #[error("a key of {have_bytes} bytes, {max_bytes} at most")]
    TooLong {
        /// Bytes of the key.
        have_bytes: usize,
        /// The bound.
        max_bytes: usize,
    },
    /// Something other than a hexadecimal digit. It may be key: only its place is told.
    #[error("the character at {at} is no hexadecimal digit")]
    Digit {
        /// Its place in the line, from 0.
        at: usize,
    },
}

/// What a file's name says: the peer, and the number of the file.
///
/// `None` if no file of keys is called so: the number is decimal, without leading zeros.
#[must_use]
pub fn parse_name(name: &str) -> Option<(&str, u64)> {
    let (peer, number) = name.rsplit_once('_')?;
    let plain = number == "0" || !number.starts_with('0');
    let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let number = (plain && digits).then(|| number.parse().ok()).flatten()?;
    (!peer.is_empty()).then_some((peer, number))
}

/// A file's name; the opposite of [`parse_name`].
#[must_use]
pub fn file_name(peer: &str, number: u64) -> String {
    format!("{peer}_{number}")
}

/// The number of the key on line `line` (from 0) of file `file`; `None` if it is beyond 64 bits.
#[must_use]
pub fn key_number(file: u64, line: u32, block_keys: u32) -> Option<u64> {
    file.checked_mul(block_keys.into())?
        .checked_add(line.into())
}

/// Reads the key of a line, without its line feed, to the start of `out`; returns its bytes.
///
/// Takes as long for every key of a length: no table is indexed by a digit.
///
/// # Errors
///
/// See [`HexLineError`]; `out` was overwritten with zeros as far as it was written.
pub fn decode(line: &[u8], out: &mut [u8]) -> Result<usize, HexLineError> {
    let digits = line.strip_suffix(b"\r").unwrap_or(line);
    if digits.is_empty() {
        return Err(HexLineError::Empty);
    }
    if !digits.len().is_multiple_of(2) {
        return Err(HexLineError::OddDigits {
            digits: digits.len(),
        });
    }
    let (have_bytes, max_bytes) = (digits.len() / 2, out.len().min(MAX_KEY_BYTES));
    if have_bytes > max_bytes {
        return Err(HexLineError::TooLong {
            have_bytes,
            max_bytes,
        });
    }
    let out = &mut out[..have_bytes];
    let mut bad = 0;
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        let (high, low) = (value(pair[0]), value(pair[1]));
        bad |= high | low;
        *byte = high << 4 | low & 0xf;
    }
    if bad & INVALID != 0 {
        zeroize::Zeroize::zeroize(out);
        let at = digits
            .iter()
            .position(|digit| !digit.is_ascii_hexdigit())
            .unwrap_or(0);
        return Err(HexLineError::Digit { at });
    }
    Ok(have_bytes)
}

/// Writes a key as a line with its line feed, in lower case, to the start of `out`; returns the
/// line's bytes.
///
/// # Errors
///
/// [`HexLineError::Empty`] or [`HexLineError::TooLong`]: nothing was written.
pub fn encode(key: &[u8], out: &mut [u8]) -> Result<usize, HexLineError> {
    if key.is_empty() {
        return Err(HexLineError::Empty);
    }
    let max_bytes = MAX_KEY_BYTES.min(out.len().saturating_sub(1) / 2);
    if key.len() > max_bytes {
        return Err(HexLineError::TooLong {
            have_bytes: key.len(),
            max_bytes,
        });
    }
    let len = 2 * key.len();
    for (pair, byte) in out.chunks_exact_mut(2).zip(key) {
        pair[0] = digit(byte >> 4);
        pair[1] = digit(byte & 0xf);
    }
    out[len] = b'\n';
    Ok(len + 1)
}

const INVALID: u8 = 0xf0;

/// The digit's value, or something with a bit of [`INVALID`].
const fn value(digit: u8) -> u8 {
    let decimal = in_range(digit, b'0', b'9') & digit.wrapping_sub(b'0');
    let lower = digit | 0x20;
    let letter = in_range(lower, b'a', b'f') & lower.wrapping_sub(b'a' - 10);
    let valid = in_range(digit, b'0', b'9') | in_range(lower, b'a', b'f');
    decimal | letter | (!valid & INVALID)
}

/// All ones if `low <= byte <= high`, else zero; without a branch.
const fn in_range(byte: u8, low: u8, high: u8) -> u8 {
    let (byte, low, high) = (byte as i16, low as i16, high as i16);
    // The sign bit of either difference says that the byte is outside.
    let outside = (byte - low) | (high - byte);
    (!(outside >> 15) & 0xff).to_le_bytes()[0]
}

/// The lower-case digit of a value below 16; without a branch.
const fn digit(value: u8) -> u8 {
    value + b'0' + (in_range(value, 10, 15) & (b'a' - b'0' - 10))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_give_the_peer_and_the_number() {
        assert_eq!(parse_name("bob_0"), Some(("bob", 0)));
        assert_eq!(parse_name("site_b_17"), Some(("site_b", 17)));
        for name in [
            "bob",
            "_1",
            "bob_",
            "bob_01",
            "bob_1x",
            "bob_-1",
            "bob_99999999999999999999",
        ] {
            assert_eq!(parse_name(name), None, "{name:?}");
        }
        assert_eq!(parse_name(&file_name("a_b", 9)), Some(("a_b", 9)));
    }

    #[test]
    fn a_line_has_one_number_in_all_files() {
        assert_eq!(key_number(2, 5, 4096), Some(8197));
        assert_eq!(key_number(u64::MAX, 0, 2), None);
    }

    #[test]
    fn what_is_no_key_is_refused_and_leaves_no_digit_behind() {
        let mut out = [0; 4];
        assert_eq!(decode(b"", &mut out), Err(HexLineError::Empty));
        assert_eq!(
            decode(b"abc", &mut out),
            Err(HexLineError::OddDigits { digits: 3 })
        );
        assert_eq!(
            decode(b"0011223344", &mut out),
            Err(HexLineError::TooLong {
                have_bytes: 5,
                max_bytes: 4
            })
        );
        assert_eq!(
            decode(b"ff0g", &mut out),
            Err(HexLineError::Digit { at: 3 })
        );
        assert_eq!(out, [0; 4]);
    }

    #[test]
    fn every_byte_is_judged_as_the_standard_library_judges_it() {
        for byte in 0..=u8::MAX {
            let mut out = [0];
            let expected = char::from(byte).to_digit(16);
            assert_eq!(
                decode(&[b'0', byte], &mut out).is_ok(),
                expected.is_some(),
                "{byte:#x}"
            );
            assert_eq!(u32::from(out[0]), expected.unwrap_or(0), "{byte:#x}");
        }
    }

    proptest! {
        #[test]
        fn a_key_comes_back(key in prop::collection::vec(any::<u8>(), 1..100), crlf: bool) {
            let mut line = vec![0; 2 * key.len() + 1];
            let len = encode(&key, &mut line).unwrap();
            prop_assert_eq!(line.pop(), Some(b'\n'));
            prop_assert_eq!(len, line.len() + 1);
            if crlf {
                line.push(b'\r');
            }
            let mut out = vec![0; key.len()];
            prop_assert_eq!(decode(&line, &mut out), Ok(key.len()));
            prop_assert_eq!(out, key);
        }
    }
}
