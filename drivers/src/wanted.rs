//! Hand-overs in which one end pulls and the other fetches by ID.

use std::collections::{BTreeSet, VecDeque};

use qkd_keyfile::QkdKeyId;
use serde::Deserialize;

use crate::event::Event;

/// Which end of a module pair this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Asks for new keys.
    Pull,
    /// Asks for the keys that the other end has pulled.
    Fetch,
}

/// Keys that the other end has pulled and this end has yet to fetch.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    queue: VecDeque<(QkdKeyId, u32)>,
    /// Everything in the queue, asked for now, or done with lately.
    known: BTreeSet<QkdKeyId>,
    done: VecDeque<QkdKeyId>,
    /// How often those were asked for that are asked for now.
    tries: u32,
}

impl Wanted {
    pub(crate) fn add(&mut self, ids: &[QkdKeyId]) {
        for id in ids {
            // The other end says again what it still waits for, so what finds no room is not lost.
            if self.queue.len() < MAX_WANTED && self.known.insert(id.clone()) {
                self.queue.push_back((id.clone(), 0));
            }
        }
    }

    /// New ones together; one that was refused alone, so that it does not drag others along.
    pub(crate) fn next(&mut self, most: usize) -> Vec<QkdKeyId> {
        let Some((first, tries)) = self.queue.pop_front() else {
            return Vec::new();
        };
        self.tries = tries;
        let mut ids = vec![first];
        while tries == 0
            && ids.len() < most
            && self.queue.front().is_some_and(|(_, tries)| *tries == 0)
            && let Some((id, _)) = self.queue.pop_front()
        {
            ids.push(id);
        }
        ids
    }

    /// The key manager did not give these: perhaps not yet.
    pub(crate) fn failed(
        &mut self,
        ids: impl Iterator<Item = QkdKeyId>,
        events: &mut VecDeque<Event>,
    ) {
        let tries = self.tries + 1;
        for id in ids {
            if tries >= MAX_TRIES {
                self.done(id.clone());
                events.push_back(Event::Empty { id });
            } else {
                self.queue.push_back((id, tries));
            }
        }
    }

    /// Came, or is given up. The other end may name it again before it hears of that.
    pub(crate) fn done(&mut self, id: QkdKeyId) {
        self.done.push_back(id);
        if self.done.len() > MAX_DONE
            && let Some(oldest) = self.done.pop_front()
        {
            self.known.remove(&oldest);
        }
    }

    /// The key manager was not reached.
    pub(crate) fn again(&mut self, ids: Vec<QkdKeyId>) {
        for id in ids.into_iter().rev() {
            self.queue.push_front((id, self.tries));
        }
    }
}

/// Keys that wait to be fetched.
const MAX_WANTED: usize = 8192;

/// Keys done with that are remembered.
const MAX_DONE: usize = 4096;

/// After so many refusals a key is given up.
const MAX_TRIES: u32 = 5;
