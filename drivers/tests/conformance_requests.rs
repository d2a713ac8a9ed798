//! The driver for a Clavis2 through the conformance kit, over real sockets, at both ends of a module pair.
//! (That for key managers is in `tests/key_manager.rs` of the root: a key manager is the other crate.)
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use qkd_drivers::{
    Clavis2Config, DriverConfig, KeySource,
    clavis2::Role,
    conformance::{Bench, Checked, Offered, check},
};
use qkd_handover::clavis2::{MAX_KEY_BYTES, RESPONSE_BYTES, Refusal, Request, Response};

/// What the daemon has, and what it is told to do.
#[derive(Default)]
struct Desk {
    /// Nobody has had these.
    fresh: Mutex<BTreeMap<u64, [u8; MAX_KEY_BYTES]>>,
    /// All that it ever had: what it has given out it gives again by ID.
    all: Mutex<BTreeMap<u64, [u8; MAX_KEY_BYTES]>>,
    hang_up: AtomicBool,
    stop: AtomicBool,
}

/// A daemon, in a thread.
struct Daemon {
    desk: Arc<Desk>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
    role: Role,
    next: u64,
}

impl Daemon {
    fn start(role: Role) -> Self {
        let desk: Arc<Desk> = Arc::default();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let served = Arc::clone(&desk);
        Self {
            desk,
            address,
            thread: Some(std::thread::spawn(move || serve(socket, &served))),
            role,
            next: 1,
        }
    }
}

/// Answers until it is told to stop; goes away for a moment when it is told to.
fn serve(mut socket: UdpSocket, desk: &Desk) {
    let address = socket.local_addr().unwrap();
    while !desk.stop.load(Ordering::Relaxed) {
        socket
            .set_read_timeout(Some(Duration::from_millis(5)))
            .unwrap();
        let mut datagram = [0; 64];
        if let Ok((len, from)) = socket.recv_from(&mut datagram) {
            let request = Request::decode(&datagram[..len]).unwrap();
            socket.send_to(&answer(&request, desk), from).unwrap();
        }
        if desk.hang_up.load(Ordering::Relaxed) {
            drop(socket);
            desk.hang_up.store(false, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(100));
            socket = UdpSocket::bind(address).unwrap();
        }
    }
}

fn answer(request: &Request, desk: &Desk) -> [u8; RESPONSE_BYTES] {
    let (key_id, found) = match request.key_id {
        0 => match desk.fresh.lock().unwrap().pop_first() {
            Some((id, key)) => (id, Ok(key)),
            None => (0, Err(Refusal::NoMoreKeys)),
        },
        id => {
            let key = desk.all.lock().unwrap().get(&id).copied();
            (id, key.ok_or(Refusal::UnknownId))
        }
    };
    let response = Response {
        key_id,
        key_bytes: request.key_bytes,
        request_id: request.request_id,
        refusal: found.err(),
        device: request.device,
    };
    let mut datagram = [0; RESPONSE_BYTES];
    let key = found.as_ref().map_or(&[][..], |key| &key[..]);
    response.encode(key, &mut datagram).unwrap();
    datagram
}

impl Bench for Daemon {
    fn open(&mut self) -> Box<dyn KeySource> {
        DriverConfig::Clavis2(Clavis2Config {
            address: self.address,
            role: self.role,
            device: 3,
            key_bytes: 32,
            poll_interval_ms: 120,
            timeout_ms: 5000,
            module: None,
            matching_module: None,
        })
        .open()
        .unwrap()
    }

    fn offer(&mut self, blocks: u32) -> Vec<Offered> {
        let numbers = self.next..self.next + u64::from(blocks);
        self.next = numbers.end;
        let offered = numbers.map(|number| {
            let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let byte = |i: usize| (mixed >> i).to_le_bytes()[0];
            let key: [u8; MAX_KEY_BYTES] = std::array::from_fn(byte);
            self.desk.all.lock().unwrap().insert(number, key);
            self.desk.fresh.lock().unwrap().insert(number, key);
            Offered {
                id: number.to_string().parse().unwrap(),
                key_bits: 256,
                key: key.to_vec(),
            }
        });
        offered.collect()
    }

    /// One end is given each key once; the other may ask again.
    fn hands_out_once(&self) -> bool {
        self.role == Role::Pull
    }

    fn replug(&mut self) -> bool {
        self.desk.hang_up.store(true, Ordering::Relaxed);
        while self.desk.hang_up.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.desk.stop.store(true, Ordering::Relaxed);
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
async fn a_driver_that_pulls_new_keys_by_datagrams_keeps_the_contract() {
    let mut daemon = Daemon::start(Role::Pull);
    assert_eq!(check(&mut daemon).await.unwrap(), REPLUGGED);
    assert!(daemon.desk.fresh.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_driver_that_fetches_keys_by_id_by_datagrams_keeps_the_contract() {
    let mut daemon = Daemon::start(Role::Fetch);
    assert_eq!(check(&mut daemon).await.unwrap(), REPLUGGED);
}
