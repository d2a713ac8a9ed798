use crate::wipe;

/// How many powers a key has: 32 blocks share one reduction.
pub(crate) const POWERS: usize = 32;

/// The powers of a POLYVAL key, highest first: `H^32, .., H^2, H`, then three zeros, so that four
/// from any power on are there. Power means repeated `dot` (RFC 8452, clause 3).
#[repr(C, align(64))]
pub(crate) struct Powers(pub(crate) [[u8; 16]; POWERS + 3]);

impl Powers {
    pub(crate) fn zero() -> Box<Self> {
        Box::new(Self([[0; 16]; POWERS + 3]))
    }

    /// What `blocks` blocks, at most [`POWERS`], are multiplied with, in their order.
    pub(crate) fn for_blocks(&self, blocks: usize) -> &[[u8; 16]] {
        &self.0[POWERS - blocks..POWERS]
    }

    /// The same, four at a time for registers of four blocks, the last ones filled up with zeros.
    #[inline(always)]
    pub(crate) fn for_vectors(&self, blocks: usize) -> &[[[u8; 16]; 4]] {
        let start = POWERS - blocks;
        let end = start + blocks.next_multiple_of(4);
        self.0[start..end].as_chunks().0
    }
}

impl Drop for Powers {
    fn drop(&mut self) {
        wipe(self.0.as_flattened_mut());
    }
}
