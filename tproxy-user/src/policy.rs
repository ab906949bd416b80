//! Rules, and the image of them that the kernel decides by.

pub mod compile;
pub mod facts;
#[cfg(test)]
mod model;
pub mod ranges;
mod scope;
#[cfg(test)]
mod tests;
