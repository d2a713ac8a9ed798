//! Final-key files that qcrypto itself wrote, where such files lie beside the checkout.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use qkd_handover::type7::{Header, decode_key, encode_words};

fn files_below(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().into_string().unwrap_or_default();
        if path.is_dir() {
            files_below(&path, found);
        } else if name.len() == 8 && name.bytes().all(|b| b.is_ascii_hexdigit()) {
            found.push(path);
        }
    }
}

#[test]
fn every_file_that_is_there_is_read_to_the_last_bit() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/qcrypto");
    let mut files = Vec::new();
    files_below(&root, &mut files);
    for path in &files {
        let bytes = fs::read(path).unwrap();
        let (head, words) = bytes.split_first_chunk().unwrap();
        // The directories hold files of the protocol's other types too.
        let Ok(header) = Header::decode(head) else {
            assert!(!matches!(head, [7, 0, 0, 0, ..]), "{}", path.display());
            continue;
        };
        let name = path.file_name().unwrap().to_str().unwrap();
        assert_eq!(header.check_name(name), Ok(()));
        assert_eq!(header.file_bytes(), bytes.len());
        let mut key = vec![0; header.key_bits.div_ceil(8) as usize];
        decode_key(&header, words, &mut key).unwrap();
        let mut again = vec![0; words.len()];
        encode_words(header.key_bits, &key, &mut again).unwrap();
        assert_eq!(again, words);
    }
    println!("{} files", files.len());
}
