//! Compaction: the journal grows with every use of a bit; what it adds up to does not.

use std::collections::VecDeque;

use qkd_keyfile::UnixTime;

use super::{Store, ledger};
use crate::{record::Record, vault::VaultError};

/// The journal is compacted beyond this length, unless configured otherwise.
pub const JOURNAL_LIMIT_BYTES: u64 = 256 << 20;

/// Bytes of the state in one record.
const PART_BYTES: usize = 256 << 10;

/// How segments in stock came about, at most, in one journal.
const HISTORY_MAX_BYTES: usize = 64 << 20;

impl Store {
    /// Replaces a journal longer than `limit_bytes` by what it adds up to, and says whether it did.
    /// Commits what is staged. After a compaction that brought little, the journal may grow to twice
    /// the length before the next.
    ///
    /// # Errors
    ///
    /// As [`Vault::compact`](crate::vault::Vault::compact). If the error is not final, the journal is
    /// what it was, and grows by a quarter before it is tried again.
    pub fn compact_if_large(&mut self, limit_bytes: u64) -> Result<bool, VaultError> {
        let length = self.vault.journal_bytes();
        if length <= limit_bytes.max(self.compact_above_bytes) {
            return Ok(false);
        }
        self.compact_above_bytes = length + length / 4;
        let state = match postcard::to_allocvec(&self.state) {
            Ok(bytes) => bytes,
            Err(error) => unreachable!("the state encodes into memory: {error}"),
        };
        self.commit()?;
        let history = self.live_history()?;
        let schema = ledger::encode(&Record::Schema {
            version: ledger::SCHEMA,
        });
        let parts = state.chunks(PART_BYTES);
        let last = u32::try_from(parts.len() - 1).unwrap_or(u32::MAX);
        let snapshot = (0..=last).rev().zip(parts).map(|(more, part)| {
            let part = part.to_vec();
            ledger::encode(&Record::Snapshot { more, part })
        });
        let stopped = self.state.stopped.iter().map(|(module_pair, reason)| {
            ledger::encode(&Record::ModulePairStopped {
                module_pair: module_pair.clone(),
                reason: *reason,
            })
        });
        let schema = std::iter::once(schema);
        let mut records = schema.chain(snapshot).chain(stopped).chain(history);
        self.vault.compact(&mut records)?;
        self.staged_bytes = 0;
        self.compact_above_bytes = self.vault.journal_bytes().saturating_mul(2);
        self.vault.prune_history(self.retention.history)?;
        Ok(true)
    }

    /// How the segments that are in stock came about: archives may be dropped before they are used.
    /// The oldest are left to the archives where it would be too much.
    fn live_history(&self) -> Result<VecDeque<Vec<u8>>, VaultError> {
        let (mut kept, mut kept_bytes) = (VecDeque::new(), 0);
        let mut now = UnixTime::default();
        self.vault.reread(&mut |bytes| {
            let (at, record) = match postcard::from_bytes(bytes) {
                Ok(Record::Time { unix, .. }) => {
                    now = unix;
                    return;
                }
                Ok(Record::History { unix, record }) => (unix, *record),
                Ok(record) => (now, record),
                Err(_) => return,
            };
            let (Record::Stored {
                stream, segment, ..
            }
            | Record::Described {
                stream, segment, ..
            }
            | Record::Ceded {
                stream, segment, ..
            }
            | Record::Acquired {
                stream, segment, ..
            }) = &record
            else {
                return;
            };
            if self.segment(stream, *segment).is_none() {
                return;
            }
            let record = Record::History {
                unix: at,
                record: Box::new(record),
            };
            let bytes = ledger::encode(&record);
            kept_bytes += bytes.len();
            kept.push_back(bytes);
            while kept_bytes > HISTORY_MAX_BYTES {
                kept_bytes -= kept.pop_front().map_or(kept_bytes, |oldest| oldest.len());
            }
        })?;
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    use qkd_keyfile::{Generation, KmaKeyId, LinkId, NodeId, QkdKeyName, StreamId};
    use qkd_keyfile::{KsaKeyId, metadata::KeyType, metadata::SecurityLevel};
    use qkd_secmem::{Locking, Pool, PoolConfig};

    use super::*;
    use crate::{
        record::{Binding, Purpose, Stage, StopReason},
        store::{NewSegment, read_ledger},
        vault::sim::{Fault, SimDisk},
    };

    fn open(disk: &SimDisk) -> Store {
        let pool = Pool::new(PoolConfig {
            capacity_bytes: 1 << 20,
            locking: Locking::Unlocked,
        });
        let vault = Box::new(disk.open_sealed().unwrap());
        Store::open(vault, pool.unwrap(), [1; 16]).unwrap()
    }

    /// A store with something in every part of its state, longer than one part.
    fn filled(disk: &SimDisk) -> Store {
        let mut store = open(disk);
        let (me, peer): (NodeId, NodeId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let stream = StreamId::Link(LinkId::between(&me, &peer).unwrap());
        store.peer_store(&peer, 77);
        store.stop_module_pair(&"mp".parse().unwrap(), StopReason::Operator);
        // Each of 64 bits of its digest in the state.
        store.use_qkd_keys((0..32_000).map(|n| QkdKeyName {
            module_pair: "mp".parse().unwrap(),
            generation: Generation(0),
            id: format!("{n:0>60}").parse().unwrap(),
        }));
        for at in 0..40 {
            let number = store.propose(&stream, None);
            let ours = at % 2 == 0;
            let new = NewSegment {
                stream: stream.clone(),
                number,
                stage: Stage::Confirmed,
                key_type: if ours {
                    KeyType::Encrypting
                } else {
                    KeyType::Decrypting
                },
                total_bits: 8 * 64,
                head_bytes: 32,
                level: SecurityLevel::Qkd,
                kma_key_id: KmaKeyId([at; 16]),
                composition: None,
                key: store.pool().copy_of(&[at; 64]).unwrap(),
                relayed: None,
            };
            store.store(new).unwrap();
            let binding = |span| Binding {
                key_id: KsaKeyId::from_random([at; 16]),
                stream: stream.clone(),
                span,
                master: "app".parse().unwrap(),
                applications: vec!["other".parse().unwrap()],
            };
            if ours {
                let spans = store.plan_pad(&stream, 7, 0).unwrap();
                store.take(&stream, &spans, Purpose::Supply);
                store.bind(&peer, binding(spans[0]));
            } else {
                let span = qkd_keyfile::KeySpan {
                    segment: number,
                    offset_bytes: 40,
                    len_bytes: 5,
                };
                let sequence = u64::from(at / 2);
                store
                    .receive_binding(&peer, sequence, binding(span))
                    .unwrap();
            }
        }
        store.commit().unwrap();
        store
    }

    #[test]
    fn a_compacted_journal_is_short_and_adds_up_to_the_same() {
        let disk = SimDisk::new(1);
        let mut store = filled(&disk);
        let before = store.vault.journal_bytes();
        assert!(!store.compact_if_large(before).unwrap());
        assert!(store.compact_if_large(before - 1).unwrap());
        let ledger = read_ledger(&disk.read("journal").unwrap()).unwrap();
        assert!(ledger.len() > 1, "more than one part");
        let kept = |r: &Record| {
            matches!(
                r,
                Record::Schema { .. }
                    | Record::Snapshot { .. }
                    | Record::ModulePairStopped { .. }
                    | Record::History { .. }
            )
        };
        assert!(ledger.iter().all(kept));
        let history = ledger
            .iter()
            .filter(|r| matches!(r, Record::History { .. }));
        assert_eq!(
            history.count(),
            store.state.streams.values().map(|s| s.segments.len()).sum()
        );
        let state = store.state;
        assert_eq!(open(&disk).state, state);
        // What happens after it is added.
        let mut store = open(&disk);
        store.peer_store(&"b".parse().unwrap(), 78);
        store.commit().unwrap();
        let state = store.state;
        assert!(state.received.is_empty(), "the peer's store was replaced");
        assert_eq!(open(&disk).state, state);
    }

    #[test]
    fn a_compaction_that_brings_little_is_not_repeated_at_once() {
        let disk = SimDisk::new(2);
        let mut store = filled(&disk);
        assert!(store.compact_if_large(1).unwrap());
        store.peer_store(&"c".parse().unwrap(), 1);
        assert!(!store.compact_if_large(1).unwrap());
    }

    #[test]
    fn a_power_cut_anywhere_in_a_compaction_loses_nothing() {
        for after in 1.. {
            let disk = SimDisk::new(after);
            let mut store = filled(&disk);
            disk.fail_at(disk.operations() + after, Fault::PowerCut);
            let outcome = store.compact_if_large(0);
            let state = store.state;
            disk.restart();
            assert_eq!(open(&disk).state, state, "cut at operation {after}");
            if outcome.is_ok() {
                assert!(after > 4, "a compaction has more operations");
                return;
            }
        }
    }

    #[test]
    fn without_space_the_journal_stays_and_the_store_goes_on() {
        let disk = SimDisk::new(3);
        let mut store = filled(&disk);
        disk.fail_at(disk.operations() + 2, Fault::NoSpace);
        assert!(!store.compact_if_large(0).unwrap_err().is_final());
        store.peer_store(&"c".parse().unwrap(), 1);
        store.commit().unwrap();
        let state = store.state;
        assert_eq!(open(&disk).state, state);
    }
}
