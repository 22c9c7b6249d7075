//! verify

pub mod run;
