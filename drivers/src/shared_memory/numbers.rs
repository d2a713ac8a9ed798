//! The numbers of a device's blocks, over all its rings.

use std::num::NonZeroU64;

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
    /// The device's numbering that all these belong to.
    session: Option<NonZeroU64>,
}

impl Numbers {
    /// Numbers begin again, above what is durable, with every ring.
    pub(super) const fn begin_ring(&mut self) {
        self.in_ring = None;
    }

    /// The numbering of this ring's blocks. Where it is not that of the ring before, nothing that was
    /// said of numbers holds any more.
    pub(super) fn begin_session(&mut self, session: NonZeroU64) {
        if self.session.is_some_and(|before| before != session) {
            *self = Self::default();
        }
        self.session = Some(session);
    }

    /// The numbering of the device.
    pub(super) const fn known_session(&self) -> Option<NonZeroU64> {
        self.session
    }

    /// The numbering of the device; 0 if none is known.
    pub(super) fn session(&self) -> u64 {
        self.session.map_or(0, NonZeroU64::get)
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

    #[test]
    fn a_session_that_is_another_begins_anew() {
        let [first, second] = [1, 2].map(|n| NonZeroU64::new(n).unwrap());
        let mut numbers = Numbers::default();
        numbers.begin_session(first);
        assert_eq!(numbers.take(7), Ok(true));
        numbers.durable = Some(7);
        numbers.begin_ring();
        numbers.begin_session(first);
        assert_eq!(numbers.durable, Some(7));
        numbers.begin_ring();
        numbers.begin_session(second);
        assert_eq!((numbers.durable, numbers.session()), (None, 2));
        assert_eq!(numbers.take(1), Ok(true));
    }
}
