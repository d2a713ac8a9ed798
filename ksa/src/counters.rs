//! What the listener has done so far, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counts of a listener. Share it with [`serve`](crate::serve()) and read it at any time.
        #[derive(Debug, Default)]
        pub struct Counters {
            $(pub(crate) $name: Counter,)*
        }

        /// A reading of [`Counters`]. Every figure counts from the start.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Counts {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// The figures now; each by itself, not all at one instant.
            #[must_use]
            pub fn read(&self) -> Counts {
                Counts { $($name: self.$name.get(),)* }
            }
        }
    };
}

counters! {
    /// Connections accepted, whatever became of them.
    connections,
    /// Connections closed at once because too many were open, over all or of one application.
    connections_over_limit,
    /// Connections that the system failed to hand over.
    accept_errors,
    /// Handshakes that came to nothing: no certificate, not ours, too slow, names no application.
    handshakes_failed,
    /// Connections that ended in an error: head too slow or malformed, peer gone, peer not reading.
    connections_failed,
    /// Requests answered with 200.
    answered,
    /// Requests refused for a fault of theirs (400, 404, 405).
    refused,
    /// Requests refused for lack of right (401).
    unauthorised,
    /// Requests that could not be met now (503).
    unavailable,
    /// Keys in answers.
    keys,
}

/// One count.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, more: u64) {
        // ORDERING: Relaxed; a counter of its own.
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        // ORDERING: Relaxed; a figure for the statistics.
        self.0.load(Ordering::Relaxed)
    }
}
