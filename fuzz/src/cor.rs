//! Names of raw key files.
//!
//! - Any text is judged; the ID of a name that is taken is a QKD-key ID, and part of no path.

use qkd_handover::cor::{SUFFIX, id_of_name};
use qkd_keyfile::QkdKeyId;

/// See the module.
pub fn run(input: &[u8]) {
    let Ok(name) = str::from_utf8(input) else {
        return;
    };
    if let Some(id) = id_of_name(name) {
        assert_eq!(format!("{id}{SUFFIX}"), name);
        assert_eq!(id.parse::<QkdKeyId>().unwrap().as_str(), id);
        assert!(!id.contains('/'));
    }
}
