//! Drivers: from a vendor's hand-over to key blocks (the Kq-1 and Kq-2 reference points).
//!
//! A [`KeySource`] is one QKD module as the bridge sees it: polled, never blocking, and limited by
//! the credit that the layer above grants. [`DriverConfig`] says which module to open and how;
//! [`DriverConfig::open`] opens it. Opening and using are apart, so that whatever uses a module can
//! be handed a simulated one.
//!
//! - [`directory`]: hand-over files, as qcrypto and others write them.
//! - [`clavis2`]: the daemon of a Clavis2, over UDP.
//! - [`etsi014`]: a vendor's key manager.
//! - [`serial`]: a device on a serial line that may be unplugged.
//! - [`shared_memory`]: a producer process, which need not be trusted, unless its ring is a file.
//! - [`conformance`]: the contract as a test kit, for a driver of your own.
//! - [`advice`]: what keeps this user from a port, folder or socket, and what mends it.
//!
//! It knows nothing about pipelines, stores or the matching node, and it does not log: whatever
//! happens to a module is an [`Event`].
//!
//! # Invariants
//!
//! - Key bytes go from the hand-over straight into the caller's buffer. Scratch on the way is bounded
//!   and wiped as soon as it is used up; no event, error or name holds any.
//! - A driver never repairs key. A block passes all its checks or is set aside, with the reason.
//! - No key block is delivered without credit, and none is destroyed at its origin before
//!   [`KeySource::settle`].
//! - Nothing is silent: what is lost, damaged or refused is an event or a counter of one.
//! - What comes from outside never panics and never makes a poll spin.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use qkd_drivers::{DirectoryConfig, DriverConfig, Event, Settlement, next_event};
//!
//! let mut module = DriverConfig::Directory(DirectoryConfig::new("/run/qkd/keys")).open()?;
//! let mut block = vec![0; module.max_block_bytes()]; // in wiped memory, really
//! module.grant(1);
//! if let Event::Key(key) = next_event(&mut *module, &mut block).await? {
//!     // Commit `block[..key.len_bytes()]` durably; only then:
//!     module.settle(&key.metadata.qkd_key_id, Settlement::Stored);
//! }
//! # Ok(()) }
//! ```
#![forbid(unsafe_code)]

pub mod advice;
pub mod clavis2;
mod config;
pub mod conformance;
pub mod directory;
pub mod etsi014;
mod event;
mod openers;
mod outstanding;
mod readiness;
mod records;
mod scratch;
pub mod serial;
pub mod shared_memory;
mod source;
mod waiting;
mod wanted;

pub use clavis2::Clavis2Config;
pub use config::{DriverConfig, OpenError};
pub use directory::DirectoryConfig;
pub use etsi014::Etsi014Config;
pub use event::{Alarm, AlarmCode, CorruptReason, DetachReason, Event, KeyBlock, Metric, Value};
pub use openers::{CustomConfig, Openers, SettingsError};
pub use qkd_handover::status::{Band, ModuleState, Severity};
pub use records::Limits;
pub use serial::SerialConfig;
pub use shared_memory::SharedMemoryConfig;
pub use source::{KeySource, ReadError, Settlement, next_event};
