//! Protocol logic without sockets, clocks or threads.

use crate::env::{Mono, Now};

/// One end of a conversation: messages and times in, messages and time-outs out.
///
/// Whoever drives it (a loop over a socket, or a test with two ends, a fake clock and a lossy link)
/// calls [`receive`](Self::receive) for every whole message, [`handle_timeout`](Self::handle_timeout)
/// when the time of [`poll_timeout`](Self::poll_timeout) has come, and after either
/// [`poll_transmit`](Self::poll_transmit) until it returns `None`.
pub trait Protocol {
    /// Why the peer cannot be talked to any more; the driver closes the connection.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Takes one whole message from the peer.
    ///
    /// # Errors
    ///
    /// The message breaks the protocol beyond repair. It was not acted upon; close the connection.
    fn receive(&mut self, now: Now, message: &[u8]) -> Result<(), Self::Error>;

    /// The next message to send, if there is one.
    fn poll_transmit(&mut self, now: Now) -> Option<Vec<u8>>;

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called, if at all.
    fn poll_timeout(&self) -> Option<Mono>;

    /// Acts on the time that has passed.
    fn handle_timeout(&mut self, now: Now);
}
