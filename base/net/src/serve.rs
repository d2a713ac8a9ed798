//! Accepts connections, a bounded number at a time.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::TcpListener,
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::{
    Identity,
    tls::{self, HandshakeError, Reloadable, ServerStream, Shown},
};

/// Failed handshakes are logged this often at most.
const LOG_EVERY: Duration = Duration::from_secs(1);
/// Wait when the system gives no further connection (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What to do with those who come.
pub trait Handler: Send + Sync + 'static {
    /// Talks to a client whose certificate is verified, until its connection ends. Whether that
    /// client may do anything is decided here.
    fn talk(
        &self,
        stream: ServerStream,
        client: Identity,
        from: SocketAddr,
    ) -> impl Future<Output = ()> + Send;

    /// Hears of a handshake that failed, to count it. Logging is done.
    fn failed(&self, _error: &HandshakeError) {}
}

/// Bounds of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServeLimits {
    /// Handshakes at once. Whoever comes then waits in the listener's queue.
    pub handshakes: usize,
    /// Connections at once, likewise.
    pub connections: usize,
    /// Time for a handshake.
    pub handshake_within: Duration,
}

impl Default for ServeLimits {
    fn default() -> Self {
        Self {
            handshakes: 64,
            connections: 1024,
            handshake_within: Duration::from_secs(5),
        }
    }
}

/// Accepts connections for ever. Dropping the future closes the listener and every connection.
pub async fn serve<H: Handler>(
    listener: TcpListener,
    credentials: Arc<Reloadable>,
    alpn: &[&[u8]],
    limits: ServeLimits,
    handler: Arc<H>,
) {
    let mut handshakes = JoinSet::new();
    let mut connections: JoinSet<()> = JoinSet::new();
    let mut logged: Option<Instant> = None;
    loop {
        let room = handshakes.len() < limits.handshakes
            && handshakes.len() + connections.len() < limits.connections;
        tokio::select! {
            accepted = listener.accept(), if room => match accepted {
                Ok((tcp, from)) => {
                    let config = credentials.current().server_config(alpn);
                    let within = limits.handshake_within;
                    handshakes.spawn(async move { (from, tls::accept(tcp, config, within).await) });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept connections");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(done) = handshakes.join_next() => match done {
                Ok((from, Ok((stream, client)))) => {
                    let handler = handler.clone();
                    let (credentials, shown) = (credentials.clone(), Shown::from(&stream));
                    connections.spawn(async move {
                        tokio::select! {
                            () = handler.talk(stream, client, from) => {}
                            () = credentials.until_refused(shown) => {
                                tracing::warn!(%from, "connection closed: its certificate is refused now");
                            }
                        }
                    });
                }
                Ok((from, Err(error))) => {
                    handler.failed(&error);
                    if logged.is_none_or(|at| at.elapsed() >= LOG_EVERY) {
                        logged = Some(Instant::now());
                        tracing::warn!(%from, %error, "connection refused");
                    }
                }
                Err(panic) => tracing::error!(%panic, "a handshake panicked"),
            },
            Some(done) = connections.join_next() => if let Err(panic) = done {
                tracing::error!(%panic, "a connection panicked");
            },
        }
    }
}
