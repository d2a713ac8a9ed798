//! A network of nodes as files: certificates, configurations, and `demo.json`, which says where
//! everything is.

use std::{
    fmt::Write as _,
    fs::{self, DirBuilder},
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use qkd_keyfile::{AppId, Clock, NodeId};
use qkd_net::pki::{self, PkiError};
use serde_json::json;

use crate::env::SystemClock;

/// A network to be made.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Its nodes.
    pub nodes: Vec<NodeId>,
    /// Its links.
    pub links: Vec<LinkPlan>,
    /// Nodes that keep end-to-end stock with each other.
    pub stock: Option<StockPlan>,
    /// Applications, and the nodes where they fetch keys.
    pub apps: Vec<(AppId, NodeId)>,
    /// Key memory of each node, in MiB.
    pub key_memory_mib: u32,
}

/// A link and what feeds it.
#[derive(Debug, Clone)]
pub struct LinkPlan {
    /// The node with the transmitters.
    pub a: NodeId,
    /// The node with the receivers.
    pub b: NodeId,
    /// The module pairs.
    pub pairs: Vec<PairPlan>,
}

/// A module pair.
#[derive(Debug, Clone)]
pub struct PairPlan {
    /// Its name.
    pub name: String,
    /// How both its modules hand over their keys.
    pub transport: Transport,
    /// Length of a block, in bits.
    pub block_bits: u32,
    /// Blocks per second.
    pub pace: f64,
}

/// How a module hands over its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A serial line; here a pseudo-terminal.
    Serial,
    /// Hand-over files in a directory.
    Files,
    /// A ring in shared memory.
    SharedMemory,
}

/// End-to-end stock, in both directions.
#[derive(Debug, Clone)]
pub struct StockPlan {
    /// One end.
    pub a: NodeId,
    /// The other.
    pub b: NodeId,
    /// Stock per direction while nobody asks, in KiB; at most four times that.
    pub min_kib: u64,
    /// Key data of one relayed unit, in bytes.
    pub unit_bytes: u32,
}

/// A network that was made: everything is in its folder, nothing runs.
#[derive(Debug)]
pub struct Network {
    /// The folder.
    pub dir: PathBuf,
    /// The authority's certificate.
    pub ca: PathBuf,
    /// The nodes.
    pub nodes: Vec<NodeFiles>,
    /// The controller's configuration and address, if routes come from one.
    pub controller: Option<(PathBuf, SocketAddr)>,
    /// The simulated devices of all nodes, if there are module pairs.
    pub sim: PathBuf,
    /// The applications.
    pub apps: Vec<AppFiles>,
    plan: Plan,
}

/// A node's files and addresses.
#[derive(Debug)]
pub struct NodeFiles {
    /// Its ID.
    pub id: NodeId,
    /// Its configuration.
    pub config: PathBuf,
    /// Its data directory.
    pub data: PathBuf,
    /// Where applications fetch keys.
    pub https: SocketAddr,
    /// Where other nodes connect.
    pub kx: SocketAddr,
}

/// An application's files.
#[derive(Debug)]
pub struct AppFiles {
    /// Its ID.
    pub id: AppId,
    /// Its certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Its node.
    pub node: NodeId,
}

/// Why a network was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// The folder has something in it. Nothing was written.
    #[error("{} is not empty; give a new folder", .0.display())]
    NotEmpty(PathBuf),
    /// A file cannot be written. What was written before stays.
    #[error("cannot write {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
    /// The system has no free port.
    #[error("no free port")]
    Port(#[source] io::Error),
    /// Certificates cannot be made.
    #[error(transparent)]
    Pki(#[from] PkiError),
}

/// ID of the controller, which is the one in its certificate.
const CONTROLLER: &str = "controller";

impl Plan {
    /// The demonstration: alice, relay and bob in a row, alice-relay over a serial line and by
    /// hand-over files, relay-bob over shared memory; an application at each node.
    #[must_use]
    pub fn demo() -> Self {
        let (alice, relay, bob) = (node("alice"), node("relay"), node("bob"));
        let pair = |name: &str, transport, pace| PairPlan {
            name: name.to_owned(),
            transport,
            block_bits: 1 << 16,
            pace,
        };
        let app = |id: &str, node: &NodeId| (known::<AppId>(id), node.clone());
        Self {
            links: vec![
                LinkPlan {
                    a: alice.clone(),
                    b: relay.clone(),
                    pairs: vec![
                        pair("alice-relay-serial", Transport::Serial, 50.0),
                        pair("alice-relay-files", Transport::Files, 50.0),
                    ],
                },
                LinkPlan {
                    a: relay.clone(),
                    b: bob.clone(),
                    pairs: vec![pair("relay-bob-memory", Transport::SharedMemory, 100.0)],
                },
            ],
            stock: Some(StockPlan {
                a: alice.clone(),
                b: bob.clone(),
                min_kib: 256,
                // With its head and metadata a little less than a 16 KiB block of key memory.
                unit_bytes: 15 * 1024,
            }),
            apps: vec![
                app("app-a", &alice),
                app("app-b", &bob),
                app("app-c", &relay),
            ],
            nodes: vec![alice, relay, bob],
            key_memory_mib: 8,
        }
    }

    /// Makes the network in `dir`, which is made (mode 0700) if it is not there.
    ///
    /// # Errors
    ///
    /// [`NetworkError`] says what was written.
    pub fn make(self, dir: &Path) -> Result<Network, NetworkError> {
        let write_error = |path: &Path| {
            let path = path.to_owned();
            move |source| NetworkError::Write(path, source)
        };
        make_folder(dir).map_err(write_error(dir))?;
        let dir = fs::canonicalize(dir).map_err(write_error(dir))?;
        let mut entries = fs::read_dir(&dir).map_err(write_error(&dir))?;
        if entries.next().is_some() {
            return Err(NetworkError::NotEmpty(dir));
        }
        make_folder(&dir.join("modules")).map_err(write_error(&dir))?;

        let mut named = self.nodes.clone();
        if self.stock.is_some() {
            named.push(node(CONTROLLER));
        }
        let apps: Vec<AppId> = self.apps.iter().map(|(app, _)| app.clone()).collect();
        let request = pki::Request {
            nodes: &named,
            apps: &apps,
            extra_hosts: &[],
            now: SystemClock::start().now().unix,
            valid_days: 30,
        };
        let certificates = pki::init(&dir.join("pki"), &request)?;

        let nodes = self.nodes.iter().map(|id| {
            let name = pki::file_name(id.as_str());
            Ok(NodeFiles {
                id: id.clone(),
                config: dir.join(format!("{name}.toml")),
                data: dir.join(name),
                https: free_port()?,
                kx: free_port()?,
            })
        });
        let nodes: Vec<NodeFiles> = nodes
            .collect::<io::Result<_>>()
            .map_err(NetworkError::Port)?;
        let controller = match self.stock {
            Some(_) => Some((
                dir.join("controller.toml"),
                free_port().map_err(NetworkError::Port)?,
            )),
            None => None,
        };
        let issued = certificates.issued.iter().skip(named.len());
        let apps = self
            .apps
            .iter()
            .zip(issued)
            .map(|((id, node), issued)| AppFiles {
                id: id.clone(),
                certificate: issued.certificate.clone(),
                key: issued.key.clone(),
                node: node.clone(),
            });
        let network = Network {
            ca: certificates.ca,
            sim: dir.join("sim.toml"),
            apps: apps.collect(),
            nodes,
            controller,
            dir,
            plan: self,
        };
        for (path, text) in network.configurations() {
            fs::write(&path, text).map_err(write_error(&path))?;
        }
        for folder in network.hand_over_folders() {
            make_folder(&folder).map_err(write_error(&folder))?;
        }
        Ok(network)
    }
}

impl Network {
    /// A node's files.
    #[must_use]
    pub fn node(&self, id: &str) -> Option<&NodeFiles> {
        self.nodes.iter().find(|node| node.id.as_str() == id)
    }

    /// An application's files.
    #[must_use]
    pub fn app(&self, id: &str) -> Option<&AppFiles> {
        self.apps.iter().find(|app| app.id.as_str() == id)
    }

    /// What the network was made from.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Where the module of `node` of a pair hands over its keys: a folder, a port or a socket.
    #[must_use]
    pub fn module(&self, pair: &str, node: &NodeId) -> PathBuf {
        self.dir.join(module(pair, node))
    }

    /// The halves of module pairs at a node, as `sim --half` takes them.
    #[must_use]
    pub fn halves(&self, node: &NodeId) -> Vec<String> {
        let roles = |link: &LinkPlan| {
            let role = match node {
                _ if *node == link.a => Some("transmitter"),
                _ if *node == link.b => Some("receiver"),
                _ => None,
            };
            let pairs = link.pairs.iter();
            let halves = role.map(|role| pairs.map(move |pair| format!("{}:{role}", pair.name)));
            halves.into_iter().flatten().collect::<Vec<_>>()
        };
        self.plan.links.iter().flat_map(roles).collect()
    }

    /// Writes `demo.json`: addresses as `host:port`, paths of PEM files; what does not exist is null.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn write_json(&self) -> Result<(), NetworkError> {
        let nodes = self.nodes.iter().map(|node| {
            json!({
                "id": node.id, "https": node.https, "ak": null, "ck": null, "kx": node.kx,
                "metrics": null, "config": node.config,
            })
        });
        let apps = self.apps.iter().map(
            |app| json!({"id": app.id, "cert": app.certificate, "key": app.key, "node": app.node}),
        );
        let document = json!({
            "ca": self.ca,
            "nodes": nodes.collect::<Vec<_>>(),
            "controller": {"ck": self.controller.as_ref().map(|(_, address)| address)},
            "manager": {"https": null},
            "apps": apps.collect::<Vec<_>>(),
        });
        // Whoever waits for the file finds a whole one.
        let (new, path) = (self.dir.join(".demo.json"), self.dir.join("demo.json"));
        fs::write(&new, format!("{document:#}\n"))
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|source| NetworkError::Write(path, source))
    }

    fn configurations(&self) -> Vec<(PathBuf, String)> {
        let mut files: Vec<_> = self
            .nodes
            .iter()
            .map(|node| (node.config.clone(), self.node_text(node)))
            .collect();
        if let Some((path, address)) = &self.controller {
            files.push((path.clone(), self.controller_text(*address)));
        }
        files.push((self.sim.clone(), self.sim_text()));
        files
    }

    fn hand_over_folders(&self) -> impl Iterator<Item = PathBuf> {
        self.plan.links.iter().flat_map(|link| {
            let files = |pair: &&PairPlan| pair.transport == Transport::Files;
            let pairs = link.pairs.iter().filter(files);
            pairs.flat_map(|pair| [&link.a, &link.b].map(|node| self.module(&pair.name, node)))
        })
    }

    fn node_text(&self, node: &NodeFiles) -> String {
        let plan = &self.plan;
        let mut text = format!(
            "[node]\nid = \"{id}\"\ndata = \"{name}\"\nkey_memory_mib = {memory}\n\
             # Fit for a trial under the usual limit on locked memory; leave it out elsewhere.\n\
             allow_unlocked_memory = true\n\n\
             {tls}\n[kx]\nlisten = \"{kx}\"\n\n[supply]\nlisten = \"{https}\"\n",
            id = node.id,
            name = pki::file_name(node.id.as_str()),
            memory = plan.key_memory_mib,
            tls = tls(&node.id),
            kx = node.kx,
            https = node.https,
        );
        if let Some((_, address)) = self.controller {
            add(
                &mut text,
                &format!("[controller]\nid = \"{CONTROLLER}\"\naddress = \"{address}\""),
            );
        }
        for peer in self.nodes.iter().filter(|peer| peer.id != node.id) {
            let (id, kx) = (&peer.id, peer.kx);
            add(
                &mut text,
                &format!("[[peer]]\nid = \"{id}\"\naddress = \"{kx}\""),
            );
        }
        for link in &plan.links {
            let peer = match &node.id {
                id if *id == link.a => &link.b,
                id if *id == link.b => &link.a,
                _ => continue,
            };
            add(
                &mut text,
                &format!("[[link]]\npeer = \"{peer}\"\ncapacity_bytes = {LINK_CAPACITY_BYTES}"),
            );
            for pair in &link.pairs {
                let driver = driver(pair, &node.id);
                let name = &pair.name;
                add(
                    &mut text,
                    &format!("[[link.module_pair]]\nname = \"{name}\"\ndriver = {driver}"),
                );
            }
        }
        if let Some(stock) = &plan.stock
            && let Some(with) = other_end(&node.id, &stock.a, &stock.b)
        {
            let (min, unit) = (stock.min_kib, stock.unit_bytes);
            let text_of = format!(
                "[[stock]]\nwith = \"{with}\"\nmin_kib = {min}\nmax_kib = {max}\nunit_bytes = {unit}",
                max = 4 * min
            );
            add(&mut text, &text_of);
        }
        for (app, node) in &plan.apps {
            add(
                &mut text,
                &format!("[[app]]\nid = \"{app}\"\nnode = \"{node}\""),
            );
        }
        text
    }

    fn controller_text(&self, address: SocketAddr) -> String {
        let mut text = format!("{}\n[ck]\nlisten = \"{address}\"\n", tls(&node(CONTROLLER)));
        for LinkPlan { a, b, .. } in &self.plan.links {
            add(&mut text, &format!("[[link]]\na = \"{a}\"\nb = \"{b}\""));
        }
        for (app, node) in &self.plan.apps {
            add(
                &mut text,
                &format!("[[app]]\nid = \"{app}\"\nnode = \"{node}\""),
            );
        }
        text
    }

    fn sim_text(&self) -> String {
        let mut text = String::from("# The seed is drawn afresh by whoever starts the devices.\n");
        for link in &self.plan.links {
            for pair in &link.pairs {
                let PairPlan {
                    name,
                    block_bits,
                    pace,
                    ..
                } = pair;
                add(
                    &mut text,
                    &format!(
                        "[[module_pair]]\nname = \"{name}\"\nblock_bits = {block_bits}\n\
                         pace = {pace:?}\nqber_ppm = {QBER_PPM}"
                    ),
                );
                for (node, role) in [(&link.a, "transmitter"), (&link.b, "receiver")] {
                    let transport = transport(pair, node);
                    add(
                        &mut text,
                        &format!(
                            "[[module_pair.half]]\nrole = \"{role}\"\ntransport = {transport}"
                        ),
                    );
                }
            }
        }
        text
    }
}

/// What a link holds at most: enough for a while, and little enough for any disk.
const LINK_CAPACITY_BYTES: u32 = 8 << 20;

/// A common error rate of devices in the field.
const QBER_PPM: u32 = 21_000;

fn known<T: std::str::FromStr>(id: &str) -> T {
    id.parse()
        .unwrap_or_else(|_| unreachable!("{id} has the form of an ID"))
}

fn node(id: &str) -> NodeId {
    known(id)
}

fn other_end<'a>(me: &NodeId, a: &'a NodeId, b: &'a NodeId) -> Option<&'a NodeId> {
    match me {
        _ if me == a => Some(b),
        _ if me == b => Some(a),
        _ => None,
    }
}

fn add(text: &mut String, table: &str) {
    let _ = writeln!(text, "\n{table}");
}

fn tls(node: &NodeId) -> String {
    let name = pki::file_name(node.as_str());
    format!(
        "[tls]\nca = \"pki/ca.pem\"\ncertificate = \"pki/node-{name}.pem\"\n\
         key = \"pki/node-{name}.key\"\n"
    )
}

/// Where a module hands over its keys, from the network's folder.
fn module(pair: &str, node: &NodeId) -> String {
    format!("modules/{pair}.{}", pki::file_name(node.as_str()))
}

fn driver(pair: &PairPlan, node: &NodeId) -> String {
    let path = module(&pair.name, node);
    match pair.transport {
        Transport::Serial => format!("{{ kind = \"serial\", path = \"{path}\" }}"),
        Transport::Files => format!("{{ kind = \"directory\", path = \"{path}\" }}"),
        Transport::SharedMemory => format!("{{ kind = \"shared-memory\", socket = \"{path}\" }}"),
    }
}

fn transport(pair: &PairPlan, node: &NodeId) -> String {
    let path = module(&pair.name, node);
    match pair.transport {
        Transport::Serial => {
            let device = &pair.name;
            format!(
                "{{ kind = \"serial\", path = \"{path}\", make_pty = true, device = \"{device}\" }}"
            )
        }
        Transport::Files => format!("{{ kind = \"files\", directory = \"{path}\" }}"),
        Transport::SharedMemory => format!("{{ kind = \"ring\", socket = \"{path}\" }}"),
    }
}

fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// A loopback port that the system keeps free for whoever binds it by number.
///
/// The accepted connection is closed from the port's side, so that the port stays in TIME-WAIT for a
/// minute: no other program is given it meanwhile, and a listener that names it gets it.
fn free_port() -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let mut client = TcpStream::connect(address)?;
    let (mut server, _) = listener.accept()?;
    server.flush()?;
    drop(server);
    client.read_to_end(&mut Vec::new())?;
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn what_is_written_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let network = Plan::demo().make(dir.path()).unwrap();
        for node in &network.nodes {
            let config = Config::read(&node.config).unwrap();
            assert_eq!(config.node.id, node.id);
            assert!(config.tls.certificate.exists() && config.tls.key.exists());
        }
        network.write_json().unwrap();
        let json = fs::read(network.dir.join("demo.json")).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["nodes"][2]["kx"], network.nodes[2].kx.to_string());
        assert!(json["nodes"][0]["ak"].is_null() && json["manager"]["https"].is_null());
        let relay = network.halves(&node("relay"));
        assert_eq!(relay[2], "relay-bob-memory:transmitter");
        assert_eq!(relay[0], "alice-relay-serial:receiver");
    }

    #[test]
    fn a_folder_in_use_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("mine"), "").unwrap();
        let refused = Plan::demo().make(dir.path()).unwrap_err();
        assert!(matches!(refused, NetworkError::NotEmpty(_)));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_free_port_is_kept_for_whoever_names_it() {
        let address = free_port().unwrap();
        for _ in 0..200 {
            let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            assert_ne!(other.local_addr().unwrap(), address);
        }
        TcpListener::bind(address).unwrap();
    }
}
