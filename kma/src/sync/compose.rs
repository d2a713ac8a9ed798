//! What a segment is made of: how much is gathered, and how a segment that differs is divided.
//!
//! Both ends divide alike, from the composition alone.

use std::collections::BTreeSet;

use qkd_keyfile::{Piece, QkdKeyId};

use crate::{digest::MASK_BITS, vault::MAX_ROW_BYTES};

/// The shortest segment: the masks and one byte.
pub(super) const MIN_SEGMENT_BITS: u32 = MASK_BITS + 8;

/// The longest: what a row of the store takes.
pub(super) const MAX_SEGMENT_BITS: u32 = 8 * (256 << 10);
const _: () = assert!(MAX_SEGMENT_BITS as usize <= 8 * MAX_ROW_BYTES);

/// QKD-keys of one segment, at most: their names go into messages and records.
pub(super) const PIECES_MAX: usize = 2048;

/// Less than this, of which the masks would be more than a thirty-second part, ...
pub(super) const LITTLE_BITS: u64 = 32 * MASK_BITS as u64;

/// ... is gathered so many times longer.
pub(super) const LITTLE_PATIENCE: u32 = 10;

/// Pieces for one segment: whole bytes of it.
#[derive(Debug)]
pub(super) struct Gathered(pub(super) Vec<Piece>);

/// Takes ranges of free bits in order, until they are `target_bits`, in whole bytes: what makes no byte
/// stays for the next segment. `None` if they are too few for one.
pub(super) fn gathered<'i>(
    ranges: impl Iterator<Item = (&'i QkdKeyId, (u64, u64))>,
    target_bits: u64,
) -> Option<Gathered> {
    let mut pieces = Vec::new();
    let mut total = 0_u32;
    for (id, (start, end)) in ranges.take(PIECES_MAX) {
        let room = u64::from(MAX_SEGMENT_BITS - total);
        let (offset_bits, len_bits) = (
            u32::try_from(start).ok()?,
            u32::try_from((end - start).min(room)).ok()?,
        );
        pieces.push(Piece {
            qkd_key: id.clone(),
            offset_bits,
            len_bits,
        });
        total += len_bits;
        if u64::from(total) >= target_bits.max(u64::from(MIN_SEGMENT_BITS)) {
            break;
        }
    }
    let mut spare = total % 8;
    while spare > 0 {
        let last = pieces.last_mut()?;
        let cut = spare.min(last.len_bits);
        last.len_bits -= cut;
        spare -= cut;
        if last.len_bits == 0 {
            pieces.pop();
        }
    }
    (total - total % 8 >= MIN_SEGMENT_BITS).then_some(Gathered(pieces))
}

/// Cuts pieces in two after `bits`.
fn cut(pieces: &[Piece], bits: u32) -> (Vec<Piece>, Vec<Piece>) {
    let (mut head, mut rest) = (Vec::new(), Vec::new());
    let mut left = bits;
    for piece in pieces {
        let in_head = piece.len_bits.min(left);
        left -= in_head;
        if in_head > 0 {
            head.push(Piece {
                len_bits: in_head,
                ..piece.clone()
            });
        }
        if in_head < piece.len_bits {
            rest.push(Piece {
                offset_bits: piece.offset_bits.saturating_add(in_head),
                len_bits: piece.len_bits - in_head,
                ..piece.clone()
            });
        }
    }
    (head, rest)
}

/// The bits of a composition that mask its comparison.
pub(super) fn masks_of(pieces: &[Piece]) -> Vec<Piece> {
    cut(pieces, MASK_BITS).0
}

/// How a segment that differs goes on.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Divided {
    /// Gone: the masks, and what is too short to be compared by itself.
    pub(super) burned: Vec<Piece>,
    /// Compared next, each under masks of its own. None: its QKD-keys cannot be told apart any more.
    pub(super) parts: Vec<Vec<Piece>>,
}

/// Divides a segment that differs near its middle, between two QKD-keys.
pub(super) fn divide(pieces: &[Piece]) -> Divided {
    let (mut burned, rest) = cut(pieces, MASK_BITS);
    let whole = |parts| Divided {
        burned: pieces.to_vec(),
        parts,
    };
    if names_of(pieces).len() <= 1 {
        return whole(Vec::new());
    }
    let total = bits(&rest);
    let mut borders = Vec::new();
    let mut at = 0;
    for pair in rest.windows(2) {
        at += pair[0].len_bits;
        if pair[0].qkd_key != pair[1].qkd_key {
            borders.push(at);
        }
    }
    let border = borders.into_iter().min_by_key(|at| at.abs_diff(total / 2));
    let parts = match border {
        Some(border) => {
            let (one, other) = cut(&rest, border);
            vec![one, other]
        }
        None => vec![rest],
    };
    let (parts, short): (Vec<_>, Vec<_>) = parts
        .into_iter()
        .partition(|part| bits(part) >= MIN_SEGMENT_BITS);
    if parts.is_empty() {
        return whole(parts);
    }
    burned.extend(short.into_iter().flatten());
    Divided { burned, parts }
}

/// The QKD-keys that pieces are of.
pub(super) fn names_of(pieces: &[Piece]) -> BTreeSet<QkdKeyId> {
    pieces.iter().map(|piece| piece.qkd_key.clone()).collect()
}

fn bits(pieces: &[Piece]) -> u32 {
    pieces.iter().fold(0, |sum, piece| sum + piece.len_bits)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(n: usize) -> QkdKeyId {
        n.to_string().parse().unwrap()
    }

    fn whole_keys(lengths: &[u32]) -> Vec<Piece> {
        let keys = lengths.iter().enumerate();
        keys.map(|(n, &len_bits)| Piece {
            qkd_key: id(n),
            offset_bits: 0,
            len_bits,
        })
        .collect()
    }

    fn gather(lengths: &[u32]) -> Option<Vec<Piece>> {
        let names: Vec<_> = (0..lengths.len()).map(id).collect();
        let ranges = names.iter().zip(lengths);
        let ranges = ranges.map(|(id, &len)| (id, (0, u64::from(len))));
        Some(gathered(ranges, 8 << 16)?.0)
    }

    #[test]
    fn a_segment_is_whole_bytes_and_the_rest_stays() {
        assert_eq!(gather(&[256]), None);
        assert_eq!(gather(&[256, 7]), None);
        assert_eq!(bits(&gather(&[256, 8]).unwrap()), 264);
        assert_eq!(bits(&gather(&[7636]).unwrap()), 7632);
        let odd = gather(&[7636, 3]).unwrap();
        assert_eq!(
            (odd.len(), bits(&odd)),
            (1, 7632),
            "the short one stays whole"
        );
        assert_eq!(bits(&gather(&[7636; 2]).unwrap()), 15272);
    }

    #[test]
    fn a_long_qkd_key_is_a_segment_and_one_beyond_all_bounds_is_cut() {
        assert_eq!(bits(&gather(&[8 << 18, 8]).unwrap()), 8 << 18);
        let cut = gather(&[8, 8 << 18]).unwrap();
        assert_eq!(cut[1].len_bits, (8 << 18) - 8);
        assert_eq!(gather(&[256; 5000]).unwrap().len(), 2048);
    }

    #[test]
    fn a_segment_of_one_qkd_key_is_not_divided() {
        assert_eq!(
            divide(&whole_keys(&[100_000])).parts,
            Vec::<Vec<Piece>>::new()
        );
        let pair = divide(&whole_keys(&[256, 256]));
        assert!(pair.parts.is_empty(), "the rest has no room for masks");
        assert_eq!(bits(&pair.burned), 512);
    }

    #[test]
    fn where_the_masks_were_the_first_qkd_key_the_second_is_compared_alone() {
        let divided = divide(&whole_keys(&[256, 1000]));
        assert_eq!(divided.parts, [vec![whole_keys(&[256, 1000])[1].clone()]]);
    }

    proptest! {
        #[test]
        fn a_division_loses_and_invents_no_bit_and_ends(
            lengths in prop::collection::vec(prop_oneof![1_u32..600, 200_u32..90_000], 1..40),
        ) {
            let pieces = whole_keys(&lengths);
            let mut todo = vec![pieces.clone()];
            let mut ended = Vec::new();
            let mut rounds = 0;
            while let Some(part) = todo.pop() {
                rounds += 1;
                prop_assert!(rounds < 4 * lengths.len() + 4);
                let divided = divide(&part);
                let after: u32 = divided.parts.iter().map(|part| bits(part)).sum();
                prop_assert_eq!(bits(&part), after + bits(&divided.burned));
                for part in &divided.parts {
                    prop_assert!(bits(part) >= MIN_SEGMENT_BITS);
                }
                todo.extend(divided.parts);
                ended.extend(divided.burned);
            }
            ended.sort_unstable();
            for (n, &len) in lengths.iter().enumerate() {
                let mut at = 0;
                for piece in ended.iter().filter(|piece| piece.qkd_key == id(n)) {
                    prop_assert_eq!(piece.offset_bits, at);
                    at += piece.len_bits;
                }
                prop_assert_eq!(at, len);
            }
        }
    }
}
