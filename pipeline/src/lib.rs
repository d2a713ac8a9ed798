//! From key blocks to hashed segments.
//!
//! Drivers push descriptors of QKD-keys into a lock-free [hand-off](handoff()); one [`Stage`] per
//! link, on a thread of its own ([`spawn`]), tests them, keeps the good ones in [`Waiting`] until the
//! KMA sends the plan of a segment, then [cuts](resize) the segment bit by bit and hashes its units.
//!
//! It knows nothing about hardware, about the peer or about storage, and it never composes on its
//! own: presence at both ends comes before composition, or one lost QKD-key would misalign every
//! later unit.
//!
//! # Invariants
//!
//! - Key bytes are in the blocks that came in and in the blocks of the segment, nowhere else; but
//!   the health tests keep two bytes of each module pair's stream, and wipe them.
//! - No QKD-key waits that fails a health test, or whose bits have come before within the last
//!   65,536 QKD-keys.
//! - A segment holds exactly the bits that its plan names, in that order, none twice.
//! - A QKD-key that a plan has named leaves only when it is settled. An error consumes nothing.
//! - Everything is bounded. A full hand-off returns the descriptor; a QKD-key that is dropped at
//!   the bound is reported.
#![forbid(unsafe_code)]

mod duplicates;
mod handoff;
mod health;
pub mod resize;
mod stage;
mod thread;
mod waiting;

pub use handoff::{Descriptor, Popper, PushError, Pusher, Waker, handoff};
pub use health::HealthTest;
pub use stage::{FormatError, FormatOrder, Formatted, Stage};
pub use thread::{Command, CommandRefused, StageEvent, StageHandle, spawn, spawn_prepared};
pub use waiting::{Hold, RefuseReason, Waiting, WaitingBound};
