//! The side that dials: the node with the smaller ID.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    io,
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use super::{
    ALPN, LinkTiming, Peer,
    connection::{Link, Stream, greet},
};
use crate::{
    Backoff,
    tls::{self, HandshakeError, Reloadable},
};

/// A connection that stood this long was a good one: the next dial does not wait longer for it.
const GOOD_AFTER: Duration = Duration::from_secs(1);

pub(super) struct Dialer {
    peer: Peer,
    credentials: Arc<Reloadable>,
    timing: LinkTiming,
    backoff: Backoff,
}

/// Why a dial came to nothing.
#[derive(Debug, thiserror::Error)]
enum DialError {
    #[error("connecting: {0}")]
    Tcp(#[source] io::Error),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("the peer did not greet: {0}")]
    Greeting(#[source] io::Error),
}

impl Dialer {
    pub(super) fn new(
        peer: Peer,
        credentials: Arc<Reloadable>,
        timing: LinkTiming,
        seed: u64,
    ) -> Self {
        let mut hasher = DefaultHasher::new();
        (seed, &peer.id).hash(&mut hasher);
        let backoff = Backoff::new(timing.retry_after, timing.retry_at_most, hasher.finish());
        Self {
            peer,
            credentials,
            timing,
            backoff,
        }
    }

    pub(super) async fn run(mut self, link: Link) {
        let mut last_error = String::new();
        loop {
            match self.dial().await {
                Ok(stream) => {
                    last_error.clear();
                    let since = Instant::now();
                    link.run(stream, std::future::pending()).await;
                    if since.elapsed() >= GOOD_AFTER {
                        self.backoff.reset();
                    }
                }
                Err(error) => {
                    link.outbox
                        .counters
                        .add(|counters| &mut counters.failed_dials);
                    let error = error.to_string();
                    // A peer that is away for a night fills no log.
                    if error != last_error {
                        tracing::warn!(peer = %self.peer.id, address = self.peer.address, error,
                            "cannot connect, trying on");
                        last_error = error;
                    }
                }
            }
            sleep(self.backoff.wait()).await;
        }
    }

    async fn dial(&self) -> Result<Stream, DialError> {
        let within = self.timing.handshake_within;
        let tcp = timeout(within, TcpStream::connect(&self.peer.address))
            .await
            .map_err(|elapsed| DialError::Tcp(elapsed.into()))?
            .map_err(DialError::Tcp)?;
        let config = self
            .credentials
            .current()
            .client_config(&self.peer.id, &[ALPN]);
        let mut stream = tls::connect(tcp, config, within).await?.into();
        greet(&mut stream, self.timing)
            .await
            .map_err(DialError::Greeting)?;
        Ok(stream)
    }
}
