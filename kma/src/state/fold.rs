//! What each record changes.

use super::State;
use crate::{
    record::{BurnReason, Record},
    used::UsedIds,
};

impl State {
    /// `None`: the record does not fit what came before it.
    pub(super) fn fold(&mut self, record: &Record) -> Option<()> {
        match record {
            Record::Boot { .. }
            | Record::Received { .. }
            | Record::Carried { .. }
            | Record::Quarantined { .. }
            | Record::History { .. } => Some(()),
            // The store puts the parts together before anything is folded.
            Record::Snapshot { .. } => None,
            Record::Schema { .. }
            | Record::Time { .. }
            | Record::ApplicationNamed { .. }
            | Record::Emptied
            | Record::PeerStore { .. }
            | Record::SessionBegun { .. }
            | Record::SessionAgreed { .. } => self.fold_node(record),
            Record::QkdKeysUsed { .. }
            | Record::Numbering { .. }
            | Record::ModulePairStopped { .. }
            | Record::ModulePairStarted { .. } => self.fold_module_pair(record),
            Record::Proposed { .. }
            | Record::Stored { .. }
            | Record::Described { .. }
            | Record::Confirmed { .. }
            | Record::Discarded { .. }
            | Record::Taken { .. }
            | Record::Followed { .. } => self.fold_segment(record),
            Record::Suspected { .. }
            | Record::Closed { .. }
            | Record::Preserved { .. }
            | Record::Deleted { .. } => self.fold_end(record),
            Record::Ceded { .. }
            | Record::Acquired { .. }
            | Record::CessionsAcknowledged { .. } => self.fold_ownership(record),
            Record::Bound { .. }
            | Record::BindingsAcknowledged { .. }
            | Record::BindingReceived { .. }
            | Record::Delivered { .. }
            | Record::Forgotten { .. } => self.fold_binding(record),
        }
    }

    /// This node, and the others.
    fn fold_node(&mut self, record: &Record) -> Option<()> {
        match record {
            Record::Schema { version } => self.schema = *version,
            Record::Time { unix, age_seconds } => {
                self.unix = *unix;
                self.age_seconds = self.age_seconds.max(*age_seconds);
            }
            Record::ApplicationNamed { application, name } => {
                self.names.insert(application.clone(), name.clone());
            }
            Record::Emptied => return self.emptied(),
            Record::PeerStore { peer, incarnation } => return self.peer_store(peer, *incarnation),
            Record::SessionBegun { peer, session } => {
                let peer = self.peers.entry(peer.clone()).or_default();
                peer.sessions.begun = Some(*session);
            }
            Record::SessionAgreed { peer, session } => {
                let sessions = &mut self.peers.get_mut(peer)?.sessions;
                sessions.agreed = sessions.begun.take_if(|begun| begun == session);
                sessions.agreed?;
            }
            _ => return None,
        }
        Some(())
    }

    /// What comes in of module pairs.
    fn fold_module_pair(&mut self, record: &Record) -> Option<()> {
        match record {
            Record::QkdKeysUsed {
                module_pair,
                generation,
                ids,
            } => {
                let numbering = self.numbering_mut(module_pair);
                if numbering.generation == *generation {
                    ids.iter().for_each(|id| numbering.used.insert(id));
                }
                Some(())
            }
            Record::Numbering {
                module_pair,
                generation,
                anew,
                session,
            } => {
                let numbering = self.numbering_mut(module_pair);
                if *generation > numbering.generation {
                    if *anew > numbering.generation {
                        numbering.used = UsedIds::default();
                    } else {
                        numbering.used.go_on();
                    }
                }
                let fits = *generation >= numbering.generation;
                (numbering.generation, numbering.anew) = (*generation, *anew);
                numbering.session = *session;
                fits.then_some(())
            }
            Record::ModulePairStopped {
                module_pair,
                reason,
            } => {
                self.stopped.insert(module_pair.clone(), *reason);
                Some(())
            }
            Record::ModulePairStarted { module_pair } => self.stopped.remove(module_pair).map(drop),
            _ => None,
        }
    }

    /// A segment from its proposal to the use of its last bit.
    fn fold_segment(&mut self, record: &Record) -> Option<()> {
        match record {
            Record::Proposed {
                stream, segment, ..
            } => {
                let stream = self.stream_mut(stream);
                stream.next_segment = stream.next_segment.max(segment.0.checked_add(1)?);
                stream.proposed.insert(*segment);
                Some(())
            }
            Record::Stored {
                stream,
                segment,
                body,
            } => {
                self.next_row = self.next_row.max(body.row.0.checked_add(1)?);
                let age = self.age_seconds;
                let stream = self.stream_mut(stream);
                stream.next_segment = stream.next_segment.max(segment.0.checked_add(1)?);
                stream.store(*segment, body, age);
                Some(())
            }
            Record::Described {
                stream,
                segment,
                relayed,
                hashes,
                ..
            } => {
                self.way(stream, *segment, relayed.as_deref());
                match hashes {
                    Some(hashes) => {
                        self.next_row = self.next_row.max(hashes.row.0.checked_add(1)?);
                        self.streams.get_mut(stream)?.describe(*segment, *hashes)
                    }
                    None => Some(()),
                }
            }
            Record::Confirmed { stream, segment } => {
                if let Some(ways) = self.ways.get_mut(stream) {
                    ways.remove(segment);
                }
                self.stream_mut(stream).confirmed(*segment)
            }
            Record::Discarded {
                stream,
                segment,
                reason,
            } => self.discarded(stream, *segment, *reason),
            Record::Taken {
                stream,
                span,
                purpose,
            } => self.stream_mut(stream).taken(*span, *purpose),
            Record::Followed {
                stream,
                span,
                purpose,
            } => self.stream_mut(stream).followed(*span, *purpose),
            _ => None,
        }
    }

    /// Segments that go from one end to the other.
    fn fold_ownership(&mut self, record: &Record) -> Option<()> {
        match record {
            Record::Ceded {
                to,
                sequence,
                stream,
                segment,
            } => {
                self.streams.get_mut(stream)?.cede(*segment)?;
                let peer = self.peers.entry(to.clone()).or_default();
                peer.cessions_sent = sequence.checked_add(1)?;
                peer.ceded.insert(*sequence, (stream.clone(), *segment));
            }
            Record::Acquired {
                from,
                sequence,
                stream,
                segment,
            } => {
                self.streams.get_mut(stream)?.acquire(*segment)?;
                let peer = self.peers.entry(from.clone()).or_default();
                peer.cessions_received = sequence.checked_add(1)?;
            }
            Record::CessionsAcknowledged { to, through } => {
                let peer = self.peers.get_mut(to)?;
                peer.ceded = peer.ceded.split_off(&through.checked_add(1)?);
            }
            _ => return None,
        }
        Some(())
    }

    /// The end of a segment, or of its row.
    fn fold_end(&mut self, record: &Record) -> Option<()> {
        match record {
            Record::Suspected { stream, segment } => self.suspected(stream, *segment),
            Record::Closed { stream, segment } => self.end(stream, *segment, BurnReason::Closed),
            Record::Preserved { stream, segment } => self.preserved(stream, *segment),
            Record::Deleted { row } => {
                self.preserved.remove(row)?;
                self.freed.push(*row);
                Some(())
            }
            _ => None,
        }
    }

    /// Keys for applications.
    fn fold_binding(&mut self, record: &Record) -> Option<()> {
        match record {
            Record::Bound {
                destination,
                sequence,
                binding,
            } => self.bound(destination, *sequence, binding),
            Record::BindingsAcknowledged {
                destination,
                through,
            } => self.bindings_acknowledged(destination, *through),
            Record::BindingReceived {
                source,
                sequence,
                binding,
            } => self.binding_received(source, *sequence, binding),
            Record::Delivered {
                source,
                key_id,
                application,
            } => self.delivered(source, *key_id, application),
            Record::Forgotten { source, key_id } => {
                self.forgotten_bindings += 1;
                self.done_with(source, *key_id)
            }
            _ => None,
        }
    }
}
