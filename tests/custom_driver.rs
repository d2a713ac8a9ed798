//! The example of a driver of one's own keeps the contract that it is an example of.

#[allow(
    dead_code,
    unreachable_pub,
    missing_debug_implementations,
    reason = "an example"
)]
#[path = "../examples/custom_driver.rs"]
mod custom_driver;

#[tokio::test]
async fn the_example_driver_keeps_the_contract() {
    custom_driver::try_it().await.unwrap();
}
