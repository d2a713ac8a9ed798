//! The side that accepts: the node with the greater ID.

use std::{collections::HashMap, io, net::SocketAddr, sync::Arc, time::Duration};

use qkd_keyfile::NodeId;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::{JoinError, JoinSet},
    time::{Instant, sleep},
};

use super::{
    ALPN, LinkTiming,
    connection::{Link, Stream, greet},
    outbox::SharedCounters,
};
use crate::{
    Identity,
    tls::{self, HandshakeError, Reloadable},
};

/// Handshakes at once; whoever comes then waits in the listener's queue.
const HANDSHAKES: usize = 64;
/// Strangers at the door are logged this often at most; all are counted.
const LOG_EVERY: Duration = Duration::from_secs(1);
/// Wait when the system gives no further connection (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(super) struct Acceptor {
    pub(super) credentials: Arc<Reloadable>,
    pub(super) timing: LinkTiming,
    /// Where the connections of each peer go.
    pub(super) newcomers: HashMap<NodeId, mpsc::Sender<Stream>>,
    pub(super) counters: SharedCounters,
}

/// Why an incoming connection was turned away.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("the peer did not greet: {0}")]
    Greeting(#[source] io::Error),
    #[error("{0} may not connect here")]
    NotAPeer(Identity),
    #[error("{0} connects faster than its connections can be taken")]
    TooFast(NodeId),
}

impl Acceptor {
    pub(super) async fn run(self, listener: TcpListener) {
        let this = Arc::new(self);
        let mut handshakes = JoinSet::new();
        let mut logged: Option<Instant> = None;
        loop {
            tokio::select! {
                accepted = listener.accept(), if handshakes.len() < HANDSHAKES => match accepted {
                    Ok((tcp, from)) => {
                        let this = this.clone();
                        handshakes.spawn(async move { (from, this.admit(tcp).await) });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept connections");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(done) = handshakes.join_next() => this.note(done, &mut logged),
            }
        }
    }

    async fn admit(&self, tcp: TcpStream) -> Result<(), Refusal> {
        let config = self.credentials.current().server_config(&[ALPN]);
        let (stream, identity) = tls::accept(tcp, config, self.timing.handshake_within).await?;
        let Identity::Node(peer) = &identity else {
            return Err(Refusal::NotAPeer(identity));
        };
        let Some(newcomers) = self.newcomers.get(peer) else {
            return Err(Refusal::NotAPeer(identity));
        };
        let mut stream = stream.into();
        greet(&mut stream, self.timing)
            .await
            .map_err(Refusal::Greeting)?;
        newcomers
            .try_send(stream)
            .map_err(|_| Refusal::TooFast(peer.clone()))
    }

    fn note(
        &self,
        done: Result<(SocketAddr, Result<(), Refusal>), JoinError>,
        logged: &mut Option<Instant>,
    ) {
        let Ok((from, Err(refusal))) = done else {
            return;
        };
        self.counters.add(|counters| match refusal {
            Refusal::Handshake(_) | Refusal::Greeting(_) => &mut counters.failed_handshakes,
            Refusal::NotAPeer(_) | Refusal::TooFast(_) => &mut counters.refused,
        });
        if logged.is_none_or(|at| at.elapsed() >= LOG_EVERY) {
            *logged = Some(Instant::now());
            tracing::warn!(%from, %refusal, "connection refused");
        }
    }
}

/// Runs the connections of one peer, one at a time: a newer one replaces the one that stands.
pub(super) async fn serve(link: Link, mut incoming: mpsc::Receiver<Stream>) {
    let mut waiting = None;
    loop {
        let stream = match waiting.take() {
            Some(stream) => stream,
            None => match incoming.recv().await {
                Some(stream) => stream,
                None => return,
            },
        };
        let replaced = async {
            match incoming.recv().await {
                Some(newcomer) => newcomer,
                None => std::future::pending().await,
            }
        };
        waiting = link.run(stream, replaced).await;
    }
}
