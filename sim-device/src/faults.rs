//! The plan of faults, which both halves draw from the shared seed.
//!
//! Some faults are of the block: they are there whatever carries it. The others happen on the way, at
//! one half, and are played by the transports (see [`WireFault`]). A block has one fault at most, and a
//! block that is sent again has none on its way: equal seeds give equal faults, whatever the timing.

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
    /// Both halves deliver the bits of the block before once more, under this number.
    pub replayed_per_million: u32,
    /// Three bits of eight are cleared with a probability of one half: too few ones.
    pub biased_per_million: u32,
    /// It is lost on its way.
    pub drop_per_million: u32,
    /// It arrives twice.
    pub duplicate_per_million: u32,
    /// One bit of what carries it is changed on its way.
    pub flip_per_million: u32,
    /// It comes in pieces, or its end comes late.
    pub split_per_million: u32,
    /// The block after it overtakes it.
    pub reorder_per_million: u32,
    /// Nothing comes for a while before it.
    pub stall_per_million: u32,
    /// The connection breaks in the middle of it.
    pub hang_up_per_million: u32,
    /// How long a stall is, in milliseconds; 500 if left out.
    pub stall_ms: Option<u32>,
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
    /// It has the bits of the block before.
    Replayed,
    /// It has too few ones.
    Biased,
    /// Something happens to it on its way from this half.
    OnTheWay {
        /// The half.
        role: Role,
        /// What.
        fault: WireFault,
    },
}

/// What happens to a block on its way.
///
/// | | serial line | ring | files |
/// |---|---|---|---|
/// | drop | frame not sent | counted as dropped for want of room | file not written |
/// | duplicate | frame twice | record twice | file again once the next is there |
/// | flip | a bit of the frame | a bit of the payload | a bit of the file |
/// | split | a few bytes at a time | position published in the middle of the record | written in pieces |
/// | reorder | after the next frame | after the next record | after the next file |
/// | stall | silence | no record and no heartbeat | no file |
/// | hang up | port closed in mid-frame | connection closed in mid-record | file left cut off |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WireFault {
    /// Lost.
    Drop,
    /// Twice.
    Duplicate,
    /// Changed; the number picks the bit.
    Flip(u32),
    /// In pieces.
    Split,
    /// After the next.
    Reorder,
    /// Late.
    Stall,
    /// Cut off.
    HangUp,
}

impl Fault {
    /// As it is told, and as `_per_million` names it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::MissingAt(_) => "one_sided",
            Self::DiffersAt { .. } => "differing",
            Self::Empty => "empty",
            Self::Replayed => "replayed",
            Self::Biased => "biased",
            Self::OnTheWay { fault, .. } => fault.name(),
        }
    }

    /// The half at which it shows; both where there is none.
    #[must_use]
    pub const fn role(&self) -> Option<Role> {
        match *self {
            Self::MissingAt(role) | Self::DiffersAt { role, .. } | Self::OnTheWay { role, .. } => {
                Some(role)
            }
            Self::Empty | Self::Replayed | Self::Biased => None,
        }
    }
}

impl WireFault {
    /// As it is told.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Drop => "drop",
            Self::Duplicate => "duplicate",
            Self::Flip(_) => "flip",
            Self::Split => "split",
            Self::Reorder => "reorder",
            Self::Stall => "stall",
            Self::HangUp => "hang_up",
        }
    }
}

impl FaultConfig {
    /// Blocks per million that have some fault; more than a million is not a plan.
    #[must_use]
    pub fn sum_per_million(&self) -> u64 {
        self.parts().into_iter().map(u64::from).sum()
    }

    /// Whether nothing ever goes wrong.
    pub(crate) fn is_none(&self) -> bool {
        self.sum_per_million() == 0
    }

    fn parts(&self) -> [u32; 12] {
        [
            self.one_sided_per_million,
            self.differing_per_million,
            self.empty_per_million,
            self.replayed_per_million,
            self.biased_per_million,
            self.drop_per_million,
            self.duplicate_per_million,
            self.flip_per_million,
            self.split_per_million,
            self.reorder_per_million,
            self.stall_per_million,
            self.hang_up_per_million,
        ]
    }

    /// The fault of a block of `key_bits`, from 16 random bytes that belong to it alone.
    pub(crate) fn draw(&self, random: [u8; 16], key_bits: u32) -> Option<Fault> {
        let [d0, d1, d2, d3, b0, b1, b2, b3, side, ..] = random;
        let mut draw = scale([d0, d1, d2, d3], 1_000_000);
        let pick = [b0, b1, b2, b3];
        let role = if side & 1 == 0 {
            Role::Transmitter
        } else {
            Role::Receiver
        };
        let kind = self.parts().into_iter().position(|part| {
            let here = draw < part;
            draw = draw.saturating_sub(part);
            here
        })?;
        let fault = match kind {
            0 => return Some(Fault::MissingAt(role)),
            1 if key_bits == 0 => return None,
            1 => {
                let bit = scale(pick, key_bits);
                return Some(Fault::DiffersAt { role, bit });
            }
            2 => return Some(Fault::Empty),
            3 => return Some(Fault::Replayed),
            4 => return Some(Fault::Biased),
            5 => WireFault::Drop,
            6 => WireFault::Duplicate,
            7 => WireFault::Flip(u32::from_le_bytes(pick)),
            8 => WireFault::Split,
            9 => WireFault::Reorder,
            10 => WireFault::Stall,
            _ => WireFault::HangUp,
        };
        Some(Fault::OnTheWay { role, fault })
    }
}

/// A number below `below`, as even as 32 random bits allow.
fn scale(random: [u8; 4], below: u32) -> u32 {
    let product = u64::from(u32::from_le_bytes(random)) * u64::from(below);
    u32::try_from(product >> 32).unwrap_or(0)
}

/// The bit that a flip changes, of so many.
pub(crate) fn picked(pick: u32, bits: usize) -> usize {
    let product = u64::from(pick) * bits as u64;
    usize::try_from(product >> 32).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_the_scale_are_reached() {
        assert_eq!(scale([0; 4], 10), 0);
        assert_eq!(scale([0xff; 4], 10), 9);
        assert_eq!((picked(0, 80), picked(u32::MAX, 80)), (0, 79));
    }

    #[test]
    fn each_kind_has_its_part_of_the_scale() {
        let plan = FaultConfig {
            one_sided_per_million: 250_000,
            differing_per_million: 250_000,
            empty_per_million: 125_000,
            hang_up_per_million: 125_000,
            ..FaultConfig::default()
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
        let fault = WireFault::HangUp;
        assert_eq!(draw(160, 1), Some(Fault::OnTheWay { role, fault }));
        assert_eq!(draw(192, 1), None);
        assert_eq!(plan.sum_per_million(), 750_000);
    }

    #[test]
    fn every_kind_is_drawn_when_all_are_planned() {
        let plan: FaultConfig = toml::from_str(
            "one_sided_per_million = 83000\ndiffering_per_million = 83000\n\
             empty_per_million = 83000\nreplayed_per_million = 83000\n\
             biased_per_million = 83000\ndrop_per_million = 83000\n\
             duplicate_per_million = 83000\nflip_per_million = 83000\n\
             split_per_million = 83000\nreorder_per_million = 83000\n\
             stall_per_million = 83000\nhang_up_per_million = 83000\n",
        )
        .unwrap();
        let mut names = std::collections::BTreeSet::new();
        for draw in 0..=255 {
            let mut random = [0; 16];
            random[3] = draw;
            names.extend(plan.draw(random, 8).map(|fault| fault.name()));
        }
        assert_eq!(names.len(), 12, "{names:?}");
    }
}
