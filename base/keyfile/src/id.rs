//! Identities: 1 to 64 characters of RFC 3986, compared byte by byte.
//!
//! The rule is the one of ETSI GS QKD 020 for application IDs, used for every name here: it bounds
//! messages, and no name can carry a line break into a log.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

/// Longest name, in characters (which are bytes: the alphabet is ASCII).
pub const MAX_ID_CHARS: usize = 64;

/// Why a text is not an identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdError {
    /// The text is empty.
    #[error("an ID has at least one character")]
    Empty,
    /// The text is longer than [`MAX_ID_CHARS`].
    #[error("ID has {chars} characters, {MAX_ID_CHARS} at most")]
    TooLong {
        /// Length of the text, in characters.
        chars: usize,
    },
    /// The text has a character that RFC 3986 does not allow in a URI.
    #[error("ID holds {found:?}, which is no RFC 3986 character")]
    Character {
        /// The first such character.
        found: char,
    },
    /// The text is not a UUID (RFC 9562, 36 characters) or not 32 hexadecimal digits.
    #[error("not a 128-bit ID in hexadecimal")]
    NotHex,
}

fn check(text: &str) -> Result<(), IdError> {
    if text.is_empty() {
        return Err(IdError::Empty);
    }
    if let Some(found) = text.chars().find(|&c| !is_rfc3986(c)) {
        return Err(IdError::Character { found });
    }
    if text.len() > MAX_ID_CHARS {
        return Err(IdError::TooLong { chars: text.len() });
    }
    Ok(())
}

/// Unreserved, general and sub-delimiters, and the percent sign (RFC 3986, clause 2).
fn is_rfc3986(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-._~:/?#[]@!$&'()*+,;=%".contains(c)
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                check(text)?;
                Ok(Self(text.into()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.as_str().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }
    };
}

name! {
    /// A node: one key manager (KM), with one KMA and at most one KSA.
    NodeId
}
name! {
    /// An application that asks for keys (ETSI GS QKD 014: an SAE).
    AppId
}
name! {
    /// A pair of QKD modules on one link; both ends configure the same name.
    ModulePairId
}
name! {
    /// One QKD module, transmitter or receiver.
    ModuleId
}
name! {
    /// The vendor's ID of a QKD-key, unique only within one generation of one module pair.
    QkdKeyId
}

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            /// Lower-case hexadecimal in the five groups of a UUID (RFC 9562, clause 4).
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                for (i, byte) in self.0.iter().enumerate() {
                    if matches!(i, 4 | 6 | 8 | 10) {
                        f.write_str("-")?;
                    }
                    write!(f, "{byte:02x}")?;
                }
                Ok(())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            /// Takes the 36 characters of a UUID, in either case.
            fn from_str(text: &str) -> Result<Self, IdError> {
                let groups: Vec<&str> = text.split('-').collect();
                let lengths: Vec<usize> = groups.iter().map(|g| g.len()).collect();
                if lengths != [8, 4, 4, 4, 12] {
                    return Err(IdError::NotHex);
                }
                let digits = groups.concat();
                let mut bytes = [0; 16];
                for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks(2)) {
                    let high = char::from(pair[0]).to_digit(16).ok_or(IdError::NotHex)?;
                    let low = char::from(pair[1]).to_digit(16).ok_or(IdError::NotHex)?;
                    *byte = u8::try_from(high << 4 | low).map_err(|_| IdError::NotHex)?;
                }
                Ok(Self(bytes))
            }
        }
    };
}

hex_id! {
    /// KMA-key ID: one per segment, equal at both ends, unique in the QKDN (Y.3803 Table 1 (2)).
    ///
    /// Derived from names alone, never from key bits.
    KmaKeyId
}
hex_id! {
    /// KSA-key ID: a UUIDv4 that the owner draws at supply (Y.3803 Table 1 (4)).
    KsaKeyId
}

impl KsaKeyId {
    /// A version 4, variant 1 UUID (RFC 9562, clause 5.4) over 16 random bytes.
    #[must_use]
    pub fn from_random(mut bytes: [u8; 16]) -> Self {
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Self(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_to_64_rfc3986_characters() {
        assert_eq!("".parse::<NodeId>(), Err(IdError::Empty));
        assert!("a".repeat(64).parse::<NodeId>().is_ok());
        assert_eq!(
            "a".repeat(65).parse::<NodeId>(),
            Err(IdError::TooLong { chars: 65 })
        );
        assert_eq!(
            "line\nbreak".parse::<AppId>(),
            Err(IdError::Character { found: '\n' })
        );
        assert!("urn:x/y?z=%20#[1]@!$&'()*+,;~".parse::<AppId>().is_ok());
    }

    #[test]
    fn names_differ_by_case() {
        assert_ne!(
            "Alice".parse::<NodeId>().unwrap(),
            "alice".parse::<NodeId>().unwrap()
        );
    }

    #[test]
    fn an_invalid_name_is_refused_by_serde_too() {
        assert!(postcard::from_bytes::<NodeId>(b"\x02a b").is_err());
        let name: NodeId = postcard::from_bytes(b"\x02ab").unwrap();
        assert_eq!(name.as_str(), "ab");
    }

    #[test]
    fn key_ids_print_as_uuids_and_parse_back() {
        let id = KsaKeyId::from_random([0xff; 16]);
        assert_eq!(id.to_string(), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.to_string().to_uppercase().parse(), Ok(id));
        for bad in [
            "",
            "ffffffffffff4fffbfffffffffffffff",
            "ffffffff-ffff-4fff-bfff-fffffffffffg",
            "ffffffff-ffff-4fff-bffff-fffffffffff",
            "éffffff-ffff-4fff-bfff-fffffffffff",
        ] {
            assert_eq!(bad.parse::<KsaKeyId>(), Err(IdError::NotHex), "{bad}");
        }
    }
}
