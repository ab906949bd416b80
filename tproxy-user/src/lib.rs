//! The userspace of tproxy.
//!
//! Data flows one way: command line → [`config`] → [`plan`] → applied; packet →
//! listener → relay → upstream.

pub mod app;
pub mod cli;
pub mod clsact;
pub mod cmd;
pub mod config;
pub mod datapath;
pub mod failure;
pub mod instance;
pub mod interfaces;
pub mod netlink;
pub mod output;
pub mod owner;
pub mod plan;
pub mod privilege;
pub mod routing;
pub mod sysctl;
pub mod telemetry;
pub mod undo;
