//! Bytes that hold key for a moment.

use std::{
    fmt,
    ops::{Deref, DerefMut},
};

use zeroize::Zeroizing;

/// A buffer of fixed size, wiped on drop and never printed. Whoever puts key into it wipes it as
/// soon as the key is used up.
pub(crate) struct Scratch(Zeroizing<Box<[u8]>>);

impl Scratch {
    pub(crate) fn new(len_bytes: usize) -> Self {
        Self(Zeroizing::new(vec![0; len_bytes].into()))
    }
}

impl Deref for Scratch {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl fmt::Debug for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scratch({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_withholds_what_is_in_it() {
        let mut scratch = Scratch::new(3);
        scratch.fill(0xa5);
        assert_eq!(format!("{scratch:?}"), "Scratch(3 bytes)");
    }
}
