//! Generations: the lives of a module pair's numbering, and of the pair itself.
//!
//! The proposer raises the generation, durably, and every announcement tells it. Whoever finds that
//! its module numbers anew drops what is not confirmed; the answerer asks for the next generation
//! until it has come. A generation never goes back: an announcement of an earlier one is not heard,
//! and answered with the present one; a proposer that hears of a later one, because its store was
//! replaced, goes beyond it.

use qkd_keyfile::{Generation, ModulePairId, Mono, NodeId, QkdKeyName};
use serde::{Deserialize, Serialize};

use super::{LinkSync, name_of};
use crate::{
    RESEND_AFTER,
    io::{Cx, Output, Settlement},
    record::{DiscardReason, StopReason},
    store::Store,
    used::{TEXTS_MAX, UsedIds},
    wire::Message,
};

/// After so many QKD-keys in a row whose IDs came in before this process began, it is not hardware
/// that delivers again what was settled last: it numbers anew.
const AGAIN_MAX: u32 = 256;

/// A module pair, for an operator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModulePairStatus {
    /// The matching KMA.
    pub peer: NodeId,
    /// The life of its numbering.
    pub generation: u32,
    /// QKD-keys that are not settled.
    pub waiting_qkd_keys: usize,
    /// Bits of them that are in no segment.
    pub waiting_bits: u64,
    /// QKD-keys that differed, less one for every 64 that agreed since.
    pub mismatches: u32,
    /// QKD-keys that the pipeline of one of the two ends refused.
    pub quarantined: u64,
    /// Stopped, here or at the other end: no key is made of it.
    pub stopped: bool,
    /// Why it is stopped here, if it is: until an operator starts it here.
    pub stopped_here: Option<StopReason>,
    /// Why it is stopped at the other end, as that said last: until an operator starts it there.
    pub stopped_there: Option<StopReason>,
}

impl LinkSync {
    /// The module pairs of this link.
    pub(crate) fn status(
        &self,
        store: &Store,
    ) -> impl Iterator<Item = (ModulePairId, ModulePairStatus)> {
        let names = self.pairs.keys();
        names.filter_map(|name| Some((name.clone(), self.status_of(store, name)?)))
    }

    /// One of them.
    pub(crate) fn status_of(
        &self,
        store: &Store,
        module_pair: &ModulePairId,
    ) -> Option<ModulePairStatus> {
        let pair = self.pairs.get(module_pair)?;
        let (waiting_qkd_keys, waiting_bits) = pair.waiting();
        let (standing, stopped_here) = (&pair.standing, store.stopped(module_pair));
        Some(ModulePairStatus {
            peer: self.peer.clone(),
            generation: store.generation(module_pair).0,
            waiting_qkd_keys,
            waiting_bits,
            mismatches: standing.mismatches,
            quarantined: standing.quarantined,
            stopped: stopped_here.or(standing.peer_stopped).is_some(),
            stopped_here,
            stopped_there: standing.peer_stopped,
        })
    }

    /// A module tells its session.
    pub(crate) fn session(&mut self, cx: &mut Cx<'_>, module_pair: &ModulePairId, session: u64) {
        let Some(pair) = self.pairs.get_mut(module_pair) else {
            return;
        };
        pair.standing.session = Some(session);
        let known = cx.store.numbering(module_pair).cloned().unwrap_or_default();
        if known.session.is_some_and(|known| known != session) {
            return self.renumbered(cx, module_pair);
        }
        if known.session.is_none() {
            let (generation, anew) = (known.generation, known.anew);
            cx.store
                .set_numbering(module_pair, generation, anew, Some(session));
        }
        say(cx, module_pair);
    }

    /// An ID that came in before: delivered again around a restart, or given anew. Its bits are not
    /// those of a QKD-key that was here lately; the pipeline has looked.
    pub(super) fn came_again(&mut self, cx: &mut Cx<'_>, name: QkdKeyName) {
        self.came_again += 1;
        if self.came_again.is_power_of_two() {
            let times = self.came_again;
            tracing::warn!(qkd_key = %name, times, "an ID that came in before; dropped");
        }
        let anew = self.with_pair(&name.module_pair, |pair| {
            let standing = &mut pair.standing;
            standing.again += 1;
            let lately = UsedIds::is_number(&name.id) && !standing.before.contains(&name.id);
            lately || standing.again >= AGAIN_MAX
        });
        let module_pair = name.module_pair.clone();
        cx.settle(name, Settlement::Dropped);
        if anew == Some(true) {
            self.renumbered(cx, &module_pair);
        }
    }

    /// This end's module numbers its QKD-keys anew.
    fn renumbered(&mut self, cx: &mut Cx<'_>, module_pair: &ModulePairId) {
        tracing::warn!(%module_pair, "the module numbers its QKD-keys anew; those not confirmed are dropped");
        self.drop_all(cx, module_pair, false);
        if self.proposer {
            self.raise(cx, module_pair, cx.store.generation(module_pair), true);
        } else {
            self.with_pair(module_pair, |pair| {
                pair.standing.wants_generation = Some(Mono::default());
            });
            self.has_news = true;
        }
    }

    /// The answerer's module numbers anew.
    pub(crate) fn renumbered_there(
        &mut self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        generation: Generation,
    ) {
        if !self.proposer || !self.pairs.contains_key(module_pair) {
            return;
        }
        if generation == cx.store.generation(module_pair) {
            tracing::warn!(%module_pair, "the other end's module numbers anew; QKD-keys not confirmed are dropped");
            self.drop_all(cx, module_pair, false);
            self.raise(cx, module_pair, generation, true);
        } else {
            self.announce_again(module_pair);
        }
    }

    /// Raises the generation beyond `above`. Nothing is held any more.
    fn raise(
        &mut self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        above: Generation,
        anew: bool,
    ) {
        let known = cx.store.numbering(module_pair).cloned().unwrap_or_default();
        let generation = Generation(above.0.saturating_add(1));
        let anew = if anew { generation } else { known.anew };
        self.number(cx, module_pair, generation, anew);
        self.announce_again(module_pair);
    }

    /// A generation begins here.
    fn number(
        &mut self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        generation: Generation,
        anew: Generation,
    ) {
        let known = cx.store.numbering(module_pair).cloned().unwrap_or_default();
        let session = self.with_pair(module_pair, |pair| {
            let standing = &mut pair.standing;
            standing.wants_generation = None;
            standing.again = 0;
            if anew > known.generation {
                standing.before = UsedIds::default();
            }
            standing.session
        });
        let session = session.flatten().or(known.session);
        cx.store
            .set_numbering(module_pair, generation, anew, session);
        say(cx, module_pair);
    }

    fn announce_again(&mut self, module_pair: &ModulePairId) {
        self.with_pair(module_pair, |pair| pair.said_complete = false);
        self.has_news = true;
    }

    /// What the peer announces under `generation`: whether it is the one here. A later one is taken
    /// over.
    pub(super) fn same_numbering(
        &mut self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        generation: Generation,
        anew: Generation,
    ) -> bool {
        let here = cx.store.generation(module_pair);
        if generation < here {
            self.announce_again(module_pair);
        } else if generation > here {
            self.drop_all(cx, module_pair, false);
            if self.proposer {
                self.raise(cx, module_pair, generation, true);
            } else {
                self.number(cx, module_pair, generation, anew);
            }
        }
        generation == cx.store.generation(module_pair)
    }

    /// Everything that is not confirmed goes. `used`: also beyond this generation.
    pub(super) fn drop_all(&mut self, cx: &mut Cx<'_>, module_pair: &ModulePairId, used: bool) {
        let of_pair = |name: &ModulePairId| name == module_pair;
        let open = self.proposals.iter();
        let open = open.filter(|(_, proposal)| of_pair(&proposal.composition.module_pair));
        for number in open.map(|(&number, _)| number).collect::<Vec<_>>() {
            self.proposals.remove(&number);
            cx.store
                .discard(&self.stream, number, DiscardReason::Renumbered);
        }
        self.comparing
            .retain(|_, comparing| !of_pair(&comparing.propose.composition.module_pair));
        self.forget_divisions(module_pair);
        let dropped = self.with_pair(module_pair, super::Pair::clear);
        for (id, outcome) in dropped.into_iter().flatten() {
            let name = name_of(cx, module_pair, &id);
            if used {
                cx.store.use_qkd_keys([name.clone()]);
            }
            cx.settle(name, outcome);
        }
        self.has_news = true;
    }

    /// Whether a module pair has as many IDs that are no numbers as are kept in one generation.
    pub(super) fn is_out_of_names(&self, cx: &Cx<'_>, module_pair: &ModulePairId) -> bool {
        let numbering = cx.store.numbering(module_pair);
        let most = if self.proposer {
            TEXTS_MAX
        } else {
            2 * TEXTS_MAX
        };
        numbering.is_some_and(|numbering| numbering.used.texts() >= most)
    }

    /// Raises or asks for the next generation where one is due.
    pub(super) fn look_at_generation(&mut self, cx: &mut Cx<'_>, module_pair: &ModulePairId) {
        let full = self.is_out_of_names(cx, module_pair);
        let compared = |name: &ModulePairId| name == module_pair;
        if self.proposer {
            let mut open = self.proposals.values();
            if full && !open.any(|proposal| compared(&proposal.composition.module_pair)) {
                self.drop_all(cx, module_pair, false);
                self.raise(cx, module_pair, cx.store.generation(module_pair), false);
            }
            return;
        }
        let now = cx.now.mono;
        let due = self.with_pair(module_pair, |pair| {
            let wants = &mut pair.standing.wants_generation;
            if full {
                wants.get_or_insert_default();
            }
            let due = wants.is_some_and(|said| now.since(said) >= RESEND_AFTER);
            if due {
                *wants = Some(now);
            }
            due
        });
        if due == Some(true) {
            let generation = cx.store.generation(module_pair);
            let module_pair = module_pair.clone();
            let message = Message::Renumbered {
                module_pair,
                generation,
            };
            cx.send(&self.peer, &message);
        }
    }
}

/// Tells who reads the module what its QKD-keys are called from now on.
pub(super) fn say(cx: &mut Cx<'_>, module_pair: &ModulePairId) {
    let Some(numbering) = cx.store.numbering(module_pair) else {
        return;
    };
    let (generation, session) = (numbering.generation, numbering.session);
    cx.out.push(Output::Numbering {
        module_pair: module_pair.clone(),
        generation,
        session,
    });
}
