//! Every driver of this crate through the conformance kit, over real folders, pseudo-terminals and
//! rings; and drivers with one fault each, which the kit must find.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use common::{device::Device, place::Place, producer::Connected};
use qkd_drivers::{
    DirectoryConfig, DriverConfig, KeySource, SerialConfig,
    conformance::{Bench, Checked, Offered, check},
    directory::Format,
};
use qkd_handover::{
    block::BlockHeader,
    type7::{Header, TAG, encode_words, words_bytes},
    uuid_record::qkd_key_id,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;

mod common;

/// The block with this number: at least 16 bytes of key, and often bits that fill no byte.
fn block(number: u64) -> (BlockHeader, Vec<u8>) {
    let key_bits = u32::try_from(128 + number * 37 % 3000).unwrap();
    let mut key: Vec<u8> = (0..u64::from(key_bits.div_ceil(8)))
        .map(|i| {
            ((number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (i % 57) ^ i).to_le_bytes()[0]
        })
        .collect();
    *key.last_mut().unwrap() &= 0xff_u8.checked_shl((8 - key_bits % 8) % 8).unwrap();
    let header = BlockHeader {
        number,
        generated_at: None,
        key_bits,
        qber_ppm: Some(25_000),
    };
    (header, key)
}

/// The next numbers, as the kit is told of them.
fn next_blocks(numbers: &mut u64, blocks: u32) -> Range<u64> {
    let first = *numbers;
    *numbers += u64::from(blocks);
    first..*numbers
}

fn offered(number: u64, id: &str) -> Offered {
    let (header, key) = block(number);
    Offered {
        id: id.parse().unwrap(),
        key_bits: header.key_bits,
        key,
    }
}

/// A folder that final-key files are moved into.
struct Folder {
    folder: TempDir,
    next: u64,
}

impl Bench for Folder {
    fn open(&mut self) -> Box<dyn KeySource> {
        let config = DirectoryConfig {
            rescan_interval_ms: 200,
            ..DirectoryConfig::new(self.folder.path())
        };
        DriverConfig::Directory(config).open().unwrap()
    }

    fn offer(&mut self, blocks: u32) -> Vec<Offered> {
        next_blocks(&mut self.next, blocks)
            .map(|number| {
                let (BlockHeader { key_bits, .. }, key) = block(number);
                let header = Header {
                    tag: TAG,
                    first_epoch: u32::try_from(number).unwrap(),
                    epochs: 1,
                    key_bits,
                };
                let mut bytes = header.encode().to_vec();
                bytes.resize(16 + words_bytes(key_bits), 0);
                encode_words(key_bits, &key, &mut bytes[16..]).unwrap();
                let name = format!("{number:08x}");
                let temporary = self.folder.path().join(format!(".{name}"));
                fs::write(&temporary, bytes).unwrap();
                fs::rename(temporary, self.folder.path().join(&name)).unwrap();
                offered(number, &name)
            })
            .collect()
    }
}

/// A file that records are appended to.
struct Appended {
    folder: TempDir,
    next: u64,
}

impl Bench for Appended {
    fn open(&mut self) -> Box<dyn KeySource> {
        let config = DirectoryConfig {
            rescan_interval_ms: 200,
            format: Format::UuidRecords,
            file: Some("keys.bin".to_owned()),
            ..DirectoryConfig::new(self.folder.path())
        };
        DriverConfig::Directory(config).open().unwrap()
    }

    fn offer(&mut self, blocks: u32) -> Vec<Offered> {
        let mut file = fs::File::options();
        let file = file.append(true).create(true);
        let mut file = file.open(self.folder.path().join("keys.bin")).unwrap();
        next_blocks(&mut self.next, blocks)
            .map(|number| {
                let uuid = u128::from(number + 1).to_be_bytes();
                let key: Vec<u8> = (0..32_u64)
                    .map(|i| (number.wrapping_mul(0x9e37_79b9) ^ (i * 7)).to_le_bytes()[0])
                    .collect();
                file.write_all(&[&uuid[..], &key].concat()).unwrap();
                Offered {
                    id: qkd_key_id(&uuid),
                    key_bits: 256,
                    key,
                }
            })
            .collect()
    }
}

/// A device on a pseudo-terminal.
struct Port {
    device: Device,
    folder: TempDir,
    next: u64,
}

impl Port {
    fn link(&self) -> PathBuf {
        self.folder.path().join("usb-QKD_0001")
    }
}

impl Bench for Port {
    fn open(&mut self) -> Box<dyn KeySource> {
        let config = SerialConfig {
            answer_timeout_ms: 100,
            ..SerialConfig::new(self.link())
        };
        DriverConfig::Serial(config).open().unwrap()
    }

    fn offer(&mut self, blocks: u32) -> Vec<Offered> {
        next_blocks(&mut self.next, blocks)
            .map(|number| {
                let (header, key) = block(number);
                self.device.sender().offer(header, &key).unwrap();
                offered(number, &number.to_string())
            })
            .collect()
    }

    fn replug(&mut self) -> bool {
        self.device.unplug();
        self.device.plug(&self.link(), Box::new(|_| {}));
        true
    }
}

type Kept = BTreeMap<u64, (BlockHeader, Vec<u8>)>;

/// A producer that keeps its blocks, in a thread.
struct Ring {
    place: Place,
    kept: Arc<Mutex<Kept>>,
    hang_up: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    next: u64,
}

impl Ring {
    fn new(place: Place, come: fn(&Path) -> std::io::Result<Connected>) -> Self {
        let mut ring = Self {
            place,
            kept: Arc::default(),
            hang_up: Arc::default(),
            stop: Arc::default(),
            thread: None,
            next: 0,
        };
        let (path, kept) = (ring.place.path(), Arc::clone(&ring.kept));
        let (hang_up, stop) = (Arc::clone(&ring.hang_up), Arc::clone(&ring.stop));
        ring.thread = Some(std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                match come(&path) {
                    Ok(connected) => serve(connected, &kept, &hang_up, &stop),
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        }));
        ring
    }
}

/// One connection, until the driver or the bench ends it.
fn serve(mut connected: Connected, kept: &Mutex<Kept>, hang_up: &AtomicBool, stop: &AtomicBool) {
    let forget = |durable: Option<u64>| {
        let is_kept = |number| durable.is_none_or(|durable| number > durable);
        kept.lock().unwrap().retain(|&number, _| is_kept(number));
    };
    forget(connected.greeting.last_durable);
    let mut next = 0;
    let mut beats = 0;
    loop {
        forget(connected.producer.durable());
        let kept = kept.lock().unwrap();
        for (&number, (header, key)) in kept.range(next..) {
            let sleeps = connected.producer.write_block(header, key).unwrap();
            connected.wake_if(sleeps);
            next = number + 1;
        }
        drop(kept);
        beats += 1;
        connected.producer.beat(beats, None, 0);
        let mut polled = [PollFd::new(&connected.socket, PollFlags::IN)];
        let pause = Timespec::try_from(Duration::from_millis(2)).unwrap();
        let gone = poll(&mut polled, Some(&pause)).unwrap() > 0;
        if gone || hang_up.swap(false, Ordering::Relaxed) || stop.load(Ordering::Relaxed) {
            break;
        }
    }
    forget(connected.producer.durable());
}

impl Bench for Ring {
    fn open(&mut self) -> Box<dyn KeySource> {
        self.place.open()
    }

    fn offer(&mut self, blocks: u32) -> Vec<Offered> {
        next_blocks(&mut self.next, blocks)
            .map(|number| {
                self.kept.lock().unwrap().insert(number, block(number));
                offered(number, &number.to_string())
            })
            .collect()
    }

    fn replug(&mut self) -> bool {
        self.hang_up.store(true, Ordering::Relaxed);
        true
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            assert!(thread.join().is_ok() || std::thread::panicking());
        }
    }
}

const REPLUGGED: Checked = Checked {
    replugged: true,
    ruined: false,
};

#[tokio::test]
async fn the_directory_driver_keeps_the_contract() {
    let mut bench = Folder {
        folder: tempfile::tempdir().unwrap(),
        next: 1,
    };
    let checked = check(&mut bench).await.unwrap();
    assert!(!checked.replugged && !checked.ruined);
    let left: Vec<_> = fs::read_dir(bench.folder.path()).unwrap().collect();
    assert!(
        left.len() <= 2,
        "only the quarantine folder and the note stay: {left:?}"
    );
}

#[tokio::test]
async fn the_directory_driver_keeps_the_contract_with_records_that_are_appended() {
    let mut bench = Appended {
        folder: tempfile::tempdir().unwrap(),
        next: 0,
    };
    let checked = check(&mut bench).await.unwrap();
    assert!(!checked.replugged && !checked.ruined);
}

#[tokio::test]
async fn the_serial_driver_keeps_the_contract() {
    let mut bench = Port {
        device: Device::new("tx-1", 7),
        folder: tempfile::tempdir().unwrap(),
        next: 0,
    };
    bench.device.plug(&bench.link(), Box::new(|_| {}));
    assert_eq!(check(&mut bench).await.unwrap(), REPLUGGED);
    assert_eq!(bench.device.sender().kept_blocks(), 0);
}

#[tokio::test]
async fn the_shared_memory_driver_keeps_the_contract() {
    let mut bench = Ring::new(Place::new(), Connected::new);
    assert_eq!(check(&mut bench).await.unwrap(), REPLUGGED);
    assert!(bench.kept.lock().unwrap().is_empty());
}

#[tokio::test]
async fn the_shared_memory_driver_keeps_the_contract_in_a_file() {
    let mut bench = Ring::new(Place::in_file(), Connected::try_file);
    assert_eq!(check(&mut bench).await.unwrap(), REPLUGGED);
    assert!(bench.kept.lock().unwrap().is_empty());
    let left = fs::read_dir(bench.place.0.path()).unwrap().count();
    assert_eq!(left, 0, "ring and FIFO go with the driver");
}
