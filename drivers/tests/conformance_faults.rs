//! The conformance kit finds what it says it finds: a driver in memory, sound and with one fault each.
#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
    time::Duration,
};

use qkd_drivers::{
    Event, KeyBlock, KeySource, ReadError, Settlement,
    conformance::{Bench, Checked, Offered, Violation, check},
};
use qkd_keyfile::{QkdKeyId, metadata::QkdKeyMetadata};

const MAX_BLOCK_BYTES: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    NeedsNoCredit,
    AltersAKey,
    DeliversTwice,
    DeletesBeforeItIsSettled,
    DeletesNever,
    ForgetsSettlements,
    TakesShortBuffers,
    ConsumesForShortBuffers,
    WritesBeyondTheBlock,
    LeavesKeyBehind,
    LosesBlocksInDroppedFutures,
    Spins,
    IsNotWokenByGrants,
    InventsBlocks,
    Complains,
    IsGone,
    ComesBack,
    ChangesItsLongestBlock,
    MisstatesTheLength,
    /// Of a module that hands out once.
    TakesAheadOfCredit,
    HidesALoss,
}

#[derive(Default)]
struct Module {
    kept: BTreeMap<u64, Vec<u8>>,
    /// Settled since nothing was kept.
    settled: BTreeMap<u64, Vec<u8>>,
    ruined: bool,
    /// Lost in a replug, and not told yet.
    lost: u64,
    waker: Option<Waker>,
}

#[derive(Clone)]
struct Desk {
    module: Arc<Mutex<Module>>,
    fault: Fault,
    hands_out_once: bool,
    next: u64,
}

struct Source {
    desk: Desk,
    delivered: BTreeSet<u64>,
    /// No longer at the module.
    taken: BTreeMap<u64, Vec<u8>>,
    credit: u32,
    polls: u32,
}

impl Desk {
    fn new(fault: Fault) -> Self {
        let (module, next) = (Arc::default(), 1);
        Self {
            module,
            fault,
            hands_out_once: false,
            next,
        }
    }

    fn that_hands_out_once(fault: Fault) -> Self {
        Self {
            hands_out_once: true,
            ..Self::new(fault)
        }
    }

    fn module(&self) -> MutexGuard<'_, Module> {
        self.module.lock().unwrap()
    }

    fn wake(&self) {
        let waker = self.module().waker.take();
        waker.into_iter().for_each(Waker::wake);
    }
}

impl Bench for Desk {
    fn open(&mut self) -> Box<dyn KeySource> {
        if self.fault == Fault::ForgetsSettlements {
            let settled = std::mem::take(&mut self.module().settled);
            self.module().kept.extend(settled);
        }
        Box::new(Source {
            desk: self.clone(),
            delivered: BTreeSet::new(),
            taken: BTreeMap::new(),
            credit: 0,
            polls: 0,
        })
    }

    fn offer(&mut self, blocks: u32) -> Vec<Offered> {
        let offered = (0..blocks).map(|_| {
            let number = self.next;
            self.next += 1;
            let key: Vec<u8> = (0..32).map(|i| (number * 7 + i).to_le_bytes()[0]).collect();
            self.module().kept.insert(number, key.clone());
            Offered {
                id: number.to_string().parse().unwrap(),
                key_bits: 256,
                key,
            }
        });
        let offered = offered.collect();
        self.wake();
        offered
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(2)
    }

    fn hands_out_once(&self) -> bool {
        self.hands_out_once
    }

    /// A block is lost on the way.
    fn replug(&mut self) -> bool {
        if self.hands_out_once {
            let mut module = self.module();
            let lost = module.kept.pop_first();
            module.lost += u64::from(lost.is_some());
        }
        self.hands_out_once
    }

    fn ruin(&mut self) -> bool {
        self.module().ruined = true;
        self.wake();
        true
    }
}

impl Source {
    fn is(&self, fault: Fault) -> bool {
        self.desk.fault == fault
    }

    fn next_block(&self) -> Option<(u64, Vec<u8>)> {
        let module = self.desk.module();
        let mut waiting = self.taken.iter().chain(&module.kept);
        let (&number, key) = waiting.find(|(number, _)| !self.delivered.contains(number))?;
        Some((number, key.clone()))
    }

    fn deliver(&mut self, number: u64, key: &[u8], out: &mut [u8]) -> Event {
        out[..32].copy_from_slice(key);
        self.credit = self.credit.saturating_sub(1);
        if self.desk.hands_out_once {
            self.desk.module().kept.remove(&number);
        }
        if !self.is(Fault::DeliversTwice) || self.polls.is_multiple_of(2) {
            self.delivered.insert(number);
        }
        match self.desk.fault {
            Fault::AltersAKey if number == 3 => out[31] ^= 1,
            Fault::WritesBeyondTheBlock => out[32] = 1,
            Fault::DeletesBeforeItIsSettled => drop(self.desk.module().kept.remove(&number)),
            _ => {}
        }
        let invented = 1000 * u64::from(self.is(Fault::InventsBlocks));
        let id = (number + invented).to_string().parse().unwrap();
        let misstated = u32::from(self.is(Fault::MisstatesTheLength));
        Event::Key(KeyBlock {
            metadata: QkdKeyMetadata {
                key_bits: Some(256 - misstated),
                ..QkdKeyMetadata::new(id)
            },
            key_bits: 256,
            qber_ppm: None,
        })
    }

    /// What some faults do in place of what a driver should do.
    fn misbehave(&mut self, cx: &Context<'_>, out: &mut [u8]) -> Option<Poll<Event>> {
        match self.desk.fault {
            Fault::Spins => cx.waker().wake_by_ref(),
            Fault::Complains if self.polls == 3 => {
                return Some(Poll::Ready(Event::Gap { blocks: 1 }));
            }
            Fault::LeavesKeyBehind => {
                if let Some((_, key)) = self.next_block() {
                    out[..32].copy_from_slice(&key);
                }
            }
            Fault::LosesBlocksInDroppedFutures if self.polls.is_multiple_of(2) => {
                if let (Some((number, _)), 1..) = (self.next_block(), self.credit) {
                    self.delivered.insert(number);
                    cx.waker().wake_by_ref();
                    return Some(Poll::Pending);
                }
            }
            _ => {}
        }
        None
    }
}

impl KeySource for Source {
    fn max_block_bytes(&self) -> usize {
        let grown = self.is(Fault::ChangesItsLongestBlock) && self.polls > 3;
        MAX_BLOCK_BYTES + usize::from(grown)
    }

    fn poll(&mut self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<Result<Event, ReadError>> {
        self.polls += 1;
        let is_back = self.is(Fault::ComesBack) && self.polls.is_multiple_of(2);
        if self.desk.module().ruined && !is_back || self.is(Fault::IsGone) {
            let error = io::ErrorKind::NotConnected.into();
            return Poll::Ready(Err(ReadError::Gone(error)));
        }
        let (have_bytes, need_bytes) = (out.len(), MAX_BLOCK_BYTES);
        let is_taken = self.is(Fault::TakesShortBuffers) && have_bytes >= 32;
        if have_bytes < need_bytes && !is_taken {
            if let (Fault::ConsumesForShortBuffers, Some((number, _))) =
                (self.desk.fault, self.next_block())
            {
                self.delivered.insert(number);
            }
            return Poll::Ready(Err(ReadError::BufferTooSmall {
                have_bytes,
                need_bytes,
            }));
        }
        if let Some(event) = self.misbehave(cx, out) {
            return event.map(Ok);
        }
        let lost = std::mem::take(&mut self.desk.module().lost);
        if lost > 0 && !self.is(Fault::HidesALoss) {
            return Poll::Ready(Ok(Event::Gap { blocks: lost }));
        }
        if self.is(Fault::TakesAheadOfCredit) && self.credit > 0 {
            self.taken.append(&mut self.desk.module().kept);
        }
        let has_credit = self.credit > 0 || self.is(Fault::NeedsNoCredit);
        match self.next_block().filter(|_| has_credit) {
            Some((number, key)) => Poll::Ready(Ok(self.deliver(number, &key, out))),
            None => {
                self.desk.module().waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    fn grant(&mut self, blocks: u32) {
        self.credit = self.credit.saturating_add(blocks);
        if !self.is(Fault::IsNotWokenByGrants) {
            self.desk.wake();
        }
    }

    fn settle(&mut self, id: &QkdKeyId, _outcome: Settlement) {
        let Ok(number) = id.as_str().parse() else {
            return;
        };
        if self.delivered.contains(&number) && !self.is(Fault::DeletesNever) {
            let mut module = self.desk.module();
            let key = module.kept.remove(&number);
            module.settled.extend(key.map(|key| (number, key)));
            if module.kept.is_empty() {
                module.settled.clear();
            }
        }
    }
}

async fn violation(fault: Fault) -> Violation {
    let result = check(&mut Desk::new(fault)).await;
    result.expect_err(&format!("{fault:?} is not found"))
}

macro_rules! is_found {
    ($($test:ident: $fault:ident => $violation:pat,)*) => { $(
        #[tokio::test]
        async fn $test() {
            let found = violation(Fault::$fault).await;
            assert!(matches!(found, $violation), "{found:?}");
        }
    )* };
}

is_found! {
    key_without_credit_is_found: NeedsNoCredit => Violation::BeyondCredit { .. },
    an_altered_key_is_found: AltersAKey => Violation::Altered { .. },
    a_block_delivered_twice_is_found: DeliversTwice => Violation::Repeated { .. },
    a_block_deleted_too_early_is_found: DeletesBeforeItIsSettled => Violation::Missing { .. },
    a_block_never_deleted_is_found: DeletesNever => Violation::Unknown { .. },
    a_settled_block_that_comes_again_is_found: ForgetsSettlements => Violation::SettledCameAgain { .. },
    a_short_buffer_that_is_taken_is_found: TakesShortBuffers => Violation::ShortBuffer { .. },
    a_short_buffer_that_consumes_is_found: ConsumesForShortBuffers => Violation::Missing { .. },
    bytes_beyond_the_block_are_found: WritesBeyondTheBlock => Violation::BeyondBlock { .. },
    key_left_in_the_buffer_is_found: LeavesKeyBehind => Violation::LeftBehind,
    blocks_lost_in_dropped_futures_are_found: LosesBlocksInDroppedFutures => Violation::Missing { .. },
    a_busy_loop_is_found: Spins => Violation::Spins { .. },
    a_grant_that_wakes_nobody_is_found: IsNotWokenByGrants => Violation::NotWoken,
    an_invented_block_is_found: InventsBlocks => Violation::Unknown { .. },
    a_complaint_about_nothing_is_found: Complains => Violation::Complaint { .. },
    a_source_gone_for_no_reason_is_found: IsGone => Violation::Gone(_),
    a_source_that_comes_back_is_found: ComesBack => Violation::NotLatched,
    a_longest_block_that_changes_is_found: ChangesItsLongestBlock => Violation::MaxBlockChanged { .. },
    metadata_that_contradict_the_block_are_found: MisstatesTheLength => Violation::Metadata { .. },
}

#[tokio::test]
async fn a_sound_driver_passes() {
    let checked = check(&mut Desk::new(Fault::None)).await.unwrap();
    let expected = Checked {
        replugged: false,
        ruined: true,
    };
    assert_eq!(checked, expected);
}

#[tokio::test]
async fn a_sound_driver_for_a_module_that_hands_out_once_passes() {
    let mut desk = Desk::that_hands_out_once(Fault::None);
    let expected = Checked {
        replugged: true,
        ruined: true,
    };
    assert_eq!(check(&mut desk).await.unwrap(), expected);
}

#[tokio::test]
async fn blocks_taken_from_such_a_module_ahead_of_credit_are_found() {
    let mut desk = Desk::that_hands_out_once(Fault::TakesAheadOfCredit);
    let found = check(&mut desk).await.unwrap_err();
    assert!(
        matches!(found, Violation::Missing { missing: 2 }),
        "{found:?}"
    );
}

#[tokio::test]
async fn a_loss_that_such_a_driver_does_not_tell_is_found() {
    let mut desk = Desk::that_hands_out_once(Fault::HidesALoss);
    let found = check(&mut desk).await.unwrap_err();
    assert!(
        matches!(found, Violation::Missing { missing: 1 }),
        "{found:?}"
    );
}
