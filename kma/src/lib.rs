//! Key management agent (KMA): agree with the matching node, store, account for every bit, relay.
//!
//! [`Kma`] is one state machine per node: QKD-keys that wait in the pipeline, messages of other
//! nodes, requests of applications and the passing of time go in; messages, orders and answers come
//! out. It has no socket, no clock and no thread, and knows nothing about hardware, TLS or HTTP.
//! What survives a restart lives in a [`store::Store`], over one of the [`vault`]s.
//!
//! # Invariants
//!
//! - No bit is used twice: only the owner of a segment takes its bits, below a mark that is durable
//!   before the bits are used; the other end follows, each bit once.
//! - Both ends hold the same bytes for a key ID, or nothing is given out: segments of a link are
//!   compared under one-time masks, relayed units checked end to end, before anything uses them.
//! - Nothing leaves before the state that justifies it is durable ([`Kma::commit`]).
//! - Bits in equal bits in stock, supplied, used as pad, burned and spent on checks, per stream.
//! - No use of a bit rests on the wall clock. It only counts, for the age of keys, how long a store
//!   was stopped: forwards, and seven days at most.
#![deny(unsafe_code)]

mod agent;
mod cede;
mod confirm;
mod digest;
#[doc(hidden)]
pub mod fail_point;
mod hop;
mod io;
mod operator;
mod policy;
mod ranges;
mod record;
mod relay;
mod session;
mod state;
mod stock;
pub mod store;
mod stream;
mod supply;
mod sync;
mod used;
pub mod vault;
mod wire;

#[cfg(test)]
extern crate self as qkd_kma;
#[cfg(test)]
mod cede_test;
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod common;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod transcript;

use std::time::Duration;

pub use agent::{Kma, Status};
pub use digest::MASK_BITS;
pub use io::{
    Alarm, FormatTicket, FormattedSegment, Input, KmaConfig, LinkConfig, Output, QuarantineReason,
    RemoteConfig, Settlement, StockLimits, SuppliedKey, SupplyByIdOrder, SupplyError, SupplyOrder,
};
pub use operator::{OperatorAct, OperatorAnswer, OperatorOrder, Suspects};
pub use policy::{HOPS_MAX, RandomSource, RelayPolicies, RelayPolicy, RelayScheme};
pub use record::{
    Binding, BurnReason, DiscardReason, Purpose, Record, RelayedWay, SealedRow, Stage, StopReason,
    StoredSegment,
};
pub use stock::StockStatus;
pub use stream::Accounts;
pub use supply::KEYS_MAX;
pub use sync::ModulePairStatus;

/// What was not answered is said again after this time.
pub(crate) const RESEND_AFTER: Duration = Duration::from_millis(500);

/// How often time is looked at.
pub(crate) const TICK: Duration = Duration::from_millis(50);
