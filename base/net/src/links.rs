//! One TLS connection to every configured peer node, kept up: the carrier of Kx.
//!
//! Of two nodes, the one with the smaller ID dials and the other accepts, so there is one connection
//! and no race. A connection is up when the first frame of the peer has come: in TLS 1.3 the dialling
//! side does not know earlier that its own certificate was accepted.
//!
//! An empty frame is a sign of life. Peers do not slow each other: each has its own queues and bounds;
//! a peer that does not take its messages loses its connection, and one that sends faster than we
//! consume is read no faster.

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use qkd_keyfile::NodeId;
use tokio::{
    net::TcpListener,
    sync::{Mutex, mpsc},
    task::JoinSet,
};

use crate::{FrameError, Limits, ServeLimits, serve, tls::Reloadable};
use outbox::Outbox;

mod accept;
mod connection;
mod dial;
mod frames;
mod outbox;

pub use outbox::{LinkCounters, PeerStatus, SendError};

/// The application protocol both sides must name, so that a Kx port talks to a Kx port only.
const ALPN: &[u8] = b"qkd-kx/1";
/// Events that wait for the consumer, of all peers together. The channel serves waiting peers in
/// turn, so a talkative peer delays another by this many events at most.
const WAITING_EVENTS: usize = 32;

/// What a node needs to keep its connections.
#[derive(Debug)]
pub struct LinksConfig {
    /// This node; must be the identity in its certificate.
    pub me: NodeId,
    /// Where the nodes with smaller IDs dial in; `None` if there are none.
    pub listen: Option<TcpListener>,
    /// The nodes to stay connected with.
    pub peers: Vec<Peer>,
    /// Our certificates; a reload counts from the next connection on.
    pub credentials: Arc<Reloadable>,
    /// Bounds and times.
    pub timing: LinkTiming,
    /// Spreads the reconnects of different nodes; a random number is best.
    pub seed: u64,
}

/// A node to stay connected with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The node's ID, which its certificate must name.
    pub id: NodeId,
    /// `host:port`; only used for peers with a greater ID than ours, the others dial us.
    pub address: String,
}

/// Bounds and times of links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkTiming {
    /// Longest message, in bytes.
    pub max_message_bytes: u32,
    /// Bytes that may wait for one peer before its connection is closed.
    pub max_queue_bytes: usize,
    /// For TCP, TLS and the peer's first frame, each.
    pub handshake_within: Duration,
    /// Longest silence of our own.
    pub ping_every: Duration,
    /// Longest silence of the peer; several times its `ping_every`.
    pub dead_after: Duration,
    /// First wait before dialling again; doubles up to `retry_at_most`.
    pub retry_after: Duration,
    /// Longest wait before dialling again.
    pub retry_at_most: Duration,
}

impl Default for LinkTiming {
    fn default() -> Self {
        Self {
            max_message_bytes: 1 << 20,
            max_queue_bytes: 16 << 20,
            handshake_within: Duration::from_secs(5),
            ping_every: Duration::from_secs(2),
            dead_after: Duration::from_secs(8),
            retry_after: Duration::from_millis(100),
            retry_at_most: Duration::from_secs(5),
        }
    }
}

impl LinkTiming {
    /// The usual bounds, with another longest silence of the peer; our own is a quarter of it.
    #[must_use]
    pub fn dead_after(dead_after: Duration) -> Self {
        Self {
            ping_every: dead_after / 4,
            dead_after,
            ..Self::default()
        }
    }

    fn framing(self) -> crate::Framing {
        crate::Framing::Length {
            max_bytes: self.max_message_bytes,
        }
    }

    fn limits(self) -> Limits {
        Limits {
            idle_within: Some(self.dead_after),
            ..Limits::default()
        }
    }
}

/// What happens on the links. Of one peer, events come in order: `Up`, its messages, `Down`.
pub enum LinkEvent {
    /// A connection stands.
    Up {
        /// The node at its other end.
        peer: NodeId,
        /// Number of this connection among those with this peer, from 1.
        connection: u64,
    },
    /// A connection has ended. What was queued for it is lost.
    Down {
        /// The node at its other end.
        peer: NodeId,
        /// Which connection.
        connection: u64,
        /// Why it ended.
        reason: DownReason,
    },
    /// A message came, not empty.
    Message {
        /// Who sent it.
        peer: NodeId,
        /// On which connection.
        connection: u64,
        /// The message.
        bytes: Vec<u8>,
    },
}

impl fmt::Debug for LinkEvent {
    /// Lengths of messages, never their bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Up { peer, connection } => write!(f, "Up({peer}, {connection})"),
            Self::Down {
                peer,
                connection,
                reason,
            } => {
                write!(f, "Down({peer}, {connection}, {reason})")
            }
            Self::Message {
                peer,
                connection,
                bytes,
            } => {
                write!(f, "Message({peer}, {connection}, {} bytes)", bytes.len())
            }
        }
    }
}

/// Why a connection has ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DownReason {
    /// The peer closed it.
    #[error("closed by the peer")]
    Closed,
    /// Reading failed, or the peer was silent, or it sent too long a message.
    #[error(transparent)]
    Read(FrameError),
    /// Writing failed.
    #[error("writing: {0}")]
    Write(#[source] std::io::Error),
    /// The peer did not take what was queued for it.
    #[error("the peer is too slow, its queue ran over")]
    Slow,
    /// Certificates or revocation lists were read again, and the peer's is not accepted any more.
    #[error("the peer's certificate is not accepted any more")]
    Refused,
    /// The peer has made a newer connection.
    #[error("replaced by a newer connection of the same peer")]
    Replaced,
}

/// Why links cannot be started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinksError {
    /// The certificate is not this node's.
    #[error("the certificate is not that of node {me}")]
    NotMe {
        /// This node.
        me: NodeId,
    },
    /// A peer is this node itself, or is listed twice.
    #[error("peer {peer} is this node itself or is listed twice")]
    Twice {
        /// The peer.
        peer: NodeId,
    },
    /// A peer with a smaller ID would dial us, but there is no listener.
    #[error("peer {peer} dials this node, which does not listen")]
    NotListening {
        /// The peer.
        peer: NodeId,
    },
}

/// Starts links; see [`Links::start`].
#[derive(Debug)]
pub struct Links;

impl Links {
    /// Starts to dial and to accept, on the current tokio runtime.
    ///
    /// While the receiver is not read, peers are not read either; when it is dropped, messages are
    /// thrown away, so drop the handle too.
    ///
    /// # Errors
    ///
    /// [`LinksError`]: the configuration makes no sense; nothing was started.
    pub fn start(
        config: LinksConfig,
    ) -> Result<(LinksHandle, mpsc::Receiver<LinkEvent>), LinksError> {
        check(&config)?;
        let LinksConfig {
            me,
            listen,
            peers,
            credentials,
            timing,
            seed,
        } = config;
        let (events, receiver) = mpsc::channel(WAITING_EVENTS);
        let counters = outbox::SharedCounters::default();
        let mut tasks = JoinSet::new();
        let mut outboxes = HashMap::new();
        let mut newcomers = HashMap::new();
        for peer in peers {
            let outbox = Arc::new(Outbox::new(peer.id.clone(), timing, counters.clone()));
            outboxes.insert(peer.id.clone(), outbox.clone());
            let link = connection::Link {
                outbox,
                events: events.clone(),
                credentials: credentials.clone(),
            };
            if me < peer.id {
                let dialer = dial::Dialer::new(peer, credentials.clone(), timing, seed);
                tasks.spawn(dialer.run(link));
            } else {
                let (sender, incoming) = mpsc::channel(1);
                newcomers.insert(peer.id, sender);
                tasks.spawn(accept::take_turns(link, incoming));
            }
        }
        if let Some(listener) = listen {
            let limits = ServeLimits {
                handshake_within: timing.handshake_within,
                ..ServeLimits::default()
            };
            let door = Arc::new(accept::Door {
                timing,
                newcomers,
                counters: counters.clone(),
            });
            tasks.spawn(async move { serve(listener, credentials, &[ALPN], limits, door).await });
        }
        let inner = Inner {
            outboxes,
            counters,
            tasks: Mutex::new(tasks),
        };
        Ok((LinksHandle(Arc::new(inner)), receiver))
    }
}

fn check(config: &LinksConfig) -> Result<(), LinksError> {
    let me = &config.me;
    let credentials = config.credentials.current();
    if credentials.identity() != Ok(&crate::Identity::Node(me.clone())) {
        return Err(LinksError::NotMe { me: me.clone() });
    }
    for (i, Peer { id, .. }) in config.peers.iter().enumerate() {
        let peer = id.clone();
        if id == me || config.peers[..i].iter().any(|earlier| earlier.id == *id) {
            return Err(LinksError::Twice { peer });
        }
        if id < me && config.listen.is_none() {
            return Err(LinksError::NotListening { peer });
        }
    }
    Ok(())
}

/// Sends on the links. When the last clone is dropped, all connections close.
#[derive(Debug, Clone)]
pub struct LinksHandle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    outboxes: HashMap<NodeId, Arc<Outbox>>,
    counters: outbox::SharedCounters,
    tasks: Mutex<JoinSet<()>>,
}

impl LinksHandle {
    /// Queues a message for `peer` on `connection`, the one that [`LinkEvent::Up`] told. Never waits.
    ///
    /// A message meant for a connection that has gone is not sent on the next one, so the first
    /// message that a peer gets on a connection is the first that was sent on it.
    ///
    /// # Errors
    ///
    /// [`SendError`]: the message was not queued.
    pub fn send(
        &self,
        peer: &NodeId,
        connection: u64,
        message: impl Into<Bytes>,
    ) -> Result<(), SendError> {
        let outbox = self.0.outboxes.get(peer).ok_or(SendError::UnknownPeer)?;
        outbox.push(connection, message.into())
    }

    /// The state of every peer's link, sorted by ID.
    #[must_use]
    pub fn status(&self) -> Vec<PeerStatus> {
        let mut all: Vec<PeerStatus> = self.0.outboxes.values().map(|o| o.status()).collect();
        all.sort_by(|a, b| a.peer.cmp(&b.peer));
        all
    }

    /// What went wrong since the start, counted.
    #[must_use]
    pub fn counters(&self) -> LinkCounters {
        self.0.counters.get()
    }

    /// Closes everything and waits until it is closed. What is queued is lost; the receiver of events
    /// ends without further `Down`s.
    pub async fn shutdown(&self) {
        self.0.tasks.lock().await.shutdown().await;
        for outbox in self.0.outboxes.values() {
            outbox.close();
        }
    }
}
