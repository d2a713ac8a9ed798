//! The KMA on a thread of its own, with everything that it is connected to.
//!
//! It takes what waits, up to a bound, hands it to the KMA, and commits once: one synchronisation of
//! the disk serves all of it (group commit). What comes out of a commit is carried out at once and
//! without waiting for anybody.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Duration,
};

use qkd_keyfile::{Clock, ModulePairId, NodeId, QkdKeyId, QkdKeyName};
use qkd_kma::{
    Alarm, FormatTicket, FormattedSegment, Input, Kma, MASK_BITS, OperatorAct, OperatorAnswer,
    OperatorOrder, Output, QuarantineReason, Settlement, Status, SuppliedKey, SupplyByIdOrder,
    SupplyError, SupplyOrder, vault::VaultError,
};
use qkd_net::{LinkEvent, LinksHandle};
use qkd_pipeline::{
    Command, CommandRefused, FormatError, FormatOrder, RefuseReason, StageEvent, StageHandle,
};
use qkd_secmem::KeyBuf;
use tokio::sync::{mpsc, oneshot, watch};

use super::naming::Named;
use crate::env::{SystemClock, SystemEntropy};

/// Inputs handled before a commit, at most.
const BATCH_MAX: usize = 512;

/// Requests that wait for the agent, at most; more are held back where they come from.
const REQUESTS_MAX: usize = 1024;

/// The task that reads a module.
#[derive(Debug)]
pub(crate) struct ModuleTask {
    /// What became of its QKD-keys.
    pub(crate) settle: mpsc::UnboundedSender<(QkdKeyName, Settlement)>,
    /// What those that it reads now are called.
    pub(crate) named: watch::Sender<Option<Named>>,
    /// QKD-keys that it is to fetch, if its driver fetches keys by their IDs.
    pub(crate) wanted: Option<mpsc::Sender<Vec<QkdKeyId>>>,
}

type Supplied = Result<Vec<SuppliedKey>, SupplyError>;

/// What the rest of the node asks of the agent.
#[derive(Debug)]
pub(crate) enum Request {
    /// An application asks for keys; the order's number is given here.
    Supply(SupplyOrder, oneshot::Sender<Supplied>),
    /// An application asks for keys by ID; the order's number is given here.
    SupplyById(SupplyByIdOrder, oneshot::Sender<Supplied>),
    /// A module begins to feed a link, or begins anew; what it delivered is settled there.
    AddModule {
        peer: NodeId,
        module_pair: ModulePairId,
        task: ModuleTask,
    },
    /// A module delivers no more. What it has delivered is agreed all the same.
    RemoveModule(ModulePairId),
    /// How things are.
    Status(oneshot::Sender<Box<Status>>),
    /// A module tells its session.
    Session {
        module_pair: ModulePairId,
        session: u64,
    },
    /// The controller's answer.
    Route {
        destination: NodeId,
        route: Option<Vec<NodeId>>,
    },
    /// Bits of the registered generator.
    Random(KeyBuf),
    /// An operator orders something.
    Order(OperatorAct, oneshot::Sender<OperatorAnswer>),
}

/// Everything that the agent works with.
pub(crate) struct Surroundings {
    pub(crate) links: LinksHandle,
    pub(crate) stage: StageHandle,
    /// To the drivers' tasks, by module pair.
    pub(crate) modules: BTreeMap<ModulePairId, ModuleTask>,
    /// To the drivers' tasks, by matching KMA: whether the link's store is full.
    pub(crate) full: Vec<(NodeId, watch::Sender<bool>)>,
    /// To the controller's task.
    pub(crate) want_route: Option<mpsc::Sender<NodeId>>,
    /// To the generator's thread, if one is registered.
    pub(crate) want_random: Option<std::sync::mpsc::Sender<usize>>,
    pub(crate) alarms: mpsc::UnboundedSender<Alarm>,
    pub(crate) clock: SystemClock,
}

/// Where inputs come from.
pub(crate) struct Sources {
    pub(crate) links: mpsc::Receiver<LinkEvent>,
    /// Bounded by the credit that the drivers have.
    pub(crate) stage: mpsc::UnboundedReceiver<StageEvent>,
    pub(crate) requests: mpsc::Receiver<Request>,
    pub(crate) shutdown: watch::Receiver<bool>,
}

/// A channel for [`Sources::requests`].
pub(crate) fn requests() -> (mpsc::Sender<Request>, mpsc::Receiver<Request>) {
    mpsc::channel(REQUESTS_MAX)
}

/// The running agent.
pub(crate) struct Agent {
    kma: Kma,
    around: Surroundings,
    /// The connection over which a peer is talked to.
    connections: HashMap<NodeId, u64>,
    tickets: HashMap<u64, (FormatTicket, FormatOrder)>,
    next_ticket: u64,
    /// Orders that the stage had no room for.
    orders: VecDeque<Command>,
    /// Orders for which there was no key memory, to be given again when time has passed.
    later: Vec<Command>,
    replies: HashMap<u64, oneshot::Sender<Supplied>>,
    ordered: HashMap<u64, oneshot::Sender<OperatorAnswer>>,
    next_order: u64,
    /// QKD-keys dropped because too many waited.
    dropped: u64,
}

impl Agent {
    pub(crate) fn new(kma: Kma, around: Surroundings) -> Self {
        for (module_pair, task) in &around.modules {
            name_first(&kma, module_pair, task);
        }
        Self {
            kma,
            around,
            connections: HashMap::new(),
            tickets: HashMap::new(),
            next_ticket: 0,
            orders: VecDeque::new(),
            later: Vec::new(),
            replies: HashMap::new(),
            ordered: HashMap::new(),
            next_order: 0,
            dropped: 0,
        }
    }

    /// Runs until the shutdown, or until the store fails. Blocks its thread.
    pub(crate) fn run(mut self, mut sources: Sources) -> Result<(), VaultError> {
        let runtime = match tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
        {
            Ok(runtime) => runtime,
            Err(error) => unreachable!("a runtime with a timer alone: {error}"),
        };
        let result = runtime.block_on(self.work(&mut sources));
        // What waits for an answer hears that there is none; the stage wipes what it holds.
        self.replies.clear();
        self.ordered.clear();
        self.around.stage.stop();
        result
    }

    async fn work(&mut self, sources: &mut Sources) -> Result<(), VaultError> {
        loop {
            let timeout = self.around.clock.instant(self.kma.poll_timeout());
            let tick = tokio::time::sleep_until(timeout.into());
            tokio::select! {
                () = super::until_stop(&mut sources.shutdown) => {
                    // A tick makes durable what could wait.
                    self.handle(Input::Tick);
                    return self.commit();
                }
                () = tick => {
                    self.orders.extend(self.later.drain(..));
                    self.handle(Input::Tick);
                }
                Some(event) = sources.stage.recv() => self.staged(event),
                Some(request) = sources.requests.recv() => self.requested(request),
                Some(event) = sources.links.recv() => self.linked(event),
            }
            for _ in 1..BATCH_MAX {
                if let Ok(event) = sources.stage.try_recv() {
                    self.staged(event);
                } else if let Ok(event) = sources.links.try_recv() {
                    self.linked(event);
                } else if let Ok(request) = sources.requests.try_recv() {
                    self.requested(request);
                } else {
                    break;
                }
            }
            self.commit()?;
        }
    }

    fn handle(&mut self, input: Input) {
        let now = self.around.clock.now();
        self.kma.handle(now, &mut SystemEntropy, input);
    }

    fn commit(&mut self) -> Result<(), VaultError> {
        for output in self.kma.commit()? {
            self.carry_out(output);
        }
        self.order_again();
        for (peer, full) in &self.around.full {
            let now = self.kma.is_full(peer);
            full.send_if_modified(|was| std::mem::replace(was, now) != now);
        }
        Ok(())
    }

    fn linked(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up { peer, connection } => {
                tracing::info!(%peer, "connected");
                self.connections.insert(peer.clone(), connection);
                self.handle(Input::PeerUp(peer));
            }
            LinkEvent::Down {
                peer,
                connection,
                reason,
            } => {
                tracing::warn!(%peer, %reason, "disconnected");
                if self.connections.get(&peer) == Some(&connection) {
                    self.connections.remove(&peer);
                    self.handle(Input::PeerDown(peer));
                }
            }
            LinkEvent::Message {
                peer,
                connection,
                bytes,
            } => {
                if self.connections.get(&peer) == Some(&connection) {
                    self.handle(Input::Message { peer, bytes });
                }
            }
        }
    }

    fn staged(&mut self, event: StageEvent) {
        match event {
            StageEvent::Held {
                name,
                key_bits,
                metadata,
            } => self.handle(Input::Held {
                name,
                key_bits,
                metadata,
            }),
            StageEvent::Refused { name, reason } => {
                tracing::warn!(qkd_key = %name, %reason, "QKD-key refused");
                match quarantine(reason) {
                    Some(reason) => self.handle(Input::Quarantined { name, reason }),
                    // Whatever waits under that name already is not this key: its block is credited,
                    // and the driver drops it.
                    None => self.settle(name, Settlement::Dropped),
                }
            }
            StageEvent::DroppedOldest { name } => {
                // One line for each would be a flood: at 1, 2, 4, 8 …
                self.dropped += 1;
                if self.dropped.is_power_of_two() {
                    let dropped = self.dropped;
                    tracing::warn!(qkd_key = %name, dropped, "QKD-key dropped: too many wait for the other end");
                }
                self.handle(Input::Lost(name));
            }
            StageEvent::Formatted {
                ticket: number,
                result,
            } => {
                let Some((ticket, order)) = self.tickets.remove(&number) else {
                    return;
                };
                if let Err(FormatError::Pool(_)) = result {
                    self.tickets.insert(number, (ticket, order.clone()));
                    self.later.push(Command::Format {
                        ticket: number,
                        order,
                    });
                    return;
                }
                let segment = result
                    .map_err(|error| tracing::warn!(%error, segment = %ticket.segment, "segment not made"))
                    .ok()
                    .map(|made| FormattedSegment {
                        bits: made.segment,
                        digests: made.digests,
                    });
                self.handle(Input::Formatted { ticket, segment });
            }
        }
    }

    fn requested(&mut self, request: Request) {
        match request {
            Request::Supply(mut order, reply) => {
                order.order = self.await_reply(reply);
                self.handle(Input::Supply(order));
            }
            Request::SupplyById(mut order, reply) => {
                order.order = self.await_reply(reply);
                self.handle(Input::SupplyById(order));
            }
            Request::AddModule {
                peer,
                module_pair,
                task,
            } => {
                name_first(&self.kma, &module_pair, &task);
                self.around.modules.insert(module_pair.clone(), task);
                self.handle(Input::ModulePair { peer, module_pair });
            }
            Request::RemoveModule(module_pair) => {
                self.around.modules.remove(&module_pair);
            }
            Request::Status(reply) => {
                let _ = reply.send(Box::new(self.kma.status()));
            }
            Request::Session {
                module_pair,
                session,
            } => self.handle(Input::Session {
                module_pair,
                session,
            }),
            Request::Route { destination, route } => {
                self.handle(Input::Route { destination, route });
            }
            Request::Random(bits) => self.handle(Input::Random(bits)),
            Request::Order(act, reply) => {
                self.next_order += 1;
                let order = self.next_order;
                self.ordered.insert(order, reply);
                self.handle(Input::Order(OperatorOrder { order, act }));
            }
        }
    }

    fn await_reply(&mut self, reply: oneshot::Sender<Supplied>) -> u64 {
        self.next_order += 1;
        self.replies.insert(self.next_order, reply);
        self.next_order
    }

    fn carry_out(&mut self, output: Output) {
        match output {
            Output::Send { peer, bytes } => {
                // A message that is not sent is said again when its time comes.
                if let Some(&connection) = self.connections.get(&peer)
                    && let Err(error) = self.around.links.send(&peer, connection, bytes)
                {
                    tracing::debug!(%peer, %error, "message not sent");
                }
            }
            Output::Format {
                ticket,
                composition,
                unit_bytes,
            } => {
                self.next_ticket += 1;
                let order = FormatOrder {
                    composition,
                    mask_bytes: MASK_BITS / 8,
                    unit_bytes,
                };
                self.tickets
                    .insert(self.next_ticket, (ticket, order.clone()));
                self.orders.push_back(Command::Format {
                    ticket: self.next_ticket,
                    order,
                });
            }
            Output::Settle { name, outcome } => {
                self.orders.push_back(Command::Drop { name: name.clone() });
                self.settle(name, outcome);
            }
            Output::Elsewhere { module_pair, ids } => {
                let task = self.around.modules.get(&module_pair);
                if let Some(wanted) = task.and_then(|task| task.wanted.as_ref()) {
                    // What finds no room is said again.
                    let _ = wanted.try_send(ids);
                }
            }
            Output::Numbering {
                module_pair,
                generation,
                session,
            } => {
                if let Some(task) = self.around.modules.get(&module_pair) {
                    task.named.send_replace(Some(Named {
                        generation,
                        session,
                    }));
                }
            }
            Output::Supplied { order, result } => {
                // An application that has gone away has its keys burned all the same.
                if let Some(reply) = self.replies.remove(&order) {
                    let _ = reply.send(result);
                }
            }
            Output::Ordered { order, answer } => {
                if let Some(reply) = self.ordered.remove(&order) {
                    let _ = reply.send(answer);
                }
            }
            Output::WantRoute { destination } => {
                if let Some(want_route) = &self.around.want_route {
                    // A full queue means that the controller is being asked already.
                    let _ = want_route.try_send(destination);
                }
            }
            Output::WantRandom { bytes } => {
                if let Some(generator) = &self.around.want_random {
                    let _ = generator.send(bytes);
                }
            }
            Output::Alarm(alarm) => {
                tracing::error!(?alarm, "alarm");
                let _ = self.around.alarms.send(alarm);
            }
        }
    }

    fn settle(&self, name: QkdKeyName, outcome: Settlement) {
        if let Some(task) = self.around.modules.get(&name.module_pair) {
            let _ = task.settle.send((name, outcome));
        }
    }

    /// Gives the stage the orders that wait, as many as it takes.
    fn order_again(&mut self) {
        while let Some(order) = self.orders.pop_front() {
            match self.around.stage.send(order) {
                Ok(()) => {}
                Err(CommandRefused::Full(order)) => {
                    self.orders.push_front(*order);
                    return;
                }
                Err(CommandRefused::Stopped(_)) => return,
            }
        }
    }
}

/// Whether a QKD-key that the pipeline refused must not be used at the other end either.
fn quarantine(reason: RefuseReason) -> Option<QuarantineReason> {
    match reason {
        RefuseReason::Repetition | RefuseReason::Proportion | RefuseReason::Bias => {
            Some(QuarantineReason::Unhealthy)
        }
        RefuseReason::DuplicateBlock => Some(QuarantineReason::Repeated),
        _ => None,
    }
}

/// Tells a module's task what its QKD-keys are called as long as the module tells no session.
fn name_first(kma: &Kma, module_pair: &ModulePairId, task: &ModuleTask) {
    task.named.send_replace(Some(Named {
        generation: kma.store().generation(module_pair),
        session: None,
    }));
}

/// How long a stop may take.
pub(crate) const STOP_WITHIN: Duration = Duration::from_secs(4);
