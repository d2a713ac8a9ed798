//! AES-256-GCM as the vault uses it, and the random bytes for it.
//!
//! Data keys and nonces never leave the vault and are of no interest to a test, so they come
//! straight from the cryptographic library and not from the program's `Entropy`.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use qkd_keyfile::Incarnation;

use super::{RowId, SealTag, VaultError};

pub(super) const KEY_BYTES: usize = 32;
pub(super) const NONCE_BYTES: usize = NONCE_LEN;
pub(super) const TAG_BYTES: usize = 16;

/// A key, ready for use. The library wipes its memory when it is freed.
pub(super) struct Cipher(LessSafeKey);

impl Cipher {
    pub(super) fn new(key: &[u8; KEY_BYTES]) -> Result<Self, VaultError> {
        let key = UnboundKey::new(&AES_256_GCM, key).map_err(|_| VaultError::Generator)?;
        Ok(Self(LessSafeKey::new(key)))
    }

    /// Writes `nonce | ciphertext | tag` over `out`, which is 28 bytes longer than `plain`. The
    /// nonce is random: a key-encryption key may wrap 2^32 data keys (NIST SP 800-38D, 8.3), a data
    /// key seals one row.
    pub(super) fn seal(
        &self,
        context: &Context,
        plain: &[u8],
        out: &mut [u8],
    ) -> Result<SealTag, VaultError> {
        let failed = |_| VaultError::Generator;
        let (nonce, rest) = out.split_at_mut(NONCE_BYTES);
        let (cipher, tag) = rest.split_at_mut(plain.len());
        random(nonce)?;
        let unique = Nonce::try_assume_unique_for_key(nonce).map_err(failed)?;
        self.0
            .seal_out_of_place_scatter(unique, Aad::from(context.0), plain, cipher, &[], tag)
            .map_err(failed)?;
        let mut seal = SealTag([0; TAG_BYTES]);
        seal.0.copy_from_slice(tag);
        Ok(seal)
    }

    /// Opens what [`Cipher::seal`] wrote into `plain`, which is wiped if it does not verify.
    pub(super) fn open(&self, context: &Context, sealed: &[u8], plain: &mut [u8]) -> bool {
        let opened = parts(sealed).is_some_and(|(nonce, cipher, tag)| {
            let Ok(nonce) = Nonce::try_assume_unique_for_key(nonce) else {
                return false;
            };
            let aad = Aad::from(context.0);
            let opened = self.0.open_separate_gather(nonce, aad, cipher, tag, plain);
            opened.is_ok()
        });
        if !opened {
            qkd_kernels::wipe(plain);
        }
        opened
    }
}

/// Nonce, ciphertext and tag of a sealed value; `None` if it is too short to be one.
pub(super) fn parts(sealed: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (nonce, rest) = sealed.split_at_checked(NONCE_BYTES)?;
    let (cipher, tag) = rest.split_at_checked(rest.len().checked_sub(TAG_BYTES)?)?;
    Some((nonce, cipher, tag))
}

/// What a sealed value is bound to: it opens nowhere else.
pub(super) struct Context([u8; 20]);

impl Context {
    /// A row in the database.
    pub(super) fn row(store: Incarnation, row: RowId) -> Self {
        Self::new(*b"row1", store, row.0)
    }

    /// A row's data key in its slot.
    pub(super) fn data_key(store: Incarnation, row: RowId) -> Self {
        Self::new(*b"dek1", store, row.0)
    }

    /// The key of an epoch, under the key-encryption key.
    pub(super) fn epoch_key(store: Incarnation, epoch: u64) -> Self {
        Self::new(*b"kek2", store, epoch)
    }

    fn new(domain: [u8; 4], store: Incarnation, row: u64) -> Self {
        let mut context = [0; 20];
        context[..4].copy_from_slice(&domain);
        context[4..12].copy_from_slice(&store.0.to_be_bytes());
        context[12..].copy_from_slice(&row.to_be_bytes());
        Self(context)
    }
}

/// Fills `out` with random bytes.
pub(super) fn random(out: &mut [u8]) -> Result<(), VaultError> {
    aws_lc_rs::rand::fill(out).map_err(|_| VaultError::Generator)
}
