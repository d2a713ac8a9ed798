//! What needs a bound that is small in tests alone.

use qkd_keyfile::Generation;

use crate::{
    common::{Network, chain, node, qkd_key},
    used::TEXTS_MAX,
};

#[test]
fn ids_that_are_no_numbers_are_kept_in_bounded_memory_by_raising_the_generation() {
    let mut net = Network::new(chain(&["alice", "bob"], 0), 5);
    net.start_all();
    let module_pair = "alice-bob".parse().unwrap();
    let count = 3 * TEXTS_MAX as u64 + 10;
    for id in 0..count {
        let name = qkd_key("alice-bob", &format!("uuid-{id}"));
        let mut key = vec![0; 48];
        key[..8].copy_from_slice(&id.to_le_bytes());
        net.deliver(&node("alice"), &name, &key);
        net.deliver(&node("bob"), &name, &key);
        if id % 8 == 0 {
            net.run(1);
        }
    }
    net.run(20);
    for end in ["alice", "bob"] {
        let store = net.kma(end).store();
        assert_eq!(store.generation(&module_pair), Generation(3), "{end}");
        let used = &store.numbering(&module_pair).unwrap().used;
        assert!(used.texts() < TEXTS_MAX, "{end}");
        // The last ones of the generation before are refused too.
        let id = format!("uuid-{}", 3 * TEXTS_MAX as u64 - 40)
            .parse()
            .unwrap();
        assert!(used.contains(&id), "{end}");
        assert!(net.nodes[&node(end)].alarms.is_empty());
    }
    let stock = net.link_stock("alice", "bob") + net.link_stock("bob", "alice");
    assert!(
        stock > (count - 100) * 16,
        "{stock} bytes: few were lost on the way"
    );
    net.check_books();
}
