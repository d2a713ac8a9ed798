//! The agent: every input goes to the part that it concerns.

use std::collections::BTreeMap;

use qkd_kernels::Backend;
use qkd_keyfile::{Entropy, LinkId, Mono, NodeId, Now, SegmentNumber, StreamId, metadata::KeyType};

use crate::{
    RESEND_AFTER, TICK,
    io::{Cx, Input, KmaConfig, Output},
    record::{BurnReason, DiscardReason, Stage},
    relay::{Relay, completion_again, release_again, release_fits},
    session::{Boot, Greeting, Session},
    store::{Store, StreamAccounts},
    supply::Supply,
    sync::LinkSync,
    vault::VaultError,
    wire::{MAX_ITEMS, Message},
};

/// A key management agent: one state machine per node, without sockets, clock or threads.
///
/// Feed it any number of inputs ([`handle`](Self::handle)), then [`commit`](Self::commit): what it
/// returns may be carried out, for all of it is durable. Between the two nothing leaves.
#[derive(Debug)]
pub struct Kma {
    config: KmaConfig,
    boot: Boot,
    store: Store,
    backend: Backend,
    links: BTreeMap<NodeId, LinkSync>,
    sessions: BTreeMap<NodeId, Session>,
    relay: Relay,
    supply: Supply,
    ticked: Option<Mono>,
    said_pending: Mono,
    out: Vec<Output>,
    failed: Option<VaultError>,
}

/// What a KMA is doing, for an operator. Quantities in bytes are usable key.
#[derive(Debug, Clone)]
pub struct Status {
    /// The books of every stream.
    pub streams: Vec<StreamAccounts>,
    /// Every other node, and whether it is connected and greeted.
    pub peers: Vec<(NodeId, bool)>,
    /// Bindings that no destination has acknowledged.
    pub outbox_bindings: usize,
    /// Bound keys that wait here for their applications.
    pub waiting_bindings: usize,
    /// Journal records that did not fit; 0.
    pub inconsistencies: u64,
}

impl Kma {
    /// An agent over an open store. `boot` is drawn at random for this process, and is the one that
    /// the store was opened with.
    #[must_use]
    pub fn new(config: KmaConfig, store: Store, boot: [u8; 16], backend: Backend) -> Self {
        let me = &config.node;
        let incarnation = store.incarnation();
        let links = config.neighbours.iter().filter_map(|(peer, link)| {
            let id = LinkId::between(me, peer)?;
            let sync = LinkSync::new(me, peer, id, link.clone(), config.digest_unit_bytes);
            Some((peer.clone(), sync))
        });
        Self {
            links: links.collect(),
            sessions: BTreeMap::new(),
            relay: Relay::new(&config, incarnation),
            supply: Supply::default(),
            boot: Boot { incarnation, boot },
            store,
            backend,
            ticked: None,
            said_pending: Mono::default(),
            out: Vec::new(),
            failed: None,
            config,
        }
    }

    /// Takes one input. `entropy` serves key IDs and, for relayed units, key bits.
    pub fn handle(&mut self, now: Now, entropy: &mut dyn Entropy, input: Input) {
        let mut cx = Cx {
            now,
            me: &self.config.node,
            store: &mut self.store,
            out: &mut self.out,
            backend: self.backend,
            failed: &mut self.failed,
        };
        match input {
            Input::PeerUp(peer) => {
                let session = self.sessions.entry(peer.clone());
                session
                    .or_insert_with(|| Session::new(&peer))
                    .up(&mut cx, self.boot);
            }
            Input::PeerDown(peer) => {
                if let Some(session) = self.sessions.get_mut(&peer) {
                    session.down();
                }
                if let Some(link) = self.links.get_mut(&peer) {
                    link.disconnected();
                }
            }
            Input::Message { peer, bytes } => match Message::decode(&bytes) {
                Some(message) => self.message(now, entropy, &peer, message),
                None => tracing::warn!(%peer, "message cannot be read"),
            },
            Input::Held { name, key_bits } => {
                let mut links = self.links.values_mut();
                match links.find(|link| link.knows_pair(&name.module_pair)) {
                    Some(link) => {
                        link.held(&mut cx, name, key_bits);
                        link.poll(&mut cx);
                    }
                    None => cx.settle(name, crate::io::Settlement::Dropped),
                }
            }
            Input::Lost(name) => {
                for link in self.links.values_mut() {
                    link.lost(&mut cx, &name);
                }
            }
            Input::Formatted { ticket, segment } => {
                if let Some(link) = self.links.get_mut(&ticket.peer) {
                    link.formatted(&mut cx, ticket.segment, segment);
                }
            }
            Input::Supply(order) => {
                self.supply.supply(&mut cx, &self.config, entropy, &order);
            }
            Input::SupplyById(order) => {
                self.supply.supply_by_id(&mut cx, &self.sessions, order);
            }
            Input::Route { destination, route } => self.relay.routed(&destination, route),
            Input::Tick => self.tick(now, entropy),
        }
    }

    /// When the next [`Input::Tick`] is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Mono {
        self.ticked.map_or(Mono::default(), |at| at.after(TICK))
    }

    /// Makes everything durable that was handled since the last call, and hands out what rests on
    /// it.
    ///
    /// # Errors
    ///
    /// The store failed. Nothing of this batch may leave the node; end the process, whose successor
    /// goes on from the last batch that was durable.
    pub fn commit(&mut self) -> Result<Vec<Output>, VaultError> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        self.store.commit()?;
        Ok(std::mem::take(&mut self.out))
    }

    /// What the agent is doing.
    #[must_use]
    pub fn status(&self) -> Status {
        let state = self.store.state();
        Status {
            streams: self.store.accounts(),
            peers: self
                .sessions
                .iter()
                .map(|(node, session)| (node.clone(), session.is_up()))
                .collect(),
            outbox_bindings: state.peers.values().map(|p| p.outbox.len()).sum(),
            waiting_bindings: state.received.len(),
            inconsistencies: state.inconsistencies,
        }
    }

    /// The store, to be read.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    fn tick(&mut self, now: Now, entropy: &mut dyn Entropy) {
        self.ticked = Some(now.mono);
        let mut cx = Cx {
            now,
            me: &self.config.node,
            store: &mut self.store,
            out: &mut self.out,
            backend: self.backend,
            failed: &mut self.failed,
        };
        for session in self.sessions.values_mut() {
            session.send_again(&mut cx, false);
        }
        for link in self.links.values_mut() {
            link.poll(&mut cx);
        }
        self.relay
            .poll(&mut cx, &self.config, &mut self.sessions, entropy);
        self.supply.poll(&mut cx, &self.sessions);
        if now.mono.since(self.said_pending) >= RESEND_AFTER {
            self.said_pending = now.mono;
            say_pending(&mut cx, &self.sessions);
            say_spent(&mut cx, &self.sessions);
            close_finished(&mut cx);
        }
    }

    fn message(&mut self, now: Now, entropy: &mut dyn Entropy, peer: &NodeId, message: Message) {
        let mut cx = Cx {
            now,
            me: &self.config.node,
            store: &mut self.store,
            out: &mut self.out,
            backend: self.backend,
            failed: &mut self.failed,
        };
        let cx = &mut cx;
        let Some(session) = self.sessions.get_mut(peer) else {
            return;
        };
        if let Message::Hello {
            version,
            incarnation,
            boot,
        } = message
        {
            let greeting = session.greeted(cx, self.boot, version, incarnation, boot);
            return self.greeted(now, peer, greeting);
        }
        if !session.is_up() {
            return;
        }
        match message {
            Message::Hello { .. } => {}
            Message::Marks { session: id, marks } => session.marks(cx, id, &marks),
            Message::MarksTaken { session: id } => session.marks_taken(id),
            Message::HopTaken {
                session: id,
                sequence,
            } => session.hop_taken(id, sequence),
            Message::Announce { .. } | Message::Propose { .. } | Message::Answer { .. } => {
                if let Some(link) = self.links.get_mut(peer) {
                    synchronise(cx, link, message);
                }
            }
            Message::Commit {
                stream,
                segment,
                release,
            } => commit(cx, peer, stream, segment, &release),
            Message::Committed { stream, segment } => {
                if stream.peer_of(cx.me) == Some(peer) {
                    cx.store.peer_confirmed(&stream, segment);
                }
            }
            Message::Pending { stream, segments } => pending(cx, peer, &stream, &segments),
            Message::Void { stream, segment } => void(cx, peer, &stream, segment),
            Message::Spent { stream, segments } => spent(cx, peer, stream, segments),
            Message::SpentTaken { stream, segments } => spent_taken(cx, peer, &stream, &segments),
            Message::Relay {
                header,
                ciphertext,
                tag,
            } => {
                let (config, sessions) = (&self.config, &mut self.sessions);
                self.relay
                    .hop(cx, config, sessions, peer, &header, &ciphertext, &tag);
            }
            Message::RelayFailed { route, segment } => self.relay.failed(cx, &route, segment),
            Message::Completion {
                stream,
                segment,
                tag,
            } => {
                if stream == crate::relay::stream_of(cx.me, peer) {
                    self.relay.completed(cx, peer, segment, &tag);
                    self.relay
                        .poll(cx, &self.config, &mut self.sessions, entropy);
                }
            }
            Message::Bindings { first, bindings } => {
                if session.accepting_id().is_some() {
                    self.supply.bindings(cx, peer, first, bindings);
                }
            }
            Message::BindingsTaken { next } => self.supply.bindings_taken(cx, peer, next),
            Message::AskBinding { key_ids } => self.supply.asked(cx, peer, key_ids),
            Message::AskedBindings { key_ids } => self.supply.told(cx, peer, &key_ids),
        }
    }

    fn greeted(&mut self, now: Now, peer: &NodeId, greeting: Greeting) {
        let mut cx = Cx {
            now,
            me: &self.config.node,
            store: &mut self.store,
            out: &mut self.out,
            backend: self.backend,
            failed: &mut self.failed,
        };
        if greeting == Greeting::Refused {
            return;
        }
        if let Some(link) = self.links.get_mut(peer) {
            if greeting == Greeting::Replaced {
                link.peer_replaced(&mut cx);
            }
            link.connected();
            link.poll(&mut cx);
        }
        if greeting == Greeting::Replaced {
            self.relay.peer_replaced(&mut cx, peer);
        }
        self.supply.connected(&mut cx, peer);
        self.said_pending = Mono::default();
    }
}

fn synchronise(cx: &mut Cx<'_>, link: &mut LinkSync, message: Message) {
    match message {
        Message::Announce {
            module_pair,
            generation,
            held,
            dropped,
        } if generation == qkd_keyfile::Generation::default() => {
            link.announced(cx, &module_pair, held, &dropped);
            link.poll(cx);
        }
        Message::Propose {
            segment,
            composition,
            proposer_key_type,
            kma_key_id,
            unit_bytes,
            tag,
        } => link.proposed(
            cx,
            segment,
            composition,
            proposer_key_type,
            kma_key_id,
            unit_bytes,
            tag,
        ),
        Message::Answer {
            segment,
            verdict,
            tag,
        } => {
            link.answered(cx, segment, verdict, &tag);
            link.poll(cx);
        }
        _ => {}
    }
}

/// The other end has stored a segment that this end answered: it may be used.
fn commit(
    cx: &mut Cx<'_>,
    peer: &NodeId,
    stream: StreamId,
    segment: SegmentNumber,
    release: &[u8; 16],
) {
    if stream.peer_of(cx.me) != Some(peer) {
        return;
    }
    let proven = match &stream {
        StreamId::Link(_) => true,
        StreamId::EndToEnd { .. } => {
            cx.store.segment(&stream, segment).is_none()
                || release_fits(cx, &stream, segment, release)
        }
    };
    if !proven {
        tracing::error!(%peer, %stream, %segment, "release does not fit the unit");
        cx.alarm(crate::io::Alarm::UnitMismatch { stream, segment });
        return;
    }
    cx.store.confirm(&stream, segment);
    cx.send(peer, &Message::Committed { stream, segment });
}

/// The other end waits for commits: say them again, or that there is nothing to commit.
fn pending(cx: &mut Cx<'_>, peer: &NodeId, stream: &StreamId, segments: &[SegmentNumber]) {
    if stream.peer_of(cx.me) != Some(peer) {
        return;
    }
    for &segment in segments {
        let known = cx.store.segment(stream, segment).is_some();
        let open = cx
            .store
            .stream(stream)
            .is_some_and(|s| s.proposed.contains(&segment));
        match (stream, known) {
            // Still under way here: the answer or completion will settle it.
            _ if open => {}
            (StreamId::EndToEnd { .. }, _) => release_again(cx, stream, segment),
            (StreamId::Link(_), true) => cx.send(
                peer,
                &Message::Commit {
                    stream: stream.clone(),
                    segment,
                    release: [0; 16],
                },
            ),
            (StreamId::Link(_), false) => cx.send(
                peer,
                &Message::Void {
                    stream: stream.clone(),
                    segment,
                },
            ),
        }
    }
}

/// The end that numbers the stream's segments says that one is void.
fn void(cx: &mut Cx<'_>, peer: &NodeId, stream: &StreamId, segment: SegmentNumber) {
    let numbers = match stream {
        StreamId::Link(link) => link.proposer() == peer,
        StreamId::EndToEnd { source, .. } => source == peer,
    };
    if numbers && stream.peer_of(cx.me) == Some(peer) {
        cx.store
            .discard(stream, segment, DiscardReason::PeerUnaware);
    }
}

/// The owner is done with segments: what it did not name is burned.
fn spent(cx: &mut Cx<'_>, peer: &NodeId, stream: StreamId, segments: Vec<SegmentNumber>) {
    if stream.peer_of(cx.me) != Some(peer) {
        return;
    }
    for &segment in &segments {
        let theirs = cx
            .store
            .segment(&stream, segment)
            .is_some_and(|s| s.key_type == KeyType::Decrypting && s.stage == Stage::Confirmed);
        if theirs {
            cx.store
                .burn_below(&stream, segment, u32::MAX, BurnReason::Closed);
        }
    }
    cx.send(peer, &Message::SpentTaken { stream, segments });
}

/// Both ends are done with segments of this end.
fn spent_taken(cx: &mut Cx<'_>, peer: &NodeId, stream: &StreamId, segments: &[SegmentNumber]) {
    if stream.peer_of(cx.me) != Some(peer) {
        return;
    }
    for &segment in segments {
        let done = cx.store.segment(stream, segment).is_some_and(|s| {
            s.key_type == KeyType::Encrypting && s.remaining_bytes() == 0 && s.bindings == 0
        });
        if done {
            cx.store.close(stream, segment);
        }
    }
}

/// What this end answered and the other has not confirmed, and what the other has not acknowledged.
fn say_pending(cx: &mut Cx<'_>, sessions: &BTreeMap<NodeId, Session>) {
    let mut messages = Vec::new();
    for (id, stream) in &cx.store.state().streams {
        let Some(peer) = id.peer_of(cx.me) else {
            continue;
        };
        if !sessions.get(peer).is_some_and(Session::is_up) {
            continue;
        }
        let answered = stream
            .segments
            .iter()
            .filter(|(_, s)| s.stage == Stage::Answered);
        let segments: Vec<_> = answered.map(|(&n, _)| n).take(MAX_ITEMS).collect();
        if !segments.is_empty() {
            messages.push((peer.clone(), id.clone(), segments));
        }
    }
    for (peer, stream, segments) in messages {
        // A completion that was lost would leave the source waiting until it gives up.
        if matches!(stream, StreamId::EndToEnd { .. }) {
            for &segment in &segments {
                if let Some(message) = completion_again(cx, &stream, segment) {
                    cx.send(&peer, &message);
                }
            }
        }
        cx.send(&peer, &Message::Pending { stream, segments });
    }
}

/// Segments of this end that are taken to the last byte, with nothing of them in flight.
fn say_spent(cx: &mut Cx<'_>, sessions: &BTreeMap<NodeId, Session>) {
    let mut messages = Vec::new();
    for (id, stream) in &cx.store.state().streams {
        let Some((peer, session)) = id
            .peer_of(cx.me)
            .and_then(|peer| Some((peer, sessions.get(peer)?)))
            .filter(|(_, session)| session.is_up())
        else {
            continue;
        };
        let done = stream.segments.iter().filter(|&(&number, s)| {
            s.key_type == KeyType::Encrypting
                && s.stage == Stage::Confirmed
                && s.remaining_bytes() == 0
                && s.bindings == 0
                && !session.in_flight(number)
        });
        let segments: Vec<_> = done.map(|(&n, _)| n).take(MAX_ITEMS).collect();
        if !segments.is_empty() {
            messages.push((peer.clone(), id.clone(), segments));
        }
    }
    for (peer, stream, segments) in messages {
        cx.send(&peer, &Message::Spent { stream, segments });
    }
}

/// Forgets segments of the other end whose every byte was used or burned and fetched.
fn close_finished(cx: &mut Cx<'_>) {
    let finished: Vec<(StreamId, SegmentNumber)> = cx
        .store
        .state()
        .streams
        .iter()
        .flat_map(|(id, stream)| {
            stream
                .segments
                .iter()
                .filter(|(_, s)| {
                    s.key_type == KeyType::Decrypting
                        && s.stage == Stage::Confirmed
                        && s.remaining_bytes() == 0
                        && s.bindings == 0
                })
                .map(|(&number, _)| (id.clone(), number))
        })
        .collect();
    for (stream, segment) in finished {
        cx.store.close(&stream, segment);
    }
}
