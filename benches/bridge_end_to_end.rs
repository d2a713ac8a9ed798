//! `bridge_end_to_end`: key blocks in at both ends of a link, confirmed segments in both stores out.
//!
//! Question: at what rate do two nodes on one machine agree on key? Both ends are handed the same
//! blocks through shared memory; the time ends when both have all of it confirmed. It counts the key
//! of one node, so each byte of it was read, tested, hashed, compared and stored twice. `drivers` is
//! the limit: two drivers that read the same rings, in one process, and hand nothing on.
//!
//! Blocks of 64 KiB: the longest that a node takes by default. Every sample has fresh nodes, because
//! a store that holds the last sample's key is another store.

#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]

mod support;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qkd_bridge::demo::Plan;
use qkd_drivers::{DriverConfig, Event, Settlement, SharedMemoryConfig, next_event};
use support::{
    fixed_amounts, is_trial,
    net::{BLOCK_BYTES, Net, RING_BYTES, Sizing, Store, link},
    noise,
    ring::{Module, feed},
    tell_cpu,
};

/// More than all caches hold, and a good second of work for a node on a disk.
fn amount_bytes() -> usize {
    if is_trial() { 4 << 20 } else { 256 << 20 }
}

fn bridge_end_to_end(c: &mut Criterion) {
    let key = noise(amount_bytes(), 1);
    let mut group = c.benchmark_group("bridge_end_to_end");
    fixed_amounts(&mut group);
    group.throughput(Throughput::Bytes(key.len() as u64));
    group.bench_function("drivers", |b| {
        b.iter_custom(|samples| (0..samples).map(|_| drivers(&key)).sum());
    });
    for store in [Store::Memory, Store::Lmdb] {
        group.bench_function(store.name(), |b| {
            b.iter_custom(|samples| (0..samples).map(|_| nodes(store, &key)).sum());
        });
    }
    group.finish();
}

/// Two fresh nodes agree on `key`. Their books show that nothing was lost.
fn nodes(store: Store, key: &[u8]) -> Duration {
    let ends = ["alice", "bob"].map(|id| id.parse().unwrap());
    let plan = Plan {
        nodes: ends.into(),
        links: vec![link("alice", "bob")],
        stock: None,
        apps: Vec::new(),
        key_memory_mib: 0,
    };
    let sizing = Sizing {
        store,
        // Half of it is for what comes from hardware; the store's half holds all key and more.
        key_memory_mib: 1024,
        capacity_mib: 1024,
    };
    let mut net = Net::start(plan, sizing);
    let mut modules = net.modules("alice", "bob");
    let (start, before) = (Instant::now(), net.cpu_time());
    net.fill("alice", "bob", &mut modules, key);
    let time = start.elapsed();
    tell_cpu(net.cpu_time() - before, key.len());
    time
}

/// Two drivers read `key`; every block is settled at once.
fn drivers(key: &[u8]) -> Duration {
    let folder = tempfile::tempdir().unwrap();
    let sockets = ["a", "b"].map(|name| folder.path().join(name));
    let readers = sockets.clone().map(|socket| {
        let blocks = key.len() / BLOCK_BYTES;
        std::thread::spawn(move || read_all(socket, blocks))
    });
    let mut modules = sockets.map(|socket| Module::connect(&socket));
    let start = Instant::now();
    feed(&mut modules, key, BLOCK_BYTES);
    let last = readers.map(|reader| reader.join().unwrap());
    let time = start.elapsed();
    let expected = &key[key.len() - BLOCK_BYTES..];
    assert!(last.iter().all(|block| block == expected));
    time
}

/// Returns the last block.
fn read_all(socket: PathBuf, blocks: usize) -> Vec<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut source = open(&socket);
        source.grant(u32::MAX);
        let mut block = vec![0; source.max_block_bytes()];
        let mut read = 0;
        while read < blocks {
            if let Event::Key(key) = next_event(&mut *source, &mut block).await.unwrap() {
                source.settle(&key.metadata.qkd_key_id, Settlement::Stored);
                read += 1;
            }
        }
        block
    })
}

fn open(socket: &Path) -> Box<dyn qkd_drivers::KeySource> {
    let config = SharedMemoryConfig {
        capacity_bytes: RING_BYTES,
        heartbeat_timeout_ms: 0,
        ..SharedMemoryConfig::new(socket)
    };
    DriverConfig::SharedMemory(config).open().unwrap()
}

criterion_group!(benches, bridge_end_to_end);
criterion_main!(benches);
