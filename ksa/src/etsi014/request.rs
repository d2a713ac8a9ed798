//! Requests of ETSI GS QKD 014 V1.1.1, read from query strings and JSON bodies.

use std::collections::BTreeSet;

use qkd_keyfile::{AppId, KeyBits, KsaKeyId, metadata::SecurityLevel};
use qkd_net::json;
use serde_json::{Map, Value};

use crate::{Profile, SupplyError, supply::EXTENSION_NOT_MET};

/// A key request (clause 6.2), within the limits of a profile.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct KeyRequest {
    pub(super) number: u32,
    pub(super) size: KeyBits,
    pub(super) additional: Vec<AppId>,
    pub(super) level: SecurityLevel,
}

/// Why a request was not put to the supply.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error(transparent)]
    Form(#[from] FormError),
    #[error(transparent)]
    Supply(#[from] SupplyError),
}

/// The request does not have the form of the standard. Status 400; `Display` is public.
#[derive(Debug, thiserror::Error)]
pub(super) enum FormError {
    #[error("bad request format: {0}")]
    Json(#[from] serde_json::Error),
    #[error("bad request format: the body shall be a JSON object")]
    NotAnObject,
    #[error("bad request format: {name} shall be {kind}")]
    Type {
        name: &'static str,
        kind: &'static str,
    },
    #[error("bad request format: a member is unknown")]
    UnknownMember,
    #[error("bad request format: the query cannot be read")]
    Query,
    #[error("bad request format: a GET has number and size, each once at most; else use POST")]
    KeyParameters,
    #[error("bad request format: a GET has one key_ID and nothing else; else use POST")]
    KeyIdParameter,
    #[error("bad request format: a POST has no query")]
    QueryOfPost,
    #[error("bad request format: an SAE ID has 1 to 64 characters of RFC 3986")]
    SaeId,
    #[error("bad request format: an SAE ID is named twice")]
    SaeIdTwice,
    #[error("bad request format: a key_ID shall be a UUID")]
    KeyId,
    #[error("bad request format: a key_ID is named twice")]
    KeyIdTwice,
    #[error("bad request format: there shall be at least one key_ID")]
    NoKeyId,
    #[error("bad request format: number shall be at least 1")]
    NumberZero,
    #[error("bad request format: the body has more than {most} bytes")]
    BodyTooLong { most: usize },
    #[error("bad request format: the body did not arrive")]
    BodyLost,
    /// Clause 6.2 fixes this text.
    #[error("not all extension_mandatory parameters are supported")]
    ExtensionsUnsupported { names: Vec<String> },
    #[error("{EXTENSION_NOT_MET}")]
    ExtensionNotMet,
}

impl KeyRequest {
    /// Clause 5, Get key: GET with nothing but `number` and `size`.
    pub(super) fn from_query(
        parameters: &[(String, String)],
        profile: &Profile,
    ) -> Result<Self, Refusal> {
        let (mut number, mut size) = (None, None);
        for (name, value) in parameters {
            let (slot, name) = match name.as_str() {
                "number" => (&mut number, "number"),
                "size" => (&mut size, "size"),
                _ => return Err(FormError::KeyParameters.into()),
            };
            let digits = value.bytes().all(|byte| byte.is_ascii_digit());
            let value = value.parse().ok().filter(|_| digits);
            let value = value.ok_or(FormError::Type {
                name,
                kind: "an integer",
            })?;
            if slot.replace(value).is_some() {
                return Err(FormError::KeyParameters.into());
            }
        }
        Self::checked(number, size, Vec::new(), SecurityLevel::Any, profile)
    }

    /// Clause 6.2: POST with a key request.
    pub(super) fn from_json(body: &[u8], profile: &Profile) -> Result<Self, Refusal> {
        let mut members = object(body)?;
        let number = integer(&mut members, "number")?;
        let size = integer(&mut members, "size")?;
        let additional = sae_ids(&mut members)?;
        let level = mandatory_extensions(array(&mut members, "extension_mandatory")?)?;
        for extension in array(&mut members, "extension_optional")? {
            as_extension(extension, "extension_optional")?;
        }
        nothing_left(&members)?;
        Self::checked(number, size, additional, level, profile)
    }

    fn checked(
        number: Option<u64>,
        size: Option<u64>,
        additional: Vec<AppId>,
        level: SecurityLevel,
        profile: &Profile,
    ) -> Result<Self, Refusal> {
        let number = at_most(number.unwrap_or(1), profile)?;
        if number == 0 {
            return Err(FormError::NumberZero.into());
        }
        let most = profile.max_additional_applications();
        if additional.len() > most as usize {
            let asked = additional.len();
            return Err(SupplyError::TooManyApplications { asked, most }.into());
        }
        Ok(Self {
            number,
            size: size.map_or(Ok(profile.key_size()), |bits| key_size(bits, profile))?,
            additional,
            level,
        })
    }
}

/// Clause 5, Get key with key IDs: GET for exactly one key.
pub(super) fn key_id_from_query(parameters: &[(String, String)]) -> Result<KsaKeyId, Refusal> {
    match parameters {
        [(name, value)] if name == "key_ID" => Ok(value.parse().map_err(|_| FormError::KeyId)?),
        _ => Err(FormError::KeyIdParameter.into()),
    }
}

/// Clause 6.4: POST with key IDs.
pub(super) fn key_ids_from_json(body: &[u8], profile: &Profile) -> Result<Vec<KsaKeyId>, Refusal> {
    let mut members = object(body)?;
    let items = array(&mut members, "key_IDs")?;
    optional_object(&mut members, "key_IDs_extension")?;
    nothing_left(&members)?;
    at_most(items.len() as u64, profile)?;

    let ids = items
        .into_iter()
        .map(key_id)
        .collect::<Result<Vec<KsaKeyId>, FormError>>()?;
    if ids.is_empty() {
        return Err(FormError::NoKeyId.into());
    }
    if ids.iter().collect::<BTreeSet<_>>().len() < ids.len() {
        return Err(FormError::KeyIdTwice.into());
    }
    Ok(ids)
}

/// An SAE ID, once percent-encoding is undone.
pub(super) fn sae_id(text: &str) -> Result<AppId, FormError> {
    text.parse().map_err(|_| FormError::SaeId)
}

type Members = Map<String, Value>;

fn object(body: &[u8]) -> Result<Members, FormError> {
    match json::parse(body)? {
        Value::Object(members) => Ok(members),
        _ => Err(FormError::NotAnObject),
    }
}

fn nothing_left(members: &Members) -> Result<(), FormError> {
    if members.is_empty() {
        return Ok(());
    }
    Err(FormError::UnknownMember)
}

fn integer(members: &mut Members, name: &'static str) -> Result<Option<u64>, FormError> {
    match members.remove(name) {
        None => Ok(None),
        Some(value) => value.as_u64().map(Some).ok_or(FormError::Type {
            name,
            kind: "an integer",
        }),
    }
}

fn array(members: &mut Members, name: &'static str) -> Result<Vec<Value>, FormError> {
    match members.remove(name) {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) => Ok(items),
        Some(_) => Err(FormError::Type {
            name,
            kind: "an array",
        }),
    }
}

/// Extensions of key IDs are objects that no vendor has told us to understand.
fn optional_object(members: &mut Members, name: &'static str) -> Result<(), FormError> {
    match members.remove(name) {
        None | Some(Value::Object(_)) => Ok(()),
        Some(_) => Err(FormError::Type {
            name,
            kind: "an object",
        }),
    }
}

fn key_id(item: Value) -> Result<KsaKeyId, FormError> {
    let Value::Object(mut members) = item else {
        return Err(FormError::Type {
            name: "an item of key_IDs",
            kind: "an object",
        });
    };
    let Some(Value::String(id)) = members.remove("key_ID") else {
        return Err(FormError::KeyId);
    };
    optional_object(&mut members, "key_ID_extension")?;
    nothing_left(&members)?;
    id.parse().map_err(|_| FormError::KeyId)
}

fn sae_ids(members: &mut Members) -> Result<Vec<AppId>, FormError> {
    let ids = array(members, "additional_slave_SAE_IDs")?
        .into_iter()
        .map(|item| match item {
            Value::String(text) => sae_id(&text),
            _ => Err(FormError::Type {
                name: "an item of additional_slave_SAE_IDs",
                kind: "a string",
            }),
        })
        .collect::<Result<Vec<AppId>, FormError>>()?;
    if ids.iter().collect::<BTreeSet<_>>().len() < ids.len() {
        return Err(FormError::SaeIdTwice);
    }
    Ok(ids)
}

/// What the mandatory extensions ask for: all must be known before any is judged.
///
/// `security_level` is ours: `"qkd"` or `"any"`, the lowest level that will do.
fn mandatory_extensions(items: Vec<Value>) -> Result<SecurityLevel, FormError> {
    let mut levels = Vec::new();
    let mut unsupported = Vec::new();
    for item in items {
        for (name, value) in as_extension(item, "extension_mandatory")? {
            match name.as_str() {
                "security_level" => levels.push(value),
                _ => unsupported.push(name),
            }
        }
    }
    if !unsupported.is_empty() {
        return Err(FormError::ExtensionsUnsupported { names: unsupported });
    }
    levels
        .into_iter()
        .try_fold(SecurityLevel::Any, |level, value| {
            let asked = match value {
                Value::String(text) if text == "qkd" => SecurityLevel::Qkd,
                Value::String(text) if text == "any" => SecurityLevel::Any,
                _ => return Err(FormError::ExtensionNotMet),
            };
            Ok(level.max(asked))
        })
}

fn as_extension(item: Value, name: &'static str) -> Result<Members, FormError> {
    match item {
        Value::Object(members) => Ok(members),
        _ => Err(FormError::Type {
            name,
            kind: "an array of objects",
        }),
    }
}

fn at_most(asked: u64, profile: &Profile) -> Result<u32, SupplyError> {
    let most = profile.max_keys_per_request();
    u32::try_from(asked)
        .ok()
        .filter(|&asked| asked <= most)
        .ok_or(SupplyError::TooManyKeys { asked, most })
}

fn key_size(bits: u64, profile: &Profile) -> Result<KeyBits, SupplyError> {
    let (least, most) = (profile.min_key_size(), profile.max_key_size());
    let whole_bytes = bits.is_multiple_of(8);
    let bits = u32::try_from(bits).unwrap_or(u32::MAX);
    if !whole_bytes {
        return Err(SupplyError::SizeNotWholeBytes { bits });
    }
    KeyBits::try_from(bits)
        .ok()
        .filter(|size| (least..=most).contains(size))
        .ok_or(SupplyError::SizeOutOfRange { bits, least, most })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn profile() -> Profile {
        let bits = |bits: u32| KeyBits::try_from(bits).unwrap();
        Profile::new(bits(256), bits(64), bits(4096), 8, 2).unwrap()
    }

    fn posted(body: &str) -> Result<KeyRequest, String> {
        KeyRequest::from_json(body.as_bytes(), &profile()).map_err(|refusal| refusal.to_string())
    }

    #[test]
    fn an_empty_request_takes_the_defaults() {
        let defaults = KeyRequest {
            number: 1,
            size: 256.try_into().unwrap(),
            additional: Vec::new(),
            level: SecurityLevel::Any,
        };
        assert_eq!(posted("{}").unwrap(), defaults);
        assert_eq!(KeyRequest::from_query(&[], &profile()).unwrap(), defaults);
    }

    #[test]
    fn the_highest_security_level_asked_for_counts() {
        let level = |list: &str| {
            let body = format!(r#"{{"extension_mandatory":{list}}}"#);
            posted(&body).map(|request| request.level)
        };
        assert_eq!(level("[]"), Ok(SecurityLevel::Any));
        assert_eq!(
            level(r#"[{"security_level":"any"}]"#),
            Ok(SecurityLevel::Any)
        );
        assert_eq!(
            level(r#"[{"security_level":"qkd"},{"security_level":"any"}]"#),
            Ok(SecurityLevel::Qkd)
        );
        for value in [r#""QKD""#, "1", "null"] {
            let refused = level(&format!(r#"[{{"security_level":{value}}}]"#));
            assert_eq!(refused, Err(EXTENSION_NOT_MET.to_owned()));
        }
    }

    #[test]
    fn unknown_mandatory_extensions_come_before_unmet_ones() {
        let list = br#"{"extension_mandatory":[{"security_level":"?","b_x":1},{"a_y":{}}]}"#;
        let Err(Refusal::Form(FormError::ExtensionsUnsupported { names })) =
            KeyRequest::from_json(list, &profile())
        else {
            panic!("unsupported")
        };
        assert_eq!(names, ["b_x", "a_y"]);
    }

    proptest! {
        #[test]
        fn what_is_accepted_is_within_the_limits(number in any::<u64>(), size in any::<u64>()) {
            let body = format!(r#"{{"number":{number},"size":{size}}}"#);
            let accepted = (1..=8).contains(&number)
                && size.is_multiple_of(8)
                && (64..=4096).contains(&size);
            let read = posted(&body);
            prop_assert_eq!(read.is_ok(), accepted);
        }

        #[test]
        fn every_size_is_accepted_exactly_if_it_is_within_the_limits(size in 0_u64..5000) {
            let accepted = size.is_multiple_of(8) && (64..=4096).contains(&size);
            let read = posted(&format!(r#"{{"size":{size}}}"#));
            prop_assert_eq!(read.is_ok(), accepted);
        }
    }
}
