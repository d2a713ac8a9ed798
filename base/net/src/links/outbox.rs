//! What waits for one peer, and what is counted.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::{Buf, Bytes};
use qkd_keyfile::NodeId;
use tokio::sync::Notify;

use super::{LinkTiming, frames::Frames};

/// Bytes that are gathered into one write.
const WRITE_BYTES: usize = 64 << 10;
/// What a queued message costs beyond its bytes, so that many short ones are bounded too.
const OVERHEAD_BYTES: usize = 64;

/// Why a message was not queued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// No such peer is configured.
    #[error("no such peer")]
    UnknownPeer,
    /// That connection does not stand (any more). Wait for the next `Up`.
    #[error("that connection does not stand any more")]
    NotConnected,
    /// Too many bytes wait for this peer; its connection is being closed.
    #[error("{queued_bytes} bytes wait for a peer that does not take them")]
    QueueFull {
        /// Bytes that waited, this message not counted.
        queued_bytes: usize,
    },
    /// The message is empty, which would be a sign of life, or too long. A mistake of the caller's.
    #[error("message of {bytes} bytes, 1 to {max_bytes} can be sent")]
    Length {
        /// Length of the message, in bytes.
        bytes: usize,
        /// Longest message, in bytes.
        max_bytes: u32,
    },
}

/// The state of one peer's link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStatus {
    /// The peer.
    pub peer: NodeId,
    /// Number of the connection that stands, if one does.
    pub connection: Option<u64>,
    /// Connections so far.
    pub connections: u64,
    /// Bytes that wait for the peer, with what each message costs beside its bytes.
    pub queued_bytes: usize,
    /// Messages given to the stream.
    pub sent_messages: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Messages that came.
    pub received_messages: u64,
    /// Their bytes.
    pub received_bytes: u64,
}

/// What went wrong, of all peers together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// Incoming connections that were no TLS, had no certificate of the authority, or were too slow.
    pub failed_handshakes: u64,
    /// Incoming connections of somebody who may not connect here, and connections closed because the
    /// certificate is not accepted any more.
    pub refused: u64,
    /// Dials that came to nothing.
    pub failed_dials: u64,
    /// Connections that the peer closed or that failed.
    pub lost: u64,
    /// Connections closed because the peer was silent.
    pub silent: u64,
    /// Connections closed because the peer did not take its messages.
    pub slow: u64,
    /// Connections closed because of a message that was too long.
    pub oversize: u64,
    /// Connections closed because the peer made a newer one.
    pub replaced: u64,
}

/// Counters that every task of the links adds to.
#[derive(Debug, Clone, Default)]
pub(super) struct SharedCounters(Arc<Mutex<LinkCounters>>);

impl SharedCounters {
    pub(super) fn get(&self) -> LinkCounters {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, to: impl FnOnce(&mut LinkCounters) -> &mut u64) {
        *to(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner)) += 1;
    }
}

/// Messages on their way to one peer. Belongs to one connection at a time.
#[derive(Debug)]
pub(super) struct Outbox {
    pub(super) peer: NodeId,
    pub(super) timing: LinkTiming,
    pub(super) counters: SharedCounters,
    state: Mutex<State>,
    /// Something was queued. One waiter: the connection's writer.
    queued: Notify,
    /// The queue ran over. One waiter: the connection.
    ran_over: Notify,
}

#[derive(Debug)]
struct State {
    messages: VecDeque<Bytes>,
    /// Bytes that the writer has taken and not yet written; part of `queued_bytes`.
    writing_bytes: usize,
    ran_over: bool,
    status: PeerStatus,
}

impl Outbox {
    pub(super) fn new(peer: NodeId, timing: LinkTiming, counters: SharedCounters) -> Self {
        let status = PeerStatus {
            peer: peer.clone(),
            connection: None,
            connections: 0,
            queued_bytes: 0,
            sent_messages: 0,
            sent_bytes: 0,
            received_messages: 0,
            received_bytes: 0,
        };
        Self {
            peer,
            timing,
            counters,
            state: Mutex::new(State {
                messages: VecDeque::new(),
                writing_bytes: 0,
                ran_over: false,
                status,
            }),
            queued: Notify::new(),
            ran_over: Notify::new(),
        }
    }

    /// Begins a new connection, and tells its number.
    pub(super) fn open(&self) -> u64 {
        let mut state = self.lock();
        state.clear();
        state.status.connections += 1;
        let connection = state.status.connections;
        state.status.connection = Some(connection);
        connection
    }

    /// Ends the connection; what waits is dropped.
    pub(super) fn close(&self) {
        self.lock().clear();
    }

    pub(super) fn push(&self, connection: u64, message: Bytes) -> Result<(), SendError> {
        let max_bytes = self.timing.max_message_bytes;
        let bytes = message.len();
        if bytes == 0 || bytes > max_bytes as usize {
            return Err(SendError::Length { bytes, max_bytes });
        }
        let mut state = self.lock();
        if state.status.connection != Some(connection) || state.ran_over {
            return Err(SendError::NotConnected);
        }
        let queued_bytes = state.status.queued_bytes;
        if queued_bytes + bytes + OVERHEAD_BYTES > self.timing.max_queue_bytes {
            state.ran_over = true;
            self.ran_over.notify_one();
            return Err(SendError::QueueFull { queued_bytes });
        }
        state.status.queued_bytes += bytes + OVERHEAD_BYTES;
        state.messages.push_back(message);
        drop(state);
        self.queued.notify_one();
        Ok(())
    }

    /// Waits for messages and puts about [`WRITE_BYTES`] of them, framed, into `out`, which is empty.
    /// What was taken before counts as written now.
    pub(super) async fn take(&self, out: &mut Frames) {
        loop {
            {
                let mut state = self.lock();
                state.status.queued_bytes -= std::mem::take(&mut state.writing_bytes);
                while out.remaining() < WRITE_BYTES {
                    let Some(message) = state.messages.pop_front() else {
                        break;
                    };
                    state.writing_bytes += message.len() + OVERHEAD_BYTES;
                    state.status.sent_messages += 1;
                    state.status.sent_bytes += message.len() as u64;
                    // `push` has checked the length.
                    let _ = out.push(self.timing.framing(), message);
                }
            }
            if out.has_remaining() {
                return;
            }
            self.queued.notified().await;
        }
    }

    /// Waits until the queue has run over.
    pub(super) async fn overrun(&self) {
        while !self.lock().ran_over {
            self.ran_over.notified().await;
        }
    }

    pub(super) fn received(&self, bytes: usize) {
        let mut state = self.lock();
        state.status.received_messages += 1;
        state.status.received_bytes += bytes as u64;
    }

    pub(super) fn status(&self) -> PeerStatus {
        self.lock().status.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn clear(&mut self) {
        self.messages.clear();
        self.writing_bytes = 0;
        self.ran_over = false;
        self.status.queued_bytes = 0;
        self.status.connection = None;
    }
}
