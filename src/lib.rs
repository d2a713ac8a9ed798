//! QKD Bridge: configuration, wiring and command line around the stages of a key's journey.
//!
//! The stages are crates of their own and know nothing of each other; this one joins them into a
//! [`node`], reads its [`config`], and holds the [`command`]s of the program. It is the only place
//! that reads the environment and the command line, and that gives protocol logic its clock and its
//! random generator.
#![forbid(unsafe_code)]

#[macro_use]
mod output;

pub mod bench;
pub mod command;
pub mod config;
pub mod demo;
pub mod env;
pub mod kek;
pub mod node;
pub mod process;
pub mod service;
