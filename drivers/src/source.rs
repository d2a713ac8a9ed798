//! What every driver is to the layer above.

use std::{
    future::poll_fn,
    task::{Context, Poll},
};

use qkd_keyfile::QkdKeyId;

use crate::event::Event;

/// One QKD module, polled.
///
/// A source that needs a timer or a file descriptor registers it with the tokio runtime in whose
/// context it was opened; it must be polled inside that runtime.
pub trait KeySource: Send {
    /// Longest key block that this source delivers, in bytes. Constant for the life of the source.
    fn max_block_bytes(&self) -> usize;

    /// The next event; copies at most one key block to the start of `out`.
    ///
    /// `Pending` means that nothing can be delivered now. The task is woken when that may have
    /// changed: by the module, by a timer of the driver, or by a [`grant`](Self::grant).
    ///
    /// Only [`Event::Key`] says that `out` holds key. On every other outcome `out` holds none, but
    /// may have been overwritten.
    ///
    /// # Errors
    ///
    /// - [`ReadError::BufferTooSmall`]: nothing was consumed; call again with a longer buffer.
    /// - [`ReadError::Gone`]: latched; every later call returns it until the source is reopened.
    ///   Key blocks that were not settled come again after that.
    fn poll(&mut self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<Result<Event, ReadError>>;

    /// Allows `blocks` more key blocks. Without credit no key block is delivered, and the module is
    /// told to wait if its transport can tell it.
    fn grant(&mut self, blocks: u32);

    /// Says what became of a delivered key block, after that was committed durably.
    ///
    /// Only now does the source delete, move or acknowledge it at its origin. An ID that is not
    /// outstanding is ignored: it was settled before, or belongs to a session that has ended. Does
    /// not fail: what cannot be carried out comes as an [`Event::Alarm`].
    fn settle(&mut self, id: &QkdKeyId, outcome: Settlement);

    /// Asks for QKD-keys by their IDs, where the hand-over is one in which one end pulls and the
    /// other fetches by ID. Other hand-overs ignore it.
    fn request(&mut self, ids: &[QkdKeyId]) {
        let _ = ids;
    }
}

/// What became of a key block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Settlement {
    /// Its bits are stored durably.
    Stored,
    /// Its bits will never be used, and that is recorded durably.
    Dropped,
    /// Its bits will never be used, and it is to be kept aside at its origin where that is possible.
    Quarantined,
}

/// Why [`KeySource::poll`] gave no event. No variant holds key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The caller's buffer cannot hold one block.
    #[error("buffer of {have_bytes} bytes, a key block may need {need_bytes}")]
    BufferTooSmall {
        /// Length of the buffer, in bytes.
        have_bytes: usize,
        /// [`KeySource::max_block_bytes`].
        need_bytes: usize,
    },
    /// The driver cannot go on, and waiting would not help.
    #[error("the module cannot be read any more; reopen it")]
    Gone(#[source] std::io::Error),
}

impl ReadError {
    /// `Err(BufferTooSmall)` unless `out` can hold a block of `need_bytes`.
    pub(crate) const fn check_buffer(out: &[u8], need_bytes: usize) -> Result<(), Self> {
        if out.len() < need_bytes {
            return Err(Self::BufferTooSmall {
                have_bytes: out.len(),
                need_bytes,
            });
        }
        Ok(())
    }
}

/// Waits for the next event. Dropping the future loses nothing.
///
/// # Errors
///
/// As [`KeySource::poll`].
pub async fn next_event(source: &mut dyn KeySource, out: &mut [u8]) -> Result<Event, ReadError> {
    poll_fn(|cx| source.poll(cx, out)).await
}
