//! Graphs broken in one place: what still converts must answer as the broken graph does, by the reference evaluator.
//!
//! `VIT_MUTATIONS` sets how many are tried, `VIT_MUTATION_SEED` the seed; `tests/mutate.py` does the same with ONNX Runtime
//! as the judge. The importer is tested alone: it must not rely on the verification to catch a mistake.

use std::collections::BTreeMap;

use candle_core::{DType as CandleType, Device, Tensor as CandleTensor};
use vit_model::VisionTransformer;
use vit_model::random::SplitMix64;

use super::case;
use crate::import::{Imported, import};
use crate::onnx;
use crate::onnx::graph::{Attr, DType, Graph, Tensor};
use crate::verify::run::{Value, run};

/// Fixtures of every family that is computed in f32 throughout.
const CASES: [&str; 16] = [
    "timm-base-d18-fused",
    "timm-base-l17-script",
    "timm-base-l9-eager",
    "timm-clip-l12",
    "timm-deit3-l11",
    "timm-dinov2-reg4-d18",
    "timm-distilled-l17",
    "timm-swiglu-l16",
    "hf-clip-l17-sdpa",
    "hf-siglip-cls-l17-sdpa",
    "hf-vit-l17-eager",
    "tv-vit-l17-nofold",
    "wz-haslogits-l11",
    "arch-attn-hd3-l13",
    "hand-msmha-fastgelubias",
    "post-ortvit-timm-l14e",
];

/// Another value for one small element; the element and its new value.
fn nudge(tensor: &mut Tensor, r: &mut SplitMix64) -> Option<String> {
    let count: usize = tensor.dims.iter().product();
    if count == 0 || count > 64 {
        return None;
    }
    let at = r.below(count);
    let mut bytes = tensor.data.read().to_vec();
    let said = match tensor.dtype {
        DType::F32 => {
            let cell = bytes.get_mut(at * 4..at * 4 + 4)?;
            let was = f32::from_le_bytes(cell.try_into().ok()?);
            let now = if was == 0.0 { 0.1 } else { was * [0.5, 1.3, -1.0, 2.0, 1.01][r.below(5)] };
            cell.copy_from_slice(&now.to_le_bytes());
            format!("{was} -> {now}")
        }
        DType::I64 => {
            let cell = bytes.get_mut(at * 8..at * 8 + 8)?;
            let was = i64::from_le_bytes(cell.try_into().ok()?);
            let now = was.saturating_add([-1, 1, 2, -2][r.below(4)]);
            cell.copy_from_slice(&now.to_le_bytes());
            format!("{was} -> {now}")
        }
        _ => return None,
    };
    tensor.data = bytes.into();
    Some(format!("element {at} of {:?}: {said}", tensor.dims))
}

/// Breaks one place; says which, or `None` where there was nothing of the kind.
fn mutate(graph: &mut Graph, r: &mut SplitMix64) -> Option<String> {
    let kind = r.below(9);
    let nodes = graph.nodes.len();
    match kind {
        0 => {
            let found: Vec<usize> = (0..nodes).filter(|&k| graph.nodes[k].op == "Transpose").collect();
            let node = &mut graph.nodes[*r.pick(&found)?];
            let Some(Attr::Ints(perm)) = node.attrs.get_mut("perm") else { return None };
            let (i, j) = (r.below(perm.len()), r.below(perm.len()));
            perm.swap(i, j);
            (i != j).then(|| format!("{}: perm is {perm:?}", node.name))
        }
        1 => {
            let numeric = |a: &Attr| matches!(a, Attr::Float(_) | Attr::Int(_) | Attr::Ints(_));
            let found: Vec<usize> = (0..nodes).filter(|&k| graph.nodes[k].attrs.values().any(numeric)).collect();
            let node = &mut graph.nodes[*r.pick(&found)?];
            let names: Vec<String> = node.attrs.iter().filter(|(_, a)| numeric(a)).map(|(n, _)| n.clone()).collect();
            let name = r.pick(&names)?;
            let attr = node.attrs.get_mut(name)?;
            match attr {
                Attr::Float(v) => *v = if *v == 0.0 { 0.3 } else { *v * [0.5, 1.5, 3.0][r.below(3)] },
                Attr::Int(v) => *v += [-1, 1][r.below(2)],
                Attr::Ints(list) if !list.is_empty() => {
                    let at = r.below(list.len());
                    list[at] += [-1, 1][r.below(2)];
                }
                _ => return None,
            }
            Some(format!("{}: {name} is {attr:?}", node.name))
        }
        2 => {
            // constants of nodes, and small initializers
            let found: Vec<usize> = (0..nodes).filter(|&k| graph.nodes[k].op == "Constant").collect();
            if let (Some(&k), true) = (r.pick(&found), r.below(2) == 0) {
                let Some(Attr::Tensor(tensor)) = graph.nodes[k].attrs.get_mut("value") else { return None };
                return nudge(tensor, r).map(|said| format!("{}: {said}", graph.nodes[k].name));
            }
            let ids: Vec<u32> = graph.initializers.keys().copied().collect();
            let id = *r.pick(&ids)?;
            let said = nudge(graph.initializers.get_mut(&id)?, r)?;
            Some(format!("{}: {said}", graph.name(id)))
        }
        3 | 4 => {
            // two weights of one shape exchanged
            let ids: Vec<u32> = graph.initializers.keys().copied().collect();
            let (a, b) = (*r.pick(&ids)?, *r.pick(&ids)?);
            let (x, y) = (graph.initializers.get(&a)?.clone(), graph.initializers.get(&b)?.clone());
            if a == b || x.dims != y.dims || x.dtype != y.dtype || x.data == y.data {
                return None;
            }
            graph.initializers.insert(a, y);
            graph.initializers.insert(b, x);
            Some(format!("{} and {} exchanged", graph.name(a), graph.name(b)))
        }
        5 => {
            // two operands exchanged
            let found: Vec<usize> = (0..nodes).filter(|&k| graph.nodes[k].inputs.len() >= 2).collect();
            let node = &mut graph.nodes[*r.pick(&found)?];
            let (i, j) = (r.below(node.inputs.len()), r.below(node.inputs.len()));
            if node.inputs[i] == node.inputs[j] {
                return None;
            }
            node.inputs.swap(i, j);
            Some(format!("{} ({}): operands {i} and {j} exchanged", node.name, node.op))
        }
        6 => {
            // an operand replaced by an earlier value
            let k = r.below(nodes);
            let mut pool: Vec<u32> =
                graph.nodes[..k].iter().flat_map(|n| n.outputs.iter().flatten().copied()).collect();
            pool.extend(graph.initializers.keys());
            let other = *r.pick(&pool)?;
            let node = &mut graph.nodes[k];
            let slot = r.below(node.inputs.len().max(1));
            let input = node.inputs.get_mut(slot)?;
            if *input == Some(other) {
                return None;
            }
            *input = Some(other);
            let said = format!("{} ({}): operand {slot}", node.name, node.op);
            Some(format!("{said} is {}", graph.name(other)))
        }
        7 => {
            let swaps = [
                ("Erf", "Tanh"),
                ("Tanh", "Sigmoid"),
                ("Sigmoid", "Tanh"),
                ("Add", "Sub"),
                ("Sub", "Add"),
                ("Mul", "Add"),
                ("Div", "Mul"),
                ("Sqrt", "Neg"),
                ("ReduceMean", "ReduceMax"),
                ("Softmax", "LogSoftmax"),
                ("Gelu", "Relu"),
                ("Relu", "Sigmoid"),
                ("Pow", "Mul"),
            ];
            let to: BTreeMap<&str, &str> = swaps.into();
            let found: Vec<usize> = (0..nodes).filter(|&k| to.contains_key(graph.nodes[k].op.as_str())).collect();
            let node = &mut graph.nodes[*r.pick(&found)?];
            let said = format!("{}: {} becomes", node.name, node.op);
            node.op = to[node.op.as_str()].into();
            Some(format!("{said} {}", node.op))
        }
        _ => {
            // an operator left out: a residual, a bias, a norm
            let one = |k: &usize| graph.nodes[*k].outputs.len() == 1 && !graph.nodes[*k].inputs.is_empty();
            let found: Vec<usize> = (0..nodes).filter(one).collect();
            let node = &mut graph.nodes[*r.pick(&found)?];
            let keep = node.inputs[r.below(node.inputs.len().min(2))];
            keep?;
            let said = format!("{} ({}) left out", node.name, node.op);
            (node.op, node.domain) = ("Identity".into(), String::new());
            node.attrs.clear();
            node.inputs = vec![keep];
            Some(said)
        }
    }
}

/// How far the nearest of the model's answers is from the nearest of the graph's outputs, relative to its magnitude.
fn far(graph: &Graph, imported: &Imported, pixels: &[f32]) -> Result<f64, String> {
    let c = &imported.config;
    let [h, w] = c.img_size;
    let dims = vec![2, c.in_chans, h, w];
    let x = CandleTensor::from_slice(pixels, (2, c.in_chans, h, w), &Device::Cpu).map_err(|e| e.to_string())?;
    let value = Value::reals(DType::F32, dims, pixels.iter().map(|&v| f64::from(v)).collect());
    let outputs = run(graph, vec![value]).map_err(|e| e.to_string())?;
    let model = VisionTransformer::from_weights(c, imported.weights.as_ref(), CandleType::F32, &Device::Cpu)
        .map_err(|e| e.to_string())?;
    let tokens = model.forward_features(&x).map_err(|e| e.to_string())?;
    let mut ours = Vec::new();
    for answer in [model.forward_head(&tokens), model.forward_pre_logits(&tokens)] {
        ours.push(answer.map_err(|e| e.to_string())?);
    }
    ours.push(tokens);
    let mut best = f64::INFINITY;
    for theirs in outputs.iter().filter_map(|o| o.to_f64().ok()) {
        let top = theirs.iter().fold(1e-3, |m: f64, v| m.max(v.abs()));
        for ours in &ours {
            let ours: Vec<f32> = ours.flatten_all().and_then(|t| t.to_vec1()).map_err(|e| e.to_string())?;
            if ours.len() == theirs.len() {
                let worst = ours.iter().zip(&theirs).fold(0.0, |m: f64, (a, b)| {
                    let d = (f64::from(*a) - b).abs();
                    if d.is_nan() { f64::INFINITY } else { m.max(d) }
                });
                best = best.min(worst / top);
            }
        }
    }
    Ok(best)
}

#[test]
fn a_broken_graph_is_refused_or_converted_as_it_is() {
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let count = number("VIT_MUTATIONS", 4000);
    let mut r = SplitMix64(number("VIT_MUTATION_SEED", 7));
    let graphs: Vec<(&str, Graph)> = CASES
        .iter()
        .map(|case| {
            let path = super::case(case).join("model.onnx");
            (*case, onnx::open(&path).unwrap_or_else(|e| panic!("{case}: {e}")).graph)
        })
        .collect();
    let (mut tried, mut refused, mut right, mut unjudged) = (0, 0, 0, 0);
    let mut wrong = Vec::new();
    while tried < count {
        let (case, whole) = r.pick(&graphs).unwrap();
        let mut graph = whole.clone();
        let Some(what) = mutate(&mut graph, &mut r) else { continue };
        tried += 1;
        let Ok(imported) = import(&graph, None, None) else {
            refused += 1;
            continue;
        };
        let c = &imported.config;
        let n = 2 * c.in_chans * c.img_size[0] * c.img_size[1];
        let pixels: Vec<f32> = (0..n).map(|_| (r.below(4001) as f32 - 2000.0) / 1000.0).collect();
        match far(&graph, &imported, &pixels) {
            Ok(far) if far <= 2e-5 => right += 1,
            Ok(far) => wrong.push(format!("{case}: {what}: differs by {far:.1e}")),
            // what cannot be run at all is refused by the proof
            Err(_) => unjudged += 1,
        }
    }
    println!("{tried} tried: {refused} refused, {right} right, {unjudged} cannot be run, {} wrong", wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // a test that refuses or accepts everything would show nothing
    assert!(refused > tried / 3 && right > tried / 20 && unjudged < tried / 50 + 5, "{refused}, {right}, {unjudged}");
}

/// Shapes and weights fit a `Relu` as well; only the exporter's own record tells that it was put there.
#[test]
fn an_activation_that_the_record_contradicts_is_refused() {
    let path = case("timm-onehead-d23").join("model.onnx");
    let mut graph = onnx::open(&path).unwrap().graph;
    assert!(import(&graph, None, None).is_ok() && graph.nodes.iter().any(|node| node.op == "Gelu"));
    for node in graph.nodes.iter_mut().filter(|node| node.op == "Gelu") {
        node.op = "Relu".into();
        node.attrs.clear();
    }
    let said = import(&graph, None, None).map(|_| ()).unwrap_err().to_string();
    assert!(said.contains("gelu") && said.contains("Relu") && said.contains("rename"), "{said}");
    // a model that was trained with it says so, or nothing
    for (k, node) in graph.nodes.iter_mut().enumerate().filter(|(_, node)| node.op == "Relu") {
        node.name = format!("n{k}");
    }
    graph.names.iter_mut().for_each(|name| *name = name.replace("gelu", "v"));
    graph.records.clear();
    assert!(import(&graph, None, None).is_ok());
}
