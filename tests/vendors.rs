//! Vendors' hand-overs, played by `sim` in a process of its own and read by the real drivers: both
//! ends have the same keys under the same IDs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use qkd_drivers::{DriverConfig, Event, Settlement, next_event};
use support::{devices::SEED, qkd_bridge, stderr};

/// Settings of `sim`, those of the driver, blocks' length, and the keys that come of 12 blocks.
type Vendor = (&'static str, &'static str, u32, usize);

const VENDORS: [Vendor; 5] = [
    ("format = 'type7'", "format = 'type7'", 7636, 12),
    (
        "format = 'cor'",
        "format = 'cor', file_bytes = 51200",
        409_600,
        12,
    ),
    (
        "format = 'uuid-records'",
        "format = 'uuid-records', file = 'keys.dat'",
        1100,
        48,
    ),
    (
        "format = 'hex-lines', peer = 'bob'",
        "format = 'hex-lines', file = 'bob', block_keys = 8",
        2048,
        96,
    ),
    (
        "format = 'r10'",
        "format = 'r10', file = 'keys.r10'",
        1100,
        12,
    ),
];

/// Every key that the driver finds in a folder, by its ID.
async fn keys(folder: &Path, driver: &str, count: usize) -> BTreeMap<String, Vec<u8>> {
    #[derive(serde::Deserialize)]
    struct Entry {
        driver: DriverConfig,
    }
    let path = folder.display();
    let text = format!(
        "driver = {{ kind = 'directory', path = '{path}', rescan_interval_ms = 50, {driver} }}"
    );
    let mut source = toml::from_str::<Entry>(&text)
        .unwrap()
        .driver
        .open()
        .unwrap();
    let mut buffer = vec![0; source.max_block_bytes()];
    let mut keys = BTreeMap::new();
    source.grant(1000);
    loop {
        // When all are there, nothing more may come.
        let patience = Duration::from_millis(if keys.len() < count { 20_000 } else { 200 });
        let event = next_event(&mut *source, &mut buffer);
        let Ok(event) = tokio::time::timeout(patience, event).await else {
            return keys;
        };
        match event.unwrap() {
            Event::Key(block) => {
                let id = block.metadata.qkd_key_id.clone();
                let key = buffer[..block.len_bytes()].to_vec();
                assert!(
                    keys.insert(id.to_string(), key).is_none(),
                    "{id} came twice"
                );
                source.settle(&id, Settlement::Stored);
            }
            Event::Corrupt { reason, .. } => panic!("{driver}: {reason}"),
            _ => {}
        }
    }
}

#[tokio::test]
async fn every_vendors_files_give_both_ends_the_same_keys_under_the_same_ids() {
    for (format, driver, block_bits, count) in VENDORS {
        let dir = tempfile::tempdir().unwrap();
        let half = |role: &str| {
            format!(
                "[[module_pair.half]]\nrole = \"{role}\"\n\
                 transport = {{ kind = 'files', directory = '{role}', {format} }}\n"
            )
        };
        let file = dir.path().join("sim.toml");
        let text = format!(
            "seed = \"{SEED}\"\n[[module_pair]]\nname = \"mp\"\nblock_bits = {block_bits}\n\
             pace = \"max\"\nblocks = 12\n{}{}",
            half("transmitter"),
            half("receiver")
        );
        fs::write(&file, text).unwrap();
        let output = qkd_bridge(["sim", "--processes", "--config", file.to_str().unwrap()]);
        assert!(output.status.success(), "{format}: {}", stderr(&output));
        let [transmitter, receiver] = ["transmitter", "receiver"].map(|end| dir.path().join(end));
        let (ours, theirs) = tokio::join!(
            keys(&transmitter, driver, count),
            keys(&receiver, driver, count)
        );
        assert_eq!(ours.len(), count, "{format}");
        assert!(ours == theirs, "{format}: the ends differ");
        let distinct: std::collections::BTreeSet<_> = ours.values().collect();
        assert_eq!(distinct.len(), count, "{format}: a key comes twice");
    }
}
