//! From drivers to the pipeline: one task per module pair.
//!
//! A module has credit for a fixed number of key blocks; a block gives its credit back when it is
//! settled. So two modules of different speed wait for each other. Blocks that nobody settles do not
//! hold a module up for long, or one lost block at either end would stop both: after a moment without
//! progress it gets more credit, and the oldest blocks that wait are dropped in the pipeline, counted
//! and told to the peer. Only a full store makes a module wait for good.

mod credit;
mod reopening;
mod report;
mod trust;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use qkd_drivers::{DriverConfig, Event, KeyBlock, KeySource, Metric, Openers, Value, next_event};
use qkd_keyfile::{ModulePairId, QkdKeyId, QkdKeyName};
use qkd_kma::Settlement;
use qkd_pipeline::{Descriptor, PushError, Pusher};
use qkd_secmem::{KeyBuf, Pool};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until},
};

use self::{credit::Credit, reopening::Backoff, trust::Change};
use super::{naming::Naming, until_stop};

pub(crate) use reopening::{Closed, fits_key_memory};
pub use report::{AlarmReport, MetricReport, ModuleReport};
pub(crate) use trust::Trust;

/// How long blocks that nobody settles hold a module up.
const STALLED_AFTER: Duration = Duration::from_secs(1);

/// Pause before something that is full is tried again.
const PAUSE: Duration = Duration::from_millis(2);

/// A module and what its blocks go through.
pub(crate) struct Intake {
    pub(crate) module_pair: ModulePairId,
    /// [`Closed`] where it is still to be opened.
    pub(crate) source: Box<dyn KeySource>,
    pub(crate) is_open: bool,
    pub(crate) driver: DriverConfig,
    pub(crate) openers: Openers,
    pub(crate) pool: Pool,
    /// How much key memory this module's blocks may take while they wait, in bytes; changes with the
    /// number of modules.
    pub(crate) share_bytes: Arc<AtomicUsize>,
    pub(crate) pusher: Pusher,
    pub(crate) settled: mpsc::UnboundedReceiver<(QkdKeyName, Settlement)>,
    /// QKD-keys that the other end holds and this one lacks.
    pub(crate) wanted: mpsc::Receiver<Vec<QkdKeyId>>,
    /// Whether the store of the link is full.
    pub(crate) full: watch::Receiver<bool>,
    pub(crate) state: watch::Sender<ModuleReport>,
    pub(crate) naming: Naming,
    pub(crate) trust: Trust,
}

impl Intake {
    /// Reads the module until the node stops or is to read it no more. A driver that ends is started
    /// again.
    pub(crate) async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let mut backoff = Backoff::default();
        if !self.is_open && !self.reopen(None, &mut backoff, &mut shutdown).await {
            return;
        }
        let mut credit = self.fresh_credit();
        if !self.named(&mut credit, &mut shutdown).await {
            return;
        }
        let mut free = None;
        let mut progress = Instant::now();
        loop {
            let Some(mut buffer) = self.buffer(free.take(), &mut credit, &mut shutdown).await
            else {
                return;
            };
            let event = tokio::select! {
                () = until_stop(&mut shutdown) => return,
                Some((name, outcome)) = self.settled.recv() => {
                    self.settle(&name, outcome, &mut credit);
                    progress = Instant::now();
                    free = Some(buffer);
                    continue;
                }
                Some(ids) = self.wanted.recv() => {
                    self.source.request(&ids);
                    free = Some(buffer);
                    continue;
                }
                () = sleep_until(progress + STALLED_AFTER), if credit.is_spent() => {
                    if !*self.full.borrow() {
                        credit.forget();
                        self.source.grant(credit.top_up());
                    }
                    progress = Instant::now();
                    free = Some(buffer);
                    continue;
                }
                event = next_event(&mut *self.source, buffer.expose_mut()) => event,
            };
            match event {
                Ok(Event::Key(key)) => {
                    backoff.reset();
                    if !self.takes(&key) {
                        self.refuse(&key, &buffer, &mut credit);
                        free = Some(buffer);
                        continue;
                    }
                    let (descriptor, left) = self.key(key, buffer);
                    credit.used(descriptor.block.block_bytes());
                    free = left;
                    if !self.push(descriptor, &mut shutdown).await {
                        return;
                    }
                }
                Ok(event) => {
                    self.note(&event);
                    free = Some(buffer);
                    if let Event::Attached {
                        session: Some(session),
                        ..
                    } = event
                        && self.naming.attached(&self.module_pair, session).await
                        && !self.named(&mut credit, &mut shutdown).await
                    {
                        return;
                    }
                }
                Err(error) => {
                    if !self.reopen(Some(&error), &mut backoff, &mut shutdown).await {
                        return;
                    }
                    // The new source's blocks may be longer.
                    free = None;
                    credit = self.fresh_credit();
                    progress = Instant::now();
                }
            }
        }
    }

    /// Waits until it is agreed what QKD-keys are called; `false` if the node stops.
    async fn named(&mut self, credit: &mut Credit, shutdown: &mut watch::Receiver<bool>) -> bool {
        loop {
            tokio::select! {
                () = until_stop(shutdown) => return false,
                Some((name, outcome)) = self.settled.recv() => self.settle(&name, outcome, credit),
                () = self.naming.agreed() => return true,
            }
        }
    }

    /// Credit for a source that has delivered nothing yet, and the first of it granted.
    fn fresh_credit(&mut self) -> Credit {
        let share_bytes = self.share_bytes.load(Ordering::Relaxed);
        let mut credit = Credit::new(share_bytes, self.source.max_block_bytes());
        self.source.grant(credit.top_up());
        credit
    }

    /// A block to read into: the free one, or another as soon as key memory has one.
    async fn buffer(
        &mut self,
        free: Option<KeyBuf>,
        credit: &mut Credit,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Option<KeyBuf> {
        if free.is_some() {
            return free;
        }
        loop {
            if let Ok(buffer) = self.pool.take(self.source.max_block_bytes()) {
                return Some(buffer);
            }
            tokio::select! {
                () = until_stop(shutdown) => return None,
                Some((name, outcome)) = self.settled.recv() => self.settle(&name, outcome, credit),
                () = sleep(PAUSE) => {}
            }
        }
    }

    /// Whether a key block may become key: not while the module's own values say that it cannot be
    /// trusted, the block's QBER among them.
    fn takes(&mut self, key: &KeyBlock) -> bool {
        if let Some(ppm) = key.qber_ppm {
            let value = Value::QberPpm(ppm);
            let band = self.driver.limits().qber_band(ppm);
            self.measured(&Metric { value, band });
        }
        self.trust.is_given()
    }

    /// Sets a block aside at its origin. The matching node drops its own when this one does not come.
    fn refuse(&mut self, key: &KeyBlock, buffer: &KeyBuf, credit: &mut Credit) {
        credit.used(buffer.block_bytes());
        let id = &key.metadata.qkd_key_id;
        self.source.settle(id, qkd_drivers::Settlement::Quarantined);
        credit.settled(self.share_bytes.load(Ordering::Relaxed));
        self.source.grant(credit.top_up());
        self.state.send_modify(|state| {
            state.refused_blocks += 1;
            state.refused_bits += u64::from(key.key_bits);
        });
    }

    /// Takes a value that the module told.
    fn measured(&mut self, metric: &Metric) {
        let module_pair = &self.module_pair;
        let change = self.trust.told(metric.value.name(), metric.band);
        let refusing = self.trust.why();
        match change {
            Change::None => tracing::trace!(%module_pair, ?metric, "module"),
            Change::Lost => {
                tracing::error!(%module_pair, ?metric, values = ?refusing, "no key is taken from the module: its own values say that it cannot be trusted");
            }
            Change::Regained => {
                tracing::warn!(%module_pair, ?metric, "key is taken from the module again");
            }
        }
        self.state.send_modify(|state| {
            state.measured(metric);
            state.refusing = refusing;
        });
    }

    /// A descriptor of the key just read, and the buffer if it is free for the next.
    fn key(&mut self, key: KeyBlock, mut buffer: KeyBuf) -> (Descriptor, Option<KeyBuf>) {
        let len_bytes = key.len_bytes();
        self.state.send_modify(|state| {
            state.attached = true;
            state.blocks += 1;
            state.key_bits += u64::from(key.key_bits);
        });
        let id = key.metadata.qkd_key_id.clone();
        let name = self.naming.name(&self.module_pair, id);
        // A short key moves to a block of its size; one that fills its block stays.
        let small = (len_bytes * 4 <= buffer.len_bytes())
            .then(|| self.pool.copy_of(&buffer.expose()[..len_bytes]).ok())
            .flatten();
        let (block, left) = match small {
            Some(small) => (small, Some(buffer)),
            None => {
                buffer.truncate(len_bytes);
                (buffer, None)
            }
        };
        let descriptor = Descriptor {
            name,
            key_bits: key.key_bits,
            block,
            metadata: key.metadata,
        };
        (descriptor, left)
    }

    /// Hands a block on, however long the pipeline takes; `false` if the node stops.
    async fn push(
        &mut self,
        mut descriptor: Descriptor,
        shutdown: &mut watch::Receiver<bool>,
    ) -> bool {
        loop {
            descriptor = match self.pusher.push(descriptor) {
                Ok(()) => return true,
                Err(PushError::Stopped(_)) => return false,
                Err(PushError::Full(descriptor)) => *descriptor,
            };
            tokio::select! {
                () = until_stop(shutdown) => return false,
                () = sleep(PAUSE) => {}
            }
        }
    }

    fn settle(&mut self, name: &QkdKeyName, outcome: Settlement, credit: &mut Credit) {
        let outcome = match outcome {
            Settlement::Stored => qkd_drivers::Settlement::Stored,
            Settlement::Dropped => qkd_drivers::Settlement::Dropped,
            Settlement::Quarantined => qkd_drivers::Settlement::Quarantined,
        };
        if self.naming.is_of_session(name) {
            self.source.settle(&name.id, outcome);
        }
        credit.settled(self.share_bytes.load(Ordering::Relaxed));
        self.source.grant(credit.top_up());
    }

    fn note(&mut self, event: &Event) {
        let module_pair = &self.module_pair;
        match event {
            Event::Metric(metric) => return self.measured(metric),
            // Modules say these every second.
            Event::State(state) if self.state.borrow().is_in(*state) => {}
            Event::Alarm(alarm) if self.state.borrow().has(alarm) => {}
            Event::Alarm(_) | Event::Corrupt { .. } | Event::Gap { .. } => {
                tracing::warn!(%module_pair, ?event, "module");
            }
            _ => tracing::info!(%module_pair, ?event, "module"),
        }
        self.state.send_modify(|state| state.heard(event));
    }
}
