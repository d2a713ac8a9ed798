//! Key supply agent (KSA): keys for applications, over ETSI GS QKD 014.
//!
//! [`serve()`] listens for HTTPS with certificates on both sides, reads requests by the letter of the
//! standard and asks a [`KeySupply`], which the program implements over its stores.
//!
//! It knows nothing about stores, links, relays or other nodes: which keys exist, who may have them
//! and when a key counts as supplied is decided behind the trait.
//!
//! # Invariants
//!
//! - The caller is who its certificate says; nothing in a request changes that.
//! - A request is judged whole (form, then limits) before the supply is asked: what this crate
//!   refuses costs no key.
//! - An answer holds all keys that were asked for, each of the size asked for, or none.
//! - Key bytes leave their [`KeyBuf`](qkd_secmem::KeyBuf) for one buffer, the reply, which is wiped
//!   once it has been written. They are in no log line and in no error.
//! - Every connection, head, body, answer and write is bounded in number, length or time; what
//!   exceeds a bound is refused and counted.
#![forbid(unsafe_code)]

mod counters;
mod etsi014;
mod profile;
mod serve;
mod stall;
mod supply;

pub use counters::{Counters, Counts};
pub use profile::{Profile, ProfileError};
pub use serve::{Config, Limits, serve};
pub use supply::{
    KeySupply, StockStatus, SuppliedKey, SupplyByIdRequest, SupplyError, SupplyRequest,
};
