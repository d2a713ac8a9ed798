//! The driver for a Clavis2's daemon, over real sockets, against daemons that are well and ill.
#![allow(clippy::unwrap_used)]

use std::{
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use common::{assert_quiet, event, key, wakes_while_idle};
use qkd_drivers::{
    Alarm, AlarmCode, Clavis2Config, CorruptReason, DetachReason, DriverConfig, Event, KeySource,
    OpenError, clavis2::Role,
};
use qkd_handover::clavis2::{Clavis2Error, RESPONSE_BYTES, Refusal, Request, Response};

mod common;

/// A daemon in the hands of a test.
struct Daemon(UdpSocket);

impl Daemon {
    fn new() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let patience = Some(Duration::from_secs(20));
        socket.set_read_timeout(patience).unwrap();
        Self(socket)
    }

    fn open(&self, role: Role) -> Box<dyn KeySource> {
        self.open_with(role, 10_000)
    }

    fn open_with(&self, role: Role, timeout_ms: u64) -> Box<dyn KeySource> {
        let name = if role == Role::Pull { "pull" } else { "fetch" };
        let text = format!(
            "kind = \"clavis2\"\naddress = \"{}\"\nrole = \"{name}\"\ndevice = 3\n\
             poll_interval_ms = 20\ntimeout_ms = {timeout_ms}",
            self.0.local_addr().unwrap()
        );
        toml::from_str::<DriverConfig>(&text)
            .unwrap()
            .open()
            .unwrap()
    }

    /// The next request. The driver has to be polled meanwhile.
    async fn asked(&self, source: &mut dyn KeySource) -> (Request, SocketAddr) {
        assert_quiet(source, Duration::from_millis(40)).await;
        let mut datagram = [0; 64];
        let (len, from) = self.0.recv_from(&mut datagram).unwrap();
        let request = Request::decode(&datagram[..len]).unwrap();
        assert_eq!((request.device, request.key_bytes), (3, 32));
        (request, from)
    }

    fn send(&self, datagram: &[u8], to: SocketAddr) {
        assert_eq!(self.0.send_to(datagram, to).unwrap(), datagram.len());
    }
}

fn answer(request: &Request, key_id: u64, fill: u8) -> [u8; RESPONSE_BYTES] {
    encoded(request, key_id, None, &[fill; 32])
}

fn refusal(request: &Request, refusal: Refusal) -> [u8; RESPONSE_BYTES] {
    encoded(request, request.key_id, Some(refusal), &[])
}

fn encoded(
    request: &Request,
    key_id: u64,
    refusal: Option<Refusal>,
    key: &[u8],
) -> [u8; RESPONSE_BYTES] {
    let response = Response {
        key_id,
        key_bytes: 32,
        request_id: request.request_id,
        refusal,
        device: request.device,
    };
    let mut datagram = [0; RESPONSE_BYTES];
    response.encode(key, &mut datagram).unwrap();
    datagram
}

async fn corrupt(source: &mut dyn KeySource) -> CorruptReason {
    match event(source).await.0 {
        Event::Corrupt { reason, .. } => reason,
        other => panic!("damage was expected, not {other:?}"),
    }
}

#[tokio::test]
async fn one_end_pulls_and_the_other_fetches_by_id() {
    let daemon = Daemon::new();
    let mut alice = daemon.open(Role::Pull);
    alice.grant(2);
    for number in [7, 1 << 40] {
        let (request, to) = daemon.asked(&mut *alice).await;
        assert_eq!(request.key_id, 0);
        daemon.send(&answer(&request, number, 0xa5), to);
        let (block, bytes) = key(&mut *alice).await;
        if number == 7 {
            assert!(matches!(event(&mut *alice).await.0, Event::Attached { .. }));
        }
        assert_eq!(block.metadata.qkd_key_id.as_str(), number.to_string());
        assert_eq!((block.key_bits, bytes), (256, vec![0xa5; 32]));
    }
    let mut bob = daemon.open(Role::Fetch);
    bob.grant(5);
    assert_quiet(&mut *bob, Duration::from_millis(40)).await;
    let id = (1_u64 << 40).to_string().parse().unwrap();
    bob.request(&["no-number".parse().unwrap(), id]);
    let (request, to) = daemon.asked(&mut *bob).await;
    assert_eq!(request.key_id, 1 << 40);
    daemon.send(&answer(&request, 1 << 40, 0xa5), to);
    assert_eq!(key(&mut *bob).await.1, [0xa5; 32]);
}

#[tokio::test]
async fn nothing_is_asked_without_credit() {
    let daemon = Daemon::new();
    let mut source = daemon.open(Role::Pull);
    assert_quiet(&mut *source, Duration::from_millis(60)).await;
    daemon.0.set_nonblocking(true).unwrap();
    assert!(daemon.0.recv(&mut [0; 64]).is_err());
}

#[tokio::test]
async fn damage_stale_answers_and_other_keys_are_dropped_and_the_right_answer_is_taken() {
    let daemon = Daemon::new();
    let mut source = daemon.open(Role::Fetch);
    source.grant(1);
    source.request(&["9".parse().unwrap()]);
    let (request, to) = daemon.asked(&mut *source).await;
    let good = answer(&request, 9, 1);
    let mut bad_crc = good;
    bad_crc[20] ^= 1;
    daemon.send(&bad_crc, to);
    assert_eq!(corrupt(&mut *source).await, Clavis2Error::Crc.into());
    for len in [61, 63] {
        let datagram = &[&good[..], &[0]].concat()[..len];
        daemon.send(datagram, to);
        let length = Clavis2Error::Length {
            have_bytes: len,
            need_bytes: 62,
        };
        assert_eq!(corrupt(&mut *source).await, length.into());
    }
    let other = Request {
        request_id: request.request_id.wrapping_sub(1),
        ..request
    };
    daemon.send(&answer(&other, 9, 2), to);
    assert_eq!(corrupt(&mut *source).await, CorruptReason::Unasked);
    daemon.send(&answer(&request, 8, 3), to);
    assert_eq!(corrupt(&mut *source).await, CorruptReason::Unasked);
    daemon.send(&request.encode(), to);
    assert!(matches!(
        corrupt(&mut *source).await,
        CorruptReason::Clavis2(Clavis2Error::Length { have_bytes: 29, .. })
    ));
    daemon.send(&good, to);
    assert_eq!(key(&mut *source).await.1, [1; 32]);
    // The same answer once more is an answer to nothing.
    source.grant(1);
    source.request(&["10".parse().unwrap()]);
    let (_, to) = daemon.asked_after_attached(&mut *source).await;
    daemon.send(&good, to);
    assert_eq!(corrupt(&mut *source).await, CorruptReason::Unasked);
}

impl Daemon {
    async fn asked_after_attached(&self, source: &mut dyn KeySource) -> (Request, SocketAddr) {
        assert!(matches!(event(source).await.0, Event::Attached { .. }));
        self.asked(source).await
    }
}

#[tokio::test]
async fn a_datagram_of_another_sender_does_not_come_in() {
    let (daemon, stranger) = (Daemon::new(), Daemon::new());
    let mut source = daemon.open(Role::Pull);
    source.grant(1);
    let (request, to) = daemon.asked(&mut *source).await;
    stranger.send(&answer(&request, 5, 0xbb), to);
    assert_quiet(&mut *source, Duration::from_millis(60)).await;
    daemon.send(&answer(&request, 6, 0xaa), to);
    assert_eq!(key(&mut *source).await.1, [0xaa; 32]);
}

#[tokio::test]
async fn no_more_keys_is_asked_again_later_and_no_alarm() {
    let daemon = Daemon::new();
    let mut source = daemon.open(Role::Pull);
    source.grant(1);
    let (request, to) = daemon.asked(&mut *source).await;
    daemon.send(&refusal(&request, Refusal::NoMoreKeys), to);
    let (request, to) = daemon.asked_after_attached(&mut *source).await;
    daemon.send(&answer(&request, 5, 1), to);
    assert_eq!(key(&mut *source).await.1, [1; 32]);
}

#[tokio::test]
async fn a_key_that_does_not_exist_is_given_up_after_some_tries() {
    let daemon = Daemon::new();
    let mut source = daemon.open(Role::Fetch);
    source.grant(1);
    source.request(&["5".parse().unwrap()]);
    let (request, to) = daemon.asked(&mut *source).await;
    daemon.send(&refusal(&request, Refusal::UnknownId), to);
    let (mut request, mut to) = daemon.asked_after_attached(&mut *source).await;
    for _ in 0..3 {
        daemon.send(&refusal(&request, Refusal::UnknownId), to);
        (request, to) = daemon.asked(&mut *source).await;
    }
    daemon.send(&refusal(&request, Refusal::UnknownId), to);
    let id = "5".parse().unwrap();
    assert_eq!(event(&mut *source).await.0, Event::Empty { id });
    assert_quiet(&mut *source, Duration::from_millis(60)).await;
}

#[tokio::test]
async fn requests_that_the_daemon_calls_wrong_are_an_alarm_told_once() {
    for reason in [Refusal::KeyLength, Refusal::Request] {
        let daemon = Daemon::new();
        let mut source = daemon.open(Role::Pull);
        source.grant(1);
        let (request, to) = daemon.asked(&mut *source).await;
        daemon.send(&refusal(&request, reason), to);
        assert!(matches!(
            event(&mut *source).await.0,
            Event::Attached { .. }
        ));
        let Event::Alarm(Alarm { code, .. }) = event(&mut *source).await.0 else {
            panic!("an alarm was expected");
        };
        assert_eq!(code, AlarmCode::DeviceRefuses { reason });
        let (request, to) = daemon.asked(&mut *source).await;
        daemon.send(&refusal(&request, reason), to);
        assert_quiet(&mut *source, Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_daemon_that_does_not_answer_is_asked_again_under_a_new_number() {
    let daemon = Daemon::new();
    let mut source = daemon.open_with(Role::Fetch, 60);
    source.grant(1);
    source.request(&["5".parse().unwrap()]);
    let (first, _) = daemon.asked(&mut *source).await;
    let reason = DetachReason::NoAnswer;
    assert_eq!(event(&mut *source).await.0, Event::Detached { reason });
    let (second, to) = daemon.asked(&mut *source).await;
    assert_eq!((first.key_id, second.key_id), (5, 5));
    assert_ne!(first.request_id, second.request_id);
    daemon.send(&answer(&second, 5, 1), to);
    assert_eq!(key(&mut *source).await.1, [1; 32]);
}

#[tokio::test]
async fn a_daemon_that_is_not_there_is_detached_and_no_loop() {
    let daemon = Daemon::new();
    let config = Clavis2Config {
        poll_interval_ms: 100,
        ..match toml::from_str(&format!(
            "kind = \"clavis2\"\naddress = \"{}\"\nrole = \"pull\"",
            daemon.0.local_addr().unwrap()
        ))
        .unwrap()
        {
            DriverConfig::Clavis2(config) => config,
            _ => unreachable!(),
        }
    };
    drop(daemon);
    let mut source = DriverConfig::Clavis2(config).open().unwrap();
    source.grant(1);
    // Told long before the answer's time is over, and nothing can have been lost.
    let refused = DetachReason::Io {
        error: std::io::ErrorKind::ConnectionRefused,
    };
    let (event, _) = event(&mut *source).await;
    assert_eq!(event, Event::Detached { reason: refused });
    let wakes = wakes_while_idle(&mut *source, Duration::from_millis(500)).await;
    assert!(wakes <= 20, "woken {wakes} times");
}

#[tokio::test]
async fn settings_out_of_range_are_refused() {
    let text = "kind = \"clavis2\"\naddress = \"127.0.0.1:5323\"\nrole = \"pull\"";
    for wrong in ["device = 13", "key_bytes = 33", "timeout_ms = 0"] {
        let config: DriverConfig = toml::from_str(&format!("{text}\n{wrong}")).unwrap();
        let error = config.open().err().unwrap();
        assert!(matches!(error, OpenError::Setting { .. }), "{error}");
    }
}
