//! The stage on a thread of its own.

use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, TryRecvError, TrySendError, bounded};
use qkd_keyfile::{QkdKeyName, metadata::QkdKeyMetadata};

use crate::{
    handoff::{Descriptor, Popper, Waker},
    stage::{FormatError, FormatOrder, Formatted, Stage},
    waiting::{Hold, RefuseReason},
};

/// An order to a running stage. Orders are done in the order in which they were sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Cut and hash a segment; answered by [`StageEvent::Formatted`] with the same ticket.
    Format {
        /// The caller's number for the order.
        ticket: u64,
        /// The plan.
        order: FormatOrder,
    },
    /// The QKD-key is spent or given up: wipe it ([`Stage::settle`]). No answer.
    Drop {
        /// Its name.
        name: QkdKeyName,
    },
    /// End the thread and wipe all that waits; later orders are refused.
    Stop,
}

/// What a running stage reports.
#[derive(Debug)]
pub enum StageEvent {
    /// A QKD-key waits for its plan.
    Held {
        /// Its name.
        name: QkdKeyName,
        /// Its length.
        key_bits: u32,
        /// What its module said about it.
        metadata: QkdKeyMetadata,
    },
    /// A QKD-key was not kept and is wiped.
    Refused {
        /// Its name.
        name: QkdKeyName,
        /// Why.
        reason: RefuseReason,
    },
    /// An unconfirmed QKD-key was wiped at the bound: the peer must be told.
    DroppedOldest {
        /// Its name.
        name: QkdKeyName,
    },
    /// A [`Command::Format`] is done.
    Formatted {
        /// The number that came with the order.
        ticket: u64,
        /// The segment.
        result: Result<Formatted, FormatError>,
    },
}

/// Why a command was not taken; it comes back.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandRefused {
    /// Too many commands wait: try again after the next event.
    #[error("the stage has too many commands before it")]
    Full(Box<Command>),
    /// The stage has stopped. Latched.
    #[error("the stage has stopped")]
    Stopped(Box<Command>),
}

/// Runs `stage` on a thread named `qkd-stage`; `events` is called there and must not wait.
///
/// # Errors
///
/// The operating system gave no thread; stage and hand-off are gone and wiped.
pub fn spawn(
    stage: Stage,
    handoff: Popper,
    events: impl FnMut(StageEvent) + Send + 'static,
) -> std::io::Result<StageHandle> {
    spawn_prepared(stage, handoff, || (), events)
}

/// [`spawn`] with something to be done first on the new thread, such as keeping it on one core.
///
/// # Errors
///
/// As [`spawn`].
pub fn spawn_prepared(
    stage: Stage,
    handoff: Popper,
    prepare: impl FnOnce() + Send + 'static,
    events: impl FnMut(StageEvent) + Send + 'static,
) -> std::io::Result<StageHandle> {
    let (commands, orders) = bounded(MAX_COMMANDS);
    let waker = handoff.waker();
    let running = Running {
        stage,
        handoff,
        orders,
        events,
        held_back: None,
    };
    let thread = std::thread::Builder::new()
        .name("qkd-stage".to_owned())
        .spawn(move || {
            prepare();
            running.run();
        })?;
    Ok(StageHandle {
        commands: Some(commands),
        waker,
        thread: Some(thread),
    })
}

/// A running stage. Dropping the handle ends the thread after the commands sent so far, without
/// waiting for it.
#[derive(Debug)]
pub struct StageHandle {
    /// `None` only while the handle is being dropped.
    commands: Option<Sender<Command>>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
}

impl StageHandle {
    /// Sends a command. Never waits.
    ///
    /// # Errors
    ///
    /// - [`CommandRefused::Full`]: the command comes back; try again after the next event.
    /// - [`CommandRefused::Stopped`]: the command comes back; there will be no event any more.
    pub fn send(&self, command: Command) -> Result<(), CommandRefused> {
        let Some(commands) = &self.commands else {
            return Err(CommandRefused::Stopped(Box::new(command)));
        };
        commands
            .try_send(command)
            .map_err(|refused| match refused {
                TrySendError::Full(command) => CommandRefused::Full(Box::new(command)),
                TrySendError::Disconnected(command) => CommandRefused::Stopped(Box::new(command)),
            })?;
        self.waker.wake();
        Ok(())
    }

    /// Ends the thread after the commands sent so far, and waits for it.
    ///
    /// # Panics
    ///
    /// If the event closure has panicked on the stage's thread.
    pub fn stop(mut self) {
        let thread = self.thread.take();
        drop(self);
        if let Some(Err(panic)) = thread.map(JoinHandle::join) {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Drop for StageHandle {
    fn drop(&mut self) {
        drop(self.commands.take());
        self.waker.wake();
    }
}

struct Running<E> {
    stage: Stage,
    handoff: Popper,
    orders: Receiver<Command>,
    events: E,
    /// Popped, but there is no room while planned QKD-keys fill the bound. Nothing more is popped
    /// meanwhile, so the queue fills and the drivers feel it.
    held_back: Option<Descriptor>,
}

impl<E: FnMut(StageEvent)> Running<E> {
    fn run(mut self) {
        loop {
            let mut worked = false;
            for _ in 0..ROUND {
                match self.orders.try_recv() {
                    Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return,
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Empty) => break,
                }
                worked = true;
            }
            for _ in 0..ROUND {
                let next = self.held_back.take().or_else(|| self.handoff.pop());
                let Some(descriptor) = next else { break };
                if !self.hold(descriptor) {
                    break;
                }
                worked = true;
            }
            if worked {
                self.handoff.worked();
            } else {
                self.handoff.idle();
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Format { ticket, order } => {
                let result = self.stage.format(&order);
                (self.events)(StageEvent::Formatted { ticket, result });
            }
            Command::Drop { name } => {
                self.stage.settle(&name);
            }
            Command::Stop => {}
        }
    }

    /// Whether there was room for the descriptor.
    fn hold(&mut self, descriptor: Descriptor) -> bool {
        let (name, key_bits) = (descriptor.name.clone(), descriptor.key_bits);
        let metadata = descriptor.metadata.clone();
        match self.stage.hold(descriptor) {
            Hold::Held { dropped } => {
                for name in dropped {
                    (self.events)(StageEvent::DroppedOldest { name });
                }
                (self.events)(StageEvent::Held {
                    name,
                    key_bits,
                    metadata,
                });
                true
            }
            Hold::Refused { name, reason } => {
                (self.events)(StageEvent::Refused { name, reason });
                true
            }
            Hold::Busy(descriptor) => {
                self.held_back = Some(*descriptor);
                false
            }
        }
    }
}

/// Commands that may wait.
const MAX_COMMANDS: usize = 1024;
/// Commands, then descriptors, done in one go, so that neither starves the other.
const ROUND: usize = 64;
