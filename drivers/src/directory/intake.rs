//! The files of one open folder that hold a block each: which wait, which are outstanding, which are
//! ignored.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    ffi::{OsStr, OsString},
    io,
    time::Duration,
};

use qkd_handover::type7::EPOCH_NS;
use qkd_keyfile::{QkdKeyId, UnixTime};
use tokio::time::Instant;

use super::{
    DirectoryConfig, Epochs, Format,
    folder::{Folder, Identity, Kind, OpenFile},
    journal::Journal,
    names::{DONE, QUARANTINE, id_of, is_ours_or_temporary, place_of},
    numbering::{Numbering, Relation},
    reading::{Head, Look, NoEvent, kind, read_head, read_key},
};
use crate::{
    event::{Alarm, AlarmCode, CorruptReason, Event, KeyBlock, Severity},
    source::Settlement,
};

/// Everything about one open folder.
#[derive(Debug)]
pub(super) struct Intake {
    folder: Folder,
    format: Format,
    journal: Journal,
    numbering: Option<Numbering>,
    candidates: BTreeSet<Candidate>,
    known: HashMap<OsString, Known>,
    /// Names of the files whose keys are outstanding.
    outstanding: HashMap<QkdKeyId, OsString>,
    scan_is_due: bool,
    /// The last scan found more than it may keep, and some of that has been worked off since.
    more_to_scan: (bool, bool),
}

/// A name to look at, in the order in which they are looked at.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    relation: Relation,
    /// Only set for a numbering that has not begun: the older one comes first.
    began_s: i64,
    /// `None` for a name that no hand-over file has. The epoch, where names are epochs.
    place: Option<u32>,
    name: OsString,
}

/// What is remembered of a file under its name.
#[derive(Debug)]
enum Known {
    /// Delivered and not settled.
    Outstanding(Identity),
    /// Could not be moved away; ignored until it changes.
    Ignored(Identity),
    /// Not whole yet, and unchanged since then.
    Growing(Identity, Instant),
}

impl Intake {
    pub(super) fn new(folder: Folder, config: &DirectoryConfig) -> Self {
        let numbering = (config.format.has_epochs() && config.epochs == Epochs::Local)
            .then(|| Numbering::load(&folder, config.numbering_tolerance_s));
        Self {
            journal: Journal::load(&folder),
            format: config.format,
            folder,
            numbering,
            outstanding: HashMap::new(),
            candidates: BTreeSet::new(),
            known: HashMap::new(),
            scan_is_due: true,
            more_to_scan: (false, false),
        }
    }

    pub(super) const fn folder(&self) -> &Folder {
        &self.folder
    }

    pub(super) fn attached(&self, config: &DirectoryConfig) -> Event {
        Event::Attached {
            device: config.path.display().to_string(),
            session: self.numbering.as_ref().and_then(Numbering::session),
        }
    }

    pub(super) const fn scan_soon(&mut self) {
        self.scan_is_due = true;
    }

    /// Takes a hint that there is something under `name`.
    pub(super) fn hint(&mut self, name: OsString) {
        if !is_ours_or_temporary(&name) {
            self.add(name);
        }
    }

    /// Looks at waiting files until one of them gives an event.
    ///
    /// A key goes to `out`; `scratch` holds no key afterwards. `None`: nothing is waiting, until a
    /// hint or the next scan.
    pub(super) fn next(
        &mut self,
        config: &DirectoryConfig,
        scratch: &mut [u8],
        out: &mut [u8],
        events: &mut VecDeque<Event>,
    ) -> nix::Result<Option<KeyBlock>> {
        loop {
            if std::mem::take(&mut self.scan_is_due) {
                self.scan()?;
            }
            let Some(candidate) = self.candidates.pop_first() else {
                if self.more_to_scan == (true, true) {
                    self.scan_is_due = true;
                    continue;
                }
                return Ok(None);
            };
            let name = &candidate.name;
            match self.look_at(&candidate, config, scratch, out, events) {
                Ok(block) => {
                    self.more_to_scan.1 = true;
                    if block.is_some() {
                        return Ok(block);
                    }
                }
                Err(NoEvent::Skip | NoEvent::Later) => {}
                Err(NoEvent::Bad(reason)) => {
                    self.more_to_scan.1 = true;
                    events.push_back(Event::Corrupt {
                        id: candidate.place.and_then(|_| id_of(name, self.format)),
                        reason,
                    });
                    self.quarantine(name, events);
                }
            }
            if !events.is_empty() {
                return Ok(None);
            }
        }
    }

    /// Deletes or moves the file of a delivered key block.
    pub(super) fn settle(
        &mut self,
        id: &QkdKeyId,
        outcome: Settlement,
        config: &DirectoryConfig,
        events: &mut VecDeque<Event>,
    ) {
        let Some(name) = self.outstanding.remove(id) else {
            return;
        };
        let name = name.as_os_str();
        let Some(Known::Outstanding(delivered)) = self.known.remove(name) else {
            return;
        };
        match self.folder.look_at(name) {
            // Someone put another file in its place, which has not been delivered.
            Ok(Some((now, _))) if now != delivered => self.scan_is_due = true,
            Ok(None) => {}
            _ => match outcome {
                Settlement::Quarantined => self.quarantine(name, events),
                Settlement::Stored | Settlement::Dropped => {
                    // Durable before the file goes: a crash that brings it back does not bring back
                    // its key.
                    if let Err(errno) = self.journal.add(name, delivered, &self.folder) {
                        let error = kind(errno);
                        events.push_back(warning(AlarmCode::CannotKeepJournal { error }));
                    }
                    self.dispose(name, config, events);
                }
            },
        }
    }

    fn scan(&mut self) -> nix::Result<()> {
        self.candidates.clear();
        self.more_to_scan = (false, false);
        let is_there = |name: &OsString| !matches!(self.folder.look_at(name), Ok(None));
        self.known
            .retain(|name, known| matches!(known, Known::Outstanding(_)) || is_there(name));
        for name in self.folder.names()? {
            self.hint(name?);
        }
        Ok(())
    }

    /// Puts a name where it belongs in the order, unless its file is known and has not changed.
    fn add(&mut self, name: OsString) {
        let place = place_of(&name, self.format);
        let (mut relation, mut began_s) = (Relation::Present, 0);
        let ignored = match self.known.get(&name) {
            Some(Known::Outstanding(_)) => return,
            Some(Known::Ignored(identity)) => Some(*identity),
            Some(Known::Growing(..)) | None => None,
        };
        if ignored.is_some() || self.numbering.is_some() {
            let Ok(Some((identity, _))) = self.folder.look_at(&name) else {
                return;
            };
            if ignored == Some(identity) {
                return;
            }
            if let (Some(numbering), Some(epoch)) = (&self.numbering, place) {
                let began = Numbering::beginning_s(identity.modified_s(), epoch);
                relation = numbering.relation(began);
                began_s = if relation == Relation::Next { began } else { 0 };
            }
        }
        self.candidates.insert(Candidate {
            relation,
            began_s,
            place,
            name,
        });
        if self.candidates.len() > MAX_CANDIDATES {
            self.candidates.pop_last();
            self.more_to_scan.0 = true;
        }
    }

    /// Reads one file. `Ok(None)`: what it gave is in `events`.
    fn look_at(
        &mut self,
        candidate: &Candidate,
        config: &DirectoryConfig,
        scratch: &mut [u8],
        out: &mut [u8],
        events: &mut VecDeque<Event>,
    ) -> Result<Option<KeyBlock>, NoEvent> {
        let name = &candidate.name;
        let Some(place) = candidate.place else {
            return self.look_at_stranger(name, config).map(|()| None);
        };
        if let Some(Known::Outstanding(_)) = self.known.get(name) {
            return Err(NoEvent::Skip);
        }
        let file = self.folder.open_file(name)??;
        if self.journal.holds(name, file.identity) {
            self.dispose(name, config, events);
            return Err(NoEvent::Skip);
        }
        let head = match read_head(&file, name, config, scratch)? {
            Look::Whole(head) => head,
            Look::Partial(reason) => {
                return Err(self.not_whole(name, file.identity, config, reason));
            }
        };
        if self.begins_numbering(&file, place, config, events)? {
            return Ok(None);
        }
        let id = head.metadata.qkd_key_id.clone();
        if head.key_bits == 0 {
            events.push_back(Event::Empty { id });
            self.dispose(name, config, events);
            return Ok(None);
        }
        // Only key files can give one ID twice; the second waits for the first to be settled.
        if self.outstanding.contains_key(&id) {
            return Err(NoEvent::Later);
        }
        read_key(&file, &head, scratch, out)?;
        self.outstanding.insert(id, name.clone());
        self.known
            .insert(name.clone(), Known::Outstanding(file.identity));
        Ok(Some(key_block(head, place, config)))
    }

    /// A file of a strange name is given the time that a partial file gets: its writer may be about
    /// to rename it. What is not a file is none of our business.
    fn look_at_stranger(&mut self, name: &OsStr, config: &DirectoryConfig) -> Result<(), NoEvent> {
        match self.folder.look_at(name)? {
            Some((identity, Kind::Regular)) => {
                let reason = CorruptReason::Name {
                    name: name.to_string_lossy().chars().take(64).collect(),
                };
                Err(self.not_whole(name, identity, config, reason))
            }
            _ => Err(NoEvent::Skip),
        }
    }

    /// Later, or `reason` once the file has not changed for long enough.
    fn not_whole(
        &mut self,
        name: &OsStr,
        now: Identity,
        config: &DirectoryConfig,
        reason: CorruptReason,
    ) -> NoEvent {
        let patience = Duration::from_millis(config.partial_timeout_ms);
        match self.known.get(name) {
            Some(Known::Growing(then, since)) if *then == now => {
                if since.elapsed() >= patience {
                    return NoEvent::Bad(reason);
                }
            }
            _ => {
                let growing = Known::Growing(now, Instant::now());
                self.known.insert(name.to_owned(), growing);
            }
        }
        NoEvent::Later
    }

    /// With local epochs: whether this file is the first of a new numbering. If so, the event is
    /// out, and all files are to be looked at again in the new light.
    fn begins_numbering(
        &mut self,
        file: &OpenFile,
        epoch: u32,
        config: &DirectoryConfig,
        events: &mut VecDeque<Event>,
    ) -> Result<bool, NoEvent> {
        let Some(numbering) = &mut self.numbering else {
            return Ok(false);
        };
        let began_s = Numbering::beginning_s(file.identity.modified_s(), epoch);
        match numbering.relation(began_s) {
            Relation::Ended => Err(NoEvent::Bad(CorruptReason::EndedNumbering)),
            Relation::Present => Ok(false),
            Relation::Next => {
                if let Err(errno) = numbering.begin(began_s, &self.folder) {
                    let error = kind(errno);
                    events.push_back(warning(AlarmCode::CannotKeepNumbering { error }));
                }
                events.push_back(self.attached(config));
                self.scan_is_due = true;
                Ok(true)
            }
        }
    }

    fn quarantine(&mut self, name: &OsStr, events: &mut VecDeque<Event>) {
        let done = self.folder.set_aside(name, QUARANTINE);
        self.finish(name, done, events, |file, error| {
            AlarmCode::CannotQuarantine { file, error }
        });
    }

    /// Deletes a file that is not needed any more, or keeps it aside where that is configured.
    fn dispose(&mut self, name: &OsStr, config: &DirectoryConfig, events: &mut VecDeque<Event>) {
        let done = if config.delete {
            self.folder.remove(name)
        } else {
            self.folder.set_aside(name, DONE)
        };
        self.finish(name, done, events, |file, error| AlarmCode::CannotSettle {
            file,
            error,
        });
    }

    /// Forgets a file that is gone; one that could not be moved is ignored until it changes.
    fn finish(
        &mut self,
        name: &OsStr,
        done: nix::Result<()>,
        events: &mut VecDeque<Event>,
        code: impl FnOnce(String, io::ErrorKind) -> AlarmCode,
    ) {
        self.known.remove(name);
        let (Err(errno), Ok(Some((identity, _)))) = (done, self.folder.look_at(name)) else {
            return;
        };
        let file = name.to_string_lossy().into_owned();
        events.push_back(warning(code(file, kind(errno))));
        self.known.insert(name.to_owned(), Known::Ignored(identity));
    }
}

/// What is known of a block; the configuration fills in what the file does not tell.
fn key_block(head: Head, place: u32, config: &DirectoryConfig) -> KeyBlock {
    let Head {
        mut metadata,
        key_bits,
        ..
    } = head;
    metadata.key_bits = Some(key_bits);
    if config.format.has_epochs() && config.epochs == Epochs::Extended {
        metadata.generated_at = Some(generated_at(place));
    }
    metadata.module = metadata.module.or_else(|| config.module.clone());
    metadata.matching_module = metadata
        .matching_module
        .or_else(|| config.matching_module.clone());
    KeyBlock {
        metadata,
        key_bits,
        qber_ppm: None,
    }
}

/// Extended epochs count from 1970; the time stamp is the beginning of the first.
fn generated_at(epoch: u32) -> UnixTime {
    UnixTime((u64::from(epoch) * EPOCH_NS).cast_signed())
}

pub(super) fn warning(code: AlarmCode) -> Event {
    let severity = match code {
        AlarmCode::CannotSettle { .. } => Severity::Security,
        _ => Severity::Warning,
    };
    Event::Alarm(Alarm { code, severity })
}

/// Names kept between two scans. More wait in the folder.
const MAX_CANDIDATES: usize = 4096;
