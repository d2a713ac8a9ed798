//! The one loop that drives any protocol over any stream.

use std::{
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use qkd_keyfile::{Clock, Protocol};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split},
    sync::Notify,
    time::{Instant, sleep_until, timeout},
};

use crate::frame::{FrameError, FrameReader, Framing, Limits, TooLong};

/// Bytes written before the protocol is asked for more: an answer that the peer does not take stays
/// in the protocol, which reads nothing further meanwhile.
const WRITE_BYTES: usize = 64 << 10;

/// A protocol that is driven by [`drive`] and used by others at the same time.
///
/// The lock is held for single calls only, never while anything is waited for.
#[derive(Debug)]
pub struct Shared<P> {
    protocol: Mutex<P>,
    changed: Notify,
}

impl<P> Shared<P> {
    /// Shares `protocol`; put it into an `Arc`.
    pub fn new(protocol: P) -> Self {
        Self {
            protocol: Mutex::new(protocol),
            changed: Notify::new(),
        }
    }

    /// Uses the protocol, then wakes the loop that drives it: there may be something to send.
    pub fn with<R>(&self, use_it: impl FnOnce(&mut P) -> R) -> R {
        let result = use_it(&mut self.lock());
        self.changed.notify_one();
        result
    }

    fn lock(&self) -> MutexGuard<'_, P> {
        self.protocol.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why the loop ended before the stream did. The stream is closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriveError<E: std::error::Error + 'static> {
    /// The peer's messages cannot be read, or not in time.
    #[error(transparent)]
    Read(#[from] FrameError),
    /// The stream failed while writing.
    #[error("writing: {0}")]
    Write(#[source] io::Error),
    /// The peer did not take our messages in [`Limits::write_within`].
    #[error("the peer does not read")]
    Stalled,
    /// Our own protocol made a message that the framing cannot carry.
    #[error("own {0}")]
    TooLong(#[from] TooLong),
    /// The peer broke the protocol.
    #[error(transparent)]
    Protocol(E),
}

/// Drives a protocol over a stream until the peer closes it.
///
/// # Errors
///
/// [`DriveError`]: the stream is closed; what the protocol still wants to send is lost.
pub async fn drive<P, S>(
    shared: &Shared<P>,
    stream: S,
    framing: Framing,
    limits: Limits,
    clock: &(impl Clock + Sync),
) -> Result<(), DriveError<P::Error>>
where
    P: Protocol,
    S: AsyncRead + AsyncWrite,
{
    let (mut input, mut output): (ReadHalf<S>, WriteHalf<S>) = split(stream);
    let mut reader = FrameReader::new(framing, limits);
    loop {
        write_all_due(shared, &mut output, framing, limits, clock).await?;
        let wake = shared.lock().poll_timeout().map(|at| {
            let wait = at.since(clock.now().mono);
            Instant::now() + wait
        });
        tokio::select! {
            message = reader.next(&mut input) => match message? {
                Some(message) => shared
                    .lock()
                    .receive(clock.now(), &message)
                    .map_err(DriveError::Protocol)?,
                None => return Ok(()),
            },
            () = shared.changed.notified() => {}
            () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {
                shared.lock().handle_timeout(clock.now());
            }
        }
    }
}

async fn write_all_due<P: Protocol>(
    shared: &Shared<P>,
    output: &mut (impl AsyncWrite + Unpin),
    framing: Framing,
    limits: Limits,
    clock: &impl Clock,
) -> Result<(), DriveError<P::Error>> {
    loop {
        let mut bytes = Vec::new();
        while bytes.len() < WRITE_BYTES {
            let Some(message) = shared.lock().poll_transmit(clock.now()) else {
                break;
            };
            framing.encode(&message, &mut bytes)?;
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let writing = async {
            output.write_all(&bytes).await?;
            output.flush().await
        };
        timeout(limits.write_within, writing)
            .await
            .map_err(|_| DriveError::Stalled)?
            .map_err(DriveError::Write)?;
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, sync::Arc, time::Duration};

    use qkd_keyfile::{Mono, Now, UnixTime};
    use tokio::io::{AsyncReadExt, duplex};

    use super::*;

    /// The time of the test's runtime.
    struct TestClock(Instant);

    impl Clock for TestClock {
        fn now(&self) -> Now {
            Now {
                mono: Mono(self.0.elapsed()),
                unix: UnixTime(0),
            }
        }
    }

    /// Sends back what it gets; "tick" when its time has come.
    #[derive(Default)]
    struct Echo {
        out: Vec<Vec<u8>>,
        tick_at: Option<Mono>,
    }

    #[derive(Debug, thiserror::Error)]
    #[error("bad message")]
    struct Bad;

    impl Protocol for Echo {
        type Error = Bad;

        fn receive(&mut self, _now: Now, message: &[u8]) -> Result<(), Bad> {
            if message == b"bad" {
                return Err(Bad);
            }
            self.out.insert(0, message.to_vec());
            Ok(())
        }

        fn poll_transmit(&mut self, _now: Now) -> Option<Vec<u8>> {
            self.out.pop()
        }

        fn poll_timeout(&self) -> Option<Mono> {
            self.tick_at
        }

        fn handle_timeout(&mut self, _now: Now) {
            self.tick_at = None;
            self.out.push(b"tick".to_vec());
        }
    }

    async fn run(echo: Echo, stream: impl AsyncRead + AsyncWrite) -> Result<(), DriveError<Bad>> {
        let clock = TestClock(Instant::now());
        let shared = Shared::new(echo);
        drive(&shared, stream, Framing::LENGTH, Limits::default(), &clock).await
    }

    #[tokio::test]
    async fn messages_are_answered_until_the_peer_closes() {
        let (ours, mut theirs) = duplex(64);
        let talk = async {
            let mut reader = FrameReader::new(Framing::LENGTH, Limits::default());
            for text in [&b"one"[..], b"", b"two"] {
                let mut bytes = Vec::new();
                Framing::LENGTH.encode(text, &mut bytes).unwrap();
                theirs.write_all(&bytes).await.unwrap();
                assert_eq!(reader.next(&mut theirs).await.unwrap().unwrap(), text);
            }
            drop(theirs);
        };
        let (end, ()) = tokio::join!(run(Echo::default(), ours), talk);
        end.unwrap();
    }

    #[tokio::test]
    async fn a_broken_protocol_ends_the_stream() {
        let (ours, mut theirs) = duplex(64);
        theirs.write_all(b"\0\0\0\x03bad").await.unwrap();
        let end = run(Echo::default(), ours).await;
        assert!(matches!(end, Err(DriveError::Protocol(Bad))));
        assert_eq!(theirs.read(&mut [0; 1]).await.unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn time_outs_and_calls_from_outside_are_sent_at_once() {
        let (ours, mut theirs) = duplex(64);
        let echo = Echo {
            tick_at: Some(Mono(Duration::from_secs(3600))),
            ..Echo::default()
        };
        let shared = Arc::new(Shared::new(echo));
        let start = Instant::now();
        let outside = shared.clone();
        let driving = tokio::spawn(async move {
            let clock = TestClock(start);
            drive(&shared, ours, Framing::LENGTH, Limits::default(), &clock).await
        });
        tokio::time::sleep(Duration::from_secs(60)).await;
        outside.with(|echo| echo.out.push(b"hi".to_vec()));
        let mut reader = FrameReader::new(Framing::LENGTH, Limits::default());
        assert_eq!(reader.next(&mut theirs).await.unwrap().unwrap(), b"hi");
        assert_eq!(start.elapsed().as_secs(), 60);
        assert_eq!(reader.next(&mut theirs).await.unwrap().unwrap(), b"tick");
        assert_eq!(start.elapsed().as_secs(), 3600);
        drop(theirs);
        driving.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_read_is_left() {
        struct Chatter;
        impl Protocol for Chatter {
            type Error = Infallible;
            fn receive(&mut self, _now: Now, _message: &[u8]) -> Result<(), Infallible> {
                Ok(())
            }
            fn poll_transmit(&mut self, _now: Now) -> Option<Vec<u8>> {
                Some(vec![0; 1000])
            }
            fn poll_timeout(&self) -> Option<Mono> {
                None
            }
            fn handle_timeout(&mut self, _now: Now) {}
        }
        let (ours, _theirs) = duplex(64);
        let shared = Shared::new(Chatter);
        let clock = TestClock(Instant::now());
        let end = drive(&shared, ours, Framing::LENGTH, Limits::default(), &clock).await;
        assert!(matches!(end, Err(DriveError::Stalled)));
    }
}
