//! One key manager with its disk and its pipeline.

use std::{collections::BTreeMap, time::Duration};

use qkd_kernels::Backend;
use qkd_keyfile::{AppId, Composition, Entropy, NodeId, QkdKeyName, StreamId};
use qkd_kma::{
    FormattedSegment, Kma, KmaConfig, LinkConfig, Record, RelayPolicies, RemoteConfig,
    store::{Store, read_ledger},
    vault::{Vault, sim::SimDisk},
};
use qkd_secmem::{Locking, Pool, PoolConfig};
use sha2::{Digest, Sha256};

pub(super) const NAMES: [&str; 3] = ["alice", "bob", "carol"];

/// A node of a row.
pub(super) struct Node {
    pub(super) kma: Kma,
    pub(super) random: Random,
    /// QKD-keys that wait in its pipeline.
    pub(super) waiting: BTreeMap<QkdKeyName, Vec<u8>>,
    config: KmaConfig,
    disk: SimDisk,
    volatile: bool,
}

impl Node {
    /// The node at a place of a row, with an empty store.
    pub(super) fn new(names: &[&str], at: usize, volatile: bool) -> Self {
        let (config, disk) = (config(names, at), SimDisk::new(at as u64));
        let mut random = Random(at as u64);
        Self {
            kma: open(&config, &disk, volatile, &mut random),
            random,
            waiting: BTreeMap::new(),
            config,
            disk,
            volatile,
        }
    }

    /// Loses power, and starts again.
    pub(super) fn crash(&mut self) {
        self.disk.cut_power();
        self.disk.restart();
        self.waiting.clear();
        self.kma = open(&self.config, &self.disk, self.volatile, &mut self.random);
    }

    /// The books of every stream balance, and every record fitted.
    pub(super) fn check_books(&self) {
        let status = self.kma.status();
        assert_eq!(status.inconsistencies, 0);
        for stream in status.streams {
            assert_eq!(stream.imbalance_bits, 0, "{stream:?}");
        }
    }

    /// No byte of a segment is taken twice, or followed twice.
    pub(super) fn check_ledger(&self) {
        let ledger = read_ledger(&self.disk.read("journal").unwrap()).unwrap();
        let mut used: BTreeMap<(StreamId, u64, bool), Vec<(u32, u32)>> = BTreeMap::new();
        for record in ledger {
            let (stream, span, taken) = match record {
                Record::Taken { stream, span, .. } => (stream, span, true),
                Record::Followed { stream, span, .. } => (stream, span, false),
                _ => continue,
            };
            let end = span.end_bytes().expect("a span that can be counted");
            let spans = used.entry((stream, span.segment.0, taken)).or_default();
            spans.push((span.offset_bytes, end));
        }
        for (segment, mut spans) in used {
            spans.sort_unstable();
            let apart = spans.windows(2).all(|two| two[0].1 <= two[1].0);
            assert!(apart, "{segment:?}: {spans:?}");
        }
    }

    /// As the pipeline does: bits of all pieces, and SHA-256 of every unit after the masks.
    pub(super) fn format(
        &self,
        composition: &Composition,
        unit_bytes: u32,
    ) -> Option<FormattedSegment> {
        let mut bits = Vec::new();
        for piece in &composition.pieces {
            let name = QkdKeyName {
                module_pair: composition.module_pair.clone(),
                generation: composition.generation,
                id: piece.qkd_key.clone(),
            };
            let key = self.waiting.get(&name)?;
            let end = piece.offset_bits + piece.len_bits;
            assert!(end as usize <= 8 * key.len());
            let bit = |at: u32| key[at as usize / 8] & 0x80 >> (at % 8) != 0;
            bits.extend((piece.offset_bits..end).map(bit));
        }
        let byte = |bits: &[bool]| bits.iter().fold(0, |byte, &bit| byte << 1 | u8::from(bit));
        let bits: Vec<u8> = bits.chunks_exact(8).map(byte).collect();
        let units = bits.get(32..)?.chunks(unit_bytes as usize);
        let digests = units.map(|unit| Sha256::digest(unit).into()).collect();
        Some(FormattedSegment {
            digests,
            bits: pool().copy_of(&bits).ok()?,
        })
    }
}

fn open(config: &KmaConfig, disk: &SimDisk, volatile: bool, random: &mut Random) -> Kma {
    let vault: Box<dyn Vault> = if volatile {
        Box::new(disk.open_memory(pool()).unwrap())
    } else {
        Box::new(disk.open_sealed().unwrap())
    };
    let mut boot = [0; 16];
    random.fill(&mut boot);
    let store = Store::open(vault, pool(), boot).unwrap();
    Kma::new(config.clone(), store, boot, Backend::PORTABLE)
}

/// One for all inputs of a thread, so that key memory which is not given back shows.
pub(super) fn pool() -> Pool {
    thread_local! {
        static POOL: Pool = Pool::new(PoolConfig {
            capacity_bytes: 8 << 20,
            locking: Locking::Unlocked,
        })
        .unwrap();
    }
    POOL.with(Pool::clone)
}

/// A row of nodes; the ends of three keep end-to-end stock with each other.
fn config(names: &[&str], at: usize) -> KmaConfig {
    let link = |a: usize| LinkConfig {
        module_pairs: vec![pair(a).parse().unwrap()],
        floor_bytes: 64,
        capacity_bytes: 1 << 16,
        segment_bytes: 128,
        gather: Duration::ZERO,
        mismatch_limit: 0,
    };
    let before = at.checked_sub(1).map(|before| (name(before), link(before)));
    let after = (at + 1 < names.len()).then(|| (name(at + 1), link(at)));
    let mut route: Vec<NodeId> = (0..names.len()).map(name).collect();
    if at > 0 {
        route.reverse();
    }
    let remote = RemoteConfig {
        stock: qkd_kma::StockLimits::fixed(512),
        unit_bytes: 128,
        route: Some(route.clone()),
    };
    let is_end = names.len() == 3 && at != 1;
    let remotes = is_end.then(|| (route[2].clone(), remote));
    KmaConfig {
        node: name(at),
        neighbours: before.into_iter().chain(after).collect(),
        remotes: remotes.into_iter().collect(),
        relay: RelayPolicies::default(),
        digest_unit_bytes: 32,
    }
}

pub(super) fn name(at: usize) -> NodeId {
    NAMES[at].parse().unwrap()
}

pub(super) fn app(at: usize) -> AppId {
    format!("app-{}", NAMES[at]).parse().unwrap()
}

/// The module pair between a node and the next.
pub(super) fn pair(at: usize) -> String {
    format!("pair-{at}")
}

/// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
pub(super) struct Random(pub(super) u64);

impl Entropy for Random {
    fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let bytes = (z ^ (z >> 31)).to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}
