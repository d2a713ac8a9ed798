//! The history of a key and the keys that are correlated with it, in both directions (Y.3803 clause
//! 8.2.6, fault management): what it was made of, what pad carried it, what was cut from it and
//! carried under it.
//!
//! A trace reads the ledger and its archives. It holds no key and no hash of one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use qkd_keyfile::{
    AppId, Composition, KeyMetadata, KmaKeyId, KsaKeyId, NodeId, QkdKeyName, SegmentNumber,
    StreamId, UnixTime,
    metadata::{KeyType, KmaKeyMetadata, KsaKeyMetadata, QkdKeyMetadata},
};

use crate::{
    record::{Binding, Purpose, Record, StoredSegment},
    vault::{JournalView, VaultError},
};

/// A key, by what it is called at its stage.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyRef {
    /// A QKD-key of a module pair.
    QkdKey(QkdKeyName),
    /// A KMA-key: a segment of a link, or a relayed unit.
    KmaKey(StreamId, SegmentNumber),
    /// A relayed unit that link bits were reserved for, also where it is never stored.
    Unit(KmaKeyId),
    /// A key that was given to applications.
    KsaKey(KsaKeyId),
}

impl fmt::Display for KeyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::QkdKey(name) => write!(f, "QKD-key {name}"),
            Self::KmaKey(stream, number) => write!(f, "KMA-key {stream}/{number}"),
            Self::Unit(id) => write!(f, "unit {id}"),
            Self::KsaKey(id) => write!(f, "KSA-key {id}"),
        }
    }
}

/// What happened to a key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Event {
    /// When, by a clock that may have been wrong.
    pub at: UnixTime,
    /// To which key.
    pub key: KeyRef,
    /// The transition.
    pub transition: &'static str,
    /// More about it.
    pub detail: String,
}

/// A key's history and correlated set.
#[derive(Debug, Default)]
pub struct Trace {
    /// The keys of that ID.
    pub keys: BTreeSet<KeyRef>,
    /// What they were cut from or made of themselves.
    pub parents: BTreeSet<KeyRef>,
    /// What was cut from or made of them directly.
    pub children: BTreeSet<KeyRef>,
    /// What they were made of, and the pad that carried them, and so on up to the QKD-keys.
    pub origins: BTreeSet<KeyRef>,
    /// What was cut from them, and what was carried under them.
    pub derived: BTreeSet<KeyRef>,
    /// What happened to the keys, their children and their origins, oldest first.
    pub events: Vec<Event>,
    /// Metadata of the keys (Table 1 of Y.3803); hashes are withheld.
    pub metadata: Vec<KeyMetadata>,
}

/// What is asked for: a UUID (of a KMA-key or KSA-key), `stream/number`, or a QKD-key's ID, alone or
/// as `pair.generation/id`.
#[derive(Debug, Clone)]
struct Query {
    text: String,
    kma_key: Option<KmaKeyId>,
    ksa_key: Option<KsaKeyId>,
}

impl Query {
    fn new(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            kma_key: text.parse().ok(),
            ksa_key: text.parse().ok(),
        }
    }

    fn is_qkd_key(&self, name: &QkdKeyName) -> bool {
        name.id.as_str() == self.text || name.to_string() == self.text
    }

    fn is_segment(&self, stream: &StreamId, number: SegmentNumber) -> bool {
        let (name, segment) = self.text.rsplit_once('/').unwrap_or_default();
        segment.parse() == Ok(number.0) && stream.to_string() == name
    }

    /// Keys of a record that the query means.
    fn matches(&self, record: &Record, into: &mut BTreeSet<KeyRef>) {
        match record {
            Record::Received { .. } => into.extend(received(record).filter(|k| self.is_key(k))),
            Record::Stored {
                stream,
                segment,
                body,
            } if self.kma_key == Some(body.kma_key_id) || self.is_segment(stream, *segment) => {
                into.insert(KeyRef::KmaKey(stream.clone(), *segment));
            }
            Record::Carried {
                unit_stream, unit, ..
            } if self.is_segment(unit_stream, *unit) => {
                into.insert(KeyRef::KmaKey(unit_stream.clone(), *unit));
            }
            Record::Taken {
                purpose: Purpose::Relay(unit),
                ..
            }
            | Record::Followed {
                purpose: Purpose::Relay(unit),
                ..
            } if self.kma_key == Some(*unit) => {
                into.insert(KeyRef::Unit(*unit));
            }
            Record::Bound { binding, .. } | Record::BindingReceived { binding, .. }
                if self.ksa_key == Some(binding.key_id) =>
            {
                into.insert(KeyRef::KsaKey(binding.key_id));
            }
            _ => {}
        }
        if let Some(composition) = composition_of(record) {
            let names = names_of(composition).filter(|name| self.is_qkd_key(name));
            into.extend(names.map(KeyRef::QkdKey));
        }
    }

    fn is_key(&self, key: &KeyRef) -> bool {
        matches!(key, KeyRef::QkdKey(name) if self.is_qkd_key(name))
    }
}

/// Traces the key of an ID. `me` is the node whose journal it is.
///
/// # Errors
///
/// An archive cannot be read.
pub fn trace(journal: &JournalView, me: &NodeId, id: &str) -> Result<Trace, VaultError> {
    let query = Query::new(id);
    let mut found = Trace::default();
    each(journal, &mut |_, record| {
        query.matches(record, &mut found.keys);
    })?;
    found.origins.clone_from(&found.keys);
    found.derived.clone_from(&found.keys);
    // What a key was made of stands before it, so every pass climbs one step; going down takes one.
    loop {
        let before = (found.origins.len(), found.derived.len());
        each(journal, &mut |_, record| {
            for_each_link(record, &mut |from, to| {
                if found.derived.contains(&from) {
                    found.derived.insert(to.clone());
                }
                if found.keys.contains(&from) {
                    found.children.insert(to.clone());
                }
                if found.keys.contains(&to) {
                    found.parents.insert(from.clone());
                }
                if found.origins.contains(&to) {
                    found.origins.insert(from);
                }
            });
        })?;
        if before == (found.origins.len(), found.derived.len()) {
            break;
        }
    }
    found.origins = &found.origins - &found.keys;
    found.derived = &found.derived - &found.keys;
    let mut story = Story::new(me, &found);
    each(journal, &mut |at, record| story.tell(at, record))?;
    let (events, metadata) = story.finish();
    (found.events, found.metadata) = (events, metadata);
    Ok(found)
}

/// Shows every record of the archives and the journal, in order, with the time.
fn each(journal: &JournalView, show: &mut dyn FnMut(UnixTime, &Record)) -> Result<(), VaultError> {
    let mut now = UnixTime::default();
    let mut read = |bytes: &[u8]| match postcard::from_bytes(bytes) {
        Ok(Record::Time { unix, .. }) => now = unix,
        Ok(Record::History { unix, record }) => show(unix, &record),
        Ok(record) => show(now, &record),
        Err(_) => {}
    };
    journal.each_archived_record(&mut read)?;
    journal.each_record(&mut read);
    Ok(())
}

fn received(record: &Record) -> impl Iterator<Item = KeyRef> {
    let name = match record {
        Record::Received {
            module_pair,
            generation,
            metadata,
            ..
        } => Some(QkdKeyName {
            module_pair: module_pair.clone(),
            generation: *generation,
            id: metadata.qkd_key_id.clone(),
        }),
        _ => None,
    };
    name.map(KeyRef::QkdKey).into_iter()
}

fn composition_of(record: &Record) -> Option<&Composition> {
    match record {
        Record::Proposed { composition, .. } => composition.as_ref(),
        Record::Stored { body, .. } => body.composition.as_ref(),
        _ => None,
    }
}

fn names_of(composition: &Composition) -> impl Iterator<Item = QkdKeyName> {
    composition.pieces.iter().map(|piece| QkdKeyName {
        module_pair: composition.module_pair.clone(),
        generation: composition.generation,
        id: piece.qkd_key.clone(),
    })
}

/// From what a key was made, or what it was carried under, to the key.
fn for_each_link(record: &Record, link: &mut dyn FnMut(KeyRef, KeyRef)) {
    match record {
        Record::Taken {
            stream,
            span,
            purpose: Purpose::Relay(unit),
        }
        | Record::Followed {
            stream,
            span,
            purpose: Purpose::Relay(unit),
        } => {
            let reserved = KeyRef::KmaKey(stream.clone(), span.segment);
            link(reserved, KeyRef::Unit(*unit));
        }
        Record::Stored {
            stream: stream @ StreamId::EndToEnd { .. },
            segment,
            body,
        } => {
            let stored = KeyRef::KmaKey(stream.clone(), *segment);
            link(KeyRef::Unit(body.kma_key_id), stored);
        }
        Record::Proposed {
            stream, segment, ..
        }
        | Record::Stored {
            stream, segment, ..
        } => {
            for name in composition_of(record).into_iter().flat_map(names_of) {
                let made = KeyRef::KmaKey(stream.clone(), *segment);
                link(KeyRef::QkdKey(name), made);
            }
        }
        Record::Bound { binding, .. } | Record::BindingReceived { binding, .. } => {
            let from = KeyRef::KmaKey(binding.stream.clone(), binding.span.segment);
            link(from, KeyRef::KsaKey(binding.key_id));
        }
        Record::Carried {
            unit_stream,
            unit,
            stream,
            pad,
            ..
        } => {
            let segments: BTreeSet<SegmentNumber> = pad.iter().map(|span| span.segment).collect();
            for segment in segments {
                let under = KeyRef::KmaKey(stream.clone(), segment);
                link(under, KeyRef::KmaKey(unit_stream.clone(), *unit));
            }
        }
        _ => {}
    }
}

/// Collects what happened to a set of keys.
struct Story<'a> {
    me: &'a NodeId,
    keys: &'a BTreeSet<KeyRef>,
    children: &'a BTreeSet<KeyRef>,
    origins: &'a BTreeSet<KeyRef>,
    events: BTreeSet<Event>,
    names: BTreeMap<AppId, String>,
    qkd: BTreeMap<QkdKeyName, QkdKeyMetadata>,
    kma: BTreeMap<KeyRef, KmaKeyMetadata>,
    others: Vec<KeyMetadata>,
    /// Of the KSA-keys asked for.
    bound: Vec<(UnixTime, Binding)>,
}

impl<'a> Story<'a> {
    fn new(me: &'a NodeId, found: &'a Trace) -> Self {
        Self {
            me,
            keys: &found.keys,
            children: &found.children,
            origins: &found.origins,
            events: BTreeSet::new(),
            names: BTreeMap::new(),
            qkd: BTreeMap::new(),
            kma: BTreeMap::new(),
            others: Vec::new(),
            bound: Vec::new(),
        }
    }

    fn wants(&self, key: &KeyRef) -> bool {
        [self.keys, self.children, self.origins]
            .iter()
            .any(|set| set.contains(key))
    }

    fn happened(&mut self, at: UnixTime, key: KeyRef, transition: &'static str, detail: String) {
        if self.wants(&key) {
            self.events.insert(Event {
                at,
                key,
                transition,
                detail,
            });
        }
    }

    fn tell(&mut self, at: UnixTime, record: &Record) {
        if let Some((stream, number)) = segment_of(record) {
            let key = KeyRef::KmaKey(stream.clone(), number);
            if self.wants(&key) {
                self.tell_of_segment(at, &key, record);
            }
        }
        match record {
            Record::Received {
                key_bits, metadata, ..
            } => {
                for key in received(record).filter(|key| self.keys.contains(key)) {
                    let mut metadata = metadata.clone();
                    metadata.key_bits.get_or_insert(*key_bits);
                    if let KeyRef::QkdKey(name) = &key {
                        self.qkd.insert(name.clone(), metadata);
                    }
                }
                for key in received(record) {
                    self.happened(at, key, "received", format!("{key_bits} bits"));
                }
            }
            Record::QkdKeysUsed {
                module_pair,
                generation,
                ids,
            } => {
                for id in ids {
                    let key = KeyRef::QkdKey(QkdKeyName {
                        module_pair: module_pair.clone(),
                        generation: *generation,
                        id: id.clone(),
                    });
                    self.happened(at, key, "settled", "composed or dropped".to_owned());
                }
            }
            Record::Bound {
                destination,
                binding,
                ..
            } => {
                let to = format!("to {} for {destination}", binding.master);
                self.supplied(at, binding, to);
            }
            Record::BindingReceived {
                source, binding, ..
            } => self.supplied(at, binding, format!("cut by {source}")),
            Record::Delivered {
                key_id,
                application,
                ..
            } => {
                let to = format!("to {application}");
                self.happened(at, KeyRef::KsaKey(*key_id), "supplied", to);
            }
            Record::Forgotten { key_id, .. } => {
                let why = "never fetched".to_owned();
                self.happened(at, KeyRef::KsaKey(*key_id), "deleted", why);
            }
            Record::ApplicationNamed { application, name } => {
                self.names.insert(application.clone(), name.clone());
            }
            _ => {}
        }
    }

    fn supplied(&mut self, at: UnixTime, binding: &Binding, who: String) {
        let key = KeyRef::KsaKey(binding.key_id);
        if self.keys.contains(&key) {
            self.bound.push((at, binding.clone()));
        }
        let span = binding.span;
        let detail = format!(
            "{who}: {} bits at byte {}",
            span.len_bytes * 8,
            span.offset_bytes
        );
        self.happened(at, key, "cut", detail);
    }

    fn tell_of_segment(&mut self, at: UnixTime, key: &KeyRef, record: &Record) {
        let (transition, detail) = match record {
            Record::Proposed { .. } => ("formatted", String::new()),
            Record::Stored { stream, body, .. } => {
                self.describe_segment(at, key, stream, body);
                let (id, level) = (body.kma_key_id, body.level);
                (
                    "stored",
                    format!("KMA-key {id}, {} bytes, level {level:?}", body.len_bytes),
                )
            }
            Record::Described {
                qkd_keys, relayed, ..
            } => return self.describe(key, qkd_keys, relayed.as_deref()),
            Record::Confirmed { .. } => ("confirmed", "at both ends".to_owned()),
            Record::Ceded { to, .. } => {
                self.owned(key, KeyType::Decrypting);
                ("ceded", format!("to {to}, which owns it"))
            }
            Record::Acquired { from, .. } => {
                self.owned(key, KeyType::Encrypting);
                ("acquired", format!("from {from}; owned here"))
            }
            Record::Discarded { reason, .. } => ("discarded", format!("{reason:?}")),
            Record::Taken { span, purpose, .. } | Record::Followed { span, purpose, .. } => {
                let what = match purpose {
                    Purpose::Burn(_) => "burned",
                    Purpose::Supply => "cut for supply",
                    Purpose::Relay(_) => "reserved for a relay",
                    Purpose::Pad => "used as pad",
                };
                let end = span.end_bytes().unwrap_or(u32::MAX);
                let why = match purpose {
                    Purpose::Burn(reason) => format!(", {reason:?}"),
                    Purpose::Relay(unit) => format!(", unit {unit}"),
                    _ => String::new(),
                };
                (what, format!("bytes {} to {end}{why}", span.offset_bytes))
            }
            Record::Carried {
                stream, encryption, ..
            } => ("relayed", format!("over {stream}, {encryption:?}")),
            Record::Suspected { .. } => ("suspected", "row erased".to_owned()),
            Record::Closed { .. } => ("deleted", "both ends are done with it".to_owned()),
            Record::Preserved { .. } => ("preserved", "both ends are done with it".to_owned()),
            _ => return,
        };
        self.happened(at, key.clone(), transition, detail);
    }

    fn describe_segment(
        &mut self,
        at: UnixTime,
        key: &KeyRef,
        stream: &StreamId,
        body: &StoredSegment,
    ) {
        if let Some(peer) = stream.peer_of(self.me)
            && self.keys.contains(key)
        {
            let metadata = KmaKeyMetadata {
                key_bits: Some(body.len_bytes.saturating_mul(8)),
                key_type: Some(body.key_type),
                kma: Some(self.me.clone()),
                generated_at: Some(at),
                ..KmaKeyMetadata::new(body.kma_key_id, peer.clone())
            };
            self.kma.entry(key.clone()).or_insert(metadata);
        }
    }

    fn owned(&mut self, key: &KeyRef, key_type: KeyType) {
        if let Some(metadata) = self.kma.get_mut(key) {
            metadata.key_type = Some(key_type);
        }
    }

    fn describe(
        &mut self,
        key: &KeyRef,
        qkd_keys: &[QkdKeyMetadata],
        relayed: Option<&qkd_keyfile::metadata::RelayedKeyMetadata>,
    ) {
        if !self.keys.contains(key) {
            return;
        }
        if let Some(metadata) = self.kma.get_mut(key) {
            for qkd_key in qkd_keys {
                let pair = (qkd_key.module.clone(), qkd_key.matching_module.clone());
                if let (Some(module), Some(matching)) = pair
                    && !metadata.modules.contains(&module)
                {
                    metadata.modules.push(module);
                    metadata.matching_modules.push(matching);
                }
            }
        }
        if let Some(relayed) = relayed {
            let metadata = KeyMetadata::Relayed(relayed.clone());
            if !self.others.contains(&metadata) {
                self.others.push(metadata);
            }
        }
    }

    fn finish(self) -> (Vec<Event>, Vec<KeyMetadata>) {
        let mut metadata: Vec<KeyMetadata> = self.qkd.into_values().map(KeyMetadata::Qkd).collect();
        metadata.extend(self.kma.into_values().map(KeyMetadata::Kma));
        metadata.extend(self.others);
        metadata.extend(self.bound.into_iter().map(|(at, binding)| {
            KeyMetadata::Ksa(KsaKeyMetadata {
                key_bits: Some(binding.span.len_bytes.saturating_mul(8)),
                supplied_at: Some(at),
                application_name: self.names.get(&binding.master).cloned(),
                destination_application: binding.applications.first().cloned(),
                source_application: Some(binding.master),
                ..KsaKeyMetadata::new(binding.key_id)
            })
        }));
        (self.events.into_iter().collect(), metadata)
    }
}

/// The segment that a record is about.
fn segment_of(record: &Record) -> Option<(&StreamId, SegmentNumber)> {
    match record {
        Record::Proposed {
            stream, segment, ..
        }
        | Record::Stored {
            stream, segment, ..
        }
        | Record::Described {
            stream, segment, ..
        }
        | Record::Confirmed { stream, segment }
        | Record::Discarded {
            stream, segment, ..
        }
        | Record::Suspected { stream, segment }
        | Record::Ceded {
            stream, segment, ..
        }
        | Record::Acquired {
            stream, segment, ..
        }
        | Record::Closed { stream, segment }
        | Record::Preserved { stream, segment } => Some((stream, *segment)),
        Record::Taken { stream, span, .. } | Record::Followed { stream, span, .. } => {
            Some((stream, span.segment))
        }
        Record::Carried {
            unit_stream, unit, ..
        } => Some((unit_stream, *unit)),
        _ => None,
    }
}
