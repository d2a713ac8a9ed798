//! What the fuzzer found and what it starts from, on a stable toolchain.
//!
//! Runs every input of `fuzz/corpus-seeds` through the function that its fuzz target runs, and some
//! seeded mutations of each, so that a promise which breaks easily breaks here too.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(unreachable_pub, reason = "a library of the fuzzer's workspace")]
#[path = "../fuzz/src/lib.rs"]
mod targets;

use std::{fs, path::Path};

use targets::{Entry, TARGETS};

/// Of each seed, unless `QKD_MUTATIONS` says how many.
const MUTATIONS: u64 = 40;

fn replay(name: &str) {
    let (_, entry) = TARGETS.iter().find(|(target, _)| *target == name).unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus-seeds")
        .join(name);
    let mut seeds: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|file| file.unwrap().path())
        .collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "{name} has no seeds");
    let mutations = std::env::var("QKD_MUTATIONS").map_or(MUTATIONS, |text| text.parse().unwrap());
    for path in seeds {
        let seed = fs::read(&path).unwrap();
        run(*entry, &seed, &format!("{}", path.display()));
        for number in 0..mutations {
            let what = format!("mutation {number} of {}", path.display());
            run(*entry, &mutation(&seed, number), &what);
        }
    }
}

fn run(entry: Entry, input: &[u8], what: &str) {
    let outcome = std::panic::catch_unwind(|| entry(input));
    assert!(outcome.is_ok(), "{what}: {}", input.escape_ascii());
}

/// A few bytes changed, removed or doubled.
fn mutation(seed: &[u8], number: u64) -> Vec<u8> {
    let mut state = number;
    let mut below = |bound: usize| {
        // SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % bound.max(1) as u64).unwrap()
    };
    let mut bytes = seed.to_vec();
    for _ in 0..=below(4) {
        let at = below(bytes.len());
        match below(4) {
            0 => bytes.truncate(at),
            1 if at < bytes.len() => drop(bytes.remove(at)),
            2 => bytes.insert(at, u8::try_from(below(256)).unwrap()),
            _ if at < bytes.len() => bytes[at] ^= 1 << below(8),
            _ => {}
        }
    }
    bytes
}

#[test]
fn key_managers_do_supply_keys_in_what_is_replayed() {
    let play = |name: &str| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus-seeds/kma");
        let tally = targets::kma::play(&fs::read(folder.join(name)).unwrap());
        (tally.supplied, tally.fetched)
    };
    assert_eq!(play("two"), (4, 4));
    assert_eq!(play("three"), (5, 5));
}

/// Every target has a test of its own, so that they run side by side.
macro_rules! replays {
    ($($test:ident: $name:literal,)*) => {
        $(#[test] fn $test() { replay($name); })*

        #[test]
        fn every_target_is_replayed() {
            assert_eq!(TARGETS.map(|(name, _)| name), [$($name),*]);
        }
    };
}

replays! {
    blocks_and_statuses_are_sound_or_refused: "block",
    clavis2_datagrams_are_sound_or_refused: "clavis2",
    configurations_are_consistent_or_refused: "config",
    names_of_flat_blocks_are_file_names_or_refused: "cor",
    etsi_014_requests_are_within_limits_or_refused: "etsi014",
    lines_of_digits_are_keys_or_named_errors: "hex_lines",
    journals_are_prefixes_of_what_was_written_or_refused: "journal",
    key_files_are_sound_or_refused: "key_file",
    kernels_of_every_backend_agree: "kernels",
    key_managers_survive_any_peer: "kma",
    json_objects_are_strict_or_refused: "net_json",
    r10_records_are_bounded_or_refused: "r10",
    rings_survive_any_producer: "ring",
    serial_lines_carry_frames_whatever_the_pieces: "serial",
    signalling_messages_are_sound_or_refused: "signal",
    type_7_files_are_sound_or_refused: "type7",
    uuid_records_have_an_id_or_are_refused: "uuid_record",
}
