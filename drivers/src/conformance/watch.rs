//! A source under watch: whatever it does is held against what was offered, granted and settled.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::{Future, poll_fn},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use qkd_keyfile::QkdKeyId;
use tokio::time::{Instant, timeout};

use super::{Bench, Offered, ReadError, Settlement, Violation};
use crate::{
    event::{Event, KeyBlock},
    scratch::Scratch,
    source::{KeySource, next_event},
};

/// How long a source is watched that has nothing to do.
pub(super) const IDLE: Duration = Duration::from_millis(300);

/// How long nothing comes before it is taken that nothing will.
const QUIET: Duration = Duration::from_millis(150);

/// A timer for a retry or a rescan is all right; a loop is not.
const MAX_WAKES: u32 = 10;

/// What buffers hold before a poll.
const FILL: u8 = 0xee;

/// So much of a key is recognised where it should not be.
const KNOWN_BYTES: usize = 16;

pub(super) struct Watch {
    source: Box<dyn KeySource>,
    patience: Duration,
    hands_out_once: bool,
    max_block_bytes: usize,
    out: Scratch,
    offered: BTreeMap<QkdKeyId, Offered>,
    delivered: BTreeSet<QkdKeyId>,
    settled: BTreeSet<QkdKeyId>,
    /// Delivered before the module went away.
    may_repeat: BTreeSet<QkdKeyId>,
    /// What the module's going away has cost, by the driver's word; `None` where it may cost nothing.
    lost_blocks: Option<u64>,
    credit_blocks: u64,
}

impl Watch {
    pub(super) fn open(bench: &mut dyn Bench) -> Self {
        let source = bench.open();
        let max_block_bytes = source.max_block_bytes();
        Self {
            source,
            patience: bench.patience(),
            hands_out_once: bench.hands_out_once(),
            max_block_bytes,
            // Longer than it need be: nothing says that buffers are as short as can be.
            out: Scratch::new(max_block_bytes + 64),
            offered: BTreeMap::new(),
            delivered: BTreeSet::new(),
            settled: BTreeSet::new(),
            may_repeat: BTreeSet::new(),
            lost_blocks: None,
            credit_blocks: 0,
        }
    }

    /// Drops the source and opens another: what was not settled is expected again, or what was not
    /// handed out.
    pub(super) fn reopen(self, bench: &mut dyn Bench) -> Self {
        let Self {
            source,
            mut offered,
            delivered,
            mut settled,
            hands_out_once,
            ..
        } = self;
        drop(source);
        if hands_out_once {
            settled.extend(delivered);
        }
        let mut watch = Self::open(bench);
        offered.retain(|id, _| !settled.contains(id));
        watch.settled = settled;
        watch.expect(offered.into_values().collect());
        watch
    }

    pub(super) fn expect(&mut self, blocks: Vec<Offered>) {
        let ids: Vec<_> = blocks.iter().map(|block| block.id.clone()).collect();
        let entry = |block: Offered| (block.id.clone(), block);
        self.offered.extend(blocks.into_iter().map(entry));
        // The matching node says again what it waits for.
        self.source.request(&ids);
        self.source.request(&ids);
    }

    pub(super) fn grant(&mut self, blocks: u32) {
        self.credit_blocks += u64::from(blocks);
        self.source.grant(blocks);
    }

    pub(super) fn settle(&mut self, id: &QkdKeyId, outcome: Settlement) {
        if self.delivered.contains(id) {
            self.settled.insert(id.clone());
        }
        self.source.settle(id, outcome);
    }

    pub(super) fn was_replugged(&mut self) {
        if self.hands_out_once {
            self.lost_blocks = Some(0);
        } else {
            let unsettled = self.delivered.difference(&self.settled).cloned();
            self.may_repeat = unsettled.collect();
        }
    }

    /// Takes so many blocks, and whatever else comes in between.
    pub(super) async fn take(&mut self, blocks: usize) -> Result<Vec<QkdKeyId>, Violation> {
        self.take_in_glimpses(blocks, self.patience).await
    }

    /// The same, with a future that is dropped after `glimpse` and made anew.
    pub(super) async fn take_in_glimpses(
        &mut self,
        blocks: usize,
        glimpse: Duration,
    ) -> Result<Vec<QkdKeyId>, Violation> {
        let mut ids = Vec::new();
        let give_up = Instant::now() + self.patience;
        while ids.len() < blocks {
            if let Some(Event::Key(block)) = self.next(glimpse).await? {
                ids.push(block.metadata.qkd_key_id);
            }
            if Instant::now() > give_up {
                let missing = blocks - ids.len();
                return Err(Violation::Missing { missing });
            }
        }
        Ok(ids)
    }

    /// Takes until all that was offered has come, or been told as lost where it may be.
    pub(super) async fn take_the_rest(&mut self) -> Result<(), Violation> {
        let give_up = Instant::now() + self.patience;
        loop {
            let lost = self.lost_blocks.unwrap_or(0);
            let lost = usize::try_from(lost).unwrap_or(usize::MAX);
            let missing = (self.offered.len() - self.delivered.len()).saturating_sub(lost);
            if missing == 0 {
                return Ok(());
            }
            if Instant::now() > give_up {
                return Err(Violation::Missing { missing });
            }
            self.next(QUIET).await?;
        }
    }

    /// Polls until nothing has come for a while. No key may come that there is no credit for.
    pub(super) async fn idle(&mut self) -> Result<(), Violation> {
        while self.next(QUIET).await?.is_some() {}
        Ok(())
    }

    /// Settles all that was delivered, and leaves the module with nothing.
    pub(super) async fn finish(mut self) -> Result<(), Violation> {
        for id in self.delivered.clone() {
            self.settle(&id, Settlement::Stored);
        }
        self.idle().await?;
        let (before, after) = (self.max_block_bytes, self.source.max_block_bytes());
        if before != after {
            return Err(Violation::MaxBlockChanged { before, after });
        }
        Ok(())
    }

    /// Polls with buffers that cannot hold the longest block until that is refused.
    pub(super) async fn refuses_short_buffers(&mut self) -> Result<(), Violation> {
        let need = self.max_block_bytes;
        for have in [need - 1, 0] {
            let refused = Violation::ShortBuffer {
                have_bytes: have,
                need_bytes: need,
            };
            let give_up = Instant::now() + self.patience;
            loop {
                let next = next_event(&mut *self.source, &mut self.out[..have]);
                match timeout(self.patience, next).await {
                    Ok(Err(ReadError::BufferTooSmall {
                        have_bytes,
                        need_bytes,
                    })) if (have_bytes, need_bytes) == (have, need) => break,
                    Ok(Err(ReadError::Gone(error))) => return Err(Violation::Gone(error)),
                    Ok(Ok(event)) if !matches!(event, Event::Key(_)) => {}
                    _ => return Err(refused),
                }
                if Instant::now() > give_up {
                    return Err(refused);
                }
            }
        }
        Ok(())
    }

    pub(super) async fn sleeps(&mut self) -> Result<(), Violation> {
        let counter = Counter::over_this_task().await;
        let waker = Waker::from(Arc::clone(&counter));
        let mut next = pin!(next_event(&mut *self.source, &mut self.out));
        let watched = poll_fn(|_| next.as_mut().poll(&mut Context::from_waker(&waker)));
        match timeout(IDLE, watched).await {
            // Something came after all; the kit's other rules look at what.
            Ok(Ok(event)) => Err(Violation::Complaint { event }),
            Ok(Err(error)) => Err(unexpected(error)),
            Err(_) if counter.wakes() > MAX_WAKES => Err(Violation::Spins {
                wakes: counter.wakes(),
            }),
            Err(_) => Ok(()),
        }
    }

    pub(super) async fn is_woken_by_a_grant(&mut self) -> Result<(), Violation> {
        let counter = Counter::over_this_task().await;
        let waker = Waker::from(Arc::clone(&counter));
        let mut cx = Context::from_waker(&waker);
        while let Poll::Ready(event) = self.source.poll(&mut cx, &mut self.out) {
            if let Event::Key(block) = event.map_err(unexpected)? {
                let id = block.metadata.qkd_key_id;
                return Err(Violation::BeyondCredit { id });
            }
        }
        let before = counter.wakes();
        self.grant(1);
        let woken = async {
            while counter.wakes() == before {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(self.patience, woken)
            .await
            .map_err(|_| Violation::NotWoken)
    }

    pub(super) async fn is_gone_for_good(&mut self) -> Result<(), Violation> {
        let gone = async {
            while let Ok(event) = next_event(&mut *self.source, &mut self.out).await {
                if matches!(event, Event::Key(_)) {
                    return false;
                }
            }
            true
        };
        if timeout(self.patience, gone).await != Ok(true) {
            return Err(Violation::NotLatched);
        }
        for _ in 0..3 {
            self.source.grant(1);
            let polled = poll_fn(|cx| Poll::Ready(self.source.poll(cx, &mut self.out))).await;
            if !matches!(polled, Poll::Ready(Err(ReadError::Gone(_)))) {
                return Err(Violation::NotLatched);
            }
        }
        Ok(())
    }

    /// The next event, held against everything that is known; `None` if none comes in time.
    async fn next(&mut self, within: Duration) -> Result<Option<Event>, Violation> {
        self.out.fill(FILL);
        let next = next_event(&mut *self.source, &mut self.out);
        let event = match timeout(within, next).await {
            Ok(Ok(event)) => Some(event),
            Ok(Err(error)) => return Err(unexpected(error)),
            Err(_) => None,
        };
        match event {
            Some(Event::Key(block)) => {
                self.look_at_block(&block)?;
                Ok(Some(Event::Key(block)))
            }
            Some(event @ (Event::Gap { .. } | Event::Empty { .. }))
                if self.lost_blocks.is_some() =>
            {
                let blocks = match event {
                    Event::Gap { blocks } => blocks,
                    _ => 1,
                };
                self.lost_blocks = self.lost_blocks.map(|lost| lost.saturating_add(blocks));
                self.look_for_key()?;
                Ok(Some(event))
            }
            Some(event @ (Event::Gap { .. } | Event::Corrupt { .. })) => {
                Err(Violation::Complaint { event })
            }
            event => {
                self.look_for_key()?;
                Ok(event)
            }
        }
    }

    fn look_at_block(&mut self, block: &KeyBlock) -> Result<(), Violation> {
        let id = block.metadata.qkd_key_id.clone();
        if self.credit_blocks == 0 {
            return Err(Violation::BeyondCredit { id });
        }
        self.credit_blocks -= 1;
        if self.settled.contains(&id) {
            return Err(Violation::SettledCameAgain { id });
        }
        let Some(offered) = self.offered.get(&id) else {
            return Err(Violation::Unknown { id });
        };
        let may_repeat = self.may_repeat.remove(&id);
        if !self.delivered.insert(id.clone()) && !may_repeat {
            return Err(Violation::Repeated { id });
        }
        let (key, beyond) = self.out.split_at(block.len_bytes().min(self.out.len()));
        if block.key_bits != offered.key_bits || *key != offered.key[..] {
            return Err(Violation::Altered { id });
        }
        if block
            .metadata
            .key_bits
            .is_some_and(|bits| bits != block.key_bits)
        {
            return Err(Violation::Metadata { id });
        }
        if beyond.iter().any(|&byte| byte != FILL && byte != 0) {
            return Err(Violation::BeyondBlock { id });
        }
        Ok(())
    }

    /// Looks for the beginning of any offered key in a buffer that should hold none.
    fn look_for_key(&self) -> Result<(), Violation> {
        let starts: BTreeSet<_> = (self.offered.values())
            .filter_map(|block| block.key.get(..KNOWN_BYTES))
            .collect();
        if self
            .out
            .windows(KNOWN_BYTES)
            .any(|piece| starts.contains(piece))
        {
            return Err(Violation::LeftBehind);
        }
        Ok(())
    }
}

/// An error that nothing has given a reason for.
fn unexpected(error: ReadError) -> Violation {
    match error {
        ReadError::Gone(error) => Violation::Gone(error),
        ReadError::BufferTooSmall {
            have_bytes,
            need_bytes,
        } => Violation::ShortBuffer {
            have_bytes,
            need_bytes,
        },
    }
}

/// Counts how often a task is woken.
struct Counter {
    wakes: AtomicU32,
    inner: Waker,
}

impl Counter {
    async fn over_this_task() -> Arc<Self> {
        let inner = poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
        let wakes = AtomicU32::new(0);
        Arc::new(Self { wakes, inner })
    }

    fn wakes(&self) -> u32 {
        // ORDERING: Relaxed; the count stands by itself.
        self.wakes.load(Ordering::Relaxed)
    }
}

impl Wake for Counter {
    fn wake(self: Arc<Self>) {
        // ORDERING: Relaxed, as above.
        self.wakes.fetch_add(1, Ordering::Relaxed);
        self.inner.wake_by_ref();
    }
}
