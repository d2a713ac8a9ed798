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
pub(crate) const PAYLOAD_BYTES: usize = 128 << 10;

/// What a device delivers: noise in which a number changes, so that no key comes twice.
pub(crate) struct Device {
    key: Vec<u8>,
    number: u64,
}

impl Device {
    pub(crate) fn new() -> Self {
        Self {
            key: noise(MASK_BYTES + PAYLOAD_BYTES, 9),
            number: 0,
        }
    }

    pub(crate) fn next_key(&mut self) -> &[u8] {
        self.number += 1;
        self.key[MASK_BYTES..][..8].copy_from_slice(&self.number.to_le_bytes());
        &self.key
    }
}

/// The rival: a queue of bytes, a `Vec` for each unit, `sha2`, a map by number. It tests nothing,
/// remembers nothing and wipes nothing.
pub(crate) struct Naive {
    queue: VecDeque<u8>,
    units: HashMap<u64, (Vec<u8>, [u8; 32])>,
    next: u64,
}

impl Naive {
    pub(crate) fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            units: HashMap::new(),
            next: 0,
        }
    }

    pub(crate) fn segment(&mut self, key: &[u8], unit_bytes: usize) {
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
pub(crate) struct Bridge {
    pool: Pool,
    pusher: Pusher,
    popper: Popper,
    stage: Stage,
    name: QkdKeyName,
    order: FormatOrder,
}

impl Bridge {
    pub(crate) fn new(backend: Backend, unit_bytes: usize) -> Self {
        let pool = Pool::new(PoolConfig {
            capacity_bytes: 8 << 20,
            locking: Locking::Preferred,
        })
        .expect("key memory of 8 MiB");
        let bound = WaitingBound {
            keys: 64,
            bytes: 4 << 20,
        };
        let (pusher, popper) = handoff(64);
        let name = QkdKeyName {
            module_pair: "pair-1".parse().expect("a name"),
            generation: Generation::default(),
            id: "1".parse::<QkdKeyId>().expect("a name"),
        };
        let key_bits = (MASK_BYTES + PAYLOAD_BYTES) * 8;
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
        Self {
            stage: Stage::new(pool.clone(), bound, backend, [7; 32]),
            pool,
            pusher,
            popper,
            name,
            order,
        }
    }

    pub(crate) fn segment(&mut self, key: &[u8]) -> Formatted {
        let descriptor = Descriptor {
            name: self.name.clone(),
            key_bits: self.order.composition.pieces[0].len_bits,
            block: self.pool.copy_of(key).expect("there is room"),
            metadata: QkdKeyMetadata::new(self.name.id.clone()),
        };
        self.pusher.push(descriptor).expect("there is room");
        let descriptor = self.popper.pop().expect("it was pushed");
        let held = self.stage.hold(descriptor);
        assert!(matches!(held, Hold::Held { .. }), "{held:?}");
        let made = self.stage.format(&self.order).expect("the key waits");
        self.stage.settle(&self.name);
        made
    }
}

/// Refuses to time a wrong answer.
pub(crate) fn check(backend: Backend, unit_bytes: usize) {
    let (mut device, mut naive) = (Device::new(), Naive::new());
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
