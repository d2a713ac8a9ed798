//! What a node's entries must agree on.

use std::{
    collections::BTreeSet,
    ops::{Range, RangeInclusive},
};

use qkd_keyfile::NodeId;
use toml::Spanned;

use super::{Config, SupplyConfig};

/// Key memory, in MiB: less does not hold a block of each length twice.
const KEY_MEMORY_MIB: RangeInclusive<usize> = 4..=1 << 20;

/// Key data of a relayed unit, in bytes: with its metadata it fits a block of key memory.
const UNIT_BYTES: RangeInclusive<u32> = 64..=128 << 10;

/// Length of a segment, in KiB: it fits a block of key memory.
const SEGMENT_KIB: RangeInclusive<u32> = 1..=256;

/// Longest silence of a peer, in milliseconds: not so short that a busy machine looks dead.
const DEAD_AFTER_MS: RangeInclusive<u64> = 200..=600_000;

/// What is wrong, and where, if it is one entry.
pub(super) struct Wrong {
    pub(super) span: Option<Range<usize>>,
    pub(super) what: String,
}

fn refuse<T>(at: &Spanned<T>, what: String) -> Result<(), Wrong> {
    let span = Some(at.span());
    Err(Wrong { span, what })
}

fn text<T: std::fmt::Display>(range: &RangeInclusive<T>) -> String {
    format!("{} to {}", range.start(), range.end())
}

/// What names must refer to, which may occur once, and what is within bounds.
pub(super) fn check(config: &Config) -> Result<(), Wrong> {
    let key_memory_mib = &config.node.key_memory_mib;
    if !KEY_MEMORY_MIB.contains(key_memory_mib.get_ref()) {
        let mib = key_memory_mib.get_ref();
        let what = format!(
            "key_memory_mib = {mib} is not within {}",
            text(&KEY_MEMORY_MIB)
        );
        return refuse(key_memory_mib, what);
    }
    let dead_after = &config.kx.dead_after_ms;
    if !DEAD_AFTER_MS.contains(dead_after.get_ref()) {
        let what = format!(
            "dead_after_ms = {} is not within {}",
            dead_after.get_ref(),
            text(&DEAD_AFTER_MS)
        );
        return refuse(dead_after, what);
    }
    let peers = Peers::of(config)?;
    links(config, &peers)?;
    stocks(config, &peers)?;
    let policies = config.relay.policies();
    policies.map_err(|(span, what)| Wrong {
        span,
        what: format!("[relay]: {what}"),
    })?;
    apps(config, &peers)?;
    supply(config)
}

/// The nodes that have an entry.
struct Peers<'a>(BTreeSet<&'a NodeId>);

impl<'a> Peers<'a> {
    fn of(config: &'a Config) -> Result<Self, Wrong> {
        let mut peers = BTreeSet::new();
        for peer in &config.peers {
            let id = peer.id.get_ref();
            if *id == config.node.id {
                refuse(&peer.id, format!("peer {id} is this node"))?;
            }
            if !peers.insert(id) {
                refuse(&peer.id, format!("peer {id} is listed twice"))?;
            }
        }
        Ok(Self(peers))
    }

    fn must_have(&self, id: &Spanned<NodeId>, entry: &str) -> Result<(), Wrong> {
        let name = id.get_ref();
        if self.0.contains(name) {
            return Ok(());
        }
        refuse(id, format!("{entry} {name} has no [[peer]] entry"))
    }
}

fn links(config: &Config, peers: &Peers<'_>) -> Result<(), Wrong> {
    let (mut links, mut pairs) = (BTreeSet::new(), BTreeSet::new());
    for link in &config.links {
        peers.must_have(&link.peer, "link to")?;
        let peer = link.peer.get_ref();
        if !links.insert(peer) {
            refuse(&link.peer, format!("link to {peer} is listed twice"))?;
        }
        let kib = *link.segment_kib.get_ref();
        if !SEGMENT_KIB.contains(&kib) {
            let what = format!("segment_kib = {kib} is not within {}", text(&SEGMENT_KIB));
            refuse(&link.segment_kib, what)?;
        }
        for pair in &link.module_pairs {
            let name = pair.name.get_ref();
            if !pairs.insert(name) {
                refuse(&pair.name, format!("module pair {name} is listed twice"))?;
            }
        }
    }
    Ok(())
}

fn stocks(config: &Config, peers: &Peers<'_>) -> Result<(), Wrong> {
    let me = &config.node.id;
    for stock in &config.stocks {
        peers.must_have(&stock.with, "stock with")?;
        let with = stock.with.get_ref();
        if !UNIT_BYTES.contains(&stock.unit_bytes) {
            let what = format!("unit_bytes of {with} is not within {}", text(&UNIT_BYTES));
            refuse(&stock.with, what)?;
        }
        let (min, max) = (stock.min_kib, *stock.max_kib.get_ref());
        if max < min {
            let what = format!("max_kib = {max} is less than min_kib = {min}");
            refuse(&stock.max_kib, what)?;
        }
        match &stock.route {
            None if config.controller.is_none() => {
                let what = format!("stock with {with} needs a route or a [controller]");
                refuse(&stock.with, what)?;
            }
            Some(route)
                if (route.get_ref().first(), route.get_ref().last()) != (Some(me), Some(with)) =>
            {
                refuse(route, format!("route must lead from {me} to {with}"))?;
            }
            _ => {}
        }
    }
    Ok(())
}

fn apps(config: &Config, peers: &Peers<'_>) -> Result<(), Wrong> {
    let mut apps = BTreeSet::new();
    for app in &config.apps {
        if *app.node.get_ref() != config.node.id {
            peers.must_have(&app.node, "application at")?;
        }
        let id = app.id.get_ref();
        if !apps.insert(id) {
            refuse(&app.id, format!("application {id} is listed twice"))?;
        }
    }
    Ok(())
}

fn supply(config: &Config) -> Result<(), Wrong> {
    let Some(supply) = &config.supply else {
        return Ok(());
    };
    let wrong = |what| Wrong { span: None, what };
    let (asked, most) = (supply.max_keys_per_request, qkd_kma::KEYS_MAX);
    if asked > most {
        let what = format!("[supply]: max_keys_per_request = {asked} is more than {most}");
        return Err(wrong(what));
    }
    SupplyConfig::profile(supply)
        .map(drop)
        .map_err(|error| wrong(format!("[supply]: {error}")))
}
