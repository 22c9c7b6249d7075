//! Compares what the exporter called a node with what the node computes. If they disagree, the file was edited.
//!
//! A `node_gelu` that is a `Relu` computes something other than the exported model, and the dataflow does not show it.
//! Names decide nothing in the importer; here they only reveal a contradiction.

use vit_model::config::Activation;

use crate::onnx::graph::{Graph, Node};

/// The activation that the exporter's name for a node mentions, and the text that mentions it.
///
/// This reads the last part of the names of the node and its outputs (the parts before it are modules, which people
/// name as they like), and the PyTorch exporter's record of the operation (`aten.gelu.default`).
pub fn claim<'g>(graph: &'g Graph, node: &'g Node) -> Option<(&'static str, &'g str)> {
    let outputs = node.outputs.iter().flatten().map(|&id| last(graph.name(id)));
    let record = node.outputs.iter().flatten().filter_map(|id| graph.records.get(id)).map(String::as_str);
    std::iter::once(last(&node.name)).chain(outputs).chain(record).find_map(|text| Some((activation(text)?, text)))
}

/// May a node of this name be this activation, or a step of it?
pub fn may_be(claim: &str, act: Activation) -> bool {
    match act {
        Activation::Gelu | Activation::GeluTanh if matches!(claim, "gelu" | "gelu_tanh") => true,
        Activation::Gelu => claim == "erf",
        Activation::GeluTanh => claim == "tanh",
        // some models use this formula in a class called GELU
        Activation::QuickGelu => matches!(claim, "quick_gelu" | "gelu" | "sigmoid"),
        Activation::Relu => claim == "relu",
        Activation::Silu => matches!(claim, "silu" | "sigmoid"),
        _ => false,
    }
}

/// `/blocks/blocks.0/mlp/act/Relu_output_0` → `Relu_output_0`.
fn last(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// The activation that a text names as a whole word; `None` if it names none, or several.
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
        // a name may contain one word twice (`gelu_1/Gelu`) or say which formula (`gelu_tanh`)
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
