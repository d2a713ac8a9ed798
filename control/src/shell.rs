//! Both ends of Ck on TLS.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use qkd_keyfile::{Clock, Mono, NodeId, Now, Protocol};
use qkd_net::{
    Backoff, Framing, Handler, Identity, Limits, Reloadable, ServeLimits, Shared, drive,
    serve as accept_connections, tls,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, oneshot},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::{
    client::{AskError, Client, ClientConfig, ClientEvent, QueryId, RouteFailure},
    controller::Controller,
    messages::{AlarmReport, Destination, Fault, LinkReport},
};

const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);
const RETRY_AFTER: Duration = Duration::from_millis(100);
const RETRY_AT_MOST: Duration = Duration::from_secs(5);
/// A connection that stood this long was a good one: the next dial does not wait longer for it.
const GOOD_AFTER: Duration = Duration::from_secs(1);

/// Serves key managers until the future is dropped. Nodes that have no link in the topology, and
/// applications, are refused.
pub async fn serve<C: Clock + Sync + 'static>(
    listener: TcpListener,
    credentials: Arc<Reloadable>,
    controller: Arc<Controller>,
    clock: Arc<C>,
) {
    let door = Arc::new(Door { controller, clock });
    accept_connections(listener, credentials, &[], ServeLimits::default(), door).await;
}

struct Door<C> {
    controller: Arc<Controller>,
    clock: Arc<C>,
}

impl<C: Clock + Sync + 'static> Handler for Door<C> {
    async fn talk(&self, stream: tls::ServerStream, client: Identity, from: SocketAddr) {
        let known = |node: &NodeId| {
            self.controller
                .with_topology(|topology| topology.knows(node))
        };
        let node = match client {
            Identity::Node(node) if known(&node) => node,
            other => {
                tracing::warn!(%from, client = %other, "connection refused: not of this network");
                return;
            }
        };
        tracing::info!(%from, %node, "key manager connected");
        let session = Shared::new(self.controller.session(node.clone()));
        let limits = Limits::default();
        let end = drive(&session, stream, Framing::Signal, limits, &*self.clock).await;
        match end {
            Ok(()) => tracing::info!(%node, "key manager disconnected"),
            Err(error) => tracing::warn!(%node, %error, "connection of a key manager ended"),
        }
    }
}

/// Where the controller is and who we are.
#[derive(Debug, Clone)]
pub struct ControllerLinkConfig {
    /// The controller's ID, which its certificate must name.
    pub controller: NodeId,
    /// `host:port`.
    pub address: String,
    /// Our certificates.
    pub credentials: Arc<Reloadable>,
    /// What the key manager knows of itself.
    pub client: ClientConfig,
    /// Where message IDs and the spread of reconnects start; random is best.
    pub seed: u64,
}

/// A route to take. Say how it ended with [`ControllerLink::relay_ended`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Names it.
    pub query: QueryId,
    /// Where it ends.
    pub destination: NodeId,
    /// The nodes between, in order.
    pub transit: Vec<NodeId>,
}

/// Next hops to choose from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NextHops {
    /// The destination's node, where an application was asked for.
    pub destination: Option<NodeId>,
    /// Neighbours that lead there, the best first; at least one.
    pub next: Vec<NodeId>,
}

/// Why a question brought no route.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// It could not be asked.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// It was asked in vain.
    #[error(transparent)]
    Failed(#[from] RouteFailure),
}

/// A connection to the controller that is kept up. Dropping it closes the connection.
#[derive(Debug)]
pub struct ControllerLink<C> {
    shared: Arc<Shared<Wired>>,
    clock: Arc<C>,
    task: JoinHandle<()>,
}

impl<C> Drop for ControllerLink<C> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<C: Clock + Sync + 'static> ControllerLink<C> {
    /// Starts to connect, on the current tokio runtime.
    #[must_use]
    pub fn start(config: ControllerLinkConfig, clock: Arc<C>) -> Self {
        let first_message_id = u32::try_from(config.seed >> 32).unwrap_or(0);
        let wired = Wired {
            client: Client::new(config.client.clone(), first_message_id),
            waiting: HashMap::new(),
            unresponsive: Arc::default(),
        };
        let shared = Arc::new(Shared::new(wired));
        let task = tokio::spawn(keep(shared.clone(), config, clock.clone()));
        Self {
            shared,
            clock,
            task,
        }
    }

    /// The whole route to a destination.
    ///
    /// # Errors
    ///
    /// [`RouteError`]: there is none, or the controller cannot be asked now.
    pub async fn route(&self, destination: Destination) -> Result<Route, RouteError> {
        let now = self.clock.now();
        match self
            .ask(|client| client.ask_route(now, destination))
            .await?
        {
            ClientEvent::Route {
                query,
                destination,
                transit,
            } => Ok(Route {
                query,
                destination,
                transit,
            }),
            other => Err(failure(other)),
        }
    }

    /// The next hops of a route that began at `source`.
    ///
    /// # Errors
    ///
    /// [`RouteError`]: there are none, or the controller cannot be asked now.
    pub async fn next_hops(
        &self,
        source: Option<NodeId>,
        destination: Destination,
    ) -> Result<NextHops, RouteError> {
        let now = self.clock.now();
        let asked = self.ask(|client| client.ask_next_hops(now, source, destination));
        match asked.await? {
            ClientEvent::NextHops {
                destination, next, ..
            } => Ok(NextHops { destination, next }),
            other => Err(failure(other)),
        }
    }

    /// Tells how the relay over a route ended; see [`Client::relay_ended`].
    pub fn relay_ended(&self, route: QueryId, result: Result<(), &str>) {
        self.shared
            .with(|wired| wired.client.relay_ended(route, result));
    }

    /// Reports the state of links; see [`Client::report_status`].
    pub fn report_status(&self, links: Vec<LinkReport>) {
        let now = self.clock.now();
        self.shared
            .with(|wired| wired.client.report_status(now, links));
    }

    /// Reports an alarm; see [`Client::report_alarm`].
    pub fn report_alarm(&self, alarm: AlarmReport) {
        let now = self.clock.now();
        self.shared
            .with(|wired| wired.client.report_alarm(now, alarm));
    }

    async fn ask(
        &self,
        ask: impl FnOnce(&mut Client) -> Result<QueryId, AskError>,
    ) -> Result<ClientEvent, RouteError> {
        let answer = self.shared.with(|wired| {
            let query = ask(&mut wired.client)?;
            let (sender, answer) = oneshot::channel();
            wired.waiting.insert(query, sender);
            Ok::<_, AskError>(answer)
        })?;
        answer.await.map_err(|_| RouteFailure::Lost.into())
    }
}

fn failure(event: ClientEvent) -> RouteError {
    match event {
        ClientEvent::Failed { failure, .. } => failure.into(),
        ClientEvent::NextHops { .. }
        | ClientEvent::Route { .. }
        | ClientEvent::ReportRefused { .. }
        | ClientEvent::Unresponsive => RouteFailure::Malformed.into(),
    }
}

/// The client with those who wait for its answers.
#[derive(Debug)]
struct Wired {
    client: Client,
    waiting: HashMap<QueryId, oneshot::Sender<ClientEvent>>,
    unresponsive: Arc<Notify>,
}

impl Wired {
    fn deliver(&mut self) {
        while let Some(event) = self.client.poll_event() {
            match &event {
                ClientEvent::NextHops { query, .. }
                | ClientEvent::Route { query, .. }
                | ClientEvent::Failed { query, .. } => {
                    if let Some(waiting) = self.waiting.remove(query)
                        && let Err(ClientEvent::Route { query, .. }) = waiting.send(event)
                    {
                        // Whoever asked has gone; the controller must not wait for a result.
                        self.client.relay_ended(query, Err("cancelled"));
                    }
                }
                ClientEvent::ReportRefused { reason } => {
                    tracing::warn!(?reason, "the controller refuses a report");
                }
                ClientEvent::Unresponsive => self.unresponsive.notify_one(),
            }
        }
    }
}

impl Protocol for Wired {
    type Error = Fault;

    fn receive(&mut self, now: Now, message: &[u8]) -> Result<(), Fault> {
        let result = self.client.receive(now, message);
        self.deliver();
        result
    }

    fn poll_transmit(&mut self, now: Now) -> Option<Vec<u8>> {
        self.client.poll_transmit(now)
    }

    fn poll_timeout(&self) -> Option<Mono> {
        self.client.poll_timeout()
    }

    fn handle_timeout(&mut self, now: Now) {
        self.client.handle_timeout(now);
        self.deliver();
    }
}

/// Connects for ever.
async fn keep<C: Clock + Sync>(
    shared: Arc<Shared<Wired>>,
    config: ControllerLinkConfig,
    clock: Arc<C>,
) {
    let controller = &config.controller;
    let mut backoff = Backoff::new(RETRY_AFTER, RETRY_AT_MOST, config.seed);
    let mut last_error = String::new();
    loop {
        match dial(&config).await {
            Ok(stream) => {
                tracing::info!(%controller, "controller connected");
                last_error.clear();
                let since = Instant::now();
                let unresponsive = shared.with(|wired| {
                    wired.client.connected(clock.now());
                    wired.unresponsive = Arc::default();
                    wired.unresponsive.clone()
                });
                let limits = Limits::default();
                let refused = config.credentials.until_refused((&stream).into());
                let end = tokio::select! {
                    () = refused => "its certificate is not accepted any more".to_owned(),
                    end = drive(&shared, stream, Framing::Signal, limits, &*clock) => match end {
                        Ok(()) => "closed by the controller".to_owned(),
                        Err(error) => error.to_string(),
                    },
                    () = unresponsive.notified() => "the controller does not answer".to_owned(),
                };
                tracing::warn!(%controller, reason = end, "controller disconnected");
                shared.with(|wired| {
                    wired.client.connection_lost();
                    wired.deliver();
                });
                if since.elapsed() >= GOOD_AFTER {
                    backoff.reset();
                }
            }
            // A controller that is away for a night fills no log.
            Err(error) if error.to_string() != last_error => {
                tracing::warn!(%controller, %error, "cannot reach the controller, trying on");
                last_error = error.to_string();
            }
            Err(_) => {}
        }
        sleep(backoff.wait()).await;
    }
}

#[derive(Debug, thiserror::Error)]
enum DialError {
    #[error("connecting: {0}")]
    Tcp(#[source] std::io::Error),
    #[error(transparent)]
    Handshake(#[from] tls::HandshakeError),
}

async fn dial(config: &ControllerLinkConfig) -> Result<tls::ClientStream, DialError> {
    let tcp = timeout(HANDSHAKE_WITHIN, TcpStream::connect(&config.address))
        .await
        .map_err(|elapsed| DialError::Tcp(elapsed.into()))?
        .map_err(DialError::Tcp)?;
    let client = config
        .credentials
        .current()
        .client_config(&config.controller, &[]);
    Ok(tls::connect(tcp, client, HANDSHAKE_WITHIN).await?)
}
