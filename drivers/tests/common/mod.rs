//! What the tests of all drivers share.
#![allow(dead_code)] // each of them uses a part

use std::{
    future::Future,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use qkd_drivers::{Event, KeyBlock, KeySource, next_event};

pub(crate) mod device;
pub(crate) mod place;
pub(crate) mod producer;

/// Longer than any event of a test takes, on a slow machine too.
const PATIENCE: Duration = Duration::from_secs(20);

/// The next event, and the key if it is one.
pub(crate) async fn event(source: &mut dyn KeySource) -> (Event, Vec<u8>) {
    let mut out = vec![0xee; source.max_block_bytes()];
    let event = tokio::time::timeout(PATIENCE, next_event(source, &mut out))
        .await
        .expect("an event comes")
        .expect("the source is not gone");
    let key = match &event {
        Event::Key(block) => out[..block.len_bytes()].to_vec(),
        _ => Vec::new(),
    };
    (event, key)
}

/// The next key block; all other events are an error of the test.
pub(crate) async fn key(source: &mut dyn KeySource) -> (KeyBlock, Vec<u8>) {
    match event(source).await {
        (Event::Key(block), key) => (block, key),
        (other, _) => panic!("a key was expected, not {other:?}"),
    }
}

/// Asserts that nothing comes for a while.
pub(crate) async fn assert_quiet(source: &mut dyn KeySource, duration: Duration) {
    let mut out = vec![0; source.max_block_bytes()];
    if let Ok(event) = tokio::time::timeout(duration, next_event(source, &mut out)).await {
        panic!("nothing was expected, not {event:?}");
    }
}

/// How often `source` asks to be polled in `duration`, while it has nothing to say.
pub(crate) async fn wakes_while_idle(source: &mut dyn KeySource, duration: Duration) -> u32 {
    struct Counter {
        wakes: AtomicU32,
        inner: Waker,
    }
    impl Wake for Counter {
        fn wake(self: Arc<Self>) {
            self.wakes.fetch_add(1, Ordering::Relaxed);
            self.inner.wake_by_ref();
        }
    }
    let inner = std::future::poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
    let counter = Arc::new(Counter {
        wakes: AtomicU32::new(0),
        inner,
    });
    let waker = Waker::from(Arc::clone(&counter));
    let mut out = vec![0; source.max_block_bytes()];
    let mut next = pin!(next_event(source, &mut out));
    let idle =
        std::future::poll_fn(
            |_| match next.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(event) => panic!("nothing was expected, not {event:?}"),
                Poll::Pending => Poll::<()>::Pending,
            },
        );
    let _ = tokio::time::timeout(duration, idle).await;
    counter.wakes.load(Ordering::Relaxed)
}
