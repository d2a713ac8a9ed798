//! Supply of keys to applications (Y.3803 clause 8.2.4), from stock that is agreed already.
//!
//! The owner cuts the key, draws its ID, and commits mark and binding in one durable step before the
//! reply leaves. An outbox says the bindings again, in sequence, until the destination has them,
//! also after a restart. An ID without a binding is asked about once, at the node that gave it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use qkd_keyfile::{AppId, Entropy, KsaKeyId, LinkId, Mono, NodeId, StreamId};
use qkd_secmem::KeyBuf;

use crate::{
    RESEND_AFTER,
    io::{Alarm, Cx, KmaConfig, Output, SuppliedKey, SupplyByIdOrder, SupplyError, SupplyOrder},
    record::{Binding, Stage},
    relay::stream_of,
    session::Session,
    store::{KeyOrder, KeyPlan, ReadError},
    wire::{MAX_APPLICATIONS, MAX_ITEMS, Message},
};

/// Keys, or key IDs, in one order, at most.
pub const KEYS_MAX: u32 = 1024;

/// Bindings that no destination has acknowledged, at most, per destination; then no key is cut.
const OUTBOX_MAX: usize = 1 << 16;

/// Bindings on their way to one destination at a time.
const WINDOW: usize = MAX_ITEMS;

/// Bindings in one message: their number, and about how many bytes.
const BATCH_MAX: (usize, usize) = (512, 256 << 10);

/// Bindings of one node that are taken in before it is told without delay: several times fewer than
/// a window.
const UNTOLD_MAX: usize = WINDOW / 8;

/// How long the node that gave an ID is waited for.
const ASK_PATIENCE: Duration = Duration::from_secs(2);

/// Requests by ID that wait for another node, at most; the rest are answered at once.
const ASKING_MAX: usize = 1024;

/// About the bytes of a name in a message, at most.
const NAMES_BYTES: usize = 66;

/// The supply side of a KMA.
#[derive(Debug, Default)]
pub(crate) struct Supply {
    sent: BTreeMap<NodeId, Sent>,
    asking: Vec<Asking>,
    /// Messages with bindings, and bindings in them, of which their nodes have not heard yet that
    /// they were taken in.
    untold: BTreeMap<NodeId, usize>,
}

/// What became of an order for keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Keys were cut from this stream.
    Supplied(StreamId),
    /// There was not enough key.
    NotEnough,
    /// Refused, and more key would not have changed that.
    InVain,
}

/// How far the outbox was sent to a node.
#[derive(Debug, Default)]
struct Sent {
    /// The sequence after the last one sent.
    next: u64,
    /// When it was sent from the start.
    again: Mono,
}

/// A request by ID that waits for the node that gave the IDs.
#[derive(Debug)]
struct Asking {
    order: SupplyByIdOrder,
    since: Mono,
}

impl Supply {
    /// Cuts and binds keys for an application.
    pub(crate) fn supply(
        &mut self,
        cx: &mut Cx<'_>,
        config: &KmaConfig,
        sessions: &BTreeMap<NodeId, Session>,
        entropy: &mut dyn Entropy,
        order: &SupplyOrder,
    ) -> Asked {
        let cut = may_cut(cx, sessions, order).and_then(|()| cut(cx, config, entropy, order));
        let asked = match &cut {
            Ok((stream, _)) => Asked::Supplied(stream.clone()),
            Err(SupplyError::NotEnoughKey { .. }) => Asked::NotEnough,
            Err(_) => Asked::InVain,
        };
        reply(cx, order.order, cut.map(|(_, keys)| keys));
        self.send_bindings(cx, &order.destination, false);
        asked
    }

    /// Gives out keys that are bound here, all or none.
    pub(crate) fn supply_by_id(
        &mut self,
        cx: &mut Cx<'_>,
        sessions: &BTreeMap<NodeId, Session>,
        order: SupplyByIdOrder,
    ) {
        if order.key_ids.is_empty() || order.key_ids.len() > KEYS_MAX as usize {
            return reply(cx, order.order, Err(SupplyError::BadOrder));
        }
        match fetch(cx, &order) {
            Err(SupplyError::UnknownKeyId) if self.asking.len() < ASKING_MAX => {}
            result => return reply(cx, order.order, result),
        }
        if !sessions.get(&order.source).is_some_and(Session::is_up) {
            return reply(cx, order.order, Err(SupplyError::Unreachable));
        }
        let message = Message::AskBinding {
            key_ids: order.key_ids.clone(),
        };
        cx.send(&order.source, &message);
        self.asking.push(Asking {
            order,
            since: cx.now.mono,
        });
    }

    /// A node asks whether IDs are bound: what is bound goes out first.
    pub(crate) fn asked(&mut self, cx: &mut Cx<'_>, peer: &NodeId, key_ids: Vec<KsaKeyId>) {
        self.send_bindings(cx, peer, true);
        let peers = &cx.store.state().peers;
        // Those that do not fit the window are on their way later: no answer yet.
        if peers.get(peer).is_none_or(|p| p.outbox.len() <= WINDOW) {
            cx.send(peer, &Message::AskedBindings { key_ids });
        }
    }

    /// The node has answered: what is not bound now does not exist.
    pub(crate) fn told(&mut self, cx: &mut Cx<'_>, peer: &NodeId, key_ids: &[KsaKeyId]) {
        let concerns =
            |asking: &Asking| asking.order.source == *peer && asking.order.key_ids == key_ids;
        let mut waiting = Vec::new();
        for asking in std::mem::take(&mut self.asking) {
            if concerns(&asking) {
                let result = fetch(cx, &asking.order);
                reply(cx, asking.order.order, result);
            } else {
                waiting.push(asking);
            }
        }
        self.asking = waiting;
    }

    /// Repeats what is due, and answers who has waited long enough.
    pub(crate) fn poll(&mut self, cx: &mut Cx<'_>, sessions: &BTreeMap<NodeId, Session>) {
        let nodes: Vec<NodeId> = sessions
            .iter()
            .filter(|(_, session)| session.is_up())
            .map(|(node, _)| node.clone())
            .collect();
        for node in nodes {
            let sent = self.sent.get(&node);
            if sent.is_none_or(|sent| cx.now.mono.since(sent.again) >= RESEND_AFTER) {
                self.send_bindings(cx, &node, true);
            }
        }
        let now = cx.now.mono;
        let (late, waiting) = std::mem::take(&mut self.asking)
            .into_iter()
            .partition(|asking: &Asking| now.since(asking.since) > ASK_PATIENCE);
        self.asking = waiting;
        for asking in late {
            reply(cx, asking.order.order, Err(SupplyError::Unreachable));
        }
    }

    /// The connection is new: nothing of the outbox is on its way.
    pub(crate) fn connected(&mut self, cx: &mut Cx<'_>, node: &NodeId) {
        self.send_bindings(cx, node, true);
    }

    /// Sends the outbox as far as the window reaches: what was not sent yet, or all of it `again`.
    fn send_bindings(&mut self, cx: &mut Cx<'_>, node: &NodeId, again: bool) {
        let Some(peer) = cx.store.state().peers.get(node) else {
            return;
        };
        let sent = self.sent.entry(node.clone()).or_default();
        if again {
            *sent = Sent {
                next: 0,
                again: cx.now.mono,
            };
        }
        let mut batches: Vec<(u64, Vec<Binding>)> = Vec::new();
        let mut bytes = 0;
        for (&sequence, binding) in peer.outbox.iter().take(WINDOW) {
            if sequence < sent.next {
                continue;
            }
            sent.next = sequence + 1;
            let room = |batch: &Vec<Binding>| batch.len() < BATCH_MAX.0 && bytes < BATCH_MAX.1;
            match batches.last_mut().filter(|(_, batch)| room(batch)) {
                Some((_, batch)) => batch.push(binding.clone()),
                None => {
                    bytes = 0;
                    batches.push((sequence, vec![binding.clone()]));
                }
            }
            bytes += NAMES_BYTES * (4 + binding.applications.len());
        }
        for (first, bindings) in batches {
            cx.send(node, &Message::Bindings { first, bindings });
        }
    }

    /// Takes in bindings of another node, in sequence.
    pub(crate) fn bindings(
        &mut self,
        cx: &mut Cx<'_>,
        peer: &NodeId,
        first: u64,
        bindings: Vec<Binding>,
    ) {
        let count = bindings.len();
        for (at, binding) in (0..).zip(bindings) {
            let next = next_expected(cx, peer);
            match first.checked_add(at) {
                Some(sequence) if sequence < next => continue,
                Some(sequence) if sequence == next => {}
                _ => break,
            }
            let sequence = next;
            let received = &cx.store.state().received;
            let theirs = binding.stream.peer_of(cx.me) == Some(peer)
                && !binding.applications.is_empty()
                && !received.contains_key(&(peer.clone(), binding.key_id));
            let misuse = if theirs {
                cx.store.receive_binding(peer, sequence, binding).err()
            } else {
                Some(crate::store::FollowError::NotTheirs)
            };
            if let Some(error) = misuse {
                tracing::error!(%peer, sequence, %error, "binding refused");
                cx.alarm(Alarm::PadMisuse { peer: peer.clone() });
                break;
            }
        }
        let untold = self.untold.entry(peer.clone()).or_default();
        *untold += 1 + count;
        if *untold > UNTOLD_MAX {
            self.tell_taken(cx);
        }
    }

    /// Acknowledges bindings. They are known here as soon as they came; to acknowledge every few at
    /// once would make every few durable for themselves, so that waits for something else to leave,
    /// or for the next tick.
    pub(crate) fn tell_taken(&mut self, cx: &mut Cx<'_>) {
        for peer in std::mem::take(&mut self.untold).into_keys() {
            let next = next_expected(cx, &peer);
            cx.send(&peer, &Message::BindingsTaken { next });
        }
    }

    /// The destination has bindings.
    pub(crate) fn bindings_taken(&mut self, cx: &mut Cx<'_>, peer: &NodeId, next: u64) {
        if let Some(through) = next.checked_sub(1) {
            cx.store.bindings_acknowledged(peer, through);
            self.send_bindings(cx, peer, false);
        }
    }
}

fn next_expected(cx: &Cx<'_>, peer: &NodeId) -> u64 {
    let peers = &cx.store.state().peers;
    peers.get(peer).map_or(0, |p| p.bindings_received)
}

fn reply(cx: &mut Cx<'_>, order: u64, result: Result<Vec<SuppliedKey>, SupplyError>) {
    cx.out.push(Output::Supplied { order, result });
}

/// Whether keys may be cut for an order at all.
fn may_cut(
    cx: &Cx<'_>,
    sessions: &BTreeMap<NodeId, Session>,
    order: &SupplyOrder,
) -> Result<(), SupplyError> {
    if !(1..=KEYS_MAX).contains(&order.number)
        || !(1..=MAX_APPLICATIONS).contains(&order.applications.len())
    {
        return Err(SupplyError::BadOrder);
    }
    let vouched = sessions.get(&order.destination).map(Session::may_supply);
    let peers = &cx.store.state().peers;
    let waiting = peers.get(&order.destination).map_or(0, |p| p.outbox.len());
    if vouched != Some(true) || waiting + order.number as usize > OUTBOX_MAX {
        return Err(SupplyError::Unreachable);
    }
    Ok(())
}

/// Plans, reads, takes and binds every key of an order, or none.
fn cut(
    cx: &mut Cx<'_>,
    config: &KmaConfig,
    entropy: &mut dyn Entropy,
    order: &SupplyOrder,
) -> Result<(StreamId, Vec<SuppliedKey>), SupplyError> {
    let len_bytes = u32::try_from(order.size.bytes()).unwrap_or(u32::MAX);
    let (stream, plan) = plan_for(cx, config, order, len_bytes)?;
    let spans: Vec<_> = plan.keys().collect();
    let keys: Result<Vec<KeyBuf>, ReadError> = spans
        .iter()
        .map(|&span| cx.store.read_all(&stream, &[span]))
        .collect();
    let keys = keys.map_err(|error| {
        tracing::error!(%error, "key cannot be read");
        cx.store.burn_unreadable(&stream, &spans);
        SupplyError::Unreadable
    })?;
    let applications = distinct(&order.applications);
    for run in plan.0.chunk_by(|(_, a), (_, b)| a == b) {
        let spans: Vec<_> = run.iter().map(|(span, _)| *span).collect();
        cx.store.take(&stream, &spans, run[0].1);
    }
    let mut random = vec![[0; 16]; keys.len()];
    entropy.fill(random.as_flattened_mut());
    let mut supplied = Vec::with_capacity(keys.len());
    for ((key, span), random) in keys.into_iter().zip(spans).zip(random) {
        let key_id = KsaKeyId::from_random(random);
        let binding = Binding {
            key_id,
            stream: stream.clone(),
            span,
            master: order.master.clone(),
            applications: applications.clone(),
        };
        cx.store.bind(&order.destination, binding);
        supplied.push(SuppliedKey { key_id, key });
    }
    Ok((stream, supplied))
}

fn distinct(applications: &[AppId]) -> Vec<AppId> {
    let mut seen = BTreeSet::new();
    let first = |app: &&AppId| seen.insert((*app).clone());
    applications.iter().filter(first).cloned().collect()
}

fn not_enough(order: &SupplyOrder) -> SupplyError {
    SupplyError::NotEnoughKey {
        destination: order.destination.clone(),
    }
}

/// The stream that can serve the whole order, the link of a neighbour or end-to-end stock, and what
/// to take from it.
fn plan_for(
    cx: &Cx<'_>,
    config: &KmaConfig,
    order: &SupplyOrder,
    len_bytes: u32,
) -> Result<(StreamId, KeyPlan), SupplyError> {
    let destination = &order.destination;
    let mut candidates = Vec::new();
    if config.remotes.contains_key(destination) {
        candidates.push((stream_of(cx.me, destination), 0));
    }
    if let Some(link) = config.neighbours.get(destination)
        && let Some(id) = LinkId::between(cx.me, destination)
    {
        candidates.push((StreamId::Link(id), link.floor_bytes));
    }
    if candidates.is_empty() {
        return Err(SupplyError::UnknownDestination {
            destination: destination.clone(),
        });
    }
    let mut plans = candidates.into_iter().filter_map(|(stream, floor_bytes)| {
        let keys = KeyOrder {
            number: order.number,
            len_bytes,
            floor_bytes,
            level: order.level,
        };
        let plan = cx.store.plan_keys(&stream, keys).ok()?;
        Some((stream, plan))
    });
    plans.next().ok_or_else(|| not_enough(order))
}

/// Reads and tombstones the keys of an order by ID, or nothing.
fn fetch(cx: &mut Cx<'_>, order: &SupplyByIdOrder) -> Result<Vec<SuppliedKey>, SupplyError> {
    let distinct: BTreeSet<_> = order.key_ids.iter().collect();
    if distinct.len() != order.key_ids.len() {
        return Err(SupplyError::UnknownKeyId);
    }
    for key_id in &order.key_ids {
        let received = cx
            .store
            .state()
            .received
            .get(&(order.source.clone(), *key_id))
            .ok_or(SupplyError::UnknownKeyId)?;
        let binding = &received.binding;
        if binding.master != order.master || !binding.applications.contains(&order.application) {
            return Err(SupplyError::NotForYou);
        }
        if received.delivered.contains(&order.application) {
            return Err(SupplyError::UnknownKeyId);
        }
        let segment = cx.store.segment(&binding.stream, binding.span.segment);
        if segment.is_some_and(|segment| segment.is_suspected) {
            return Err(SupplyError::UnknownKeyId);
        }
        let released = segment.is_some_and(|s| s.stage == Stage::Confirmed);
        if !released {
            return Err(SupplyError::Unreachable);
        }
    }
    let mut keys = Vec::with_capacity(order.key_ids.len());
    for &key_id in &order.key_ids {
        let at = (order.source.clone(), key_id);
        let Some(received) = cx.store.state().received.get(&at) else {
            return Err(SupplyError::UnknownKeyId);
        };
        let (stream, span) = (received.binding.stream.clone(), received.binding.span);
        let key = cx.store.read_all(&stream, &[span]).map_err(|error| {
            tracing::error!(%error, "key cannot be read");
            SupplyError::Unreadable
        })?;
        keys.push(SuppliedKey { key_id, key });
    }
    for key_id in &order.key_ids {
        cx.store.deliver(&order.source, *key_id, &order.application);
    }
    Ok(keys)
}
