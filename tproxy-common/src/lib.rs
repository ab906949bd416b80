//! What the eBPF programs and the userspace of tproxy share.
//!
//! Everything here is pure and `no_std`: the parser and the classifier that
//! decide in the kernel are the very code that unit tests, property tests and
//! `tproxy-user check` run.

#![no_std]
#![allow(
    clippy::inline_always,
    reason = "in the kernel program a call costs stack, of which there are 512 bytes"
)]

pub mod abi;
pub mod classify;
pub mod counter;
pub mod flow;
pub mod policy;
pub mod wire;
