//! The agent: every input goes to the part that it concerns.

mod operate;

use std::{collections::BTreeMap, time::Duration};

use qkd_kernels::Backend;
use qkd_keyfile::{
    AppId, Entropy, LinkId, ModulePairId, Mono, NodeId, Now, SegmentNumber, StreamId,
};

use crate::{
    RESEND_AFTER, TICK,
    cede::{self, Ceding},
    confirm,
    io::{Cx, Input, KmaConfig, Output},
    relay::{Completion, Relay, stream_of},
    session::{Boot, Greeting, Session},
    stock::StockStatus,
    store::{JOURNAL_LIMIT_BYTES, Store, StreamAccounts},
    supply::Supply,
    sync::{Announcement, LinkSync, ModulePairStatus},
    vault::VaultError,
    wire::{HopRef, Message},
};

/// A key management agent: one state machine per node, without sockets, clock or threads.
///
/// Feed it any number of inputs ([`handle`](Self::handle)), then [`commit`](Self::commit): what it
/// returns may be carried out, for all of it is durable. Between the two nothing leaves.
#[derive(Debug)]
pub struct Kma {
    config: KmaConfig,
    boot: Boot,
    core: Core,
    links: BTreeMap<NodeId, LinkSync>,
    sessions: BTreeMap<NodeId, Session>,
    relay: Relay,
    supply: Supply,
    ceding: Ceding,
    /// When the last input came.
    now: Now,
    /// What waits to become durable has waited long enough.
    settle: bool,
    ticked: Option<Mono>,
    /// The time of the last input.
    last: Now,
    said_pending: Mono,
    journal_limit_bytes: u64,
    epoch_period: Option<Duration>,
    epoch_began: Option<Mono>,
    audited: Mono,
    /// Of each stream, the last suspected segment that was said, if there are more.
    said_suspected: BTreeMap<StreamId, SegmentNumber>,
}

/// How often every segment is looked at, to hold the kept sums against.
const AUDIT_EVERY: Duration = Duration::from_secs(60);

/// What every part of the agent works with.
#[derive(Debug)]
struct Core {
    store: Store,
    backend: Backend,
    out: Vec<Output>,
    failed: Option<VaultError>,
}

impl Core {
    fn cx<'a>(&'a mut self, now: Now, me: &'a NodeId) -> Cx<'a> {
        Cx {
            now,
            me,
            store: &mut self.store,
            out: &mut self.out,
            backend: self.backend,
            failed: &mut self.failed,
        }
    }
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
    /// Bindings dropped, oldest first, because no application fetched their keys and more came than
    /// are kept.
    pub forgotten_bindings: u64,
    /// Journal records that did not fit; 0.
    pub inconsistencies: u64,
    /// End-to-end stock with every node for which some is kept.
    pub stocks: Vec<StockStatus>,
    /// The module pairs that feed the links.
    pub module_pairs: BTreeMap<ModulePairId, ModulePairStatus>,
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
            let unit_bytes = config.digest_unit_bytes;
            let sync = LinkSync::new(me, peer, id, link.clone(), unit_bytes, &store);
            Some((peer.clone(), sync))
        });
        Self {
            links: links.collect(),
            sessions: BTreeMap::new(),
            relay: Relay::new(&config, incarnation),
            supply: Supply::default(),
            ceding: Ceding::default(),
            boot: Boot { incarnation, boot },
            core: Core {
                store,
                backend,
                out: Vec::new(),
                failed: None,
            },
            now: Now::default(),
            settle: false,
            ticked: None,
            last: Now::default(),
            said_pending: Mono::default(),
            journal_limit_bytes: JOURNAL_LIMIT_BYTES,
            epoch_period: None,
            epoch_began: None,
            audited: Mono::default(),
            said_suspected: BTreeMap::new(),
            config,
        }
    }

    /// Takes one input. `entropy` serves key IDs and, for relayed units, key bits.
    pub fn handle(&mut self, now: Now, entropy: &mut dyn Entropy, input: Input) {
        self.now = now;
        self.core.store.set_time(now);
        self.last = now;
        let mut cx = self.core.cx(now, &self.config.node);
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
            Input::Message { peer, bytes } => {
                if let Some(hop) = HopRef::decode(&bytes) {
                    self.hop(now, &peer, hop);
                } else if let Some(message) = Message::decode(&bytes) {
                    self.message(now, entropy, &peer, message);
                } else {
                    tracing::warn!(%peer, "message cannot be read");
                }
            }
            Input::ModulePair { peer, module_pair } => {
                if let Some(link) = self.links.get_mut(&peer) {
                    link.add_pair(&mut cx, module_pair);
                }
            }
            Input::Held {
                name,
                key_bits,
                metadata,
            } => {
                if !cx.store.is_used(&name) {
                    cx.store.receive(&name, key_bits, metadata);
                }
                let mut links = self.links.values_mut();
                match links.find(|link| link.knows_pair(&name.module_pair)) {
                    Some(link) => link.held(&mut cx, name, key_bits),
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
                    link.formatted(&mut cx, &ticket, segment);
                }
            }
            Input::Quarantined { name, reason } => {
                let mut links = self.links.values_mut();
                match links.find(|link| link.knows_pair(&name.module_pair)) {
                    Some(link) => link.quarantined(&mut cx, name, reason),
                    None => cx.settle(name, crate::io::Settlement::Dropped),
                }
            }
            Input::Session {
                module_pair,
                session,
            } => {
                for link in self.links.values_mut() {
                    link.session(&mut cx, &module_pair, session);
                }
            }
            Input::Supply(order) => {
                let (config, sessions) = (&self.config, &self.sessions);
                let asked = self
                    .supply
                    .supply(&mut cx, config, sessions, entropy, &order);
                self.relay.asked(now.mono, &order, asked);
            }
            Input::SupplyById(order) => {
                self.supply.supply_by_id(&mut cx, &self.sessions, order);
            }
            Input::Route { destination, route } => self.relay.routed(&destination, route),
            Input::Random(bits) => self.relay.random(bits),
            Input::Order(order) => self.operate(now, order),
            Input::Tick => self.tick(now, entropy),
        }
        self.core.store.relieve();
    }

    /// When the next [`Input::Tick`] is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Mono {
        self.ticked.map_or(Mono::default(), |at| at.after(TICK))
    }

    /// Hands out what came of the inputs handled since the last call, after it has made everything
    /// durable that this rests on. Where nothing is to leave, nothing is made durable yet: that has
    /// time until something leaves, or until the next tick.
    ///
    /// # Errors
    ///
    /// The store failed. Nothing of this batch may leave the node; end the process, whose successor
    /// goes on from the last batch that was durable.
    pub fn commit(&mut self) -> Result<Vec<Output>, VaultError> {
        // QKD-keys that came in together are announced together.
        let mut cx = self.core.cx(self.last, &self.config.node);
        for link in self.links.values_mut().filter(|link| link.has_news) {
            link.poll(&mut cx);
        }
        if let Some(error) = self.core.failed.take() {
            return Err(error);
        }
        if !std::mem::take(&mut self.settle) && self.core.out.is_empty() {
            return Ok(Vec::new());
        }
        let mut cx = self.core.cx(self.now, &self.config.node);
        self.supply.tell_taken(&mut cx);
        self.core.store.commit()?;
        if let Err(error) = self.core.store.compact_if_large(self.journal_limit_bytes) {
            if error.is_final() {
                return Err(error);
            }
            tracing::error!(%error, "journal could not be compacted; it grows on");
        }
        self.rotate_epoch_if_due()?;
        Ok(std::mem::take(&mut self.core.out))
    }

    fn rotate_epoch_if_due(&mut self) -> Result<(), VaultError> {
        let (Some(now), Some(period)) = (self.ticked, self.epoch_period) else {
            return Ok(());
        };
        let began = *self.epoch_began.get_or_insert(now);
        if now.since(began) < period {
            return Ok(());
        }
        self.epoch_began = Some(now);
        match self.core.store.rotate_epoch() {
            Err(error) if error.is_final() => Err(error),
            Err(error) => {
                tracing::error!(%error, "no new epoch of data keys; tried again after the period");
                Ok(())
            }
            Ok(()) => {
                tracing::info!("data keys are wrapped anew: a new epoch has begun");
                Ok(())
            }
        }
    }

    /// Wraps all data keys anew whenever this time has passed. Not at all without it.
    #[must_use]
    pub fn with_epoch_period(mut self, period: Duration) -> Self {
        self.epoch_period = Some(period);
        self
    }

    /// Remembers what an operator calls applications.
    #[must_use]
    pub fn with_application_names(mut self, names: &BTreeMap<AppId, String>) -> Self {
        self.core.store.name_applications(names);
        self
    }

    /// Compacts the journal beyond this length, instead of [`JOURNAL_LIMIT_BYTES`].
    #[must_use]
    pub fn with_journal_limit(mut self, bytes: u64) -> Self {
        self.journal_limit_bytes = bytes;
        self
    }

    /// What the agent is doing.
    #[must_use]
    pub fn status(&self) -> Status {
        let state = self.core.store.state();
        Status {
            streams: self.core.store.accounts(),
            peers: self
                .sessions
                .iter()
                .map(|(node, session)| (node.clone(), session.is_up()))
                .collect(),
            outbox_bindings: state.peers.values().map(|p| p.outbox.len()).sum(),
            waiting_bindings: state.received.len(),
            forgotten_bindings: state.forgotten_bindings,
            inconsistencies: state.inconsistencies,
            stocks: self.relay.stocks(&self.core.store, &self.config.node),
            module_pairs: self
                .links
                .values()
                .flat_map(|link| link.status(&self.core.store))
                .collect(),
        }
    }

    /// Whether the stock of the link with `peer` is at its capacity: QKD-keys only wait then, and
    /// whoever reads them from hardware should wait too.
    #[must_use]
    pub fn is_full(&self, peer: &NodeId) -> bool {
        let link = self.config.neighbours.get(peer);
        let id = LinkId::between(&self.config.node, peer).map(StreamId::Link);
        let stream = id.and_then(|id| self.core.store.stream(&id));
        match (link, stream) {
            (Some(link), Some(stream)) => stream.held_bytes >= link.capacity_bytes,
            _ => false,
        }
    }

    /// The store, to be read.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.core.store
    }

    #[cfg(test)]
    pub(crate) fn store_mut(&mut self) -> &mut Store {
        &mut self.core.store
    }

    fn tick(&mut self, now: Now, entropy: &mut dyn Entropy) {
        self.ticked = Some(now.mono);
        self.settle = true;
        let mut cx = self.core.cx(now, &self.config.node);
        for session in self.sessions.values_mut() {
            session.send_again(&mut cx, false);
        }
        for link in self.links.values_mut() {
            link.poll(&mut cx);
        }
        self.relay
            .poll(&mut cx, &self.config, &mut self.sessions, entropy);
        self.supply.poll(&mut cx, &self.sessions);
        for (peer, link) in &self.config.neighbours {
            if let Some(session) = self.sessions.get(peer) {
                let need = self.relay.pad_need(peer);
                self.ceding.poll(&mut cx, (peer, link), session, need);
            }
        }
        if now.mono.since(self.said_pending) >= RESEND_AFTER {
            self.said_pending = now.mono;
            confirm::say_pending(&mut cx, &self.sessions);
            confirm::say_spent(&mut cx, &self.sessions);
            confirm::say_suspected(&mut cx, &self.sessions, &mut self.said_suspected);
            confirm::close_finished(&mut cx);
            cx.store.retain();
        }
        if now.mono.since(self.audited) >= AUDIT_EVERY {
            self.audited = now.mono;
            self.core.store.audit_kept();
        }
    }

    fn message(&mut self, now: Now, entropy: &mut dyn Entropy, peer: &NodeId, message: Message) {
        let mut cx = self.core.cx(now, &self.config.node);
        let cx = &mut cx;
        let Some(session) = self.sessions.get_mut(peer) else {
            return;
        };
        if let Message::Hello {
            version,
            incarnation,
            boot,
            sessions,
        } = message
        {
            let process = (incarnation, boot);
            let greeting = session.greeted(cx, self.boot, version, process, &sessions);
            return self.greeted(now, peer, greeting);
        }
        if !session.is_up() {
            return;
        }
        match message {
            Message::Hello { .. } => {}
            Message::Marks(marks) => session.marks(cx, &marks),
            Message::MarksTaken { session: id } => session.marks_taken(cx, id),
            Message::RolledBack { session: id } => session.rolled_back(cx, id),
            Message::HopTaken {
                session: id,
                sequence,
            } => {
                session.hop_taken(id, sequence);
                self.relay.hop_taken(cx, &self.config, &mut self.sessions);
            }
            Message::Announce { .. }
            | Message::Renumbered { .. }
            | Message::Standing { .. }
            | Message::Propose(_)
            | Message::Answer { .. } => {
                let trusted = !session.is_quarantined();
                if let Some(link) = self.links.get_mut(peer).filter(|_| trusted) {
                    synchronise(cx, link, message);
                }
            }
            Message::Commit {
                stream,
                segment,
                release,
            } => confirm::commit(cx, peer, &stream, segment, &release),
            Message::Pending { stream, segments } => {
                confirm::pending(cx, peer, &stream, &segments);
            }
            Message::Void { stream, segment } => {
                if stream == stream_of(peer, cx.me) {
                    self.relay.void(&stream, segment);
                }
                confirm::void(cx, peer, &stream, segment);
            }
            Message::Spent { stream, segments } => {
                if session.accepting_id().is_some() {
                    confirm::spent(cx, peer, stream, segments);
                }
            }
            Message::Suspected { stream, segments } => {
                confirm::suspected(cx, peer, &stream, &segments);
                session.forget_keys_of(&stream, &segments);
            }
            Message::SpentTaken { stream, segments } => {
                confirm::spent_taken(cx, peer, &stream, &segments);
            }
            Message::Relay(hop) => self.hop(now, peer, (&hop).into()),
            Message::RelayFailed { route, segment } => self.relay.failed(cx, peer, &route, segment),
            Message::Xor(part) => {
                let (config, sessions) = (&self.config, &mut self.sessions);
                self.relay.xor(cx, config, sessions, peer, part);
            }
            Message::XorTaken { relay, place } => self.relay.xor_taken(peer, relay, place),
            Message::Completion {
                stream,
                segment,
                way,
                tag,
            } => {
                if stream == stream_of(cx.me, peer) {
                    let completion = Completion { segment, way, tag };
                    self.relay.completed(cx, &self.config, peer, completion);
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
            Message::Want { acquired, bytes } => {
                if let Some(link) = self.config.neighbours.get(peer) {
                    let (need, wanted) = (self.relay.pad_need(peer), (acquired, bytes));
                    self.ceding.wanted(cx, (peer, link), session, need, wanted);
                }
            }
            Message::Cessions { first, segments } => {
                if session.accepting_id().is_some() {
                    cede::cessions(cx, peer, first, segments);
                }
            }
            Message::CessionsTaken { next } => cede::taken(cx, peer, next),
        }
    }

    fn hop(&mut self, now: Now, peer: &NodeId, hop: HopRef<'_>) {
        if self.sessions.get(peer).is_some_and(Session::is_up) {
            let mut cx = self.core.cx(now, &self.config.node);
            let (config, sessions) = (&self.config, &mut self.sessions);
            self.relay.hop(&mut cx, config, sessions, peer, hop);
        }
    }

    fn greeted(&mut self, now: Now, peer: &NodeId, greeting: Greeting) {
        let mut cx = self.core.cx(now, &self.config.node);
        if greeting == Greeting::Refused {
            return;
        }
        if let Some(link) = self.links.get_mut(peer) {
            if greeting == Greeting::Replaced {
                link.peer_replaced(&mut cx);
            }
            link.connected(&cx);
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
            anew,
            held,
            dropped,
            complete,
        } => {
            let announcement = Announcement {
                generation,
                anew,
                held,
                dropped,
                complete,
            };
            link.announced(cx, &module_pair, announcement);
            link.poll(cx);
        }
        Message::Renumbered {
            module_pair,
            generation,
        } => link.renumbered_there(cx, &module_pair, generation),
        Message::Standing {
            module_pair,
            here,
            there,
        } => link.standing_told(cx, &module_pair, (here, there)),
        Message::Propose(propose) => link.proposed(cx, propose),
        Message::Answer {
            segment,
            verdict,
            tag,
            missing,
        } => {
            link.answered(cx, segment, verdict, &tag, &missing);
            link.poll(cx);
        }
        _ => {}
    }
}
