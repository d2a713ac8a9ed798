//! Two applications that fetch keys at the two ends and compare every one.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use qkd_keyfile::AppId;
use subtle::ConstantTimeEq;
use tokio::{sync::mpsc, time::MissedTickBehavior};

use super::application::{Application, Key, RequestError};

/// Length of a key, in bits.
const KEY_BITS: u32 = 256;

/// Keys in one request.
pub const KEYS_PER_REQUEST: usize = 128;

/// Pause after an answer that there is not enough key, or that the node is away.
const PAUSE: Duration = Duration::from_millis(20);

/// How long the destination goes on asking for keys that it was not given.
const FETCH_WITHIN: Duration = Duration::from_secs(15);

// ORDERING, for the whole file: Relaxed. Each counter stands by itself.

/// What the applications have done so far; readable while they run.
#[derive(Debug, Default)]
pub struct Tally {
    /// Keys that both ends were given, equal.
    equal: AtomicU64,
    /// Keys whose two ends differ: never.
    different: AtomicU64,
    /// Keys that the source was given and the destination was not.
    missing: AtomicU64,
    /// Answers that there is not enough key.
    shortages: AtomicU64,
    /// Connections that broke or could not be made.
    breaks: AtomicU64,
    /// Time that each request for new keys took, in microseconds.
    source_us: Mutex<Vec<u32>>,
    /// Time that each request by ID took, in microseconds.
    destination_us: Mutex<Vec<u32>>,
}

/// [`Tally`] at one moment, without times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Keys that both ends were given, equal.
    pub equal: u64,
    /// Keys whose two ends differ: never.
    pub different: u64,
    /// Keys that the source was given and the destination was not.
    pub missing: u64,
    /// Answers that there is not enough key.
    pub shortages: u64,
    /// Connections that broke or could not be made.
    pub breaks: u64,
}

/// Requests of one application that were answered with keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// How many.
    pub requests: usize,
    /// Half of them took at most this long.
    pub p50: Duration,
    /// 99 % of them took at most this long.
    pub p99: Duration,
}

impl Tally {
    /// The counters now.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            equal: get(&self.equal),
            different: get(&self.different),
            missing: get(&self.missing),
            shortages: get(&self.shortages),
            breaks: get(&self.breaks),
        }
    }

    /// Times of source and destination, so far.
    #[must_use]
    pub fn times(&self) -> [Times; 2] {
        [&self.source_us, &self.destination_us].map(|times| {
            let mut times = times.lock().unwrap_or_else(PoisonError::into_inner).clone();
            times.sort_unstable();
            let at = |per_cent: usize| {
                let at = (times.len() * per_cent).div_ceil(100).saturating_sub(1);
                Duration::from_micros(times.get(at).copied().unwrap_or(0).into())
            };
            Times {
                requests: times.len(),
                p50: at(50),
                p99: at(99),
            }
        })
    }

    fn failed(&self, error: &RequestError) {
        let counter = match error.status() {
            Some(503) => &self.shortages,
            _ => &self.breaks,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Runs both applications: until `until`, new keys are fetched once in `every`, or as soon after as
/// the nodes can; then all of them are compared.
///
/// # Errors
///
/// A refusal that waiting does not mend. Shortages and broken connections are counted, and tried
/// again.
pub async fn run(
    source: Application,
    destination: Application,
    until: Instant,
    every: Duration,
    tally: &Tally,
) -> Result<(), RequestError> {
    // A request may be under way at either end, and one waits.
    let (sender, receiver) = mpsc::channel(1);
    let (from, to) = (source.id().clone(), destination.id().clone());
    let asking = ask(source, &to, until, every, tally, sender);
    let fetching = fetch(destination, &from, tally, receiver);
    tokio::try_join!(asking, fetching)?;
    Ok(())
}

async fn ask(
    mut source: Application,
    to: &AppId,
    until: Instant,
    every: Duration,
    tally: &Tally,
    sender: mpsc::Sender<Vec<Key>>,
) -> Result<(), RequestError> {
    let mut pace = tokio::time::interval(every);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while Instant::now() < until {
        pace.tick().await;
        let start = Instant::now();
        match source.enc_keys(to, KEYS_PER_REQUEST, KEY_BITS).await {
            Ok(keys) => {
                note(&tally.source_us, start);
                if sender.send(keys).await.is_err() {
                    return Ok(());
                }
            }
            Err(error) => again(error, tally).await?,
        }
    }
    Ok(())
}

async fn fetch(
    mut destination: Application,
    from: &AppId,
    tally: &Tally,
    mut receiver: mpsc::Receiver<Vec<Key>>,
) -> Result<(), RequestError> {
    while let Some(keys) = receiver.recv().await {
        let ids: Vec<&str> = keys.iter().map(|key| key.id.as_str()).collect();
        let give_up = Instant::now() + FETCH_WITHIN;
        loop {
            let start = Instant::now();
            match destination.dec_keys(from, &ids).await {
                Ok(theirs) => {
                    note(&tally.destination_us, start);
                    compare(&keys, &theirs, tally);
                    break;
                }
                // After a broken connection the keys may be gone: they are given out once.
                Err(error) if lost(&error) || Instant::now() > give_up => {
                    tally.failed(&error);
                    tally
                        .missing
                        .fetch_add(keys.len() as u64, Ordering::Relaxed);
                    break;
                }
                Err(error) => again(error, tally).await?,
            }
        }
    }
    Ok(())
}

fn lost(error: &RequestError) -> bool {
    matches!(error, RequestError::Broken(_) | RequestError::TimedOut)
}

/// Waits a moment where that helps.
async fn again(error: RequestError, tally: &Tally) -> Result<(), RequestError> {
    match &error {
        RequestError::Refused { status: 503, .. }
        | RequestError::Connect(_)
        | RequestError::Broken(_)
        | RequestError::TimedOut => {
            tally.failed(&error);
            tokio::time::sleep(PAUSE).await;
            Ok(())
        }
        RequestError::Refused { .. } | RequestError::Answer => Err(error),
    }
}

/// Every key of `ours` has one of the same ID and the same bytes in `theirs`, or is counted.
fn compare(ours: &[Key], theirs: &[Key], tally: &Tally) {
    for key in ours {
        let counter = match theirs.iter().find(|other| other.id == key.id) {
            Some(other) if bool::from(key.key.ct_eq(&other.key)) => &tally.equal,
            Some(_) => &tally.different,
            None => &tally.missing,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

fn note(times: &Mutex<Vec<u32>>, start: Instant) {
    let micros = u32::try_from(start.elapsed().as_micros()).unwrap_or(u32::MAX);
    times
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(micros);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: &str, byte: u8) -> Key {
        Key {
            id: id.to_owned(),
            key: vec![byte; 32].into(),
        }
    }

    #[test]
    fn every_key_is_counted_as_what_it_is() {
        let tally = Tally::default();
        let ours = [key("a", 1), key("b", 2), key("c", 3)];
        compare(&ours, &[key("b", 9), key("a", 1)], &tally);
        let counts = tally.counts();
        assert_eq!((counts.equal, counts.different, counts.missing), (1, 1, 1));
    }

    #[test]
    fn a_part_of_the_requests_took_no_longer() {
        let tally = Tally::default();
        tally.source_us.lock().unwrap().extend(1..=200);
        let [source, destination] = tally.times();
        let micros = Duration::from_micros;
        assert_eq!((source.p50, source.p99), (micros(100), micros(198)));
        assert_eq!((destination.requests, destination.p99), (0, micros(0)));
    }
}
