//! Rules, and the image of them that the kernel decides by.

pub mod compile;
pub mod explain;
pub mod facts;
#[cfg(test)]
mod model;
pub mod names;
pub mod question;
pub mod ranges;
pub mod rules;
mod scope;
pub mod targets;
#[cfg(test)]
mod tests;
