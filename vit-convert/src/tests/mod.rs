//! Tests of the importer and the evaluator over the exporters' files in `tests/fixtures/zoo`.

mod evaluator;
mod mutation;
mod operators;

use std::path::PathBuf;

/// The files of a case.
fn case(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/zoo").join(name)
}
