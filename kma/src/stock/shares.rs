//! Equal shares of something that is short, by start-time fair queueing (Goyal, Vin, Cheng: SIGCOMM
//! 1996).
//!
//! Whoever wants something has a *rank*, the bytes that it has had, in units that all share; the
//! lowest is served next. One that wanted nothing for a while starts at the rank of those served now:
//! what it did not take is not owed to it. So over any time in which two want something all along,
//! they get the same, but for the longest unit of each.

use std::collections::BTreeMap;

/// What everybody has had so far.
#[derive(Debug, Clone)]
pub(super) struct Shares<K> {
    /// Rank of the last that was served.
    now: u64,
    /// Where those stand that are ahead of it; the others stand at it.
    ahead: BTreeMap<K, u64>,
}

impl<K> Default for Shares<K> {
    fn default() -> Self {
        Self {
            now: 0,
            ahead: BTreeMap::new(),
        }
    }
}

impl<K: Ord + Clone> Shares<K> {
    /// The lower, the sooner.
    pub(super) fn rank(&self, who: &K) -> u64 {
        self.ahead.get(who).copied().unwrap_or(self.now)
    }

    /// Somebody is served so many bytes.
    pub(super) fn charge(&mut self, who: &K, bytes: u64) {
        let start = self.rank(who);
        self.now = self.now.max(start);
        self.ahead.insert(who.clone(), start + bytes);
        let now = self.now;
        self.ahead.retain(|_, rank| *rank > now);
    }

    /// Somebody was charged for what it did not take.
    pub(super) fn give_back(&mut self, who: &K, bytes: u64) {
        let rank = self.rank(who).saturating_sub(bytes);
        if rank > self.now {
            self.ahead.insert(who.clone(), rank);
        } else {
            self.ahead.remove(who);
        }
    }
}
