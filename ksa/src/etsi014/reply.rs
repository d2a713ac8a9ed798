//! Replies of ETSI GS QKD 014 V1.1.1, as compact JSON.

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::Response,
};
use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use qkd_keyfile::AppId;
use serde::Serialize;
use zeroize::Zeroizing;

use super::request::{FormError, Refusal};
use crate::{Profile, StockStatus, SuppliedKey};

/// Clause 6.1.
#[derive(Serialize)]
#[allow(non_snake_case, reason = "the names of the standard")]
struct Status<'a> {
    source_KME_ID: &'a str,
    target_KME_ID: &'a str,
    master_SAE_ID: &'a str,
    slave_SAE_ID: &'a str,
    key_size: u32,
    stored_key_count: u64,
    max_key_count: u64,
    max_key_per_request: u32,
    max_key_size: u32,
    min_key_size: u32,
    max_SAE_ID_count: u32,
}

pub(super) fn status(
    stock: &StockStatus,
    profile: &Profile,
    caller: &AppId,
    peer: &AppId,
) -> Response {
    json(
        StatusCode::OK,
        &Status {
            source_KME_ID: stock.source.as_str(),
            target_KME_ID: stock.target.as_str(),
            master_SAE_ID: caller.as_str(),
            slave_SAE_ID: peer.as_str(),
            key_size: profile.key_size().get(),
            stored_key_count: stock.stored_keys,
            max_key_count: stock.max_keys,
            max_key_per_request: profile.max_keys_per_request(),
            max_key_size: profile.max_key_size().get(),
            min_key_size: profile.min_key_size().get(),
            max_SAE_ID_count: profile.max_additional_applications(),
        },
    )
}

/// Clause 6.3. The body is wiped once the last reference to it is gone: after the write, or with
/// the connection.
pub(super) fn keys(keys: &[SuppliedKey]) -> Response {
    let body = Bytes::from_owner(container(keys));
    reply(StatusCode::OK, Body::from(body))
}

/// Clause 6.5.
#[derive(Serialize)]
struct ErrorReply<'a> {
    message: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    details: Vec<Detail<'a>>,
}

#[derive(Serialize)]
struct Detail<'a> {
    extension_mandatory_unsupported: &'a str,
}

pub(super) fn refusal(refusal: &Refusal) -> Response {
    match refusal {
        Refusal::Form(form) => {
            let details = match form {
                FormError::ExtensionsUnsupported { names } => names.as_slice(),
                _ => &[],
            };
            error(StatusCode::BAD_REQUEST, &form.to_string(), details)
        }
        Refusal::Supply(supply) => {
            let status =
                StatusCode::from_u16(supply.status()).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
            match supply.public_message() {
                Some(message) => error(status, &message, &[]),
                None => without_body(status),
            }
        }
    }
}

/// A path that the standard does not have.
pub(super) fn not_found() -> Response {
    error(StatusCode::NOT_FOUND, "there is no such resource", &[])
}

/// A method that the path does not have; `allow` lists those that it has.
pub(super) fn method_not_allowed(allow: &'static str) -> Response {
    let mut response = error(
        StatusCode::METHOD_NOT_ALLOWED,
        "the method is not allowed here",
        &[],
    );
    let headers = response.headers_mut();
    headers.insert(header::ALLOW, HeaderValue::from_static(allow));
    response
}

fn error(status: StatusCode, message: &str, unsupported: &[String]) -> Response {
    let details = unsupported
        .iter()
        .map(|name| Detail {
            extension_mandatory_unsupported: name,
        })
        .collect();
    json(status, &ErrorReply { message, details })
}

fn json(status: StatusCode, value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => reply(status, Body::from(body)),
        Err(_) => without_body(StatusCode::SERVICE_UNAVAILABLE),
    }
}

fn reply(status: StatusCode, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn without_body(status: StatusCode) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

/// The key container. Its length is known beforehand, so that the buffer never moves and leaves
/// no copy behind.
fn container(keys: &[SuppliedKey]) -> Zeroizing<Vec<u8>> {
    let each = |key: &SuppliedKey| {
        let digits = key.key.len_bytes().div_ceil(3) * 4;
        ID.len() + UUID_CHARS + KEY.len() + digits + END_OF_KEY.len()
    };
    let commas = keys.len().saturating_sub(1);
    let len_bytes = START.len() + keys.iter().map(each).sum::<usize>() + commas + END.len();

    let mut out = Zeroizing::new(vec![0; len_bytes]);
    let mut rest = Cursor(&mut out);
    rest.put(START);
    for (i, SuppliedKey { id, key }) in keys.iter().enumerate() {
        if i > 0 {
            rest.put(b",");
        }
        rest.put(ID);
        rest.put(id.to_string().as_bytes());
        rest.put(KEY);
        rest.put_base64(key.expose());
        rest.put(END_OF_KEY);
    }
    rest.put(END);
    assert!(
        rest.0.is_empty(),
        "the container has the length counted before"
    );
    out
}

/// What is left to fill of a buffer.
struct Cursor<'a>(&'a mut [u8]);

impl Cursor<'_> {
    fn put(&mut self, bytes: &[u8]) {
        self.advance(bytes.len()).copy_from_slice(bytes);
    }

    /// RFC 4648, clause 4: standard alphabet, padded.
    fn put_base64(&mut self, bytes: &[u8]) {
        let place = self.advance(bytes.len().div_ceil(3) * 4);
        let written = BASE64.encode_slice(bytes, place);
        written.unwrap_or_else(|_| unreachable!("the place has the length of the digits"));
    }

    fn advance(&mut self, len: usize) -> &mut [u8] {
        let (front, rest) = std::mem::take(&mut self.0).split_at_mut(len);
        self.0 = rest;
        front
    }
}

const START: &[u8] = br#"{"keys":["#;
const ID: &[u8] = br#"{"key_ID":""#;
const KEY: &[u8] = br#"","key":""#;
const END_OF_KEY: &[u8] = br#""}"#;
const END: &[u8] = b"]}";
/// RFC 9562, clause 4.
const UUID_CHARS: usize = 36;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use qkd_keyfile::KsaKeyId;
    use qkd_secmem::{Locking, Pool, PoolConfig};

    use super::*;

    fn supplied(keys: &[Vec<u8>]) -> Vec<SuppliedKey> {
        let pool = Pool::new(PoolConfig {
            capacity_bytes: 1 << 20,
            locking: Locking::Unlocked,
        })
        .unwrap();
        keys.iter()
            .zip(0..)
            .map(|(bytes, i)| SuppliedKey {
                id: KsaKeyId::from_random([i; 16]),
                key: pool.copy_of(bytes).unwrap(),
            })
            .collect()
    }

    #[test]
    fn a_container_is_compact_json() {
        let keys = supplied(&[vec![0xff; 4], vec![0; 3]]);
        assert_eq!(
            std::str::from_utf8(&container(&keys)).unwrap(),
            concat!(
                r#"{"keys":[{"key_ID":"00000000-0000-4000-8000-000000000000","key":"/////w=="},"#,
                r#"{"key_ID":"01010101-0101-4101-8101-010101010101","key":"AAAA"}]}"#
            )
        );
        assert_eq!(container(&[]).as_slice(), br#"{"keys":[]}"#);
    }

    proptest! {
        #[test]
        fn a_container_reads_back_as_the_same_keys(
            keys in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..70), 0..5)
        ) {
            let supplied = supplied(&keys);
            let read: serde_json::Value = serde_json::from_slice(&container(&supplied)).unwrap();
            let list = read["keys"].as_array().unwrap();
            prop_assert_eq!(list.len(), keys.len());
            for ((item, bytes), key) in list.iter().zip(&keys).zip(&supplied) {
                prop_assert_eq!(item["key_ID"].as_str().unwrap(), key.id.to_string());
                let decoded = BASE64.decode(item["key"].as_str().unwrap()).unwrap();
                prop_assert_eq!(&decoded, bytes);
            }
        }
    }
}
