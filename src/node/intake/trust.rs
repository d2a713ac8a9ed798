//! Whether a module's key may be taken: not while one of its values is where keys cannot be trusted.

use std::collections::BTreeSet;

use qkd_drivers::Band;

/// Values that are remembered, at most: a module with more of them out of range is not trusted
/// whatever becomes of the others.
const MAX_VALUES: usize = 256;

/// What a module told of itself that keeps its key from being taken.
#[derive(Debug, Default)]
pub(crate) struct Trust {
    /// Names of values that were out of the absolute range when they were last told.
    out_of_range: BTreeSet<String>,
}

/// What a value changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    None,
    Lost,
    Regained,
}

impl Trust {
    /// Takes the band in which the value `name` was told to lie.
    pub(super) fn told(&mut self, name: &str, band: Band) -> Change {
        let was = self.is_given();
        if band != Band::AbsoluteOutOfRange {
            self.out_of_range.remove(name);
        } else if self.out_of_range.len() < MAX_VALUES {
            self.out_of_range.insert(name.to_owned());
        }
        match (was, self.is_given()) {
            (true, false) => Change::Lost,
            (false, true) => Change::Regained,
            _ => Change::None,
        }
    }

    pub(super) fn is_given(&self) -> bool {
        self.out_of_range.is_empty()
    }

    /// The values that are out of range, for people.
    pub(super) fn why(&self) -> Option<String> {
        let names: Vec<&str> = self.out_of_range.iter().map(String::as_str).collect();
        (!names.is_empty()).then(|| names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trust_is_lost_with_the_first_value_out_of_range_and_back_with_the_last() {
        let mut trust = Trust::default();
        assert_eq!(
            trust.told("qber_ppm", Band::OperationOutOfRange),
            Change::None
        );
        assert_eq!(
            trust.told("qber_ppm", Band::AbsoluteOutOfRange),
            Change::Lost
        );
        assert_eq!(trust.told("bias", Band::AbsoluteOutOfRange), Change::None);
        assert_eq!(trust.told("qber_ppm", Band::Ok), Change::None);
        assert!(!trust.is_given());
        assert_eq!(trust.why().as_deref(), Some("bias"));
        assert_eq!(
            trust.told("bias", Band::OperationOutOfRange),
            Change::Regained
        );
        assert_eq!(trust.why(), None);
    }
}
