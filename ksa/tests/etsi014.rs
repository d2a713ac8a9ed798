//! The rules of ETSI GS QKD 014 V1.1.1, over TLS, with an HTTP client.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{Server, app, config};
use hyper::{Method, StatusCode, header};
use qkd_keyfile::metadata::SecurityLevel;
use serde_json::{Value, json};

const UNKNOWN_ID: &str = "12345678-1234-4234-8234-123456789abc";

#[tokio::test]
async fn status_tells_stock_and_limits() {
    let server = Server::start(config()).await;
    let reply = server.client("app-a").await.get("app-b/status").await;
    assert_eq!(reply.status, StatusCode::OK);
    assert_eq!(
        reply.json(),
        json!({
            "source_KME_ID": "node-a",
            "target_KME_ID": "node-b",
            "master_SAE_ID": "app-a",
            "slave_SAE_ID": "app-b",
            "key_size": 256,
            "stored_key_count": 25_000,
            "max_key_count": 100_000,
            "max_key_per_request": 8,
            "max_key_size": 4096,
            "min_key_size": 64,
            "max_SAE_ID_count": 2,
        })
    );
    assert!(!reply.body.contains(&b' '), "compact");
}

#[tokio::test]
async fn both_applications_get_the_same_bytes_for_a_key_id_once_each() {
    let server = Server::start(config()).await;
    let (mut a, mut b) = (server.client("app-a").await, server.client("app-b").await);
    let keys = a.get("app-b/enc_keys?number=3&size=1024").await.keys();
    assert_eq!(keys.len(), 3);
    for (id, key) in &keys {
        assert_eq!(
            (id.len(), key.len()),
            (36, 172),
            "128 bytes in base64, padded"
        );
    }
    let one = b.get(&format!("app-a/dec_keys?key_ID={}", keys[0].0)).await;
    assert_eq!(one.keys(), keys[..1]);
    let body = json!({"key_IDs": [{"key_ID": keys[2].0}, {"key_ID": keys[1].0.to_uppercase()}]});
    let two = b.post("app-a/dec_keys", &body.to_string()).await;
    assert_eq!(
        two.keys(),
        [keys[2].clone(), keys[1].clone()],
        "in the order asked for"
    );
    assert_eq!(server.stock.waiting(), 0);

    let again = b.get(&format!("app-a/dec_keys?key_ID={}", keys[0].0)).await;
    let not_found = "one or more keys specified are not found on KME";
    assert_eq!(again.refusal(), (400, not_found.to_owned()));
    assert_eq!(server.counters.read().keys, 6);
}

#[tokio::test]
async fn missing_number_and_size_use_the_defaults() {
    let server = Server::start(config()).await;
    let mut a = server.client("app-a").await;
    for reply in [
        a.get("app-b/enc_keys").await,
        a.get("app-b/enc_keys?").await,
        a.post("app-b/enc_keys", "{}").await,
        a.get("app-b/enc_keys?number=1").await,
        a.post("app-b/enc_keys", r#"{"size":256}"#).await,
    ] {
        let keys = reply.keys();
        assert_eq!(
            (keys.len(), keys[0].1.len()),
            (1, 44),
            "one key of 32 bytes"
        );
    }
}

#[tokio::test]
async fn the_request_reaches_the_supply_as_it_was_meant() {
    let server = Server::start(config()).await;
    let body = json!({
        "number": 2,
        "size": 512,
        "additional_slave_SAE_IDs": ["app/c", "app-d"],
        "extension_mandatory": [{"security_level": "qkd"}],
        "extension_optional": [{"vendor_route": "direct"}, {}],
    });
    let mut a = server.client("app-a").await;
    let reply = a.post("app-b/enc_keys", &body.to_string()).await;
    assert_eq!(reply.keys().len(), 2);
    let request = &server.stock.requests()[0];
    assert_eq!(request.caller, app("app-a"));
    assert_eq!(request.destinations, ["app-b", "app/c", "app-d"].map(app));
    assert_eq!((request.number, request.size.get()), (2, 512));
    assert_eq!(request.level, SecurityLevel::Qkd);
}

#[tokio::test]
async fn sae_ids_in_paths_are_percent_decoded() {
    let server = Server::start(config()).await;
    let mut a = server.client("app-a").await;
    let keys = a.get("app%2Fc/enc_keys").await.keys();
    assert_eq!(server.stock.requests()[0].destinations, [app("app/c")]);
    let mut c = server.client("app/c").await;
    let path = format!("app-a/dec_keys?key_ID={}", keys[0].0);
    assert_eq!(c.get(&path).await.keys(), keys);
}

#[tokio::test]
async fn texts_that_the_standard_fixes_are_sent_to_the_letter() {
    let server = Server::start(config()).await;
    let mut a = server.client("app-a").await;
    let size = a.get("app-b/enc_keys?size=257").await;
    assert_eq!(size.body, r#"{"message":"size shall be a multiple of 8"}"#);
    let not_met = r#"{"message":"not all extension_mandatory request options could be met"}"#;
    let level = r#"{"extension_mandatory":[{"security_level":"qkd"}]}"#;
    assert_eq!(a.post("computational/enc_keys", level).await.body, not_met);
    let level = r#"{"extension_mandatory":[{"security_level":"perfect"}]}"#;
    assert_eq!(a.post("app-b/enc_keys", level).await.body, not_met);
    let unsupported = r#"{"extension_mandatory":[{"abc_route_type":"direct"},{"x_y":1}]}"#;
    assert_eq!(
        a.post("app-b/enc_keys", unsupported).await.body,
        concat!(
            r#"{"message":"not all extension_mandatory parameters are supported","#,
            r#""details":[{"extension_mandatory_unsupported":"abc_route_type"},"#,
            r#"{"extension_mandatory_unsupported":"x_y"}]}"#
        )
    );
    let unknown = a.get(&format!("app-b/dec_keys?key_ID={UNKNOWN_ID}")).await;
    assert_eq!(
        unknown.body,
        r#"{"message":"one or more keys specified are not found on KME"}"#
    );
    assert!(server.stock.requests().is_empty());
}

#[tokio::test]
async fn requests_of_a_wrong_form_are_400_and_cost_no_key() {
    let server = Server::start(config()).await;
    let mut a = server.client("app-a").await;
    let paths = [
        "app-b/enc_keys?number=0",
        "app-b/enc_keys?number=9",
        "app-b/enc_keys?number=-1",
        "app-b/enc_keys?number=%2B1",
        "app-b/enc_keys?number=1.0",
        "app-b/enc_keys?number=",
        "app-b/enc_keys?number=4294967297",
        "app-b/enc_keys?number=1&number=1",
        "app-b/enc_keys?size=0",
        "app-b/enc_keys?size=56",
        "app-b/enc_keys?size=4104",
        "app-b/enc_keys?size=99999999999999999999999",
        "app-b/enc_keys?colour=red",
        "app-b/enc_keys?additional_slave_SAE_IDs=app-d",
        "not%20an%20id/enc_keys",
        "bad-utf8-%ff/enc_keys",
        "/enc_keys",
        "not%20an%20id/status",
        "app-b/dec_keys",
        "app-b/dec_keys?key_ID=",
        "app-b/dec_keys?key_ID=1234",
    ];
    for path in paths {
        let (status, message) = a.get(path).await.refusal();
        assert_eq!(status, 400, "{path}: {message}");
    }
    let two = format!("app-b/dec_keys?key_ID={UNKNOWN_ID}&key_ID={UNKNOWN_ID}");
    let (status, message) = a.get(&two).await.refusal();
    assert!(status == 400 && message.contains("POST"), "{message}");

    let bodies = [
        "",
        "null",
        "[]",
        "{",
        "{}{}",
        r#"{"number":1,"number":1}"#,
        r#"{"number":"1"}"#,
        r#"{"number":1.0}"#,
        r#"{"number":-1}"#,
        r#"{"number":0}"#,
        r#"{"number":9}"#,
        r#"{"number":4294967297}"#,
        r#"{"number":null}"#,
        r#"{"size":260}"#,
        r#"{"size":0}"#,
        r#"{"size":4294967552}"#,
        r#"{"size":18446744073709551615}"#,
        r#"{"sizes":256}"#,
        r#"{"additional_slave_SAE_IDs":"app-d"}"#,
        r#"{"additional_slave_SAE_IDs":[1]}"#,
        r#"{"additional_slave_SAE_IDs":["no id"]}"#,
        r#"{"additional_slave_SAE_IDs":["app-d","app-d"]}"#,
        r#"{"additional_slave_SAE_IDs":["app-b"]}"#,
        r#"{"additional_slave_SAE_IDs":["c","d","e"]}"#,
        r#"{"extension_mandatory":{"security_level":"qkd"}}"#,
        r#"{"extension_mandatory":["security_level"]}"#,
        r#"{"extension_optional":{}}"#,
        r#"{"extension_optional":[1]}"#,
    ];
    for body in bodies {
        let (status, message) = a.post("app-b/enc_keys", body).await.refusal();
        assert_eq!(status, 400, "{body}: {message}");
    }
    let deep = format!(
        r#"{{"extension_optional":[{{"x":{}1{}}}]}}"#,
        "[".repeat(20),
        "]".repeat(20)
    );
    assert_eq!(a.post("app-b/enc_keys", &deep).await.refusal().0, 400);
    assert_eq!(
        a.post("app-b/enc_keys?number=2", "{}").await.refusal().0,
        400
    );

    assert!(server.stock.requests().is_empty());
    let counts = server.counters.read();
    assert_eq!(counts.refused, 21 + 1 + 28 + 2);
    assert_eq!((counts.answered, counts.keys), (0, 0));
}

#[tokio::test]
async fn key_ids_of_a_wrong_form_are_400() {
    let server = Server::start(config()).await;
    let mut a = server.client("app-a").await;
    let item = json!({ "key_ID": UNKNOWN_ID });
    let nine: Vec<Value> = (0..9)
        .map(|i| json!({ "key_ID": format!("12345678-1234-4234-8234-12345678900{i}") }))
        .collect();
    let bodies = [
        json!({}),
        json!({ "key_IDs": [] }),
        json!({ "key_IDs": [UNKNOWN_ID] }),
        json!({ "key_IDs": item }),
        json!({ "key_IDs": [item, item] }),
        json!({ "key_IDs": [item, { "key_ID": UNKNOWN_ID.to_uppercase() }] }),
        json!({ "key_IDs": [{ "key_ID": "1" }] }),
        json!({ "key_IDs": [{ "key_ID": UNKNOWN_ID, "key_ID_extension": 1 }] }),
        json!({ "key_IDs": [{ "key_ID": UNKNOWN_ID, "key": "" }] }),
        json!({ "key_IDs": [item], "key_IDs_extension": [] }),
        json!({ "key_IDs": nine }),
    ];
    for body in bodies {
        let (status, message) = a.post("app-b/dec_keys", &body.to_string()).await.refusal();
        assert_eq!(status, 400, "{body}");
        assert!(!message.contains("not found"), "{body}: {message}");
    }
    // Extensions of the right form are ignored: the request itself is well-formed.
    let body = json!({
        "key_IDs": [{ "key_ID": UNKNOWN_ID, "key_ID_extension": {"x": 1} }],
        "key_IDs_extension": {"y": [2]},
    });
    let (_, message) = a.post("app-b/dec_keys", &body.to_string()).await.refusal();
    assert!(message.contains("not found"), "{message}");
}

#[tokio::test]
async fn keys_by_id_come_all_or_none() {
    let server = Server::start(config()).await;
    let (mut a, mut b) = (server.client("app-a").await, server.client("app-b").await);
    let keys = a.get("app-b/enc_keys?number=2").await.keys();
    let with = |ids: &[&str]| {
        let items: Vec<Value> = ids.iter().map(|id| json!({ "key_ID": id })).collect();
        json!({ "key_IDs": items }).to_string()
    };
    let one_missing = with(&[&keys[0].0, UNKNOWN_ID, &keys[1].0]);
    let reply = b.post("app-a/dec_keys", &one_missing).await;
    assert_eq!(reply.status, StatusCode::BAD_REQUEST);
    assert_eq!(server.stock.waiting(), 2, "none was consumed");
    let both = with(&[&keys[0].0, &keys[1].0]);
    assert_eq!(b.post("app-a/dec_keys", &both).await.keys(), keys);
}

#[tokio::test]
async fn every_named_application_gets_the_key_and_no_other() {
    let server = Server::start(config()).await;
    let mut a = server.client("app-a").await;
    let body = r#"{"additional_slave_SAE_IDs":["app/c"]}"#;
    let shared = a.post("app-b/enc_keys", body).await.keys();
    let single = a.get("app-b/enc_keys").await.keys();
    let path = |keys: &[(String, String)]| format!("app-a/dec_keys?key_ID={}", keys[0].0);

    let mut c = server.client("app/c").await;
    assert_eq!(c.get(&path(&shared)).await.keys(), shared);
    let refused = c.get(&path(&single)).await;
    assert_eq!(refused.status, StatusCode::UNAUTHORIZED);
    let mut b = server.client("app-b").await;
    assert_eq!(b.get(&path(&shared)).await.keys(), shared);
    assert_eq!(b.get(&path(&single)).await.keys(), single);
}

#[tokio::test]
async fn additional_applications_are_refused_where_keys_go_to_one_only() {
    let mut one_only = config();
    let size = one_only.profile.key_size();
    one_only.profile = qkd_ksa::Profile::new(size, size, size, 1, 0).unwrap();
    let server = Server::start(one_only).await;
    let mut a = server.client("app-a").await;
    let status = a.get("app-b/status").await.json();
    assert_eq!(status["max_SAE_ID_count"], 0);
    let body = r#"{"additional_slave_SAE_IDs":["app/c"]}"#;
    let (status, message) = a.post("app-b/enc_keys", body).await.refusal();
    assert_eq!(status, 400);
    assert_eq!(message, "additional_slave_SAE_IDs are not supported");
    let none = r#"{"additional_slave_SAE_IDs":[]}"#;
    assert_eq!(a.post("app-b/enc_keys", none).await.keys().len(), 1);
}

#[tokio::test]
async fn an_application_without_right_gets_401_without_a_body() {
    let server = Server::start(config()).await;
    let mut nobody = server.client("nobody").await;
    let by_id = format!("app-a/dec_keys?key_ID={UNKNOWN_ID}");
    for path in ["app-b/status", "app-b/enc_keys", by_id.as_str()] {
        let reply = nobody.get(path).await;
        assert_eq!(reply.status, StatusCode::UNAUTHORIZED, "{path}");
        assert!(reply.body.is_empty() && !reply.headers.contains_key(header::CONTENT_TYPE));
    }
    assert_eq!(server.counters.read().unauthorised, 3);
}

#[tokio::test]
async fn what_the_supply_cannot_do_is_told_without_its_secrets() {
    let server = Server::start(config()).await;
    let mut a = server.client("app-a").await;
    for (slave, status) in [("starved", 503), ("far", 503), ("mystery", 400)] {
        let (got, message) = a.get(&format!("{slave}/enc_keys")).await.refusal();
        assert_eq!(got, status, "{slave}");
        assert!(
            !message.contains(slave) && !message.contains("node"),
            "{message}"
        );
    }
    assert_eq!(server.counters.read().unavailable, 2);
}

#[tokio::test]
async fn a_supply_that_answers_something_else_hands_out_nothing() {
    let server = Server::start(config()).await;
    let mut a = server.client("app-a").await;
    for slave in ["one-less", "one-byte-less"] {
        let reply = a.get(&format!("{slave}/enc_keys?number=2")).await;
        assert_eq!(
            reply.refusal(),
            (503, "the KME cannot supply keys".to_owned())
        );
    }
    assert_eq!(server.counters.read().keys, 0);
}

#[tokio::test]
async fn unknown_paths_are_404_and_wrong_methods_405() {
    let server = Server::start(config()).await;
    let mut a = server.client("app-a").await;
    for path in [
        "/",
        "/api/v1/keys/app-b",
        "/api/v1/keys/app-b/enc_keys/",
        "/api/v1/keys/app-b/enc_key",
        "/api/v1/keys/app/c/enc_keys",
        "/api/v2/keys/app-b/enc_keys",
        "/API/v1/keys/app-b/enc_keys",
    ] {
        let reply = a.send(Method::GET, path, "").await;
        assert_eq!(reply.refusal().0, 404, "{path}");
    }
    for (path, method, allow) in [
        ("status", Method::POST, "GET"),
        ("enc_keys", Method::PUT, "GET, POST"),
        ("dec_keys", Method::DELETE, "GET, POST"),
        ("dec_keys", Method::OPTIONS, "GET, POST"),
    ] {
        let path = format!("/api/v1/keys/app-b/{path}");
        let reply = a.send(method, &path, "").await;
        assert_eq!(reply.refusal().0, 405, "{path}");
        assert_eq!(reply.headers[header::ALLOW], allow);
    }
    // Were HEAD taken for a GET, it would burn a key that nobody sees.
    let head = a
        .send(Method::HEAD, "/api/v1/keys/app-b/enc_keys", "")
        .await;
    assert_eq!(head.status, StatusCode::METHOD_NOT_ALLOWED);
    assert!(server.stock.requests().is_empty());
}
