//! What the two ends of a segment compare, and what they call it.

use qkd_keyfile::{Composition, KmaKeyId, LinkId, NodeId, SegmentNumber};
use serde::Serialize;
use sha2::{Digest, Sha256};

/// Bits cut from the head of every link segment: 128 to mask the proposer's tag, 128 the answerer's.
pub const MASK_BITS: u32 = 256;

/// The masks of a comparison, in bytes.
pub(crate) const MASK_BYTES: usize = 32;

/// The first 128 bits of SHA-256 over a domain string and the postcard encoding (in which every
/// text and list carries its length) of `content`.
fn digest128(domain: &str, content: &impl Serialize) -> [u8; 16] {
    let encoded = match postcard::to_allocvec(&(domain, content)) {
        Ok(bytes) => bytes,
        Err(error) => unreachable!("names encode into memory: {error}"),
    };
    first_half(&Sha256::digest(encoded).into())
}

fn first_half(digest: &[u8; 32]) -> [u8; 16] {
    let (half, _) = digest.split_first_chunk().expect("32 is more than 16");
    *half
}

/// KMA-key ID of a link segment: names only, never key bits (Y.3803 Table 1 (2)).
pub(crate) fn link_key_id(
    link: &LinkId,
    segment: SegmentNumber,
    composition: &Composition,
) -> KmaKeyId {
    KmaKeyId(digest128(
        "qkd-bridge/kma-key/link/1",
        &(link, segment, composition),
    ))
}

/// KMA-key ID of an end-to-end unit. `incarnation` is of the source's store, which numbers units.
pub(crate) fn unit_key_id(
    source: &NodeId,
    destination: &NodeId,
    incarnation: u64,
    segment: SegmentNumber,
) -> KmaKeyId {
    KmaKeyId(digest128(
        "qkd-bridge/kma-key/end-to-end/1",
        &(source, destination, incarnation, segment),
    ))
}

/// Which half of a comparison a tag is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) enum Half {
    /// The proposer's.
    Proposal,
    /// The answerer's, for each of the two verdicts that need the bits.
    AnswerMatch,
    AnswerDiffer,
}

/// Tag of a comparison: trunc128(SHA-256(domain, half, composition, unit digests)) under 128 mask
/// bits of the segment that are used for nothing else. The mask hides it perfectly; that two
/// different segments compare equal rests on SHA-256.
pub(crate) fn comparison_tag(
    half: Half,
    kma_key_id: KmaKeyId,
    composition: &Composition,
    digests: &[[u8; 32]],
    masks: &[u8; MASK_BYTES],
) -> [u8; 16] {
    let mut hash = Sha256::new();
    let names = digest128("qkd-bridge/compare/1", &(half, kma_key_id, composition));
    hash.update(names);
    for digest in digests {
        hash.update(digest);
    }
    let mut tag = first_half(&hash.finalize().into());
    let mask = match half {
        Half::Proposal => &masks[..16],
        Half::AnswerMatch | Half::AnswerDiffer => &masks[16..],
    };
    tag.iter_mut().zip(mask).for_each(|(t, m)| *t ^= m);
    tag
}

/// The link session of two processes, the same at both ends whoever speaks first.
pub(crate) fn session_id(mine: (&NodeId, u64, [u8; 16]), theirs: (&NodeId, u64, [u8; 16])) -> u64 {
    let (low, high) = if mine.0 < theirs.0 {
        (mine, theirs)
    } else {
        (theirs, mine)
    };
    let digest = digest128("qkd-bridge/link-session/1", &(low, high));
    let (first, _) = digest.split_first_chunk().expect("16 is more than 8");
    u64::from_le_bytes(*first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeId {
        name.parse().unwrap()
    }

    fn composition(len_bits: u32) -> Composition {
        Composition {
            module_pair: "mp".parse().unwrap(),
            generation: qkd_keyfile::Generation(0),
            pieces: vec![qkd_keyfile::Piece {
                qkd_key: "1".parse().unwrap(),
                offset_bits: 0,
                len_bits,
            }],
        }
    }

    #[test]
    fn a_key_id_depends_on_every_name_and_on_nothing_else() {
        let link = LinkId::between(&node("a"), &node("b")).unwrap();
        let other = LinkId::between(&node("a"), &node("c")).unwrap();
        let id = |l: &LinkId, n, bits| link_key_id(l, SegmentNumber(n), &composition(bits));
        assert_eq!(id(&link, 1, 512), id(&link, 1, 512));
        assert_ne!(id(&link, 1, 512), id(&link, 2, 512));
        assert_ne!(id(&link, 1, 512), id(&link, 1, 520));
        assert_ne!(id(&link, 1, 512), id(&other, 1, 512));
    }

    #[test]
    fn a_tag_shows_only_masked_bits_and_each_half_has_its_own_mask() {
        let mut masks = [0; MASK_BYTES];
        masks[..16].fill(0xaa);
        masks[16..].fill(0x55);
        let tag = |half, masks: &[u8; MASK_BYTES], digest: u8| {
            comparison_tag(
                half,
                KmaKeyId([1; 16]),
                &composition(8),
                &[[digest; 32]],
                masks,
            )
        };
        let bare = tag(Half::Proposal, &[0; MASK_BYTES], 1);
        let masked = tag(Half::Proposal, &masks, 1);
        assert!(bare.iter().zip(&masked).all(|(b, m)| b ^ m == 0xaa));
        let bare = tag(Half::AnswerMatch, &[0; MASK_BYTES], 1);
        let masked = tag(Half::AnswerMatch, &masks, 1);
        assert!(bare.iter().zip(&masked).all(|(b, m)| b ^ m == 0x55));
        assert_ne!(bare, tag(Half::AnswerDiffer, &[0; MASK_BYTES], 1));
        assert_ne!(bare, tag(Half::AnswerMatch, &[0; MASK_BYTES], 2));
    }

    #[test]
    fn both_ends_of_a_session_name_it_alike() {
        let (a, b) = (node("a"), node("b"));
        let mine = (&a, 1, [1; 16]);
        let theirs = (&b, 2, [2; 16]);
        assert_eq!(session_id(mine, theirs), session_id(theirs, mine));
        assert_ne!(session_id(mine, theirs), session_id(mine, (&b, 2, [3; 16])));
    }
}
