//! Programs that this one starts, and their end: nothing is left behind, however the parent dies.
//!
//! A child is given a pipe as its standard input, over which it may also get a secret, and watches it
//! ([`end_with_stdin`]): the pipe ends when the parent does, by whatever cause, and the child stops as
//! on SIGTERM.

use std::{
    ffi::OsStr,
    fs::{self, OpenOptions},
    io,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::AsyncWriteExt,
    process::{Child, ChildStdin, Command},
};

/// How long a child may take to stop when asked to.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// Bytes of a log that are read for its last lines.
const TAIL_BYTES: usize = 16 * 1024;

/// A child. Dropped, it is killed.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    /// Open as long as the child is to live.
    stdin: Option<ChildStdin>,
    log: Option<PathBuf>,
}

impl Process {
    /// Starts `program` with `args`, in a process group of its own, so that Ctrl-C is for the parent
    /// alone. Output is added to `log`, or goes where the parent's goes. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// The system's: nothing runs.
    pub fn start<S: AsRef<OsStr>>(
        name: &str,
        program: &Path,
        args: impl IntoIterator<Item = S>,
        log: Option<&Path>,
    ) -> io::Result<Self> {
        let mut command = Command::new(program);
        command
            .args(args)
            .stdin(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        if let Some(log) = log {
            let file = OpenOptions::new().create(true).append(true).open(log)?;
            command.stdout(file.try_clone()?).stderr(file);
        }
        let mut child = command.spawn()?;
        Ok(Self {
            name: name.to_owned(),
            stdin: child.stdin.take(),
            child,
            log: log.map(Path::to_owned),
        })
    }

    /// Writes a secret to the child's standard input, which stays open.
    ///
    /// # Errors
    ///
    /// The child is gone.
    pub async fn hand_over(&mut self, secret: &[u8]) -> io::Result<()> {
        match &mut self.stdin {
            Some(stdin) => stdin.write_all(secret).await,
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process ID, while it runs.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// How it has ended, if it has.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Asks it to stop, waits, and kills it if it has not stopped in 5 seconds.
    ///
    /// # Errors
    ///
    /// The system's.
    pub async fn stop(mut self) -> io::Result<ExitStatus> {
        if let Some(id) = self.child.id().and_then(|id| i32::try_from(id).ok()) {
            // One that has ended by now is waited for all the same.
            let _ = kill(Pid::from_raw(id), Signal::SIGTERM);
        }
        if let Ok(status) = tokio::time::timeout(STOP_WITHIN, self.child.wait()).await {
            return status;
        }
        tracing::warn!(name = self.name, "does not stop; it is killed");
        self.kill().await
    }

    /// Kills it, as a power cut would.
    ///
    /// # Errors
    ///
    /// The system's.
    pub async fn kill(mut self) -> io::Result<ExitStatus> {
        self.child.start_kill()?;
        self.child.wait().await
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> Option<PathBuf> {
        self.log.clone()
    }
}

/// The last lines of a log, as far as it can be read.
#[must_use]
pub fn last_lines(log: Option<&Path>, count: usize) -> String {
    let text = log.and_then(|log| fs::read(log).ok()).unwrap_or_default();
    let tail = String::from_utf8_lossy(&text[text.len().saturating_sub(TAIL_BYTES)..]);
    let lines: Vec<&str> = tail.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Ends this process as SIGTERM does, once standard input has ended.
///
/// # Errors
///
/// There is no thread to watch it.
pub fn end_with_stdin() -> io::Result<()> {
    let watch = || {
        let mut byte = [0];
        while matches!(
            nix::unistd::read(io::stdin(), &mut byte),
            Ok(1..) | Err(Errno::EINTR)
        ) {}
        let _ = kill(Pid::this(), Signal::SIGTERM);
    };
    std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(watch)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, log: Option<&Path>) -> Process {
        Process::start("child", Path::new("/bin/sh"), ["-c", script], log).unwrap()
    }

    #[tokio::test]
    async fn a_secret_arrives_and_the_log_tells_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let script = "read a; echo one; echo got ${#a}; echo three >&2; cat";
        let mut child = shell(script, Some(&log));
        child.hand_over(b"secret\n").await.unwrap();
        assert!(child.ended().unwrap().is_none());
        child.stdin = None;
        assert!(child.child.wait().await.unwrap().success());
        assert_eq!(last_lines(Some(&log), 2), "got 6\nthree");
    }

    #[tokio::test]
    async fn a_child_that_does_not_stop_is_killed() {
        // The shell says when it has set its trap; before, SIGTERM would end it.
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let child = shell(
            "trap '' TERM; echo ready; while :; do sleep 0.05; done",
            Some(&log),
        );
        while last_lines(Some(&log), 1) != "ready" {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let status = child.stop().await.unwrap();
        assert_eq!(status.code(), None);
    }
}
