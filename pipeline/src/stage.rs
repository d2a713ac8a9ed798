//! The stage: it tests QKD-keys, keeps them until their plan comes, cuts the segment and hashes its
//! units.

use qkd_kernels::Backend;
use qkd_keyfile::{Composition, Piece, QkdKeyId, QkdKeyName};
use qkd_secmem::{KeyBuf, MAX_BLOCK_BYTES, Pool, PoolExhausted};

use crate::{
    duplicates::Duplicates,
    handoff::Descriptor,
    health::HealthTests,
    resize::{BitRangeError, Bits, gather},
    waiting::{Hold, RefuseReason, Waiting, WaitingBound},
};

/// What a segment is made of and how it is cut: the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormatOrder {
    /// The pieces, in order.
    pub composition: Composition,
    /// Bytes at the front of the segment that mask the comparison tags: 32 for the two of key
    /// synchronisation. They are in no unit and are not hashed.
    pub mask_bytes: u32,
    /// Length of a unit, in bytes.
    pub unit_bytes: u32,
}

/// A segment that is cut and hashed.
#[derive(Debug)]
pub struct Formatted {
    /// The bits of the segment, as many as make whole bytes: the mask, then the units.
    pub segment: KeyBuf,
    /// The last bits, 0 to 7, that make no byte: dropped.
    pub spare_bits: u8,
    /// SHA-256 of every unit after the mask. A shorter remainder is a unit of its own.
    ///
    /// They tell something about key bits: they never leave the node bare.
    pub digests: Vec<[u8; 32]>,
}

/// Why [`Stage::format`] made no segment. Nothing was consumed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The plan names a QKD-key that does not wait here: it never came, or was dropped.
    #[error("QKD-key {name} is not waiting here")]
    UnknownQkdKey {
        /// Its name.
        name: QkdKeyName,
    },
    /// The plan names bits that the QKD-key does not have.
    #[error("QKD-key {name} has {key_bits} bits, not {len_bits} from bit {offset_bits} on")]
    OutsideKey {
        /// Its name.
        name: QkdKeyName,
        /// First bit of the piece.
        offset_bits: u32,
        /// Length of the piece.
        len_bits: u32,
        /// Length of the QKD-key.
        key_bits: u32,
    },
    /// Two pieces of the plan share a bit: it would be in the segment twice.
    #[error("the plan takes bit {bit} of QKD-key {name} twice")]
    Overlap {
        /// Its name.
        name: QkdKeyName,
        /// The first bit that is taken twice.
        bit: u32,
    },
    /// The segment has no whole byte after its mask.
    #[error("{segment_bits} bits leave no byte after a mask of {mask_bytes} bytes")]
    TooShort {
        /// Bits of all pieces.
        segment_bits: u32,
        /// Bytes of the mask.
        mask_bytes: u32,
    },
    /// The segment exceeds [`MAX_BLOCK_BYTES`].
    #[error("a segment of {segment_bits} bits is too long for a block of key memory")]
    TooLong {
        /// Bits of all pieces; `u64` because their sum may exceed what a plan can say.
        segment_bits: u64,
    },
    /// A mask or units of no bytes: such a segment could not be compared.
    #[error("mask of {mask_bytes} bytes, units of {unit_bytes} bytes: neither may be zero")]
    EmptyMaskOrUnit {
        /// [`FormatOrder::mask_bytes`].
        mask_bytes: u32,
        /// [`FormatOrder::unit_bytes`].
        unit_bytes: u32,
    },
    /// No key memory is free: order again when some has been given back.
    #[error(transparent)]
    Pool(#[from] PoolExhausted),
}

/// Keeps the QKD-keys of one link and formats segments out of them.
///
/// It checks that a plan takes no bit twice *within* a segment. That no bit goes into two segments
/// is the business of the KMA, which numbers segments and settles QKD-keys.
#[derive(Debug)]
pub struct Stage {
    waiting: Waiting,
    health: HealthTests,
    duplicates: Duplicates,
    pool: Pool,
    backend: Backend,
}

impl Stage {
    /// A stage that takes the memory for segments from `pool`. `secret` is drawn at random for this
    /// process; the fingerprints of keys are taken under it.
    #[must_use]
    pub fn new(pool: Pool, bound: WaitingBound, backend: Backend, secret: [u8; 32]) -> Self {
        Self {
            waiting: Waiting::new(bound),
            health: HealthTests::new(backend),
            duplicates: Duplicates::new(backend, secret),
            pool,
            backend,
        }
    }

    /// Keeps a QKD-key until its plan comes, if it is healthy and its bits have not come before.
    ///
    /// The tests are of the whole bytes of the key, in the order in which the keys of its module
    /// pair come. A key that comes back with [`Hold::Busy`] has not been tested yet.
    pub fn hold(&mut self, descriptor: Descriptor) -> Hold {
        let (health, duplicates) = (&mut self.health, &mut self.duplicates);
        self.waiting.hold_if(descriptor, |descriptor| {
            let key = &descriptor.block.expose()[..descriptor.key_bits as usize / 8];
            health.judge(&descriptor.name.module_pair, key)?;
            if duplicates.is_repeated(key) {
                return Err(RefuseReason::DuplicateBlock);
            }
            Ok(())
        })
    }

    /// Cuts a segment by plan and hashes its units.
    ///
    /// The QKD-keys stay, and are not dropped for newer ones any more, until they are settled: a
    /// comparison that fails can still be examined.
    ///
    /// # Errors
    ///
    /// Each [`FormatError`] names what to mend; after any of them nothing has been consumed and
    /// no QKD-key is planned that was not before.
    pub fn format(&mut self, order: &FormatOrder) -> Result<Formatted, FormatError> {
        let cut = Cut::of(order)?;
        let names = Names(&order.composition);
        let pieces = &order.composition.pieces;
        let runs = pieces
            .iter()
            .map(|piece| self.find(&names, piece))
            .collect::<Result<Vec<_>, _>>()?;
        no_overlap(&names, pieces)?;

        let mut segment = self.pool.take(cut.segment_bytes)?;
        let room = |_: BitRangeError| unreachable!("the block was taken in the cut's length");
        gather(runs, cut.segment_bytes * 8, segment.expose_mut()).unwrap_or_else(room);

        let units = &segment.expose()[order.mask_bytes as usize..];
        let digests = self.digests(units, order.unit_bytes as usize);
        for piece in pieces {
            self.waiting.plan(&names.of(&piece.qkd_key));
        }
        Ok(Formatted {
            segment,
            spare_bits: cut.spare_bits,
            digests,
        })
    }

    /// Forgets and wipes a QKD-key that is spent or given up; whether it was here.
    pub fn settle(&mut self, name: &QkdKeyName) -> bool {
        self.waiting.settle(name)
    }

    /// What waits now.
    #[must_use]
    pub const fn waiting(&self) -> &Waiting {
        &self.waiting
    }

    /// One digest per unit; a shorter remainder is a unit of its own.
    fn digests(&self, units: &[u8], unit_bytes: usize) -> Vec<[u8; 32]> {
        let mut digests = vec![[0; 32]; units.len().div_ceil(unit_bytes)];
        let whole_units = units.len() / unit_bytes;
        let (whole, remainder) = units.split_at(whole_units * unit_bytes);
        let (of_whole, of_remainder) = digests.split_at_mut(whole_units);
        self.backend.sha256_units(whole, unit_bytes, of_whole);
        if !remainder.is_empty() {
            self.backend
                .sha256_units(remainder, remainder.len(), of_remainder);
        }
        digests
    }

    fn find(&self, names: &Names<'_>, piece: &Piece) -> Result<Bits<'_>, FormatError> {
        let name = names.of(&piece.qkd_key);
        let Some(key) = self.waiting.get(&name) else {
            return Err(FormatError::UnknownQkdKey { name });
        };
        let (offset_bits, len_bits) = (piece.offset_bits, piece.len_bits);
        let inside = end_bits(piece) <= u64::from(key.key_bits);
        let run = Bits::new(key.block.expose(), offset_bits as usize, len_bits as usize);
        match run {
            Ok(run) if inside => Ok(run),
            _ => Err(FormatError::OutsideKey {
                name,
                offset_bits,
                len_bits,
                key_bits: key.key_bits,
            }),
        }
    }
}

/// Where a segment is cut.
struct Cut {
    segment_bytes: usize,
    spare_bits: u8,
}

impl Cut {
    fn of(order: &FormatOrder) -> Result<Self, FormatError> {
        let (mask_bytes, unit_bytes) = (order.mask_bytes, order.unit_bytes);
        if mask_bytes == 0 || unit_bytes == 0 {
            return Err(FormatError::EmptyMaskOrUnit {
                mask_bytes,
                unit_bytes,
            });
        }
        let lengths = order
            .composition
            .pieces
            .iter()
            .map(|p| u64::from(p.len_bits));
        let too_long = FormatError::TooLong {
            segment_bits: lengths.sum(),
        };
        let Some(segment_bits) = order.composition.len_bits() else {
            return Err(too_long);
        };
        let segment_bytes = (segment_bits / 8) as usize;
        if segment_bytes <= mask_bytes as usize {
            return Err(FormatError::TooShort {
                segment_bits,
                mask_bytes,
            });
        }
        if segment_bytes > MAX_BLOCK_BYTES {
            return Err(too_long);
        }
        Ok(Self {
            segment_bytes,
            spare_bits: segment_bits.to_le_bytes()[0] % 8,
        })
    }
}

/// Names of the QKD-keys of a composition.
struct Names<'a>(&'a Composition);

impl Names<'_> {
    fn of(&self, id: &QkdKeyId) -> QkdKeyName {
        QkdKeyName {
            module_pair: self.0.module_pair.clone(),
            generation: self.0.generation,
            id: id.clone(),
        }
    }
}

fn no_overlap(names: &Names<'_>, pieces: &[Piece]) -> Result<(), FormatError> {
    let mut sorted: Vec<&Piece> = pieces.iter().filter(|piece| piece.len_bits > 0).collect();
    sorted.sort_unstable_by_key(|piece| (&piece.qkd_key, piece.offset_bits));
    for pair in sorted.windows(2) {
        let (one, next) = (pair[0], pair[1]);
        if one.qkd_key == next.qkd_key && end_bits(one) > u64::from(next.offset_bits) {
            return Err(FormatError::Overlap {
                name: names.of(&one.qkd_key),
                bit: next.offset_bits,
            });
        }
    }
    Ok(())
}

fn end_bits(piece: &Piece) -> u64 {
    u64::from(piece.offset_bits) + u64::from(piece.len_bits)
}
