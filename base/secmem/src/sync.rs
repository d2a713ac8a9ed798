//! Everything concurrent in the free lists imports from here, so that a build with `--cfg loom`
//! model-checks the code that ships and not a copy of it.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
