//! Both ends over TLS on loopback.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use qkd_control::{
    AlarmReport, AskError, ClientConfig, Controller, ControllerLink, ControllerLinkConfig,
    Destination, NetworkLink, RouteFailure, Topology, serve,
    shell::{Route, RouteError},
};
use qkd_keyfile::{Clock, Entropy, Mono, NodeId, Now, UnixTime};
use qkd_net::{Reloadable, pki};
use tempfile::TempDir;
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
    time::{Instant, sleep, timeout},
};

const PATIENCE: Duration = Duration::from_secs(60);

fn node(id: &str) -> NodeId {
    id.parse().unwrap()
}

struct TestClock(Instant);

impl Clock for TestClock {
    fn now(&self) -> Now {
        Now {
            mono: Mono(self.0.elapsed()),
            unix: UnixTime(0),
        }
    }
}

struct Zeros;

impl Entropy for Zeros {
    fn fill(&mut self, out: &mut [u8]) {
        out.fill(0);
    }
}

fn authority() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let since = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let request = pki::Request {
        nodes: &["a", "b", "c", "stranger", "controller"].map(node),
        apps: &["app".parse().unwrap()],
        extra_hosts: &[],
        now: UnixTime(i64::try_from(since.as_nanos()).unwrap()),
        valid_days: 30,
    };
    pki::init(dir.path(), &request).unwrap();
    dir
}

fn credentials(dir: &Path, who: &str) -> Arc<Reloadable> {
    let loaded = Reloadable::load(
        &dir.join("ca.pem"),
        &dir.join(format!("{who}.pem")),
        &dir.join(format!("{who}.key")),
    );
    Arc::new(loaded.unwrap())
}

fn controller() -> Arc<Controller> {
    let link = |a, b| NetworkLink {
        a: node(a),
        b: node(b),
        weight: 1,
    };
    let links = vec![link("a", "b"), link("b", "c")];
    let topology = Topology::new(links, BTreeMap::new(), 0).unwrap();
    Controller::new(topology, Box::new(Zeros), false)
}

fn clock() -> Arc<TestClock> {
    Arc::new(TestClock(Instant::now()))
}

fn connect(dir: &Path, who: &str, address: &str) -> ControllerLink<TestClock> {
    let mut client = ClientConfig::new(node("a"), ["b"].map(node).into());
    client.answer_within = Duration::from_secs(2);
    let config = ControllerLinkConfig {
        controller: node("controller"),
        address: address.to_owned(),
        credentials: credentials(dir, who),
        client,
        seed: 1,
    };
    ControllerLink::start(config, clock())
}

/// Asks until the controller is connected.
async fn route(link: &ControllerLink<TestClock>, to: &str) -> Result<Route, RouteFailure> {
    let start = Instant::now();
    loop {
        match link.route(Destination::Node(node(to))).await {
            Ok(route) => return Ok(route),
            Err(RouteError::Failed(failure)) => return Err(failure),
            Err(RouteError::Ask(AskError::NotConnected)) if start.elapsed() < PATIENCE => {
                sleep(Duration::from_millis(10)).await;
            }
            Err(other) => panic!("{other}"),
        }
    }
}

async fn until(mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_key_manager_gets_routes_and_reports() {
    let dir = authority();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let controller = controller();
    let credentials = credentials(dir.path(), "node-controller");
    let serving = tokio::spawn(serve(listener, credentials, controller.clone(), clock()));

    let km = connect(dir.path(), "node-a", &address);
    let found = route(&km, "c").await.unwrap();
    assert_eq!(
        (found.destination, found.transit),
        (node("c"), vec![node("b")])
    );
    km.relay_ended(found.query, Ok(()));
    until(|| controller.counters().relays_done == 1).await;
    let hops = km
        .next_hops(None, Destination::Node(node("c")))
        .await
        .unwrap();
    assert_eq!(hops.next, [node("b")]);

    let alarm = AlarmReport {
        peer: node("b"),
        raised: true,
        text: "fibre cut".to_owned(),
    };
    km.report_alarm(alarm);
    until(|| controller.counters().alarms == 1).await;
    let failure = route(&km, "c").await.unwrap_err();
    assert_eq!(
        failure,
        RouteFailure::Refused {
            reason: "no-route".to_owned()
        }
    );
    serving.abort();
}

#[tokio::test]
async fn a_controller_that_restarts_is_found_again_and_told_of_alarms() {
    let dir = authority();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    // A second handle keeps the port ours while the controller is away.
    let kept = TcpListener::from_std(listener.try_clone().unwrap()).unwrap();
    let address = kept.local_addr().unwrap().to_string();
    let listener = TcpListener::from_std(listener).unwrap();
    let credentials = credentials(dir.path(), "node-controller");
    let serving = tokio::spawn(serve(listener, credentials.clone(), controller(), clock()));
    let km = connect(dir.path(), "node-a", &address);
    let alarm = AlarmReport {
        peer: node("b"),
        raised: true,
        text: "fibre cut".to_owned(),
    };
    km.report_alarm(alarm);
    assert!(matches!(
        route(&km, "c").await,
        Err(RouteFailure::Refused { .. })
    ));
    serving.abort();
    let _ = serving.await;

    let fresh = controller();
    let serving = tokio::spawn(serve(kept, credentials, fresh.clone(), clock()));
    until(|| fresh.counters().alarms == 1).await;
    assert!(matches!(
        route(&km, "c").await,
        Err(RouteFailure::Refused { .. })
    ));
    serving.abort();
}

#[tokio::test]
async fn strangers_and_applications_get_no_answer() {
    let dir = authority();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let controller = controller();
    let own = credentials(dir.path(), "node-controller");
    let serving = tokio::spawn(serve(listener, own, controller.clone(), clock()));
    for who in ["node-stranger", "app-app"] {
        let credentials = credentials(dir.path(), who).current();
        let tcp = TcpStream::connect(&address).await.unwrap();
        let config = credentials.client_config(&node("controller"), &[]);
        let mut stream = qkd_net::tls::connect(tcp, config, PATIENCE).await.unwrap();
        let end = timeout(PATIENCE, stream.read_u8()).await.unwrap();
        assert!(end.is_err(), "{who}");
    }
    assert_eq!(controller.counters(), Default::default());
    serving.abort();
}

#[tokio::test]
async fn a_controller_that_does_not_answer_is_left() {
    let dir = authority();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let own = credentials(dir.path(), "node-controller");
    let (connections, mut accepted) = tokio::sync::mpsc::channel(8);
    let mute = tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let config = own.current().server_config(&[]);
            let (stream, _) = qkd_net::tls::accept(tcp, config, PATIENCE).await.unwrap();
            // Kept open, never read.
            connections.send(stream).await.unwrap();
        }
    });
    let km = connect(dir.path(), "node-a", &address);
    assert_eq!(route(&km, "c").await, Err(RouteFailure::TimedOut));
    let first = timeout(PATIENCE, accepted.recv()).await.unwrap();
    let second = timeout(PATIENCE, accepted.recv()).await.unwrap();
    assert!(first.is_some() && second.is_some(), "dialled anew");
    mute.abort();
}
