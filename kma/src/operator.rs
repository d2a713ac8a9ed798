//! What an operator orders of a running KMA, and what it answers. None of it holds a key.

use qkd_keyfile::{KmaKeyId, ModulePairId, QkdKeyName, SegmentNumber, StreamId};
use serde::{Deserialize, Serialize};

use crate::sync::ModulePairStatus;

/// An operator's order.
#[derive(Debug, Clone)]
pub struct OperatorOrder {
    /// Comes back with the answer.
    pub order: u64,
    /// What is to be done.
    pub act: OperatorAct,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperatorAct {
    /// No key is made of a module pair any more, until it is started at this end. The other end is
    /// told. What was not confirmed is dropped.
    StopModulePair(ModulePairId),
    /// A module pair that is stopped at this end goes on, unless the other end has stopped it too.
    StartModulePair(ModulePairId),
    /// Others may know these keys: they are void, here and at the ends that share them.
    Suspect(Suspects),
}

/// Keys that others may know.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspects {
    /// QKD-keys: no key is made of what is left of them.
    pub qkd_keys: Vec<QkdKeyName>,
    /// KMA-keys, stored or on their way.
    pub segments: Vec<(StreamId, SegmentNumber)>,
    /// Relayed units, by their ID, on their way.
    pub units: Vec<KmaKeyId>,
}

/// What came of an order. It is durable before it is said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperatorAnswer {
    /// How the module pair stands now.
    ModulePair {
        /// Whether the order changed anything.
        changed: bool,
        /// The module pair.
        status: ModulePairStatus,
    },
    /// No link of this node is fed by such a module pair. Nothing was changed.
    UnknownModulePair {
        /// Those that there are.
        known: Vec<ModulePairId>,
    },
    /// Segments that were in stock and are void now; those that were void before are not named.
    Suspected {
        /// Their streams and numbers.
        segments: Vec<(StreamId, SegmentNumber)>,
    },
}
