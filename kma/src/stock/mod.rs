//! Stock management: how much end-to-end stock to have with whom, and who is served next where pad is
//! short (Y.3803 clause 9.3, relay that adapts to the traffic).
//!
//! A stock's *target* follows what applications asked for lately ([`demand`]); units are relayed ahead
//! of requests until stock and what is on its way reach it. Where a link's pad does not suffice for
//! all, every pair of nodes gets an equal share, or what it wants if that is less ([`shares`]): the
//! pairs of this node, those of others whose units pass through, and the pair with the neighbour
//! itself, whose keys are the link's own bits.
//!
//! It sends nothing and reads no store: the relay tells it what there is and what is wanted, and asks
//! whose turn it is.

mod demand;
mod shares;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use qkd_keyfile::{Mono, NodeId};

use crate::io::{KmaConfig, StockLimits};
use demand::Demand;
use shares::Shares;

/// Pad is kept for the neighbour in portions of so many bytes.
const PORTION_BYTES: u64 = 4096;

/// Pairs of other nodes whose units come from one neighbour share so many places. More pairs than
/// that share places by chance, so no neighbour gets a greater share by inventing pairs.
const PLACES: u64 = 16;

/// Of a link's capacity, the part that is kept at most for keys with the neighbour itself.
const NEIGHBOUR_PART: u64 = 4;

/// What competes for the pad of a link.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Flow {
    /// Units from here to a node.
    Own(NodeId),
    /// Units of others that came from a neighbour.
    Through {
        /// The neighbour.
        from: NodeId,
        /// Stands for source and destination.
        place: u64,
    },
    /// Keys with the node at the other end of the link.
    Neighbour,
}

impl Flow {
    /// The flow of a unit of others that came from `from` on `route`.
    pub(crate) fn through(from: &NodeId, route: &[NodeId]) -> Self {
        let mut hasher = DefaultHasher::new();
        (route.first(), route.last()).hash(&mut hasher);
        Self::Through {
            from: from.clone(),
            place: hasher.finish() % PLACES,
        }
    }
}

/// What a flow would send now if it could.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Want {
    /// The flow.
    pub(crate) flow: Flow,
    /// How many units.
    pub(crate) units: u64,
    /// Length of the longest, in bytes.
    pub(crate) unit_bytes: u64,
}

/// What an operator sees of a stock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StockStatus {
    /// The node that it is shared with.
    pub with: NodeId,
    /// Bytes that it is to have now.
    pub target_bytes: u64,
    /// Bytes in stock.
    pub stock_bytes: u64,
    /// Bytes on their way there.
    pub coming_bytes: u64,
    /// Bytes per second that applications asked for lately.
    pub demand_bytes_per_second: u64,
    /// Bytes that were asked for and refused, for there were not enough.
    pub refused_bytes: u64,
    /// The least and the greatest target.
    pub limits: StockLimits,
}

/// What one end needs of the bits of a link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PadNeed {
    /// For what waits now, in bytes.
    now_bytes: u64,
    /// For the next 20 s or so, as it was used and asked for lately, in bytes.
    later_bytes: u64,
}

impl PadNeed {
    /// Below this an end is short, and asks the other to cede.
    pub(crate) const fn low_bytes(self, floor_bytes: u64) -> u64 {
        let need = self.now_bytes.saturating_add(self.later_bytes / 2);
        floor_bytes.saturating_add(need)
    }

    /// Up to this an end asks, and above it the other cedes: far enough from where either is short that
    /// no segment goes to and fro.
    pub(crate) const fn level_bytes(self, floor_bytes: u64) -> u64 {
        let need = self.now_bytes.saturating_add(self.later_bytes);
        floor_bytes.saturating_add(need)
    }
}

/// All stocks of a node, and the shares in its links.
#[derive(Debug)]
pub(crate) struct Stocks {
    ends: BTreeMap<NodeId, Stock>,
    links: BTreeMap<NodeId, Link>,
}

#[derive(Debug)]
struct Stock {
    limits: StockLimits,
    demand: Demand,
}

impl Stock {
    fn new(limits: StockLimits) -> Self {
        Self {
            limits,
            demand: Demand::default(),
        }
    }

    fn target_bytes(&self) -> u64 {
        let StockLimits {
            min_bytes,
            max_bytes,
        } = self.limits;
        self.demand.wanted_bytes().min(max_bytes).max(min_bytes)
    }
}

/// A link's pad, as it is shared out.
#[derive(Debug)]
struct Link {
    /// Keys with the neighbour itself.
    neighbour: Stock,
    /// Pad that is left in stock for them.
    kept_bytes: u64,
    /// All that this end uses of the link's bits, and how much it had used when that was last told.
    used: Demand,
    used_bytes: Option<u64>,
    /// What units that wait would take.
    waiting_bytes: u64,
    shares: Shares<Flow>,
    /// What each flow may send now; it is charged for it already.
    turns: BTreeMap<Flow, Turns>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Turns {
    units: u64,
    unit_bytes: u64,
}

impl Stocks {
    pub(crate) fn new(config: &KmaConfig) -> Self {
        let end = |(node, remote): (&NodeId, &crate::io::RemoteConfig)| {
            (node.clone(), Stock::new(remote.stock))
        };
        let link = |(node, link): (&NodeId, &crate::io::LinkConfig)| {
            let limits = StockLimits {
                min_bytes: 0,
                max_bytes: link.capacity_bytes / NEIGHBOUR_PART,
            };
            let link = Link {
                neighbour: Stock::new(limits),
                kept_bytes: 0,
                used: Demand::default(),
                used_bytes: None,
                waiting_bytes: 0,
                shares: Shares::default(),
                turns: BTreeMap::new(),
            };
            (node.clone(), link)
        };
        Self {
            ends: config.remotes.iter().map(end).collect(),
            links: config.neighbours.iter().map(link).collect(),
        }
    }

    /// An application was given keys out of the end-to-end stock with a node.
    pub(crate) fn supplied(&mut self, now: Mono, destination: &NodeId, bytes: u64) {
        if let Some(stock) = self.ends.get_mut(destination) {
            stock.demand.supplied(now, bytes);
        }
    }

    /// An application was given keys out of the pad of the link with a neighbour.
    pub(crate) fn supplied_from_link(&mut self, now: Mono, neighbour: &NodeId, bytes: u64) {
        if let Some(link) = self.links.get_mut(neighbour) {
            link.neighbour.demand.supplied(now, bytes);
            let unkept = bytes.saturating_sub(link.kept_bytes);
            link.kept_bytes = link.kept_bytes.saturating_sub(bytes);
            link.shares.charge(&Flow::Neighbour, unkept);
        }
    }

    /// There was not enough for an order of an application.
    pub(crate) fn refused(&mut self, now: Mono, destination: &NodeId, bytes: u64) {
        let link = self.links.get_mut(destination).map(|l| &mut l.neighbour);
        if let Some(stock) = self.ends.get_mut(destination).or(link) {
            stock.demand.refused(now, bytes);
        }
    }

    /// A unit has reached its destination and was checked, `took` after it left.
    pub(crate) fn arrived(&mut self, destination: &NodeId, took: Duration) {
        if let Some(stock) = self.ends.get_mut(destination) {
            stock.demand.arrived(took);
        }
    }

    /// Lets the time go on for every estimate.
    pub(crate) fn tick(&mut self, now: Mono) {
        let links = self.links.values_mut().map(|link| &mut link.neighbour);
        for stock in self.ends.values_mut().chain(links) {
            stock.demand.tick(now);
        }
    }

    /// This end has used so many bytes of a link so far.
    pub(crate) fn used(&mut self, now: Mono, next: &NodeId, so_far_bytes: u64) {
        if let Some(link) = self.links.get_mut(next) {
            let before = link.used_bytes.replace(so_far_bytes);
            let used = so_far_bytes.saturating_sub(before.unwrap_or(so_far_bytes));
            link.used.supplied(now, used);
        }
    }

    /// What this end needs of the bits of a link; `aside_bytes` for every unit that may wait.
    pub(crate) fn pad_need(&self, next: &NodeId, aside_bytes: u64) -> PadNeed {
        let Some(link) = self.links.get(next) else {
            return PadNeed::default();
        };
        let waiting = link.waiting_bytes;
        let aside_bytes = if waiting > 0 { aside_bytes } else { 0 };
        let keys_bytes = link.neighbour.target_bytes();
        PadNeed {
            now_bytes: waiting.saturating_add(aside_bytes),
            later_bytes: link.used.wanted_bytes().max(keys_bytes),
        }
    }

    /// Bytes that are to be in stock with a node, or on their way there.
    pub(crate) fn target_bytes(&self, destination: &NodeId) -> u64 {
        self.ends.get(destination).map_or(0, Stock::target_bytes)
    }

    /// Shares out the pad of a link, of which `free_bytes` are above its floor, among those that want
    /// some. Turns that were not taken are void, and not charged.
    pub(crate) fn share_out(&mut self, next: &NodeId, free_bytes: u64, mut wants: Vec<Want>) {
        let Some(link) = self.links.get_mut(next) else {
            return;
        };
        let waiting = wants.iter().map(|w| w.units.saturating_mul(w.unit_bytes));
        link.waiting_bytes = waiting.fold(0, u64::saturating_add);
        for (flow, turns) in std::mem::take(&mut link.turns) {
            link.shares.give_back(&flow, turns.units * turns.unit_bytes);
        }
        let target_bytes = link.neighbour.target_bytes();
        link.kept_bytes = link.kept_bytes.min(target_bytes);
        let mut left_bytes = free_bytes.saturating_sub(link.kept_bytes);
        wants.push(Want {
            flow: Flow::Neighbour,
            units: (target_bytes - link.kept_bytes).div_ceil(PORTION_BYTES),
            unit_bytes: PORTION_BYTES,
        });
        loop {
            let wanting = wants.iter_mut().filter(|want| want.units > 0);
            let Some(want) = wanting.min_by_key(|want| link.shares.rank(&want.flow)) else {
                return;
            };
            // Whoever's turn it is waits for enough: a smaller unit does not overtake it for ever.
            let Some(left) = left_bytes.checked_sub(want.unit_bytes) else {
                return;
            };
            left_bytes = left;
            want.units -= 1;
            link.shares.charge(&want.flow, want.unit_bytes);
            if want.flow == Flow::Neighbour {
                link.kept_bytes += want.unit_bytes;
                continue;
            }
            let none = Turns {
                units: 0,
                unit_bytes: want.unit_bytes,
            };
            link.turns.entry(want.flow.clone()).or_insert(none).units += 1;
        }
    }

    /// Whether a flow may send a unit over a link now.
    pub(crate) fn has_turn(&self, next: &NodeId, flow: &Flow) -> bool {
        let turns = self.links.get(next).and_then(|link| link.turns.get(flow));
        turns.is_some_and(|turns| turns.units > 0)
    }

    /// A flow has sent a unit over a link.
    pub(crate) fn sent(&mut self, next: &NodeId, flow: &Flow) {
        let link = self.links.get_mut(next);
        if let Some(turns) = link.and_then(|link| link.turns.get_mut(flow)) {
            turns.units = turns.units.saturating_sub(1);
        }
    }

    /// What an operator sees of every end-to-end stock; `level` tells bytes in stock and on the way.
    pub(crate) fn status(&self, level: impl Fn(&NodeId) -> (u64, u64)) -> Vec<StockStatus> {
        let status = |(with, stock): (&NodeId, &Stock)| {
            let (stock_bytes, coming_bytes) = level(with);
            StockStatus {
                with: with.clone(),
                target_bytes: stock.target_bytes(),
                stock_bytes,
                coming_bytes,
                demand_bytes_per_second: stock.demand.bytes_per_second(),
                refused_bytes: stock.demand.refused_bytes(),
                limits: stock.limits,
            }
        };
        self.ends.iter().map(status).collect()
    }
}
