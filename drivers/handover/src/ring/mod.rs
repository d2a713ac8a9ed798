//! The shared-memory ring.

pub mod greeting;
