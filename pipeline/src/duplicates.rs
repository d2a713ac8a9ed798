//! The same key bytes a second time: a device that repeats itself, or a replay.
//!
//! Two QKD-keys with the same bits would be one-time pad used twice, whatever they are called. A
//! fingerprint of every QKD-key that was kept stays here after the key is gone. It is taken of the
//! first [`HEAD_BYTES`]: whoever repeats a key repeats its head, and the cost has a bound.
//!
//! # What a fingerprint tells
//!
//! It is 64 bits of SHA-256 over a secret and the POLYVAL hash of the head under another secret. Both
//! are drawn when the process starts and never leave it, so nobody can prepare keys that collide,
//! and SHA-256 lets nobody who reads the process's memory turn it back into key.
//!
//! # Errors of the method
//!
//! A repetition is found for certain within the last [`WINDOW`] QKD-keys of the stage, of all its
//! module pairs together. A key that is no repetition is refused with a probability of 2^-48 at most
//! (65,536 fingerprints of 64 bits). Keys below [`SHORTEST_BYTES`] are let through: they may well
//! come twice by chance.

use qkd_kernels::{Backend, TagKey, wipe};

/// How many fingerprints are remembered: 1.5 MiB.
pub(crate) const WINDOW: usize = 1 << 16;

/// The shortest key that has a fingerprint.
pub(crate) const SHORTEST_BYTES: usize = 16;

/// How much of a key its fingerprint is taken of.
const HEAD_BYTES: usize = 4 << 10;

/// The fingerprints of the last keys.
#[derive(Debug)]
pub(crate) struct Duplicates {
    backend: Backend,
    hash: TagKey,
    secret: Secret,
    seen: Seen,
}

impl Duplicates {
    /// Remembers nothing yet. `secret` is random, and of this process alone; half of it is the hash
    /// key, half hides what the hash tells.
    pub(crate) fn new(backend: Backend, mut secret: [u8; 32]) -> Self {
        let [mut hash_key, hiding] = [0, 16].map(|at| {
            let mut half = [0; 16];
            half.copy_from_slice(&secret[at..at + 16]);
            half
        });
        let hash = backend.tag_key(&hash_key);
        wipe(&mut hash_key);
        wipe(&mut secret);
        Self {
            backend,
            hash,
            secret: Secret(hiding),
            seen: Seen::new(),
        }
    }

    /// Whether the key is among the last ones; if not, it is now.
    pub(crate) fn is_repeated(&mut self, key: &[u8]) -> bool {
        key.len() >= SHORTEST_BYTES && {
            let fingerprint = self.fingerprint(&key[..key.len().min(HEAD_BYTES)]);
            !self.seen.insert(fingerprint)
        }
    }

    fn fingerprint(&self, head: &[u8]) -> u64 {
        let mut message = [0; 32];
        let mut digest = [[0; 32]];
        message[..16].copy_from_slice(&self.secret.0);
        message[16..].copy_from_slice(&self.hash.tag(&[], head));
        self.backend.sha256_units(&message, 32, &mut digest);
        wipe(&mut message);
        u64::from_le_bytes(digest[0].as_chunks().0[0])
    }
}

/// Wiped on drop, never printed.
struct Secret([u8; 16]);

impl Drop for Secret {
    fn drop(&mut self) {
        wipe(&mut self.0);
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// The last [`WINDOW`] numbers that were inserted, in chains by their lowest bits.
///
/// An arrival's place is its number modulo the window, so a link to an arrival that has left the
/// window is known by its number alone, and nothing has to be taken out of a chain. No step
/// allocates; a chain has one link on average.
struct Seen {
    /// The number of the next arrival. It starts above [`WINDOW`], so that 0 is outside.
    next: u64,
    arrivals: Box<[Arrival]>,
    /// The latest arrival of each chain.
    latest: Box<[u64]>,
}

#[derive(Clone, Copy)]
struct Arrival {
    fingerprint: u64,
    /// The one before it in its chain.
    before: u64,
}

impl Seen {
    fn new() -> Self {
        let nothing = Arrival {
            fingerprint: 0,
            before: 0,
        };
        Self {
            next: WINDOW as u64 + 1,
            arrivals: vec![nothing; WINDOW].into(),
            latest: vec![0; WINDOW].into(),
        }
    }

    /// `false` if the fingerprint is in the window already; then nothing changes.
    fn insert(&mut self, fingerprint: u64) -> bool {
        let oldest = self.next - WINDOW as u64;
        let chain = place(fingerprint);
        let mut link = self.latest[chain];
        while link >= oldest {
            let arrival = self.arrivals[place(link)];
            if arrival.fingerprint == fingerprint {
                return false;
            }
            link = arrival.before;
        }
        self.arrivals[place(self.next)] = Arrival {
            fingerprint,
            before: self.latest[chain],
        };
        self.latest[chain] = self.next;
        self.next += 1;
        true
    }
}

/// The number modulo [`WINDOW`].
fn place(number: u64) -> usize {
    let [low, high, ..] = number.to_le_bytes();
    usize::from(u16::from_le_bytes([low, high]))
}

const _: () = assert!(WINDOW == 1 << u16::BITS);

impl std::fmt::Debug for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let count = (self.next - 1 - WINDOW as u64).min(WINDOW as u64);
        write!(f, "Seen({count} fingerprints)")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashSet, VecDeque};

    use super::*;

    #[test]
    fn a_fingerprint_is_known_for_exactly_one_window() {
        let mut seen = Seen::new();
        let window = WINDOW as u64;
        // Neighbours in one chain, and zero, which is also what empty places hold.
        for n in 0..window {
            assert!(seen.insert(n << 8));
        }
        assert!(!seen.insert(0), "the oldest is in the window");
        assert!(seen.insert(1));
        assert!(seen.insert(0), "it has left the window");
        assert!(!seen.insert(2 << 8));
    }

    #[test]
    fn the_window_agrees_with_a_queue_and_a_set() {
        let (mut seen, mut queue, mut set) = (Seen::new(), VecDeque::new(), HashSet::new());
        let mut state = 1_u64;
        for _ in 0..4 * WINDOW {
            state = state.wrapping_mul(6_364_136_223_846_793_005) + 1;
            // Few enough values to come again, inside the window and after it; few chains.
            let value = ((state >> 40) % (3 * WINDOW as u64)) << 8;
            assert_eq!(seen.insert(value), set.insert(value));
            if set.len() > queue.len() {
                queue.push_back(value);
            }
            if queue.len() > WINDOW {
                set.remove(&queue.pop_front().unwrap());
            }
        }
        assert_eq!(queue.len(), WINDOW);
    }

    #[test]
    fn the_same_bytes_are_known_and_others_are_not() {
        for backend in Backend::all() {
            let mut duplicates = Duplicates::new(backend, [7; 32]);
            let key: Vec<u8> = (0..200).collect();
            for len in SHORTEST_BYTES..200 {
                assert!(!duplicates.is_repeated(&key[..len]), "{len} bytes");
            }
            for len in SHORTEST_BYTES..200 {
                assert!(duplicates.is_repeated(&key[..len]), "{len} bytes");
            }
            let mut one_bit_off = key.clone();
            one_bit_off[100] ^= 1;
            assert!(!duplicates.is_repeated(&one_bit_off));
        }
    }

    #[test]
    fn a_long_key_is_known_by_its_head() {
        let mut duplicates = Duplicates::new(Backend::detect(), [7; 32]);
        let mut key = vec![7; 3 * HEAD_BYTES];
        assert!(!duplicates.is_repeated(&key));
        key[HEAD_BYTES] = 8;
        assert!(duplicates.is_repeated(&key));
        assert!(duplicates.is_repeated(&key[..HEAD_BYTES]));
        assert!(!duplicates.is_repeated(&key[..HEAD_BYTES - 1]));
        key[HEAD_BYTES - 1] = 8;
        assert!(!duplicates.is_repeated(&key));
    }

    #[test]
    fn short_keys_may_come_twice() {
        let mut duplicates = Duplicates::new(Backend::detect(), [7; 32]);
        assert!(!duplicates.is_repeated(&[1; 15]) && !duplicates.is_repeated(&[1; 15]));
        assert!(!duplicates.is_repeated(&[1; 16]) && duplicates.is_repeated(&[1; 16]));
    }

    #[test]
    fn a_fingerprint_depends_on_the_secret_which_is_not_printed() {
        let (one, other) = (
            Duplicates::new(Backend::PORTABLE, [1; 32]),
            Duplicates::new(Backend::PORTABLE, [2; 32]),
        );
        assert_ne!(one.fingerprint(&[7; 32]), other.fingerprint(&[7; 32]));
        assert!(format!("{one:?}").contains("Secret, seen: Seen(0 fingerprints)"));
    }
}
