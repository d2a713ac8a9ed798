//! A TCP proxy that makes a network bad: late, slow, in small pieces, silent, broken.
//!
//! What it does to a connection is drawn from a seed, so equal seeds draw equal delays and slices;
//! when bytes come is up to the machine. The bytes themselves are never changed: TLS would end the
//! connection, which a reset does more simply.

#![allow(dead_code, reason = "every test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{net::SocketAddr, ops::RangeInclusive, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{broadcast, mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};

/// What the proxy does to every connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Weather {
    /// Every byte is late by this, in each direction.
    pub(crate) latency: Duration,
    /// And by up to this, drawn for every chunk; chunks never overtake each other.
    pub(crate) jitter: Duration,
    /// Bytes per second in each direction, at most.
    pub(crate) rate: Option<u64>,
    /// Chunks go out in slices of so many bytes.
    pub(crate) slices: Option<RangeInclusive<usize>>,
    /// Nothing gets through and nothing is lost: what is sent arrives when the partition ends, if the
    /// connection still stands then.
    pub(crate) partition: bool,
}

impl Weather {
    /// Passes everything on at once.
    pub(crate) const FAIR: Self = Self {
        latency: Duration::ZERO,
        jitter: Duration::ZERO,
        rate: None,
        slices: None,
        partition: false,
    };
}

/// What is done once to the connections that stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    /// Both ends see a reset (RST).
    Reset,
    /// The end that accepted sees a reset, the one that dialled sees nothing, ever.
    DiallerAlone,
    /// The other way round.
    ListenerAlone,
}

/// A running proxy; ends when dropped.
#[derive(Debug)]
pub(crate) struct Proxy {
    /// Where to connect instead of the target.
    pub(crate) address: SocketAddr,
    weather: watch::Sender<Weather>,
    blows: broadcast::Sender<Blow>,
    _accepting: JoinSet<()>,
}

impl Proxy {
    /// Listens on a free port of loopback, for connections to `target`.
    pub(crate) async fn start(target: SocketAddr, weather: Weather, seed: u64) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), target, weather, seed).await
    }

    /// Listens on `at`.
    pub(crate) async fn start_at(
        at: SocketAddr,
        target: SocketAddr,
        weather: Weather,
        seed: u64,
    ) -> Self {
        let listener = TcpListener::bind(at).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (weather, seen) = watch::channel(weather);
        let (blows, _) = broadcast::channel(16);
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, target, seen, blows.clone(), Random(seed)));
        Self {
            address,
            weather,
            blows,
            _accepting: accepting,
        }
    }

    /// Changes the weather, for the connections that stand and for new ones.
    pub(crate) fn set(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }

    /// Resets every connection.
    pub(crate) fn reset(&self) {
        let _ = self.blows.send(Blow::Reset);
    }

    /// Resets the listening end of every connection; the dialler keeps one that is silent.
    pub(crate) fn leave_the_dialler_alone(&self) {
        let _ = self.blows.send(Blow::DiallerAlone);
    }

    /// Resets the dialling end of every connection; the listener keeps one that is silent.
    pub(crate) fn leave_the_listener_alone(&self) {
        let _ = self.blows.send(Blow::ListenerAlone);
    }
}

async fn accept(
    listener: TcpListener,
    target: SocketAddr,
    weather: watch::Receiver<Weather>,
    blows: broadcast::Sender<Blow>,
    mut random: Random,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((dialler, _)) = accepted else { continue };
                let mut weather = weather.clone();
                let (mut blow, seed) = (blows.subscribe(), random.next());
                connections.spawn(async move {
                    tokio::select! {
                        () = no_partition(&mut weather) => {}
                        _ = blow.recv() => return reset(dialler),
                    }
                    if let Ok(listener) = TcpStream::connect(target).await {
                        carry(dialler, listener, weather.clone(), blow, seed).await;
                    }
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Carries one connection until an end closes it or a blow falls.
async fn carry(
    dialler: TcpStream,
    listener: TcpStream,
    weather: watch::Receiver<Weather>,
    mut blow: broadcast::Receiver<Blow>,
    seed: u64,
) {
    for stream in [&dialler, &listener] {
        let _ = stream.set_nodelay(true);
    }
    let (mut from_dialler, mut to_dialler) = dialler.into_split();
    let (mut from_listener, mut to_listener) = listener.into_split();
    let mut random = Random(seed);
    let [there, back] = [random.next(), random.next()];
    let blow = {
        let there = pass(&mut from_dialler, &mut to_listener, weather.clone(), there);
        let back = pass(&mut from_listener, &mut to_dialler, weather, back);
        tokio::select! {
            ((), ()) = async { tokio::join!(there, back) } => return,
            blow = blow.recv() => blow,
        }
    };
    let dialler = from_dialler.reunite(to_dialler).unwrap();
    let listener = from_listener.reunite(to_listener).unwrap();
    match blow {
        Ok(Blow::Reset) => {
            reset(dialler);
            reset(listener);
        }
        Ok(Blow::DiallerAlone) => {
            reset(listener);
            keep_silent(dialler).await;
        }
        Ok(Blow::ListenerAlone) => {
            reset(dialler);
            keep_silent(listener).await;
        }
        Err(_) => {}
    }
}

async fn no_partition(weather: &mut watch::Receiver<Weather>) {
    // An error means that the proxy ends, and this task with it.
    let _ = weather.wait_for(|weather| !weather.partition).await;
}

fn reset(stream: TcpStream) {
    let _ = stream.set_zero_linger();
}

/// Swallows what comes, until that end gives up.
async fn keep_silent(mut stream: TcpStream) {
    let mut swallowed = [0; 4096];
    while let Ok(1..) = stream.read(&mut swallowed).await {}
}

/// Bytes on their way, and when they may arrive.
struct Chunk {
    bytes: Vec<u8>,
    due: Instant,
}

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 16 << 10;

/// Chunks on their way, at most; then the sender waits, as with a full window of TCP.
const CHUNKS: usize = 256;

/// Passes bytes on in one direction, until it is closed; then closes it at the other end.
async fn pass(
    from: &mut OwnedReadHalf,
    to: &mut OwnedWriteHalf,
    weather: watch::Receiver<Weather>,
    seed: u64,
) {
    let (sender, chunks) = mpsc::channel(CHUNKS);
    let mut random = Random(seed);
    let slicing = Random(random.next());
    let reading = read(from, sender, weather.clone(), random);
    tokio::join!(reading, write(to, chunks, weather, slicing));
}

async fn read(
    from: &mut OwnedReadHalf,
    chunks: mpsc::Sender<Chunk>,
    mut weather: watch::Receiver<Weather>,
    mut random: Random,
) {
    let mut bytes = vec![0; CHUNK_BYTES];
    let mut due = Instant::now();
    while let Ok(length @ 1..) = from.read(&mut bytes).await {
        no_partition(&mut weather).await;
        let Weather {
            latency,
            jitter,
            rate,
            ..
        } = weather.borrow().clone();
        let late = latency + jitter.mul_f64(random.fraction());
        due = due.max(Instant::now() + late);
        if let Some(rate) = rate {
            due += Duration::from_secs_f64(length as f64 / rate as f64);
        }
        let bytes = bytes[..length].to_vec();
        if chunks.send(Chunk { bytes, due }).await.is_err() {
            return;
        }
    }
}

async fn write(
    to: &mut OwnedWriteHalf,
    mut chunks: mpsc::Receiver<Chunk>,
    mut weather: watch::Receiver<Weather>,
    mut random: Random,
) {
    while let Some(Chunk { bytes, due }) = chunks.recv().await {
        sleep_until(due).await;
        no_partition(&mut weather).await;
        let slices = weather.borrow().slices.clone();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let length = slices
                .as_ref()
                .map_or(rest.len(), |slices| random.within(slices));
            let (slice, after) = rest.split_at(length.clamp(1, rest.len()));
            if to.write_all(slice).await.is_err() {
                return;
            }
            if slices.is_some() {
                // A moment, or the kernel puts the slices together again.
                sleep(Duration::from_micros(200)).await;
            }
            rest = after;
        }
    }
    let _ = to.shutdown().await;
}

/// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
#[derive(Debug, Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0 to 1.
    fn fraction(&mut self) -> f64 {
        self.next() as f64 / u64::MAX as f64
    }

    fn within(&mut self, range: &RangeInclusive<usize>) -> usize {
        let span = (range.end() - range.start()) as u64 + 1;
        range.start() + usize::try_from(self.next() % span).unwrap()
    }
}
