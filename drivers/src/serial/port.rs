//! An open serial port: raw, and ours alone.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    pin::Pin,
    task::{Context, Poll, ready},
};

use nix::{errno::Errno, fcntl::OFlag};
use rustix::termios::ioctl_tiocnxcl;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_serial::{ClearBuffer, FlowControl, SerialPort, SerialPortBuilderExt, SerialStream};

use crate::event::DetachReason;

/// A port, open for both directions.
#[derive(Debug)]
pub(super) struct Port(SerialStream);

impl Port {
    /// Opens the port in raw mode, with TIOCEXCL and an exclusive `flock`: the first does not keep
    /// root out, the second only those who ask.
    ///
    /// A pseudo-terminal has the lock only: it keeps TIOCEXCL for as long as its other end is open,
    /// so that after a process that was killed nobody but root could open it again.
    pub(super) fn open(path: &Path, baud: u32, rts_cts: bool) -> io::Result<Self> {
        let flow_control = if rts_cts {
            FlowControl::Hardware
        } else {
            FlowControl::None
        };
        let second = is_pseudo_terminal(path).then(|| second_handle(path));
        let stream = tokio_serial::new(path.to_string_lossy(), baud)
            .flow_control(flow_control)
            .exclusive(true)
            .open_native_async()?;
        if let Some(second) = second {
            ioctl_tiocnxcl(second?)?;
        }
        Ok(Self(stream))
    }

    /// Reads what is there; 0 bytes are a hang-up, and an unplugged USB port gives them for ever.
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        out: &mut [u8],
    ) -> Poll<Result<usize, DetachReason>> {
        let mut buffer = ReadBuf::new(out);
        match ready!(Pin::new(&mut self.0).poll_read(cx, &mut buffer)) {
            Ok(()) if buffer.filled().is_empty() => Poll::Ready(Err(DetachReason::HungUp)),
            Ok(()) => Poll::Ready(Ok(buffer.filled().len())),
            Err(error) => Poll::Ready(Err(reason(&error))),
        }
    }

    /// Writes some of `bytes`.
    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, DetachReason>> {
        match ready!(Pin::new(&mut self.0).poll_write(cx, bytes)) {
            Ok(0) => Poll::Ready(Err(DetachReason::HungUp)),
            Ok(written) => Poll::Ready(Ok(written)),
            Err(error) => Poll::Ready(Err(reason(&error))),
        }
    }
}

impl Drop for Port {
    /// Closing waits for output that a silent device may never take (up to 30 s on Linux), unless
    /// it is thrown away first. What is left to send is credit, which is sent anew after reopening.
    fn drop(&mut self) {
        let _ = self.0.clear(ClearBuffer::Output);
    }
}

fn is_pseudo_terminal(path: &Path) -> bool {
    fs::canonicalize(path).is_ok_and(|path| path.starts_with("/dev/pts"))
}

/// A handle that does nothing until it is closed.
fn second_handle(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(path)
}

fn reason(error: &io::Error) -> DetachReason {
    let unplugged = [Errno::EIO, Errno::ENXIO, Errno::ENODEV];
    if unplugged
        .iter()
        .any(|&errno| error.raw_os_error() == Some(errno as i32))
    {
        DetachReason::HungUp
    } else {
        DetachReason::Io {
            error: error.kind(),
        }
    }
}
