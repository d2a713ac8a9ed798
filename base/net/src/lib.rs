//! Mutually authenticated links, and the loop that drives any protocol over them.
//!
//! - [`tls`]: TLS 1.3 with certificates on both sides and the hybrid X25519MLKEM768 key exchange;
//!   [`Identity`] says who the peer's certificate says it is.
//! - [`pki`]: a small certificate authority, so that a network can be tried in a minute.
//! - [`frame`]: cuts a byte stream into messages, with bounds on length and on time.
//! - [`json`]: the strict JSON objects that the signalling protocols carry.
//! - [`serve()`]: accepts connections, a bounded number at a time.
//! - [`drive()`]: runs a [`qkd_keyfile::Protocol`] over a stream.
//! - [`links`]: one connection to every configured peer node, kept up.
//!
//! It knows nothing of keys, of pads or of what the messages mean. What the bridge promises about
//! keys does not rest on TLS; TLS decides who may talk, and hides the rest.
//!
//! # Invariants
//!
//! - No byte of a message moves before both certificates have been verified.
//! - An identity is one URI in the certificate, `qkd-node:<id>` or `qkd-app:<id>`, compared byte by
//!   byte. A certificate with none or with two is nobody's.
//! - Every queue, message and handshake has a bound in bytes and in time; what exceeds it ends that
//!   one connection and is counted.
#![forbid(unsafe_code)]

pub mod backoff;
pub mod drive;
pub mod frame;
pub mod identity;
pub mod json;
pub mod links;
pub mod pki;
pub mod serve;
pub mod tls;

pub use backoff::Backoff;
pub use drive::{DriveError, Shared, drive};
pub use frame::{FrameError, FrameReader, Framing, Limits};
pub use identity::{Identity, IdentityError};
pub use links::{LinkEvent, Links, LinksConfig, LinksHandle, Peer};
pub use serve::{Handler, ServeLimits, serve};
pub use tls::{Credentials, CredentialsError, Reloadable};
