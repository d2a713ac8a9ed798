//! Bulk operations on key bytes, with SIMD chosen at run time.
mod wipe;

pub use wipe::wipe;
