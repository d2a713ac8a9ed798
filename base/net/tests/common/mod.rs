//! An authority in a temporary directory, and nodes under it.
#![allow(dead_code, reason = "every test file uses a part")]

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use qkd_keyfile::{NodeId, UnixTime};
use qkd_net::{
    Credentials, LinkEvent, Links, LinksConfig, LinksHandle, Peer, Reloadable,
    links::LinkTiming,
    pki::{self, Request},
};
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::mpsc::Receiver, time::timeout};

/// No step of any test takes this long on a healthy machine, however busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn now() -> UnixTime {
    let since = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    UnixTime(i64::try_from(since.as_nanos()).unwrap())
}

pub(crate) fn node(id: &str) -> NodeId {
    id.parse().unwrap()
}

/// Nodes "a", "b" and "c" and the application "app".
pub(crate) fn authority() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let request = Request {
        nodes: &["a", "b", "c"].map(node),
        apps: &["app".parse().unwrap()],
        extra_hosts: &[],
        now: now(),
        valid_days: 30,
    };
    pki::init(dir.path(), &request).unwrap();
    dir
}

/// Credentials of `who` ("node-a") under the authority of another directory.
pub(crate) fn mixed(authority: &Path, own: &Path, who: &str) -> Credentials {
    Credentials::load(
        &authority.join("ca.pem"),
        &own.join(format!("{who}.pem")),
        &own.join(format!("{who}.key")),
    )
    .unwrap()
}

pub(crate) fn credentials(dir: &Path, who: &str) -> Credentials {
    mixed(dir, dir, who)
}

pub(crate) fn reloadable(dir: &Path, who: &str) -> Arc<Reloadable> {
    let loaded = Reloadable::load(
        &dir.join("ca.pem"),
        &dir.join(format!("{who}.pem")),
        &dir.join(format!("{who}.key")),
    );
    Arc::new(loaded.unwrap())
}

/// Credentials of `who` that heed the revocation list of their authority.
pub(crate) fn heedful(dir: &Path, who: &str) -> Arc<Reloadable> {
    let loaded = Reloadable::load_with_crl(
        &dir.join("ca.pem"),
        &dir.join(format!("{who}.pem")),
        &dir.join(format!("{who}.key")),
        Some(&dir.join("crl.pem")),
    );
    Arc::new(loaded.unwrap())
}

/// Puts nodes on the revocation list, which holds for so many days from `now` on.
pub(crate) fn revoke(dir: &Path, nodes: &[&str], now: UnixTime, valid_days: u32) {
    let nodes: Vec<NodeId> = nodes.iter().map(|id| node(id)).collect();
    let request = Request {
        nodes: &nodes,
        apps: &[],
        extra_hosts: &[],
        now,
        valid_days,
    };
    pki::revoke(dir, &request).unwrap();
}

pub(crate) async fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

pub(crate) fn timing() -> LinkTiming {
    LinkTiming {
        retry_at_most: Duration::from_millis(200),
        ..LinkTiming::default()
    }
}

/// One running end.
pub(crate) struct End {
    pub(crate) handle: LinksHandle,
    pub(crate) events: Receiver<LinkEvent>,
}

impl End {
    pub(crate) fn start(
        dir: &Path,
        me: &str,
        listen: Option<TcpListener>,
        peers: &[(&str, &str)],
        timing: LinkTiming,
    ) -> Self {
        let credentials = reloadable(dir, &format!("node-{me}"));
        Self::start_as(credentials, me, listen, peers, timing)
    }

    pub(crate) fn start_as(
        credentials: Arc<Reloadable>,
        me: &str,
        listen: Option<TcpListener>,
        peers: &[(&str, &str)],
        timing: LinkTiming,
    ) -> Self {
        let peers = peers.iter().map(|(id, address)| Peer {
            id: node(id),
            address: (*address).to_owned(),
        });
        let config = LinksConfig {
            me: node(me),
            listen,
            peers: peers.collect(),
            credentials,
            timing,
            seed: 1,
        };
        let (handle, events) = Links::start(config).unwrap();
        Self { handle, events }
    }

    pub(crate) async fn next(&mut self) -> LinkEvent {
        let event = timeout(PATIENCE, self.events.recv()).await;
        event.expect("no event in time").expect("links have ended")
    }

    /// The next event, which must be an `Up` of `peer`; its connection.
    pub(crate) async fn up(&mut self, peer: &str) -> u64 {
        match self.next().await {
            LinkEvent::Up {
                peer: who,
                connection,
            } if who == node(peer) => connection,
            other => panic!("expected Up of {peer}, got {other:?}"),
        }
    }

    /// Waits for `peer` to come up, whatever happens before.
    pub(crate) async fn up_at_last(&mut self, peer: &str) -> u64 {
        loop {
            if let LinkEvent::Up {
                peer: who,
                connection,
            } = self.next().await
                && who == node(peer)
            {
                return connection;
            }
        }
    }

    /// The reason of the next `Down` of `peer`, whatever happens before.
    pub(crate) async fn down(&mut self, peer: &str) -> qkd_net::links::DownReason {
        loop {
            if let LinkEvent::Down {
                peer: who, reason, ..
            } = self.next().await
                && who == node(peer)
            {
                return reason;
            }
        }
    }

    /// The next message of anyone, whatever happens before.
    pub(crate) async fn message(&mut self) -> (NodeId, Vec<u8>) {
        loop {
            if let LinkEvent::Message { peer, bytes, .. } = self.next().await {
                return (peer, bytes);
            }
        }
    }
}
