//! Lines of hexadecimal digits, and the names of their files.
//!
//! - A line is a key within the caller's buffer, which encodes to the same digits, or a named error,
//!   and then the buffer holds nothing of it.
//! - A name that is taken is the one that its parts make.

use qkd_handover::hex_lines::{decode, encode, file_name, parse_name};

use super::input::Input;

/// See the module.
pub fn run(input: &[u8]) {
    let mut from = Input::new(input);
    let mut out = vec![0; usize::from(from.byte())];
    let text = from.take(usize::MAX);
    if let Ok(name) = str::from_utf8(text)
        && let Some((peer, number)) = parse_name(name)
    {
        assert_eq!(file_name(peer, number), name);
    }
    for line in text.split(|&byte| byte == b'\n') {
        let Ok(key_bytes) = decode(line, &mut out) else {
            assert!(out.iter().all(|&byte| byte == 0));
            continue;
        };
        let mut again = vec![0; 2 * key_bytes + 1];
        assert_eq!(encode(&out[..key_bytes], &mut again), Ok(again.len()));
        assert!(again[..2 * key_bytes].eq_ignore_ascii_case(&line[..2 * key_bytes]));
        out.fill(0);
    }
}
