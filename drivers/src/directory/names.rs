//! What names in a hand-over folder mean.

use std::ffi::OsStr;

use qkd_handover::cor;
use qkd_keyfile::QkdKeyId;

use super::Format;

/// End of the name of a key file of our own.
pub(super) const KEY_FILE_SUFFIX: &str = ".qkdkey";

/// Where files go that failed a check.
pub(super) const QUARANTINE: &str = "quarantine";

/// Where settled files go if they are not deleted.
pub(super) const DONE: &str = "done";

/// The epoch that a hand-over file's name gives: eight lower-case hexadecimal digits.
pub(super) fn epoch_of(name: &OsStr) -> Option<u32> {
    let text = name.to_str().filter(|text| text.len() == 8)?;
    let lower = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    lower.then(|| u32::from_str_radix(text, 16).ok()).flatten()
}

/// Place of a file of one block among the others, by its name; files of one place come in the order of
/// their names. `None` for a name that no hand-over file of this format has.
pub(super) fn place_of(name: &OsStr, format: Format) -> Option<u32> {
    match format {
        Format::Type7 | Format::Type7Guardian => epoch_of(name),
        Format::Cor => cor::id_of_name(name.to_str()?).map(|_| 0),
        _ => name.to_str()?.strip_suffix(KEY_FILE_SUFFIX).map(|_| 0),
    }
}

/// The QKD-key ID, as far as the name gives it.
pub(super) fn id_of(name: &OsStr, format: Format) -> Option<QkdKeyId> {
    let name = name.to_str()?;
    match format {
        Format::Cor => cor::id_of_name(name)?.parse().ok(),
        Format::KeyFile => name.strip_suffix(KEY_FILE_SUFFIX)?.parse().ok(),
        _ => name.parse().ok(),
    }
}

/// Hidden files, the side folders, and what the usual writers call a file that is to be renamed.
pub(super) fn is_ours_or_temporary(name: &OsStr) -> bool {
    let bytes = name.as_encoded_bytes();
    bytes.starts_with(b".")
        || bytes.ends_with(b".tmp")
        || bytes.ends_with(b".part")
        || name == QUARANTINE
        || name == DONE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_eight_lower_case_digits_are_an_epoch() {
        let epoch = |name: &str| epoch_of(OsStr::new(name));
        assert_eq!(epoch("c74ebf47"), Some(0xc74e_bf47));
        assert_eq!(epoch("00000000"), Some(0));
        for name in ["C74EBF47", "c74ebf4", "0c74ebf47", "+74ebf47", "c74ebf4g"] {
            assert_eq!(epoch(name), None, "{name}");
        }
    }
}
