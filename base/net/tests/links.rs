//! Links between real processes' worth of nodes, over TLS on loopback.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::time::Duration;

use common::{
    End, PATIENCE, authority, credentials, heedful, listener, mixed, node, now, revoke, timing,
};
use qkd_net::{
    FrameError,
    links::{DownReason, LinkTiming, SendError},
    tls::connect,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    time::{Instant, sleep, timeout},
};

/// "b" listens, "a" dials it.
async fn pair(dir: &std::path::Path, timing: LinkTiming) -> (End, End) {
    let (listen, address) = listener().await;
    let b = End::start(dir, "b", Some(listen), &[("a", "")], timing);
    let a = End::start(dir, "a", None, &[("b", &address)], timing);
    (a, b)
}

/// Waits until `condition` holds.
async fn until(mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn messages_travel_both_ways_in_order() {
    let dir = authority();
    let (mut a, mut b) = pair(dir.path(), timing()).await;
    let (on_a, on_b) = (a.up("b").await, b.up("a").await);
    let long = vec![5; 1 << 20];
    for message in [&b"one"[..], b"two", &long] {
        a.handle.send(&node("b"), on_a, message.to_vec()).unwrap();
        b.handle.send(&node("a"), on_b, message.to_vec()).unwrap();
    }
    for message in [&b"one"[..], b"two", &long] {
        assert_eq!(b.message().await, (node("a"), message.to_vec()));
        assert_eq!(a.message().await, (node("b"), message.to_vec()));
    }
    let status = &a.handle.status()[0];
    assert_eq!((status.sent_messages, status.received_messages), (3, 3));
    assert_eq!(status.received_bytes, 6 + (1 << 20));
    until(|| a.handle.status()[0].queued_bytes == 0).await;
}

#[tokio::test]
async fn what_cannot_be_sent_is_told() {
    let dir = authority();
    let (mut a, mut b) = pair(dir.path(), timing()).await;
    let connection = a.up("b").await;
    b.up("a").await;
    let send =
        |peer: &str, connection, bytes| a.handle.send(&node(peer), connection, vec![0; bytes]);
    assert_eq!(send("c", connection, 1), Err(SendError::UnknownPeer));
    assert_eq!(send("b", connection + 1, 1), Err(SendError::NotConnected));
    let max_bytes = 1 << 20;
    assert_eq!(
        send("b", connection, 0),
        Err(SendError::Length {
            bytes: 0,
            max_bytes
        })
    );
    let bytes = (1 << 20) + 1;
    assert_eq!(
        send("b", connection, bytes),
        Err(SendError::Length { bytes, max_bytes })
    );
    assert_eq!(send("b", connection, 1), Ok(()));
}

#[tokio::test]
async fn a_peer_that_restarts_is_found_again() {
    let dir = authority();
    let (listen, address) = listener().await;
    // A second handle keeps the port ours while b is away.
    let listen = listen.into_std().unwrap();
    let kept = listen.try_clone().unwrap();
    let listen = TcpListener::from_std(listen).unwrap();
    let mut b = End::start(dir.path(), "b", Some(listen), &[("a", "")], timing());
    let mut a = End::start(dir.path(), "a", None, &[("b", &address)], timing());
    assert_eq!(a.up("b").await, 1);
    b.up("a").await;
    b.handle.shutdown().await;
    assert!(matches!(
        a.down("b").await,
        DownReason::Closed | DownReason::Read(FrameError::Io(_))
    ));
    assert_eq!(
        a.handle.send(&node("b"), 1, vec![1]),
        Err(SendError::NotConnected)
    );

    let listen = TcpListener::from_std(kept).unwrap();
    let mut b = End::start(dir.path(), "b", Some(listen), &[("a", "")], timing());
    b.up("a").await;
    let connection = a.up("b").await;
    assert!(connection > 1);
    a.handle
        .send(&node("b"), connection, b"again".to_vec())
        .unwrap();
    assert_eq!(b.message().await.1, b"again");

    // And the side that dials.
    a.handle.shutdown().await;
    b.down("a").await;
    let mut a = End::start(dir.path(), "a", None, &[("b", &address)], timing());
    a.up("b").await;
    b.up("a").await;
}

#[tokio::test]
async fn only_configured_nodes_that_should_dial_get_in() {
    let (dir, elsewhere) = (authority(), authority());
    let (listen, address) = listener().await;
    // "c" is a peer of "b", but "b" dials it, not the other way round.
    let mut b = End::start(
        dir.path(),
        "b",
        Some(listen),
        &[("a", ""), ("c", "127.0.0.1:1")],
        timing(),
    );
    let strangers = [
        credentials(dir.path(), "app-app"),
        credentials(dir.path(), "node-c"),
        credentials(dir.path(), "node-b"),
        mixed(dir.path(), elsewhere.path(), "node-a"),
    ];
    for stranger in &strangers {
        let tcp = TcpStream::connect(&address).await.unwrap();
        let config = stranger.client_config(&node("b"), &[b"qkd-kx/1"]);
        let mut stream = connect(tcp, config, PATIENCE).await.unwrap();
        let end = timeout(PATIENCE, stream.read_u8()).await.unwrap();
        assert!(end.is_err(), "a stranger got a greeting");
    }
    until(|| b.handle.counters().refused == 3).await;
    until(|| b.handle.counters().failed_handshakes == 1).await;

    // Another protocol with the right certificate, and no TLS at all.
    let a = credentials(dir.path(), "node-a");
    let tcp = TcpStream::connect(&address).await.unwrap();
    assert!(
        connect(tcp, a.client_config(&node("b"), &[b"h2"]), PATIENCE)
            .await
            .is_err()
    );
    let mut tcp = TcpStream::connect(&address).await.unwrap();
    tcp.write_all(&[0x55; 100]).await.unwrap();
    until(|| b.handle.counters().failed_handshakes == 3).await;

    let mut a = End::start(dir.path(), "a", None, &[("b", &address)], timing());
    a.up("b").await;
    b.up("a").await;
}

#[tokio::test]
async fn a_second_connection_of_a_peer_replaces_the_first() {
    let dir = authority();
    let (listen, address) = listener().await;
    let mut b = End::start(dir.path(), "b", Some(listen), &[("a", "")], timing());
    let mut first = End::start(dir.path(), "a", None, &[("b", &address)], timing());
    assert_eq!((b.up("a").await, first.up("b").await), (1, 1));
    let mut second = End::start(dir.path(), "a", None, &[("b", &address)], timing());
    assert!(matches!(b.down("a").await, DownReason::Replaced));
    first.down("b").await;
    drop(first);
    let connection = b.up_at_last("a").await;
    let on_second = second.up_at_last("b").await;
    assert_eq!(
        b.handle.send(&node("a"), 1, vec![1]),
        Err(SendError::NotConnected)
    );
    assert!(connection >= 2 && on_second >= 1);
    assert!(b.handle.counters().replaced >= 1);
}

/// A node "a" played by hand, so that it can misbehave towards "b".
async fn by_hand(
    dir: &std::path::Path,
    address: &str,
) -> tokio_rustls::client::TlsStream<TcpStream> {
    by_hand_to(dir, "b", address).await
}

async fn by_hand_to(
    dir: &std::path::Path,
    to: &str,
    address: &str,
) -> tokio_rustls::client::TlsStream<TcpStream> {
    let config = credentials(dir, "node-a").client_config(&node(to), &[b"qkd-kx/1"]);
    let tcp = TcpStream::connect(address).await.unwrap();
    let mut stream = connect(tcp, config, PATIENCE).await.unwrap();
    stream.write_all(&[0; 4]).await.unwrap();
    stream.read_exact(&mut [0; 4]).await.unwrap();
    stream
}

#[tokio::test]
async fn an_oversize_frame_ends_the_connection() {
    let dir = authority();
    let (listen, address) = listener().await;
    let mut b = End::start(dir.path(), "b", Some(listen), &[("a", "")], timing());
    let mut stream = by_hand(dir.path(), &address).await;
    b.up("a").await;
    stream
        .write_all(&(1_u32 << 20).wrapping_add(1).to_be_bytes())
        .await
        .unwrap();
    assert!(matches!(
        b.down("a").await,
        DownReason::Read(FrameError::TooLong(_))
    ));
    assert_eq!(b.handle.counters().oversize, 1);
}

#[tokio::test]
async fn a_peer_that_does_not_read_loses_its_connection_and_delays_nobody() {
    let dir = authority();
    let (listen, address) = listener().await;
    let small = LinkTiming {
        max_queue_bytes: 4 << 20,
        ..timing()
    };
    let peers = [("a", ""), ("b", "")];
    let mut c = End::start(dir.path(), "c", Some(listen), &peers, small);
    let config = credentials(dir.path(), "node-a").client_config(&node("c"), &[b"qkd-kx/1"]);
    let tcp = TcpStream::connect(&address).await.unwrap();
    let mut slow = connect(tcp, config, PATIENCE).await.unwrap();
    slow.write_all(&[0; 4]).await.unwrap();
    let on_a = c.up("a").await;
    let mut b = End::start(dir.path(), "b", None, &[("c", &address)], timing());
    let on_b = c.up("b").await;
    b.up("c").await;

    let full = loop {
        match c.handle.send(&node("a"), on_a, vec![0; 1 << 20]) {
            Ok(()) => {}
            Err(error) => break error,
        }
        c.handle
            .send(&node("b"), on_b, b"in time".to_vec())
            .unwrap();
        assert_eq!(b.message().await.1, b"in time");
    };
    assert!(matches!(full, SendError::QueueFull { queued_bytes } if queued_bytes > 3 << 20));
    assert!(matches!(c.down("a").await, DownReason::Slow));
    assert_eq!(c.handle.counters().slow, 1);
    c.handle
        .send(&node("b"), on_b, b"still there".to_vec())
        .unwrap();
    assert_eq!(b.message().await.1, b"still there");
}

#[tokio::test]
async fn a_consumer_that_lags_stops_the_reading_but_loses_nothing() {
    let dir = authority();
    let brisk = LinkTiming {
        ping_every: Duration::from_millis(100),
        dead_after: Duration::from_millis(1500),
        max_queue_bytes: 64 << 20,
        ..timing()
    };
    let (mut a, mut b) = pair(dir.path(), brisk).await;
    let connection = a.up("b").await;
    b.up("a").await;
    const COUNT: u32 = 60;
    for i in 0..COUNT {
        let mut message = vec![0; 512 << 10];
        message[..4].copy_from_slice(&i.to_be_bytes());
        a.handle.send(&node("b"), connection, message).unwrap();
    }
    // Longer than either side bears silence.
    sleep(Duration::from_secs(3)).await;
    assert!(
        a.handle.status()[0].queued_bytes > 0,
        "b read without bounds"
    );
    for i in 0..COUNT {
        assert_eq!(b.message().await.1[..4], i.to_be_bytes());
    }
    assert_eq!(b.handle.status()[0].connection, Some(1));
}

#[tokio::test]
async fn a_black_hole_is_noticed_by_both_sides() {
    let dir = authority();
    let brisk = LinkTiming {
        ping_every: Duration::from_millis(100),
        dead_after: Duration::from_millis(1500),
        ..timing()
    };
    let (listen, address) = listener().await;
    let (door, door_address) = listener().await;
    let (swallow, mut swallowed) = tokio::sync::watch::channel(false);
    let proxy = tokio::spawn(async move {
        let (mut outer, _) = door.accept().await.unwrap();
        let mut inner = TcpStream::connect(address).await.unwrap();
        tokio::select! {
            _ = copy_bidirectional(&mut outer, &mut inner) => {}
            _ = swallowed.changed() => {}
        }
        // Both sockets stay open; nothing passes any more.
        (outer, inner)
    });
    let mut b = End::start(dir.path(), "b", Some(listen), &[("a", "")], brisk);
    let mut a = End::start(dir.path(), "a", None, &[("b", &door_address)], brisk);
    a.up("b").await;
    b.up("a").await;
    // Silence of the protocols is no silence of the link.
    sleep(brisk.dead_after * 2).await;
    assert!(a.handle.status()[0].connection.is_some());

    swallow.send(true).unwrap();
    let _open = proxy.await.unwrap();
    for (end, peer) in [(&mut a, "b"), (&mut b, "a")] {
        let reason = end.down(peer).await;
        assert!(
            matches!(reason, DownReason::Read(FrameError::TimedOut { .. })),
            "{reason}"
        );
        assert_eq!(end.handle.counters().silent, 1);
    }
}

#[tokio::test]
async fn dropping_the_last_handle_closes_the_links() {
    let dir = authority();
    let (mut a, mut b) = pair(dir.path(), timing()).await;
    a.up("b").await;
    b.up("a").await;
    drop(a.handle);
    assert!(matches!(
        b.down("a").await,
        DownReason::Closed | DownReason::Read(_)
    ));
    assert!(timeout(PATIENCE, a.events.recv()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_node_that_is_not_let_in_is_never_up() {
    let dir = authority();
    let (listen, address) = listener().await;
    let b = End::start(dir.path(), "b", Some(listen), &[], timing());
    let mut a = End::start(dir.path(), "a", None, &[("b", &address)], timing());
    until(|| b.handle.counters().refused >= 3 && a.handle.counters().failed_dials >= 2).await;
    assert!(a.events.try_recv().is_err());
    assert_eq!(a.handle.status()[0].connection, None);
}

#[tokio::test]
async fn a_revocation_closes_the_open_connection_of_that_peer_and_no_other() {
    let dir = authority();
    revoke(dir.path(), &[], now(), 30);
    let (listen, address) = listener().await;
    let (as_b, as_a) = (heedful(dir.path(), "node-b"), heedful(dir.path(), "node-a"));
    let (to_c, c_address) = listener().await;
    let peers = [("a", ""), ("c", &*c_address)];
    let mut b = End::start_as(as_b.clone(), "b", Some(listen), &peers, timing());
    let mut a = End::start_as(as_a.clone(), "a", None, &[("b", &address)], timing());
    let mut c = End::start(dir.path(), "c", Some(to_c), &[("b", "")], timing());
    a.up("b").await;
    for _ in 0..2 {
        assert!(matches!(b.next().await, qkd_net::LinkEvent::Up { .. }));
    }
    let to_b = c.up("b").await;

    // The accepting end.
    revoke(dir.path(), &["a"], now(), 30);
    as_b.reload().unwrap();
    assert!(matches!(b.down("a").await, DownReason::Refused));
    a.down("b").await;
    until(|| b.handle.counters().failed_handshakes >= 2).await;
    c.handle
        .send(&node("b"), to_b, b"still here".to_vec())
        .unwrap();
    assert_eq!(b.message().await, (node("c"), b"still here".to_vec()));

    // And the one that dialled.
    revoke(dir.path(), &["c"], now(), 30);
    as_b.reload().unwrap();
    assert!(matches!(b.down("c").await, DownReason::Refused));
    c.down("b").await;
    until(|| b.handle.counters().failed_dials >= 2).await;
}

#[tokio::test]
async fn connections_that_never_finish_a_handshake_keep_no_peer_out() {
    let dir = authority();
    let (listen, address) = listener().await;
    let impatient = LinkTiming {
        handshake_within: Duration::from_millis(300),
        ..timing()
    };
    let b = End::start(dir.path(), "b", Some(listen), &[("a", "")], impatient);
    // Several times as many as are let in at once; each sends the first byte of a record.
    let mut idle = Vec::new();
    for _ in 0..200 {
        let mut tcp = TcpStream::connect(&address).await.unwrap();
        tcp.write_all(&[22]).await.unwrap();
        idle.push(tcp);
    }
    let mut a = End::start(dir.path(), "a", None, &[("b", &address)], timing());
    a.up("b").await;
    until(|| b.handle.counters().failed_handshakes >= 200).await;
}

#[tokio::test]
async fn a_peer_that_floods_keeps_no_other_from_being_heard() {
    let dir = authority();
    let (listen, address) = listener().await;
    let peers = [("a", ""), ("b", "")];
    let mut c = End::start(dir.path(), "c", Some(listen), &peers, timing());
    let mut flood = by_hand_to(dir.path(), "c", &address).await;
    c.up("a").await;
    let flooding = tokio::spawn(async move {
        let frames = [0, 0, 0, 1, 7].repeat(1000);
        while flood.write_all(&frames).await.is_ok() {}
    });
    let mut b = End::start(dir.path(), "b", None, &[("c", &address)], timing());
    c.up_at_last("b").await;
    let to_c = b.up("c").await;
    for i in 0..10 {
        b.handle.send(&node("c"), to_c, vec![i]).unwrap();
        let heard = async { while c.message().await.0 != node("b") {} };
        timeout(PATIENCE, heard).await.expect("b was not heard");
    }
    flooding.abort();
}
