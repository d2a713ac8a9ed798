//! A set of numbers kept as disjoint, sorted, non-adjacent ranges.

use serde::{Deserialize, Serialize};

/// Which numbers (bytes of a segment, sequence numbers, vendor IDs) something has happened to.
///
/// Use in order keeps it at one range, whatever its size.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RangeSet(Vec<(u64, u64)>);

impl RangeSet {
    /// Index of the first range that ends at or after `at`.
    fn first_reaching(&self, at: u64) -> usize {
        self.0.partition_point(|&(_, end)| end < at)
    }

    /// Adds `start..end` if no number of it is there yet; says whether it did.
    pub(crate) fn insert_new(&mut self, start: u64, end: u64) -> bool {
        if self.overlap(start, end) != 0 {
            return false;
        }
        self.insert(start, end);
        true
    }

    /// Adds `start..end`, whatever of it is there already.
    pub(crate) fn insert(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let from = self.first_reaching(start);
        let to = from + self.0[from..].partition_point(|&(s, _)| s <= end);
        let merged = self.0[from..to]
            .iter()
            .fold((start, end), |(s, e), &(rs, re)| (s.min(rs), e.max(re)));
        self.0.splice(from..to, [merged]);
    }

    /// Takes `start..end` out, whatever of it is there.
    pub(crate) fn remove(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let from = self.0.partition_point(|&(_, e)| e <= start);
        let to = from + self.0[from..].partition_point(|&(s, _)| s < end);
        let left = self.0[from..to].first().map(|&(s, _)| (s, start));
        let right = self.0[from..to].last().map(|&(_, e)| (end, e));
        let kept: Vec<_> = left
            .into_iter()
            .chain(right)
            .filter(|&(s, e)| s < e)
            .collect();
        self.0.splice(from..to, kept);
    }

    /// Closes the lowest gaps until there are at most `ranges_max` ranges.
    pub(crate) fn close_gaps(&mut self, ranges_max: usize) {
        while self.0.len() > ranges_max.max(1) {
            let (start, _) = self.0.remove(0);
            self.0[0].0 = start;
        }
    }

    /// Whether `at` is in the set; the greatest number of all never is.
    pub(crate) fn contains(&self, at: u64) -> bool {
        self.overlap(at, at.saturating_add(1)) == 1
    }

    /// How many numbers of `start..end` are in the set.
    pub(crate) fn overlap(&self, start: u64, end: u64) -> u64 {
        self.0[self.first_reaching(start)..]
            .iter()
            .take_while(|&&(s, _)| s < end)
            .map(|&(s, e)| e.min(end).saturating_sub(s.max(start)))
            .sum()
    }

    /// The parts of `start..end` that are not in the set, in order.
    pub(crate) fn missing(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut at = start;
        let mut gaps = Vec::new();
        for &(s, e) in &self.0[self.first_reaching(start)..] {
            if s >= end {
                break;
            }
            if at < s {
                gaps.push((at, s));
            }
            at = at.max(e);
        }
        if at < end {
            gaps.push((at, end));
        }
        gaps
    }

    /// One past the greatest number, 0 when there is none.
    pub(crate) fn end(&self) -> u64 {
        self.0.last().map_or(0, |&(_, end)| end)
    }

    /// How many numbers are in the set.
    pub(crate) fn len(&self) -> u64 {
        self.0.iter().map(|&(s, e)| e - s).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn touching_ranges_become_one() {
        let mut set = RangeSet::default();
        for (s, e) in [(10, 20), (30, 40), (20, 30)] {
            assert!(set.insert_new(s, e));
        }
        assert_eq!(set, RangeSet(vec![(10, 40)]));
        assert!(!set.insert_new(39, 41));
        assert_eq!(set.missing(0, 50), [(0, 10), (40, 50)]);
    }

    #[test]
    fn the_greatest_number_of_all_is_in_no_set() {
        let mut set = RangeSet::default();
        set.insert(0, u64::MAX);
        assert!(set.contains(u64::MAX - 1));
        assert!(!set.contains(u64::MAX));
    }

    proptest! {
        #[test]
        fn behaves_like_a_set_of_numbers(ops in prop::collection::vec((0_u64..60, 0_u64..12, 0_u8..4), 0..40)) {
            let mut ours = RangeSet::default();
            let mut model = BTreeSet::new();
            for (start, len, kind) in ops {
                let range = start..start + len;
                let overlap = range.clone().filter(|n| model.contains(n)).count() as u64;
                prop_assert_eq!(ours.overlap(range.start, range.end), overlap);
                if kind == 0 {
                    ours.remove(range.start, range.end);
                    model.retain(|n| !range.contains(n));
                } else if kind == 1 {
                    prop_assert_eq!(ours.insert_new(range.start, range.end), overlap == 0);
                    if overlap != 0 { continue; }
                } else {
                    ours.insert(range.start, range.end);
                }
                if kind != 0 {
                    model.extend(range);
                }
                prop_assert_eq!(ours.len(), model.len() as u64);
                prop_assert_eq!(ours.end(), model.last().map_or(0, |n| n + 1));
                let missing: Vec<u64> = ours.missing(0, 80).into_iter().flat_map(|(s, e)| s..e).collect();
                prop_assert_eq!(missing, (0..80).filter(|n| !model.contains(n)).collect::<Vec<_>>());
                prop_assert!((0..80).all(|n| ours.contains(n) == model.contains(&n)));
                prop_assert!(ours.0.windows(2).all(|w| w[0].1 < w[1].0));
            }
        }
    }
}
