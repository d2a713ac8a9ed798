//! Supply of keys to applications (Y.3803 clause 8.2.4), from stock that is agreed already.
//!
//! The owner cuts the key, draws its ID, and commits mark and binding in one durable step before the
//! reply leaves. An outbox says the bindings again, in sequence, until the destination has them,
//! also after a restart. An ID without a binding is asked about once, at the node that gave it.

use std::{collections::BTreeMap, time::Duration};

use qkd_keyfile::{Entropy, KsaKeyId, LinkId, Mono, NodeId, StreamId};

use crate::{
    RESEND_AFTER,
    io::{Alarm, Cx, KmaConfig, Output, SuppliedKey, SupplyByIdOrder, SupplyError, SupplyOrder},
    record::{Binding, Stage},
    relay::stream_of,
    session::Session,
    wire::Message,
};

/// Bindings in one message.
const BINDINGS_MAX: usize = 512;

/// How long the node that gave an ID is waited for.
const ASK_PATIENCE: Duration = Duration::from_secs(2);

/// Requests by ID that wait for another node, at most; the rest are answered at once.
const ASKING_MAX: usize = 1024;

/// The supply side of a KMA.
#[derive(Debug, Default)]
pub(crate) struct Supply {
    /// How far the outbox was sent to each node, and when.
    sent: BTreeMap<NodeId, (u64, Mono)>,
    asking: Vec<Asking>,
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
        entropy: &mut dyn Entropy,
        order: &SupplyOrder,
    ) {
        let result = cut(cx, config, entropy, order);
        self.send_bindings(cx, &order.destination, false);
        cx.out.push(Output::Supplied {
            order: order.order,
            result,
        });
    }

    /// Gives out keys that are bound here, all or none.
    pub(crate) fn supply_by_id(
        &mut self,
        cx: &mut Cx<'_>,
        sessions: &BTreeMap<NodeId, Session>,
        order: SupplyByIdOrder,
    ) {
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
        cx.send(peer, &Message::AskedBindings { key_ids });
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
            let stale = self
                .sent
                .get(&node)
                .is_none_or(|(_, at)| cx.now.mono.since(*at) >= RESEND_AFTER);
            if stale {
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

    /// Sends the outbox: what was not sent yet, or all of it `again`.
    fn send_bindings(&mut self, cx: &mut Cx<'_>, node: &NodeId, again: bool) {
        let Some(peer) = cx.store.state().peers.get(node) else {
            return;
        };
        let sent = self.sent.get(node).map_or(0, |(next, _)| *next);
        let from = if again { 0 } else { sent };
        let messages: Vec<(u64, Vec<Binding>)> = peer
            .outbox
            .range(from..)
            .map(|(&sequence, binding)| (sequence, binding.clone()))
            .collect::<Vec<_>>()
            .chunks(BINDINGS_MAX)
            .map(|chunk| (chunk[0].0, chunk.iter().map(|(_, b)| b.clone()).collect()))
            .collect();
        self.sent
            .insert(node.clone(), (peer.bindings_sent, cx.now.mono));
        for (first, bindings) in messages {
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
        for (sequence, binding) in (first..).zip(bindings) {
            let next = next_expected(cx, peer);
            if sequence < next {
                continue;
            }
            if sequence > next {
                break;
            }
            let theirs = binding.stream.peer_of(cx.me) == Some(peer)
                && !binding.applications.is_empty()
                && !cx.store.state().received.contains_key(&binding.key_id);
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
        let next = next_expected(cx, peer);
        cx.send(peer, &Message::BindingsTaken { next });
    }

    /// The destination has bindings.
    pub(crate) fn bindings_taken(&mut self, cx: &mut Cx<'_>, peer: &NodeId, next: u64) {
        if let Some(through) = next.checked_sub(1) {
            cx.store.bindings_acknowledged(peer, through);
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

/// Takes, reads and binds every key of an order, or none.
fn cut(
    cx: &mut Cx<'_>,
    config: &KmaConfig,
    entropy: &mut dyn Entropy,
    order: &SupplyOrder,
) -> Result<Vec<SuppliedKey>, SupplyError> {
    let len_bytes = u32::try_from(order.size.bytes()).unwrap_or(u32::MAX);
    let (stream, floor_bytes) = stock_for(cx, config, order, len_bytes)?;
    let mut keys = Vec::with_capacity(order.number as usize);
    for _ in 0..order.number {
        let span = cx
            .store
            .take_key(&stream, len_bytes, floor_bytes)
            .map_err(|_| not_enough(order))?;
        let key = cx.store.read_all(&stream, &[span]).map_err(|error| {
            tracing::error!(%error, "key cannot be read");
            SupplyError::Unreadable
        })?;
        let mut random = [0; 16];
        entropy.fill(&mut random);
        let key_id = KsaKeyId::from_random(random);
        let binding = Binding {
            key_id,
            stream: stream.clone(),
            span,
            master: order.master.clone(),
            applications: order.applications.clone(),
        };
        cx.store.bind(&order.destination, binding);
        keys.push(SuppliedKey { key_id, key });
    }
    Ok(keys)
}

fn not_enough(order: &SupplyOrder) -> SupplyError {
    SupplyError::NotEnoughKey {
        destination: order.destination.clone(),
    }
}

/// The stream that can serve the whole order: the link of a neighbour, or end-to-end stock.
fn stock_for(
    cx: &Cx<'_>,
    config: &KmaConfig,
    order: &SupplyOrder,
    len_bytes: u32,
) -> Result<(StreamId, u64), SupplyError> {
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
    candidates
        .into_iter()
        .find(|(stream, floor)| {
            cx.store
                .can_cut(stream, len_bytes, order.number, *floor, order.level)
        })
        .ok_or_else(|| not_enough(order))
}

/// Reads and tombstones the keys of an order by ID, or nothing.
fn fetch(cx: &mut Cx<'_>, order: &SupplyByIdOrder) -> Result<Vec<SuppliedKey>, SupplyError> {
    let distinct: std::collections::BTreeSet<_> = order.key_ids.iter().collect();
    if distinct.len() != order.key_ids.len() {
        return Err(SupplyError::UnknownKeyId);
    }
    for key_id in &order.key_ids {
        let received = cx
            .store
            .state()
            .received
            .get(key_id)
            .ok_or(SupplyError::UnknownKeyId)?;
        let binding = &received.binding;
        if binding.master != order.master || !binding.applications.contains(&order.application) {
            return Err(SupplyError::NotForYou);
        }
        if received.delivered.contains(&order.application) {
            return Err(SupplyError::UnknownKeyId);
        }
        let released = cx
            .store
            .segment(&binding.stream, binding.span.segment)
            .is_some_and(|s| s.stage == Stage::Confirmed);
        if !released {
            return Err(SupplyError::Unreachable);
        }
    }
    let mut keys = Vec::with_capacity(order.key_ids.len());
    for &key_id in &order.key_ids {
        let Some(received) = cx.store.state().received.get(&key_id) else {
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
        cx.store.deliver(*key_id, &order.application);
    }
    Ok(keys)
}
