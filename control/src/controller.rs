//! The controller's end of Ck.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use qkd_keyfile::{Entropy, Mono, NodeId, Now, Protocol};

use crate::{
    messages::{
        Command, Destination, End, Fault, Message, NO_ROUTE, Received, RequestId, SUCCESS, receive,
    },
    topology::Topology,
};

/// Relays of one node that have not been answered yet, at most; the oldest is forgotten.
const MAX_OPEN_RELAYS: usize = 1024;
/// The reason when the destination is no node and no application of the network.
const UNKNOWN_DESTINATION: &str = "unknown-destination";
/// The reason when a node asks for a route that begins elsewhere.
const NOT_THE_SOURCE: &str = "not-the-source";
/// The reason when a node reports about a link that is not its own.
const UNKNOWN_LINK: &str = "unknown-link";

/// What all connections of a controller share.
pub struct Controller {
    strict: bool,
    state: Mutex<State>,
}

struct State {
    topology: Topology,
    entropy: Box<dyn Entropy>,
    counters: ControllerCounters,
}

/// What a controller has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ControllerCounters {
    /// Next hops told.
    pub next_hops: u64,
    /// Whole routes told.
    pub routes: u64,
    /// Questions without a route.
    pub no_routes: u64,
    /// Relays that ended well.
    pub relays_done: u64,
    /// Relays that failed.
    pub relays_failed: u64,
    /// Results of relays that nobody had asked for, or that came twice.
    pub unknown_results: u64,
    /// Status reports taken.
    pub status_reports: u64,
    /// Alarms taken, raised or over.
    pub alarms: u64,
    /// Messages that could not be read, or reports about links of others.
    pub refused: u64,
}

impl Controller {
    /// A controller of this network. `strict` turns the private codes off, and with them reports.
    #[must_use]
    pub fn new(topology: Topology, entropy: Box<dyn Entropy>, strict: bool) -> Arc<Self> {
        Arc::new(Self {
            strict,
            state: Mutex::new(State {
                topology,
                entropy,
                counters: ControllerCounters::default(),
            }),
        })
    }

    /// The end of a connection with `node`, who must be who its certificate says.
    #[must_use]
    pub fn session(self: &Arc<Self>, node: NodeId) -> Session {
        Session {
            controller: self.clone(),
            node,
            out: VecDeque::new(),
            open: VecDeque::new(),
        }
    }

    /// What has been done so far.
    #[must_use]
    pub fn counters(&self) -> ControllerCounters {
        self.lock().counters
    }

    /// Looks at the network, or changes it (an alarm that a person ends by hand). Keep it short: all
    /// connections wait.
    pub fn with_topology<R>(&self, use_it: impl FnOnce(&mut Topology) -> R) -> R {
        use_it(&mut self.lock().topology)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller")
            .field("strict", &self.strict)
            .field("counters", &self.counters())
            .finish_non_exhaustive()
    }
}

/// One connection with one node.
#[derive(Debug)]
pub struct Session {
    controller: Arc<Controller>,
    node: NodeId,
    out: VecDeque<Vec<u8>>,
    /// Relays ordered and not answered, by message and by request ID.
    open: VecDeque<(u32, RequestId)>,
}

impl Protocol for Session {
    type Error = Fault;

    fn receive(&mut self, _now: Now, message: &[u8]) -> Result<(), Fault> {
        let Received {
            message_id,
            command,
            content,
        } = receive(message, End::Km, self.controller.strict)?;
        let answer = match content {
            Ok(message) => self.act(message_id, message),
            Err(bad) => {
                self.controller.lock().counters.refused += 1;
                tracing::warn!(node = %self.node, ?command, %bad, "message refused");
                self.refuse(command, &bad.to_string())
            }
        };
        if let Some(answer) = answer {
            self.send(message_id, &answer);
        }
        Ok(())
    }

    fn poll_transmit(&mut self, _now: Now) -> Option<Vec<u8>> {
        self.out.pop_front()
    }

    fn poll_timeout(&self) -> Option<Mono> {
        None
    }

    fn handle_timeout(&mut self, _now: Now) {}
}

impl Session {
    /// The answer to a message, if it has one.
    fn act(&mut self, message_id: u32, message: Message) -> Option<Message> {
        match message {
            Message::NextHopRequest {
                source,
                destination,
            } => Some(self.next_hops(source, &destination)),
            Message::NotifyRelayRequest {
                source,
                destination,
            } => Some(self.route(message_id, source, &destination)),
            Message::RelayResponse {
                response,
                request_id,
            } => {
                self.relay_ended(message_id, &response, request_id.as_ref());
                None
            }
            Message::StatusReport { links } => {
                let mut state = self.controller.lock();
                let mut all_known = true;
                for link in links {
                    all_known &= state.topology.report(&self.node, link);
                }
                state.counters.status_reports += 1;
                Some(state.report_response(all_known))
            }
            Message::AlarmReport(alarm) => {
                tracing::warn!(node = %self.node, peer = %alarm.peer, raised = alarm.raised,
                    text = ?alarm.text, "alarm on a link");
                let mut state = self.controller.lock();
                let known = state.topology.alarm(&self.node, alarm);
                state.counters.alarms += 1;
                Some(state.report_response(known))
            }
            // `receive` lets no message of the controller's through.
            Message::NextHopResponse { .. }
            | Message::RelayRequest { .. }
            | Message::ReportResponse { .. } => None,
        }
    }

    /// Distributed: this hop only. The source of the whole route is somebody before, so it may be
    /// anyone.
    fn next_hops(&self, source: Option<NodeId>, destination: &Destination) -> Message {
        let mut state = self.controller.lock();
        let node = state.topology.node_of(destination);
        let next = match &node {
            Some(to) => state.topology.next_hops(&self.node, to),
            None => Vec::new(),
        };
        let error = match (&node, next.is_empty()) {
            (None, _) => Some(UNKNOWN_DESTINATION.to_owned()),
            (Some(_), true) => Some(NO_ROUTE.to_owned()),
            (Some(_), false) => None,
        };
        state.count_route(error.is_some(), |counters| &mut counters.next_hops);
        Message::NextHopResponse {
            source,
            destination: node,
            next,
            error,
        }
    }

    /// Centralised: the whole route, which begins at the node that asks.
    fn route(
        &mut self,
        message_id: u32,
        source: Option<NodeId>,
        destination: &Destination,
    ) -> Message {
        let mut state = self.controller.lock();
        let found = if source.is_some_and(|source| source != self.node) {
            Err(NOT_THE_SOURCE)
        } else {
            let node = state.topology.node_of(destination);
            node.ok_or(UNKNOWN_DESTINATION).and_then(|to| {
                let route = state.topology.route(&self.node, &to).ok_or(NO_ROUTE)?;
                // Keys for one's own node need no relay, and no relay can be ordered.
                let (_, transit) = route[..].split_last().ok_or(NO_ROUTE)?;
                let (_, transit) = transit.split_first().ok_or(NO_ROUTE)?;
                Ok((to, transit.to_vec()))
            })
        };
        state.count_route(found.is_err(), |counters| &mut counters.routes);
        let (to, transit) = match found {
            Ok(found) => found,
            Err(reason) => return self.no_route(reason),
        };
        let mut random = [0; 16];
        state.entropy.fill(&mut random);
        drop(state);
        let request_id = self.open_relay(message_id, random);
        Message::RelayRequest {
            source: Some(self.node.clone()),
            destination: to,
            transit,
            request_id,
            error: None,
        }
    }

    fn open_relay(&mut self, message_id: u32, random: [u8; 16]) -> Option<RequestId> {
        let uuid = uuid::Builder::from_random_bytes(random).into_uuid();
        let request_id: RequestId = uuid.to_string().parse().ok()?;
        if self.open.len() == MAX_OPEN_RELAYS {
            self.open.pop_front();
        }
        self.open.push_back((message_id, request_id.clone()));
        Some(request_id)
    }

    /// By request ID where there is one, by message ID otherwise.
    fn relay_ended(&mut self, message_id: u32, response: &str, request_id: Option<&RequestId>) {
        let open = self
            .open
            .iter()
            .position(|(message, request)| match request_id {
                Some(id) => id == request,
                None => message_id == *message,
            });
        let mut state = self.controller.lock();
        let Some(open) = open else {
            state.counters.unknown_results += 1;
            return;
        };
        self.open.remove(open);
        if response == SUCCESS {
            state.counters.relays_done += 1;
        } else {
            state.counters.relays_failed += 1;
            tracing::info!(node = %self.node, reason = ?response, "relay failed");
        }
    }

    /// The answer to a request that cannot be read.
    fn refuse(&self, command: Command, reason: &str) -> Option<Message> {
        match command {
            Command::NextHopRequest => Some(Message::NextHopResponse {
                source: None,
                destination: None,
                next: Vec::new(),
                error: Some(reason.to_owned()),
            }),
            Command::NotifyRelayRequest => Some(self.no_route(reason)),
            Command::StatusReport | Command::AlarmReport => Some(Message::ReportResponse {
                response: reason.to_owned(),
            }),
            Command::RelayResponse
            | Command::NextHopResponse
            | Command::RelayRequest
            | Command::ReportResponse => None,
        }
    }

    /// The destination is mandatory and may be unknown. The node's own ID stands for it: a relay to
    /// oneself is one that nobody begins, even if they do not read the extension.
    fn no_route(&self, reason: &str) -> Message {
        Message::RelayRequest {
            source: Some(self.node.clone()),
            destination: self.node.clone(),
            transit: Vec::new(),
            request_id: None,
            error: Some(reason.to_owned()),
        }
    }

    fn send(&mut self, message_id: u32, answer: &Message) {
        match answer.encode(message_id) {
            Ok(bytes) => self.out.push_back(bytes),
            // A route of hundreds of hops with the longest of names; the question times out.
            Err(error) => tracing::error!(node = %self.node, %error, "answer not sent"),
        }
    }
}

impl State {
    fn count_route(
        &mut self,
        failed: bool,
        good: impl FnOnce(&mut ControllerCounters) -> &mut u64,
    ) {
        match failed {
            true => self.counters.no_routes += 1,
            false => *good(&mut self.counters) += 1,
        }
    }

    fn report_response(&mut self, all_known: bool) -> Message {
        let response = if all_known { SUCCESS } else { UNKNOWN_LINK };
        self.counters.refused += u64::from(!all_known);
        Message::ReportResponse {
            response: response.to_owned(),
        }
    }
}
