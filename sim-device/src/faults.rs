//! The plan of faults, which both halves draw from the shared seed.

use serde::Deserialize;

use crate::pair::Role;

/// How often what goes wrong, in blocks per million.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FaultConfig {
    /// Only one half delivers the block.
    pub one_sided_per_million: u32,
    /// One bit differs between the halves.
    pub differing_per_million: u32,
    /// The block was given up: both halves deliver it with no bits.
    pub empty_per_million: u32,
}

/// What goes wrong with one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// This half does not deliver it.
    MissingAt(Role),
    /// This half has the bit flipped.
    DiffersAt {
        /// The half.
        role: Role,
        /// The bit, counted from the first.
        bit: u32,
    },
    /// It has no bits.
    Empty,
}

impl FaultConfig {
    /// Blocks per million that have some fault; more than a million is not a plan.
    #[must_use]
    pub fn sum_per_million(&self) -> u64 {
        [
            self.one_sided_per_million,
            self.differing_per_million,
            self.empty_per_million,
        ]
        .into_iter()
        .map(u64::from)
        .sum()
    }

    /// The fault of a block of `key_bits`, from 16 random bytes that belong to it alone.
    pub(crate) fn draw(&self, random: [u8; 16], key_bits: u32) -> Option<Fault> {
        let [d0, d1, d2, d3, b0, b1, b2, b3, side, ..] = random;
        let draw = scale([d0, d1, d2, d3], 1_000_000);
        let role = if side & 1 == 0 {
            Role::Transmitter
        } else {
            Role::Receiver
        };
        let one_sided = self.one_sided_per_million;
        let differing = one_sided + self.differing_per_million;
        let empty = differing + self.empty_per_million;
        match draw {
            _ if draw < one_sided => Some(Fault::MissingAt(role)),
            _ if draw < differing && key_bits > 0 => Some(Fault::DiffersAt {
                role,
                bit: scale([b0, b1, b2, b3], key_bits),
            }),
            _ if draw < empty => Some(Fault::Empty),
            _ => None,
        }
    }
}

/// A number below `below`, as even as 32 random bits allow.
fn scale(random: [u8; 4], below: u32) -> u32 {
    let product = u64::from(u32::from_le_bytes(random)) * u64::from(below);
    u32::try_from(product >> 32).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_the_scale_are_reached() {
        assert_eq!(scale([0; 4], 10), 0);
        assert_eq!(scale([0xff; 4], 10), 9);
    }

    #[test]
    fn each_kind_has_its_part_of_the_scale() {
        let plan = FaultConfig {
            one_sided_per_million: 250_000,
            differing_per_million: 250_000,
            empty_per_million: 250_000,
        };
        let draw = |top: u8, side: u8| {
            let mut random = [0; 16];
            (random[3], random[8]) = (top, side);
            plan.draw(random, 8)
        };
        assert_eq!(draw(0, 0), Some(Fault::MissingAt(Role::Transmitter)));
        assert_eq!(draw(63, 1), Some(Fault::MissingAt(Role::Receiver)));
        let (role, bit) = (Role::Receiver, 0);
        assert_eq!(draw(64, 1), Some(Fault::DiffersAt { role, bit }));
        assert_eq!(draw(128, 1), Some(Fault::Empty));
        assert_eq!(draw(192, 1), None);
        assert_eq!(plan.sum_per_million(), 750_000);
    }
}
