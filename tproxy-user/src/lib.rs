//! The userspace of tproxy.
//!
//! Data flows one way: command line → [`config`] → [`plan`] → applied; packet →
//! listener → relay → upstream.

// For test code that the tests of this crate share with those beside it.
#[cfg(test)]
extern crate self as tproxy_user;

pub mod addr;
pub mod app;
pub mod argv;
pub mod cli;
pub mod clsact;
pub mod cmd;
pub mod config;
pub mod datapath;
pub mod doctor;
pub mod failure;
pub mod import;
pub mod instance;
pub mod interfaces;
pub mod limits;
pub mod listener;
mod memory;
pub mod netlink;
pub mod nft;
pub mod output;
pub mod owner;
pub mod plan;
pub mod policy;
pub mod privilege;
pub mod relay;
pub mod reload;
pub mod routing;
pub mod rulebook;
pub mod shutdown;
pub mod sockopt;
pub mod stats;
pub mod status;
pub mod steering;
pub mod sysctl;
pub mod telemetry;
pub mod tun;
mod turn;
pub mod undo;
pub mod upstream;
pub mod wire;
pub mod worker;
