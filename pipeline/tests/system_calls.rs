//! In the steady state the stage makes no system call at all: it does its work in a thread that the
//! kernel ends at the first one.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    io::Read,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use common::{key, name, noise, order, pool};
use nix::libc;
use qkd_kernels::Backend;
use qkd_pipeline::{Hold, Stage, WaitingBound, handoff};

/// Set in the process that does the work: `stage`, or `control` to make one call on purpose.
const ROLE: &str = "QKD_TEST_STRICT";

const TEST: &str = "a_segment_costs_no_system_call";

#[test]
fn a_segment_costs_no_system_call() {
    match std::env::var(ROLE).ok() {
        Some(role) => {
            let (sender, receiver) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                sender.send(nix::unistd::gettid()).unwrap();
                work(role == "control");
            });
            // Ended by the kernel, the thread cannot say so.
            let thread = format!("/proc/self/task/{}", receiver.recv().unwrap());
            while Path::new(&thread).exists() {
                std::thread::sleep(Duration::from_millis(5));
            }
            std::process::exit(1);
        }
        None => {
            assert!(says_done("stage"), "the stage made a system call");
            assert!(!says_done("control"), "system calls are not noticed");
        }
    }
}

/// Runs this very test in a process of its own.
fn says_done(role: &str) -> bool {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", TEST, "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (mut said, mut piece) = (Vec::new(), [0; 256]);
    let mut stdout = child.stdout.take().unwrap();
    let done = loop {
        let len = stdout.read(&mut piece).unwrap();
        said.extend_from_slice(&piece[..len]);
        let done = said.windows(DONE.len()).any(|window| window == DONE);
        if done || len == 0 {
            break done;
        }
    };
    let _ = child.kill();
    let _ = child.wait();
    done
}

const DONE: &[u8] = b"<<done>>";

fn work(control: bool) {
    let pool = pool();
    let bound = WaitingBound {
        keys: 100,
        bytes: 4 << 20,
    };
    let mut stage = Stage::new(pool.clone(), bound, Backend::detect(), [7; 32]);
    let (pusher, mut popper) = handoff(4);
    let plan = order(&[("k1", 0, 64 << 13)], 32, 4096);
    let mut bytes = noise(64 << 10, 1);
    let mut round = |number: u32| {
        bytes[1000..1004].copy_from_slice(&number.to_le_bytes());
        pusher.push(key(&pool, "k1", &bytes)).unwrap();
        let held = stage.hold(popper.pop().unwrap());
        assert!(matches!(held, Hold::Held { .. }));
        drop(stage.format(&plan).unwrap());
        stage.settle(&name("k1"));
    };
    // Pages are touched and the allocator has what it needs.
    (0..100).for_each(&mut round);
    // SAFETY:
    // - From here on the kernel lets this thread read, write and end; any other call ends it.
    let strict = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT) };
    assert_eq!(strict, 0);
    if control {
        std::hint::black_box(nix::unistd::getppid());
    }
    (100..1100).for_each(&mut round);
    // SAFETY:
    // - The bytes are valid for reads, as many as are named.
    unsafe { libc::write(1, DONE.as_ptr().cast(), DONE.len()) };
    loop {
        // The thread cannot even end in the usual way; the parent ends the process.
        std::hint::spin_loop();
    }
}
