//! Golden packets: the programs run on them in the kernel, by
//! `BPF_PROG_TEST_RUN`, and counters, mark and return code tell what was decided.
//!
//! Each test has a network namespace of its own, so it needs root. In a test
//! run the packet is not "at ingress", so that `bpf_sk_assign` answers
//! EOPNOTSUPP: this counter stands for "was handed to a socket".

mod capture;
mod fragments;
mod headers;
mod kernel;
mod listeners;
mod packets;
mod sides;
mod verifier;
