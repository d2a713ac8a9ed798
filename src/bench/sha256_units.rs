//! SHA-256 of units that lie end to end.

use qkd_kernels::Backend;
use sha2::{Digest, Sha256};

/// The rival: one call of `sha2` per unit.
pub fn one_by_one(data: &[u8], unit_bytes: usize, digests: &mut [[u8; 32]]) {
    for (unit, digest) in data.chunks_exact(unit_bytes).zip(digests) {
        *digest = Sha256::digest(unit).into();
    }
}

/// Refuses to time a wrong answer.
///
/// # Panics
///
/// If the answer is wrong.
pub fn check(backend: Backend, data: &[u8], unit_bytes: usize) {
    let mut expected = vec![[0; 32]; data.len() / unit_bytes];
    let mut digests = expected.clone();
    one_by_one(data, unit_bytes, &mut expected);
    backend.sha256_units(data, unit_bytes, &mut digests);
    assert_eq!(digests, expected, "{}", backend.name());
}
