use polyval::Polyval;
use polyval::universal_hash::UniversalHash;

#[cfg(target_arch = "x86_64")]
use crate::backend::Kind;
#[cfg(target_arch = "x86_64")]
use crate::x86::{clmul, powers::Powers, vpclmul};
use crate::{Backend, portable, wipe};

/// A POLYVAL key (RFC 8452, clause 3), made ready for many messages. Wiped on drop.
///
/// The tag of a message is POLYVAL over: the associated data, padded with zeros to 16 bytes; the
/// text, padded likewise; and one block with the two lengths in bits, 64 bits little-endian each
/// (the layout of AES-GCM-SIV, RFC 8452, clause 4).
///
/// This is a universal hash and not yet an authentication tag: the caller XORs 128 mask bits that
/// serve this one message. Then the probability that anyone forges a message is at most
/// (blocks + 1) / 2^128, with no assumption about computing power. Without the mask, or with a
/// mask used twice, the tag gives the key away.
///
/// A receiver works in two steps, so that no unverified text is ever seen: [`TagKey::tag`] over
/// the ciphertext, a comparison in constant time, and only then
/// [`Backend::xor_and_wipe`](crate::Backend::xor_and_wipe).
pub struct TagKey {
    backend: Backend,
    hasher: Hasher,
}

enum Hasher {
    Portable(Polyval),
    #[cfg(target_arch = "x86_64")]
    Powers(Box<Powers>),
}

impl TagKey {
    pub(crate) fn new(backend: Backend, h: &[u8; 16]) -> Self {
        let hasher = match backend.kind() {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 | Kind::ShaNi | Kind::Avx512 => {
                let mut powers = Powers::zero();
                // SAFETY:
                // - `Kind::Avx512` exists only where `Backend::avx2` found PCLMULQDQ.
                unsafe { clmul::fill_powers(&mut powers, h) };
                Hasher::Powers(powers)
            }
            _ => Hasher::Portable(Polyval::new(h.into())),
        };
        Self { backend, hasher }
    }

    /// The tag over `aad` and `text`, without a mask.
    pub fn tag(&self, aad: &[u8], text: &[u8]) -> [u8; 16] {
        match &self.hasher {
            Hasher::Portable(fresh) => {
                let mut hasher = fresh.clone();
                hasher.update_padded(aad);
                hasher.update_padded(text);
                hasher.update_padded(&lengths(aad, text).to_le_bytes());
                hasher.finalize().into()
            }
            #[cfg(target_arch = "x86_64")]
            Hasher::Powers(powers) => match self.backend.kind() {
                // SAFETY:
                // - `Kind::Avx512` exists only where `Backend::avx512` found AVX-512 F, BW and VL, and
                //   VPCLMULQDQ.
                Kind::Avx512 => unsafe { vpclmul::tag(powers, aad, text) },
                // SAFETY:
                // - A `Hasher::Powers` exists only where `Backend::avx2` found PCLMULQDQ.
                _ => unsafe { clmul::tag(powers, aad, text) },
            }
            .to_le_bytes(),
        }
    }

    /// `data ^= pad`, and the tag over `aad` and the new `data`, in one pass. The pad stays.
    ///
    /// # Panics
    ///
    /// If `data` and `pad` differ in length.
    pub fn encrypt_and_tag(&self, aad: &[u8], data: &mut [u8], pad: &[u8]) -> [u8; 16] {
        assert_eq!(
            data.len(),
            pad.len(),
            "a one-time pad is as long as the data"
        );
        match &self.hasher {
            Hasher::Portable(_) => {
                portable::xor_in_place(data, pad);
                self.tag(aad, data)
            }
            #[cfg(target_arch = "x86_64")]
            Hasher::Powers(powers) => match self.backend.kind() {
                // SAFETY:
                // - As in `tag`.
                Kind::Avx512 => unsafe { vpclmul::encrypt(powers, aad, data, pad) },
                // SAFETY:
                // - As in `tag`.
                _ => unsafe { clmul::encrypt(powers, aad, data, pad) },
            }
            .to_le_bytes(),
        }
    }

    /// [`TagKey::encrypt_and_tag`], and the pad is wiped in the same pass: what is left cannot be
    /// used twice. To send again, send the ciphertext again.
    ///
    /// # Panics
    ///
    /// If `data` and `pad` differ in length.
    pub fn encrypt_tag_and_wipe(&self, aad: &[u8], data: &mut [u8], pad: &mut [u8]) -> [u8; 16] {
        assert_eq!(
            data.len(),
            pad.len(),
            "a one-time pad is as long as the data"
        );
        match &self.hasher {
            Hasher::Portable(_) => {
                let tag = self.encrypt_and_tag(aad, data, pad);
                wipe(pad);
                tag
            }
            #[cfg(target_arch = "x86_64")]
            Hasher::Powers(powers) => match self.backend.kind() {
                // SAFETY:
                // - As in `tag`.
                Kind::Avx512 => unsafe {
                    vpclmul::encrypt_and_wipe::<false>(powers, aad, data, pad, &mut [])
                },
                // SAFETY:
                // - As in `tag`.
                _ => unsafe { clmul::encrypt_and_wipe(powers, aad, data, pad) },
            }
            .to_le_bytes(),
        }
    }

    /// What a relay node that only changes the pad does, in one pass: `data ^= old ^ new`, the tag
    /// over `aad` and the new `data`, and both pads wiped. The key in between is never written
    /// anywhere.
    ///
    /// The tag that `data` came with is verified before, by [`TagKey::tag`].
    ///
    /// # Panics
    ///
    /// If `data` and the pads differ in length.
    pub fn reencrypt_tag_and_wipe(
        &self,
        aad: &[u8],
        data: &mut [u8],
        old: &mut [u8],
        new: &mut [u8],
    ) -> [u8; 16] {
        assert_eq!(
            (data.len(), data.len()),
            (old.len(), new.len()),
            "a one-time pad is as long as the data"
        );
        match &self.hasher {
            #[cfg(target_arch = "x86_64")]
            Hasher::Powers(powers) if matches!(self.backend.kind(), Kind::Avx512) => {
                // SAFETY:
                // - As in `tag`.
                unsafe { vpclmul::encrypt_and_wipe::<true>(powers, aad, data, old, new) }
                    .to_le_bytes()
            }
            _ => {
                // The pads are joined, not the data and one of them: what is written in between is
                // no key.
                for (old, new) in old.chunks_mut(STEP_BYTES).zip(new.chunks(STEP_BYTES)) {
                    self.backend.xor_in_place(old, new);
                }
                wipe(new);
                self.encrypt_tag_and_wipe(aad, data, old)
            }
        }
    }
}

/// What fits the first-level cache several times over.
const STEP_BYTES: usize = 4 << 10;

impl std::fmt::Debug for TagKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TagKey({})", self.backend.name())
    }
}

/// The last block of a tag's message: both lengths in bits, as a number from its lowest byte on.
#[inline]
pub(crate) fn lengths(aad: &[u8], text: &[u8]) -> u128 {
    let bits = |bytes: &[u8]| u128::from((bytes.len() as u64).wrapping_mul(8));
    bits(aad) | bits(text) << 64
}
