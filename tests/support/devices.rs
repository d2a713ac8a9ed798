//! Simulated devices on every transport, and the drivers for them.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr, UdpSocket},
    path::Path,
};

use qkd_drivers::{DirectoryConfig, DriverConfig, SerialConfig, SharedMemoryConfig};
use qkd_handover::type7::{self, HEADER_BYTES, Header};
use qkd_keyfile::QkdKeyId;

pub(crate) const SEED: &str = "5eed0123456789abcdef0123456789abcdef0123456789abcdef0123456789ab";

/// Blocks that [`sim_toml`] makes, numbered from 16 on.
pub(crate) const BLOCKS: u64 = 60;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Serial,
    Ring,
    /// In `/dev/shm`, by its name.
    RingFile,
    Files,
}

impl Transport {
    pub(crate) const ALL: [Self; 4] = [Self::Serial, Self::Ring, Self::RingFile, Self::Files];

    /// A folder that the device can be in.
    pub(crate) fn folder(self) -> tempfile::TempDir {
        match self {
            Self::RingFile => tempfile::tempdir_in("/dev/shm").unwrap(),
            _ => tempfile::tempdir().unwrap(),
        }
    }

    /// The transport of a simulated half, as its file has it.
    pub(crate) fn played(self, device: &Path) -> String {
        let device = device.display();
        match self {
            Self::Serial => {
                format!("kind = 'serial', path = '{device}', make_pty = true, retry_ms = 60")
            }
            Self::Ring => format!("kind = 'ring', socket = '{device}'"),
            Self::RingFile => format!("kind = 'ring', file = '{device}'"),
            Self::Files => format!("kind = 'files', directory = '{device}'"),
        }
    }

    /// The driver for it, with little patience.
    pub(crate) fn driver(self, device: &Path) -> DriverConfig {
        match self {
            Self::Serial => DriverConfig::Serial(SerialConfig {
                answer_timeout_ms: 60,
                ..SerialConfig::new(device)
            }),
            Self::Ring => DriverConfig::SharedMemory(SharedMemoryConfig {
                heartbeat_timeout_ms: 200,
                ..SharedMemoryConfig::new(device)
            }),
            Self::RingFile => DriverConfig::SharedMemory(SharedMemoryConfig {
                heartbeat_timeout_ms: 200,
                ..SharedMemoryConfig::in_file(device)
            }),
            Self::Files => DriverConfig::Directory(DirectoryConfig {
                rescan_interval_ms: 50,
                partial_timeout_ms: 200,
                ..DirectoryConfig::new(device)
            }),
        }
    }

    /// The number of a block, from the ID that the driver gives it.
    pub(crate) fn number(self, id: &QkdKeyId) -> u64 {
        match self {
            Self::Files => u64::from_str_radix(id.as_str(), 16).unwrap(),
            _ => id.as_str().parse().unwrap(),
        }
    }
}

/// One half of a pair with one kind of fault, or none.
pub(crate) fn sim_toml(transport: &str, fault: &str, per_million: u32) -> String {
    let faults = match fault {
        "" => String::new(),
        fault => {
            format!("[module_pair.faults]\n{fault}_per_million = {per_million}\nstall_ms = 400\n")
        }
    };
    format!(
        "seed = \"{SEED}\"\n[[module_pair]]\nname = \"mp\"\nblock_bits = 8001\npace = 400.0\n\
         first_number = 16\nblocks = {BLOCKS}\n{faults}\
         [[module_pair.half]]\nrole = \"transmitter\"\ntransport = {{ {transport} }}\n"
    )
}

/// What the device makes when nothing goes wrong: read from its files, bit by bit.
pub(crate) fn truth() -> BTreeMap<u64, Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let played = format!(
        "kind = 'files', directory = '{}'",
        dir.path().join("keys").display()
    );
    let file = dir.path().join("sim.toml");
    fs::write(&file, sim_toml(&played, "", 0)).unwrap();
    let output = super::qkd_bridge(["sim", "--config", file.to_str().unwrap()]);
    assert!(output.status.success());
    let entries = fs::read_dir(dir.path().join("keys")).unwrap();
    entries
        .map(|entry| number_and_key(&entry.unwrap().path()))
        .collect()
}

fn number_and_key(path: &Path) -> (u64, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let (head, words) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
    let header = Header::decode(head).unwrap();
    let mut key = vec![0; header.key_bits.div_ceil(8) as usize];
    type7::decode_key(&header, words, &mut key).unwrap();
    (u64::from(header.first_epoch), key)
}

/// A port that is free, at an address of loopback that is this process's own.
pub(crate) fn datagram_address(host: u8) -> SocketAddr {
    let [low, high, ..] = std::process::id().to_le_bytes();
    let ip = IpAddr::from([127, high.max(1), low, host]);
    let socket = UdpSocket::bind((ip, 0)).unwrap();
    socket.local_addr().unwrap()
}
