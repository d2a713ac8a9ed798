use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};

/// Keeps this process out of core dumps and away from debuggers of other users.
///
/// Sets `PR_SET_DUMPABLE` to 0 (no core file, no `ptrace` and no `/proc/PID/mem` without
/// privilege) and `RLIMIT_CORE` to 0. Call it first thing in `main`, before any key exists; it
/// cannot be undone without privilege.
///
/// # Errors
///
/// [`HardenError`] names the call the kernel refused. Calls before it have taken effect; a program
/// that must not run unprotected stops here.
pub fn harden_process() -> Result<(), HardenError> {
    prctl::set_dumpable(false).map_err(HardenError::Dumpable)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(HardenError::CoreLimit)
}

/// Which protection [`harden_process`] could not switch on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HardenError {
    /// `PR_SET_DUMPABLE` was refused.
    #[error("cannot make the process undumpable")]
    Dumpable(#[source] Errno),
    /// `RLIMIT_CORE` was refused.
    #[error("cannot set the core file limit to 0")]
    CoreLimit(#[source] Errno),
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::resource::getrlimit;

    #[test]
    fn hardened_process_leaves_no_core() {
        harden_process().unwrap();
        assert!(!prctl::get_dumpable().unwrap());
        assert_eq!(getrlimit(Resource::RLIMIT_CORE).unwrap(), (0, 0));
    }
}
