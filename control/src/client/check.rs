//! What a controller tells is checked before it is believed.

use std::collections::HashSet;

use qkd_keyfile::NodeId;

use super::{Asked, ClientConfig};
use crate::messages::{Destination, NO_ROUTE};

/// Why there is no route.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RouteFailure {
    /// The controller says so.
    #[error("the controller says {reason:?}")]
    Refused {
        /// Its reason.
        reason: String,
    },
    /// The controller's answer cannot be read.
    #[error("the controller's answer cannot be read")]
    Malformed,
    /// The controller's route is one that must not be taken.
    #[error("the controller's route is not acceptable: {0}")]
    Unacceptable(#[from] BadRoute),
    /// There was no answer in time.
    #[error("the controller did not answer in time")]
    TimedOut,
    /// The connection ended before the answer.
    #[error("the connection to the controller ended")]
    Lost,
}

/// What is wrong with a route.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadRoute {
    /// Its first hop is none of our neighbours.
    #[error("{node} is no neighbour")]
    NoNeighbour {
        /// The first hop.
        node: NodeId,
    },
    /// It visits a node twice.
    #[error("{node} is visited twice")]
    Repeats {
        /// The node.
        node: NodeId,
    },
    /// It is too long.
    #[error("{transit} nodes in between")]
    TooLong {
        /// Nodes between source and destination.
        transit: usize,
    },
    /// It ends elsewhere than it was asked to.
    #[error("it ends at {node}")]
    WrongEnd {
        /// Where it ends.
        node: NodeId,
    },
}

/// The neighbours among the next hops that a controller tells, in its order.
pub(super) fn hops(
    config: &ClientConfig,
    asked: &Asked,
    destination: Option<&NodeId>,
    mut next: Vec<NodeId>,
    error: Option<String>,
) -> Result<Vec<NodeId>, RouteFailure> {
    let first = match (error, next.first()) {
        (None, Some(first)) => first.clone(),
        (error, _) => {
            let reason = error.unwrap_or_else(|| NO_ROUTE.to_owned());
            return Err(RouteFailure::Refused { reason });
        }
    };
    // Mandatory where an application was asked for.
    if matches!(asked, Asked::NextHops(Destination::App(_))) && destination.is_none() {
        return Err(RouteFailure::Malformed);
    }
    let mut seen = HashSet::new();
    next.retain(|node| config.neighbours.contains(node) && seen.insert(node.clone()));
    if next.is_empty() {
        return Err(BadRoute::NoNeighbour { node: first }.into());
    }
    Ok(next)
}

/// Whether a route that a controller tells may be taken.
pub(super) fn route(
    config: &ClientConfig,
    asked: &Asked,
    destination: &NodeId,
    transit: &[NodeId],
    error: Option<String>,
) -> Result<(), RouteFailure> {
    if let Some(reason) = error {
        return Err(RouteFailure::Refused { reason });
    }
    if matches!(asked, Asked::Route(Destination::Node(wanted)) if wanted != destination) {
        let node = destination.clone();
        return Err(BadRoute::WrongEnd { node }.into());
    }
    if transit.len() > config.max_transit {
        let transit = transit.len();
        return Err(BadRoute::TooLong { transit }.into());
    }
    let mut seen = HashSet::from([&config.me]);
    if let Some(node) = transit
        .iter()
        .chain([destination])
        .find(|node| !seen.insert(*node))
    {
        let node = node.clone();
        return Err(BadRoute::Repeats { node }.into());
    }
    let first = transit.first().unwrap_or(destination);
    if !config.neighbours.contains(first) {
        let node = first.clone();
        return Err(BadRoute::NoNeighbour { node }.into());
    }
    Ok(())
}
