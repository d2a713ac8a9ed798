//! JSON from outside, read strictly (RFC 8259).
//!
//! [`parse`] reads one value and nothing after it: UTF-8, no member named twice in one object, no deep
//! nesting. Which numbers are integers is decided by how they are written: `1.0` is none.
//!
//! [`Object`] is what the signalling protocols carry. The documents name members as their tables print them ("Source KM ID") and give no JSON names; so
//! a member is found whether it is written that way, in snake_case or in camelCase. Names are
//! *normalised*: lower case, without spaces, `_` and `-`. Two members that are the same after that
//! are a duplicate, at any depth, and refuse the whole object.

use std::fmt;

use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Deserializer, Map, Value};

/// Deepest nesting of arrays and objects.
pub const MAX_DEPTH: usize = 16;

/// Reads exactly one value. Names of members are taken as they are written.
///
/// # Errors
///
/// Not strictly JSON; nothing of it can be used.
pub fn parse(bytes: &[u8]) -> Result<Value, serde_json::Error> {
    read(bytes, str::to_owned)
}

fn read(bytes: &[u8], name: fn(&str) -> String) -> Result<Value, serde_json::Error> {
    let mut deserializer = Deserializer::from_slice(bytes);
    let value = Strict { depth: 0, name }.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}

/// An object that was read strictly. Members that nobody asks for are ignored.
#[derive(Debug, Clone, PartialEq)]
pub struct Object(Map<String, Value>);

/// Why bytes are not an object.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JsonError {
    /// Not JSON (RFC 8259), not UTF-8, nested too deeply, a duplicate member, or something after the
    /// end.
    #[error("malformed JSON: {0}")]
    Malformed(#[from] serde_json::Error),
    /// JSON, but not an object.
    #[error("the payload is not a JSON object")]
    NotAnObject,
}

/// Why a member cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemberError {
    /// It is mandatory and not there.
    #[error("{name} is missing")]
    Missing {
        /// The member, in snake_case.
        name: &'static str,
    },
    /// It has another type than it should, or a number is out of its range.
    #[error("{name} is not {expected}")]
    Type {
        /// The member, in snake_case.
        name: &'static str,
        /// What it should be.
        expected: &'static str,
    },
}

impl Object {
    /// Reads exactly one object.
    ///
    /// # Errors
    ///
    /// [`JsonError`]; nothing of the object can be used.
    pub fn parse(bytes: &[u8]) -> Result<Self, JsonError> {
        match read(bytes, normalised)? {
            Value::Object(members) => Ok(Self(members)),
            _ => Err(JsonError::NotAnObject),
        }
    }

    /// A member by its snake_case name; `None` if it is absent or null.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0
            .get(&normalised(name))
            .filter(|value| !value.is_null())
    }

    /// A string.
    ///
    /// # Errors
    ///
    /// The member is there and no string.
    pub fn text(&self, name: &'static str) -> Result<Option<&str>, MemberError> {
        self.typed(name, "a string", Value::as_str)
    }

    /// A whole number of 0 to 2^32 - 1, written without fraction and exponent.
    ///
    /// # Errors
    ///
    /// The member is there and no such number.
    pub fn integer(&self, name: &'static str) -> Result<Option<u32>, MemberError> {
        self.typed(name, "an integer below 2^32", |value| {
            value.as_u64().and_then(|number| u32::try_from(number).ok())
        })
    }

    /// A whole number of 0 to 2^64 - 1, for our own messages.
    ///
    /// # Errors
    ///
    /// The member is there and no such number.
    pub fn long(&self, name: &'static str) -> Result<Option<u64>, MemberError> {
        self.typed(name, "an integer below 2^64", Value::as_u64)
    }

    /// True or false.
    ///
    /// # Errors
    ///
    /// The member is there and neither.
    pub fn flag(&self, name: &'static str) -> Result<Option<bool>, MemberError> {
        self.typed(name, "true or false", Value::as_bool)
    }

    /// An array of strings.
    ///
    /// # Errors
    ///
    /// The member is there and no such array.
    pub fn texts(&self, name: &'static str) -> Result<Option<Vec<&str>>, MemberError> {
        self.typed(name, "an array of strings", |value| {
            value.as_array()?.iter().map(Value::as_str).collect()
        })
    }

    /// An array of objects.
    ///
    /// # Errors
    ///
    /// The member is there and no such array.
    pub fn objects(&self, name: &'static str) -> Result<Option<Vec<Self>>, MemberError> {
        self.typed(name, "an array of objects", |value| {
            let all = value.as_array()?.iter();
            all.map(|one| one.as_object().cloned().map(Self)).collect()
        })
    }

    fn typed<'a, T>(
        &'a self,
        name: &'static str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, MemberError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match read(value) {
                None => Err(MemberError::Type { name, expected }),
                some => Ok(some),
            },
        }
    }
}

/// Makes an optional member mandatory: `required("response", object.text("response"))`.
///
/// # Errors
///
/// The member is absent, or `member` is an error already.
pub fn required<T>(
    name: &'static str,
    member: Result<Option<T>, MemberError>,
) -> Result<T, MemberError> {
    member?.ok_or(MemberError::Missing { name })
}

fn normalised(name: &str) -> String {
    name.chars()
        .filter(|c| !matches!(c, ' ' | '_' | '-'))
        .flat_map(char::to_lowercase)
        .collect()
}

/// Builds a [`Value`], and refuses what [`Value`] itself would swallow.
struct Strict {
    /// Arrays and objects around the value.
    depth: usize,
    /// What a member is called in the value.
    name: fn(&str) -> String,
}

impl Strict {
    fn inner<E: serde::de::Error>(&self) -> Result<Self, E> {
        if self.depth == MAX_DEPTH {
            return Err(E::custom(format_args!("nested deeper than {MAX_DEPTH}")));
        }
        Ok(Self {
            depth: self.depth + 1,
            name: self.name,
        })
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(item) = items.next_element_seed(self.inner()?)? {
            all.push(item);
        }
        Ok(Value::Array(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut all = Map::new();
        while let Some(name) = items.next_key::<String>()? {
            let name = (self.name)(&name);
            if all.contains_key(&name) {
                // The name comes from outside: shortened, and nothing but printable ASCII.
                let shown = name.escape_default().take(64).collect::<String>();
                return Err(A::Error::custom(format_args!("duplicate member {shown}")));
            }
            let value = items.next_value_seed(self.inner()?)?;
            all.insert(name, value);
        }
        Ok(Value::Object(all))
    }
}

#[cfg(test)]
mod tests {
    use super::{parse as parse_any, *};

    fn parse(text: &str) -> Result<Object, String> {
        Object::parse(text.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn without_normalising_names_are_what_is_written_and_numbers_how() {
        let text = br#" {"a":[1,-1,1.0,1e2,18446744073709551615,18446744073709551616],
            "A":null,"a b":true,"d":"\u00e9"} "#;
        let value = parse_any(text).unwrap();
        assert_eq!((&value["A"], &value["a b"]), (&Value::Null, &true.into()));
        assert_eq!(value["d"], "é");
        let integers: Vec<_> = value["a"]
            .as_array()
            .unwrap()
            .iter()
            .map(Value::as_u64)
            .collect();
        assert_eq!(integers, [Some(1), None, None, None, Some(u64::MAX), None]);
        let refused: [&[u8]; 7] = [
            b"",
            b"{} {}",
            b"{}x",
            b"{\"a\":1,}",
            b"\"\\ud800\"",
            b"{\"a\":1,\"a\":1}",
            b"{\"a\":1,\"\\u0061\":2}",
        ];
        for text in refused {
            assert!(parse_any(text).is_err(), "{}", text.escape_ascii());
        }
    }

    #[test]
    fn a_member_is_found_however_its_name_is_written() {
        for name in [
            "key_relay_request_id",
            "Key relay request ID",
            "keyRelayRequestId",
            "KEY-RELAY-REQUEST-ID",
        ] {
            let object =
                parse(&format!(r#"{{"{name}": "x", "other": [1.5, null, {{}}]}}"#)).unwrap();
            assert_eq!(object.text("key_relay_request_id"), Ok(Some("x")));
        }
    }

    #[test]
    fn duplicates_are_refused_at_any_depth() {
        for text in [r#"{"a b":1,"aB":2}"#, r#"{"x":[{"a":{"k":1,"K":1}}]}"#] {
            assert!(
                parse(text).unwrap_err().contains("duplicate member"),
                "{text}"
            );
        }
        let hostile = "\u{1b}[31m".repeat(100).replace('\u{1b}', "\\u001b");
        let error = parse(&format!(r#"{{"{hostile}":1,"{hostile}":1}}"#)).unwrap_err();
        assert!(
            error.is_ascii() && !error.contains('\u{1b}') && error.len() < 200,
            "{error}"
        );
    }

    #[test]
    fn exactly_one_object_is_taken() {
        assert!(parse(" {} ").is_ok());
        for text in [
            "",
            " ",
            "{}{}",
            "{} x",
            "{",
            "{'a':1}",
            r#"{"a":01}"#,
            r#"{"a":NaN}"#,
            r#"{"a":1e999}"#,
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        for text in ["[]", "1", "null", "\"x\""] {
            assert_eq!(parse(text).unwrap_err(), "the payload is not a JSON object");
        }
        assert!(Object::parse(b"{\"a\":\"\xff\"}").is_err());
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth: usize| format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
        assert!(parse(&nested(MAX_DEPTH - 1)).is_ok());
        assert!(
            parse(&nested(MAX_DEPTH))
                .unwrap_err()
                .contains("nested deeper")
        );
        assert!(parse(&nested(60_000)).is_err());
    }

    #[test]
    fn members_have_their_type_or_are_refused() {
        let text = r#"{"n":4294967295,"big":4294967296,"neg":-1,"f":1.0,"s":"x","a":["x",1],"o":[{"K":1}],"z":null,"b":true}"#;
        let object = parse(text).unwrap();
        assert_eq!(object.integer("n"), Ok(Some(u32::MAX)));
        assert_eq!(object.long("big"), Ok(Some(1 << 32)));
        for name in ["big", "neg", "f", "s"] {
            assert!(object.integer(name).is_err(), "{name}");
        }
        assert_eq!(object.flag("b"), Ok(Some(true)));
        assert_eq!(object.text("z"), Ok(None));
        assert!(
            object.text("n").is_err() && object.texts("a").is_err() && object.texts("s").is_err()
        );
        assert_eq!(
            object.objects("o").unwrap().unwrap()[0].integer("k"),
            Ok(Some(1))
        );
        assert!(object.objects("a").is_err());
        assert_eq!(
            required("missing", object.text("missing")),
            Err(MemberError::Missing { name: "missing" })
        );
    }
}
