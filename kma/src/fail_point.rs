//! Places where a test lets this process die, as `kill -9` would. Release builds have none.
//!
//! A point is an operation (what a batch did: lease, use, burn, ...) and a step (how far the batch is:
//! staged, in the slots, in the rows, in the journal, erased, told). Which operation a batch holds is
//! known from its records, so every pair of the two can be asked for.

/// What a batch may hold.
pub const OPERATIONS: [&str; 10] = [
    "propose", "store", "confirm", "lease", "use", "burn", "supply", "deliver", "delete", "cede",
];

/// How far a batch may be.
pub const STEPS: [&str; 6] = ["staged", "slots", "rows", "journal", "erased", "told"];

/// Marks an operation (`doing`) or a step that was reached.
#[cfg(debug_assertions)]
macro_rules! fail_point {
    (doing $record:expr) => {
        crate::fail_point::doing($record)
    };
    ($step:expr) => {
        crate::fail_point::reached($step)
    };
}
#[cfg(not(debug_assertions))]
macro_rules! fail_point {
    ($($anything:tt)*) => {};
}
pub(crate) use fail_point;

#[cfg(debug_assertions)]
mod armed {
    use std::sync::{Mutex, PoisonError};

    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };

    use crate::record::{Purpose, Record};

    struct Armed {
        operation: String,
        step: String,
        /// Times that the point is passed before it kills.
        left: u32,
        /// The batch holds the operation.
        seen: bool,
        /// The batch was told; the next record begins another one.
        over: bool,
    }

    static ARMED: Mutex<Option<Armed>> = Mutex::new(None);

    /// Lets the process die when a batch that holds `operation` reaches `step` for the `nth` time.
    pub fn arm(operation: &str, step: &str, nth: u32) {
        *ARMED.lock().unwrap_or_else(PoisonError::into_inner) = Some(Armed {
            operation: operation.to_owned(),
            step: step.to_owned(),
            left: nth,
            seen: false,
            over: false,
        });
    }

    const fn operation_of(record: &Record) -> Option<&'static str> {
        Some(match record {
            Record::Proposed { .. } => "propose",
            Record::Stored { .. } => "store",
            Record::Confirmed { .. } => "confirm",
            Record::Taken { purpose, .. } | Record::Followed { purpose, .. } => match purpose {
                Purpose::Burn(_) => "burn",
                Purpose::Supply => "supply",
                _ if matches!(record, Record::Taken { .. }) => "lease",
                _ => "use",
            },
            Record::Bound { .. } | Record::BindingReceived { .. } => "supply",
            Record::Delivered { .. } => "deliver",
            Record::Ceded { .. } | Record::Acquired { .. } => "cede",
            Record::Closed { .. } | Record::Preserved { .. } | Record::Deleted { .. } => "delete",
            _ => return None,
        })
    }

    pub(crate) fn doing(record: &Record) {
        let mut armed = ARMED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(armed) = &mut *armed {
            let over = std::mem::take(&mut armed.over);
            armed.seen &= !over;
            armed.seen |= operation_of(record) == Some(&armed.operation);
        }
        drop(armed);
        reached("staged");
    }

    /// A step that a batch has reached; `told` is the caller's.
    pub fn reached(step: &str) {
        let mut armed = ARMED.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(armed) = &mut *armed else {
            return;
        };
        armed.over |= step == "told";
        if !armed.seen || armed.step != step {
            return;
        }
        armed.left = armed.left.saturating_sub(1);
        if armed.left == 0 {
            let _ = kill(Pid::this(), Signal::SIGKILL);
        }
    }
}
#[cfg(debug_assertions)]
pub(crate) use armed::doing;
#[cfg(debug_assertions)]
pub use armed::{arm, reached};
