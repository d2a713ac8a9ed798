//! How many key blocks a module may deliver.

/// Key blocks of one module that may be on their way at a time, as far as its share of key memory
/// allows.
const CREDIT_BLOCKS: u32 = 4096;

/// Key blocks that may be on their way however long they are, so that two can alternate.
const CREDIT_BLOCKS_LEAST: u32 = 2;

/// Blocks that stop counting as on their way after a time without any settlement.
const FORGOTTEN_BLOCKS: u32 = 64;

/// What a module may still deliver, and what it has delivered.
#[derive(Debug)]
pub(super) struct Credit {
    /// Blocks that it may deliver now.
    left: u32,
    /// Blocks delivered and not settled, without the forgotten ones.
    unsettled: u32,
    share_bytes: usize,
    /// Key memory of its longest block so far.
    block_bytes: usize,
    /// Whether it has delivered any; before that, its blocks may be as long as it ever makes them.
    known: bool,
}

impl Credit {
    pub(super) const fn new(share_bytes: usize, max_block_bytes: usize) -> Self {
        Self {
            left: 0,
            unsettled: 0,
            share_bytes,
            block_bytes: max_block_bytes,
            known: false,
        }
    }

    /// Blocks that may be on their way.
    fn limit(&self) -> u32 {
        let blocks = u32::try_from(self.share_bytes / self.block_bytes.max(1));
        blocks
            .unwrap_or(u32::MAX)
            .clamp(CREDIT_BLOCKS_LEAST, CREDIT_BLOCKS)
    }

    /// Blocks to grant, so that as many are on their way as may be; they count as granted.
    pub(super) fn top_up(&mut self) -> u32 {
        let more = self.limit().saturating_sub(self.left + self.unsettled);
        self.left += more;
        more
    }

    pub(super) fn used(&mut self, block_bytes: usize) {
        self.left = self.left.saturating_sub(1);
        self.unsettled += 1;
        self.block_bytes = if self.known {
            self.block_bytes.max(block_bytes)
        } else {
            block_bytes
        };
        self.known = true;
    }

    /// A block is settled; the module's share may have changed.
    pub(super) fn settled(&mut self, share_bytes: usize) {
        self.share_bytes = share_bytes;
        self.unsettled = self.unsettled.saturating_sub(1);
    }

    pub(super) fn forget(&mut self) {
        self.unsettled = self.unsettled.saturating_sub(FORGOTTEN_BLOCKS);
    }

    pub(super) fn is_spent(&self) -> bool {
        self.left == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARE: usize = 64 << 10;

    fn credit() -> Credit {
        let mut credit = Credit::new(SHARE, 256 << 10);
        assert_eq!(credit.top_up(), CREDIT_BLOCKS_LEAST);
        credit
    }

    #[test]
    fn credit_is_used_by_delivery_and_given_back_by_settlement() {
        let mut credit = credit();
        credit.used(1 << 10);
        assert_eq!(
            credit.top_up(),
            64 - 2,
            "the share holds 64 blocks of this length"
        );
        while !credit.is_spent() {
            credit.used(1 << 10);
        }
        assert_eq!(credit.top_up(), 0);
        credit.settled(SHARE);
        assert_eq!(credit.top_up(), 1);
    }

    #[test]
    fn short_blocks_get_no_more_credit_than_there_is_and_long_ones_no_less() {
        let mut credit = credit();
        credit.used(32);
        assert_eq!(credit.limit(), 2048, "the share holds as many of 32 bytes");
        credit.used(256 << 10);
        assert_eq!(credit.limit(), CREDIT_BLOCKS_LEAST);
    }

    #[test]
    fn blocks_that_nobody_settles_give_their_credit_back_in_the_end() {
        let mut credit = credit();
        for _ in 0..1000 {
            while !credit.is_spent() {
                credit.used(256);
            }
            credit.forget();
            assert!(credit.top_up() > 0);
        }
        // Settled late, they give no credit twice.
        for _ in 0..100_000 {
            credit.settled(SHARE);
            credit.top_up();
            assert!(credit.left + credit.unsettled <= CREDIT_BLOCKS);
        }
    }
}
