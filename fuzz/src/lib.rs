//! What no input may break, one module per place where bytes come in from outside.
//!
//! Every module has one function `run`, which takes any bytes at all and panics if a promise of that
//! place does not hold; the module's documentation says which. A panic of the code under test is a
//! finding too. `fuzz_targets/` puts libFuzzer in front of them (nightly); the workspace's
//! `tests/fuzz_corpus.rs` includes this file and runs them over `corpus-seeds/`, every prefix of each
//! seed and a few thousand seeded mutations (stable).
//!
//! Inputs are read by [`input::Input`], from the front, and what is missing is zero: so every prefix
//! of an input is one, and a seed can be written by hand.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a failure here is a finding")]

pub mod block;
pub mod clavis2;
pub mod config;
pub mod cor;
pub mod etsi014;
pub mod hex_lines;
pub mod input;
pub mod journal;
pub mod kernels;
pub mod key_file;
pub mod kma;
pub mod net_json;
pub mod r10;
pub mod ring;
pub mod serial;
pub mod signal;
pub mod type7;
pub mod uuid_record;

/// Takes any bytes; panics if a promise does not hold.
pub type Entry = fn(&[u8]);

/// Every place, by the name of its fuzz target.
pub const TARGETS: [(&str, Entry); 17] = [
    ("block", block::run),
    ("clavis2", clavis2::run),
    ("config", config::run),
    ("cor", cor::run),
    ("etsi014", etsi014::run),
    ("hex_lines", hex_lines::run),
    ("journal", journal::run),
    ("key_file", key_file::run),
    ("kernels", kernels::run),
    ("kma", kma::run),
    ("net_json", net_json::run),
    ("r10", r10::run),
    ("ring", ring::run),
    ("serial", serial::run),
    ("signal", signal::run),
    ("type7", type7::run),
    ("uuid_record", uuid_record::run),
];
