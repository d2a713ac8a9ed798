//! The fallback cipher of a hop (Y.3803 clause 8.2.3; Req_KM 7): AES-256-GCM under a key out of the
//! link's floor, fresh for every batch of hops and direction. A key is never stored, and its nonce
//! counts its hops, so no pair of the two occurs twice (HAZ-21).

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use qkd_keyfile::KeySpan;
use qkd_secmem::KeyBuf;

use super::HopError;

/// Bytes of a key.
pub(super) const KEY_BYTES: u32 = 32;

/// What a ciphertext is longer than its plain text.
pub(super) const OVERHEAD_BYTES: usize = 16;

/// Hops under one key, at most.
pub(super) const BATCH_MAX: u64 = if cfg!(test) { 4 } else { 64 };

/// A key, and the pad that it was. The library wipes its memory when it is freed.
pub(crate) struct BatchKey {
    pub(super) spans: Vec<KeySpan>,
    key: LessSafeKey,
}

/// The batch that is being sent.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(super) key: BatchKey,
    /// Hops so far: the next nonce.
    pub(super) hops: u64,
}

impl Batch {
    /// The pad that its key was.
    pub(crate) fn spans(&self) -> &[KeySpan] {
        &self.key.spans
    }
}

impl std::fmt::Debug for BatchKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BatchKey({:?})", self.spans)
    }
}

impl BatchKey {
    pub(super) fn new(spans: Vec<KeySpan>, bytes: &KeyBuf) -> Result<Self, HopError> {
        let key = UnboundKey::new(&AES_256_GCM, bytes.expose()).map_err(|_| HopError::Read)?;
        Ok(Self {
            spans,
            key: LessSafeKey::new(key),
        })
    }

    /// The ciphertext, tag included.
    pub(super) fn encrypt(
        &self,
        counter: u64,
        header: &[u8],
        plain: &KeyBuf,
    ) -> Result<Vec<u8>, HopError> {
        let plain = plain.expose();
        let mut out = vec![0; plain.len() + OVERHEAD_BYTES];
        let (cipher, tag) = out.split_at_mut(plain.len());
        let sealed = self.key.seal_out_of_place_scatter(
            nonce(counter),
            Aad::from(header),
            plain,
            cipher,
            &[],
            tag,
        );
        sealed.map_err(|_| HopError::Malformed)?;
        Ok(out)
    }

    /// Decrypts into `plain`, which is [`OVERHEAD_BYTES`] shorter, or leaves it wiped.
    pub(super) fn decrypt(
        &self,
        counter: u64,
        header: &[u8],
        ciphertext: &[u8],
        plain: &mut KeyBuf,
    ) -> Result<(), HopError> {
        let at = ciphertext.len().checked_sub(OVERHEAD_BYTES);
        let (cipher, tag) = ciphertext.split_at(at.ok_or(HopError::Malformed)?);
        let (nonce, aad) = (nonce(counter), Aad::from(header));
        let out = plain.expose_mut();
        let opened = self.key.open_separate_gather(nonce, aad, cipher, tag, out);
        opened.map_err(|_| {
            qkd_kernels::wipe(out);
            HopError::BadTag
        })
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[..8].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}
