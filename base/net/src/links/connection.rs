//! One connection, from its first frame to its end.

use std::{
    io,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, WriteHalf, split},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};
use tokio_rustls::TlsStream;

use super::{ALPN, DownReason, LinkEvent, LinkTiming, frames::Frames, outbox::Outbox};
use crate::{
    FrameError, FrameReader,
    frame::{PREFIX_BYTES, TooLong},
    tls::{Reloadable, Shown},
};

/// The frame that says "still here".
const SIGN_OF_LIFE: [u8; PREFIX_BYTES] = [0; PREFIX_BYTES];

/// A stream on which both sides have shown that they accept the other.
pub(super) type Stream = TlsStream<TcpStream>;

/// Exchanges the first frames: after this, both sides know that they are accepted.
pub(super) async fn greet(stream: &mut Stream, timing: LinkTiming) -> io::Result<()> {
    if stream.get_ref().1.alpn_protocol() != Some(ALPN) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the peer does not speak Kx",
        ));
    }
    let greeting = async {
        stream.write_all(&SIGN_OF_LIFE).await?;
        stream.flush().await?;
        let mut first = [0xff; PREFIX_BYTES];
        stream.read_exact(&mut first).await?;
        match first {
            SIGN_OF_LIFE => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "no greeting")),
        }
    };
    timeout(timing.handshake_within, greeting).await?
}

/// What one peer's connections have in common.
pub(super) struct Link {
    pub(super) outbox: Arc<Outbox>,
    pub(super) events: mpsc::Sender<LinkEvent>,
    pub(super) credentials: Arc<Reloadable>,
}

impl Link {
    /// Runs a connection to its end, or until `replaced` brings another, which is returned.
    pub(super) async fn run(
        &self,
        stream: Stream,
        replaced: impl Future<Output = Stream>,
    ) -> Option<Stream> {
        let connection = self.outbox.open();
        let peer = self.outbox.peer.clone();
        tracing::info!(%peer, connection, "link is up");
        let refused = self.credentials.until_refused(Shown::from(&stream));
        let (input, output) = split(stream);
        let told = OnceLock::new();
        let (reason, newcomer) = tokio::select! {
            reason = self.read(input, connection, &told) => (reason, None),
            error = self.write(output) => (DownReason::Write(error), None),
            () = self.outbox.overrun() => (DownReason::Slow, None),
            () = refused => (DownReason::Refused, None),
            newcomer = replaced => (DownReason::Replaced, Some(newcomer)),
        };
        self.outbox.close();
        self.count(&reason);
        tracing::warn!(%peer, connection, %reason, "link is down");
        if told.get().is_some() {
            self.tell(LinkEvent::Down {
                peer,
                connection,
                reason,
            })
            .await;
        }
        newcomer
    }

    /// Waiting for the consumer happens in here, so that our own signs of life go on meanwhile.
    async fn read(
        &self,
        mut input: impl AsyncRead + Unpin,
        connection: u64,
        told: &OnceLock<()>,
    ) -> DownReason {
        let peer = self.outbox.peer.clone();
        self.tell(LinkEvent::Up { peer, connection }).await;
        let _ = told.set(());
        let timing = self.outbox.timing;
        let mut reader = FrameReader::new(timing.framing(), timing.limits());
        loop {
            match reader.next(&mut input).await {
                Ok(Some(bytes)) if bytes.is_empty() => {}
                Ok(Some(bytes)) => {
                    self.outbox.received(bytes.len());
                    let peer = self.outbox.peer.clone();
                    // The peer's silence is not counted while we wait for the consumer.
                    self.tell(LinkEvent::Message {
                        peer,
                        connection,
                        bytes,
                    })
                    .await;
                }
                Ok(None) => return DownReason::Closed,
                // A process that ends does not say good-bye in TLS.
                Err(FrameError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return DownReason::Closed;
                }
                Err(error) => return DownReason::Read(error),
            }
        }
    }

    async fn write<S: AsyncWrite>(&self, mut output: WriteHalf<S>) -> io::Error {
        let ping_every: Duration = self.outbox.timing.ping_every;
        let mut frames = Frames::default();
        loop {
            if timeout(ping_every, self.outbox.take(&mut frames))
                .await
                .is_err()
            {
                frames.push_bytes(Bytes::from_static(&SIGN_OF_LIFE));
            }
            let written = async {
                output.write_all_buf(&mut frames).await?;
                output.flush().await
            };
            if let Err(error) = written.await {
                return error;
            }
        }
    }

    async fn tell(&self, event: LinkEvent) {
        // Without a consumer there is nobody to tell; `Links::start` says so.
        let _ = self.events.send(event).await;
    }

    fn count(&self, reason: &DownReason) {
        self.outbox.counters.add(|counters| match reason {
            DownReason::Read(FrameError::TimedOut { .. }) => &mut counters.silent,
            DownReason::Read(FrameError::TooLong(TooLong { .. })) => &mut counters.oversize,
            DownReason::Slow => &mut counters.slow,
            DownReason::Replaced => &mut counters.replaced,
            DownReason::Refused => &mut counters.refused,
            DownReason::Closed | DownReason::Read(_) | DownReason::Write(_) => &mut counters.lost,
        });
    }
}
