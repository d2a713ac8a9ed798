//! A node's configuration file.
//!
//! - Any text is a configuration or an error that names the file; a place in it is one that exists.
//! - A configuration that is taken keeps what its checks promise: nobody is their own peer, links
//!   lead to peers, no module pair feeds two links, the supply's limits fit together.

use std::{cell::RefCell, collections::BTreeSet, fs};

use qkd_bridge::config::Config;
use tempfile::NamedTempFile;

/// See the module.
pub fn run(input: &[u8]) {
    thread_local! {
        static FILE: RefCell<NamedTempFile> = RefCell::new(NamedTempFile::new().unwrap());
    }
    FILE.with_borrow(|file| {
        fs::write(file.path(), input).unwrap();
        match Config::read(file.path()) {
            Ok(config) => check(&config),
            Err(error) => {
                let text = error.to_string();
                let name = file.path().display().to_string();
                let rest = text.strip_prefix(&name).unwrap();
                assert!(place_exists(rest, input), "{rest}");
            }
        }
    });
}

fn check(config: &Config) {
    let peers: BTreeSet<_> = config.peers.iter().map(|peer| peer.id.get_ref()).collect();
    assert!(peers.len() == config.peers.len() && !peers.contains(&config.node.id));
    let links: BTreeSet<_> = config
        .links
        .iter()
        .map(|link| link.peer.get_ref())
        .collect();
    assert!(links.len() == config.links.len() && links.is_subset(&peers));
    let pairs = || config.links.iter().flat_map(|link| &link.module_pairs);
    let names: BTreeSet<_> = pairs().map(|pair| pair.name.get_ref()).collect();
    assert_eq!(names.len(), pairs().count());
    assert!(config.stocks.iter().all(|stock| {
        stock
            .route
            .as_ref()
            .map_or(config.controller.is_some(), |route| {
                let route = route.get_ref();
                route.first() == Some(&config.node.id) && route.last() == Some(stock.with.get_ref())
            })
    }));
    assert!(
        config
            .supply
            .as_ref()
            .is_none_or(|supply| supply.profile().is_ok())
    );
    assert_eq!(config.app_nodes().len(), config.apps.len());
}

/// `:line:column: ...` within the text, or `: ...`.
fn place_exists(rest: &str, input: &[u8]) -> bool {
    let Some(place) = rest.strip_prefix(':') else {
        return false;
    };
    let mut numbers = place
        .split(':')
        .map_while(|part| part.parse::<usize>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(line), Some(column)) => {
            let text = String::from_utf8_lossy(input);
            let line = text.split('\n').nth(line - 1);
            line.is_some_and(|line| (1..=line.chars().count() + 1).contains(&column))
        }
        (None, None) => place.starts_with(' '),
        _ => false,
    }
}
