//! What keeps this user from a module's port, folder or socket, and the command that mends it.
//!
//! Used where a module cannot be opened ([`OpenError`](crate::OpenError)) and by whoever examines one
//! beforehand. It looks at the path anew, so what it says is true at that moment; it changes nothing,
//! and never sends or reads a byte.

mod holders;
mod rights;

use std::{
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag, open},
    sys::{
        stat::Mode,
        termios::{Termios, tcgetattr},
    },
};

use self::rights::{Me, Want};

/// What is wrong, and how to mend it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advice {
    /// What is wrong, in words that follow "cannot use …:".
    pub problem: String,
    /// A shell command that mends it, or that shows what is needed to. `None` where only the
    /// configuration or a hand at the device can.
    pub command: Option<String>,
}

impl Advice {
    fn new(problem: impl Into<String>, command: impl Into<Option<String>>) -> Self {
        let (problem, command) = (problem.into(), command.into());
        Self { problem, command }
    }
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problem)?;
        match &self.command {
            Some(command) => write!(f, "; to mend it: {command}"),
            None => Ok(()),
        }
    }
}

/// What keeps this user from a serial port; `None` if nothing does.
///
/// Opens the port without waiting, locks it for a moment, and closes it again.
#[must_use]
pub fn port(path: &Path) -> Option<Advice> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    match open(path, flags, Mode::empty()) {
        Ok(port) => not_a_terminal(&port).or_else(|| locked(path, port)),
        Err(Errno::EBUSY) => Some(busy(path)),
        Err(Errno::EACCES | Errno::EPERM) => Some(denied(path, Want::ReadWrite)),
        Err(Errno::ENOENT) => Some(absent(path)),
        Err(Errno::ENXIO | Errno::ENODEV | Errno::EIO) => Some(Advice::new(
            "the device behind it does not answer: plug it in again",
            "sudo dmesg | tail".to_owned(),
        )),
        Err(errno) => Some(other(errno.into())),
    }
}

/// What keeps this user from reading a hand-over folder and taking files out of it; `None` if nothing
/// does.
#[must_use]
pub fn folder(path: &Path) -> Option<Advice> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) => return Some(unreachable_path(path, error, Want::Take)),
    };
    if !metadata.is_dir() {
        return Some(Advice::new(
            "it is no folder: name the folder, not a file in it",
            None,
        ));
    }
    rights::missing(path, Want::Take, &Me::get())
}

/// What keeps this user from making a socket or a file at `path`; `None` if nothing does.
#[must_use]
pub fn new_socket(path: &Path) -> Option<Advice> {
    let parent = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Some(Advice::new("it is no path of a file", None)),
    };
    if let Err(error) = std::fs::metadata(parent) {
        return Some(unreachable_path(parent, error, Want::Take));
    }
    rights::missing(parent, Want::Take, &Me::get()).or_else(|| occupied(path))
}

/// What keeps this user from a file that another process wrote; `None` if nothing does.
#[must_use]
pub fn file(path: &Path) -> Option<Advice> {
    match std::fs::metadata(path) {
        Ok(_) => rights::missing(path, Want::ReadWrite, &Me::get()),
        Err(error) => Some(unreachable_path(path, error, Want::ReadWrite)),
    }
}

fn not_a_terminal(port: &OwnedFd) -> Option<Advice> {
    let is_terminal = tcgetattr(port.as_fd()).is_ok_and(|_: Termios| true);
    (!is_terminal).then(|| {
        Advice::new(
            "it is no serial port",
            "ls -l /dev/serial/by-id/".to_owned(),
        )
    })
}

/// Whether another program holds the lock that every careful one takes.
fn locked(path: &Path, port: OwnedFd) -> Option<Advice> {
    match Flock::lock(port, FlockArg::LockExclusiveNonblock) {
        Ok(_) => None,
        Err((port, _)) => {
            // Or this process would be found among those who hold it.
            drop(port);
            Some(busy(path))
        }
    }
}

fn busy(path: &Path) -> Advice {
    let holders = holders::of(path);
    if holders
        .iter()
        .any(|holder| holder.pid == std::process::id())
    {
        return Advice::new(
            "this program uses it already: two entries of the configuration name it",
            None,
        );
    }
    match holders.first() {
        Some(holder) if holder.name.starts_with("ModemManage") => Advice::new(
            "ModemManager tries whether it is a modem; the udev rules of this package keep it away",
            "sudo systemctl stop ModemManager".to_owned(),
        ),
        Some(holder) => Advice::new(
            format!("{} (process {}) uses it", holder.name, holder.pid),
            format!("kill {}", holder.pid),
        ),
        None => Advice::new(
            "another program uses it, which this user may not see",
            format!("sudo fuser -v {}", quoted(path)),
        ),
    }
}

fn denied(path: &Path, want: Want) -> Advice {
    rights::missing(path, want, &Me::get()).unwrap_or_else(|| {
        Advice::new(
            "the system denies it for a reason that owner, group and mode do not show: a \
             service's DeviceAllow, AppArmor or SELinux",
            "systemctl show qkd-bridge -p DeviceAllow".to_owned(),
        )
    })
}

/// Nothing is at the path of a port.
fn absent(path: &Path) -> Advice {
    match path.parent() {
        Some(parent) if path.starts_with("/dev/serial") || path.starts_with("/dev/qkd") => {
            let command = if parent.exists() {
                format!("ls -l {}", quoted(parent))
            } else {
                "sudo dmesg | tail".to_owned()
            };
            Advice::new("no such device is plugged in", command)
        }
        _ => Advice::new(
            "there is nothing at this path: plug the device in, or give the path that it has",
            "ls -l /dev/serial/by-id/".to_owned(),
        ),
    }
}

/// A path that cannot be looked at.
fn unreachable_path(path: &Path, error: io::Error, want: Want) -> Advice {
    match error.kind() {
        io::ErrorKind::NotFound => {
            let command = match want {
                Want::Take => {
                    let user = Me::get().name;
                    let path = quoted(path);
                    Some(format!("sudo install -d -m 750 -o {user} {path}"))
                }
                Want::ReadWrite | Want::Enter => None,
            };
            Advice::new("it does not exist", command)
        }
        io::ErrorKind::PermissionDenied => denied(path, want),
        _ => other(error),
    }
}

/// Something listens there, or a file is in the way.
fn occupied(path: &Path) -> Option<Advice> {
    use std::os::unix::fs::FileTypeExt;
    let metadata = std::fs::symlink_metadata(path).ok()?;
    let command = format!("sudo fuser -v {}", quoted(path));
    Some(if metadata.file_type().is_socket() {
        Advice::new("another program listens there", command)
    } else {
        Advice::new(
            "a file that is no socket is there: give another path, or remove it",
            format!("ls -l {}", quoted(path)),
        )
    })
}

fn other(error: io::Error) -> Advice {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EMFILE) => Advice::new(
            "this program has as many files open as it may",
            "ulimit -n 65536".to_owned(),
        ),
        _ => Advice::new(error.to_string(), None),
    }
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// Every folder above `path`, from the root on.
fn above(path: &Path) -> Vec<PathBuf> {
    let mut folders: Vec<_> = path
        .ancestors()
        .skip(1)
        .filter(|folder| !folder.as_os_str().is_empty())
        .map(Path::to_owned)
        .collect();
    folders.reverse();
    folders
}
