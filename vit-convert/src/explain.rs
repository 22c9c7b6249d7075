//! Reports of an import, as text and as JSON: modules, tensors, evidence and assumptions.

use serde_json::{Value, json};

use crate::import::spec::Imported;

/// The report as JSON: `model`, `input`, `output`, `tensors` (from which constants, by which steps), `modules` (which
/// nodes), `evidence` (what was read from which node), `assumed`, `ignored` and `approximate`.
pub fn report(found: &Imported) -> Value {
    json!({
        "model": found.config,
        "preprocess": found.preprocess,
        "preprocess_known": found.preprocess_known,
        "input": found.input,
        "output": found.output,
        "tensors": found.provenance,
        "modules": found.modules,
        "evidence": found.evidence,
        "assumed": found.assumed,
        "ignored": found.ignored,
        "approximate": found.approximate,
    })
}
