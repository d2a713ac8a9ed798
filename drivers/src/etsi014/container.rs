//! Key containers of ETSI GS QKD 014 V1.1.1, clause 6.3, read where they lie.

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use qkd_keyfile::QkdKeyId;
use serde::Deserialize;
use zeroize::Zeroizing;

/// A key with its ID.
pub(super) struct Pulled {
    pub(super) id: QkdKeyId,
    pub(super) key: Zeroizing<Vec<u8>>,
}

/// Why a body is no key container. Tells nothing of the body, which may hold key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ContainerError {
    /// Not the JSON of a key container.
    #[error("the answer is no key container")]
    Malformed,
    /// More keys than were asked for.
    #[error("{have} keys, {asked} asked for")]
    TooMany {
        /// Keys in the answer.
        have: usize,
        /// Keys asked for.
        asked: usize,
    },
    /// A `key_ID` that cannot be a QKD-key ID, or is there twice, or was not asked for.
    #[error("a key_ID that cannot be")]
    Id,
    /// A key that is no base64, or not of the length asked for.
    #[error("a key that is not {key_bits} bits in base64")]
    Key {
        /// Bits asked for.
        key_bits: u32,
    },
}

#[derive(Deserialize)]
struct Container<'a> {
    #[serde(borrow)]
    keys: Vec<Entry<'a>>,
}

/// Extensions, which are ignored, are not named here.
#[derive(Deserialize)]
struct Entry<'a> {
    #[serde(rename = "key_ID")]
    id: &'a str,
    key: &'a str,
}

/// Reads a key container of at most `asked` keys of `key_bits` each; all or none are taken.
///
/// Escaped slashes, which some writers put into base64, are resolved in `body` itself: nothing is copied
/// but each key to memory of its own, which is wiped.
pub(super) fn parse(
    body: &mut [u8],
    asked: usize,
    key_bits: u32,
) -> Result<Vec<Pulled>, ContainerError> {
    let len = unescape_slashes(body);
    let container: Container<'_> =
        serde_json::from_slice(&body[..len]).map_err(|_| ContainerError::Malformed)?;
    let have = container.keys.len();
    if have > asked {
        return Err(ContainerError::TooMany { have, asked });
    }
    let wrong_key = ContainerError::Key { key_bits };
    let key_bytes = key_bits as usize / 8;
    let mut pulled: Vec<Pulled> = Vec::with_capacity(have);
    for entry in container.keys {
        let id: QkdKeyId = entry.id.parse().map_err(|_| ContainerError::Id)?;
        if pulled.iter().any(|other| other.id == id) {
            return Err(ContainerError::Id);
        }
        // As long as the digits may say, so that it never moves.
        let mut key = Zeroizing::new(vec![0; entry.key.len().div_ceil(4) * 3]);
        let len = BASE64.decode_slice(entry.key, &mut key);
        if len.map_err(|_| wrong_key)? != key_bytes {
            return Err(wrong_key);
        }
        key.truncate(key_bytes);
        pulled.push(Pulled { id, key });
    }
    Ok(pulled)
}

/// Turns every `\/` into `/`; returns the new length.
fn unescape_slashes(body: &mut [u8]) -> usize {
    let (mut from, mut to) = (0, 0);
    while from < body.len() {
        match (body[from], body.get(from + 1)) {
            (b'\\', Some(b'/')) => from += 1,
            // Whatever is escaped here cannot begin an escape.
            (b'\\', Some(_)) => {
                body[to] = body[from];
                (from, to) = (from + 1, to + 1);
            }
            _ => {}
        }
        body[to] = body[from];
        (from, to) = (from + 1, to + 1);
    }
    to
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<(String, Vec<u8>)>, ContainerError> {
        let pulled = parse(&mut text.as_bytes().to_vec(), 2, 24)?;
        let pair = |one: Pulled| (one.id.as_str().to_owned(), one.key.to_vec());
        Ok(pulled.into_iter().map(pair).collect())
    }

    #[test]
    fn keys_come_with_their_ids_and_extensions_are_ignored() {
        let text = r#"{"keys":[{"key_ID":"a","key_ID_extension":{"x":[1]},"key":"AP\/+"},
            {"key":"AQID","key_ID":"b"}],"key_container_extension":{}}"#;
        assert_eq!(
            read(text),
            Ok(vec![
                ("a".to_owned(), vec![0, 0xff, 0xfe]),
                ("b".to_owned(), vec![1, 2, 3]),
            ])
        );
        assert_eq!(read(r#"{"keys":[]}"#), Ok(Vec::new()));
    }

    #[test]
    fn what_is_no_container_is_refused_without_a_word_of_it() {
        let key = ContainerError::Key { key_bits: 24 };
        for (text, error) in [
            ("", ContainerError::Malformed),
            ("[]", ContainerError::Malformed),
            (r#"{"keys":[{"key_ID":"a"}]}"#, ContainerError::Malformed),
            (r#"{"keys":["AQID"]}"#, ContainerError::Malformed),
            (
                r#"{"keys":[{"key_ID":"a","key":"AQ\u0049D"}]}"#,
                ContainerError::Malformed,
            ),
            (
                r#"{"keys":[{"key_ID":"a b","key":"AQID"}]}"#,
                ContainerError::Id,
            ),
            (
                r#"{"keys":[{"key_ID":"","key":"AQID"}]}"#,
                ContainerError::Id,
            ),
            (
                r#"{"keys":[{"key_ID":"a","key":"AQID"},{"key_ID":"a","key":"AQID"}]}"#,
                ContainerError::Id,
            ),
            (r#"{"keys":[{"key_ID":"a","key":"AQI="}]}"#, key),
            (r#"{"keys":[{"key_ID":"a","key":"AQIDBA=="}]}"#, key),
            (r#"{"keys":[{"key_ID":"a","key":"????"}]}"#, key),
        ] {
            assert_eq!(read(text), Err(error), "{text}");
        }
        let three = r#"{"keys":[{"key_ID":"a","key":"AQID"},{"key_ID":"b","key":"AQID"},{"key_ID":"c","key":"AQID"}]}"#;
        let (have, asked) = (3, 2);
        assert_eq!(read(three), Err(ContainerError::TooMany { have, asked }));
    }

    #[test]
    fn only_an_escaped_slash_is_resolved() {
        for (before, after) in [
            (r"a\/b", "a/b"),
            (r"\\/", r"\\/"),
            (r#"\"\/"#, r#"\"/"#),
            ("\\", "\\"),
        ] {
            let mut bytes = before.as_bytes().to_vec();
            let len = unescape_slashes(&mut bytes);
            assert_eq!(&bytes[..len], after.as_bytes(), "{before}");
        }
    }
}
