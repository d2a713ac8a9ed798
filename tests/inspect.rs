//! What `inspect` says of good and bad hand-over files, and what it does not say.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{fs, path::Path};

use qkd_handover::type7::{self, Header};
use qkd_keyfile::{
    KeyFile, KeyMetadata,
    metadata::{HashAlgorithm, HashValue, QkdKeyMetadata},
};
use serde_json::Value;
use support::{qkd_bridge, stderr, stdout};

const KEY: [u8; 16] = *b"\xa5Never show this";

fn type7_file(dir: &Path, name: &str, header: &Header, key: &[u8]) -> String {
    let mut bytes = header.encode().to_vec();
    let mut words = vec![0; type7::words_bytes(header.key_bits)];
    type7::encode_words(header.key_bits, key, &mut words).unwrap();
    bytes.extend(words);
    write(dir, name, &bytes)
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> String {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

fn header() -> Header {
    Header {
        tag: type7::TAG,
        first_epoch: 0xbe38,
        epochs: 2,
        key_bits: 128,
    }
}

fn json(file: &str) -> (Value, Option<i32>) {
    let output = qkd_bridge(["inspect", "--json", file]);
    let json = serde_json::from_slice(&output.stdout).unwrap();
    (json, output.status.code())
}

/// The key is not in a text, in none of the forms that someone may print bytes in.
fn assert_no_key(text: &str) {
    let plain = String::from_utf8_lossy(&KEY[1..]).into_owned();
    let hex: String = KEY[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(
        !text.contains(&plain) && !text.to_lowercase().contains(&hex),
        "{text}"
    );
    assert!(!text.contains("165, 78"), "{text}");
}

#[test]
fn a_qcrypto_file_is_described_without_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let file = type7_file(dir.path(), "0000be38", &header(), &KEY);
    let output = qkd_bridge(["inspect", &file]);
    let text = stdout(&output);
    assert!(output.status.success());
    for part in [
        "type 7",
        "0000be38 (the file's name)",
        "128 bits",
        "ones",
        "longest run",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_no_key(&text);
    let (json, status) = json(&file);
    assert_eq!(status, Some(0));
    assert_eq!(
        (&json["key_bits"], &json["type7"]["epochs"]),
        (&128.into(), &2.into())
    );
    let ones: u32 = KEY.iter().map(|byte| byte.count_ones()).sum();
    assert_eq!(json["randomness"]["ones"], ones);
    assert!(json["problem"].is_null());
    assert_no_key(&json.to_string());
}

#[test]
fn a_block_that_was_given_up_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let empty = Header {
        key_bits: 0,
        ..header()
    };
    let file = type7_file(dir.path(), "0000be38", &empty, &[]);
    let output = qkd_bridge(["inspect", &file]);
    assert!(output.status.success());
    assert!(stdout(&output).contains("a block that was given up"));
}

#[test]
fn a_key_file_is_described_with_its_metadata_and_without_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let mut metadata = QkdKeyMetadata::new("block-77".parse().unwrap());
    metadata.hash = Some(HashValue {
        algorithm: HashAlgorithm::Sha256,
        digest: vec![171; 32],
    });
    let metadata = KeyMetadata::Qkd(metadata);
    let file = KeyFile {
        metadata,
        key_bits: 128,
        key: &KEY,
    };
    let bytes = [&file.encode_head().unwrap()[..], &KEY].concat();
    let path = write(dir.path(), "any-name", &bytes);
    let output = qkd_bridge(["inspect", &path]);
    let text = stdout(&output);
    assert!(output.status.success(), "{}", stderr(&output));
    for part in ["QKDKEYF1", "128 bits", "block-77"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_no_key(&text);
    let (described, _) = json(&path);
    assert_no_key(&described.to_string());
    // A digest of the key is as good as a guess that can be checked.
    assert!(text.contains("withheld") && !text.contains("171"), "{text}");
    assert!(!described.to_string().contains("171,171"));

    let mut cut = bytes.clone();
    cut.pop();
    let (cut, status) = json(&write(dir.path(), "cut", &cut));
    assert_eq!(status, Some(1));
    assert!(
        cut["problem"]
            .as_str()
            .unwrap()
            .contains("of a key file of")
    );
}

#[test]
fn what_is_wrong_with_a_file_is_said_and_the_exit_status_is_1() {
    let dir = tempfile::tempdir().unwrap();
    let good = type7_file(dir.path(), "0000be38", &header(), &KEY);
    let bytes = fs::read(&good).unwrap();
    let swapped: Vec<u8> = bytes
        .chunks(4)
        .flat_map(|word| word.iter().rev())
        .copied()
        .collect();
    let mut tag = bytes.clone();
    tag[0] = 3;
    let mut longer = bytes.clone();
    longer.push(0);
    let mut padding = type7_file(
        dir.path(),
        "0000be38",
        &Header {
            key_bits: 100,
            ..header()
        },
        &[0xff; 12].into_iter().chain([0xf0]).collect::<Vec<_>>(),
    )
    .into_bytes();
    padding = {
        let mut bytes = fs::read(String::from_utf8(padding).unwrap()).unwrap();
        bytes[16 + 12] |= 1;
        bytes
    };
    let cases: [(&str, &[u8], &str); 8] = [
        ("0000be38", &swapped, "big-endian"),
        ("0000be38", &tag, "tag 0x3 is not that of a final-key file"),
        ("0000be38", &longer, "1 bytes after the key"),
        (
            "0000be38",
            &bytes[..bytes.len() - 1],
            "31 bytes of 32: cut off",
        ),
        (
            "0000be38",
            &bytes[..15],
            "15 bytes; a qcrypto file begins with 16",
        ),
        ("0000be38", &[], "0 bytes"),
        (
            "0000be38",
            &padding,
            "unused bits after the key are not zero",
        ),
        (
            "0000be39",
            &bytes,
            "file name is not the first epoch, 0000be38",
        ),
    ];
    for (name, bytes, problem) in cases {
        let file = write(dir.path(), name, bytes);
        let output = qkd_bridge(["inspect", &file]);
        assert_eq!(output.status.code(), Some(1), "{problem}");
        let text = stderr(&output);
        assert!(
            text.contains(problem) && text.contains(name),
            "{problem}: {text}"
        );
        let (described, _) = json(&file);
        assert!(described["problem"].as_str().unwrap().contains(problem));
    }
    let output = qkd_bridge(["inspect", dir.path().join("none").to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cannot be read: No such file"));
}
