//! Module pairs that are stopped, and their start.
//!
//! Each end has a stop of its own, durable until an operator starts the module pair there: what one
//! end found is not for the other to forgive. While either is stopped, neither holds QKD-keys; what
//! was not confirmed goes as after a restart, and is recorded as used. The ends tell each other how
//! they stand, and what they believe of each other, when it changes, on every new connection, and now
//! and then for as long as it is not well: a message that was lost, or overtaken by an older one, is
//! made up for by either.

use std::time::Duration;

use qkd_keyfile::ModulePairId;

use super::LinkSync;
use crate::{
    RESEND_AFTER,
    io::{Alarm, Cx},
    record::StopReason,
    wire::Message,
};

/// How often the ends of a module pair that is stopped say so again.
const TELL_EVERY: Duration = RESEND_AFTER.saturating_mul(4);

impl LinkSync {
    /// Stops a module pair at this end; says whether it was not before.
    pub(crate) fn stop(
        &mut self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        reason: StopReason,
    ) -> bool {
        let news = cx.store.stop_module_pair(module_pair, reason);
        if news {
            self.alarm_stopped(cx, module_pair, reason, false);
            self.drop_all(cx, module_pair, true);
            self.tell_standing(module_pair);
        }
        news
    }

    /// Starts a module pair at this end, and counts its mismatches anew; says whether it was stopped.
    pub(crate) fn start(&mut self, cx: &mut Cx<'_>, module_pair: &ModulePairId) -> bool {
        let news = cx.store.start_module_pair(module_pair);
        if news {
            self.alarm_started(cx, module_pair, false);
            // What the other end announced meanwhile it will not have any more.
            self.drop_all(cx, module_pair, true);
            self.with_pair(module_pair, |pair| {
                (pair.standing.mismatches, pair.standing.agreed) = (0, 0);
            });
            self.tell_standing(module_pair);
        }
        news
    }

    /// How the other end stands, and what it believes of this one.
    pub(crate) fn standing_told(
        &mut self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        (theirs, ours): (Option<StopReason>, Option<StopReason>),
    ) {
        let Some(pair) = self.pairs.get_mut(module_pair) else {
            return;
        };
        let before = std::mem::replace(&mut pair.standing.peer_stopped, theirs);
        match (before, theirs) {
            (None, Some(reason)) => {
                self.alarm_stopped(cx, module_pair, reason, true);
                self.drop_all(cx, module_pair, true);
            }
            (Some(_), None) => self.alarm_started(cx, module_pair, true),
            _ => {}
        }
        if ours != cx.store.stopped(module_pair) {
            self.tell_standing(module_pair);
        }
    }

    fn tell_standing(&mut self, module_pair: &ModulePairId) {
        self.with_pair(module_pair, |pair| pair.standing.told = None);
        self.has_news = true;
    }

    pub(super) fn tell_standings(&mut self, cx: &mut Cx<'_>) {
        let now = cx.now.mono;
        for (module_pair, pair) in &mut self.pairs {
            let standing = &mut pair.standing;
            let (here, there) = (cx.store.stopped(module_pair), standing.peer_stopped);
            let due = standing
                .told
                .is_none_or(|at| here.or(there).is_some() && now.since(at) >= TELL_EVERY);
            if due {
                standing.told = Some(now);
                let module_pair = module_pair.clone();
                let message = Message::Standing {
                    module_pair,
                    here,
                    there,
                };
                cx.send(&self.peer, &message);
            }
        }
    }

    fn alarm_stopped(
        &self,
        cx: &mut Cx<'_>,
        module_pair: &ModulePairId,
        reason: StopReason,
        at_peer: bool,
    ) {
        cx.alarm(Alarm::ModulePairStopped {
            peer: self.peer.clone(),
            module_pair: module_pair.clone(),
            reason,
            at_peer,
        });
    }

    fn alarm_started(&self, cx: &mut Cx<'_>, module_pair: &ModulePairId, at_peer: bool) {
        cx.alarm(Alarm::ModulePairStarted {
            peer: self.peer.clone(),
            module_pair: module_pair.clone(),
            at_peer,
        });
    }
}
