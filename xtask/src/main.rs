//! The development tasks of tproxy: `cargo xtask --help`.

fn main() {}
