//! Classify.
