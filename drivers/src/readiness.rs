//! Waiting for file descriptors in the tokio runtime.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers a descriptor, to be told when it can be read.
///
/// # Panics
///
/// Outside of a tokio runtime.
// tokio replaced the safe constructor by an unsafe one because `AsRawFd` alone does not promise that
// the descriptor stays open and the same. `AsFd` does, and every type passed here owns its own.
#[allow(deprecated)]
pub(crate) fn readable<T: AsFd + AsRawFd>(owner: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(owner, Interest::READABLE)
}
