//! Two halves that make the same bits.

use std::num::NonZeroU64;

use aws_lc_rs::{
    cipher::{AES_256, DecryptingKey, DecryptionContext, UnboundCipherKey},
    iv::FixedLength,
};
use qkd_handover::block::{BlockHeader, MAX_KEY_BITS};
use qkd_keyfile::{UnixTime, units::bytes_for_bits};
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::{
    config::{Pace, PairConfig, Seed},
    dynamics::{EventConfig, Moment, Timeline, Weather},
    faults::{Fault, WireFault},
};

/// Which half of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// QKD-Tx.
    Transmitter,
    /// QKD-Rx.
    Receiver,
}

/// A module pair: everything that both halves know.
#[derive(Debug, Clone)]
pub struct ModulePair {
    config: PairConfig,
    weather: Weather,
}

/// One module of the pair.
pub struct Half {
    config: PairConfig,
    role: Role,
    generator: DecryptingKey,
    weather: Weather,
}

/// A key block as one half delivers it.
pub struct Block {
    /// Its number, equal at both halves.
    pub number: u64,
    /// Length of the key, in bits.
    pub key_bits: u32,
    /// Error rate to report, in parts per million; `None` if the module does not tell it.
    pub qber_ppm: Option<u32>,
    /// How often the pair has begun to number anew before.
    pub(crate) generation: u32,
    /// How often it has been switched on before.
    pub(crate) restarts: u32,
    /// When it is whole, in simulated seconds.
    pub(crate) due_s: f64,
    /// What the module's clock is ahead by, in seconds.
    pub(crate) clock_s: f64,
    /// What happens to it on its way.
    pub(crate) fault: Option<WireFault>,
    pub(crate) key: Zeroizing<Vec<u8>>,
}

/// Why a configuration is not that of a module pair.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PairError {
    /// A block of no bits, or of more than a block can have.
    #[error("blocks of {block_bits} bits; 1 to {MAX_KEY_BITS} are possible")]
    BlockBits {
        /// The size asked for.
        block_bits: u32,
    },
    /// More than all blocks are faulty.
    #[error("{per_million} faulty blocks in a million")]
    Faults {
        /// The sum asked for.
        per_million: u64,
    },
    /// More than all bits are wrong.
    #[error("error rate of {qber_ppm} parts per million")]
    Qber {
        /// The rate asked for.
        qber_ppm: u32,
    },
    /// Block numbers would run out.
    #[error("{blocks} blocks from number {first_number} on")]
    Numbers {
        /// The first number asked for.
        first_number: u64,
        /// Blocks asked for.
        blocks: u64,
    },
    /// The link is so long that there never would be a block.
    #[error("this link gives no secret key: make it shorter")]
    NoKey,
    /// The pace is that of a link, and there is none; or blocks are collected for a time without one.
    #[error("pace = \"link\" and block_seconds need a link")]
    NoLink,
    /// Time does not pass for a pair that makes blocks as fast as they are taken.
    #[error("events need a pace: with \"max\" no time passes")]
    NoTime,
    /// A time, part or scale that cannot be.
    #[error("{what} out of range: {value}")]
    Range {
        /// What.
        what: &'static str,
        /// What was asked for.
        value: f64,
    },
}

impl ModulePair {
    /// A pair as configured.
    ///
    /// # Errors
    ///
    /// See [`PairError`]: correct the configuration.
    pub fn new(config: &PairConfig) -> Result<Self, PairError> {
        let PairConfig {
            block_bits,
            qber_ppm,
            first_number,
            ..
        } = *config;
        if block_bits == 0 || block_bits > MAX_KEY_BITS {
            return Err(PairError::BlockBits { block_bits });
        }
        let per_million = config.faults.sum_per_million();
        if per_million > 1_000_000 {
            return Err(PairError::Faults { per_million });
        }
        if qber_ppm > 1_000_000 {
            return Err(PairError::Qber { qber_ppm });
        }
        Self::check_dynamics(config)?;
        let blocks = config.blocks.unwrap_or(1);
        if first_number
            .checked_add(blocks)
            .is_none_or(|end| end == u64::MAX)
        {
            return Err(PairError::Numbers {
                first_number,
                blocks,
            });
        }
        let mut phases = [0; 48];
        key_stream(&generator(&config.seed), 0, 0, PHASES, &mut phases);
        Ok(Self {
            weather: Weather::new(config, phases)?,
            config: config.clone(),
        })
    }

    fn check_dynamics(config: &PairConfig) -> Result<(), PairError> {
        let out_of_range = |what, value| Err(PairError::Range { what, value });
        let needs_link = config.pace == Pace::Link || config.block_seconds.is_some();
        if needs_link && (config.link.is_none() || config.pace != Pace::Link) {
            return Err(PairError::NoLink);
        }
        if !config.events.is_empty() && config.pace == Pace::Max {
            return Err(PairError::NoTime);
        }
        if !(1e-3..=1e6).contains(&config.time_scale) {
            return out_of_range("time_scale", config.time_scale);
        }
        let seconds = config.block_seconds.unwrap_or(1.0);
        if !(1e-6..=1e6).contains(&seconds) {
            return out_of_range("block_seconds", seconds);
        }
        match config.events.iter().find(|event| !event.is_valid()) {
            Some(event) => out_of_range("event at", event.at_s()),
            None => Ok(()),
        }
    }

    /// One half.
    #[must_use]
    pub fn half(&self, role: Role) -> Half {
        Half {
            generator: generator(&self.config.seed),
            config: self.config.clone(),
            role,
            weather: self.weather.clone(),
        }
    }
}

pub(crate) fn generator(seed: &Seed) -> DecryptingKey {
    UnboundCipherKey::new(&AES_256, seed.expose())
        .and_then(DecryptingKey::ctr)
        .expect("32 bytes are an AES-256 key")
}

/// Key stream of AES-256 in counter mode. The upper half of the counter is the block's number; the
/// lower half has the generation in its upper bits and starts at `from`. A block never uses enough to
/// reach another's.
pub(crate) fn key_stream(
    generator: &DecryptingKey,
    number: u64,
    generation: u32,
    from: u64,
    out: &mut [u8],
) {
    out.fill(0);
    let low = u64::from(generation) << 36 | from;
    let counter = u128::from(number) << 64 | u128::from(low);
    let context = DecryptionContext::Iv128(FixedLength::from(counter.to_be_bytes()));
    generator
        .decrypt(out, context)
        .expect("counter mode takes any length");
}

/// The numbering of a module's blocks: the same in every run that makes the same ones.
pub(crate) fn session(generator: &DecryptingKey, generation: u32) -> NonZeroU64 {
    let mut bytes = [0; 8];
    // A number that no block has.
    key_stream(generator, u64::MAX, generation, 0, &mut bytes);
    NonZeroU64::new(u64::from_le_bytes(bytes)).unwrap_or(NonZeroU64::MIN)
}

impl Half {
    /// What it was made from.
    #[must_use]
    pub fn config(&self) -> &PairConfig {
        &self.config
    }

    /// Which half it is.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    pub(crate) fn session(&self, generation: u32) -> NonZeroU64 {
        session(&self.generator, generation)
    }

    /// What goes wrong with this block, the same at both halves.
    #[must_use]
    pub fn fault(&self, number: u64) -> Option<Fault> {
        self.fault_of(number, 0, self.config.block_bits)
    }

    fn fault_of(&self, number: u64, generation: u32, key_bits: u32) -> Option<Fault> {
        if self.config.faults.is_none() {
            return None;
        }
        let mut random = [0; 16];
        self.fill(number, generation, PLAN, &mut random);
        match self.config.faults.draw(random, key_bits)? {
            // There is no block before.
            Fault::Replayed if number <= self.config.first_number => None,
            fault => Some(fault),
        }
    }

    /// The block of this number in a run without events; `None` if this half does not deliver it.
    #[must_use]
    pub fn block(&self, number: u64) -> Option<Block> {
        self.make(&Moment {
            index: number.saturating_sub(self.config.first_number),
            number,
            generation: 0,
            restarts: 0,
            due_s: 0.0,
            key_bits: self.config.block_bits,
            qber_ppm: self.config.qber_ppm,
            clock_s: 0.0,
        })
    }

    pub(crate) fn timeline(&self) -> Timeline {
        Timeline::new(&self.config, self.weather.clone())
    }

    /// What happens in a run, in order.
    pub(crate) fn events(&self) -> &[EventConfig] {
        self.weather.events()
    }

    /// The fault of a block that is to be made, if it shows at this half.
    pub(crate) fn fault_here(&self, moment: &Moment) -> Option<Fault> {
        let fault = self.fault_of(moment.number, moment.generation, moment.key_bits)?;
        let shows = fault.role().is_none_or(|role| role == self.role);
        shows.then_some(fault)
    }

    /// A block; `None` if this half does not deliver it.
    pub(crate) fn make(&self, moment: &Moment) -> Option<Block> {
        let fault = self.fault_here(moment);
        let (key_bits, from) = match fault {
            Some(Fault::MissingAt(_)) => return None,
            Some(Fault::Empty) => (0, moment.number),
            Some(Fault::Replayed) => (moment.key_bits, self.replayed(moment)),
            _ => (moment.key_bits, moment.number),
        };
        let mut key = Zeroizing::new(vec![0; bytes_for_bits(key_bits)]);
        self.fill(from, moment.generation, KEY, &mut key);
        if let Some(Fault::Biased) = fault {
            bias(&self.generator, from, moment.generation, &mut key);
        }
        mask_unused(&mut key, key_bits);
        if let Some(Fault::DiffersAt { bit, .. }) = fault {
            key[(bit / 8) as usize] ^= 0x80 >> (bit % 8);
        }
        let on_the_way = match fault {
            Some(Fault::OnTheWay { fault, .. }) => Some(fault),
            _ => None,
        };
        Some(Block::new(moment, key_bits, on_the_way, key))
    }

    /// The number whose bits a replayed block has: of blocks that follow each other, the one before the
    /// first.
    fn replayed(&self, moment: &Moment) -> u64 {
        let mut number = moment.number;
        while let Some(Fault::Replayed) = self.fault_of(number, moment.generation, moment.key_bits)
        {
            number -= 1;
        }
        number
    }

    fn fill(&self, number: u64, generation: u32, from: u64, out: &mut [u8]) {
        key_stream(&self.generator, number, generation, from, out);
    }
}

impl Block {
    /// The key: the first bit is the top bit of the first byte, unused bits of the last are zero.
    #[must_use]
    pub fn key(&self) -> &[u8] {
        &self.key
    }

    /// The header under which serial lines and rings carry it.
    #[must_use]
    pub fn header(&self, generated_at: Option<UnixTime>) -> BlockHeader {
        BlockHeader {
            number: self.number,
            generated_at: generated_at.map(|at| self.by_its_clock(at)),
            key_bits: self.key_bits,
            qber_ppm: self.qber_ppm,
        }
    }
}

/// Clears three bits of eight with a probability of one half.
pub(crate) fn bias(generator: &DecryptingKey, number: u64, generation: u32, key: &mut [u8]) {
    let mut mask = Zeroizing::new(vec![0; key.len()]);
    key_stream(generator, number, generation, BIAS, &mut mask);
    for (byte, mask) in key.iter_mut().zip(mask.iter()) {
        *byte &= mask | 0b0001_1111;
    }
}

/// Clears the unused bits of a key's last byte.
pub(crate) fn mask_unused(key: &mut [u8], key_bits: u32) {
    if let (Some(last), used @ 1..) = (key.last_mut(), key_bits % 8) {
        *last &= 0xff << (8 - used);
    }
}

impl Block {
    pub(crate) fn new(
        moment: &Moment,
        key_bits: u32,
        fault: Option<WireFault>,
        key: Zeroizing<Vec<u8>>,
    ) -> Self {
        Self {
            number: moment.number,
            key_bits,
            qber_ppm: Some(moment.qber_ppm),
            generation: moment.generation,
            restarts: moment.restarts,
            due_s: moment.due_s,
            clock_s: moment.clock_s,
            fault,
            key,
        }
    }

    /// What the module's clock shows at a time.
    #[expect(clippy::cast_possible_truncation, reason = "events bound the step")]
    pub(crate) fn by_its_clock(&self, at: UnixTime) -> UnixTime {
        UnixTime(at.0.saturating_add((self.clock_s * 1e9) as i64))
    }
}

impl std::fmt::Debug for Half {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Half")
            .field("role", &self.role)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Block")
            .field("number", &self.number)
            .field("key_bits", &self.key_bits)
            .finish_non_exhaustive()
    }
}

/// Where the counter of a block's key starts.
const KEY: u64 = 0;
/// Where the counter of what clears its ones starts: beyond the longest key.
const BIAS: u64 = 1 << 31;
/// Where the counter of its fault starts.
const PLAN: u64 = 1 << 32;
/// Where the counter of the pair's phases of drift starts.
const PHASES: u64 = 1 << 33;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::tests::config, faults::FaultConfig};

    fn halves(config: &PairConfig) -> [Half; 2] {
        let pair = ModulePair::new(config).unwrap();
        [Role::Transmitter, Role::Receiver].map(|role| pair.half(role))
    }

    #[test]
    fn both_halves_make_the_same_bits_and_no_two_blocks_are_equal() {
        let [tx, rx] = halves(&config());
        let blocks: Vec<Block> = (0..50).filter_map(|number| tx.block(number)).collect();
        for block in &blocks {
            assert_eq!(block.key(), rx.block(block.number).unwrap().key());
            assert_eq!(block.header(None).encode(block.key()).unwrap().len(), 24);
        }
        for (i, block) in blocks.iter().enumerate() {
            assert!(blocks[..i].iter().all(|other| other.key() != block.key()));
        }
    }

    #[test]
    fn the_bits_are_the_key_stream_of_aes_256() {
        // AES-256 of the zero block under the zero key: H of test case 13 of the GCM specification.
        let mut config = config();
        config.seed = "0".repeat(64).parse().unwrap();
        config.block_bits = 128;
        let [tx, _] = halves(&config);
        assert_eq!(
            tx.block(0).unwrap().key(),
            [
                0xdc, 0x95, 0xc0, 0x78, 0xa2, 0x40, 0x89, 0x89, 0xad, 0x48, 0xa2, 0x14, 0x92, 0x84,
                0x20, 0x87
            ]
        );
    }

    #[test]
    fn another_seed_makes_other_bits() {
        let mut other = config();
        other.seed = "11".repeat(32).parse().unwrap();
        let [tx, _] = halves(&config());
        let [other, _] = halves(&other);
        assert_ne!(tx.block(1).unwrap().key(), other.block(1).unwrap().key());
    }

    #[test]
    fn both_halves_know_the_same_faults_and_each_plays_its_part() {
        let mut config = config();
        config.faults = FaultConfig {
            one_sided_per_million: 200_000,
            differing_per_million: 200_000,
            empty_per_million: 200_000,
            ..FaultConfig::default()
        };
        let [tx, rx] = halves(&config);
        let mut seen = [0; 4];
        for number in 0..2000 {
            assert_eq!(tx.fault(number), rx.fault(number));
            let (a, b) = (tx.block(number), rx.block(number));
            let kind = match tx.fault(number) {
                None => {
                    assert_eq!(a.unwrap().key(), b.unwrap().key());
                    0
                }
                Some(Fault::MissingAt(role)) => {
                    assert_eq!(a.is_none(), role == Role::Transmitter);
                    assert_eq!(b.is_none(), role == Role::Receiver);
                    1
                }
                Some(Fault::DiffersAt { .. }) => {
                    let (a, b) = (a.unwrap(), b.unwrap());
                    let differing: u32 = (a.key().iter().zip(b.key()))
                        .map(|(a, b)| (a ^ b).count_ones())
                        .sum();
                    assert_eq!(differing, 1);
                    2
                }
                Some(Fault::Empty) => {
                    assert_eq!((a.unwrap().key_bits, b.unwrap().key().len()), (0, 0));
                    3
                }
                Some(other) => panic!("{other:?} was not planned"),
            };
            seen[kind] += 1;
        }
        // 800, 400, 400, 400 expected; five standard deviations are 110 and 90.
        for (count, expected) in seen.into_iter().zip([800, 400, 400, 400]) {
            assert!(
                (expected - 110..expected + 110).contains(&count),
                "{seen:?}"
            );
        }
    }

    #[test]
    fn what_is_replayed_is_the_block_before_and_what_is_biased_lacks_ones_at_both_halves() {
        let mut config = config();
        config.faults = FaultConfig {
            replayed_per_million: 300_000,
            biased_per_million: 300_000,
            ..FaultConfig::default()
        };
        let [tx, rx] = halves(&config);
        let plain = halves(&PairConfig {
            faults: FaultConfig::default(),
            ..config
        });
        let mut ones = (0, 0);
        for number in 0..200 {
            let block = tx.block(number).unwrap();
            assert_eq!(block.key(), rx.block(number).unwrap().key());
            match tx.fault(number) {
                Some(Fault::Replayed) => {
                    let before = tx.block(number - 1).unwrap();
                    let is_biased = tx.fault(number - 1) == Some(Fault::Biased);
                    assert!(is_biased || block.key() == before.key());
                }
                Some(Fault::Biased) => {
                    let count: u32 = block.key().iter().map(|byte| byte.count_ones()).sum();
                    ones = (ones.0 + count, ones.1 + block.key_bits);
                }
                _ => assert_eq!(block.key(), plain[0].block(number).unwrap().key()),
            }
        }
        // Three bits of eight are ones in a quarter of the cases only: 40.6 %.
        let ratio = f64::from(ones.0) / f64::from(ones.1);
        assert!((0.39..0.42).contains(&ratio), "{ratio}");
    }

    #[test]
    fn a_generation_has_bits_of_its_own() {
        let [tx, _] = halves(&config());
        let mut moment = tx.timeline().next().unwrap();
        let before = tx.make(&moment).unwrap();
        moment.generation = 1;
        assert_ne!(tx.make(&moment).unwrap().key(), before.key());
    }

    #[test]
    fn an_impossible_pair_is_refused() {
        let with = |change: fn(&mut PairConfig)| {
            let mut config = config();
            change(&mut config);
            ModulePair::new(&config).unwrap_err()
        };
        assert_eq!(
            with(|c| c.block_bits = 0),
            PairError::BlockBits { block_bits: 0 }
        );
        assert_eq!(with(|c| c.pace = Pace::Link), PairError::NoLink);
        assert_eq!(
            with(|c| c.events = vec![EventConfig::ClockStep {
                at_s: 1.0,
                by_s: 1.0
            }]),
            PairError::NoTime
        );
        assert_eq!(
            with(|c| c.time_scale = 0.0),
            PairError::Range {
                what: "time_scale",
                value: 0.0
            }
        );
        assert_eq!(
            with(|c| c.faults.empty_per_million = 1_000_001),
            PairError::Faults {
                per_million: 1_000_001
            }
        );
        assert_eq!(
            with(|c| c.qber_ppm = 1_000_001),
            PairError::Qber {
                qber_ppm: 1_000_001
            }
        );
        assert_eq!(
            with(|c| c.first_number = u64::MAX - 1),
            PairError::Numbers {
                first_number: u64::MAX - 1,
                blocks: 1
            }
        );
    }

    #[test]
    fn debug_withholds_seed_and_key() {
        let [tx, _] = halves(&config());
        let text = format!("{tx:?} {:?}", tx.block(0).unwrap());
        assert!(!text.contains("0707") && !text.contains("[7, 7"), "{text}");
    }
}
