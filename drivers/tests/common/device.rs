//! A device that talks over a pseudo-terminal, with faults.

use std::{
    num::NonZeroU32,
    os::{fd::OwnedFd, unix::fs::symlink},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout},
    pty::openpty,
    sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr},
    unistd::{read, ttyname, write},
};
use qkd_handover::{
    block::BlockHeader,
    serial::{Decoder, Sender},
};
use qkd_keyfile::{Mono, UnixTime};

/// What happens to bytes on the line: done to each piece, in both directions.
pub(crate) type Fault = Box<dyn FnMut(&mut Vec<u8>) + Send>;

/// A device whose cable can be pulled out. It keeps its blocks over that.
pub(crate) struct Device {
    pub(crate) sender: Arc<Mutex<Sender>>,
    cable: Option<Cable>,
}

struct Cable {
    link: PathBuf,
    pull: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// The header and key of the block with this number; every number has its own length.
pub(crate) fn block(number: u64) -> (BlockHeader, Vec<u8>) {
    let len = 1 + usize::try_from(number * 37 % 400).unwrap();
    let key: Vec<u8> = (0..len as u64)
        .map(|i| (number.wrapping_mul(0x9e37_79b9) >> (i % 8) ^ i).to_le_bytes()[0])
        .collect();
    let header = BlockHeader {
        number,
        generated_at: Some(UnixTime(1_000 + number.cast_signed())),
        key_bits: u32::try_from(len * 8).unwrap(),
        qber_ppm: None,
    };
    (header, key)
}

impl Device {
    pub(crate) fn new(name: &str, session: u32) -> Self {
        Self::with_patience(name, session, Duration::from_millis(100))
    }

    /// A device that sends again by itself only after so long a silence.
    pub(crate) fn with_patience(name: &str, session: u32, patience: Duration) -> Self {
        let session = NonZeroU32::new(session).unwrap();
        let sender = Sender::new(session, name, 100_000, patience).unwrap();
        Self {
            sender: Arc::new(Mutex::new(sender)),
            cable: None,
        }
    }

    pub(crate) fn sender(&self) -> MutexGuard<'_, Sender> {
        self.sender.lock().unwrap()
    }

    pub(crate) fn offer(&self, numbers: std::ops::Range<u64>) {
        for number in numbers {
            let (header, key) = block(number);
            self.sender().offer(header, &key).unwrap();
        }
    }

    /// Plugs the device in, behind a link that stays the same as `/dev/serial/by-id` does.
    pub(crate) fn plug(&mut self, link: &Path, fault: Fault) {
        let pty = openpty(None, None).unwrap();
        let mut termios = tcgetattr(&pty.slave).unwrap();
        cfmakeraw(&mut termios);
        tcsetattr(&pty.slave, SetArg::TCSANOW, &termios).unwrap();
        fcntl(&pty.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let _ = std::fs::remove_file(link);
        symlink(ttyname(&pty.slave).unwrap(), link).unwrap();
        self.sender().reconnected();
        let pull = Arc::new(AtomicBool::new(false));
        let (sender, pulled) = (Arc::clone(&self.sender), Arc::clone(&pull));
        let thread = std::thread::spawn(move || {
            talk(&pty.master, &sender, &pulled, fault);
            drop(pty.slave);
        });
        self.cable = Some(Cable {
            link: link.to_owned(),
            pull,
            thread,
        });
    }

    /// Pulls the plug: the port hangs up, and the link goes first, because the terminal's number may
    /// be another test's at once.
    pub(crate) fn unplug(&mut self) {
        if let Some(cable) = self.cable.take() {
            let _ = std::fs::remove_file(cable.link);
            cable.pull.store(true, Ordering::Relaxed);
            let played = cable.thread.join();
            assert!(played.is_ok() || std::thread::panicking());
        }
    }

    /// Waits until the sender is as it should be.
    pub(crate) async fn wait_for(&self, what: impl Fn(&Sender) -> bool) {
        let begin = Instant::now();
        while !what(&self.sender()) {
            assert!(
                begin.elapsed() < Duration::from_secs(20),
                "{:?}",
                self.sender()
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.unplug();
    }
}

fn talk(master: &OwnedFd, sender: &Mutex<Sender>, pulled: &AtomicBool, mut fault: Fault) {
    let began = Instant::now();
    let mut decoder = Decoder::new();
    let mut output = Vec::new();
    while !pulled.load(Ordering::Relaxed) {
        let wanted = if output.is_empty() {
            PollFlags::POLLIN
        } else {
            PollFlags::POLLIN | PollFlags::POLLOUT
        };
        let mut polled = [PollFd::new(std::os::fd::AsFd::as_fd(master), wanted)];
        nix::poll::poll(&mut polled, PollTimeout::from(2_u8)).unwrap();
        let mut input = vec![0; 4096];
        let len = read(master, &mut input).or_else(would_block).unwrap();
        input.truncate(len);
        fault(&mut input);

        let mut sender = sender.lock().unwrap();
        let now = Mono(began.elapsed());
        let mut unread = &input[..];
        while let Some(frame) = decoder.next_frame(&mut unread) {
            if let Ok(frame) = frame {
                sender.receive(now, &frame);
            }
        }
        sender.handle_timeout(now);
        while output.len() < 4096 {
            let mut frame = Vec::new();
            if !sender.poll_transmit(now, &mut frame) {
                break;
            }
            fault(&mut frame);
            output.extend(frame);
        }
        drop(sender);
        let written = match output.is_empty() {
            true => 0,
            false => write(master, &output).or_else(would_block).unwrap(),
        };
        output.drain(..written);
    }
}

fn would_block(errno: Errno) -> Result<usize, Errno> {
    match errno {
        Errno::EAGAIN => Ok(0),
        errno => Err(errno),
    }
}
