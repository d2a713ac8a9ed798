//! What the service manager is told, as `sd_notify(3)` describes: that the node is ready, reads its
//! configuration again, lives, stops. Without a service manager nothing is told.

use std::{
    ffi::OsStr,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};

/// How often the state is told where nobody asks for signs of life.
const STATUS_EVERY: Duration = Duration::from_secs(10);

/// The service manager that started this process, if one did.
#[derive(Debug)]
pub struct ServiceManager {
    socket: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// Reads `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`.
    #[must_use]
    pub fn from_environment() -> Self {
        let socket = std::env::var_os("NOTIFY_SOCKET").and_then(|path| connect(&path));
        let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
        // The limit may be meant for another process of the service.
        let is_mine = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let limit = number("WATCHDOG_USEC").filter(|&limit| is_mine && limit > 0);
        Self {
            socket,
            watchdog: limit.map(Duration::from_micros),
        }
    }

    /// The node has started, or has read its configuration again.
    pub fn ready(&self) {
        self.tell("READY=1");
    }

    /// The node reads its configuration again; [`ready`](Self::ready) comes after it.
    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from);
        let now_us = now.unwrap_or_default().as_micros();
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={now_us}"));
    }

    /// The node works, and how.
    pub fn alive(&self, status: &str) {
        self.tell(&format!("WATCHDOG=1\nSTATUS={status}"));
    }

    /// The node stops.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// How often to call [`alive`](Self::alive): twice in the time after which the node counts as dead.
    #[must_use]
    pub fn alive_every(&self) -> Duration {
        self.watchdog.map_or(STATUS_EVERY, |limit| limit / 2)
    }

    fn tell(&self, state: &str) {
        if let Some((socket, manager)) = &self.socket {
            // A manager that does not listen does not need to know.
            let _ = socket.send_to_addr(state.as_bytes(), manager);
        }
    }
}

/// A path, or a name in the abstract namespace after an `@`.
fn connect(path: &OsStr) -> Option<(UnixDatagram, SocketAddr)> {
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(path),
    };
    let socket = UnixDatagram::unbound().ok()?;
    socket.set_nonblocking(true).ok()?;
    Some((socket, address.ok()?))
}
