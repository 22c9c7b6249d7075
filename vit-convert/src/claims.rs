//! What an exporter's own record says a node is, against what its operator is: a file in which the two disagree was edited.
//!
//! `node_gelu` that is a `Relu` computes something else than the model that was exported, and nothing in the dataflow
//! shows it. Names decide nothing here: they only make a contradiction visible.

use vit_model::config::Activation;

use crate::graph::{Graph, Node};

/// What a node is called by its exporter, where that is the name of one activation; and where the name stands.
///
/// Looked at are the last part of the node's name and of its outputs' (the parts before it are modules, which people name
/// as they like), and the PyTorch exporter's record of the operation (`aten.gelu.default`).
pub fn claim<'g>(graph: &'g Graph, node: &'g Node) -> Option<(&'static str, &'g str)> {
    let outputs = node.outputs.iter().flatten().map(|&id| last(graph.name(id)));
    let record = node.outputs.iter().flatten().filter_map(|id| graph.records.get(id)).map(String::as_str);
    std::iter::once(last(&node.name)).chain(outputs).chain(record).find_map(|text| Some((activation(text)?, text)))
}

/// A node that is so called may be this activation, or a step of it where it is spelled out.
pub fn may_be(claim: &str, act: Activation) -> bool {
    match act {
        Activation::Gelu | Activation::GeluTanh if matches!(claim, "gelu" | "gelu_tanh") => true,
        Activation::Gelu => claim == "erf",
        Activation::GeluTanh => claim == "tanh",
        // classes called GELU have been given this formula too
        Activation::QuickGelu => matches!(claim, "quick_gelu" | "gelu" | "sigmoid"),
        Activation::Relu => claim == "relu",
        Activation::Silu => matches!(claim, "silu" | "sigmoid"),
    }
}

/// `/blocks/blocks.0/mlp/act/Relu_output_0` → `Relu_output_0`.
fn last(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// The one activation that a text names as a whole word; `None` where it names none, or several.
fn activation(text: &str) -> Option<&'static str> {
    let lower = text.to_ascii_lowercase();
    let words: Vec<&str> = lower
        .split(|c: char| !c.is_ascii_alphanumeric())
        .map(|word| if word == "relu6" { word } else { word.trim_end_matches(|c: char| c.is_ascii_digit()) })
        .filter(|word| !word.is_empty())
        .collect();
    let mut found = None;
    for (at, word) in words.iter().enumerate() {
        let before = at.checked_sub(1).and_then(|at| words.get(at)).copied().unwrap_or_default();
        let own = match (before, *word) {
            ("quick", "gelu") | (_, "quickgelu") => "quick_gelu",
            (_, "gelu") => "gelu",
            (_, "fastgelu" | "biasgelu") => "gelu_tanh",
            ("leaky", "relu") | (_, "leakyrelu") => "leaky_relu",
            (_, "relu") => "relu",
            (_, "silu" | "swish") => "silu",
            ("hard", "sigmoid") | (_, "hardsigmoid") => "hard_sigmoid",
            (_, "sigmoid") => "sigmoid",
            (_, "tanh") => "tanh",
            (_, "erf") => "erf",
            (_, "elu") => "elu",
            (_, "selu") => "selu",
            (_, "mish") => "mish",
            _ => continue,
        };
        // a name may hold one word twice, `gelu_1/Gelu`, or say how: `gelu_tanh`
        match found {
            None => found = Some(own),
            Some(other) if other == own => {}
            Some("gelu") if own == "tanh" || own == "erf" => {}
            Some(_) => return None,
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_whole_word_is_a_claim_and_parts_of_words_are_none() {
        for (text, want) in [
            ("node_gelu", Some("gelu")),
            ("gelu_1", Some("gelu")),
            ("node_Gelu_12", Some("gelu")),
            ("QuickGelu_3", Some("quick_gelu")),
            ("node_quick_gelu_1", Some("quick_gelu")),
            ("Relu_output_0", Some("relu")),
            ("leaky_relu", Some("leaky_relu")),
            ("torch.ops.aten.silu.default", Some("silu")),
            ("gelu_tanh", Some("gelu")),
            ("gelu_or_relu", None),
            ("regelung", None),
            ("val_12", None),
            ("Mul_1", None),
            ("", None),
        ] {
            assert_eq!(activation(text), want, "{text}");
        }
    }

    #[test]
    fn modules_in_a_path_are_no_claim() {
        assert_eq!(last("/mlp/relu/Mul_output_0"), "Mul_output_0");
    }

    #[test]
    fn every_activation_may_be_called_by_its_own_name_and_not_by_another() {
        let all = [
            (Activation::Gelu, "gelu"),
            (Activation::GeluTanh, "gelu"),
            (Activation::QuickGelu, "quick_gelu"),
            (Activation::Relu, "relu"),
            (Activation::Silu, "silu"),
        ];
        for (act, name) in all {
            assert!(may_be(name, act), "{act:?}");
        }
        assert!(!may_be("gelu", Activation::Relu) && !may_be("relu", Activation::Gelu));
        assert!(!may_be("silu", Activation::Relu) && !may_be("gelu", Activation::Silu));
    }
}
