//! The hand-off and the running stage: order, back-pressure, waking, stopping.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use common::{key, name, noise, order, pool};
use nix::time::{ClockId, clock_gettime};
use qkd_kernels::Backend;
use qkd_pipeline::{
    Command, CommandRefused, FormatError, Popper, PushError, Pusher, RefuseReason, Stage,
    StageEvent, StageHandle, WaitingBound, handoff, spawn,
};
use qkd_secmem::Pool;

const ROOMY: WaitingBound = WaitingBound {
    keys: 100_000,
    bytes: 4 << 20,
};
/// Far longer than anything here takes; a test that reaches it has failed.
const LONG: Duration = Duration::from_secs(30);

fn running(
    pool: &Pool,
    bound: WaitingBound,
    capacity: usize,
) -> (Pusher, StageHandle, mpsc::Receiver<StageEvent>) {
    let (pusher, popper) = handoff(capacity);
    let stage = Stage::new(pool.clone(), bound, Backend::detect(), [7; 32]);
    let (events, seen) = mpsc::channel();
    let handle = spawn(stage, popper, move |event| {
        // A test that has seen enough no longer listens.
        let _ = events.send(event);
    })
    .unwrap();
    (pusher, handle, seen)
}

fn held_name(event: &StageEvent) -> String {
    match event {
        StageEvent::Held { name, .. } => name.id.to_string(),
        other => panic!("not held: {other:?}"),
    }
}

fn pop_within_long(popper: &mut Popper) -> qkd_pipeline::Descriptor {
    loop {
        if let Some(descriptor) = popper.pop() {
            return descriptor;
        }
        popper.idle();
    }
}

#[test]
fn a_full_handoff_returns_the_descriptor_and_counts() {
    let pool = pool();
    let (pusher, mut popper) = handoff(2);
    pusher.push(key(&pool, "k1", &[1; 8])).unwrap();
    pusher.push(key(&pool, "k2", &[2; 8])).unwrap();
    let Err(PushError::Full(back)) = pusher.push(key(&pool, "k3", &[3; 8])) else {
        panic!("there is no room");
    };
    assert_eq!(
        (back.name.clone(), back.block.expose()),
        (name("k3"), &[3; 8][..])
    );
    assert_eq!((pusher.refused(), pusher.len()), (1, 2));
    assert_eq!(popper.pop().unwrap().name, name("k1"));
    pusher.push(*back).unwrap();
    assert_eq!(popper.pop().unwrap().name, name("k2"));
    assert_eq!(popper.pop().unwrap().name, name("k3"));
    assert!(popper.pop().is_none() && pusher.is_empty());
}

#[test]
fn a_popper_that_is_gone_leaves_no_key_and_refuses_more() {
    let pool = pool();
    let (pusher, popper) = handoff(4);
    pusher.push(key(&pool, "k1", &[1; 8])).unwrap();
    drop(popper);
    assert_eq!(pool.stats().in_use_bytes, 0);
    assert!(matches!(
        pusher.push(key(&pool, "k2", &[2; 8])),
        Err(PushError::Stopped(_))
    ));
}

#[test]
fn many_pushers_lose_nothing_and_keep_their_own_order() {
    const EACH: u32 = 2_000;
    let pool = pool();
    let (pusher, mut popper) = handoff(64);
    let pushers: Vec<_> = (0..3)
        .map(|p| {
            let (pusher, pool) = (pusher.clone(), pool.clone());
            thread::spawn(move || {
                for i in 0..EACH {
                    let mut next = key(&pool, &format!("{p}-{i}"), &i.to_le_bytes());
                    while let Err(PushError::Full(back)) = pusher.push(next) {
                        next = *back;
                        thread::yield_now();
                    }
                }
            })
        })
        .collect();
    let mut expected = [0; 3];
    for _ in 0..3 * EACH {
        let got = pop_within_long(&mut popper);
        let (p, i) = got.name.id.as_str().split_once('-').unwrap();
        let (p, i): (usize, u32) = (p.parse().unwrap(), i.parse().unwrap());
        assert_eq!(i, expected[p], "pusher {p}");
        assert_eq!(got.block.expose(), i.to_le_bytes());
        expected[p] += 1;
    }
    for pusher in pushers {
        pusher.join().unwrap();
    }
    assert!(popper.pop().is_none());
}

#[test]
fn an_idle_popper_uses_no_cpu_time_and_wakes_at_a_push() {
    let pool = pool();
    let (pusher, mut popper) = handoff(4);
    let idle = thread::spawn(move || {
        let cpu_time = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
        let before = cpu_time();
        let got = pop_within_long(&mut popper);
        (got.name, cpu_time() - before)
    });
    thread::sleep(Duration::from_millis(300));
    pusher.push(key(&pool, "k1", &[1; 8])).unwrap();
    let (got, used) = idle.join().unwrap();
    assert_eq!(got, name("k1"));
    assert!(used < Duration::from_millis(60), "{used:?} of 300 ms");
}

#[test]
fn keys_are_held_and_plans_answered_under_their_ticket() {
    let pool = pool();
    let (pusher, handle, seen) = running(&pool, ROOMY, 16);
    let bytes = noise(96, 7);
    pusher.push(key(&pool, "k1", &bytes)).unwrap();
    let event = seen.recv_timeout(LONG).unwrap();
    let StageEvent::Held {
        name: held,
        key_bits,
        metadata,
    } = event
    else {
        panic!("{event:?}");
    };
    assert_eq!((held, key_bits), (name("k1"), 768));
    assert_eq!(metadata.qkd_key_id, common::id("k1"));

    pusher.push(key(&pool, "k1", &bytes)).unwrap();
    assert!(matches!(
        seen.recv_timeout(LONG).unwrap(),
        StageEvent::Refused {
            reason: RefuseReason::Duplicate,
            ..
        }
    ));

    let format = |ticket, text| {
        let order = order(&[(text, 0, 768)], 32, 32);
        handle.send(Command::Format { ticket, order }).unwrap();
        match seen.recv_timeout(LONG).unwrap() {
            StageEvent::Formatted { ticket, result } => (ticket, result),
            other => panic!("{other:?}"),
        }
    };
    let (ticket, made) = format(41, "k1");
    assert_eq!(ticket, 41);
    assert_eq!(made.unwrap().segment.expose(), &bytes);

    handle.send(Command::Drop { name: name("k1") }).unwrap();
    let (ticket, made) = format(42, "k1");
    assert_eq!(ticket, 42);
    assert_eq!(
        made.unwrap_err(),
        FormatError::UnknownQkdKey { name: name("k1") }
    );
    handle.stop();
}

#[test]
fn keys_dropped_at_the_bound_are_reported_before_the_one_that_replaced_them() {
    let pool = pool();
    let (pusher, handle, seen) = running(&pool, WaitingBound { keys: 1, ..ROOMY }, 16);
    pusher.push(key(&pool, "k1", &[1; 8])).unwrap();
    assert_eq!(held_name(&seen.recv_timeout(LONG).unwrap()), "k1");
    pusher.push(key(&pool, "k2", &[2; 8])).unwrap();
    assert!(matches!(
        seen.recv_timeout(LONG).unwrap(),
        StageEvent::DroppedOldest { name: dropped } if dropped == name("k1")
    ));
    assert_eq!(held_name(&seen.recv_timeout(LONG).unwrap()), "k2");
    handle.stop();
}

#[test]
fn planned_keys_that_fill_the_bound_are_felt_by_the_drivers() {
    let pool = pool();
    let (pusher, handle, seen) = running(&pool, WaitingBound { keys: 1, ..ROOMY }, 1);
    pusher.push(key(&pool, "k1", &noise(64, 1))).unwrap();
    assert_eq!(held_name(&seen.recv_timeout(LONG).unwrap()), "k1");
    let plan = order(&[("k1", 0, 512)], 32, 32);
    handle
        .send(Command::Format {
            ticket: 1,
            order: plan,
        })
        .unwrap();
    assert!(matches!(
        seen.recv_timeout(LONG).unwrap(),
        StageEvent::Formatted { .. }
    ));

    // k2 is held back, k3 fills the queue, and then the driver gets its descriptor back.
    pusher.push(key(&pool, "k2", &noise(64, 2))).unwrap();
    let start = Instant::now();
    while !pusher.is_empty() {
        assert!(start.elapsed() < LONG, "k2 is popped and held back");
        thread::yield_now();
    }
    pusher.push(key(&pool, "k3", &noise(64, 3))).unwrap();
    let Err(PushError::Full(_)) = pusher.push(key(&pool, "k4", &noise(64, 4))) else {
        panic!("the queue is full");
    };
    assert!(seen.try_recv().is_err(), "nothing was dropped");

    handle.send(Command::Drop { name: name("k1") }).unwrap();
    assert_eq!(held_name(&seen.recv_timeout(LONG).unwrap()), "k2");
    handle.stop();
}

#[test]
fn commands_sent_before_a_stop_are_done_and_later_ones_refused() {
    let pool = pool();
    let (pusher, handle, seen) = running(&pool, ROOMY, 16);
    pusher.push(key(&pool, "k1", &noise(64, 1))).unwrap();
    assert_eq!(held_name(&seen.recv_timeout(LONG).unwrap()), "k1");
    for ticket in 0..10 {
        let order = order(&[("k1", 0, 512)], 32, 32);
        handle.send(Command::Format { ticket, order }).unwrap();
    }
    handle.send(Command::Stop).unwrap();
    let tickets: Vec<u64> = seen
        .iter()
        .map(|event| match event {
            StageEvent::Formatted { ticket, .. } => ticket,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(tickets, Vec::from_iter(0..10));

    let drop_k1 = Command::Drop { name: name("k1") };
    let refused = handle.send(drop_k1.clone()).unwrap_err();
    assert_eq!(refused, CommandRefused::Stopped(Box::new(drop_k1)));
    handle.stop();
    assert_eq!(pool.stats().in_use_bytes, 0, "all that waited is wiped");
    assert!(matches!(
        pusher.push(key(&pool, "k2", &[2; 8])),
        Err(PushError::Stopped(_))
    ));
}

#[test]
fn dropping_the_handle_ends_the_thread() {
    let pool = pool();
    let (pusher, handle, seen) = running(&pool, ROOMY, 16);
    pusher.push(key(&pool, "k1", &noise(64, 1))).unwrap();
    assert_eq!(held_name(&seen.recv_timeout(LONG).unwrap()), "k1");
    drop(handle);
    assert!(
        seen.recv_timeout(LONG).is_err(),
        "the closure is gone with its thread"
    );
}

#[test]
fn too_many_commands_are_refused_not_queued_without_bound() {
    let pool = pool();
    let (pusher, popper) = handoff(4);
    let stage = Stage::new(pool.clone(), ROOMY, Backend::detect(), [7; 32]);
    let (release, gate) = mpsc::channel::<()>();
    let handle = spawn(stage, popper, move |_| {
        let _ = gate.recv_timeout(LONG);
    })
    .unwrap();
    pusher.push(key(&pool, "k1", &[1; 8])).unwrap();
    let start = Instant::now();
    let refused = loop {
        assert!(start.elapsed() < LONG);
        if let Err(refused) = handle.send(Command::Drop { name: name("kx") }) {
            break refused;
        }
    };
    assert!(matches!(refused, CommandRefused::Full(_)));
    drop(release);
    handle.stop();
}
