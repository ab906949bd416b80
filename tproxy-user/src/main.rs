//! `tproxy-user`: see `--help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    tproxy_user::cmd::main()
}
