//! Which QKD-keys the two ends of a module pair hold.

use std::time::Duration;

use qkd_keyfile::{Generation, ModulePairId, Mono, QkdKeyId};

use super::{
    LinkSync, name_of,
    pair::{Announced, Pair, UNMATCHED_TTL},
};
use crate::{
    RESEND_AFTER,
    io::{Cx, Output},
    wire::{DropReason, Message},
};

/// QKD-keys in one announcement.
const ANNOUNCE_MAX: usize = 1024;

/// How often all QKD-keys that wait are looked through.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What the peer says of one module pair.
#[derive(Debug)]
pub(crate) struct Announcement {
    pub(crate) generation: Generation,
    pub(crate) anew: Generation,
    pub(crate) held: Vec<(QkdKeyId, u32)>,
    pub(crate) dropped: Vec<(QkdKeyId, DropReason)>,
    pub(crate) complete: bool,
}

impl LinkSync {
    pub(super) fn announce_all(&mut self, cx: &mut Cx<'_>) {
        let names: Vec<ModulePairId> = self.pairs.keys().cloned().collect();
        for name in &names {
            self.look_through(cx, name);
            self.look_at_generation(cx, name);
            while let Some(message) = self.announcement(cx, name) {
                cx.send(&self.peer, &message);
            }
        }
    }

    /// Drops QKD-keys that the peer will not have any more, and lets others be said again.
    fn look_through(&mut self, cx: &mut Cx<'_>, module_pair: &ModulePairId) {
        let now = cx.now.mono;
        let Some(pair) = self.pairs.get_mut(module_pair) else {
            return;
        };
        if now.since(pair.looked) < LOOK_EVERY {
            return;
        }
        pair.looked = now;
        let mut gone = Vec::new();
        let mut again = Vec::new();
        for (id, held) in pair.held.iter().filter(|(_, held)| held.free_bits() > 0) {
            let Some(announced) = held.announced else {
                continue;
            };
            let late = now.since(announced.first) > UNMATCHED_TTL;
            if !pair.theirs.contains_key(id) && (late || pair.is_overtaken(now, held)) {
                gone.push(id.clone());
            } else if now.since(announced.last) >= 2 * RESEND_AFTER {
                again.push(id.clone());
            }
        }
        pair.unsaid.extend(again);
        let stale = pair.stale(now);
        for id in gone {
            tracing::info!(%module_pair, qkd_key = %id, "held at one end only; dropped");
            self.drop_free(cx, module_pair, &id, DropReason::Gone);
        }
        if self.proposer {
            for id in stale {
                self.drop_free(cx, module_pair, &id, DropReason::Gone);
            }
        }
    }

    /// What the peer has to hear of a module pair, if anything.
    fn announcement(&mut self, cx: &Cx<'_>, module_pair: &ModulePairId) -> Option<Message> {
        let pair = self.pairs.get_mut(module_pair)?;
        if pair.unsaid.is_empty() && pair.dropped.is_empty() && pair.said_complete {
            return None;
        }
        let held = pair.say(cx.now.mono);
        let mut dropped = Vec::new();
        while dropped.len() < ANNOUNCE_MAX
            && let Some(gone) = pair.dropped.pop_first()
        {
            dropped.push(gone);
        }
        pair.said_complete |= pair.unsaid.is_empty();
        let numbering = cx.store.numbering(module_pair);
        Some(Message::Announce {
            module_pair: module_pair.clone(),
            generation: numbering.map_or(Generation::default(), |n| n.generation),
            anew: numbering.map_or(Generation::default(), |n| n.anew),
            held,
            dropped,
            complete: pair.said_complete,
        })
    }

    /// The peer's announcement.
    pub(crate) fn announced(
        &mut self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        announcement: Announcement,
    ) {
        if !self.pairs.contains_key(module_pair) {
            let peer = &self.peer;
            tracing::warn!(%peer, %module_pair, "announced a module pair that is not configured here");
            return;
        }
        if !self.same_numbering(cx, module_pair, announcement.generation, announcement.anew) {
            return;
        }
        let now = cx.now.mono;
        let mut elsewhere = Vec::new();
        for (id, key_bits) in announcement.held {
            let used = cx.store.is_used(&name_of(cx, module_pair, &id));
            self.with_pair(module_pair, |pair| {
                if !used && !pair.held.contains_key(&id) {
                    elsewhere.push(id.clone());
                }
                if pair.held.contains_key(&id) || !used {
                    pair.peer_holds(now, id, key_bits);
                } else {
                    // Settled here: the peer has to hear it.
                    pair.tell_dropped(id, DropReason::Gone);
                }
            });
        }
        if !elsewhere.is_empty() {
            cx.out.push(Output::Elsewhere {
                module_pair: module_pair.clone(),
                ids: elsewhere,
            });
        }
        self.with_pair(module_pair, |pair| {
            pair.theirs_complete |= announcement.complete;
        });
        let mut differing = Vec::new();
        for (id, reason) in announcement.dropped {
            if reason == DropReason::Differs {
                differing.push(id.clone());
            }
            self.dropped_there(cx, module_pair, &id, reason);
        }
        if !differing.is_empty() {
            self.count_mismatch(cx, module_pair, differing);
        }
    }

    fn dropped_there(
        &mut self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        id: &QkdKeyId,
        reason: DropReason,
    ) {
        let now = cx.now.mono;
        let quarantine = matches!(reason, DropReason::Quarantined(_));
        let dropped = self.with_pair(module_pair, |pair| {
            pair.peer_lacks(now, id);
            pair.drop_rest(now, id, quarantine)
        });
        let dropped = dropped == Some(true);
        if let DropReason::Quarantined(reason) = reason
            && dropped
        {
            let name = name_of(cx, module_pair, id);
            self.alarm_quarantined(cx, &name, reason, true);
        }
        if dropped {
            self.settle_dropped(cx, module_pair, id);
        }
    }
}

impl Pair {
    /// QKD-keys to announce now, as many as one message takes.
    fn say(&mut self, now: Mono) -> Vec<(QkdKeyId, u32)> {
        let mut list = Vec::new();
        while list.len() < ANNOUNCE_MAX
            && let Some(id) = self.unsaid.pop_first()
        {
            let held = self.held.get_mut(&id);
            let Some(held) = held.filter(|held| held.free_bits() > 0) else {
                continue;
            };
            held.announced = Some(Announced {
                first: held.announced.map_or(now, |announced| announced.first),
                last: now,
            });
            list.push((id, held.key_bits));
        }
        list
    }
}
