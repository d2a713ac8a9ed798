//! The side that accepts: the node with the greater ID.

use std::{collections::HashMap, net::SocketAddr};

use qkd_keyfile::NodeId;
use tokio::sync::mpsc;

use super::{
    LinkTiming,
    connection::{Link, Stream, greet},
    outbox::SharedCounters,
};
use crate::{
    Handler, Identity,
    tls::{HandshakeError, ServerStream},
};

/// Hands each incoming connection to the task of its peer.
pub(super) struct Door {
    pub(super) timing: LinkTiming,
    /// Where the connections of each peer go.
    pub(super) newcomers: HashMap<NodeId, mpsc::Sender<Stream>>,
    pub(super) counters: SharedCounters,
}

impl Handler for Door {
    async fn talk(&self, stream: ServerStream, client: Identity, from: SocketAddr) {
        let newcomers = match &client {
            Identity::Node(peer) => self.newcomers.get(peer),
            Identity::App(_) => None,
        };
        let Some(newcomers) = newcomers else {
            self.counters.add(|counters| &mut counters.refused);
            tracing::warn!(%from, %client, "connection refused: may not connect here");
            return;
        };
        let mut stream = stream.into();
        if let Err(error) = greet(&mut stream, self.timing).await {
            self.counters
                .add(|counters| &mut counters.failed_handshakes);
            tracing::warn!(%from, %client, %error, "connection refused: no greeting");
            return;
        }
        if newcomers.try_send(stream).is_err() {
            self.counters.add(|counters| &mut counters.refused);
            tracing::warn!(%from, %client, "connection refused: the one before still waits");
        }
    }

    fn failed(&self, _error: &HandshakeError) {
        self.counters
            .add(|counters| &mut counters.failed_handshakes);
    }
}

/// Runs the connections of one peer, one at a time: a newer one replaces the one that stands.
pub(super) async fn take_turns(link: Link, mut incoming: mpsc::Receiver<Stream>) {
    let mut waiting = None;
    loop {
        let stream = match waiting.take() {
            Some(stream) => stream,
            None => match incoming.recv().await {
                Some(stream) => stream,
                None => return,
            },
        };
        let replaced = async {
            match incoming.recv().await {
                Some(newcomer) => newcomer,
                None => std::future::pending().await,
            }
        };
        waiting = link.run(stream, replaced).await;
    }
}
