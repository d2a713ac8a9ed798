//! The life cycle of keys: when what happened, where it came from, and how long it is kept
//! (Y.3803 clauses 7.4 and 8.2.6).

use std::{collections::BTreeMap, time::Duration};

use qkd_keyfile::{
    AppId, Generation, KeySpan, ModulePairId, Mono, NodeId, Now, QkdKeyId, QkdKeyName,
    SegmentNumber, StreamId, UnixTime,
    metadata::{HashAlgorithm, HashValue, KeyType, QkdKeyMetadata, RelayEncryption},
};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::{NewSegment, ReadError, Store, ledger};
use crate::{
    record::{BurnReason, Purpose, Record, SealedRow, Stage},
    vault::{GetError, HistoryLimit, RowId, VaultError},
};

/// A stop is counted as no longer than this, for who knows whether the wall clock was right.
const STOP_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// QKD-keys whose metadata waits for a segment, at most; more lose it, oldest name first.
const RECEIVED_MAX: usize = 1 << 16;

/// Metadata of one segment's QKD-keys, at most, in bytes of a record.
const DESCRIBED_MAX_BYTES: usize = 1 << 18;

/// How long keys and their history are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retention {
    /// Key in stock that is older is burned by its owner, and the other end follows.
    pub expire_after: Option<Duration>,
    /// The rows of segments that are done with are kept so long before they are erased.
    pub preserve_for: Option<Duration>,
    /// How much history is kept.
    pub history: HistoryLimit,
}

/// Seconds that a store has lived: counted monotonically while a process has it, by the wall clock,
/// within bounds, from one process to the next. A clock that jumps expires nothing.
#[derive(Debug, Default)]
pub(super) struct AgeClock {
    /// When this process first told the time, and the age then.
    began: Option<(Mono, u64)>,
    now: Option<(UnixTime, u64)>,
    recorded: Option<UnixTime>,
}

impl AgeClock {
    fn set(&mut self, now: Now, last_unix: UnixTime, last_age_seconds: u64) {
        let (since, age) = *self.began.get_or_insert_with(|| {
            let stopped = u64::try_from(now.unix.0.saturating_sub(last_unix.0)).unwrap_or(0);
            let stopped = Duration::from_nanos(stopped).min(STOP_MAX);
            let known = last_unix != UnixTime::default();
            let stopped = if known { stopped.as_secs() } else { 0 };
            (now.mono, last_age_seconds + stopped)
        });
        self.now = Some((now.unix, age + now.mono.since(since).as_secs()));
    }

    fn age_seconds(&self) -> u64 {
        self.now.map_or(0, |(_, age)| age)
    }

    /// The time, unless it was recorded already.
    pub(super) fn news(&mut self) -> Option<Record> {
        let (unix, age_seconds) = self.now?;
        if self.recorded == Some(unix) {
            return None;
        }
        self.recorded = Some(unix);
        Some(Record::Time { unix, age_seconds })
    }
}

/// What modules said about QKD-keys that are in no segment yet.
#[derive(Debug, Default)]
pub(super) struct Received(BTreeMap<QkdKeyName, QkdKeyMetadata>);

impl Received {
    pub(super) fn forget(&mut self, name: &QkdKeyName) {
        self.0.remove(name);
    }
}

fn name_of(module_pair: &ModulePairId, generation: Generation, id: &QkdKeyId) -> QkdKeyName {
    QkdKeyName {
        module_pair: module_pair.clone(),
        generation,
        id: id.clone(),
    }
}

/// Hashes that modules gave, as they are sealed.
type Hashes = Vec<(QkdKeyId, HashValue)>;

impl Store {
    /// Tells the time. What is recorded from now on happened then.
    pub(crate) fn set_time(&mut self, now: Now) {
        self.clock.set(now, self.state.unix, self.state.age_seconds);
    }

    /// A QKD-key came from its module.
    pub(crate) fn receive(&mut self, name: &QkdKeyName, key_bits: u32, metadata: QkdKeyMetadata) {
        let record = Record::Received {
            module_pair: name.module_pair.clone(),
            generation: name.generation,
            key_bits,
            metadata: without_hash(&metadata),
        };
        if let Some(time) = self.clock.news() {
            self.lazy.push(ledger::encode(&time));
            self.state.apply(&time);
        }
        self.lazy.push(ledger::encode(&record));
        if self.received.0.len() >= RECEIVED_MAX {
            self.received.0.pop_first();
        }
        self.received.0.insert(name.clone(), metadata);
    }

    /// What is known about a segment beyond what [`Record::Stored`] says; hashes are put into `row`.
    pub(super) fn describe(
        &mut self,
        new: &NewSegment<'_>,
        row: RowId,
    ) -> Result<Option<Record>, VaultError> {
        let (mut qkd_keys, mut hashes) = (Vec::new(), Hashes::new());
        if let Some(composition) = &new.composition {
            for piece in &composition.pieces {
                let (pair, generation) = (&composition.module_pair, composition.generation);
                let name = name_of(pair, generation, &piece.qkd_key);
                // Until it is settled: a QKD-key may be in several segments.
                let Some(mut metadata) = self.received.0.get(&name).cloned() else {
                    continue;
                };
                hashes.extend(metadata.hash.take().map(|hash| (name.id.clone(), hash)));
                if metadata != QkdKeyMetadata::new(name.id) {
                    qkd_keys.push(metadata);
                }
            }
        }
        let relayed = new.relayed.map(|relayed| {
            let mut relayed = relayed.clone();
            relayed.kma_key.hash = None;
            Box::new(relayed)
        });
        let hashes = self.seal_hashes(&hashes, row)?;
        if qkd_keys.is_empty() && relayed.is_none() && hashes.is_none() {
            return Ok(None);
        }
        bound(&mut qkd_keys);
        Ok(Some(Record::Described {
            stream: new.stream.clone(),
            segment: new.number,
            qkd_keys,
            relayed,
            hashes,
        }))
    }

    fn seal_hashes(
        &mut self,
        hashes: &Hashes,
        row: RowId,
    ) -> Result<Option<SealedRow>, VaultError> {
        if hashes.is_empty() {
            return Ok(None);
        }
        let Ok(bytes) = postcard::to_allocvec(hashes).map(Zeroizing::new) else {
            unreachable!("hashes encode into memory");
        };
        let len_bytes = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let seal = self.vault.put(row, &bytes)?;
        Ok(Some(SealedRow {
            row,
            seal,
            len_bytes,
        }))
    }

    /// A unit leaves, or came, under pad of a link.
    pub(crate) fn carried(
        &mut self,
        route: &[NodeId],
        unit: SegmentNumber,
        link: &StreamId,
        pad: Vec<KeySpan>,
        encryption: RelayEncryption,
    ) {
        if let [source, .., destination] = route {
            self.record(Record::Carried {
                unit_stream: StreamId::EndToEnd {
                    source: source.clone(),
                    destination: destination.clone(),
                },
                unit,
                stream: link.clone(),
                pad,
                encryption,
            });
        }
    }

    /// Nothing goes on with a peer any more.
    pub(crate) fn quarantined(&mut self, peer: &NodeId) {
        self.record(Record::Quarantined { peer: peer.clone() });
    }

    /// What an operator calls applications; recorded where it is news.
    pub(crate) fn name_applications(&mut self, names: &BTreeMap<AppId, String>) {
        for (application, name) in names {
            if self.state.names.get(application) != Some(name) {
                self.record(Record::ApplicationNamed {
                    application: application.clone(),
                    name: name.clone(),
                });
            }
        }
    }

    /// Others may know a segment: its row is erased here and now, no key of it is given out any more,
    /// and what is left of it is burned by its owner, which the agent tells, or is told. Says whether
    /// it was news.
    pub fn suspect(&mut self, stream: &StreamId, segment: SegmentNumber) -> bool {
        let news = self
            .segment(stream, segment)
            .is_some_and(|segment| !segment.is_suspected);
        if news {
            self.record(Record::Suspected {
                stream: stream.clone(),
                segment,
            });
            self.burn_suspected(stream, segment);
        }
        news
    }

    pub(super) fn burn_suspected(&mut self, stream: &StreamId, number: SegmentNumber) {
        let suspected = self.segment(stream, number).is_some_and(|s| s.is_suspected);
        if suspected {
            self.burn_rest(stream, number, BurnReason::Suspected);
        }
    }

    /// Owner: burns what is left of a segment.
    fn burn_rest(&mut self, stream: &StreamId, number: SegmentNumber, reason: BurnReason) {
        let Some(segment) = self.segment(stream, number) else {
            return;
        };
        let rest = KeySpan {
            segment: number,
            offset_bytes: segment.mark_bytes,
            len_bytes: segment.remaining_bytes(),
        };
        if segment.key_type == KeyType::Encrypting
            && segment.stage == Stage::Confirmed
            && rest.len_bytes > 0
        {
            self.take(stream, &[rest], Purpose::Burn(reason));
        }
    }

    /// Burns key of this end that is too old, and erases preserved rows whose time is over.
    pub(crate) fn retain(&mut self) {
        let now = self.clock.age_seconds();
        if let Some(after) = self.retention.expire_after {
            let old = |stored: u64| stored.saturating_add(after.as_secs()) <= now;
            let streams = self.state.streams.iter();
            // Numbers follow the order in which segments were stored closely enough: the first that is
            // young ends the search.
            let expired: Vec<(StreamId, SegmentNumber)> = streams
                .flat_map(|(id, stream)| {
                    let open = stream
                        .open
                        .iter()
                        .filter_map(|n| stream.segments.get_key_value(n));
                    let old = open.take_while(|(_, segment)| old(segment.stored_at_seconds));
                    old.map(|(number, _)| (id.clone(), *number))
                })
                .collect();
            for (stream, segment) in expired {
                self.burn_rest(&stream, segment, BurnReason::Expired);
            }
        }
        let keep = self.retention.preserve_for.unwrap_or_default().as_secs();
        let over = |closed: u64| closed.saturating_add(keep) <= now;
        let preserved = self.state.preserved.iter();
        let over: Vec<RowId> = preserved
            .filter(|(_, row)| over(row.closed_at_seconds))
            .map(|(row, _)| *row)
            .collect();
        for row in over {
            self.record(Record::Deleted { row });
        }
    }

    /// Ends a segment that both ends are done with: its row is erased, or preserved.
    pub(crate) fn close(&mut self, stream: &StreamId, segment: SegmentNumber) {
        let readable = self
            .segment(stream, segment)
            .is_some_and(|s| !s.is_suspected);
        let stream = stream.clone();
        self.record(if readable && self.retention.preserve_for.is_some() {
            Record::Preserved { stream, segment }
        } else {
            Record::Closed { stream, segment }
        });
    }

    /// Hashes that modules gave for the QKD-keys of a segment, unsealed. They never leave the node.
    ///
    /// # Errors
    ///
    /// The row cannot be read back as it was stored.
    pub fn qkd_key_hashes(
        &mut self,
        stream: &StreamId,
        segment: SegmentNumber,
    ) -> Result<Vec<(QkdKeyId, HashValue)>, GetError> {
        let described = self.segment(stream, segment);
        let Some(at) = described.and_then(|segment| segment.hashes.as_deref().copied()) else {
            return Ok(Vec::new());
        };
        let mut bytes = Zeroizing::new(vec![0; at.len_bytes as usize]);
        self.vault.get(at.row, &at.seal, &mut bytes)?;
        postcard::from_bytes(&bytes).map_err(|_| GetError::Damaged { row: at.row })
    }

    /// SHA-256 of a segment's usable bytes and its head, as stored ("hash value" of Table 1 (2)): made
    /// when it is asked for, and kept nowhere. It never leaves the node.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn kma_key_hash(
        &mut self,
        stream: &StreamId,
        segment: SegmentNumber,
    ) -> Result<HashValue, ReadError> {
        let len_bytes = self
            .segment(stream, segment)
            .map_or(0, |segment| segment.len_bytes);
        let span = KeySpan {
            segment,
            offset_bytes: 0,
            len_bytes,
        };
        let key = self.read_all(stream, &[span])?;
        Ok(HashValue {
            algorithm: HashAlgorithm::Sha256,
            digest: Sha256::digest(key.expose()).to_vec(),
        })
    }

    /// Wraps all data keys anew; see [`crate::vault::Vault::rotate_epoch`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn rotate_epoch(&mut self) -> Result<(), VaultError> {
        self.commit()?;
        self.vault.rotate_epoch()
    }

    /// Keeps keys and history as policy says from now on.
    #[must_use]
    pub fn with_retention(mut self, retention: Retention) -> Self {
        self.retention = retention;
        self
    }
}

fn without_hash(metadata: &QkdKeyMetadata) -> QkdKeyMetadata {
    QkdKeyMetadata {
        hash: None,
        ..metadata.clone()
    }
}

/// Drops metadata, last first, until the rest fits a record.
fn bound(qkd_keys: &mut Vec<QkdKeyMetadata>) {
    let mut bytes = 0;
    let fits = qkd_keys.iter().take_while(|metadata| {
        bytes += postcard::to_allocvec(metadata).map_or(usize::MAX / 2, |encoded| encoded.len());
        bytes <= DESCRIBED_MAX_BYTES
    });
    let fits = fits.count();
    qkd_keys.truncate(fits);
}
