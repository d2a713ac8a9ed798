//! `pki`: certificates for development and trials.

use std::path::PathBuf;

use clap::Subcommand;
use qkd_keyfile::{AppId, Clock, NodeId};
use qkd_net::pki;

use super::Failure;
use crate::env::SystemClock;

#[derive(Debug, Subcommand)]
pub(super) enum PkiCommand {
    /// Make an authority, and certificates for nodes and applications under it.
    #[command(after_help = "Example:\n  \
        qkd-bridge pki init --dir pki --node alice --node bob --app app-a --app app-b\n\n\
        Nothing is overwritten. Whoever has DIR/ca.key can be anyone in this network: keep it \
        off the nodes.")]
    Init(Names),
    /// Add certificates under an authority that `init` made.
    #[command(after_help = "Example:\n  qkd-bridge pki add --dir pki --node carol")]
    Add(Names),
    /// Take certificates back: put them on the authority's revocation list, DIR/crl.pem.
    #[command(after_help = "Example:\n  \
        qkd-bridge pki revoke --dir pki --app app-b\n\n\
        Give nodes the list as `crl` in [tls], copy it there again whenever it changes, and send \
        them SIGHUP: open connections of revoked certificates are closed. A list that is older than \
        --days refuses everybody; without a name it is made anew.")]
    Revoke(Names),
}

#[derive(Debug, clap::Args)]
pub(super) struct Names {
    /// Where the certificates are.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// A node, controller or manager; may be given several times.
    #[arg(long = "node", value_name = "ID")]
    nodes: Vec<NodeId>,
    /// An application; may be given several times.
    #[arg(long = "app", value_name = "ID")]
    apps: Vec<AppId>,
    /// A host name or address of the nodes besides the loopback ones; may be given several times.
    #[arg(long = "host", value_name = "HOST")]
    hosts: Vec<String>,
    /// How long the certificates, or the list, hold.
    #[arg(long, value_name = "DAYS", default_value_t = 365)]
    days: u32,
}

impl PkiCommand {
    pub(super) fn run(self) -> Result<(), Failure> {
        let (Self::Init(names) | Self::Add(names) | Self::Revoke(names)) = &self;
        let request = pki::Request {
            nodes: &names.nodes,
            apps: &names.apps,
            extra_hosts: &names.hosts,
            now: SystemClock::start().now().unix,
            valid_days: names.days,
        };
        let paths = match &self {
            Self::Init(_) => pki::init(&names.dir, &request)?,
            Self::Add(_) => pki::add(&names.dir, &request)?,
            Self::Revoke(_) => {
                println!("{}", pki::revoke(&names.dir, &request)?.display());
                return Ok(());
            }
        };
        println!("{}", paths.ca.display());
        for issued in &paths.issued {
            println!("{} ({})", issued.certificate.display(), issued.identity);
        }
        Ok(())
    }
}
