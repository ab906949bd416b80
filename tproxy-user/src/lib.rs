//! The userspace of tproxy.
//!
//! Data flows one way: command line → [`config`] → plan → applied; packet →
//! listener → relay → upstream.

pub mod config;
pub mod datapath;
pub mod failure;
