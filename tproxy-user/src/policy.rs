//! Rules, and the image of them that the kernel decides by.

pub mod asked;
pub mod compile;
pub mod domains;
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

/// What the relay has to know of the rules; one for all who have a copy.
#[derive(Clone, Debug, Default)]
pub struct Relayed {
    /// Where diverted flows go.
    pub targets: targets::Targets,
    /// The rules that ask for names.
    pub asked: asked::Asked,
}
