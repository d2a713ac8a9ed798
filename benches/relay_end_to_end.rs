//! `relay_end_to_end`: end-to-end key from one node over a second to a third, over TLS on loopback.
//!
//! Question: at what rate does key travel two hops, when pad is there in plenty? Each hop takes pad
//! from both stores, encrypts, authenticates and wipes; the ends compare and store. The links are
//! filled beforehand; what starts the relay is the controller, without which the source has no route.
//! The time begins when it has given one. `tls` is the limit: the same bytes over
//! two TLS connections, with a program between them that does nothing but read and write.
//!
//! Units of 60 KiB: with what is added on the way they fit a block of key memory of 64 KiB.

#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]

mod support;

use std::{
    cell::Cell,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qkd_bridge::{
    demo::{Plan, StockPlan, stock_bytes},
    env::SystemClock,
};
use qkd_keyfile::{Clock, NodeId};
use qkd_net::{
    Credentials, pki,
    tls::{self, ServerStream},
};
use support::{
    fixed_amounts, is_trial,
    net::{BLOCK_BYTES, Net, Sizing, Store, link},
    noise, tell_cpu,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

const NODES: [&str; 3] = ["alice", "relay", "bob"];

const UNIT_BYTES: u32 = 60 << 10;

const WITHIN: Duration = Duration::from_secs(10);

/// Some tenths of a second at the rate that is aimed at.
fn amount_bytes() -> usize {
    if is_trial() { 2 << 20 } else { 128 << 20 }
}

fn relay_end_to_end(c: &mut Criterion) {
    let mut group = c.benchmark_group("relay_end_to_end");
    fixed_amounts(&mut group);
    group.throughput(Throughput::Bytes(amount_bytes() as u64));
    group.bench_function("tls", |b| {
        b.iter_custom(|samples| (0..samples).map(|_| over_tls()).sum());
    });
    // Either direction of a link has half of the pad, and more is used than is carried.
    let pad_bytes = (amount_bytes() * 9 / 4 + (2 << 20)) / BLOCK_BYTES * BLOCK_BYTES;
    let pads = [1, 2].map(|seed| noise(pad_bytes, seed));
    for store in [Store::Memory, Store::Lmdb] {
        group.bench_function(store.name(), |b| {
            b.iter_custom(|samples| (0..samples).map(|_| relayed(store, &pads)).sum());
        });
    }
    group.finish();
}

/// Fresh nodes carry the amount. The time is taken from the last look at which nothing had arrived.
fn relayed(store: Store, pads: &[Vec<u8>; 2]) -> Duration {
    let [alice, relay, bob] = NODES;
    let ids: Vec<NodeId> = NODES.map(|id| id.parse().unwrap()).into();
    let amount = amount_bytes() as u64;
    let plan = Plan {
        links: vec![link(alice, relay), link(relay, bob)],
        stock: Some(StockPlan {
            a: ids[0].clone(),
            b: ids[2].clone(),
            min_kib: (amount >> 10) + 1024,
            unit_bytes: UNIT_BYTES,
        }),
        apps: Vec::new(),
        nodes: ids,
        key_memory_mib: 0,
    };
    let sizing = Sizing {
        store,
        key_memory_mib: 2048,
        capacity_mib: 4096,
    };
    let mut net = Net::start(plan, sizing);
    for ((a, b), pad) in [(alice, relay), (relay, bob)].into_iter().zip(pads) {
        let mut modules = net.modules(a, b);
        net.fill(a, b, &mut modules, pad);
    }
    net.start_controller();
    let before = net.cpu_time();
    let nothing_at = Cell::new(Instant::now());
    net.wait_until("all units", |statuses| {
        let arrived = stock_bytes(statuses, alice, bob);
        if arrived == 0 {
            nothing_at.set(Instant::now());
        }
        arrived >= amount
    });
    let time = nothing_at.get().elapsed();
    tell_cpu(net.cpu_time() - before, amount_bytes());
    time
}

/// The amount over two connections, in writes of a unit each.
fn over_tls() -> Duration {
    let folder = tempfile::tempdir().unwrap();
    let ids: Vec<NodeId> = NODES.map(|id| id.parse().unwrap()).into();
    let request = pki::Request {
        nodes: &ids,
        apps: &[],
        extra_hosts: &[],
        now: SystemClock::start().now().unix,
        valid_days: 1,
    };
    let made = pki::init(&folder.path().join("pki"), &request).unwrap();
    let credentials: Vec<_> = made
        .issued
        .iter()
        .map(|of| Arc::new(Credentials::load(&made.ca, &of.certificate, &of.key).unwrap()))
        .collect();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let [first, second] = [listener().await, listener().await];
        let (relay_at, bob_at) = (first.1, second.1);
        let bob = tokio::spawn(sink(first_client(second.0, credentials[2].clone())));
        let (relay_credentials, bob_id) = (credentials[1].clone(), ids[2].clone());
        let relay = tokio::spawn(async move {
            let mut input = first_client(first.0, relay_credentials.clone()).await;
            let mut output = dial(bob_at, &relay_credentials, &bob_id).await;
            let mut unit = vec![0; UNIT_BYTES as usize];
            for _ in 0..amount_bytes() / unit.len() {
                input.read_exact(&mut unit).await.unwrap();
                output.write_all(&unit).await.unwrap();
                output.flush().await.unwrap();
            }
            input
        });
        let mut output = dial(relay_at, &credentials[0], &ids[1]).await;
        let unit = noise(UNIT_BYTES as usize, 2);
        let start = Instant::now();
        for _ in 0..amount_bytes() / unit.len() {
            output.write_all(&unit).await.unwrap();
            output.flush().await.unwrap();
        }
        let arrived = bob.await.unwrap();
        let time = start.elapsed();
        assert_eq!(arrived, unit);
        drop(relay.await.unwrap());
        time
    })
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

async fn first_client(listener: TcpListener, credentials: Arc<Credentials>) -> ServerStream {
    let (tcp, _) = listener.accept().await.unwrap();
    let config = credentials.server_config(&[b"bench"]);
    tls::accept(tcp, config, WITHIN).await.unwrap().0
}

async fn dial(address: SocketAddr, credentials: &Credentials, to: &NodeId) -> tls::ClientStream {
    let tcp = TcpStream::connect(address).await.unwrap();
    let config = credentials.client_config(to, &[b"bench"]);
    tls::connect(tcp, config, WITHIN).await.unwrap()
}

/// Reads everything; returns the last unit.
async fn sink(stream: impl Future<Output = ServerStream>) -> Vec<u8> {
    let mut stream = stream.await;
    let mut unit = vec![0; UNIT_BYTES as usize];
    for _ in 0..amount_bytes() / unit.len() {
        stream.read_exact(&mut unit).await.unwrap();
    }
    unit
}

criterion_group!(benches, relay_end_to_end);
criterion_main!(benches);
