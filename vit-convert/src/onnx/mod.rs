//! Bytes → [`Graph`]: the only module that knows protobuf.
//!
//! Reading checks what later steps rely on: each value is made exactly once and before it is read, each tensor has as
//! many bytes as its type and shape need, every function is inlined, and nothing exceeds `limits`.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

mod build;
mod external;
pub mod graph;
mod limits;
mod proto;
mod skeleton;
mod sort;
pub mod stored;
mod tensor;

use std::{collections::BTreeMap, path::Path, sync::Arc};

use bytes::Bytes;
use prost::Message;

use build::domain;
use graph::Graph;
use stored::StoredFile;

use crate::{Error, Result};

/// An ONNX file: its graph, and the file itself.
pub struct Model {
    /// The graph.
    pub graph: Graph,
    /// The file (external data not included).
    pub file: Arc<StoredFile>,
}

/// Reads an ONNX file and its external data, and keeps the file open.
pub fn open(path: &Path) -> Result<Model> {
    let file = open_file(path)?;
    let folder = external::Folder::of(path, file.clone())?;
    let mut graph = parse(&file, &folder).map_err(|error| error.at(path))?;
    graph.files = folder.files().clone().list();
    graph.check()?;
    Ok(Model { graph, file })
}

/// A model's file.
fn open_file(path: &Path) -> Result<Arc<StoredFile>> {
    if path.is_dir() {
        return Err(Error::file(path, "is a folder; name the .onnx file in it"));
    }
    let file = StoredFile::open(path)?;
    if file.is_empty() {
        return Err(Error::file(path, "is an empty file"));
    }
    let start = file.read(0, usize::try_from(file.len()).unwrap_or(LOOK).min(LOOK));
    file.check()?;
    if let Some(what) = looks_like(&start) {
        return Err(Error::file(path, format!("is no ONNX model but {what}")));
    }
    Ok(Arc::new(file))
}

/// The first bytes of a file, which reveal its format.
const LOOK: usize = 512;

fn parse(file: &StoredFile, folder: &external::Folder) -> Result<Graph> {
    let mut model = proto::ModelProto::decode(Bytes::from(skeleton::of(file)?))
        .map_err(|error| Error::graph(format!("not an ONNX file, or a damaged one: {error}")))?;
    let opsets = opsets(&model.opset_import)?;
    let opset = *opsets.get("").ok_or_else(|| {
        Error::graph("says nothing of the version of its operators (opset_import); was the file copied completely?")
    })?;
    if !limits::OPSETS.contains(&opset) {
        let (low, high) = (limits::OPSETS.start(), limits::OPSETS.end());
        return Err(Error::graph(format!(
            "uses opset {opset}; {low} to {high} are understood: export it again with one of these (17 is a good choice)"
        )));
    }
    if model.graph.is_none() {
        return Err(Error::graph("holds no graph: not an ONNX model"));
    }
    normalise(&mut model, folder)?;
    let mut graph = build::build(&model, &opsets, &folder.files())?;
    graph.producer = format!("{} {}", model.producer_name.trim(), model.producer_version.trim());
    graph.producer.truncate(graph.producer.trim_end().len());
    graph.opset = opset;
    graph.opsets = opsets.into_iter().filter(|(domain, _)| !domain.is_empty()).collect();
    graph.metadata = model.metadata_props.into_iter().map(|entry| (entry.key, entry.value)).collect();
    Ok(graph)
}

/// Versions by domain; ONNX's own has the name `""` here.
fn opsets(entries: &[proto::OperatorSetIdProto]) -> Result<BTreeMap<String, i64>> {
    let mut opsets = BTreeMap::new();
    for entry in entries {
        let domain = domain(&entry.domain);
        let before = opsets.insert(domain.to_owned(), entry.version);
        if before.is_some_and(|version| version != entry.version) {
            return Err(Error::graph(format!("imports two versions of the operators `{domain}`")));
        }
    }
    Ok(opsets)
}

/// Checks every tensor of the file, and moves its elements to one field.
fn normalise(model: &mut proto::ModelProto, folder: &external::Folder) -> Result<()> {
    let mut graphs: Vec<&mut proto::GraphProto> = model.graph.iter_mut().collect();
    let mut nodes: Vec<&mut proto::NodeProto> = Vec::new();
    let mut attributes: Vec<&mut proto::AttributeProto> = Vec::new();
    for function in &mut model.functions {
        nodes.extend(&mut function.node);
        attributes.extend(&mut function.attribute_proto);
    }
    loop {
        if let Some(attribute) = attributes.pop() {
            for tensor in attribute.t.iter_mut().chain(&mut attribute.tensors) {
                tensor::normalise(tensor, folder).map_err(|error| match error {
                    Error::Tensor { name, why } if name.is_empty() => {
                        Error::tensor(format!("attribute {}", attribute.name), why)
                    }
                    other => other,
                })?;
            }
            graphs.extend(attribute.g.iter_mut().chain(&mut attribute.graphs));
        } else if let Some(node) = nodes.pop() {
            attributes.extend(&mut node.attribute);
        } else if let Some(graph) = graphs.pop() {
            if let Some(sparse) = graph.sparse_initializer.first() {
                let name = sparse.values.as_ref().map_or("", |values| values.name.as_str());
                return Err(Error::tensor(name, "is sparse, which is not supported: export it dense"));
            }
            for tensor in &mut graph.initializer {
                tensor::normalise(tensor, folder)?;
            }
            nodes.extend(&mut graph.node);
        } else {
            return Ok(());
        }
    }
}

/// What a file that is no ONNX model looks like.
fn looks_like(start: &[u8]) -> Option<&'static str> {
    let text = String::from_utf8_lossy(start).trim_start().to_ascii_lowercase();
    let kinds: [(&[u8], &str); 6] = [
        (b"\x1f\x8b", "a gzip archive: unpack it first"),
        (b"PK\x03\x04", "a zip archive (perhaps a PyTorch checkpoint): it must be exported to ONNX first"),
        (b"\x80\x02", "a Python pickle (perhaps a PyTorch checkpoint): it must be exported to ONNX first"),
        (b"\x89HDF", "an HDF5 file (perhaps a Keras model): it must be exported to ONNX first"),
        (b"ORTM", "an ONNX Runtime .ort file: convert the .onnx file it was made from"),
        (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with `git lfs pull`"),
    ];
    if let Some((_, what)) = kinds.iter().find(|(magic, _)| start.starts_with(magic)) {
        return Some(what);
    }
    if start.get(4..8) == Some(b"ORTM") {
        return Some("an ONNX Runtime .ort file: convert the .onnx file it was made from");
    }
    if start.get(8) == Some(&b'{') && start.get(2..8) == Some(&[0; 6]) {
        return Some("a safetensors file, which needs no conversion");
    }
    if text.starts_with("<!doctype") || text.starts_with("<html") || text.starts_with("<?xml") {
        return Some("a web page: the download went wrong");
    }
    if start.iter().all(|&b| b == 0) {
        return Some("a file of zeros: the download or copy went wrong");
    }
    let printable = |b: &u8| matches!(b, b'\t' | b'\n' | b'\r' | 0x20..=0x7e | 0x80..);
    (std::str::from_utf8(start).is_ok() && start.iter().all(printable)).then_some("a text file")
}
