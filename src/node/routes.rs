//! The node's end of Ck: routes for the agent, reports for the controller.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use qkd_control::{
    AlarmReport, ClientConfig, ControllerLink, ControllerLinkConfig, Destination, LinkReport,
    LinkState, QueryId,
};
use qkd_keyfile::{LinkId, NodeId, StreamId};
use qkd_kma::{Alarm, Status};
use qkd_net::Reloadable;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{MissedTickBehavior, interval},
};

use super::{agent::Request, modules::Reports, random_u64, until_stop};
use crate::{config::Config, env::SystemClock};

/// Time between two reports.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// A route that has brought no unit to its end in this time is reported as failed.
const PROOF_WITHIN: Duration = Duration::from_secs(15);

/// Questions about routes that wait, at most.
const WANTED_MAX: usize = 16;

/// What the controller is told and asked about.
pub(super) struct Routes {
    me: NodeId,
    neighbours: Vec<NodeId>,
    link: ControllerLink<SystemClock>,
    wanted: mpsc::Receiver<NodeId>,
    alarms: mpsc::UnboundedReceiver<Alarm>,
    requests: mpsc::Sender<Request>,
    modules: Reports,
    /// Links that the controller was told not to use until a person has looked at them.
    quarantined: BTreeSet<NodeId>,
    /// Links that the controller was told not to use while their modules cannot be trusted.
    untrusted: BTreeSet<NodeId>,
    /// Routes in use that have yet to bring a unit to its end.
    unproven: Vec<Unproven>,
    /// Bits received on each link at the last report.
    received: BTreeMap<NodeId, (Instant, u64)>,
}

struct Unproven {
    query: QueryId,
    destination: NodeId,
    since: Instant,
    /// Units that had arrived before.
    confirmed: Option<u64>,
}

impl Routes {
    /// Connects to the configured controller, if there is one. The sender takes the destinations
    /// that a route is wanted to.
    pub(super) fn start(
        config: &Config,
        credentials: &Arc<Reloadable>,
        clock: SystemClock,
        requests: mpsc::Sender<Request>,
        alarms: mpsc::UnboundedReceiver<Alarm>,
        modules: Reports,
    ) -> Option<(Self, mpsc::Sender<NodeId>)> {
        let controller = config.controller.clone()?;
        let me = config.node.id.clone();
        let neighbours: Vec<NodeId> = config
            .links
            .iter()
            .map(|link| link.peer.get_ref().clone())
            .collect();
        let client = ClientConfig::new(me.clone(), neighbours.iter().cloned().collect());
        let link = ControllerLink::start(
            ControllerLinkConfig {
                controller: controller.id,
                address: controller.address,
                credentials: credentials.clone(),
                client,
                seed: random_u64(),
            },
            Arc::new(clock),
        );
        let (want, wanted) = mpsc::channel(WANTED_MAX);
        let this = Self {
            me,
            neighbours,
            link,
            wanted,
            alarms,
            requests,
            modules,
            quarantined: BTreeSet::new(),
            untrusted: BTreeSet::new(),
            unproven: Vec::new(),
            received: BTreeMap::new(),
        };
        Some((this, want))
    }

    /// Asks and reports until the node stops.
    pub(super) async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let mut reports = interval(REPORT_EVERY);
        reports.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let goes_on = tokio::select! {
                () = until_stop(&mut shutdown) => return,
                Some(alarm) = self.alarms.recv() => {
                    self.alarm(&alarm);
                    true
                }
                Some(destination) = self.wanted.recv() => self.ask(destination).await,
                _ = reports.tick() => self.report().await,
            };
            if !goes_on {
                return;
            }
        }
    }

    /// Gets a route for the agent; `false` if the agent is gone.
    async fn ask(&mut self, destination: NodeId) -> bool {
        let asked = Destination::Node(destination.clone());
        let route = match self.link.route(asked).await {
            Ok(route) => {
                self.unproven.push(Unproven {
                    query: route.query,
                    destination: destination.clone(),
                    since: Instant::now(),
                    confirmed: None,
                });
                let ends = (self.me.clone(), destination.clone());
                Some([vec![ends.0], route.transit, vec![ends.1]].concat())
            }
            Err(error) => {
                tracing::warn!(%destination, %error, "no route");
                None
            }
        };
        let answer = Request::Route { destination, route };
        self.requests.send(answer).await.is_ok()
    }

    /// An alarm that takes a link out of service until a person has looked at it.
    fn alarm(&mut self, alarm: &Alarm) {
        if let Some(peer) = alarm.quarantined_peer()
            && self.neighbours.contains(peer)
        {
            self.quarantined.insert(peer.clone());
            self.link.report_alarm(AlarmReport {
                peer: peer.clone(),
                raised: true,
                text: "the peer's store went back in time; the link is quarantined".to_owned(),
            });
        }
    }

    /// Alarms for links none of whose modules can be trusted (Y.3803 clause 8.2.5: a high QBER
    /// ends key generation between relay nodes), and their end.
    fn trust(&mut self) {
        let untrusted = self.modules.untrusted_links();
        let changed: Vec<NodeId> = (&untrusted ^ &self.untrusted).into_iter().collect();
        for peer in changed {
            // The controller keeps one alarm a link, and that one stays.
            if self.quarantined.contains(&peer) {
                continue;
            }
            let raised = untrusted.contains(&peer);
            let text = if raised {
                "no module of the link can be trusted: its values are out of their absolute range"
            } else {
                "a module of the link can be trusted again"
            };
            self.link.report_alarm(AlarmReport {
                peer,
                raised,
                text: text.to_owned(),
            });
        }
        self.untrusted = untrusted;
    }

    /// Tells the controller how the links are; `false` if the agent is gone.
    async fn report(&mut self) -> bool {
        let (reply, answer) = oneshot::channel();
        if self.requests.send(Request::Status(reply)).await.is_err() {
            return false;
        }
        let Ok(status) = answer.await else {
            return false;
        };
        let neighbours = self.neighbours.clone();
        let links = neighbours
            .iter()
            .filter_map(|peer| self.link_report(&status, peer))
            .collect();
        self.link.report_status(links);
        self.trust();
        self.prove(&status);
        true
    }

    fn link_report(&mut self, status: &Status, peer: &NodeId) -> Option<LinkReport> {
        let id = StreamId::Link(LinkId::between(&self.me, peer)?);
        let up = status.peers.iter().any(|(node, up)| node == peer && *up);
        let stream = status.streams.iter().find(|stream| stream.stream == id);
        let received_bits = stream.map_or(0, |s| s.accounts.received_bits);
        let now = Instant::now();
        let before = self.received.insert(peer.clone(), (now, received_bits));
        let rate = before.map_or(0, |(at, bits)| {
            let ms = now.duration_since(at).as_millis().max(1);
            let grown = u128::from(received_bits.saturating_sub(bits)) * 1000;
            u64::try_from(grown / ms).unwrap_or(u64::MAX)
        });
        Some(LinkReport {
            peer: peer.clone(),
            outgoing_bits: stream.map_or(0, |s| s.encrypting_bytes * 8),
            incoming_bits: stream.map_or(0, |s| s.decrypting_bytes * 8),
            key_rate_bits_per_second: rate,
            state: if up { LinkState::Up } else { LinkState::Down },
        })
    }

    /// Tells the controller which of its routes brought a unit to its end, and which did not.
    fn prove(&mut self, status: &Status) {
        let confirmed = |destination: &NodeId| {
            let id = StreamId::EndToEnd {
                source: self.me.clone(),
                destination: destination.clone(),
            };
            let stream = status.streams.iter().find(|stream| stream.stream == id);
            stream.map_or(0, |stream| stream.accounts.confirmed_segments)
        };
        let link = &self.link;
        self.unproven.retain_mut(|route| {
            let now = confirmed(&route.destination);
            let arrived = now > *route.confirmed.get_or_insert(now);
            let late = route.since.elapsed() > PROOF_WITHIN;
            if arrived {
                link.relay_ended(route.query, Ok(()));
            } else if late {
                link.relay_ended(route.query, Err("timeout"));
            }
            !arrived && !late
        });
    }
}
