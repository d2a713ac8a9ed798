//! A QKD-key from the driver's hands to a hashed segment.

use std::collections::{HashMap, VecDeque};

use qkd_kernels::Backend;
use qkd_keyfile::{Composition, Generation, Piece, QkdKeyId, QkdKeyName, metadata::QkdKeyMetadata};
use qkd_pipeline::{
    Descriptor, FormatOrder, Formatted, Hold, Popper, Pusher, Stage, WaitingBound, handoff,
};
use qkd_secmem::{Locking, Pool, PoolConfig};
use sha2::{Digest, Sha256};

use super::noise;

/// Two comparison masks, as key synchronisation cuts them off. Not payload.
const MASK_BYTES: usize = 32;

/// What one QKD-key brings in units: the pipeline's chunk, a whole number of every unit measured.
pub const PAYLOAD_BYTES: usize = 128 << 10;

/// What a device delivers: noise in which a number changes, so that no key comes twice.
#[derive(Debug)]
pub struct Device {
    key: Vec<u8>,
    number: u64,
}

impl Device {
    /// A device that delivers QKD-keys of [`PAYLOAD_BYTES`] and the mask.
    #[must_use]
    pub fn new() -> Self {
        Self::of(PAYLOAD_BYTES)
    }

    /// A device that delivers QKD-keys of so many bytes and the mask.
    #[must_use]
    pub fn of(payload_bytes: usize) -> Self {
        Self {
            key: noise(MASK_BYTES + payload_bytes, 9),
            number: 0,
        }
    }

    /// The next QKD-key.
    pub fn next_key(&mut self) -> &[u8] {
        self.number += 1;
        self.key[MASK_BYTES..][..8].copy_from_slice(&self.number.to_le_bytes());
        &self.key
    }
}

/// The rival: a queue of bytes, a `Vec` for each unit, `sha2`, a map by number. It tests nothing,
/// remembers nothing and wipes nothing.
#[derive(Default)]
pub struct Naive {
    queue: VecDeque<u8>,
    units: HashMap<u64, (Vec<u8>, [u8; 32])>,
    next: u64,
}

impl std::fmt::Debug for Naive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Naive({} units)", self.units.len())
    }
}

impl Default for Device {
    fn default() -> Self {
        Self::new()
    }
}

impl Naive {
    /// Cuts and hashes a segment.
    pub fn segment(&mut self, key: &[u8], unit_bytes: usize) {
        // The last segment has been supplied.
        self.units.clear();
        self.queue.extend(key);
        self.queue.drain(..MASK_BYTES);
        while self.queue.len() >= unit_bytes {
            let unit: Vec<u8> = self.queue.drain(..unit_bytes).collect();
            let digest = Sha256::digest(&unit).into();
            self.units.insert(self.next, (unit, digest));
            self.next += 1;
        }
    }
}

/// What the bridge runs, on one thread: key memory, hand-off, health, fingerprint, cut, hash, wipe.
/// Module pairs deliver in turns.
#[derive(Debug)]
pub struct Bridge {
    pool: Pool,
    pusher: Pusher,
    popper: Popper,
    stage: Stage,
    /// One QKD-key at a time of each module pair, and its plan.
    pairs: Vec<(QkdKeyName, FormatOrder)>,
    next: usize,
}

impl Bridge {
    /// With one module pair that delivers what [`Device::new`] does.
    #[must_use]
    pub fn new(backend: Backend, unit_bytes: usize) -> Self {
        Self::of(backend, unit_bytes, PAYLOAD_BYTES, 1)
    }

    /// With so many module pairs that deliver what [`Device::of`] does.
    ///
    /// # Panics
    ///
    /// If there is no key memory, or a length is beyond what a QKD-key may have.
    #[must_use]
    pub fn of(backend: Backend, unit_bytes: usize, payload_bytes: usize, pairs: usize) -> Self {
        let pool = Pool::new(PoolConfig {
            capacity_bytes: 8 << 20,
            locking: Locking::Unlocked,
        })
        .expect("key memory of 8 MiB");
        let bound = WaitingBound {
            keys: 64,
            bytes: 4 << 20,
        };
        let (pusher, popper) = handoff(64);
        Self {
            stage: Stage::new(pool.clone(), bound, backend, [7; 32]),
            pool,
            pusher,
            popper,
            pairs: (1..=pairs)
                .map(|number| plan(number, unit_bytes, payload_bytes))
                .collect(),
            next: 0,
        }
    }

    /// Takes one QKD-key all the way, of the module pair whose turn it is.
    ///
    /// # Panics
    ///
    /// If the stage refuses the key.
    pub fn segment(&mut self, key: &[u8]) -> Formatted {
        let (name, order) = &self.pairs[self.next];
        self.next = (self.next + 1) % self.pairs.len();
        let descriptor = Descriptor {
            name: name.clone(),
            key_bits: order.composition.pieces[0].len_bits,
            block: self.pool.copy_of(key).expect("there is room"),
            metadata: QkdKeyMetadata::new(name.id.clone()),
        };
        self.pusher.push(descriptor).expect("there is room");
        let descriptor = self.popper.pop().expect("it was pushed");
        let held = self.stage.hold(descriptor);
        assert!(matches!(held, Hold::Held { .. }), "{held:?}");
        let made = self.stage.format(order).expect("the key waits");
        self.stage.settle(name);
        made
    }
}

/// The name of a module pair's QKD-keys, and the plan that makes a segment of one.
fn plan(number: usize, unit_bytes: usize, payload_bytes: usize) -> (QkdKeyName, FormatOrder) {
    let name = QkdKeyName {
        module_pair: format!("pair-{number}").parse().expect("a name"),
        generation: Generation::default(),
        id: "1".parse::<QkdKeyId>().expect("a name"),
    };
    let key_bits = (MASK_BYTES + payload_bytes) * 8;
    let order = FormatOrder {
        composition: Composition {
            module_pair: name.module_pair.clone(),
            generation: name.generation,
            pieces: vec![Piece {
                qkd_key: name.id.clone(),
                offset_bits: 0,
                len_bits: u32::try_from(key_bits).expect("a short key"),
            }],
        },
        mask_bytes: u32::try_from(MASK_BYTES).expect("a short mask"),
        unit_bytes: u32::try_from(unit_bytes).expect("a short unit"),
    };
    (name, order)
}

/// Refuses to time a wrong answer.
///
/// # Panics
///
/// If the answer is wrong.
pub fn check(backend: Backend, unit_bytes: usize) {
    let (mut device, mut naive) = (Device::new(), Naive::default());
    let mut bridge = Bridge::new(backend, unit_bytes);
    for round in 0..3 {
        let key = device.next_key();
        naive.segment(key, unit_bytes);
        let made = bridge.segment(key);
        assert_eq!(made.segment.expose(), key);
        assert_eq!(made.digests.len(), naive.units.len());
        let first = round * made.digests.len() as u64;
        for (number, digest) in (first..).zip(&made.digests) {
            assert_eq!(naive.units[&number].1, *digest);
        }
    }
}
