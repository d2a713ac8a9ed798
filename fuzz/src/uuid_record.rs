//! Records of UUID and key.
//!
//! - Any 48 bytes are split without loss, and the UUID is a QKD-key ID of 36 characters.

use qkd_handover::uuid_record::{RECORD_BYTES, qkd_key_id, split};

/// See the module.
pub fn run(input: &[u8]) {
    for record in input.as_chunks::<RECORD_BYTES>().0 {
        let (uuid, key) = split(record);
        assert_eq!([&uuid[..], key].concat(), record);
        assert_eq!(qkd_key_id(&uuid).as_str().len(), 36);
    }
}
