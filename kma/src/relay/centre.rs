//! Fig. 8 (C-05, C-06), at the centre: all XORs of a relay become one, K1 ⊕ K of the last link (or
//! R ⊕ that key). The centre holds no key, stores nothing and learns nothing.

use std::collections::{BTreeMap, BTreeSet};

use qkd_keyfile::{KmaKeyId, Mono, NodeId};

use super::{UNIT_TIMEOUT, WAITING_MAX, is_short_enough, is_simple, xor::places};
use crate::{
    io::{Cx, KmaConfig},
    wire::{CENTRE_PLACE, XorPart},
};

/// Relays in the making.
#[derive(Debug, Default)]
pub(super) struct Centre(BTreeMap<KmaKeyId, Combining>);

#[derive(Debug)]
struct Combining {
    /// What was there first: its route and plan are those of the others.
    sum: XorPart,
    missing: BTreeSet<u8>,
    since: Mono,
}

impl Centre {
    /// Takes in an XOR; returns the one of all once none is missing.
    pub(super) fn combine(
        &mut self,
        cx: &Cx<'_>,
        config: &KmaConfig,
        peer: &NodeId,
        part: XorPart,
    ) -> Option<XorPart> {
        if !is_acceptable(config, peer, &part) {
            tracing::warn!(%peer, route = ?part.route, "XOR that is not combined here");
            return None;
        }
        let relay = part.relay;
        if !self.0.contains_key(&relay) {
            let source = &part.route[0];
            let same = self.0.values().filter(|c| c.sum.route[0] == *source);
            if same.count() >= WAITING_MAX {
                return None;
            }
            let sum = XorPart {
                place: CENTRE_PLACE,
                ciphertext: vec![0; part.ciphertext.len()],
                ..part.clone()
            };
            let combining = Combining {
                missing: places(&part.plan, &part.route).collect(),
                sum,
                since: cx.now.mono,
            };
            self.0.insert(relay, combining);
        }
        let combining = self.0.get_mut(&relay)?;
        let sum = &mut combining.sum;
        let fits = part.route == sum.route
            && part.plan == sum.plan
            && part.ciphertext.len() == sum.ciphertext.len();
        if fits && combining.missing.remove(&part.place) {
            cx.backend
                .xor_in_place(&mut sum.ciphertext, &part.ciphertext);
        }
        if !combining.missing.is_empty() {
            return None;
        }
        // What comes again later begins anew, lacks the others, and is given up.
        self.0.remove(&relay).map(|combining| combining.sum)
    }

    pub(super) fn give_up(&mut self, cx: &Cx<'_>) {
        let now = cx.now.mono;
        self.0
            .retain(|_, combining| now.since(combining.since) <= UNIT_TIMEOUT);
    }
}

/// Whether this centre combines for these nodes, and the sender speaks for itself.
fn is_acceptable(config: &KmaConfig, peer: &NodeId, part: &XorPart) -> bool {
    let route = &part.route;
    let (Some(source), Some(destination)) = (route.first(), route.last()) else {
        return false;
    };
    is_simple(route)
        && !route.contains(&config.node)
        && is_short_enough(config, route)
        && config.relay.of(source, destination).transit
        && places(&part.plan, route).contains(&part.place)
        && route.get(usize::from(part.place)) == Some(peer)
        && !part.ciphertext.is_empty()
}
