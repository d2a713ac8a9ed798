//! A stream whose peer must keep reading.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};

/// Fails a write that makes no progress for a time: a reply holds key bytes, and would hold them
/// for as long as its reader likes.
pub(crate) struct WriteWithin<T> {
    stream: T,
    within: Duration,
    /// Runs while a write is pending.
    deadline: Pin<Box<Sleep>>,
    pending: bool,
}

impl<T> WriteWithin<T> {
    pub(crate) fn new(stream: T, within: Duration) -> Self {
        Self {
            stream,
            within,
            deadline: Box::pin(sleep(within)),
            pending: false,
        }
    }

    fn guard<R>(
        &mut self,
        cx: &mut Context<'_>,
        answer: Poll<io::Result<R>>,
    ) -> Poll<io::Result<R>> {
        if answer.is_ready() {
            self.pending = false;
            return answer;
        }
        if !self.pending {
            self.pending = true;
            self.deadline.as_mut().reset(Instant::now() + self.within);
        }
        match self.deadline.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for WriteWithin<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for WriteWithin<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let answer = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.guard(cx, answer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let answer = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.guard(cx, answer)
    }

    /// Where writes are not vectored, hyper copies bodies into a buffer that nobody wipes.
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let answer = Pin::new(&mut self.stream).poll_flush(cx);
        self.guard(cx, answer)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let answer = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.guard(cx, answer)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_read_ends_the_write() {
        let (ours, _theirs) = duplex(16);
        let mut stream = WriteWithin::new(ours, Duration::from_secs(5));
        let start = Instant::now();
        let error = stream.write_all(&[0; 17]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(start.elapsed(), Duration::from_secs(5));
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_reads_slowly_but_steadily_is_served() {
        let (ours, mut theirs) = duplex(16);
        let mut stream = WriteWithin::new(ours, Duration::from_secs(5));
        let writing = tokio::spawn(async move { stream.write_all(&[7; 160]).await });
        let mut got = [0; 160];
        for part in got.chunks_mut(16) {
            sleep(Duration::from_secs(4)).await;
            theirs.read_exact(part).await.unwrap();
        }
        writing.await.unwrap().unwrap();
        assert_eq!(got, [7; 160]);
    }
}
