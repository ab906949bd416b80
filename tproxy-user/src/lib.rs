//! The userspace of tproxy.
//!
//! Data flows one way: command line → [`config`] → plan → applied; packet →
//! listener → relay → upstream.

pub mod addr;
pub mod config;
pub mod datapath;
pub mod failure;
pub mod limits;
pub mod listener;
pub mod relay;
pub mod shutdown;
pub mod sockopt;
pub mod stats;
pub mod upstream;
pub mod worker;
