//! `demo`: a whole network on this machine.

use std::path::PathBuf;

use super::{
    Failure, log,
    run::{Order, Signals},
    runtime,
};
use crate::demo::{self, Options};

#[derive(Debug, clap::Args)]
pub(super) struct DemoArgs {
    /// How long the applications fetch keys.
    #[arg(long, value_name = "N", default_value_t = 10)]
    seconds: u64,
    /// Leave the network running until Ctrl-C, and print lines to try it with.
    #[arg(long)]
    keep: bool,
    /// Where certificates, configurations and logs go: a new or empty folder. Without it, a
    /// temporary one.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl DemoArgs {
    pub(super) fn run(self, levels: Option<&str>) -> Result<(), Failure> {
        let _levels = log::start(levels.or(Some("warn")), None)?;
        let options = Options {
            seconds: self.seconds,
            keep: self.keep,
            dir: self.dir,
        };
        runtime()?.block_on(async {
            let mut signals = Signals::new()?;
            let stop = async { while signals.next().await != Order::Stop {} };
            Ok(demo::run(&options, stop).await?)
        })
    }
}
