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
use crate::tls::{self, HandshakeError, Reloadable};

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
        let backoff = Backoff::new(timing, hasher.finish());
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
            sleep(self.backoff.next()).await;
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

/// Waits that double, each shortened at random by up to half, so that nodes that lost the same peer
/// do not return to it all at once.
struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
    random: u64,
}

impl Backoff {
    fn new(timing: LinkTiming, seed: u64) -> Self {
        Self {
            first: timing.retry_after,
            longest: timing.retry_at_most,
            next: timing.retry_after,
            random: seed,
        }
    }

    fn reset(&mut self) {
        self.next = self.first;
    }

    fn next(&mut self) -> Duration {
        let wait = self.next;
        self.next = (wait * 2).min(self.longest);
        // Knuth's linear congruential generator; its high bits are good enough to spread dials.
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let shortened_per_mille = u32::try_from((self.random >> 32) % 501).unwrap_or(0);
        wait - wait / 1000 * shortened_per_mille
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_start_over() {
        let timing = LinkTiming::default();
        let mut backoff = Backoff::new(timing, 7);
        for expected_ms in [100, 200, 400, 800, 1600, 3200, 5000, 5000] {
            let wait = backoff.next();
            let longest = Duration::from_millis(expected_ms);
            assert!(
                wait >= longest / 2 && wait <= longest,
                "{wait:?} of {longest:?}"
            );
        }
        backoff.reset();
        assert!(backoff.next() <= timing.retry_after);
    }

    #[test]
    fn two_seeds_wait_differently() {
        let waits = |seed| {
            let mut backoff = Backoff::new(LinkTiming::default(), seed);
            [backoff.next(), backoff.next(), backoff.next()]
        };
        assert_ne!(waits(1), waits(2));
    }
}
