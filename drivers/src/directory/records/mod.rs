//! The files of one open folder that hold many keys, one after another, and grow.
//!
//! A file is read from where it was read to, by its inode: a rename (rotation) changes nothing, and the
//! old file is read to its end before the next. Up to where everything is settled is noted durably, with
//! the ID of the last settled record, so that a restart neither repeats nor skips one. A file that became
//! shorter, or in which another record stands where that one was, was written anew: it is read from its
//! start, and IDs that came before are passed over.
//!
//! A file is disposed of when all of it is settled and its writer has gone on to another; the note of
//! that comes first. The file that is written to is never touched.

mod positions;
mod tail;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    ffi::{OsStr, OsString},
    time::Duration,
};

use qkd_keyfile::{QkdKeyId, metadata::QkdKeyMetadata, units::bytes_for_bits};
use tokio::time::Instant;
use zeroize::Zeroize;

use self::{
    positions::{Place, Positions},
    tail::{Found, Tail},
};
use super::{
    DirectoryConfig, Format,
    folder::{Folder, Identity, Inode},
    intake::warning,
    names::{DONE, QUARANTINE, is_ours_or_temporary},
    reading::{NoEvent, kind},
};
use crate::event::{AlarmCode, CorruptReason, Event, KeyBlock};

/// Everything about one open folder of files with records.
#[derive(Debug)]
pub(super) struct Records {
    folder: Folder,
    files: BTreeMap<Order, File>,
    /// Whose place is the file's order now; the same inode never has two.
    orders: HashMap<Inode, Order>,
    positions: Positions,
    /// What settlements changed and the note does not say yet.
    unsaid: bool,
    outstanding: HashMap<QkdKeyId, Inode>,
    came: Came,
    /// Files that failed a check and could not be moved away.
    ignored: HashMap<OsString, Identity>,
    scan_is_due: bool,
}

/// In which order files are read: by their number, else by their time, the one that is written to last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Order {
    is_current: bool,
    number: u64,
    modified_ns: i128,
    inode: Inode,
}

#[derive(Debug)]
struct File {
    name: OsString,
    tail: Tail,
    /// Delivered and not settled at the front, in the order of the file.
    blocks: VecDeque<Block>,
    /// Nothing more is read from it.
    ended: bool,
    /// Since when its end is not a whole record, and how long it was then.
    stuck: Option<(u64, Instant)>,
}

#[derive(Debug)]
struct Block {
    /// `None` once it is settled.
    id: Option<QkdKeyId>,
    /// Where everything up to and with it is settled.
    after: Place,
}

impl Records {
    pub(super) fn new(folder: Folder) -> Self {
        let positions = Positions::load(&folder);
        Self {
            folder,
            files: BTreeMap::new(),
            orders: HashMap::new(),
            positions,
            unsaid: false,
            outstanding: HashMap::new(),
            came: Came::default(),
            ignored: HashMap::new(),
            scan_is_due: true,
        }
    }

    pub(super) const fn folder(&self) -> &Folder {
        &self.folder
    }

    pub(super) const fn scan_soon(&mut self) {
        self.scan_is_due = true;
    }

    pub(super) fn attached(config: &DirectoryConfig) -> Event {
        Event::Attached {
            device: config.path.display().to_string(),
            session: None,
        }
    }

    /// Takes a hint that something happened under `name`. A file that merely grew is read anyway.
    pub(super) fn hint(&mut self, name: &OsStr) {
        let known = self
            .folder
            .look_at(name)
            .ok()
            .flatten()
            .is_some_and(|(now, _)| {
                let order = self.orders.get(&now.inode());
                let file = order.and_then(|order| self.files.get(order));
                file.is_some_and(|file| file.name == *name)
            });
        self.scan_is_due |= !known && !is_ours_or_temporary(name);
    }

    /// Reads on until a record gives an event. As [`Intake::next`](super::intake::Intake::next).
    pub(super) fn next(
        &mut self,
        config: &DirectoryConfig,
        scratch: &mut [u8],
        out: &mut [u8],
        events: &mut VecDeque<Event>,
    ) -> nix::Result<Option<KeyBlock>> {
        if std::mem::take(&mut self.scan_is_due) {
            self.scan(config, events)?;
        }
        let orders: Vec<_> = self.files.keys().copied().collect();
        for order in orders {
            while events.is_empty() {
                match self.read(order, config, scratch, out, events) {
                    Read::Key(block) => return Ok(Some(block)),
                    Read::Passed => {}
                    Read::Nothing => break,
                }
            }
            if !events.is_empty() {
                return Ok(None);
            }
        }
        Ok(None)
    }

    /// Notes what settlements have changed, and disposes of files that are done with. One durable step
    /// for all settlements since the last.
    pub(super) fn flush(&mut self, config: &DirectoryConfig, events: &mut VecDeque<Event>) {
        if !std::mem::take(&mut self.unsaid) {
            return;
        }
        if let Err(errno) = self.positions.write(&self.folder) {
            let error = kind(errno);
            events.push_back(warning(AlarmCode::CannotKeepJournal { error }));
        }
        let done: Vec<_> = self
            .files
            .iter()
            .filter(|(_, file)| file.ended && file.blocks.is_empty())
            .map(|(order, _)| *order)
            .collect();
        for order in done {
            self.dispose(order, config, events);
        }
    }

    /// A record's key is safe, or will not be used.
    pub(super) fn settle(&mut self, id: &QkdKeyId) {
        let Some(inode) = self.outstanding.remove(id) else {
            return;
        };
        let order = self.orders.get(&inode);
        let Some(file) = order.and_then(|order| self.files.get_mut(order)) else {
            return;
        };
        if let Some(block) = file
            .blocks
            .iter_mut()
            .find(|block| block.id.as_ref() == Some(id))
        {
            block.id = None;
        }
        while file.blocks.front().is_some_and(|block| block.id.is_none()) {
            if let Some(block) = file.blocks.pop_front() {
                self.positions.set(inode, block.after);
                self.unsaid = true;
            }
        }
    }

    /// One step in one file.
    fn read(
        &mut self,
        order: Order,
        config: &DirectoryConfig,
        scratch: &mut [u8],
        out: &mut [u8],
        events: &mut VecDeque<Event>,
    ) -> Read {
        let is_last = self.files.last_key_value().map(|(last, _)| *last) == Some(order);
        let Some(file) = self.files.get_mut(&order).filter(|file| !file.ended) else {
            return Read::Nothing;
        };
        let Ok(size_bytes) = file.tail.size_bytes() else {
            return Read::Nothing;
        };
        if size_bytes < file.tail.place.offset_bytes {
            self.begin_anew(order, events);
            return Read::Nothing;
        }
        let start = file.tail.place.clone();
        match file.tail.next(size_bytes, config, scratch, out) {
            Ok(Found::Key(found)) => {
                let id = found.id;
                if self.outstanding.contains_key(&id) || !self.came.is_new(&id) {
                    out[..bytes_for_bits(found.key_bits)].zeroize();
                    self.pass(order);
                    return Read::Passed;
                }
                let after = file.tail.place.clone();
                file.blocks.push_back(Block {
                    id: Some(id.clone()),
                    after,
                });
                self.outstanding.insert(id.clone(), order.inode);
                Read::Key(KeyBlock {
                    metadata: QkdKeyMetadata {
                        key_bits: Some(found.key_bits),
                        module: config.module.clone(),
                        matching_module: config.matching_module.clone(),
                        ..QkdKeyMetadata::new(id)
                    },
                    key_bits: found.key_bits,
                    qber_ppm: found.qber_ppm,
                })
            }
            Ok(Found::Empty { id }) => {
                events.push_back(Event::Empty { id });
                self.pass(order);
                Read::Passed
            }
            Ok(Found::Bad { id, reason }) => {
                events.push_back(Event::Corrupt { id, reason });
                self.pass(order);
                Read::Passed
            }
            Ok(Found::Incomplete { need_bytes }) => {
                file.tail.place = start;
                self.at_the_end(order, is_last, size_bytes, need_bytes, config, events);
                Read::Nothing
            }
            Err(NoEvent::Bad(reason)) => {
                file.ended = true;
                let name = file.name.clone();
                self.refuse(&name, None, reason, events);
                Read::Nothing
            }
            Err(NoEvent::Skip | NoEvent::Later) => {
                file.tail.place = start;
                Read::Nothing
            }
        }
    }

    /// A record gives no key: it counts as settled once all before it are.
    fn pass(&mut self, order: Order) {
        let Some(file) = self.files.get_mut(&order) else {
            return;
        };
        let after = file.tail.place.clone();
        if file.blocks.is_empty() {
            self.positions.set(order.inode, after);
            self.unsaid = true;
        } else {
            file.blocks.push_back(Block { id: None, after });
        }
    }

    /// There is no whole record left. The writer's file may grow; one that it has left will not, but for
    /// what is still on its way.
    fn at_the_end(
        &mut self,
        order: Order,
        is_last: bool,
        size_bytes: u64,
        need_bytes: usize,
        config: &DirectoryConfig,
        events: &mut VecDeque<Event>,
    ) {
        let Some(file) = self.files.get_mut(&order) else {
            return;
        };
        let offset_bytes = file.tail.place.offset_bytes;
        let is_full =
            config.format == Format::HexLines && file.tail.place.line >= config.block_keys;
        if is_last && !is_full {
            return;
        }
        let patience = Duration::from_millis(config.partial_timeout_ms);
        match file.stuck {
            Some((then, since)) if then == size_bytes && since.elapsed() >= patience => {}
            Some((then, _)) if then == size_bytes && !is_full => return,
            // A file that was left at the end of a record is given its time too: its writer may not
            // have opened the next one yet.
            _ if !is_full => {
                file.stuck = Some((size_bytes, Instant::now()));
                return;
            }
            _ => {}
        }
        file.ended = true;
        self.unsaid = true;
        if size_bytes > offset_bytes && !is_full {
            events.push_back(Event::Corrupt {
                id: None,
                reason: CorruptReason::Incomplete {
                    have_bytes: size_bytes - offset_bytes,
                    need_bytes,
                },
            });
        }
    }

    /// The file is not the one that was read, though it is in its place.
    fn begin_anew(&mut self, order: Order, events: &mut VecDeque<Event>) {
        if let Some(file) = self.files.get_mut(&order) {
            for id in file.blocks.drain(..).filter_map(|block| block.id) {
                self.outstanding.remove(&id);
            }
            file.tail.place = Place::default();
            file.stuck = None;
            let file = file.name.to_string_lossy().into_owned();
            events.push_back(warning(AlarmCode::FileReplaced { file }));
        }
        self.positions.set(order.inode, Place::default());
        self.unsaid = true;
    }

    fn scan(&mut self, config: &DirectoryConfig, events: &mut VecDeque<Event>) -> nix::Result<()> {
        let mut there = BTreeSet::new();
        for name in self.folder.names()? {
            let name = name?;
            if is_ours_or_temporary(&name) {
                continue;
            }
            let (Some(number), Ok(Some((identity, _)))) =
                (number_of(&name, config), self.folder.look_at(&name))
            else {
                continue;
            };
            if self.ignored.get(&name) == Some(&identity) {
                continue;
            }
            there.insert(identity.inode());
            self.meet(name, number, identity, config, events);
        }
        // What was removed by others is not read any more; what it gave is settled as it comes.
        let gone: Vec<_> = self
            .files
            .iter()
            .filter(|(order, file)| !there.contains(&order.inode) && file.blocks.is_empty())
            .map(|(order, _)| *order)
            .collect();
        for order in gone {
            self.forget(order);
        }
        if self.positions.retain(|inode| there.contains(inode)) {
            self.unsaid = true;
        }
        Ok(())
    }

    /// A file that stands in the folder: known, perhaps under another name, or new.
    fn meet(
        &mut self,
        name: OsString,
        number: u64,
        identity: Identity,
        config: &DirectoryConfig,
        events: &mut VecDeque<Event>,
    ) {
        let inode = identity.inode();
        let order = Order {
            is_current: config.file.as_deref().map(OsStr::new) == Some(&*name),
            number,
            // A number is order enough, and the file that grows would move otherwise.
            modified_ns: if config.format == Format::HexLines {
                0
            } else {
                identity.modified_ns()
            },
            inode,
        };
        if let Some(before) = self.orders.insert(inode, order) {
            if let Some(mut file) = self.files.remove(&before) {
                file.name = name;
                self.files.insert(order, file);
            }
            return;
        }
        let opened = self.folder.open_file(&name);
        let file = match opened.map_err(NoEvent::from) {
            Ok(Ok(file)) => file,
            Ok(Err(reason)) | Err(NoEvent::Bad(reason)) => {
                self.orders.remove(&inode);
                return self.refuse(&name, Some(identity), reason, events);
            }
            Err(NoEvent::Skip | NoEvent::Later) => {
                self.orders.remove(&inode);
                return;
            }
        };
        let place = self.positions.get(inode);
        let tail = Tail::new(file, place, number);
        let is_other = !tail.stands_where_it_stood(config);
        self.files.insert(
            order,
            File {
                name,
                tail,
                blocks: VecDeque::new(),
                ended: false,
                stuck: None,
            },
        );
        if is_other {
            self.begin_anew(order, events);
        }
    }

    fn forget(&mut self, order: Order) {
        self.files.remove(&order);
        self.orders.remove(&order.inode);
    }

    /// Sets a file aside that cannot be read, or not any further.
    fn refuse(
        &mut self,
        name: &OsStr,
        identity: Option<Identity>,
        reason: CorruptReason,
        events: &mut VecDeque<Event>,
    ) {
        events.push_back(Event::Corrupt { id: None, reason });
        if let Err(errno) = self.folder.set_aside(name, QUARANTINE) {
            let (file, error) = (name.to_string_lossy().into_owned(), kind(errno));
            events.push_back(warning(AlarmCode::CannotQuarantine { file, error }));
            if let Some(identity) = identity {
                self.ignored.insert(name.to_owned(), identity);
            }
        }
    }

    fn dispose(&mut self, order: Order, config: &DirectoryConfig, events: &mut VecDeque<Event>) {
        let Some(file) = self.files.get(&order) else {
            return;
        };
        let name = file.name.clone();
        // Whoever took its place under that name is not it.
        let is_it = matches!(
            self.folder.look_at(&name),
            Ok(Some((identity, _))) if identity.inode() == order.inode
        );
        if !is_it {
            return;
        }
        let done = if config.delete {
            self.folder.remove(&name)
        } else {
            self.folder.set_aside(&name, DONE)
        };
        match done {
            Ok(()) => self.forget(order),
            Err(errno) => {
                let (file, error) = (name.to_string_lossy().into_owned(), kind(errno));
                events.push_back(warning(AlarmCode::CannotSettle { file, error }));
            }
        }
    }
}

enum Read {
    Key(KeyBlock),
    /// A record without key; there may be more.
    Passed,
    Nothing,
}

/// The number of a file with records by its name, which is 0 where names have none; `None` if it is no
/// such file.
fn number_of(name: &OsStr, config: &DirectoryConfig) -> Option<u64> {
    let (name, file) = (name.to_str()?, config.file.as_deref()?);
    match config.format {
        Format::HexLines => match qkd_handover::hex_lines::parse_name(name)? {
            (peer, number) if peer == file => Some(number),
            _ => None,
        },
        // Rotation adds to a name: `keys.bin.1`, `keys.bin-20261121`.
        _ => name.starts_with(file).then_some(0),
    }
}

/// The last IDs that came, so that a file which was written anew does not give them again. Restarts
/// forget them; the layer above does not.
#[derive(Debug, Default)]
struct Came {
    ids: HashSet<QkdKeyId>,
    order: VecDeque<QkdKeyId>,
}

impl Came {
    fn is_new(&mut self, id: &QkdKeyId) -> bool {
        if !self.ids.insert(id.clone()) {
            return false;
        }
        self.order.push_back(id.clone());
        if self.order.len() > CAME_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
        true
    }
}

const CAME_MAX: usize = 16_384;
