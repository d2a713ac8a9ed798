use std::ptr::NonNull;
use std::sync::Arc;

use subtle::ConstantTimeEq;

use crate::{pool::Shared, region::CLASS_BYTES};

/// Key bytes in a block of a [`Pool`](crate::Pool). Wiped on drop.
pub struct KeyBuf {
    pool: Arc<Shared>,
    /// First byte of the block.
    address: NonNull<u8>,
    /// At most the block's length. Bytes of the block past it are zero.
    len_bytes: u32,
    class: u8,
}

// SAFETY:
// - A `KeyBuf` is the only owner of its block: the free list gives a block to one taker, and gets
//   it back in `drop`. Moving the owner to another thread moves the right to access the bytes.
unsafe impl Send for KeyBuf {}
// SAFETY:
// - A shared `KeyBuf` allows reads only; writing and wiping take `&mut self`.
unsafe impl Sync for KeyBuf {}

impl KeyBuf {
    /// Takes over a block that is all zero and holds at least `len_bytes`.
    pub(crate) fn new(
        pool: Arc<Shared>,
        address: NonNull<u8>,
        len_bytes: usize,
        class: u8,
    ) -> Self {
        let len_bytes =
            u32::try_from(len_bytes).unwrap_or_else(|_| unreachable!("256 KiB at most"));
        Self {
            pool,
            address,
            len_bytes,
            class,
        }
    }

    /// How many bytes there are.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes as usize
    }

    /// How many bytes of the pool the block takes, used or not.
    pub fn block_bytes(&self) -> usize {
        CLASS_BYTES[usize::from(self.class)]
    }

    /// The bytes. Every call is a place where key can leak: the name is meant to be searched for
    /// in review.
    pub fn expose(&self) -> &[u8] {
        // SAFETY:
        // - `address` starts a block of at least `len_bytes` mapped bytes, all initialised (zero
        //   from the kernel or from the wipe), inside one mapping.
        // - The mapping lives as long as `pool`, which `self` holds.
        // - Only `self` reaches the block, and it stays borrowed, so nobody writes.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.len_bytes()) }
    }

    /// The bytes, for filling. See [`KeyBuf::expose`].
    pub fn expose_mut(&mut self) -> &mut [u8] {
        // SAFETY:
        // - As in `expose`, and the exclusive borrow of the only owner makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.len_bytes()) }
    }

    /// Keeps the first `len_bytes` and wipes the rest; does nothing if there are no more than that.
    pub fn truncate(&mut self, len_bytes: usize) {
        if let Some(tail) = self.expose_mut().get_mut(len_bytes..) {
            qkd_kernels::wipe(tail);
        }
        self.len_bytes = self
            .len_bytes
            .min(u32::try_from(len_bytes).unwrap_or(u32::MAX));
    }

    /// Whether both hold the same bytes, in a time that depends on the lengths only.
    pub fn ct_eq(&self, other: &Self) -> bool {
        self.expose().ct_eq(other.expose()).into()
    }
}

impl Drop for KeyBuf {
    fn drop(&mut self) {
        qkd_kernels::wipe(self.expose_mut());
        self.pool.give_back(self.address, self.class);
    }
}

impl std::fmt::Debug for KeyBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeyBuf({} bytes)", self.len_bytes)
    }
}
