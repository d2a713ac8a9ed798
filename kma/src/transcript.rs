//! What the four schemes put on the wire, byte by byte: who sends what to whom and in which order,
//! which key is in which ciphertext, and that everything on the wire together leaves the relayed key
//! uniform.
//!
//! The tests know all QKD-keys, so they name every byte of every ciphertext as a sum of variables: a
//! byte of a link's segment, or a random byte of a source. The rank over GF(2) of what an observer
//! sees, with and without the key, then says what they know of it. (The eight bits of a byte are
//! treated alike, so one variable stands for all of them.)

use std::collections::{BTreeMap, BTreeSet};

use qkd_keyfile::{
    KeyFile, KeyMetadata, KeySpan, KmaKeyId, LinkId, NodeId, SegmentNumber, StreamId,
};

use crate::{
    RandomSource, RelayPolicy, RelayScheme,
    common::{Network, bytes, chain_and_centre, feed_chain, node},
    record::{Purpose, Record},
    wire::{CENTRE_PLACE, Cargo, Message, RelayHeader, ReservedFor, XorPart},
};

const CENTRE: &str = "middle";

const NAMES: [&str; 6] = ["alice", "r1", "r2", "r3", "r4", "zoe"];

/// Check bits at the head of a unit.
const HEAD: usize = super::relay::UNIT_HEAD_BYTES as usize;

/// A byte that is drawn at random, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Variable {
    /// Of a link's segment; the link by its place among all.
    Link(usize, SegmentNumber, u32),
    /// Of the random bits of a unit.
    Random(KmaKeyId, usize),
}

/// A sum of variables: each is in it or not.
type Form = BTreeSet<Variable>;

fn add(to: &mut Form, other: &Form) {
    for variable in other {
        if !to.remove(variable) {
            to.insert(*variable);
        }
    }
}

/// Independent sums, each under its first variable.
#[derive(Debug, Clone, Default)]
struct Basis(BTreeMap<Variable, Form>);

impl Basis {
    /// Adds a sum; says whether it tells more than the others did.
    fn insert(&mut self, mut form: Form) -> bool {
        while let Some(first) = form.first().copied() {
            let Some(known) = self.0.get(&first) else {
                self.0.insert(first, form);
                return true;
            };
            add(&mut form, known);
        }
        false
    }

    fn variables(&self) -> BTreeSet<Variable> {
        self.0.values().flatten().copied().collect()
    }
}

/// A message of a relay, once, however often it was said.
#[derive(Debug, Clone)]
struct Sent {
    from: NodeId,
    to: NodeId,
    what: What,
}

#[derive(Debug, Clone)]
enum What {
    Hop(RelayHeader, Vec<u8>),
    Xor(XorPart),
}

/// A unit, its relay and its bytes as forms.
struct Unit {
    id: KmaKeyId,
    stream: StreamId,
    number: SegmentNumber,
    route: Vec<NodeId>,
    messages: Vec<Sent>,
    bytes: Vec<u8>,
    forms: Vec<Form>,
}

struct Transcript {
    net: Network,
    units: Vec<Unit>,
}

fn link_of(a: &NodeId, b: &NodeId) -> LinkId {
    LinkId::between(a, b).unwrap()
}

fn links(net: &Network) -> BTreeSet<&LinkId> {
    net.segments.keys().map(|(link, _)| link).collect()
}

fn variables(net: &Network, link: &LinkId, spans: &[KeySpan]) -> Vec<Form> {
    let at = links(net).iter().position(|l| *l == link).unwrap();
    let of = |span: &KeySpan| {
        let number = span.segment;
        let byte = move |offset| Form::from([Variable::Link(at, number, offset)]);
        (span.offset_bytes..span.end_bytes().unwrap()).map(byte)
    };
    spans.iter().flat_map(of).collect()
}

fn bits(net: &Network, link: &LinkId, spans: &[KeySpan]) -> Vec<u8> {
    let of = |span: &KeySpan| {
        let segment = &net.segments[&(link.clone(), span.segment)];
        segment[span.offset_bytes as usize..span.end_bytes().unwrap() as usize].to_vec()
    };
    spans.iter().flat_map(of).collect()
}

fn xor(a: &[u8], b: &[u8]) -> Vec<u8> {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a ^ b).collect()
}

fn chain_of(nodes: usize) -> Vec<&'static str> {
    [&NAMES[..nodes - 1], &NAMES[5..]].concat()
}

/// Runs a chain with a scheme, listens, and sorts what was said by unit.
fn listen(scheme: &RelayScheme, nodes: usize) -> Transcript {
    let names = chain_of(nodes);
    let policy = RelayPolicy {
        scheme: scheme.clone(),
        ..RelayPolicy::default()
    };
    let mut configs = chain_and_centre(&names, CENTRE, &policy);
    for remote in configs.iter_mut().flat_map(|c| c.remotes.values_mut()) {
        remote.stock = crate::StockLimits::fixed(128);
        remote.unit_bytes = 64;
    }
    let mut net = Network::new(configs, 70 + nodes as u64);
    net.heard = Some(Vec::new());
    net.start_all();
    feed_chain(&mut net, &names, 0, 8);
    for _ in 0..12 {
        net.run(2);
        net.deliver_random("alice");
        net.deliver_random("zoe");
    }
    assert_eq!(
        (net.stock("alice", "zoe"), net.stock("zoe", "alice")),
        (128, 128)
    );
    let units = sort(&net);
    assert_eq!(units.len(), 4, "two units of 64 bytes each way");
    Transcript { net, units }
}

fn sort(net: &Network) -> Vec<Unit> {
    let mut by_unit: BTreeMap<(NodeId, NodeId, SegmentNumber), Vec<Sent>> = BTreeMap::new();
    let mut ids: BTreeMap<KmaKeyId, (NodeId, NodeId, SegmentNumber)> = BTreeMap::new();
    let mut said = BTreeMap::new();
    for (from, to, bytes) in net.heard.as_ref().unwrap() {
        let (name, what, which) = match Message::decode(bytes).unwrap() {
            Message::Relay(hop) => {
                let header: RelayHeader = postcard::from_bytes(&hop.header).unwrap();
                let (first, last) = (&header.route[0], header.route.last().unwrap());
                let name = (first.clone(), last.clone(), header.segment);
                if let Cargo::Reservation(reservation) = &header.cargo {
                    ids.insert(reservation.relay, name.clone());
                }
                let which = (header.sequence, header.session);
                (name, What::Hop(header, hop.ciphertext), which)
            }
            Message::Xor(part) => {
                let name = ids[&part.relay].clone();
                let which = (u64::from(part.place), u64::MAX);
                (name, What::Xor(part), which)
            }
            _ => continue,
        };
        // What is said again is said byte for byte.
        let key = (from.clone(), to.clone(), name.clone(), which);
        if let Some(before) = said.insert(key, bytes.clone()) {
            assert_eq!(&before, bytes);
            continue;
        }
        let sent = Sent {
            from: from.clone(),
            to: to.clone(),
            what,
        };
        by_unit.entry(name).or_default().push(sent);
    }
    let unit = |((source, destination, number), messages): (_, Vec<Sent>)| {
        let stream = StreamId::EndToEnd {
            source,
            destination,
        };
        let route = match &messages[0].what {
            What::Hop(header, _) => header.route.clone(),
            What::Xor(part) => part.route.clone(),
        };
        let (id, bytes, forms) = unit_of(net, &route, &messages);
        Unit {
            id,
            stream,
            number,
            route,
            messages,
            bytes,
            forms,
        }
    };
    by_unit.into_iter().map(unit).collect()
}

/// The reserved keys of a relay, link by link.
fn reserved(net: &Network, messages: &[Sent]) -> Vec<(Vec<u8>, Vec<Form>)> {
    let of = |sent: &Sent| match &sent.what {
        What::Hop(header, _) if matches!(header.cargo, Cargo::Reservation(_)) => {
            let link = link_of(&sent.from, &sent.to);
            Some((
                bits(net, &link, &header.pad),
                variables(net, &link, &header.pad),
            ))
        }
        _ => None,
    };
    messages.iter().filter_map(of).collect()
}

/// ID, bytes and forms of a unit, out of what its source did.
fn unit_of(net: &Network, route: &[NodeId], messages: &[Sent]) -> (KmaKeyId, Vec<u8>, Vec<Form>) {
    let random = |id, len| (0..len).map(move |at| Form::from([Variable::Random(id, at)]));
    match &messages[0].what {
        What::Hop(header, ciphertext) => match &header.cargo {
            Cargo::Padded => {
                let pad = bits(net, &link_of(&route[0], &route[1]), &header.pad);
                let file = xor(ciphertext, &pad);
                let file = KeyFile::decode(&file).unwrap();
                let KeyMetadata::Relayed(metadata) = &file.metadata else {
                    panic!("not a relayed key");
                };
                let id = metadata.kma_key.kma_key_id;
                (id, file.key.to_vec(), random(id, file.key.len()).collect())
            }
            Cargo::Reservation(reservation) => {
                let (first, forms) = reserved(net, messages).remove(0);
                let of_source = messages.iter().find_map(|sent| match &sent.what {
                    What::Xor(part) if part.place == 0 => Some(part),
                    _ => None,
                });
                match of_source {
                    Some(part) => {
                        let id = reservation.relay;
                        (
                            id,
                            xor(&part.ciphertext, &first),
                            random(id, first.len()).collect(),
                        )
                    }
                    None => (reservation.relay, first, forms),
                }
            }
            Cargo::Aes256Gcm { .. } => panic!("no policy allows AES here"),
        },
        What::Xor(_) => panic!("an XOR before any reservation"),
    }
}

/// One ciphertext: what it must be, byte for byte, and as forms.
fn ciphertext(net: &Network, unit: &Unit, sent: &Sent) -> (Vec<u8>, Vec<Form>) {
    match &sent.what {
        What::Hop(header, ciphertext) => {
            let link = link_of(&sent.from, &sent.to);
            let (pad, mut forms) = (
                bits(net, &link, &header.pad),
                variables(net, &link, &header.pad),
            );
            // The key file's head is known to whoever knows the names.
            let head = ciphertext.len() - unit.bytes.len();
            let file = xor(ciphertext, &pad);
            let decoded = KeyFile::decode(&file).unwrap();
            assert_eq!(decoded.key, unit.bytes);
            for (form, of_unit) in forms[head..].iter_mut().zip(&unit.forms) {
                add(form, of_unit);
            }
            let expected = [&file[..head], &unit.bytes].concat();
            (xor(&expected, &pad), forms)
        }
        What::Xor(part) => {
            let keys = reserved(net, &unit.messages);
            let last = keys.len() - 1;
            let random = (&unit.bytes, &unit.forms);
            let key = |at: usize| (&keys[at].0, &keys[at].1);
            let (a, b) = match part.place {
                0 => (random, key(0)),
                CENTRE_PLACE if part.plan.random => (random, key(last)),
                CENTRE_PLACE => (key(0), key(last)),
                place => (key(usize::from(place) - 1), key(usize::from(place))),
            };
            let mut forms = a.1.clone();
            forms.iter_mut().zip(b.1).for_each(|(form, b)| add(form, b));
            (xor(a.0, b.0), forms)
        }
    }
}

/// What a scheme says, in order: (from, to, place), by place in the route; a reservation has none.
fn expected(scheme: &RelayScheme, nodes: usize) -> BTreeSet<(usize, usize, Option<u8>)> {
    let last = nodes - 1;
    let hop = |at| (at, at + 1, None);
    match scheme {
        // The first is the reservation.
        RelayScheme::LinkKey | RelayScheme::Random(_) => (0..last).map(hop).collect(),
        RelayScheme::AtDestination(random) | RelayScheme::AtCentre { random, .. } => {
            let centre = matches!(scheme, RelayScheme::AtCentre { .. });
            let to = if centre { nodes } else { last };
            let first = usize::from(random.is_none());
            let place = |at| u8::try_from(at).unwrap();
            let mut all: BTreeSet<_> = (0..last).map(hop).collect();
            all.extend((first..last).map(|at| (at, to, Some(place(at)))));
            if centre && first < last {
                all.insert((nodes, last, Some(CENTRE_PLACE)));
            }
            all
        }
    }
}

fn schemes() -> Vec<RelayScheme> {
    let randoms = [
        None,
        Some(RandomSource::System),
        Some(RandomSource::Physical),
    ];
    let mut all = vec![RelayScheme::LinkKey];
    for random in randoms {
        let centre = node(CENTRE);
        all.extend(random.map(RelayScheme::Random));
        all.push(RelayScheme::AtDestination(random));
        all.push(RelayScheme::AtCentre { centre, random });
    }
    all
}

/// Runs a test over all schemes and two to six nodes.
fn for_all(test: impl Fn(&RelayScheme, usize, Transcript)) {
    for scheme in schemes() {
        for nodes in 2..=6 {
            test(&scheme, nodes, listen(&scheme, nodes));
        }
    }
}

#[test]
fn the_flows_of_all_schemes_are_byte_exact_over_two_to_six_nodes() {
    for_all(|scheme, nodes, transcript| {
        let case = format!("{scheme:?} over {nodes}");
        for unit in &transcript.units {
            let place = |node: &NodeId| unit.route.iter().position(|n| n == node).unwrap_or(nodes);
            let mut flows = BTreeSet::new();
            for (at, sent) in unit.messages.iter().enumerate() {
                let of_xor = match &sent.what {
                    What::Hop(header, ciphertext_bytes) => {
                        // Case 1 and the XORs begin with a reservation; all hops of the XORs are.
                        let reserves = !matches!(scheme, RelayScheme::Random(_))
                            && (at == 0 || !matches!(scheme, RelayScheme::LinkKey));
                        match &header.cargo {
                            Cargo::Reservation(reservation) => {
                                assert!(reserves, "{case}");
                                assert!(ciphertext_bytes.is_empty());
                                let xors = matches!(reservation.scheme, ReservedFor::Xor(_));
                                assert_eq!(xors, !matches!(scheme, RelayScheme::LinkKey));
                                assert_eq!(reservation.relay, unit.id, "{case}");
                            }
                            cargo => assert!(!reserves && *cargo == Cargo::Padded, "{case}"),
                        }
                        if matches!(header.cargo, Cargo::Padded) {
                            let (expected, _) = ciphertext(&transcript.net, unit, sent);
                            assert_eq!(*ciphertext_bytes, expected, "{case}: {at}");
                        }
                        None
                    }
                    What::Xor(part) => {
                        let (expected, _) = ciphertext(&transcript.net, unit, sent);
                        assert_eq!(part.ciphertext, expected, "{case}: {at}");
                        assert_eq!(part.route, unit.route);
                        Some(part.place)
                    }
                };
                let new = flows.insert((place(&sent.from), place(&sent.to), of_xor));
                assert!(new, "{case}: sent twice");
                // Hops follow each other; an XOR leaves after both its keys are reserved.
                if let What::Xor(part) = &sent.what
                    && part.place != CENTRE_PLACE
                {
                    let before = usize::from(part.place);
                    let earlier = &unit.messages[..at];
                    let hops = earlier.iter().filter(|s| matches!(s.what, What::Hop(..)));
                    assert!(hops.count() > before, "{case}");
                }
            }
            assert_eq!(flows, expected(scheme, nodes), "{case}");
        }
    });
}

#[test]
fn applications_at_both_ends_get_bytes_of_the_very_unit_that_the_transcript_shows() {
    for_all(|scheme, nodes, mut transcript| {
        let case = format!("{scheme:?} over {nodes}");
        for (from, to) in [("alice", "zoe"), ("zoe", "alice")] {
            let keys = transcript.net.supply(from, to, 4, 256).unwrap();
            let ids: Vec<_> = keys.iter().map(|k| k.key_id).collect();
            let fetched = transcript.net.fetch(to, from, &ids).unwrap();
            let ledger = transcript.net.ledger(from);
            for (key, other) in keys.iter().zip(&fetched) {
                let binding = ledger.iter().find_map(|record| match record {
                    Record::Bound { binding, .. } if binding.key_id == key.key_id => Some(binding),
                    _ => None,
                });
                let binding = binding.unwrap();
                let unit = transcript.units.iter();
                let mut unit = unit
                    .filter(|u| (&u.stream, u.number) == (&binding.stream, binding.span.segment));
                // For two nodes the link itself may serve; with stock end to end, that does.
                let unit = unit.next().unwrap_or_else(|| panic!("{case}"));
                let span = binding.span;
                let shown = &unit.bytes[span.offset_bytes as usize..][..span.len_bytes as usize];
                assert_eq!(
                    (shown, shown),
                    (&bytes(&key.key)[..], &bytes(&other.key)[..]),
                    "{case}"
                );
            }
        }
    });
}

#[test]
fn every_pad_is_in_the_ciphertexts_that_its_scheme_names_and_in_no_other() {
    for_all(|scheme, nodes, transcript| {
        let case = format!("{scheme:?} over {nodes}");
        // How often each byte of a link is in a ciphertext, and under which relay.
        let mut uses: BTreeMap<Variable, Vec<(KmaKeyId, bool)>> = BTreeMap::new();
        for unit in &transcript.units {
            for sent in &unit.messages {
                let is_reservation = matches!(&sent.what, What::Hop(h, _) if matches!(h.cargo, Cargo::Reservation(_)));
                if is_reservation {
                    continue;
                }
                let own_pad = matches!(sent.what, What::Hop(..));
                let (_, forms) = ciphertext(&transcript.net, unit, sent);
                for variable in forms.iter().flatten() {
                    uses.entry(*variable).or_default().push((unit.id, own_pad));
                }
            }
        }
        for unit in &transcript.units {
            let keys = reserved(&transcript.net, &unit.messages);
            let last = keys.len().saturating_sub(1);
            for (at, (_, forms)) in keys.iter().enumerate() {
                let times = match scheme {
                    // The key itself: in every hop after the reservation, each under its own pad.
                    RelayScheme::LinkKey => nodes - 2,
                    RelayScheme::Random(_) => panic!("case 2 reserves nothing"),
                    RelayScheme::AtDestination(random) => {
                        let first = usize::from(random.is_some() || at > 0);
                        first + usize::from(at < last)
                    }
                    // The centre's one is the sum of others: the ends' keys are in it once more.
                    RelayScheme::AtCentre { random, .. } => {
                        let first = usize::from(random.is_some() || at > 0);
                        let again = match random {
                            _ if last == 0 && random.is_none() => 0,
                            None => usize::from(at == 0 || at == last),
                            Some(_) => usize::from(at == last),
                        };
                        first + usize::from(at < last) + again
                    }
                };
                for variable in forms.iter().flatten() {
                    let used = uses.remove(variable).unwrap_or_default();
                    assert_eq!(used.len(), times, "{case}: key {at}");
                    assert!(
                        used.iter().all(|(id, _)| *id == unit.id),
                        "{case}: one relay"
                    );
                }
            }
        }
        // What is left is pad of single hops, and random bytes under it.
        for (variable, used) in uses {
            if matches!(variable, Variable::Link(..)) {
                assert_eq!(used.len(), 1, "{case}: {variable:?}");
                assert!(used[0].1);
            }
        }
        // The ledgers say the same: what was reserved was reserved for one relay at both ends.
        let ids: BTreeSet<KmaKeyId> = transcript.units.iter().map(|unit| unit.id).collect();
        let mut reserved_bytes: BTreeMap<KmaKeyId, [u64; 2]> = BTreeMap::new();
        for name in chain_of(nodes) {
            for record in transcript.net.ledger(name) {
                let (span, purpose, end) = match record {
                    Record::Taken { span, purpose, .. } => (span, purpose, 0),
                    Record::Followed { span, purpose, .. } => (span, purpose, 1),
                    _ => continue,
                };
                if let Purpose::Relay(id) = purpose {
                    assert!(ids.contains(&id), "{case}");
                    reserved_bytes.entry(id).or_default()[end] += u64::from(span.len_bytes);
                }
            }
        }
        assert!(reserved_bytes.values().all(|[a, b]| a == b), "{case}");
    });
}

/// What an observer of everything on the wire knows at most: every ciphertext; every mask and hash
/// key of every hop (so every tag is a function of what is known); of every unit the POLYVAL key and
/// the release, and the completion, as mask 1 under an arbitrary sum of the data.
fn seen(transcript: &Transcript, who: impl Fn(&Sent) -> bool) -> Basis {
    let (net, mut basis) = (&transcript.net, Basis::default());
    for unit in &transcript.units {
        for sent in unit.messages.iter().filter(|sent| who(sent)) {
            if let What::Hop(header, _) = &sent.what {
                let link = link_of(&sent.from, &sent.to);
                for spans in [&header.mask, &header.hash_key] {
                    variables(net, &link, spans).into_iter().for_each(|form| {
                        basis.insert(form);
                    });
                }
                if matches!(header.cargo, Cargo::Reservation(_)) {
                    continue;
                }
            }
            let (_, forms) = ciphertext(&transcript.net, unit, sent);
            forms.into_iter().for_each(|form| {
                basis.insert(form);
            });
        }
        for at in (0..16).chain(32..48) {
            basis.insert(unit.forms[at].clone());
        }
        let all = unit.forms[HEAD..].iter();
        let sum = all.fold(Form::new(), |mut sum, form| {
            add(&mut sum, form);
            sum
        });
        for mask in &unit.forms[16..32] {
            let mut form = mask.clone();
            add(&mut form, &sum);
            basis.insert(form);
        }
    }
    basis
}

/// Whether all data of all units is uniform to whoever knows `basis`.
fn is_uniform(mut basis: Basis, units: &[Unit]) -> bool {
    let mut data = units.iter().flat_map(|unit| &unit.forms[HEAD..]);
    data.all(|form| basis.insert(form.clone()))
}

#[test]
fn everything_on_the_wire_together_leaves_every_relayed_key_uniform() {
    for_all(|scheme, nodes, transcript| {
        let basis = seen(&transcript, |_| true);
        assert!(
            is_uniform(basis.clone(), &transcript.units),
            "{scheme:?} over {nodes}"
        );
        // That the rank would show it: one pad byte in the open, and it is uniform no more.
        let mut leaky = basis;
        let unit = &transcript.units[0];
        leaky.insert(unit.forms[HEAD].clone());
        assert!(!is_uniform(leaky, &transcript.units));
    });
}

#[test]
fn a_pad_used_twice_would_show_in_the_rank() {
    let transcript = listen(&RelayScheme::Random(RandomSource::System), 3);
    let mut basis = seen(&transcript, |_| true);
    // Two units under one pad: their sum is known.
    let (one, other) = (&transcript.units[0].forms, &transcript.units[1].forms);
    for (a, b) in one.iter().zip(other) {
        let mut form = a.clone();
        add(&mut form, b);
        basis.insert(form);
    }
    assert!(!is_uniform(basis, &transcript.units));
}

#[test]
fn the_centre_learns_nothing_and_with_random_bits_no_node_between_the_ends_does() {
    for_all(|scheme, nodes, transcript| {
        let case = format!("{scheme:?} over {nodes}");
        let of = |name: NodeId| move |sent: &Sent| sent.from == name || sent.to == name;
        // The centre has no link; it knows what it sees.
        let basis = seen(&transcript, of(node(CENTRE)));
        assert!(is_uniform(basis, &transcript.units), "{case}: centre");
        let xors = !matches!(scheme, RelayScheme::LinkKey | RelayScheme::Random(_));
        for (at, name) in chain_of(nodes)
            .into_iter()
            .enumerate()
            .take(nodes - 1)
            .skip(1)
        {
            let me = node(name);
            let mut basis = seen(&transcript, of(me.clone()));
            // A node knows every bit of its own links.
            let links = links(&transcript.net);
            let own = |at: usize| links.iter().nth(at).unwrap().peer_of(&me).is_some();
            let mut known: BTreeSet<Variable> = basis.variables();
            known.extend(
                transcript
                    .units
                    .iter()
                    .flat_map(|u| u.forms.iter().flatten()),
            );
            for variable in known {
                if matches!(variable, Variable::Link(at, ..) if own(at)) {
                    basis.insert(Form::from([variable]));
                }
            }
            let forth: Vec<&Unit> = transcript
                .units
                .iter()
                .filter(|unit| unit.route[0] == node("alice"))
                .collect();
            let uniform = forth.iter().all(|unit| {
                let mut basis = basis.clone();
                unit.forms[HEAD..].iter().all(|f| basis.insert(f.clone()))
            });
            // Fig. 7 and 8: the far end of the first link knows the key, unless it is random bits.
            let expected = xors && (scheme.random().is_some() || at > 1);
            assert_eq!(uniform, expected, "{case}: {name}");
        }
    });
}
