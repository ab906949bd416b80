//! `tproxy-user`: see `--help`.

fn main() {}
