//! The processes of a network.

use std::{
    io,
    path::{Path, PathBuf},
};

use qkd_keyfile::{Entropy, NodeId};
use qkd_net::pki;
use serde_json::Value;
use tokio::task::JoinSet;
use zeroize::Zeroizing;

use super::{Network, NodeFiles};
use crate::{
    env::SystemEntropy,
    node,
    process::{Process, last_lines},
};

/// Lines of a log that are shown of a process that has ended.
const LAST_LINES: usize = 12;

/// A network whose processes run. Dropped, they are killed.
#[derive(Debug)]
pub struct Running {
    program: PathBuf,
    dir: PathBuf,
    processes: Vec<Process>,
}

/// Why a network does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunningError {
    /// A process cannot be started or stopped.
    #[error("{name} cannot be started or stopped")]
    Process {
        /// Which.
        name: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A process has ended by itself.
    #[error("{name} has ended; the end of its log:\n{last_lines}")]
    Ended {
        /// Which.
        name: String,
        /// What it said last.
        last_lines: String,
    },
}

impl Running {
    /// A network of which nothing runs yet. `program` is this program.
    #[must_use]
    pub fn none(network: &Network, program: &Path) -> Self {
        Self {
            program: program.to_owned(),
            dir: network.dir.clone(),
            processes: Vec::new(),
        }
    }

    /// Starts the controller and the nodes. `program` is this program. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`RunningError::Process`]; nothing goes on running.
    pub fn start(network: &Network, program: &Path) -> Result<Self, RunningError> {
        let mut running = Self::none(network, program);
        if let Some((config, _)) = &network.controller {
            running.spawn("controller", "controller", config, &[])?;
        }
        for node in &network.nodes {
            running.start_node(node)?;
        }
        Ok(running)
    }

    /// Starts a node, at first or again.
    ///
    /// # Errors
    ///
    /// [`RunningError::Process`]: it does not run.
    pub fn start_node(&mut self, node: &NodeFiles) -> Result<(), RunningError> {
        self.spawn(node.id.as_str(), "run", &node.config, &[])
            .map(drop)
    }

    /// Starts the simulated devices of each node in a process of their own. All share one fresh seed,
    /// which no file and no argument holds.
    ///
    /// # Errors
    ///
    /// [`RunningError::Process`]: not all run.
    pub async fn start_devices(&mut self, network: &Network) -> Result<(), RunningError> {
        let mut seed = Zeroizing::new([0; 32]);
        SystemEntropy.fill(&mut *seed);
        let mut line = Zeroizing::new(Vec::with_capacity(65));
        for byte in *seed {
            line.extend(
                [byte >> 4, byte & 15].map(|digit| b"0123456789abcdef"[usize::from(digit)]),
            );
        }
        line.push(b'\n');
        for node in &network.nodes {
            let halves = network.halves(&node.id);
            if halves.is_empty() {
                continue;
            }
            let mut args = vec!["--seed-from-stdin".to_owned()];
            args.extend(
                halves
                    .into_iter()
                    .flat_map(|half| ["--half".to_owned(), half]),
            );
            let name = device_name(&node.id);
            let devices = self.spawn(&name, "sim", &network.sim, &args)?;
            let handed_over = devices.hand_over(&line).await;
            handed_over.map_err(|source| RunningError::Process { name, source })?;
        }
        Ok(())
    }

    fn spawn(
        &mut self,
        name: &str,
        command: &str,
        config: &Path,
        more: &[String],
    ) -> Result<&mut Process, RunningError> {
        let mut args = vec![command.into(), "--config".into(), config.to_owned()];
        args.push("--exit-with-stdin".into());
        args.extend(more.iter().map(PathBuf::from));
        let log = self.dir.join(format!("{}.log", pki::file_name(name)));
        let process = Process::start(name, &self.program, args, Some(&log));
        let process = process.map_err(|source| RunningError::Process {
            name: name.to_owned(),
            source,
        })?;
        self.processes.push(process);
        let at = self.processes.len() - 1;
        Ok(&mut self.processes[at])
    }

    /// Says if a process has ended, and which; it is not watched any more.
    ///
    /// # Errors
    ///
    /// [`RunningError::Ended`].
    pub fn check(&mut self) -> Result<(), RunningError> {
        for at in 0..self.processes.len() {
            let process = &mut self.processes[at];
            let still_runs = process.ended().map(|status| status.is_none());
            if !still_runs.unwrap_or(false) {
                let process = self.processes.remove(at);
                return Err(RunningError::Ended {
                    name: process.name().to_owned(),
                    last_lines: last_lines(process.log().as_deref(), LAST_LINES),
                });
            }
        }
        Ok(())
    }

    /// Names and process IDs of what runs.
    pub fn processes(&self) -> impl Iterator<Item = (&str, u32)> {
        let running = self.processes.iter();
        running.filter_map(|process| Some((process.name(), process.id()?)))
    }

    /// Kills one, as a power cut would.
    ///
    /// # Errors
    ///
    /// [`RunningError::Process`]: there is none of this name, or the system refused.
    pub async fn kill(&mut self, name: &str) -> Result<(), RunningError> {
        let error = |source| RunningError::Process {
            name: name.to_owned(),
            source,
        };
        let at = self
            .processes
            .iter()
            .position(|process| process.name() == name);
        let at = at.ok_or_else(|| error(io::ErrorKind::NotFound.into()))?;
        let killed = self.processes.remove(at).kill().await;
        killed.map(drop).map_err(error)
    }

    /// Stops all at once.
    ///
    /// # Errors
    ///
    /// [`RunningError`]: the first that did not end well; all have ended.
    pub async fn stop(self) -> Result<(), RunningError> {
        let mut stopping = JoinSet::new();
        for process in self.processes {
            stopping.spawn(async move {
                let (name, log) = (process.name().to_owned(), process.log());
                match process.stop().await {
                    Ok(status) if status.success() => Ok(()),
                    Ok(_) => Err(RunningError::Ended {
                        name,
                        last_lines: last_lines(log.as_deref(), LAST_LINES),
                    }),
                    Err(source) => Err(RunningError::Process { name, source }),
                }
            });
        }
        stopping.join_all().await.into_iter().collect()
    }
}

fn device_name(node: &NodeId) -> String {
    format!("sim-{node}")
}

/// What a running node says of itself; `None` while it does not answer.
pub async fn status(node: &NodeFiles) -> Option<Value> {
    let socket = node.data.join("status.sock");
    let asked = tokio::task::spawn_blocking(move || node::ask(&socket)).await;
    serde_json::from_str(&asked.ok()?.ok()?).ok()
}
