//! Orders of an operator.

use qkd_keyfile::{ModulePairId, Now, SegmentNumber, StreamId};

use super::Kma;
use crate::{
    confirm,
    io::{Cx, Output},
    operator::{OperatorAct, OperatorAnswer, OperatorOrder, Suspects},
    record::StopReason,
    sync::LinkSync,
    wire::MAX_ITEMS,
};

impl Kma {
    pub(super) fn operate(&mut self, now: Now, order: OperatorOrder) {
        let answer = match order.act {
            OperatorAct::StopModulePair(module_pair) => {
                self.on_module_pair(now, &module_pair, |link, cx| {
                    link.stop(cx, &module_pair, StopReason::Operator)
                })
            }
            OperatorAct::StartModulePair(module_pair) => {
                self.on_module_pair(now, &module_pair, |link, cx| link.start(cx, &module_pair))
            }
            OperatorAct::Suspect(suspects) => OperatorAnswer::Suspected {
                segments: self.suspect(now, suspects),
            },
        };
        let order = order.order;
        self.core.out.push(Output::Ordered { order, answer });
    }

    fn on_module_pair(
        &mut self,
        now: Now,
        module_pair: &ModulePairId,
        act: impl FnOnce(&mut LinkSync, &mut Cx<'_>) -> bool,
    ) -> OperatorAnswer {
        let mut cx = self.core.cx(now, &self.config.node);
        let mut links = self.links.values_mut();
        let answer = links
            .find(|link| link.knows_pair(module_pair))
            .and_then(|link| {
                let changed = act(link, &mut cx);
                let status = link.status_of(cx.store, module_pair)?;
                Some(OperatorAnswer::ModulePair { changed, status })
            });
        answer.unwrap_or_else(|| OperatorAnswer::UnknownModulePair {
            known: self.status().module_pairs.into_keys().collect(),
        })
    }

    /// Voids what is in stock, and gives up what is on its way into it; names what was in stock.
    fn suspect(&mut self, now: Now, suspects: Suspects) -> Vec<(StreamId, SegmentNumber)> {
        let mut cx = self.core.cx(now, &self.config.node);
        let cx = &mut cx;
        for name in &suspects.qkd_keys {
            for link in self.links.values_mut() {
                if link.knows_pair(&name.module_pair) {
                    link.suspect_qkd_key(cx, name);
                }
            }
        }
        cx.store.suspect_qkd_keys(suspects.qkd_keys);
        let mut void = Vec::new();
        for (stream, segment) in suspects.segments {
            let Some(peer) = stream.peer_of(cx.me).cloned() else {
                continue;
            };
            if let Some(session) = self.sessions.get_mut(&peer) {
                session.forget_keys_of(&stream, &[segment]);
            }
            if let Some(link) = self.links.get_mut(&peer) {
                link.suspect_proposal(cx, &stream, segment);
            }
            self.relay.suspect_segment(cx, &stream, segment);
            if cx.store.suspect(&stream, segment) {
                void.push((stream, segment));
            }
        }
        for unit in suspects.units {
            self.relay.suspect_unit(cx, unit);
        }
        // All of them now, however many.
        for _ in 0..=void.len() / MAX_ITEMS {
            confirm::say_suspected(cx, &self.sessions, &mut self.said_suspected);
        }
        void
    }
}
