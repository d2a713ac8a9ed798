//! The vocabulary of QKD Bridge: what keys are called, how they are counted and described.
//!
//! Every crate of the workspace speaks these words: identities of nodes, module pairs, segments and
//! keys ([`id`], [`address`]), quantities that carry their unit ([`units`]), the 26 metadata items of
//! ITU-T Y.3803 Table 1 ([`metadata`]), the key file ([`codec`]), the 10-byte signalling header
//! ([`signal`]), and the traits through which time, randomness and messages come in ([`mod@env`],
//! [`protocol`]).
//!
//! It knows nothing about hardware, storage, networks or applications, and it **owns no key byte**:
//! the codec reads and writes key data in buffers that the caller owns and wipes.
//!
//! # Invariants
//!
//! - An identity that exists is valid: parsing is the only way in.
//! - Standards count bits, memory counts bytes; the conversion happens on a type.
//! - No decoder allocates from a length that it has not checked against what is there.
#![forbid(unsafe_code)]

pub mod address;
pub mod codec;
pub mod env;
pub mod id;
pub mod metadata;
pub mod protocol;
pub mod signal;
pub mod units;

pub use address::{
    Composition, Generation, Incarnation, KeySpan, LinkId, Piece, QkdKeyName, SegmentNumber,
    StreamId,
};
pub use codec::{KeyFile, KeyFileError};
pub use env::{Clock, Entropy, Mono, Now, UnixTime};
pub use id::{AppId, IdError, KmaKeyId, KsaKeyId, ModuleId, ModulePairId, NodeId, QkdKeyId};
pub use metadata::KeyMetadata;
pub use protocol::Protocol;
pub use units::KeyBits;
