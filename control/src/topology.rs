//! Nodes, links and what is known of them; shortest routes.
//!
//! A link costs its configured weight, sixteen times that while the pad in the direction of travel is
//! low, and cannot be used while either end says that it is down or raises an alarm, or while there is
//! neither pad nor key rate. Until the ends have reported, the configuration is believed.

use std::collections::{BTreeMap, HashMap};

use petgraph::{
    algo::dijkstra,
    graph::{DiGraph, EdgeReference, NodeIndex},
    visit::{EdgeFiltered, EdgeRef, Reversed},
};
use qkd_keyfile::{AppId, NodeId};

use crate::messages::{AlarmReport, Destination, LinkReport, LinkState};

/// A link with little pad is worth a detour of this many times its weight.
const LOW_STOCK_FACTOR: u64 = 16;

/// A link of the network, as configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkLink {
    /// One end.
    pub a: NodeId,
    /// The other end.
    pub b: NodeId,
    /// What it costs to cross, from 1; hops are counted if all weights are equal.
    pub weight: u32,
}

/// A link and what its ends say of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkView {
    /// The link.
    pub link: NetworkLink,
    /// The last report of end `a`, then of end `b`.
    pub reports: [Option<LinkReport>; 2],
    /// The alarm of end `a`, then of end `b`, while there is one.
    pub alarms: [Option<String>; 2],
}

/// Why a topology makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TopologyError {
    /// A link joins a node to itself.
    #[error("a link joins {node} to itself")]
    Loop {
        /// The node.
        node: NodeId,
    },
    /// Two links join the same nodes.
    #[error("the link of {a} and {b} is listed twice")]
    Twice {
        /// One end.
        a: NodeId,
        /// The other end.
        b: NodeId,
    },
    /// A link costs nothing, so a route could go round in circles.
    #[error("the link of {a} and {b} has weight 0, at least 1 is needed")]
    Weightless {
        /// One end.
        a: NodeId,
        /// The other end.
        b: NodeId,
    },
    /// An application is at a node that has no link.
    #[error("application {app} is at node {node}, which has no link")]
    Nowhere {
        /// The application.
        app: AppId,
        /// The node.
        node: NodeId,
    },
}

/// The network as the controller knows it.
#[derive(Debug)]
pub struct Topology {
    /// Every link twice, once per direction; an edge holds its link's index and which end it leaves.
    graph: DiGraph<NodeId, (usize, usize)>,
    nodes: HashMap<NodeId, NodeIndex>,
    links: Vec<LinkView>,
    apps: BTreeMap<AppId, NodeId>,
    low_stock_bits: u64,
}

impl Topology {
    /// A network of these links, with these applications at these nodes. Below `low_stock_bits` of pad
    /// a link is avoided where there is another way.
    ///
    /// # Errors
    ///
    /// [`TopologyError`]: the configuration makes no sense.
    pub fn new(
        links: Vec<NetworkLink>,
        apps: BTreeMap<AppId, NodeId>,
        low_stock_bits: u64,
    ) -> Result<Self, TopologyError> {
        let mut this = Self {
            graph: DiGraph::new(),
            nodes: HashMap::new(),
            links: Vec::new(),
            apps: BTreeMap::new(),
            low_stock_bits,
        };
        for link in links {
            this.add(link)?;
        }
        if let Some((app, node)) = apps.iter().find(|(_, node)| !this.knows(node)) {
            let (app, node) = (app.clone(), node.clone());
            return Err(TopologyError::Nowhere { app, node });
        }
        this.apps = apps;
        Ok(this)
    }

    fn add(&mut self, link: NetworkLink) -> Result<(), TopologyError> {
        let NetworkLink { a, b, weight } = link.clone();
        if a == b {
            return Err(TopologyError::Loop { node: a });
        }
        if weight == 0 {
            return Err(TopologyError::Weightless { a, b });
        }
        if self.find(&a, &b).is_some() {
            return Err(TopologyError::Twice { a, b });
        }
        let [from, to] = [a, b].map(|id| {
            *self
                .nodes
                .entry(id)
                .or_insert_with_key(|id| self.graph.add_node(id.clone()))
        });
        let index = self.links.len();
        self.graph.add_edge(from, to, (index, 0));
        self.graph.add_edge(to, from, (index, 1));
        self.links.push(LinkView {
            link,
            reports: [None, None],
            alarms: [None, None],
        });
        Ok(())
    }

    /// Whether the node has a link.
    #[must_use]
    pub fn knows(&self, node: &NodeId) -> bool {
        self.nodes.contains_key(node)
    }

    /// All links and what is known of them, in the configured order.
    #[must_use]
    pub fn links(&self) -> &[LinkView] {
        &self.links
    }

    /// Takes what `from` tells about one of its links; false if it has no such link.
    pub fn report(&mut self, from: &NodeId, report: LinkReport) -> bool {
        let Some((link, end)) = self.find(from, &report.peer) else {
            return false;
        };
        self.links[link].reports[end] = Some(report);
        true
    }

    /// Takes an alarm that `from` raises or ends on one of its links; false if it has no such link.
    pub fn alarm(&mut self, from: &NodeId, alarm: AlarmReport) -> bool {
        let Some((link, end)) = self.find(from, &alarm.peer) else {
            return false;
        };
        self.links[link].alarms[end] = alarm.raised.then_some(alarm.text);
        true
    }

    /// The node of a destination, if it is known.
    #[must_use]
    pub fn node_of(&self, destination: &Destination) -> Option<NodeId> {
        match destination {
            Destination::Node(node) => self.knows(node).then(|| node.clone()),
            Destination::App(app) => self.apps.get(app).cloned(),
        }
    }

    /// The cheapest route, both ends included; of equal ones always the same. `None`: there is none.
    #[must_use]
    pub fn route(&self, from: &NodeId, to: &NodeId) -> Option<Vec<NodeId>> {
        let (start, goal) = (*self.nodes.get(from)?, *self.nodes.get(to)?);
        let costs = self.costs(goal, None);
        costs.get(&start)?;
        let mut route = vec![from.clone()];
        let mut at = start;
        while at != goal {
            // Every step comes strictly nearer, since no link is free.
            at = *self.steps(at, &costs).first()?;
            route.push(self.graph[at].clone());
        }
        Some(route)
    }

    /// The neighbours of `from` over which `to` can be reached without coming back, best first.
    #[must_use]
    pub fn next_hops(&self, from: &NodeId, to: &NodeId) -> Vec<NodeId> {
        let (Some(&start), Some(&goal)) = (self.nodes.get(from), self.nodes.get(to)) else {
            return Vec::new();
        };
        if start == goal {
            return Vec::new();
        }
        let steps = self.steps(start, &self.costs(goal, Some(start)));
        steps.iter().map(|&next| self.graph[next].clone()).collect()
    }

    /// What it costs to reach `goal` from everywhere, through anyone but `without`.
    fn costs(&self, goal: NodeIndex, without: Option<NodeIndex>) -> HashMap<NodeIndex, u64> {
        let usable = EdgeFiltered::from_fn(&self.graph, |edge: EdgeReference<'_, _>| {
            Some(edge.source()) != without && self.cost(*edge.weight()).is_some()
        });
        // Only usable edges are asked for their cost.
        let cost = |edge: &(usize, usize)| self.cost(*edge).unwrap_or(u64::from(u32::MAX));
        dijkstra(Reversed(&usable), goal, None, |edge| cost(edge.weight()))
            .into_iter()
            .collect()
    }

    /// The neighbours that lead on, best first, by ID where they are equal.
    fn steps(&self, at: NodeIndex, costs: &HashMap<NodeIndex, u64>) -> Vec<NodeIndex> {
        let mut steps: Vec<(u64, &NodeId, NodeIndex)> = self
            .graph
            .edges(at)
            .filter_map(|edge| {
                let next = edge.target();
                let cost = self.cost(*edge.weight())?.checked_add(*costs.get(&next)?)?;
                Some((cost, &self.graph[next], next))
            })
            .collect();
        steps.sort();
        steps.into_iter().map(|(.., next)| next).collect()
    }

    /// What it costs to cross a link from its end `from`; `None`: it cannot be crossed.
    fn cost(&self, (link, from): (usize, usize)) -> Option<u64> {
        let view = &self.links[link];
        let reports = || view.reports.iter().flatten();
        if reports().any(|report| report.state == LinkState::Down)
            || view.alarms.iter().any(Option::is_some)
        {
            return None;
        }
        let weight = u64::from(view.link.weight);
        // The end that sends knows best what it can send.
        let sender = view.reports[from]
            .as_ref()
            .map(|report| report.outgoing_bits);
        let receiver = view.reports[1 - from]
            .as_ref()
            .map(|report| report.incoming_bits);
        let Some(stock_bits) = sender.or(receiver) else {
            return Some(weight);
        };
        let rate = reports()
            .map(|report| report.key_rate_bits_per_second)
            .max();
        match stock_bits {
            0 if rate == Some(0) => None,
            _ if stock_bits < self.low_stock_bits => Some(weight * LOW_STOCK_FACTOR),
            _ => Some(weight),
        }
    }

    /// A link by its ends, and which of them `from` is.
    fn find(&self, from: &NodeId, to: &NodeId) -> Option<(usize, usize)> {
        let (from, to) = (self.nodes.get(from)?, self.nodes.get(to)?);
        let edge = self.graph.find_edge(*from, *to)?;
        self.graph.edge_weight(edge).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: &str) -> NodeId {
        id.parse().unwrap()
    }

    fn link(a: &str, b: &str, weight: u32) -> NetworkLink {
        NetworkLink {
            a: node(a),
            b: node(b),
            weight,
        }
    }

    /// a - b - d and a - c - d, the second a little longer; d - e; f - g apart.
    fn network() -> Topology {
        let links = [
            ("a", "b", 1),
            ("b", "d", 1),
            ("a", "c", 1),
            ("c", "d", 2),
            ("d", "e", 1),
            ("f", "g", 1),
        ];
        let links = links.map(|(a, b, weight)| link(a, b, weight));
        let apps = [("video".parse().unwrap(), node("e"))];
        Topology::new(links.into(), apps.into(), 1000).unwrap()
    }

    fn names(nodes: &[NodeId]) -> String {
        nodes.iter().map(NodeId::as_str).collect()
    }

    fn route(network: &Topology, from: &str, to: &str) -> Option<String> {
        network
            .route(&node(from), &node(to))
            .map(|route| names(&route))
    }

    fn report(peer: &str, outgoing_bits: u64) -> LinkReport {
        LinkReport {
            peer: node(peer),
            outgoing_bits,
            incoming_bits: 5000,
            key_rate_bits_per_second: 100,
            state: LinkState::Up,
        }
    }

    fn alarm(peer: &str, raised: bool) -> AlarmReport {
        AlarmReport {
            peer: node(peer),
            raised,
            text: "QBER".to_owned(),
        }
    }

    #[test]
    fn the_cheapest_route_is_taken_and_of_equal_ones_the_first_by_id() {
        let network = network();
        assert_eq!(route(&network, "a", "e").as_deref(), Some("abde"));
        assert_eq!(route(&network, "e", "a").as_deref(), Some("edba"));
        assert_eq!(route(&network, "b", "c").as_deref(), Some("bac"));
        assert_eq!(route(&network, "a", "a").as_deref(), Some("a"));
        assert_eq!(route(&network, "a", "f"), None);
        assert_eq!(route(&network, "a", "x"), None);
    }

    #[test]
    fn next_hops_lead_there_without_coming_back() {
        let network = network();
        let hops = |from, to| names(&network.next_hops(&node(from), &node(to)));
        assert_eq!(hops("a", "e"), "bc");
        assert_eq!(hops("a", "c"), "cb");
        assert_eq!(
            hops("d", "e"),
            "e",
            "b and c would have to come back over d"
        );
        assert_eq!(hops("a", "g"), "");
        assert_eq!(hops("a", "a"), "");
    }

    #[test]
    fn a_link_that_is_down_or_alarmed_carries_nothing_until_that_is_over() {
        let mut network = network();
        let down = LinkReport {
            state: LinkState::Down,
            ..report("b", 5000)
        };
        assert!(network.report(&node("d"), down));
        assert_eq!(route(&network, "a", "e").as_deref(), Some("acde"));
        assert!(network.alarm(&node("c"), alarm("a", true)));
        assert_eq!(route(&network, "a", "e"), None);
        assert!(network.alarm(&node("c"), alarm("a", false)));
        assert!(network.report(&node("d"), report("b", 5000)));
        assert_eq!(route(&network, "a", "e").as_deref(), Some("abde"));
    }

    #[test]
    fn little_pad_is_worth_a_detour_in_that_direction_only() {
        let mut network = network();
        network.report(&node("a"), report("b", 999));
        assert_eq!(route(&network, "a", "e").as_deref(), Some("acde"));
        assert_eq!(route(&network, "e", "a").as_deref(), Some("edba"));
        assert_eq!(
            route(&network, "a", "b").as_deref(),
            Some("acdb"),
            "a detour of 4 for 16"
        );
        network.report(&node("f"), report("g", 1));
        assert_eq!(
            route(&network, "f", "g").as_deref(),
            Some("fg"),
            "there is no other way"
        );
    }

    #[test]
    fn without_pad_and_without_rate_a_link_is_no_way() {
        let mut network = network();
        network.report(&node("d"), report("e", 0));
        assert_eq!(
            route(&network, "a", "e").as_deref(),
            Some("abde"),
            "it refills"
        );
        let dry = LinkReport {
            key_rate_bits_per_second: 0,
            ..report("e", 0)
        };
        network.report(&node("d"), dry);
        assert_eq!(route(&network, "a", "e"), None);
        assert_eq!(route(&network, "e", "a").as_deref(), Some("edba"));
    }

    #[test]
    fn a_node_is_heard_on_its_own_links_only() {
        let mut network = network();
        assert!(!network.report(&node("a"), report("d", 1)));
        assert!(!network.report(&node("x"), report("a", 1)));
        assert!(!network.alarm(&node("a"), alarm("e", true)));
        assert_eq!(route(&network, "a", "e").as_deref(), Some("abde"));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let new = |links: Vec<NetworkLink>, apps| Topology::new(links, apps, 0).map(|_| ());
        let none = BTreeMap::new();
        assert!(matches!(
            new(vec![link("a", "a", 1)], none.clone()),
            Err(TopologyError::Loop { .. })
        ));
        assert!(matches!(
            new(vec![link("a", "b", 0)], none.clone()),
            Err(TopologyError::Weightless { .. })
        ));
        let twice = vec![link("a", "b", 1), link("b", "a", 1)];
        assert!(matches!(new(twice, none), Err(TopologyError::Twice { .. })));
        let apps = [("x".parse().unwrap(), node("z"))].into();
        assert!(matches!(
            new(vec![link("a", "b", 1)], apps),
            Err(TopologyError::Nowhere { .. })
        ));
    }

    #[test]
    fn a_ring_of_a_thousand_nodes_is_crossed_the_short_way() {
        let name = |i: usize| format!("n{:04}", i % 1000);
        let links = (0..1000).map(|i| link(&name(i), &name(i + 1), 1)).collect();
        let network = Topology::new(links, BTreeMap::new(), 0).unwrap();
        let route = network.route(&node("n0000"), &node("n0400")).unwrap();
        assert_eq!(route.len(), 401);
        let route = network.route(&node("n0000"), &node("n0600")).unwrap();
        assert_eq!(route.len(), 401);
    }
}
