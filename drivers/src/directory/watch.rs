//! Change notifications of a folder. They are hints: the scan is the truth.

use std::{
    ffi::{OsStr, OsString},
    io,
    path::Path,
    task::{Context, Poll, ready},
};

use inotify::{EventMask, Inotify, WatchMask};
use tokio::io::unix::AsyncFd;

use crate::readiness::readable;

/// Watches one folder.
#[derive(Debug)]
pub(super) struct Watch {
    inotify: AsyncFd<Inotify>,
    buffer: Box<[u8; BUFFER_BYTES]>,
}

/// What a notification says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Hint {
    /// A file of this name was closed after writing, or moved here.
    Name(OsString),
    /// Notifications were lost.
    Lost,
    /// The folder itself went away, or notifications of it did.
    FolderGone,
}

impl Watch {
    /// `growing` also tells of files that are written to and stay open.
    pub(super) fn new(folder: &Path, growing: bool) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let mut mask = WatchMask::CLOSE_WRITE
            | WatchMask::MOVED_TO
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        mask.set(WatchMask::MODIFY, growing);
        inotify.watches().add(folder, mask)?;
        Ok(Self {
            inotify: readable(inotify)?,
            buffer: Box::new([0; BUFFER_BYTES]),
        })
    }

    /// Hands the waiting notifications to `each`; `Pending` once there is none.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, mut each: impl FnMut(Hint)) -> Poll<()> {
        loop {
            let Ok(mut guard) = ready!(self.inotify.poll_read_ready_mut(cx)) else {
                each(Hint::FolderGone);
                return Poll::Ready(());
            };
            match guard.get_inner_mut().read_events(&mut self.buffer[..]) {
                Ok(events) => {
                    for event in events {
                        each(Hint::of(event.mask, event.name));
                    }
                    return Poll::Ready(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
                Err(_) => {
                    each(Hint::FolderGone);
                    return Poll::Ready(());
                }
            }
        }
    }
}

impl Hint {
    fn of(mask: EventMask, name: Option<&OsStr>) -> Self {
        let gone =
            EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::UNMOUNT | EventMask::IGNORED;
        match name {
            _ if mask.intersects(gone) => Self::FolderGone,
            Some(name) => Self::Name(name.to_owned()),
            None => Self::Lost,
        }
    }
}

const BUFFER_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overflow_means_that_notifications_were_lost() {
        assert_eq!(Hint::of(EventMask::Q_OVERFLOW, None), Hint::Lost);
        let name = OsStr::new("c74ebf47");
        let moved = Hint::of(EventMask::MOVED_TO, Some(name));
        assert_eq!(moved, Hint::Name(name.to_owned()));
        assert_eq!(Hint::of(EventMask::IGNORED, None), Hint::FolderGone);
    }
}
