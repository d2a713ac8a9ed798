//! Vendor IDs that came in already, in bounded memory.
//!
//! An ID is refused for ever once it came in, in its generation. IDs that are numbers are kept as
//! ranges; where a module leaves too many gaps, the lowest is closed: numbers that far behind the
//! others never come in any more. Other IDs are kept one by one, until there are [`TEXTS_MAX`]: then
//! the proposer raises the generation, which is the same module in a new life of its names, and every
//! name of the life before is refused by its generation alone. Those of the last life are refused in
//! the new one too, in case hardware delivers again what it delivered around the change.

use std::collections::BTreeSet;

use qkd_keyfile::QkdKeyId;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::ranges::RangeSet;

/// Ranges of numbers that are kept apart, per kind of number.
const RANGES_MAX: usize = if cfg!(test) { 64 } else { 4096 };

/// IDs that are no numbers, in one generation.
pub(crate) const TEXTS_MAX: usize = if cfg!(test) { 256 } else { 1 << 19 };

/// Vendor IDs that came in already: as ranges of numbers where they are numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UsedIds {
    numbers: [RangeSet; 2],
    /// 64 bits of SHA-256 of each. Two IDs that share them cost a QKD-key, never a bit twice.
    texts: BTreeSet<u64>,
    /// Those of the generation before, if its numbering went on.
    earlier_texts: BTreeSet<u64>,
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
            None => {
                let text = digest(id);
                self.texts.contains(&text) || self.earlier_texts.contains(&text)
            }
        }
    }

    pub(crate) fn insert(&mut self, id: &QkdKeyId) {
        match Self::number(id) {
            Some((kind, n)) => {
                self.numbers[kind].insert(n, n + 1);
                self.numbers[kind].close_gaps(RANGES_MAX);
            }
            None => {
                self.texts.insert(digest(id));
            }
        }
    }

    /// IDs that are no numbers: at [`TEXTS_MAX`], the generation has to be raised.
    pub(crate) fn texts(&self) -> usize {
        self.texts.len()
    }

    /// The generation is raised, and the module goes on with its numbering.
    pub(crate) fn go_on(&mut self) {
        self.earlier_texts = std::mem::take(&mut self.texts);
    }

    /// The IDs that are numbers.
    pub(crate) fn numbers_only(&self) -> Self {
        Self {
            numbers: self.numbers.clone(),
            ..Self::default()
        }
    }

    /// Whether an ID is a number.
    pub(crate) fn is_number(id: &QkdKeyId) -> bool {
        Self::number(id).is_some()
    }
}

fn digest(id: &QkdKeyId) -> u64 {
    let digest: [u8; 32] = Sha256::digest(id.as_str()).into();
    let (first, _) = digest.split_first_chunk().expect("32 is more than 8");
    u64::from_le_bytes(*first)
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
    }

    #[test]
    fn numbers_in_a_row_take_the_room_of_one() {
        let mut used = UsedIds::default();
        (0..5000).for_each(|n: u32| used.insert(&id(&n.to_string())));
        (0..5000).for_each(|n: u32| used.insert(&id(&format!("{n:08x}"))));
        assert!(postcard::to_allocvec(&used).unwrap().len() < 20);
    }

    #[test]
    fn a_set_of_ids_is_bounded_and_forgets_none() {
        let mut used = UsedIds::default();
        // Every second number: none joins another.
        let ids: Vec<_> = (0..5000_u32)
            .map(|n| id(&format!("{:08x}", 2 * n)))
            .collect();
        for (at, next) in ids.iter().enumerate() {
            used.insert(next);
            assert!(at % 100 != 0 || ids[..=at].iter().all(|id| used.contains(id)));
        }
        assert!(postcard::to_allocvec(&used).unwrap().len() < 10 * RANGES_MAX);
        assert!(used.contains(&id("00000001")), "too far behind");
        assert!(!used.contains(&id("0000270d")), "not far behind");
    }

    #[test]
    fn texts_of_the_generation_before_are_refused_while_the_numbering_goes_on() {
        let mut used = UsedIds::default();
        used.insert(&id("first"));
        used.insert(&id("7"));
        used.go_on();
        used.insert(&id("second"));
        assert_eq!(used.texts(), 1);
        assert!(
            ["first", "second", "7"]
                .iter()
                .all(|t| used.contains(&id(t)))
        );
        used.go_on();
        assert!(!used.contains(&id("first")), "refused by its generation");
    }
}
