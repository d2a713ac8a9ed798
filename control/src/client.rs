//! The key manager's end of Ck.
//!
//! A route is checked before it is believed (a controller may be wrong or hostile): it must begin at
//! a neighbour, visit nobody twice, stay under the hop limit, and end where it was asked to.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use qkd_keyfile::{Mono, NodeId, Now, Protocol};

use crate::messages::{
    AlarmReport, Command, Destination, End, Fault, LinkReport, MAX_REPORTED_LINKS, Message,
    Received, RequestId, SUCCESS, receive,
};

mod check;

pub use check::{BadRoute, RouteFailure};

/// Questions without an answer, and relays without a result, at most.
const MAX_OPEN: usize = 1024;
/// Message IDs of a controller's own requests have this bit, those of a key manager do not.
const CONTROLLERS_ID: u32 = 1 << 31;
/// The result of a relay request that answers no open question.
const UNKNOWN_REQUEST: &str = "unknown-request";

/// What the key manager knows of itself.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// This node.
    pub me: NodeId,
    /// The nodes that it has links with; a route must begin at one of them.
    pub neighbours: BTreeSet<NodeId>,
    /// Nodes between source and destination, at most.
    pub max_transit: usize,
    /// How long a question may stay open.
    pub answer_within: Duration,
    /// No private codes: nothing is reported.
    pub strict: bool,
}

impl ClientConfig {
    /// The usual bounds: 16 nodes in between, 10 s.
    #[must_use]
    pub fn new(me: NodeId, neighbours: BTreeSet<NodeId>) -> Self {
        Self {
            me,
            neighbours,
            max_transit: 16,
            answer_within: Duration::from_secs(10),
            strict: false,
        }
    }
}

/// A question that was asked, until its event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueryId(u32);

/// Why a question cannot be asked. Nothing was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// The controller is not connected; ask again later.
    #[error("the controller is not connected")]
    NotConnected,
    /// Too many questions are open; wait for answers.
    #[error("{MAX_OPEN} questions are open")]
    Busy,
}

/// What came of something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientEvent {
    /// The answer to [`Client::ask_next_hops`].
    NextHops {
        /// The question.
        query: QueryId,
        /// The destination's node, where an application was asked for.
        destination: Option<NodeId>,
        /// Neighbours that lead there, the best first; at least one.
        next: Vec<NodeId>,
    },
    /// The answer to [`Client::ask_route`]. Tell how the relay ended: [`Client::relay_ended`].
    Route {
        /// The question.
        query: QueryId,
        /// Where it ends.
        destination: NodeId,
        /// The nodes between, in order; none: the destination is a neighbour.
        transit: Vec<NodeId>,
    },
    /// There is no answer to a question, or none that helps.
    Failed {
        /// The question.
        query: QueryId,
        /// Why.
        failure: RouteFailure,
    },
    /// The controller does not take a report.
    ReportRefused {
        /// Its reason.
        reason: String,
    },
    /// The controller does not answer: the connection should be made anew.
    Unresponsive,
}

/// The key manager's end of a connection, and of those that follow when it ends.
#[derive(Debug)]
pub struct Client {
    config: ClientConfig,
    connected: bool,
    next_id: u32,
    open: BTreeMap<u32, Open>,
    /// Routes told, whose relays have not ended; the oldest is forgotten.
    relays: VecDeque<(QueryId, Option<RequestId>)>,
    /// What the controller must know of every link, for the next connection too.
    status: BTreeMap<NodeId, LinkReport>,
    alarms: BTreeMap<NodeId, AlarmReport>,
    out: VecDeque<Vec<u8>>,
    events: VecDeque<ClientEvent>,
}

#[derive(Debug)]
struct Open {
    until: Mono,
    asked: Asked,
}

#[derive(Debug)]
enum Asked {
    NextHops(Destination),
    Route(Destination),
    Report,
}

impl Client {
    /// Begins unconnected. `first_message_id` should be random.
    #[must_use]
    pub fn new(config: ClientConfig, first_message_id: u32) -> Self {
        Self {
            config,
            connected: false,
            next_id: first_message_id & !CONTROLLERS_ID,
            open: BTreeMap::new(),
            relays: VecDeque::new(),
            status: BTreeMap::new(),
            alarms: BTreeMap::new(),
            out: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// A connection stands: questions can be asked, and the last reports go out again.
    pub fn connected(&mut self, now: Now) {
        self.connected = true;
        let links: Vec<LinkReport> = self.status.values().cloned().collect();
        self.send_status(now, &links);
        for alarm in self.alarms.values().cloned().collect::<Vec<_>>() {
            self.send_report(now, &Message::AlarmReport(alarm));
        }
    }

    /// The connection ended: every open question fails, and relays that end now are not told.
    pub fn connection_lost(&mut self) {
        self.connected = false;
        self.out.clear();
        self.relays.clear();
        for (id, open) in std::mem::take(&mut self.open) {
            self.fail(id, &open.asked, RouteFailure::Lost);
        }
    }

    /// Asks for the next hops of a route that began at `source` (distributed).
    ///
    /// # Errors
    ///
    /// [`AskError`]: nothing was sent, no event follows.
    pub fn ask_next_hops(
        &mut self,
        now: Now,
        source: Option<NodeId>,
        destination: Destination,
    ) -> Result<QueryId, AskError> {
        let message = Message::NextHopRequest {
            source,
            destination: destination.clone(),
        };
        self.ask(now, &message, Asked::NextHops(destination))
    }

    /// Asks for a whole route from here (centralised).
    ///
    /// # Errors
    ///
    /// [`AskError`]: nothing was sent, no event follows.
    pub fn ask_route(&mut self, now: Now, destination: Destination) -> Result<QueryId, AskError> {
        let message = Message::NotifyRelayRequest {
            source: Some(self.config.me.clone()),
            destination: destination.clone(),
        };
        self.ask(now, &message, Asked::Route(destination))
    }

    /// Tells how the relay over a route ended: `Err` with a short reason if it failed. Once per
    /// [`ClientEvent::Route`]; ignored after a reconnect, since the controller has forgotten it.
    pub fn relay_ended(&mut self, query: QueryId, result: Result<(), &str>) {
        let Some(at) = self.relays.iter().position(|(relay, _)| *relay == query) else {
            return;
        };
        let request_id = self
            .relays
            .remove(at)
            .and_then(|(_, request_id)| request_id);
        let response = result.err().unwrap_or(SUCCESS);
        self.send_result(query.0, response, request_id);
    }

    /// Reports the state of links; what was last reported is sent again after a reconnect.
    pub fn report_status(&mut self, now: Now, links: Vec<LinkReport>) {
        for link in &links {
            self.status.insert(link.peer.clone(), link.clone());
        }
        if self.connected {
            self.send_status(now, &links);
        }
    }

    /// Reports an alarm, raised or over; one that lasts is sent again after a reconnect.
    pub fn report_alarm(&mut self, now: Now, alarm: AlarmReport) {
        if self.connected {
            self.send_report(now, &Message::AlarmReport(alarm.clone()));
        }
        // Also one that is over: the controller may have missed that.
        self.alarms.insert(alarm.peer.clone(), alarm);
    }

    /// What has happened, oldest first.
    pub fn poll_event(&mut self) -> Option<ClientEvent> {
        self.events.pop_front()
    }

    fn ask(&mut self, now: Now, message: &Message, asked: Asked) -> Result<QueryId, AskError> {
        if !self.connected {
            return Err(AskError::NotConnected);
        }
        if self.open.len() >= MAX_OPEN {
            return Err(AskError::Busy);
        }
        while self.open.contains_key(&self.next_id) {
            self.advance_id();
        }
        let id = self.next_id;
        self.advance_id();
        // Two names of 64 characters always fit; if not, the question times out.
        self.out.extend(message.encode(id));
        let until = now.mono.after(self.config.answer_within);
        self.open.insert(id, Open { until, asked });
        Ok(QueryId(id))
    }

    fn advance_id(&mut self) {
        self.next_id = self.next_id.wrapping_add(1) & !CONTROLLERS_ID;
    }

    fn send_status(&mut self, now: Now, links: &[LinkReport]) {
        for links in links.chunks(MAX_REPORTED_LINKS) {
            let links = links.to_vec();
            self.send_report(now, &Message::StatusReport { links });
        }
    }

    /// A report that finds too many questions open is left out: there will be a next one, and the
    /// controller is late anyway.
    fn send_report(&mut self, now: Now, report: &Message) {
        if !self.config.strict {
            let _ = self.ask(now, report, Asked::Report);
        }
    }

    fn send_result(&mut self, message_id: u32, response: &str, request_id: Option<RequestId>) {
        let message = Message::RelayResponse {
            response: response.to_owned(),
            request_id,
        };
        self.out.extend(message.encode(message_id));
    }

    fn take(&mut self, message_id: u32, message: Message) {
        match message {
            Message::NextHopResponse {
                destination,
                next,
                error,
                ..
            } => {
                let Some(asked) = self.close(message_id, Command::NextHopResponse) else {
                    return;
                };
                match check::hops(&self.config, &asked, destination.as_ref(), next, error) {
                    Ok(next) => self.events.push_back(ClientEvent::NextHops {
                        query: QueryId(message_id),
                        destination,
                        next,
                    }),
                    Err(failure) => self.fail(message_id, &asked, failure),
                }
            }
            Message::RelayRequest {
                destination,
                transit,
                request_id,
                error,
                ..
            } => {
                let Some(asked) = self.close(message_id, Command::RelayRequest) else {
                    // Late, or the controller's own idea, which nobody here has permitted.
                    if error.is_none() {
                        self.send_result(message_id, UNKNOWN_REQUEST, request_id);
                    }
                    return;
                };
                match check::route(&self.config, &asked, &destination, &transit, error) {
                    Ok(()) => self.accept_route(message_id, destination, transit, request_id),
                    Err(failure) => {
                        if let RouteFailure::Unacceptable(bad) = &failure {
                            self.send_result(message_id, &bad.to_string(), request_id);
                        }
                        self.fail(message_id, &asked, failure);
                    }
                }
            }
            Message::ReportResponse { response } => {
                let known = self.close(message_id, Command::ReportResponse).is_some();
                if known && response != SUCCESS {
                    self.events
                        .push_back(ClientEvent::ReportRefused { reason: response });
                }
            }
            // `receive` lets no message of the key manager's through.
            Message::NextHopRequest { .. }
            | Message::NotifyRelayRequest { .. }
            | Message::RelayResponse { .. }
            | Message::StatusReport { .. }
            | Message::AlarmReport(_) => {}
        }
    }

    /// The open question that `answer` answers; it is open no more.
    fn close(&mut self, message_id: u32, answer: Command) -> Option<Asked> {
        let expected = match self.open.get(&message_id)?.asked {
            Asked::NextHops(_) => Command::NextHopResponse,
            Asked::Route(_) => Command::RelayRequest,
            Asked::Report => Command::ReportResponse,
        };
        if answer != expected {
            return None;
        }
        self.open.remove(&message_id).map(|open| open.asked)
    }

    fn accept_route(
        &mut self,
        message_id: u32,
        destination: NodeId,
        transit: Vec<NodeId>,
        request_id: Option<RequestId>,
    ) {
        let query = QueryId(message_id);
        if self.relays.len() == MAX_OPEN {
            self.relays.pop_front();
        }
        self.relays.push_back((query, request_id));
        self.events.push_back(ClientEvent::Route {
            query,
            destination,
            transit,
        });
    }

    /// Reports are nobody's question: their failure is no event.
    fn fail(&mut self, message_id: u32, asked: &Asked, failure: RouteFailure) {
        if !matches!(asked, Asked::Report) {
            let query = QueryId(message_id);
            self.events
                .push_back(ClientEvent::Failed { query, failure });
        }
    }
}

impl Protocol for Client {
    type Error = Fault;

    fn receive(&mut self, _now: Now, message: &[u8]) -> Result<(), Fault> {
        let Received {
            message_id,
            command,
            content,
        } = receive(message, End::Controller, self.config.strict)?;
        match content {
            Ok(message) => self.take(message_id, message),
            Err(bad) => {
                tracing::warn!(?command, %bad, "the controller's answer cannot be read");
                if let Some(asked) = self.close(message_id, command) {
                    self.fail(message_id, &asked, RouteFailure::Malformed);
                }
                if command == Command::RelayRequest {
                    self.send_result(message_id, &bad.to_string(), None);
                }
            }
        }
        Ok(())
    }

    fn poll_transmit(&mut self, _now: Now) -> Option<Vec<u8>> {
        self.out.pop_front()
    }

    fn poll_timeout(&self) -> Option<Mono> {
        self.open.values().map(|open| open.until).min()
    }

    fn handle_timeout(&mut self, now: Now) {
        let late: Vec<u32> = self
            .open
            .iter()
            .filter(|(_, open)| open.until <= now.mono)
            .map(|(id, _)| *id)
            .collect();
        for id in &late {
            if let Some(open) = self.open.remove(id) {
                self.fail(*id, &open.asked, RouteFailure::TimedOut);
            }
        }
        if !late.is_empty() {
            self.events.push_back(ClientEvent::Unresponsive);
        }
    }
}
