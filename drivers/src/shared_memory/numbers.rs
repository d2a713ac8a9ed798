//! The numbers of a device's blocks, over all its rings.

use crate::{event::CorruptReason, outstanding::Outstanding};

/// The numbers of the device's blocks, over all rings.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    pub(super) outstanding: Outstanding<u64>,
    /// Highest number that was delivered.
    delivered: Option<u64>,
    /// Highest number up to which all are settled: what the next greeting says.
    pub(super) durable: Option<u64>,
    /// Last number in this ring.
    in_ring: Option<u64>,
}

impl Numbers {
    /// Numbers begin again, above what is durable, with every ring.
    pub(super) const fn begin_ring(&mut self) {
        self.in_ring = None;
    }

    /// Whether a block is to be delivered: `false` if it was, and came again in a new ring because
    /// it had not been settled.
    pub(super) fn take(&mut self, number: u64) -> Result<bool, CorruptReason> {
        if let Some(after) = self.in_ring.filter(|&after| number <= after) {
            return Err(CorruptReason::Disordered { number, after });
        }
        self.in_ring = Some(number);
        if let Some(durable) = self.durable.filter(|&durable| number <= durable) {
            return Err(CorruptReason::Durable { number, durable });
        }
        if self.delivered.is_some_and(|delivered| number <= delivered) {
            return Ok(false);
        }
        self.delivered = Some(number);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_delivered_once_over_all_rings() {
        let mut numbers = Numbers::default();
        assert_eq!(numbers.take(3), Ok(true));
        assert_eq!(numbers.take(7), Ok(true));
        let (number, after) = (7, 7);
        assert_eq!(
            numbers.take(7),
            Err(CorruptReason::Disordered { number, after })
        );
        numbers.durable = Some(3);
        numbers.begin_ring();
        let (number, durable) = (2, 3);
        assert_eq!(
            numbers.take(2),
            Err(CorruptReason::Durable { number, durable })
        );
        assert_eq!(numbers.take(7), Ok(false));
        assert_eq!(numbers.take(8), Ok(true));
    }
}
