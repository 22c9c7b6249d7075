//! What an import found, for a person and for a program: modules, tensors, evidence, and what was assumed.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::spec::Imported;

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

/// The report as text, a few lines for each part.
pub fn text(found: &Imported) -> String {
    let mut out = String::new();
    let c = &found.config;
    // writing to a String cannot fail
    let _ = writeln!(
        out,
        "a ViT of {} blocks, {} wide, {} heads, patches of {}×{} of an image of {}×{}, {} classes",
        c.depth,
        c.embed_dim,
        c.num_heads,
        c.patch_size[0],
        c.patch_size[1],
        c.img_size[0],
        c.img_size[1],
        c.num_classes
    );
    let _ = writeln!(
        out,
        "input `{}` {:?}{}",
        found.input.name,
        found.input.shape,
        if found.input.bytes { " of bytes" } else { "" }
    );
    let under = if found.output.activation.is_empty() {
        String::new()
    } else {
        format!(", under {}", found.output.activation.join(", "))
    };
    let _ = writeln!(out, "output `{}`{under}", found.output.name);
    for (title, lines) in
        [("assumed", &found.assumed), ("not the answer", &found.ignored), ("approximate", &found.approximate)]
    {
        for line in lines {
            let _ = writeln!(out, "{title}: {line}");
        }
    }
    let _ = writeln!(out, "\nread from");
    for e in &found.evidence {
        let _ = writeln!(out, "  {:<24} {} `{}`", e.what, e.op, e.node);
    }
    let _ = writeln!(out, "\ntensors");
    for (name, p) in &found.provenance {
        let _ = writeln!(
            out,
            "  {name:<32} {} {}",
            p.from.join(", "),
            if p.by.is_empty() { String::new() } else { format!("({})", p.by.join(", ")) }
        );
    }
    let _ = writeln!(out, "\nmodules");
    for m in &found.modules {
        let first = m.nodes.first().map_or("", String::as_str);
        let _ = writeln!(out, "  {:<32} {} nodes from `{first}`", m.name, m.nodes.len());
    }
    out
}
