use crate::wipe;

/// How many blocks share one reduction.
pub(crate) const POWERS: usize = 32;

/// Powers that are there: for 32 blocks and the lengths, in vectors of four.
const HIGHEST: usize = POWERS + 4;

/// The powers of a POLYVAL key, highest first: `H^36, .., H^2, H`, then three zeros, so that four
/// from any power on are there. Power means repeated `dot` (RFC 8452, clause 3).
#[repr(C, align(64))]
pub(crate) struct Powers(pub(crate) [[u8; 16]; HIGHEST + 3]);

impl Powers {
    pub(crate) fn zero() -> Box<Self> {
        Box::new(Self([[0; 16]; HIGHEST + 3]))
    }

    /// Where the power `n`, from 1 on, lies.
    #[inline(always)]
    const fn place(n: usize) -> usize {
        HIGHEST - n
    }

    /// `H` itself, and how it is raised: `times(a, b)` is the product of two powers.
    #[inline(always)]
    pub(crate) fn fill(&mut self, h: &[u8; 16], times: impl Fn(&[u8; 16], &[u8; 16]) -> [u8; 16]) {
        self.0[Self::place(1)] = *h;
        for n in 2..=HIGHEST {
            // From two of about half its size, so that the chain of dependent products is short.
            let (a, b) = (Self::place(n / 2), Self::place(n.div_ceil(2)));
            self.0[Self::place(n)] = times(&self.0[a], &self.0[b]);
        }
    }

    /// What `blocks` blocks, at most [`POWERS`] and one more, are multiplied with, in their order.
    pub(crate) fn for_blocks(&self, blocks: usize) -> &[[u8; 16]] {
        &self.0[Self::place(blocks)..HIGHEST]
    }

    /// The same, four at a time for registers of four blocks, the last ones filled up with zeros.
    #[inline(always)]
    pub(crate) fn for_vectors(&self, blocks: usize) -> &[[[u8; 16]; 4]] {
        let start = Self::place(blocks);
        let end = start + blocks.next_multiple_of(4);
        self.0[start..end].as_chunks().0
    }
}

impl Drop for Powers {
    fn drop(&mut self) {
        wipe(self.0.as_flattened_mut());
    }
}
