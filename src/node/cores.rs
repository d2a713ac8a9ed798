//! Threads that stay on one core, where the configuration says so.
//!
//! The stage and the agent are the two threads that all key goes through. On a machine that does
//! other work too, a core of its own for each keeps their data in its caches.

use std::io;

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// A core that is not there, or not for this process.
#[derive(Debug, thiserror::Error)]
#[error("core {core} is not one that this process may use: give one of {usable}, or leave it out")]
pub struct NoSuchCore {
    core: usize,
    usable: String,
}

/// Finds out whether this process may use the cores, before any thread is sent there.
pub(super) fn check(cores: &[Option<usize>]) -> Result<(), NoSuchCore> {
    let usable = usable_cores();
    let missing = |core: &&usize| !usable.contains(core);
    match cores.iter().flatten().find(missing) {
        None => Ok(()),
        Some(&core) => {
            let usable: Vec<String> = usable.iter().map(ToString::to_string).collect();
            let usable = usable.join(", ");
            Err(NoSuchCore { core, usable })
        }
    }
}

/// Keeps the calling thread on a core from now on. That it cannot is logged: keys flow all the same.
pub(super) fn stay_on(core: Option<usize>, thread: &str) {
    let Some(core) = core else { return };
    let pinned = only(core).and_then(|set| sched_setaffinity(Pid::from_raw(0), &set));
    if let Err(errno) = pinned {
        let error = io::Error::from(errno);
        tracing::error!(thread, core, %error, "the thread is not kept on its core");
    }
}

fn only(core: usize) -> nix::Result<CpuSet> {
    let mut set = CpuSet::new();
    set.set(core)?;
    Ok(set)
}

fn usable_cores() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
    let is_usable = |core: &usize| set.is_set(*core).unwrap_or(false);
    (0..CpuSet::count()).filter(is_usable).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_stays_on_the_core_it_was_sent_to() {
        let core = *usable_cores().last().unwrap();
        let there = std::thread::spawn(move || {
            stay_on(Some(core), "test");
            usable_cores()
        });
        assert_eq!(there.join().unwrap(), [core]);
    }

    #[test]
    fn a_core_that_is_not_there_is_refused_with_those_that_are() {
        assert!(check(&[None, usable_cores().first().copied()]).is_ok());
        let error = check(&[Some(CpuSet::count())]).unwrap_err().to_string();
        let first = usable_cores()[0].to_string();
        assert!(error.contains(&first), "{error}");
    }
}
