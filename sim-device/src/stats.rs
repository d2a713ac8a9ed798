//! What a half has done so far, readable while it runs.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use qkd_handover::status::Status;

// ORDERING, for the whole file: Relaxed. Each counter stands by itself.

/// Live counters; share them with the thread that runs the half.
#[derive(Debug, Default)]
pub struct Stats {
    connected: AtomicBool,
    connections: AtomicU64,
    made: AtomicU64,
    withheld: AtomicU64,
    sent_again: AtomicU64,
    delivered: AtomicU64,
    delivered_bits: AtomicU64,
    faults: AtomicU64,
    events: AtomicU64,
    told: Mutex<Told>,
}

/// What is not a counter.
#[derive(Debug, Default)]
struct Told {
    status: Status,
    notes: VecDeque<Note>,
}

/// Most notes that wait to be taken; then the oldest are forgotten.
const MAX_NOTES: usize = 4096;

/// Something that happened at a half.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Note {
    /// When, in simulated seconds.
    pub at_s: f64,
    /// What.
    pub what: NoteKind,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NoteKind {
    /// A fault of a block, by the plan.
    Fault {
        /// The block's number.
        number: u64,
        /// Name of the fault, as in the plan.
        name: &'static str,
    },
    /// An event began.
    Event {
        /// Name of the event, as in the plan.
        name: &'static str,
    },
}

/// [`Stats`] at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Someone listens.
    pub connected: bool,
    /// Times that someone began to listen.
    pub connections: u64,
    /// Blocks made and handed to the transport.
    pub made: u64,
    /// Blocks that this half does not deliver, by the plan of faults.
    pub withheld: u64,
    /// Blocks handed to the transport again.
    pub sent_again: u64,
    /// Blocks that arrived: written files, or acknowledged as durable.
    pub delivered: u64,
    /// Key bits in these.
    pub delivered_bits: u64,
    /// Faults of blocks so far.
    pub faults: u64,
    /// Events so far.
    pub events: u64,
    /// What the module says of itself.
    pub status: Status,
}

impl Stats {
    /// The counters now; each is exact, together they may be of slightly different moments.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let told = self.told();
        Snapshot {
            connected: self.connected.load(Ordering::Relaxed),
            connections: get(&self.connections),
            made: get(&self.made),
            withheld: get(&self.withheld),
            sent_again: get(&self.sent_again),
            delivered: get(&self.delivered),
            delivered_bits: get(&self.delivered_bits),
            faults: get(&self.faults),
            events: get(&self.events),
            status: told.status.clone(),
        }
    }

    /// What happened since the last call.
    #[must_use]
    pub fn take_notes(&self) -> Vec<Note> {
        self.told().notes.drain(..).collect()
    }

    pub(crate) fn add_note(&self, note: Note) {
        let counter = match note.what {
            NoteKind::Fault { .. } => &self.faults,
            NoteKind::Event { .. } => &self.events,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        let mut told = self.told();
        if told.notes.len() == MAX_NOTES {
            told.notes.pop_front();
        }
        told.notes.push_back(note);
    }

    pub(crate) fn set_status(&self, status: Status) {
        self.told().status = status;
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        // Nothing panics while it is held, and nothing in it could be half done.
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_connected(&self, connected: bool) {
        let before = self.connected.swap(connected, Ordering::Relaxed);
        if connected && !before {
            self.connections.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn add_made(&self) {
        self.made.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_withheld(&self) {
        self.withheld.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_sent_again(&self, blocks: u64) {
        self.sent_again.fetch_add(blocks, Ordering::Relaxed);
    }

    pub(crate) fn add_delivered(&self, key_bits: u32) {
        self.delivered.fetch_add(1, Ordering::Relaxed);
        self.delivered_bits
            .fetch_add(u64::from(key_bits), Ordering::Relaxed);
    }
}
