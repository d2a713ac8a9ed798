//! Everything concurrent in the ring imports from here, so that a build with `--cfg loom`
//! model-checks the code that ships and not a copy of it.

#[cfg(loom)]
pub(super) use loom::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub(super) use std::sync::atomic::{AtomicU64, Ordering, fence};
