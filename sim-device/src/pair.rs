//! Two halves that make the same bits.

use aws_lc_rs::{
    cipher::{AES_256, DecryptingKey, DecryptionContext, UnboundCipherKey},
    iv::FixedLength,
};
use qkd_handover::block::{BlockHeader, MAX_KEY_BITS};
use qkd_keyfile::{UnixTime, units::bytes_for_bits};
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::{
    config::PairConfig,
    faults::{Fault, FaultConfig},
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
}

/// One module of the pair.
pub struct Half {
    config: PairConfig,
    role: Role,
    generator: DecryptingKey,
}

/// A key block as one half delivers it.
pub struct Block {
    /// Its number, equal at both halves.
    pub number: u64,
    /// Length of the key, in bits.
    pub key_bits: u32,
    /// Error rate to report, in parts per million.
    pub qber_ppm: u32,
    key: Zeroizing<Vec<u8>>,
}

/// Why a configuration is not that of a module pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
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
        Ok(Self {
            config: config.clone(),
        })
    }

    /// One half.
    #[must_use]
    #[expect(clippy::missing_panics_doc, reason = "the seed has the key's length")]
    pub fn half(&self, role: Role) -> Half {
        let generator = UnboundCipherKey::new(&AES_256, self.config.seed.expose())
            .and_then(DecryptingKey::ctr)
            .expect("32 bytes are an AES-256 key");
        Half {
            config: self.config.clone(),
            role,
            generator,
        }
    }
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

    /// What goes wrong with this block, the same at both halves.
    #[must_use]
    pub fn fault(&self, number: u64) -> Option<Fault> {
        if self.config.faults == FaultConfig::default() {
            return None;
        }
        let mut random = [0; 16];
        self.fill(number, PLAN, &mut random);
        self.config.faults.draw(random, self.config.block_bits)
    }

    /// The block of this number; `None` if this half does not deliver it.
    #[must_use]
    pub fn block(&self, number: u64) -> Option<Block> {
        let fault = self.fault(number);
        let key_bits = match fault {
            Some(Fault::MissingAt(role)) if role == self.role => return None,
            Some(Fault::Empty) => 0,
            _ => self.config.block_bits,
        };
        let mut key = Zeroizing::new(vec![0; bytes_for_bits(key_bits)]);
        self.fill(number, KEY, &mut key);
        if let (Some(last), used @ 1..) = (key.last_mut(), key_bits % 8) {
            *last &= 0xff << (8 - used);
        }
        if let Some(Fault::DiffersAt { role, bit }) = fault
            && role == self.role
        {
            key[(bit / 8) as usize] ^= 0x80 >> (bit % 8);
        }
        Some(Block {
            number,
            key_bits,
            qber_ppm: self.config.qber_ppm,
            key,
        })
    }

    /// Key stream of AES-256 in counter mode under the seed. The upper half of the counter is the
    /// block's number, the lower half starts at `from`; a block never uses enough to reach another's.
    fn fill(&self, number: u64, from: u64, out: &mut [u8]) {
        out.fill(0);
        let counter = u128::from(number) << 64 | u128::from(from);
        let context = DecryptionContext::Iv128(FixedLength::from(counter.to_be_bytes()));
        self.generator
            .decrypt(out, context)
            .expect("counter mode takes any length");
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
            generated_at,
            key_bits: self.key_bits,
            qber_ppm: Some(self.qber_ppm),
        }
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
/// Where the counter of its fault starts: far beyond the longest key.
const PLAN: u64 = 1 << 32;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::config;

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
