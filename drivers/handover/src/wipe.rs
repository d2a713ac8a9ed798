//! Wiping of what held key.

/// Makes `bytes` zero, in a way that the compiler may not leave out.
///
/// As thorough as [`zeroize::Zeroize`] on a slice and many times as fast: that writes one byte at a
/// time.
pub fn wipe(bytes: &mut [u8]) {
    bytes.fill(0);
    zeroize::optimization_barrier(bytes);
}
