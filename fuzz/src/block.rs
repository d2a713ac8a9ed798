//! The key block and the status text of serial frames and ring records.
//!
//! - A block that is taken encodes to the bytes that it came from; its number is a valid ID.
//! - A header and a key that lie apart are judged as those that lie together.
//! - A status that is taken is the same after it was encoded and decoded.

use qkd_handover::{
    block::{BlockHeader, HEADER_BYTES},
    status::Status,
};

/// See the module.
pub fn run(input: &[u8]) {
    if let Ok(status) = Status::decode(input) {
        assert_eq!(Status::decode(status.encode().as_bytes()), Ok(status));
    }
    let whole = BlockHeader::decode(input);
    let Some((head, key)) = input.split_first_chunk::<HEADER_BYTES>() else {
        assert!(whole.is_err());
        return;
    };
    let parts = BlockHeader::decode_parts(head, key);
    assert_eq!(
        parts.as_ref().ok(),
        whole.as_ref().ok().map(|(header, _)| header)
    );
    if let Ok((header, key)) = whole {
        assert_eq!(header.encode(key).unwrap(), *head);
        assert_eq!(header.qkd_key_id().as_str(), header.number.to_string());
    }
}
