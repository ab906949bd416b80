//! `tproxy-user` itself.

use std::path::Path;

use anyhow::Result;
use xtask::lab::Lab;
use xtask::lab::proxy::Launch;

use super::{Running, UDP_IDLE};
use crate::bench::limits;

/// Flags with bounds for clients that are all of one address.
pub(crate) fn flags(more: &str) -> Result<String> {
    let (connections, flows) = (limits::connections()?, limits::flows()?);
    Ok(format!(
        "{more} -4 --max-connections {connections} --max-per-client 0 --max-udp-flows {flows} \
         --udp-timeout {UDP_IDLE}s --udp-timeout-unreplied {UDP_IDLE}s"
    ))
}

/// With these flags, and those.
pub(crate) fn start(lab: &Lab, tproxy_user: &Path, more: &str) -> Result<Running> {
    let proxy = Launch::new(lab, &flags(more)?).binary(tproxy_user).start()?;
    Ok(Running { proxy: Some(proxy), ..Running::default() })
}
