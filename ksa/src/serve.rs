//! The listener: connections, their limits, and an orderly end.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::Router;
use hyper::{Request, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use qkd_keyfile::AppId;
use qkd_net::{Identity, Reloadable, tls};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    Counters, KeySupply, Profile,
    etsi014::{Bounds, Caller, Service, router},
    stall::WriteWithin,
};

/// How a listener behaves.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// What a request may ask for.
    pub profile: Profile,
    /// Bounds of connections and requests.
    pub limits: Limits,
    /// Whether HTTP/2 is offered beside HTTP/1.1. Its library copies up to 256 bytes of each frame
    /// of a reply into a buffer that later frames write over but nobody wipes, so it is off by
    /// default.
    pub http2: bool,
}

impl Config {
    /// Usual limits, HTTP/1.1 only.
    #[must_use]
    pub fn new(profile: Profile) -> Self {
        Self {
            profile,
            limits: Limits::default(),
            http2: false,
        }
    }
}

/// Bounds of connections and requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Open connections over all applications.
    pub connections: usize,
    /// Open connections of one application.
    pub connections_per_application: usize,
    /// Requests in progress on one HTTP/2 connection.
    pub streams: u32,
    /// Length of a request's head, in bytes (8 KiB at least).
    pub head_bytes: usize,
    /// Length of a request's body, in bytes.
    pub body_bytes: usize,
    /// Time for the TLS handshake.
    pub handshake_within: Duration,
    /// Time for a request's head, from the start of the connection or from the reply before it: an
    /// idle connection is kept as long.
    pub head_within: Duration,
    /// Time for a request's body.
    pub body_within: Duration,
    /// Time for the supply to answer.
    pub answer_within: Duration,
    /// Time for which a client may not read at all while there is something to write.
    pub write_within: Duration,
    /// Age at which a connection is ended in good order: the next one shows its certificate anew.
    pub connection_age: Duration,
    /// Time for requests in progress to finish when a connection or the listener ends.
    pub drain_within: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            connections_per_application: 128,
            streams: 64,
            head_bytes: 16 << 10,
            body_bytes: 64 << 10,
            handshake_within: Duration::from_secs(10),
            head_within: Duration::from_secs(60),
            body_within: Duration::from_secs(10),
            answer_within: Duration::from_secs(30),
            write_within: Duration::from_secs(20),
            connection_age: Duration::from_secs(3600),
            drain_within: Duration::from_secs(10),
        }
    }
}

/// Serves ETSI GS QKD 014 on `listener` until `shutdown` turns true (or its sender is gone), then
/// lets requests in progress finish for [`Limits::drain_within`].
///
/// Credentials are taken anew for every connection. Dropping the future ends all connections at
/// once.
pub async fn serve<S: KeySupply>(
    listener: TcpListener,
    credentials: Arc<Reloadable>,
    supply: Arc<S>,
    config: Config,
    counters: Arc<Counters>,
    shutdown: watch::Receiver<bool>,
) {
    let limits = config.limits;
    let router = router(Arc::new(Service {
        supply,
        profile: config.profile,
        bounds: Bounds {
            body_bytes: limits.body_bytes,
            body_within: limits.body_within,
            answer_within: limits.answer_within,
        },
        counters: Arc::clone(&counters),
    }));
    let shared = Arc::new(Shared {
        credentials,
        config,
        counters: Arc::clone(&counters),
        router,
        open: Mutex::default(),
        shutdown: shutdown.clone(),
    });

    let mut connections = JoinSet::new();
    let mut end = pin!(ended(shutdown));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = end.as_mut() => break,
        };
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((tcp, _)) => {
                counters.connections.add(1);
                if connections.len() < limits.connections {
                    connections.spawn(Arc::clone(&shared).connection(tcp));
                } else {
                    counters.connections_over_limit.add(1);
                    tracing::warn!(
                        "{} connections are open, one more is refused",
                        limits.connections
                    );
                }
            }
            Err(error) => {
                counters.accept_errors.add(1);
                tracing::warn!("accept: {error}");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let drained = async { while connections.join_next().await.is_some() {} };
    if timeout(limits.drain_within, drained).await.is_err() {
        connections.shutdown().await;
    }
}

/// Mostly "too many open files", which the next connection would meet at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What all connections share.
struct Shared {
    credentials: Arc<Reloadable>,
    config: Config,
    counters: Arc<Counters>,
    router: Router,
    /// Open connections by application.
    open: Mutex<HashMap<AppId, usize>>,
    shutdown: watch::Receiver<bool>,
}

impl Shared {
    async fn connection(self: Arc<Self>, tcp: TcpStream) {
        let (limits, counters) = (&self.config.limits, &self.counters);
        let protocols: &[&[u8]] = match self.config.http2 {
            true => &[b"h2", b"http/1.1"],
            false => &[b"http/1.1"],
        };
        let config = self.credentials.current().server_config(protocols);
        let accepted = tokio::select! {
            accepted = tls::accept(tcp, config, limits.handshake_within) => accepted,
            () = ended(self.shutdown.clone()) => return,
        };
        let (stream, app) = match accepted {
            Ok((stream, Identity::App(app))) => (stream, app),
            Ok((_, other)) => {
                counters.handshakes_failed.add(1);
                tracing::warn!("{other} is no application, its connection is closed");
                return;
            }
            Err(error) => {
                counters.handshakes_failed.add(1);
                tracing::info!("connection refused: {error}");
                return;
            }
        };
        let Some(_open) = Open::enter(&self, &app) else {
            counters.connections_over_limit.add(1);
            tracing::warn!("{app} has too many connections, one more is refused");
            return;
        };
        let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let refused = self.credentials.until_refused((&stream).into());
        let stream = WriteWithin::new(stream, limits.write_within);
        tokio::select! {
            end = self.requests(TokioIo::new(stream), app.clone(), http2) => if let Err(error) = end {
                counters.connections_failed.add(1);
                tracing::debug!("connection ended: {error}");
            },
            // No request that came with it is answered any more.
            () = refused => {
                counters.connections_failed.add(1);
                tracing::warn!("{app}: connection closed, its certificate is not accepted any more");
            }
        }
    }

    /// Answers the requests of one connection until it ends.
    async fn requests<I>(&self, io: I, app: AppId, http2: bool) -> Result<(), ConnectionError>
    where
        I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    {
        let service = TowerToHyperService::new(self.router.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(Caller(app.clone()));
            hyper::service::Service::call(&service, request)
        });
        let limits = &self.config.limits;
        let http = builder(limits, http2);
        let mut connection = pin!(http.serve_connection(io, service));
        tokio::select! {
            end = connection.as_mut() => return end,
            () = sleep(limits.connection_age) => {}
            () = ended(self.shutdown.clone()) => {}
        }
        connection.as_mut().graceful_shutdown();
        timeout(limits.drain_within, connection)
            .await
            .unwrap_or(Ok(()))
    }

    fn open(&self) -> MutexGuard<'_, HashMap<AppId, usize>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What hyper-util's connections end with.
type ConnectionError = Box<dyn std::error::Error + Send + Sync>;

fn builder(limits: &Limits, http2: bool) -> auto::Builder<TokioExecutor> {
    let builder = auto::Builder::new(TokioExecutor::new());
    // TLS has agreed on the version already; to guess it from the first bytes has no time limit.
    let mut builder = match http2 {
        true => builder.http2_only(),
        false => builder.http1_only(),
    };
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_within)
        .max_buf_size(limits.head_bytes.max(MIN_HEAD_BYTES));
    let head_bytes = u32::try_from(limits.head_bytes).unwrap_or(u32::MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(head_bytes)
        .keep_alive_interval(limits.head_within)
        .keep_alive_timeout(limits.head_within);
    builder
}

/// Hyper takes no smaller buffer.
const MIN_HEAD_BYTES: usize = 8 << 10;

/// One of an application's open connections.
struct Open<'a> {
    shared: &'a Shared,
    app: AppId,
}

impl<'a> Open<'a> {
    fn enter(shared: &'a Shared, app: &AppId) -> Option<Self> {
        let mut open = shared.open();
        let count = open.entry(app.clone()).or_default();
        if *count >= shared.config.limits.connections_per_application {
            return None;
        }
        *count += 1;
        Some(Self {
            shared,
            app: app.clone(),
        })
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let mut open = self.shared.open();
        if let Some(count) = open.get_mut(&self.app) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.app);
            }
        }
    }
}

async fn ended(mut shutdown: watch::Receiver<bool>) {
    // An error means that the sender is gone, and with it whoever wanted to be served.
    let _ = shutdown.wait_for(|ended| *ended).await;
}
