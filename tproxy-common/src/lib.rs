//! What the eBPF programs and the userspace of tproxy share.
//!
//! Everything here is pure and `no_std`: the parser and the classifier that
//! decide in the kernel are the very code that unit tests, property tests and
//! `tproxy-user check` run.

#![no_std]
#![forbid(unsafe_op_in_unsafe_fn)]

pub mod abi;
pub mod classify;
pub mod counter;
pub mod flow;
pub mod wire;
