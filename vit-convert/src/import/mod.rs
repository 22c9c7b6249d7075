//! The importer: evaluates a graph over abstract values, finds a ViT in one of its outputs, and records where each part
//! came from.

pub mod array;
pub mod axes;
mod claims;
pub mod eval;
pub mod expr;
mod outputs;
pub mod recognise;
pub mod spec;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use vit_model::PreprocessConfig;

use crate::import::eval::{Setting, Value, View, Walk};
use crate::import::expr::{Channels, Head, Id};
use crate::import::outputs::{Found, best};
use crate::import::recognise::{Parts, Refusal};
pub use crate::import::spec::Imported;
use crate::import::spec::{Imports, InputSpec, Module, OutputSpec, provenance};
use crate::onnx::graph::{Attr, DType, Graph, Node, Tensor};
use crate::{Error, Result};

/// The sizes that replace a dynamic batch: primes larger than any other size, so that no reshape can confuse the batch with
/// another axis. The graph is walked with both, which must give the same model.
const BATCHES: [usize; 2] = [1_000_003, 1_000_033];

/// Image sizes that are tried if the graph leaves the size open.
const GRID_LIMIT: usize = 400;

/// Nodes that are evaluated in total, over all image sizes that are tried.
const WORK_LIMIT: usize = 8_000_000;

/// Operator sets that the rules cover.
const OPSETS: std::ops::RangeInclusive<i64> = 7..=26;

/// Recovers a ViT from a graph: its configuration, and its tensors under timm's names. `img_size` is for graphs that
/// leave it open; `output` names the answer if the graph has several.
///
/// Large weights are not read here; [`vit_model::weights::Weights::read`] reads them from the file.
///
/// # Errors
///
/// Refuses every graph that is not exactly a ViT of this family, and names the first node that does not fit; a size that the
/// graph does not accept.
pub fn import(graph: &Graph, img_size: Option<Wanted>, output: Option<&str>) -> Result<Imported> {
    let [input] = &graph.inputs[..] else {
        return Err(Error::graph(match graph.inputs.len() {
            0 => "the graph has no input".into(),
            n => format!(
                "the graph has {n} inputs, a ViT has one: the image (weights must be in the file: export_params=True)"
            ),
        }));
    };
    if graph.outputs.is_empty() {
        return Err(Error::graph("the graph has no output"));
    }
    if !OPSETS.contains(&graph.opset) {
        return Err(Error::graph(format!(
            "opset {}, supported are {} to {}",
            graph.opset,
            OPSETS.start(),
            OPSETS.end()
        )));
    }
    if !input.dtype.is_none_or(|t| t.is_float() || t == DType::U8) {
        return Err(Error::graph(format!("the input is of type {:?}, floats or bytes are expected", input.dtype)));
    }
    let Some(dims) = &input.shape else {
        return Err(Error::graph(
            "the input has no declared shape: an image `[batch, channels, height, width]` is expected",
        ));
    };
    let dims: Vec<Option<usize>> =
        dims.iter().map(|d| d.and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0)).collect();
    let Ok(dims) = <[Option<usize>; 4]>::try_from(dims) else {
        return Err(Error::graph("the input is no image `[batch, channels, height, width]`"));
    };
    if dims.iter().flatten().any(|&n| n > 1 << 20) {
        return Err(Error::graph(format!("an input of shape {dims:?}")));
    }
    let kernel = patch_kernel(graph);
    let (images, assumed) = images(graph, dims, kernel, img_size)?;
    let half = precision(graph);
    let mut budget = WORK_LIMIT;
    let mut first = None;
    for image in images {
        let sized = |batch: usize| Setting {
            image: [batch, image[1], image[2], image[3]],
            tolerance: half.tolerance(),
            guessed: !assumed.is_empty(),
        };
        let attempt = |setting: Setting| -> Result<(Found, usize)> {
            let walk = Walk::run(graph, setting)?;
            let nodes = walk.visited.len();
            Ok((best(walk, half != Precision::Single, output)?, nodes))
        };
        match attempt(sized(dims[0].unwrap_or(BATCHES[0]))) {
            Ok((found, _)) => {
                if dims[0].is_none() {
                    let (again, _) = attempt(sized(BATCHES[1]))?;
                    if !agree(&found.parts, &again.parts) {
                        return Err(Error::graph("what the graph computes depends on the size of the batch"));
                    }
                }
                return finish(graph, found, dims, assumed);
            }
            Err(e) => {
                first.get_or_insert(e);
            }
        }
        budget = budget.saturating_sub(graph.nodes.len() + 1);
        if budget == 0 {
            break;
        }
    }
    Err(first.unwrap_or_else(|| {
        Error::graph("the size of the image is dynamic and cannot be told: export with a fixed size")
    }))
}

// -------------------------------------------------------------------------------------------------- before the walk

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Precision {
    Single,
    Half,
    Brain,
}

impl Precision {
    /// The relative error of a constant such as 1.702 in a file of this precision.
    fn tolerance(self) -> f64 {
        match self {
            Self::Single => 1e-5,
            Self::Half => 1.5e-3,
            Self::Brain => 5e-3,
        }
    }
}

/// The coarsest float type of the constants; quantised constants count as the coarsest.
fn precision(graph: &Graph) -> Precision {
    let mut out = Precision::Single;
    let mut see = |t: DType| match t {
        DType::Bf16 => out = Precision::Brain,
        DType::F16 if out == Precision::Single => out = Precision::Half,
        _ => {}
    };
    graph.initializers.values().for_each(|t| see(t.dtype));
    for node in &graph.nodes {
        if let Some(Attr::Tensor(t)) = node.attrs.get("value") {
            see(t.dtype);
        }
        if node.op.starts_with("QLinear") {
            see(DType::Bf16);
        }
    }
    out
}

fn constants(graph: &Graph) -> HashMap<u32, &Tensor> {
    let mut out: HashMap<u32, &Tensor> = graph.initializers.iter().map(|(&id, t)| (id, t)).collect();
    for node in &graph.nodes {
        if let (Some(Attr::Tensor(t)), Some(Some(id))) = (node.attrs.get("value"), node.outputs.first()) {
            out.insert(*id, t);
        }
    }
    out
}

/// The first convolution's weight: `[out, in, height, width]`.
fn patch_kernel(graph: &Graph) -> Option<[usize; 4]> {
    let constants = constants(graph);
    graph.nodes.iter().find_map(|n: &Node| {
        let at = match n.op.as_str() {
            "Conv" | "ConvInteger" => 1,
            "QLinearConv" => 3,
            _ => return None,
        };
        let mut id = (*n.inputs.get(at)?)?;
        // the weights of a quantised or cast model are the input of another node
        for _ in 0..4 {
            if constants.contains_key(&id) {
                break;
            }
            let maker = graph.nodes.iter().find(|m| m.outputs.contains(&Some(id)))?;
            id = (*maker.inputs.first()?)?;
        }
        <[usize; 4]>::try_from(constants.get(&id)?.dims.clone()).ok()
    })
}

/// The size of images, `[height, width]`, that somebody asks for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub size: [usize; 2],
    /// Whether a graph with a size of its own is refused, or keeps it.
    pub required: bool,
}

/// The image sizes to try, in the graph's axis order, and what was assumed.
fn images(
    graph: &Graph,
    dims: [Option<usize>; 4],
    kernel: Option<[usize; 4]>,
    wanted: Option<Wanted>,
) -> Result<(Vec<[usize; 4]>, Vec<String>)> {
    let channels = kernel.map_or(3, |k| k[1]);
    let last = dims[3] == Some(channels) && dims[1] != Some(channels);
    let [c, h, w] = if last { [3, 1, 2] } else { [1, 2, 3] };
    let make = |height: usize, width: usize| {
        let mut out = [0; 4];
        out[c] = dims[c].unwrap_or(channels);
        out[h] = height;
        out[w] = width;
        out
    };
    if let Some(Wanted { size: [height, width], required }) = wanted {
        if dims[h].is_none_or(|n| n == height) && dims[w].is_none_or(|n| n == width) {
            return Ok((vec![make(height, width)], Vec::new()));
        }
        if required {
            return Err(Error::graph(format!("--img-size {height}x{width}: the graph takes images of {dims:?} only")));
        }
    }
    if let (Some(height), Some(width)) = (dims[h], dims[w]) {
        return Ok((vec![make(height, width)], Vec::new()));
    }
    let Some([embed, _, ph, pw]) = kernel else {
        return Err(Error::graph(
            "the size of the image is dynamic, and there is no patch convolution that tells it: export with a fixed size",
        ));
    };
    // a position table has the width of a token; its rows are the tokens
    let mut rows: Vec<usize> = constants(graph)
        .values()
        .filter_map(|t| match t.dims[..] {
            [1, n, d] | [n, d] if d == embed && n > 1 => Some(n),
            _ => None,
        })
        .collect();
    rows.sort_unstable();
    rows.dedup();
    let mut out = Vec::new();
    for n in rows {
        for prefix in [1usize, 0, 2, 5] {
            let Some(patches) = n.checked_sub(prefix).filter(|&p| p > 0) else { continue };
            let mut grids: Vec<(usize, usize)> =
                (1..=patches.min(1 << 12)).filter(|g| patches % g == 0).map(|g| (g, patches / g)).collect();
            // squarest first; between two that are equally square, the taller
            grids.sort_by_key(|&(a, b)| (a.max(b) - a.min(b), a < b));
            for (gh, gw) in grids {
                let (Some(height), Some(width)) = (gh.checked_mul(ph), gw.checked_mul(pw)) else { continue };
                let fits = dims[h].is_none_or(|n| n == height) && dims[w].is_none_or(|n| n == width);
                let image = make(height, width);
                if fits && height <= 1 << 14 && width <= 1 << 14 && !out.contains(&image) {
                    out.push(image);
                }
            }
        }
    }
    out.truncate(GRID_LIMIT);
    let assumed =
        "img_size: the file leaves it open; the squarest grid that its position table allows was taken; --img-size says another".to_string();
    Ok((out, vec![assumed]))
}

// -------------------------------------------------------------------------------------------------- after the walk

/// Refuses an activation if the exporter's record names another.
fn contradiction(walk: &Walk<'_>, parts: &Parts) -> Result<()> {
    for &(act, at) in &parts.acts {
        let Some(node) = born(walk, at) else { continue };
        if let Some((claim, text)) = claims::claim(walk.graph, node)
            && !claims::may_be(claim, act)
        {
            return Err(node.error(format!(
                    "computes {act:?}, but the exporter called it `{text}`: the operator was replaced after the export, and the \
                     weights were not trained with it. Export the model again; if it really is {act:?}, rename the node and its \
                     outputs"
                ),
            ));
        }
    }
    Ok(())
}

fn born<'g>(walk: &Walk<'g>, e: Id) -> Option<&'g Node> {
    walk.visited.get((walk.x.get(e).born as usize).checked_sub(1)?).copied()
}

fn obstacle(walk: &Walk<'_>, k: u32) -> Error {
    match walk.obstacles.get(k as usize) {
        Some(o) => match walk.visited.get(o.node as usize) {
            Some(node) => node.error(o.why.clone()),
            None => Error::graph(o.why.clone()),
        },
        None => Error::graph("an output that is not understood"),
    }
}

fn explain_refusal(walk: &Walk<'_>, view: &View, refusal: &Refusal) -> Error {
    let at = refusal.at.unwrap_or(view.e);
    match born(walk, at) {
        Some(node) => node.error(refusal.why.clone()),
        None => Error::graph(refusal.why.clone()),
    }
}

/// Nodes by module: a node belongs to the module of its result, or of the first node that uses the result.
fn modules(walk: &Walk<'_>, parts: &Parts) -> Vec<Module> {
    let mut of_value: HashMap<u32, &str> = HashMap::new();
    let mut of_node: Vec<Option<&str>> = vec![None; walk.visited.len()];
    for (k, node) in walk.visited.iter().enumerate().rev() {
        let own = node.outputs.iter().flatten().find_map(|&id| match walk.value(id) {
            Value::View(v) => parts.owners.get(&v.e).map(String::as_str),
            _ => None,
        });
        let used = || node.outputs.iter().flatten().find_map(|id| of_value.get(id).copied());
        let module = own.or_else(used);
        of_node[k] = module;
        if let Some(module) = module {
            for id in node.inputs.iter().flatten() {
                of_value.insert(*id, module);
            }
        }
    }
    let mut order: Vec<&str> = Vec::new();
    let mut nodes: HashMap<&str, Vec<String>> = HashMap::new();
    for (node, module) in walk.visited.iter().zip(of_node) {
        let Some(module) = module else { continue };
        nodes.entry(module).or_insert_with(|| {
            order.push(module);
            Vec::new()
        });
        if let Some(list) = nodes.get_mut(module) {
            list.push(node.name.clone());
        }
    }
    order.into_iter().map(|name| Module { name: name.into(), nodes: nodes.remove(name).unwrap_or_default() }).collect()
}

/// Two walks with different batches found the same model.
fn agree(a: &Parts, b: &Parts) -> bool {
    let same = |(x, y): ((&String, &crate::import::array::Array), (&String, &crate::import::array::Array))| {
        x.0 == y.0 && x.1.place() == y.1.place()
    };
    a.config == b.config
        && a.heads == b.heads
        && a.pixels == b.pixels
        && a.tensors.len() == b.tensors.len()
        && a.tensors.iter().zip(&b.tensors).all(same)
}

fn finish(graph: &Graph, found: Found, dims: [Option<usize>; 4], mut assumed: Vec<String>) -> Result<Imported> {
    let Found { parts, output, ignored, outputs, evidence, modules, mut approximate } = found;
    let Some(input) = graph.inputs.first() else { return Err(Error::graph("the graph has no input")) };
    let config = parts.config;
    let [h, w] = config.img_size;
    let last = parts.channels == Channels::Last;
    let bytes = input.dtype.is_some_and(|t| !t.is_float());
    let mut preprocess = PreprocessConfig::for_config(&config);
    let known = !parts.pixels.is_empty();
    if known {
        (preprocess.mean, preprocess.std) = normalisation(&parts.pixels, bytes, &mut assumed)?;
    } else if bytes {
        return Err(Error::graph("the pixels are bytes, and the graph does not normalise them"));
    }
    let half = |t: &crate::import::array::Array| matches!(t.stored_dtype(), DType::F16 | DType::Bf16);
    if parts.tensors.values().any(half) {
        approximate.push("the file computes in 16 bits, the model in 32".into());
    }
    let provenance: BTreeMap<String, _> =
        parts.tensors.iter().map(|(n, a)| (n.clone(), provenance(graph, a))).collect();
    let activation = parts.heads.iter().map(|h| match h {
        Head::Softmax => "softmax",
        Head::LogSoftmax => "log_softmax",
        Head::Sigmoid => "sigmoid",
        Head::ArgMax => "argmax",
        Head::TopK => "top_k",
        Head::Unit => "l2_normalize",
    });
    let shape = if last { [1, h, w, config.in_chans] } else { [1, config.in_chans, h, w] };
    Ok(Imported {
        input: InputSpec { name: graph.name(input.id).into(), shape, channels_last: last, bytes, fixed_batch: dims[0] },
        output: OutputSpec { name: output, activation: activation.collect() },
        weights: Arc::new(Imports::new(parts.tensors)),
        preprocess,
        preprocess_known: known,
        config,
        provenance,
        evidence,
        modules,
        assumed,
        ignored,
        parts: outputs,
        approximate,
    })
}

/// timm's mean and std from what the graph does to a pixel: `scale · p + shift` for each channel.
///
/// A graph over bytes shows all of it: `(p/255 - mean) / std`. For a graph over floats the normalisation went into the
/// weights, and only the range of the pixels is left: 0 to 255 if the scale is small enough for that, 0 to 1 otherwise.
fn normalisation(pixels: &[(f64, f64)], bytes: bool, assumed: &mut Vec<String>) -> Result<(Vec<f64>, Vec<f64>)> {
    if pixels.iter().any(|&(s, c)| !(s.is_finite() && c.is_finite() && s > 0.0)) {
        return Err(Error::graph("the graph scales its pixels by 0, or by what is not a number"));
    }
    if bytes {
        let std: Vec<f64> = pixels.iter().map(|(s, _)| round6(1.0 / (255.0 * s))).collect();
        let mean = pixels.iter().map(|(s, c)| round6(-c / (255.0 * s))).collect();
        return Ok((mean, std));
    }
    let wide = pixels.iter().all(|&(s, _)| s < 0.1);
    assumed.push(format!(
        "preprocess: the graph normalises its pixels itself; they are taken to be from 0 to {}",
        if wide { "255" } else { "1" }
    ));
    let n = pixels.len();
    Ok((vec![0.0; n], vec![if wide { 1.0 / 255.0 } else { 1.0 }; n]))
}

/// Rounds to six digits if f32 arithmetic explains the rest.
fn round6(v: f64) -> f64 {
    let short: f64 = format!("{v:.6}").parse().unwrap_or(v);
    if (short - v).abs() <= 2e-6 * v.abs().max(0.1) { short } else { v }
}
