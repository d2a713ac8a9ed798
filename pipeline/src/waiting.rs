//! QKD-keys that wait for the plan.

use std::collections::{BTreeMap, HashMap};

use qkd_keyfile::QkdKeyName;

use crate::handoff::Descriptor;

/// How much may wait. At either bound the oldest QKD-keys that no plan has named are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitingBound {
    /// QKD-keys at most (at least one).
    pub keys: usize,
    /// Bytes of their blocks at most, as key memory counts them.
    pub bytes: usize,
}

/// Why a QKD-key was not kept. Its block is wiped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RefuseReason {
    /// A QKD-key of that name is waiting already; the one that came first stays.
    #[error("a QKD-key of that name is waiting already")]
    Duplicate,
    /// The key has no bit, or more bits than its block holds.
    #[error("{key_bits} bits cannot be in a block of {block_bytes} bytes")]
    Length {
        /// The driver's claim.
        key_bits: u32,
        /// What the block holds.
        block_bytes: usize,
    },
    /// The block alone is longer than all that may wait.
    #[error("a block of {block_bytes} bytes exceeds the bound of {bound_bytes} bytes")]
    TooLong {
        /// Length of the block.
        block_bytes: usize,
        /// [`WaitingBound::bytes`].
        bound_bytes: usize,
    },
    /// A bit or a byte repeats too often in a row (NIST SP 800-90B, 4.4.1): the source is stuck.
    #[error("health test failed: equal bits or bytes in a row")]
    Repetition,
    /// A window has too many samples like its first (NIST SP 800-90B, 4.4.2).
    #[error("health test failed: one value too often in a window")]
    Proportion,
    /// Far more ones than zeros, or the other way round.
    #[error("health test failed: ones and zeros out of balance")]
    Bias,
    /// The same bits have come before, perhaps under another name or from another module pair.
    #[error("the same bits have come before")]
    DuplicateBlock,
}

/// The answer of [`Waiting::hold`].
#[derive(Debug)]
pub enum Hold {
    /// The QKD-key waits; these older ones were dropped and wiped for it, oldest first.
    Held {
        /// Names of the dropped QKD-keys.
        dropped: Vec<QkdKeyName>,
    },
    /// The QKD-key was not kept.
    Refused {
        /// Its name.
        name: QkdKeyName,
        /// Why.
        reason: RefuseReason,
    },
    /// All room is taken by planned QKD-keys, which are not dropped: try again when one of them
    /// is settled. Nothing was dropped, and the descriptor comes back.
    Busy(Box<Descriptor>),
}

/// QKD-keys by name, in the order in which they came, within a bound.
///
/// A QKD-key is *unconfirmed* until a plan names it. The oldest unconfirmed make room for new
/// ones; a planned one stays until it is settled.
#[derive(Debug)]
pub struct Waiting {
    bound: WaitingBound,
    keys: HashMap<QkdKeyName, Entry>,
    /// The unconfirmed, by order of arrival.
    unconfirmed: BTreeMap<u64, QkdKeyName>,
    unconfirmed_bytes: usize,
    bytes: usize,
    arrivals: u64,
}

#[derive(Debug)]
struct Entry {
    descriptor: Descriptor,
    arrival: u64,
}

impl Waiting {
    /// Nothing waits yet.
    #[must_use]
    pub fn new(bound: WaitingBound) -> Self {
        Self {
            bound: WaitingBound {
                keys: bound.keys.max(1),
                ..bound
            },
            keys: HashMap::new(),
            unconfirmed: BTreeMap::new(),
            unconfirmed_bytes: 0,
            bytes: 0,
            arrivals: 0,
        }
    }

    /// Keeps a QKD-key, dropping the oldest unconfirmed ones if it must.
    pub fn hold(&mut self, descriptor: Descriptor) -> Hold {
        self.hold_if(descriptor, |_| Ok(()))
    }

    /// [`Waiting::hold`], for a QKD-key that passes `inspect`, which is asked once, and last: never
    /// about one that is refused in any case or that comes back.
    pub(crate) fn hold_if(
        &mut self,
        descriptor: Descriptor,
        inspect: impl FnOnce(&Descriptor) -> Result<(), RefuseReason>,
    ) -> Hold {
        let objection = self.objection(&descriptor);
        if objection.is_none() && self.is_full_for(&descriptor) {
            return Hold::Busy(Box::new(descriptor));
        }
        if let Some(reason) = objection.or_else(|| inspect(&descriptor).err()) {
            return Hold::Refused {
                name: descriptor.name,
                reason,
            };
        }

        let len_bytes = descriptor.block.block_bytes();
        let mut dropped = Vec::new();
        while self.keys.len() >= self.bound.keys || self.bytes + len_bytes > self.bound.bytes {
            let Some((_, oldest)) = self.unconfirmed.first_key_value() else {
                break;
            };
            let oldest = oldest.clone();
            self.settle(&oldest);
            dropped.push(oldest);
        }

        let arrival = self.arrivals;
        self.arrivals += 1;
        self.bytes += len_bytes;
        self.unconfirmed_bytes += len_bytes;
        self.unconfirmed.insert(arrival, descriptor.name.clone());
        self.keys.insert(
            descriptor.name.clone(),
            Entry {
                descriptor,
                arrival,
            },
        );
        Hold::Held { dropped }
    }

    /// Whether planned QKD-keys alone leave no room.
    fn is_full_for(&self, descriptor: &Descriptor) -> bool {
        let planned_keys = self.keys.len() - self.unconfirmed.len();
        let planned_bytes = self.bytes - self.unconfirmed_bytes;
        planned_keys >= self.bound.keys
            || planned_bytes + descriptor.block.block_bytes() > self.bound.bytes
    }

    fn objection(&self, descriptor: &Descriptor) -> Option<RefuseReason> {
        let (key_bits, block_bytes) = (descriptor.key_bits, descriptor.block.len_bytes());
        if key_bits == 0 || key_bits as usize > block_bytes * 8 {
            return Some(RefuseReason::Length {
                key_bits,
                block_bytes,
            });
        }
        let block_bytes = descriptor.block.block_bytes();
        if block_bytes > self.bound.bytes {
            return Some(RefuseReason::TooLong {
                block_bytes,
                bound_bytes: self.bound.bytes,
            });
        }
        let known = self.keys.contains_key(&descriptor.name);
        known.then_some(RefuseReason::Duplicate)
    }

    /// The QKD-key of that name.
    #[must_use]
    pub fn get(&self, name: &QkdKeyName) -> Option<&Descriptor> {
        Some(&self.keys.get(name)?.descriptor)
    }

    /// A plan names this QKD-key: from now on only [`Waiting::settle`] removes it.
    pub fn plan(&mut self, name: &QkdKeyName) {
        let Some(entry) = self.keys.get(name) else {
            return;
        };
        if self.unconfirmed.remove(&entry.arrival).is_some() {
            self.unconfirmed_bytes -= entry.descriptor.block.block_bytes();
        }
    }

    /// Removes and wipes a QKD-key; whether it was there.
    pub fn settle(&mut self, name: &QkdKeyName) -> bool {
        self.plan(name);
        let Some(entry) = self.keys.remove(name) else {
            return false;
        };
        self.bytes -= entry.descriptor.block.block_bytes();
        true
    }

    /// How many QKD-keys wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Bytes of the blocks of all that wait.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }
}
