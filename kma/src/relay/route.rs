//! Routes, and what makes one acceptable.

use std::collections::BTreeSet;

use qkd_keyfile::{NodeId, StreamId};

use crate::{io::KmaConfig, policy::HOPS_MAX};

/// The end-to-end stream from here.
pub(crate) fn stream_of(me: &NodeId, destination: &NodeId) -> StreamId {
    StreamId::EndToEnd {
        source: me.clone(),
        destination: destination.clone(),
    }
}

/// At least two nodes, not too many, none twice.
pub(super) fn is_simple(route: &[NodeId]) -> bool {
    let bounded = (2..=HOPS_MAX + 1).contains(&route.len());
    bounded && route.iter().collect::<BTreeSet<_>>().len() == route.len()
}

pub(super) fn place_in(route: &[NodeId], node: &NodeId) -> Option<usize> {
    route.iter().position(|other| other == node)
}

pub(super) fn next_of(route: &[NodeId], me: &NodeId) -> Option<NodeId> {
    route.get(place_in(route, me)? + 1).cloned()
}

/// The route's second node, if the route leads from here over a neighbour to the destination, within
/// the hop limit of the pair.
pub(super) fn first_hop(
    config: &KmaConfig,
    route: &[NodeId],
    destination: &NodeId,
) -> Option<NodeId> {
    let me = &config.node;
    let fits = route.first() == Some(me)
        && route.last() == Some(destination)
        && is_simple(route)
        && is_short_enough(config, route);
    next_of(route, me).filter(|next| fits && config.neighbours.contains_key(next))
}

/// Whether a route keeps to the hop limit that this node has for its ends.
pub(super) fn is_short_enough(config: &KmaConfig, route: &[NodeId]) -> bool {
    let (Some(source), Some(destination)) = (route.first(), route.last()) else {
        return false;
    };
    route.len() - 1 <= config.relay.of(source, destination).hop_limit
}

/// This node's place in a route over which something came from `peer`, if it may lead here from
/// there, and, where this is not its end, on over a neighbour.
pub(super) fn place_after(config: &KmaConfig, route: &[NodeId], peer: &NodeId) -> Option<usize> {
    let at = is_simple(route).then(|| place_in(route, &config.node))??;
    let from_there = route[..at].last() == Some(peer);
    let next = route.get(at + 1);
    let leads_on = next.is_none_or(|next| config.neighbours.contains_key(next));
    (from_there && leads_on).then_some(at)
}
