//! A driver that has ended is started again, and one that cannot be started is tried again.

use std::{
    error::Error,
    task::{Context, Poll},
    time::Duration,
};

use qkd_drivers::{Event, KeySource, OpenError, ReadError, Settlement};
use qkd_keyfile::QkdKeyId;
use qkd_secmem::MAX_BLOCK_BYTES;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::Intake;
use crate::node::until_stop;

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LAST: Duration = Duration::from_secs(5);

/// How long to wait before a driver is started again.
#[derive(Debug)]
pub(super) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(BACKOFF_FIRST)
    }
}

impl Backoff {
    /// The driver delivered key: what comes later is a new trouble.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (pause * 2).min(BACKOFF_LAST);
        pause
    }
}

/// A module that is not open.
#[derive(Debug)]
pub(crate) struct Closed;

impl KeySource for Closed {
    fn max_block_bytes(&self) -> usize {
        1
    }

    fn poll(&mut self, _: &mut Context<'_>, _: &mut [u8]) -> Poll<Result<Event, ReadError>> {
        let closed = std::io::ErrorKind::NotConnected.into();
        Poll::Ready(Err(ReadError::Gone(closed)))
    }

    fn grant(&mut self, _: u32) {}

    fn settle(&mut self, _: &QkdKeyId, _: Settlement) {}
}

impl Intake {
    /// Opens the module, for the first time or after its driver has `ended`, however often that takes;
    /// `false` if the node stops.
    ///
    /// What was not settled comes again then, and the pipeline knows it by its ID.
    pub(super) async fn reopen(
        &mut self,
        ended: Option<&ReadError>,
        backoff: &mut Backoff,
        shutdown: &mut watch::Receiver<bool>,
    ) -> bool {
        let module_pair = self.module_pair.clone();
        // Closed before it is opened: a port can be open once only.
        self.source = Box::new(Closed);
        let mut at = Instant::now();
        if let Some(ended) = ended {
            let why = told(ended);
            tracing::error!(%module_pair, why, "the module's driver ended; it is started again");
            self.state.send_modify(|state| {
                state.attached = false;
                state.state = None;
                state.restarts += 1;
                state.error = Some(why);
            });
            at += backoff.next();
        }
        loop {
            tokio::select! {
                () = until_stop(shutdown) => return false,
                // The source that these are for is gone: it will deliver them again.
                Some(_) = self.settled.recv() => continue,
                () = sleep_until(at) => {}
            }
            match self.open() {
                Ok(source) => {
                    tracing::info!(%module_pair, "the module's driver was started");
                    self.state.send_modify(|state| state.error = None);
                    self.source = source;
                    return true;
                }
                Err(why) => {
                    let is_news = self.state.borrow().error.as_ref() != Some(&why);
                    if is_news {
                        tracing::error!(%module_pair, why, "the module cannot be opened; it is tried again");
                    }
                    self.state.send_modify(|state| state.error = Some(why));
                }
            }
            at = Instant::now() + backoff.next();
        }
    }

    fn open(&self) -> Result<Box<dyn KeySource>, String> {
        let source = self
            .openers
            .open(&self.driver)
            .map_err(|error| told(&error))?;
        fits_key_memory(&*source).map_err(|error| told(&error))?;
        Ok(source)
    }
}

/// Blocks of key memory have a greatest length.
///
/// # Errors
///
/// The driver's blocks may be longer.
pub(crate) fn fits_key_memory(source: &dyn KeySource) -> Result<(), OpenError> {
    let max_bytes = source.max_block_bytes();
    if max_bytes <= MAX_BLOCK_BYTES {
        return Ok(());
    }
    Err(OpenError::Setting {
        setting: "max_block_bytes of the driver",
        value: u64::try_from(max_bytes).unwrap_or(u64::MAX),
        expected: "at most 262144, the longest block of key memory",
    })
}

/// An error with all that lies behind it.
fn told(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
