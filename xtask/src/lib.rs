//! What the tasks of `cargo xtask` share with the end-to-end tests: a lab of
//! network namespaces.

pub mod lab;
