//! The device's end of the line: a port that comes and goes, or a pseudo-terminal of its own.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::symlink},
    },
    path::{Path, PathBuf},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, Mode, OFlags, fcntl_setfl, flock, open},
    io::Errno,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{ControlModes, OptionalActions, ioctl_tiocexcl, tcgetattr, tcsetattr},
};

use super::SerialConfig;

pub(super) enum Port {
    Line {
        path: PathBuf,
        baud: u32,
        open: Option<OwnedFd>,
    },
    /// A pseudo-terminal, made when there is none.
    Pty {
        path: PathBuf,
        baud: u32,
        open: Option<Pty>,
    },
}

/// The master end. The host's end is not held open here, so that its comings and goings show.
pub(super) struct Pty {
    master: OwnedFd,
    _link: Link,
}

/// A link to the host's end, removed with the port.
pub(super) struct Link(PathBuf);

impl Port {
    pub(super) fn new(config: &SerialConfig) -> io::Result<Self> {
        if !config.make_pty {
            return Ok(Self::Line {
                path: config.path.clone(),
                baud: config.baud,
                open: None,
            });
        }
        Ok(Self::Pty {
            open: Some(Pty::new(&config.path, config.baud)?),
            path: config.path.clone(),
            baud: config.baud,
        })
    }

    /// The line, once someone can be at its other end.
    pub(super) fn open(&mut self) -> io::Result<Option<BorrowedFd<'_>>> {
        match self {
            Self::Line { path, baud, open } => {
                if open.is_none() {
                    *open = match open_line(path, *baud) {
                        Ok(fd) => Some(fd),
                        Err(errno @ (Errno::ACCESS | Errno::NOTTY)) => return Err(errno.into()),
                        Err(_) => None,
                    };
                }
                Ok(open.as_ref().map(AsFd::as_fd))
            }
            Self::Pty { path, baud, open } => {
                let pty = match open {
                    Some(pty) => pty,
                    None => open.insert(Pty::new(path, *baud)?),
                };
                let master = OwnedFd::as_fd(&pty.master);
                let mut fds = [PollFd::from_borrowed_fd(master, PollFlags::empty())];
                poll(&mut fds, Some(&Timespec::default()))?;
                let is_closed = fds[0].revents().contains(PollFlags::HUP);
                Ok((!is_closed).then_some(master))
            }
        }
    }

    /// Lets go of a line that broke: a device that is plugged in again gets another name else. A
    /// pseudo-terminal that the host has left is kept; see [`unplug`](Self::unplug).
    pub(super) fn close(&mut self) {
        if let Self::Line { open, .. } = self {
            *open = None;
        }
    }

    /// Goes away, as a device that is unplugged; the host's end hangs up.
    pub(super) fn unplug(&mut self) {
        match self {
            Self::Line { open, .. } => *open = None,
            Self::Pty { open, .. } => *open = None,
        }
    }
}

impl Pty {
    fn new(path: &Path, baud: u32) -> io::Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        fcntl_setfl(&master, OFlags::NONBLOCK)?;
        let name = ptsname(&master, Vec::new())?;
        let slave = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
        // Until the host's end was open once, the master does not tell that it is closed. TIOCEXCL
        // would stay for as long as the master is open, and let nobody but root in.
        drop(open_raw(slave, baud)?);
        Ok(Self {
            master,
            _link: Link::new(slave, path)?,
        })
    }
}

impl Link {
    fn new(target: &Path, path: &Path) -> io::Result<Self> {
        // A link that a simulator left behind when it was killed; anything else stays.
        if fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink()) {
            fs::remove_file(path)?;
        }
        symlink(target, path)?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::debug!(path = %self.0.display(), %error, "link to the pseudo-terminal stays");
        }
    }
}

/// Opens a line raw, 8N1, for this process alone.
fn open_line(path: &Path, baud: u32) -> Result<OwnedFd, Errno> {
    let fd = open_raw(path, baud)?;
    ioctl_tiocexcl(&fd)?;
    Ok(fd)
}

/// The same, but the lock alone keeps others out.
fn open_raw(path: &Path, baud: u32) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = open(path, flags, Mode::empty())?;
    // TIOCEXCL does not keep out root, the lock does.
    flock(&fd, FlockOperation::NonBlockingLockExclusive)?;
    let mut modes = tcgetattr(&fd)?;
    modes.make_raw();
    modes.control_modes &= !(ControlModes::CSTOPB | ControlModes::PARENB);
    modes.control_modes |= ControlModes::CS8 | ControlModes::CLOCAL | ControlModes::CREAD;
    modes.set_speed(baud)?;
    tcsetattr(&fd, OptionalActions::Now, &modes)?;
    Ok(fd)
}
