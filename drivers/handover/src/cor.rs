//! Raw key files (`.cor`): key bytes and nothing else.
//!
//! The name is `YYMMDD_HHMM_` and eight hexadecimal digits, equal at both ends; without `.cor` it is
//! the QKD-key ID. The content is equal at both ends too: the first bit of the key is the top bit of
//! the first byte. There is no header, so a reader has to be told how long a file is.
//!
//! Source: the files that key management entities of the ETSI GS QKD 014 kind watch for
//! (qkd_kme_server; 204,800 bytes each); the layout is a fact, this code is its own.

/// Length of the files seen in use, in bytes.
pub const USUAL_FILE_BYTES: usize = 204_800;

/// End of every name.
pub const SUFFIX: &str = ".cor";

/// The QKD-key ID that a file's name gives; `None` if no raw key file is called so.
#[must_use]
pub fn id_of_name(name: &str) -> Option<&str> {
    let id = name.strip_suffix(SUFFIX)?;
    let mut parts = id.split('_');
    let (day, minute, rest) = (parts.next()?, parts.next()?, parts.next()?);
    let digits = |text: &str, len: usize, is_digit: fn(&u8) -> bool| {
        text.len() == len && text.as_bytes().iter().all(is_digit)
    };
    let fits = parts.next().is_none()
        && digits(day, 6, u8::is_ascii_digit)
        && digits(minute, 4, u8::is_ascii_digit)
        && digits(rest, 8, u8::is_ascii_hexdigit);
    fits.then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_without_its_suffix_is_the_id() {
        assert_eq!(
            id_of_name("240115_1230_9a0bC3f1.cor"),
            Some("240115_1230_9a0bC3f1")
        );
        for name in [
            "240115_1230_9a0bc3f1",
            "240115_1230_9a0bc3f.cor",
            "24011_1230_9a0bc3f1.cor",
            "240115_123x_9a0bc3f1.cor",
            "240115_1230_9a0bc3fg.cor",
            "240115_1230_9a0bc3f1_1.cor",
            "240115_1230.cor",
            ".cor",
            "",
        ] {
            assert_eq!(id_of_name(name), None, "{name:?}");
        }
    }
}
