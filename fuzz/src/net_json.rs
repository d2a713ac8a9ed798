//! The strict JSON objects of the signalling protocols.
//!
//! - What is taken is one JSON object by `serde_json`'s word too.
//! - Every member of it is found, by the name it has and by the one without blanks and capitals.
//! - No two members are taken for one: there are as many as `serde_json` sees.
//! - A member has its type or is refused; no getter panics.

use std::collections::BTreeSet;

use qkd_net::json::{MAX_DEPTH, Object};
use serde_json::Value;

/// See the module.
pub fn run(input: &[u8]) {
    let Ok(object) = Object::parse(input) else {
        return;
    };
    let Ok(Value::Object(members)) = serde_json::from_slice(input) else {
        panic!("an object that is none");
    };
    let mut normal = BTreeSet::new();
    for (name, value) in &members {
        let short: String = name
            .chars()
            .filter(|c| !matches!(c, ' ' | '_' | '-'))
            .flat_map(char::to_lowercase)
            .collect();
        for name in [name, &short] {
            assert_eq!(object.get(name).is_some(), !value.is_null(), "{name}");
        }
        assert!(normal.insert(short));
        assert!(depth(value) < MAX_DEPTH + 1);
    }
    for name in ["a", "k", "key_relay_request_id", "links", "response"] {
        let value = object.get(name);
        let is = |test: fn(&Value) -> bool| value.is_none_or(test);
        assert_eq!(object.text(name).is_ok(), is(Value::is_string));
        assert_eq!(object.flag(name).is_ok(), is(Value::is_boolean));
        assert_eq!(object.long(name).is_ok(), is(Value::is_u64));
        assert!(object.integer(name).is_err() || object.long(name).is_ok());
        assert!(object.texts(name).is_err() || is(Value::is_array));
        assert!(object.objects(name).is_err() || is(Value::is_array));
    }
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(members) => 1 + members.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}
