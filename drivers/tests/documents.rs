//! What the documents for vendors say, held against the code: every dump is recomputed, and devices
//! written from the documents alone, in other languages, are run against the drivers.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    fs::File,
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output},
};

use common::{event, producer::SESSION};
use qkd_drivers::{
    DirectoryConfig, DriverConfig, Event, KeySource, SerialConfig, Settlement, SharedMemoryConfig,
};
use qkd_handover::{
    block::BlockHeader,
    ring::{Consumer, Producer, greeting::Greeting},
    serial::{Body, Credit, Decoder, Frame, encode},
    status::{ModuleState, Status},
};
use qkd_keyfile::UnixTime;

mod common;

const BLOCKS: u64 = 120;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The dumps of a document: those in a block "```hex NAME", by name and label.
fn dumps(document: &str) -> BTreeMap<(String, String), String> {
    let text = std::fs::read_to_string(root().join("docs").join(document)).unwrap();
    let mut dumps = BTreeMap::new();
    for block in text.split("```hex ").skip(1) {
        let (name, rest) = block.split_once('\n').unwrap();
        let mut label = String::new();
        for line in rest.split_once("```").unwrap().0.lines() {
            let (start, bytes) = line.split_at(6);
            if !start.trim().is_empty() {
                label = start.trim().to_owned();
            }
            let key = (name.to_owned(), label.clone());
            let dump: &mut String = dumps.entry(key).or_default();
            dump.extend(bytes.split_whitespace());
        }
    }
    dumps
}

/// The block that both documents show.
const SHOWN: BlockHeader = BlockHeader {
    number: 4096,
    generated_at: Some(UnixTime(1_767_225_600_000_000_000)),
    key_bits: 12,
    qber_ppm: Some(25_000),
};
const SHOWN_KEY: &[u8] = &[0xab, 0xc0];

/// The frames that the serial document shows.
fn shown_frames() -> Vec<(&'static str, Frame<'static>)> {
    let frame = |session, seq, body| Frame { session, seq, body };
    let credit = |durable, received, window_blocks| Credit {
        durable,
        received,
        window_blocks,
        ..Credit::default()
    };
    let greet = Credit {
        greet: true,
        ..credit(0, 0, 256)
    };
    let resend = Credit {
        resend: true,
        ..credit(0, 0, 256)
    };
    let (header, key) = (SHOWN, SHOWN_KEY);
    let status = Status {
        state: Some(ModuleState::Running),
        qber_ppm: Some(25_000),
        ..Status::default()
    };
    vec![
        ("greet", frame(0, 0, Body::Credit(greet))),
        ("hello", frame(7, 1, Body::Hello { device: "tx-1" })),
        ("credit", frame(7, 0, Body::Credit(resend))),
        ("key", frame(7, 1, Body::Key { header, key })),
        ("status", frame(7, 0, Body::Status(status))),
        ("durable", frame(7, 0, Body::Credit(credit(1, 1, 255)))),
        ("end", frame(7, 1, Body::End)),
    ]
}

/// `None`, with a message, on a machine without the program.
fn run(command: &mut Command) -> Option<Output> {
    match command.output() {
        Ok(output) => {
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{errors}");
            Some(output)
        }
        Err(error) => {
            println!("not tested, {:?}: {error}", command.get_program());
            None
        }
    }
}

fn device(arguments: &[&str]) -> Command {
    let mut command = Command::new("python3");
    command.arg(root().join("examples/serial_device.py"));
    command.args(arguments);
    command
}

/// A program that is killed when the test ends, however it does.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The configuration of a kind of driver in `docs/drivers.md`.
fn shown_configuration(kind: &str) -> String {
    let text = std::fs::read_to_string(root().join("docs/drivers.md")).unwrap();
    let (_, rest) = text.split_once(&format!("```toml {kind}\n")).unwrap();
    rest.split_once("```").unwrap().0.to_owned()
}

#[test]
fn every_setting_is_shown_with_its_default() {
    let serial = SerialConfig::new("/dev/serial/by-id/usb-Vendor_QKD_0001-if00-port0");
    let expected = [
        ("serial", DriverConfig::Serial(serial)),
        (
            "shared-memory",
            DriverConfig::SharedMemory(SharedMemoryConfig::new("/run/qkd-bridge/tx-1.sock")),
        ),
        (
            "shared-memory-file",
            DriverConfig::SharedMemory(SharedMemoryConfig::in_file("/dev/shm/tx-1.ring")),
        ),
        (
            "directory",
            DriverConfig::Directory(DirectoryConfig::new("/run/qkd-bridge/keys")),
        ),
    ];
    // What has no default there, and nothing else.
    let requests = [
        (
            "etsi014",
            "host = 'kme-a.example'\nrole = 'pull'\npeer_sae = 'bridge-bob'\n\
             ca = 'kme-ca.pem'\ncertificate = 'sae.pem'\nkey = 'sae.key'",
        ),
        ("clavis2", "address = '127.0.0.1:5323'\nrole = 'pull'"),
    ];
    let requests = requests.map(|(kind, text)| {
        let text = format!("kind = '{kind}'\n{text}");
        (kind, toml::from_str(&text).unwrap())
    });
    for (kind, expected) in expected.into_iter().chain(requests) {
        // Those of the other way in.
        let others: &[&str] = match kind {
            "shared-memory" => &["file", "trusted", "peer_gid"],
            "shared-memory-file" => &["socket", "peer_uids"],
            _ => &[],
        };
        let text = shown_configuration(kind);
        assert_eq!(toml::from_str(&text), Ok(expected.clone()), "{kind}");
        // With those that have no default, all fields of the type are there.
        let with_optional = text.replace("# module =", "module =");
        let with_optional = with_optional.replace("# matching_module =", "matching_module =");
        let with_optional = with_optional.replace("# device =", "device =");
        let with_optional = with_optional.replace("# file =", "file =");
        let with_optional = with_optional.replace("# peer_gid =", "peer_gid =");
        let table: toml::Table = toml::from_str(&with_optional).unwrap();
        assert!(toml::from_str::<DriverConfig>(&with_optional).is_ok());
        let debug = format!("{expected:#?}");
        let fields = debug.lines().filter_map(|line| {
            let field = line.strip_prefix("        ")?;
            let (name, _) = field.split_once(": ")?;
            let is_own = !name.starts_with(' ') && !others.contains(&name);
            is_own.then(|| name.to_owned())
        });
        let mut count = 0;
        for name in fields {
            assert!(table.contains_key(&name), "{kind}: {name} is not shown");
            count += 1;
        }
        assert_eq!(table.len(), count + 1, "{kind}: all fields, and the kind");
    }
}

#[test]
fn the_serial_dumps_are_what_the_code_writes_and_reads() {
    let dumps = dumps("serial-protocol.md");
    let frames = shown_frames();
    assert_eq!(dumps.len(), 2 * frames.len());
    for (name, frame) in frames {
        let mut line = Vec::new();
        encode(&frame, &mut line).unwrap();
        let shown = &dumps[&(name.to_owned(), "line".to_owned())];
        assert_eq!(*shown, hex(&line), "{name}");
        let mut unread = &line[..];
        let mut decoder = Decoder::new();
        assert_eq!(decoder.next_frame(&mut unread), Some(Ok(frame)));
    }
}

#[test]
fn python_written_from_the_document_makes_the_same_frames() {
    let Some(output) = run(&mut device(&["--examples"])) else {
        return;
    };
    let dumps = dumps("serial-protocol.md");
    let text = String::from_utf8(output.stdout).unwrap();
    let mut shown = 0;
    for line in text.lines() {
        let words: Vec<_> = line.split(' ').collect();
        for (label, made) in [("frame", words[1]), ("line", words[2])] {
            let key = (words[0].to_owned(), label.to_owned());
            assert_eq!(dumps[&key], made, "{key:?}");
            shown += 1;
        }
    }
    assert_eq!(shown, dumps.len());
}

#[test]
fn an_empty_group_after_a_full_last_one_may_be_sent_or_left_out() {
    // 254 bytes after the last zero: those of the error rate, the key and the check sequence.
    let header = BlockHeader {
        number: 1,
        generated_at: None,
        key_bits: 8 * 246,
        qber_ppm: None,
    };
    let key = &[3; 246];
    let frame = Frame {
        session: 1,
        seq: 1,
        body: Body::Key { header, key },
    };
    let mut line = Vec::new();
    encode(&frame, &mut line).unwrap();
    let groups = line.strip_suffix(&[0]).unwrap();
    let groups = groups.strip_suffix(&[1]).unwrap_or(groups);
    assert_eq!(groups[groups.len() - 255], 255, "not a full group");
    for end in [&[0][..], &[1, 0]] {
        let line = [groups, end].concat();
        let mut unread = &line[..];
        let mut decoder = Decoder::new();
        assert_eq!(decoder.next_frame(&mut unread), Some(Ok(frame.clone())));
    }
}

/// Blocks as the example device makes them.
fn made_up_key(number: u64) -> Vec<u8> {
    let len = 1 + number % 300;
    (0..len)
        .map(|i| ((number * 37 + i) % 256).to_le_bytes()[0])
        .collect()
}

/// Takes blocks in order and settles each; returns how often the device was gone meanwhile.
async fn take(
    source: &mut dyn KeySource,
    device: &mut Child,
    numbers: std::ops::Range<u64>,
) -> u32 {
    let (mut detached, mut next) = (0, numbers.start);
    source.grant(16);
    while next < numbers.end {
        match event(source).await {
            (Event::Key(block), key) => {
                let id = block.metadata.qkd_key_id;
                assert_eq!(id.as_str(), next.to_string());
                assert_eq!(key, made_up_key(next));
                source.settle(&id, Settlement::Stored);
                source.grant(1);
                next += 1;
            }
            (Event::Detached { .. }, _) => detached += 1,
            (other @ (Event::Gap { .. } | Event::Corrupt { .. }), _) => panic!("{other:?}"),
            _ => assert_eq!(device.try_wait().unwrap().filter(|s| !s.success()), None),
        }
    }
    detached
}

/// Has the driver answer until the device has ended, as it does when all is durable here.
async fn expect_end(source: &mut dyn KeySource, device: &mut Child) {
    for _ in 0..1000 {
        if let Some(status) = device.try_wait().unwrap() {
            assert!(status.success(), "the device fails: {status}");
            return;
        }
        let mut out = vec![0; source.max_block_bytes()];
        let next = qkd_drivers::next_event(source, &mut out);
        let _ = tokio::time::timeout(std::time::Duration::from_millis(20), next).await;
    }
    panic!("the device does not hear that all is durable");
}

#[tokio::test]
async fn a_device_written_from_the_serial_document_loses_no_block_over_a_bad_line_and_a_replug() {
    if run(&mut device(&["--examples"])).is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("usb-QKD_0001");
    let blocks = BLOCKS.to_string();
    let arguments = ["--blocks", &blocks, "--lose", "7", "--unplug-after", "50"];
    let mut child = device(&["--link", link.to_str().unwrap()]);
    let mut device = Running(child.args(arguments).spawn().unwrap());
    let config = SerialConfig {
        device: Some("tx-1".to_owned()),
        answer_timeout_ms: 50,
        ..SerialConfig::new(&link)
    };
    let mut source = DriverConfig::Serial(config).open().unwrap();
    let detached = take(&mut *source, &mut device.0, 0..BLOCKS).await;
    assert!(detached >= 1, "the cable was pulled");
    expect_end(&mut *source, &mut device.0).await;
}

#[test]
fn the_ring_dumps_are_what_both_sides_write() {
    let dumps = dumps("ring-abi.md");
    let shown = |name: &str| dumps[&(name.to_owned(), "bytes".to_owned())].clone();
    assert_eq!(dumps.len(), 5);

    let greeting = Greeting {
        generation: 7,
        last_durable: Some(4095),
        session: SESSION.get(),
    };
    assert_eq!(shown("greeting"), hex(&greeting.encode()));

    let (_consumer, memory) = Consumer::create(1 << 16, 7, 1).unwrap();
    let mut producer = Producer::attach(memory.as_fd(), &greeting, SESSION).unwrap();
    producer.write_block(&SHOWN, SHOWN_KEY).unwrap();
    let status = Status {
        state: Some(ModuleState::Running),
        ..Status::default()
    };
    producer.write_status(&status).unwrap();
    producer.write_end().unwrap();
    let memory = File::from(memory);
    for (name, offset) in [
        ("header", 0),
        ("key", 4096),
        ("status", 4096 + 64),
        ("end", 4096 + 128),
    ] {
        let shown = shown(name);
        let mut bytes = vec![0; shown.len() / 2];
        memory.read_exact_at(&mut bytes, offset).unwrap();
        assert_eq!(shown, hex(&bytes), "{name}");
    }
}

#[tokio::test]
async fn the_example_producer_in_c_sends_again_what_a_bridge_that_died_had_not_made_durable() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("tx-1.sock");
    let config = SharedMemoryConfig::new(&socket);
    over_two_bridges(config, &[socket.to_str().unwrap()]).await;
}

#[tokio::test]
async fn the_example_producer_in_c_does_so_with_a_ring_in_a_file() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = folder.path().join("tx-1.ring");
    let config = SharedMemoryConfig::in_file(&file);
    over_two_bridges(config, &["--file", file.to_str().unwrap()]).await;
}

/// The example producer against a driver that goes away with blocks that it has not settled, and the next.
async fn over_two_bridges(config: SharedMemoryConfig, arguments: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("ring_producer");
    let mut compiler = Command::new("cc");
    compiler.args(["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-I"]);
    compiler.arg(root().join("drivers/handover/include"));
    compiler.arg("-o").arg(&program);
    if run(compiler.arg(root().join("examples/ring_producer.c"))).is_none() {
        return;
    }
    let mut producer = Command::new(program);
    producer.args(arguments).arg(BLOCKS.to_string());
    let mut producer = Running(producer.spawn().unwrap());
    let driver = DriverConfig::SharedMemory(SharedMemoryConfig {
        capacity_bytes: 1 << 13,
        ..config
    });
    let mut source = driver.open().unwrap();
    take(&mut *source, &mut producer.0, 0..50).await;
    for number in 50..60 {
        // Read, and not settled: a bridge that dies now has them no more.
        loop {
            if let (Event::Key(block), _) = event(&mut *source).await {
                assert_eq!(block.metadata.qkd_key_id.as_str(), number.to_string());
                break;
            }
        }
    }
    drop(source);
    let mut source = driver.open().unwrap();
    take(&mut *source, &mut producer.0, 50..BLOCKS).await;
    expect_end(&mut *source, &mut producer.0).await;
}
