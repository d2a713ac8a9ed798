//! Vendor IDs that came in already.

use std::collections::BTreeSet;

use qkd_keyfile::QkdKeyId;
use serde::{Deserialize, Serialize};

use crate::ranges::RangeSet;

/// Vendor IDs that came in already: as ranges of numbers where they are numbers.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UsedIds {
    numbers: [RangeSet; 2],
    texts: BTreeSet<QkdKeyId>,
}

impl UsedIds {
    /// Which number an ID is, if any: decimal without leading zeros, or eight hexadecimal digits.
    fn number(id: &QkdKeyId) -> Option<(usize, u64)> {
        let text = id.as_str();
        let lower_hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        if text.len() == 8 && text.chars().all(lower_hex) {
            return Some((0, u64::from_str_radix(text, 16).ok()?));
        }
        let number = text.parse::<u64>().ok()?;
        (number < u64::MAX && number.to_string() == text).then_some((1, number))
    }

    pub(crate) fn contains(&self, id: &QkdKeyId) -> bool {
        match Self::number(id) {
            Some((kind, n)) => self.numbers[kind].contains(n),
            None => self.texts.contains(id),
        }
    }

    pub(crate) fn insert(&mut self, id: &QkdKeyId) {
        match Self::number(id) {
            Some((kind, n)) => self.numbers[kind].insert(n, n + 1),
            None => {
                self.texts.insert(id.clone());
            }
        }
    }

    /// The greatest decimal number that came in.
    pub(crate) fn last_number(&self) -> Option<u64> {
        self.numbers[1].end().checked_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> QkdKeyId {
        text.parse().unwrap()
    }

    #[test]
    fn ids_that_look_alike_are_told_apart() {
        let looks = [
            "7",
            "07",
            "00000007",
            "7.0",
            "12345678",
            "deadbeef",
            "DEADBEEF",
            "18446744073709551615",
            "18446744073709551614",
            "18446744073709551616",
        ];
        let mut used = UsedIds::default();
        for (at, text) in looks.iter().enumerate() {
            assert!(!used.contains(&id(text)), "{text}");
            used.insert(&id(text));
            assert!(looks[..=at].iter().all(|t| used.contains(&id(t))));
        }
        assert_eq!(used.last_number(), Some(u64::MAX - 1));
    }

    #[test]
    fn numbers_in_a_row_take_the_room_of_one() {
        let mut used = UsedIds::default();
        (0..5000).for_each(|n: u32| used.insert(&id(&n.to_string())));
        (0..5000).for_each(|n: u32| used.insert(&id(&format!("{n:08x}"))));
        assert!(postcard::to_allocvec(&used).unwrap().len() < 20);
    }
}
