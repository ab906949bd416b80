//! Rules, and the image of them that the kernel decides by.

pub mod asked;
pub mod compile;
pub mod domains;
pub mod explain;
pub mod facts;
pub mod hostname;
pub mod learned;
#[cfg(test)]
mod model;
pub mod names;
pub mod question;
pub mod ranges;
pub mod rules;
mod scope;
mod settled;
pub mod targets;
#[cfg(test)]
mod tests;
