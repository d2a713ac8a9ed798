//! The log: one line per event on standard error, levels that can be changed while the program runs.

use tracing_subscriber::{
    EnvFilter, Registry, fmt,
    layer::SubscriberExt,
    reload::{self, Handle},
    util::SubscriberInitExt,
};

use super::Failure;

/// Levels when nobody says otherwise.
const DEFAULT_LEVELS: &str = "info";

/// Changes the levels of the running log.
#[derive(Debug, Clone)]
pub(super) struct Levels {
    handle: Handle<EnvFilter, Registry>,
    /// From the command line or the environment: stays, whatever a file says.
    fixed: bool,
}

fn parse(levels: &str) -> Result<EnvFilter, Failure> {
    EnvFilter::builder()
        .parse(levels)
        .map_err(|source| Failure::Levels {
            levels: levels.to_owned(),
            source,
        })
}

/// Starts the log. `given` is from the command line or the environment, `configured` from a file.
pub(super) fn start(given: Option<&str>, configured: Option<&str>) -> Result<Levels, Failure> {
    let levels = given.or(configured).unwrap_or(DEFAULT_LEVELS);
    let (filter, handle) = reload::Layer::new(parse(levels)?);
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    // A second start is a second command in one process, as in tests: the first log goes on.
    let _ = tracing_subscriber::registry()
        .with(filter)
        .with(fmt::layer().with_writer(std::io::stderr).with_ansi(ansi))
        .try_init();
    Ok(Levels {
        handle,
        fixed: given.is_some(),
    })
}

impl Levels {
    /// Takes the levels that a file names now.
    pub(super) fn reload(&self, configured: Option<&str>) -> Result<(), Failure> {
        if !self.fixed {
            // The log may have been started elsewhere; then there is nothing to change.
            let _ = self
                .handle
                .reload(parse(configured.unwrap_or(DEFAULT_LEVELS))?);
        }
        Ok(())
    }
}
