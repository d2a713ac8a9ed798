//! The demonstration: three nodes, a controller and simulated devices as processes of their own, and
//! two applications that fetch keys at the two ends and compare every one.
//!
//! Its parts serve tests of whole nodes too: a [`Plan`] makes a [`Network`] of files, [`Running`]
//! runs its processes, an [`Application`] fetches keys.

mod application;
pub mod load;
mod network;
mod running;
mod view;

use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

pub use application::{Application, Key, RequestError};
pub use network::{
    AppFiles, LinkPlan, Network, NetworkError, NodeFiles, PairPlan, Plan, StockPlan, Transport,
};
pub use running::{Running, RunningError, status};

use load::Tally;
use view::View;

/// How long a network may take to have the stock that it is to have.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// Time between two looks at the processes and at the nodes' status.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Time between two requests of app-a, 128 keys each: what the simulated devices can well sustain.
const REQUEST_EVERY: Duration = Duration::from_millis(16);

/// What to show.
#[derive(Debug)]
pub struct Options {
    /// How long the applications fetch keys.
    pub seconds: u64,
    /// Whether the network runs on until it is told to stop.
    pub keep: bool,
    /// Where everything goes; else a temporary folder, which goes away again unless it is kept.
    pub dir: Option<PathBuf>,
}

/// Why a demonstration failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DemoError {
    /// There is no folder to work in, or this program's own path is unknown.
    #[error("the system refused")]
    System(#[from] io::Error),
    /// The network cannot be made.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A process failed.
    #[error(transparent)]
    Running(#[from] RunningError),
    /// An application's certificate cannot be used.
    #[error(transparent)]
    Credentials(#[from] qkd_net::CredentialsError),
    /// The stock did not come.
    #[error(
        "no stock after {} s: {state}; the nodes' logs are in {}",
        READY_WITHIN.as_secs(), dir.display()
    )]
    NotReady {
        /// What there is.
        state: String,
        /// Where the logs are; kept.
        dir: PathBuf,
    },
    /// An application was refused.
    #[error("application refused")]
    Refused(#[from] RequestError),
    /// Someone got a key who has no right to it.
    #[error("app-c was given a key of app-a and app-b")]
    Leak,
    /// Keys differ, or were given to one end only, or there were none.
    #[error("{equal} keys equal, {different} different, {missing} at one end only")]
    Compared {
        /// Equal at both ends.
        equal: u64,
        /// Different.
        different: u64,
        /// Given to the source and not to the destination.
        missing: u64,
    },
    /// Someone stopped it before it was done.
    #[error("stopped")]
    Stopped,
}

/// Shows how keys travel. `stop` comes true when someone wants it to end; needs a tokio runtime with
/// I/O and time.
///
/// # Errors
///
/// [`DemoError`]; no process goes on running.
pub async fn run(options: &Options, stop: impl Future<Output = ()>) -> Result<(), DemoError> {
    let folder = Folder::new(options)?;
    let mut view = View::new();
    let network = Plan::demo().make(folder.path())?;
    view.line(&format!(
        "alice -- relay -- bob, all in {}",
        network.dir.display()
    ));
    let program = std::env::current_exe()?;
    let mut running = Running::start(&network, &program)?;
    running.start_devices(&network).await?;
    view.processes(&running);

    tokio::pin!(stop);
    let result = tokio::select! {
        biased;
        () = &mut stop => Err(DemoError::Stopped),
        result = show(options, &network, &mut running, &mut view) => result,
    };
    if result.is_ok() && options.keep {
        view.how_to_go_on(&network, &program);
        tokio::select! {
            () = &mut stop => {}
            () = watch(&mut running, &mut view) => {}
        }
    }
    view.line("stopping");
    let stopped = running.stop().await;
    if matches!(
        result,
        Err(DemoError::NotReady { .. } | DemoError::Running(_))
    ) {
        folder.keep();
    } else if !options.keep && options.dir.is_none() {
        view.line("(with --keep the network goes on running, with --dir DIR its files stay)");
    }
    result?;
    // A process that was killed and started again by hand is not missed at the end.
    if options.keep { Ok(()) } else { Ok(stopped?) }
}

/// Where everything goes.
enum Folder {
    Given(PathBuf),
    Temporary(TempDir),
}

impl Folder {
    fn new(options: &Options) -> io::Result<Self> {
        if let Some(dir) = &options.dir {
            return Ok(Self::Given(dir.clone()));
        }
        let dir = tempfile::Builder::new().prefix("qkd-bridge-").tempdir()?;
        Ok(if options.keep {
            Self::Given(dir.keep())
        } else {
            Self::Temporary(dir)
        })
    }

    fn path(&self) -> &Path {
        match self {
            Self::Given(path) => path,
            Self::Temporary(dir) => dir.path(),
        }
    }

    /// Leaves the files to whoever looks for what went wrong.
    fn keep(self) {
        if let Self::Temporary(dir) = self {
            let _ = dir.keep();
        }
    }
}

/// From the first bit to the last comparison.
async fn show(
    options: &Options,
    network: &Network,
    running: &mut Running,
    view: &mut View,
) -> Result<(), DemoError> {
    wait_until_ready(network, running, view).await?;
    network.write_json()?;
    view.memory(&statuses(network).await);
    outsider_is_refused(network).await?;
    view.line("app-c, at relay, asked for a key of app-a and app-b and was refused");

    let tally = Tally::default();
    let until = Instant::now() + Duration::from_secs(options.seconds);
    let [app_a, app_b] = two_ends(network)?;
    let load = load::run(app_a, app_b, until, REQUEST_EVERY, &tally);
    tokio::pin!(load);
    let mut look = tokio::time::interval(LOOK_EVERY);
    loop {
        tokio::select! {
            done = &mut load => break done?,
            _ = look.tick() => match running.check() {
                Err(ended) if options.keep => view.line(&ended.to_string()),
                checked => {
                    checked?;
                    view.load(&tally.counts(), &statuses(network).await);
                }
            }
        }
    }
    view.summary(&statuses(network).await, &tally, options.seconds);
    let counts = tally.counts();
    if counts.equal == 0 || counts.different > 0 || counts.missing > 0 {
        return Err(DemoError::Compared {
            equal: counts.equal,
            different: counts.different,
            missing: counts.missing,
        });
    }
    Ok(())
}

/// The applications at the two ends.
///
/// # Errors
///
/// A certificate cannot be used.
fn two_ends(network: &Network) -> Result<[Application; 2], DemoError> {
    Ok([
        application(network, "app-a")?,
        application(network, "app-b")?,
    ])
}

/// An application of the network by its ID.
///
/// # Errors
///
/// Its certificate cannot be used.
///
/// # Panics
///
/// The network has no such application.
pub fn application(network: &Network, id: &str) -> Result<Application, qkd_net::CredentialsError> {
    let Some(files) = network.app(id) else {
        unreachable!("{id} is not an application of this network")
    };
    Application::new(network, files)
}

/// Every node's status, as far as they answer.
pub async fn statuses(network: &Network) -> Vec<(String, Value)> {
    let mut all = Vec::new();
    for node in &network.nodes {
        if let Some(status) = status(node).await {
            all.push((node.id.to_string(), status));
        }
    }
    all
}

/// Bytes in stock at `node` towards `destination`, out of its status.
#[must_use]
pub fn stock_bytes(statuses: &[(String, Value)], node: &str, destination: &str) -> u64 {
    let stream = format!("{node}->{destination}");
    let status = statuses.iter().find(|(id, _)| id == node);
    let bytes = status.map(|(_, status)| &status["streams"][&stream]["encrypting_bytes"]);
    bytes.and_then(Value::as_u64).unwrap_or(0)
}

/// Waits until both ends have nine tenths of the stock that they are to have.
async fn wait_until_ready(
    network: &Network,
    running: &mut Running,
    view: &mut View,
) -> Result<(), DemoError> {
    let Some(stock) = &network.plan().stock else {
        return Ok(());
    };
    let (a, b) = (stock.a.as_str(), stock.b.as_str());
    let target = stock.min_kib << 10;
    let give_up = Instant::now() + READY_WITHIN;
    loop {
        running.check()?;
        let statuses = statuses(network).await;
        let [there, back] = [(a, b), (b, a)].map(|(a, b)| stock_bytes(&statuses, a, b));
        view.filling(&statuses, there.min(back), target);
        if there.min(back) * 10 >= target * 9 {
            return Ok(());
        }
        if Instant::now() > give_up {
            return Err(DemoError::NotReady {
                state: view::state(&statuses),
                dir: network.dir.clone(),
            });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// A key that app-a was given is not given to app-c, and app-b gets it all the same.
async fn outsider_is_refused(network: &Network) -> Result<(), DemoError> {
    let [mut app_a, mut app_b] = two_ends(network)?;
    let mut app_c = application(network, "app-c")?;
    let keys = app_a.enc_keys(app_b.id(), 1, 256).await?;
    let ids: Vec<&str> = keys.iter().map(|key| key.id.as_str()).collect();
    match app_c.dec_keys(app_a.id(), &ids).await {
        Err(RequestError::Refused {
            status: 400 | 401, ..
        }) => {}
        Err(error) => return Err(error.into()),
        Ok(_) => return Err(DemoError::Leak),
    }
    app_b.dec_keys(app_a.id(), &ids).await?;
    Ok(())
}

/// Tells of processes that end; what is started again by hand is no business of this one.
async fn watch(running: &mut Running, view: &mut View) {
    loop {
        if let Err(ended) = running.check() {
            view.line(&ended.to_string());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
