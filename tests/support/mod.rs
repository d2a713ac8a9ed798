//! Networks of whole processes for tests, in temporary folders and on ports of the system's choice.

#![allow(dead_code, reason = "every test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

pub(crate) mod devices;
pub(crate) mod ledgers;
pub(crate) mod namespaces;
pub(crate) mod proxy;
pub(crate) mod vendor;

use std::{
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

use qkd_bridge::demo::{Network, Plan, Running, statuses};
use serde_json::Value;
use tempfile::TempDir;

/// The program under test.
pub(crate) fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_qkd-bridge"))
}

/// Runs the program to its end.
pub(crate) fn qkd_bridge<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Output {
    let mut command = Command::new(program());
    command.args(args).env_remove("QKD_LOG");
    command.output().unwrap()
}

/// What a program printed on standard output.
pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What a program printed on standard error.
pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// A network whose processes run.
pub(crate) struct Net {
    pub(crate) network: Network,
    pub(crate) running: Running,
    _folder: TempDir,
}

impl Net {
    /// Makes and starts a network with its devices.
    pub(crate) async fn start(plan: Plan) -> Self {
        let mut net = Self::start_without_devices(plan, |_| ());
        net.running.start_devices(&net.network).await.unwrap();
        net
    }

    /// Makes a network and starts its nodes; `before` has put there what they are to find.
    pub(crate) fn start_without_devices(plan: Plan, before: impl FnOnce(&Network)) -> Self {
        let mut net = Self::prepare(plan);
        before(&net.network);
        net.start_nodes();
        net
    }

    /// Makes a network; nothing runs.
    pub(crate) fn prepare(plan: Plan) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let network = plan.make(folder.path()).unwrap();
        Self {
            running: Running::none(&network, program()),
            network,
            _folder: folder,
        }
    }

    /// Starts the controller and the nodes.
    pub(crate) fn start_nodes(&mut self) {
        self.start_nodes_with(program());
    }

    /// Starts the controller and the nodes by another program.
    pub(crate) fn start_nodes_with(&mut self, program: &Path) {
        self.running = Running::start(&self.network, program).unwrap();
    }

    /// Waits until the nodes' status is as wanted; fails with the logs' ends after `within`.
    pub(crate) async fn wait_until(
        &mut self,
        what: &str,
        within: Duration,
        wanted: impl Fn(&[(String, Value)]) -> bool,
    ) {
        let start = Instant::now();
        loop {
            let now = statuses(&self.network).await;
            if wanted(&now) {
                return;
            }
            self.running.check().unwrap();
            assert!(
                start.elapsed() < within,
                "{what}: not in {within:?}: {now:#?}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Starts a node again that was killed.
    pub(crate) fn start_again(&mut self, id: &str) {
        let node = self.network.node(id).unwrap();
        self.running.start_node(node).unwrap();
    }
}
