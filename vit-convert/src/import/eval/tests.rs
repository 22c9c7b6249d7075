//! Every rule that drops a node, with inputs for which it may and inputs for which it must not.

use std::collections::BTreeMap;

use super::*;
use crate::onnx::graph::{DType, Tensor, ValueId, ValueInfo};

/// A graph over an image `x`, made node by node; the names of values are their numbers.
#[derive(Default)]
struct Builder {
    graph: Graph,
}

impl Builder {
    fn new() -> Self {
        let mut b = Self::default();
        let id = b.value();
        b.graph.opset = 17;
        b.graph.inputs = vec![ValueInfo { id, dtype: Some(DType::F32), shape: None }];
        b
    }

    fn value(&mut self) -> ValueId {
        self.graph.names.push(format!("v{}", self.graph.names.len()));
        self.graph.names.len() as u32 - 1
    }

    fn constant(&mut self, dtype: DType, dims: &[usize], data: Vec<u8>) -> ValueId {
        let id = self.value();
        self.graph.initializers.insert(id, Tensor { dtype, dims: dims.to_vec(), data: data.into() });
        id
    }

    fn floats(&mut self, dims: &[usize], values: &[f32]) -> ValueId {
        self.constant(DType::F32, dims, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    fn ints(&mut self, values: &[i64]) -> ValueId {
        self.constant(DType::I64, &[values.len()], values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    fn node(&mut self, op: &str, inputs: &[ValueId], attrs: &[(&str, Attr)]) -> ValueId {
        let out = self.value();
        self.graph.nodes.push(Node {
            name: format!("{op}_{out}"),
            op: op.into(),
            domain: String::new(),
            inputs: inputs.iter().map(|&i| Some(i)).collect(),
            outputs: vec![Some(out)],
            attrs: attrs.iter().map(|(k, v)| ((*k).to_string(), v.clone())).collect::<BTreeMap<_, _>>(),
        });
        out
    }

    /// Tokens `[batch, 4, 6]` from the image, and attention scores `[batch, 4, 4]` of one head.
    fn scores(&mut self) -> ValueId {
        let w = self.floats(&[6, 1, 2, 2], &[0.5; 24]);
        let strides = ("strides", Attr::Ints(vec![2, 2]));
        let patches = self.node("Conv", &[0, w], &[strides]);
        let shape = self.ints(&[0, 6, 4]);
        let rows = self.node("Reshape", &[patches, shape], &[]);
        let tokens = self.node("Transpose", &[rows], &[("perm", Attr::Ints(vec![0, 2, 1]))]);
        let (a, b) = (self.floats(&[6, 6], &[0.25; 36]), self.floats(&[6, 6], &[0.75; 36]));
        let (q, k) = (self.node("MatMul", &[tokens, a], &[]), self.node("MatMul", &[tokens, b], &[]));
        let turned = self.node("Transpose", &[k], &[("perm", Attr::Ints(vec![0, 2, 1]))]);
        self.node("MatMul", &[q, turned], &[])
    }

    fn walk(&self) -> Walk<'_> {
        Walk::run(&self.graph, Setting { image: [1_000_003, 1, 4, 4], tolerance: 1e-5, guessed: false })
            .expect("a walk")
    }
}

/// Both values are the same expression, laid out alike.
fn same(walk: &Walk<'_>, a: ValueId, b: ValueId) -> bool {
    match (walk.value(a), walk.value(b)) {
        (Value::View(x), Value::View(y)) => x.e == y.e && x.dims == y.dims && x.sel == y.sel,
        _ => false,
    }
}

#[test]
fn a_mask_drops_out_only_where_it_is_zero() {
    let mut b = Builder::new();
    let s = b.scores();
    let (zero, causal) = (
        b.floats(&[4, 4], &[0.0; 16]),
        b.floats(&[4, 4], &[0., -9., 0., 0., 0., 0., 0., 0., 0., 0., 0., 0., 0., 0., 0., 0.]),
    );
    let (open, masked) = (b.node("Add", &[s, zero], &[]), b.node("Add", &[s, causal], &[]));
    let soft = b.node("Softmax", &[masked], &[]);
    let walk = b.walk();
    assert!(same(&walk, s, open));
    assert!(!same(&walk, s, masked));
    assert!(matches!(walk.value(soft), Value::Opaque(_)));
}

#[test]
fn where_drops_out_only_where_its_condition_is_the_same_everywhere() {
    let mut b = Builder::new();
    let s = b.scores();
    let low = b.floats(&[], &[f32::NEG_INFINITY]);
    let yes = b.constant(DType::Bool, &[4, 4], vec![1; 16]);
    let mut part = vec![1; 16];
    part[3] = 0;
    let part = b.constant(DType::Bool, &[4, 4], part);
    let (open, masked) = (b.node("Where", &[yes, s, low], &[]), b.node("Where", &[part, s, low], &[]));
    let walk = b.walk();
    assert!(same(&walk, s, open));
    assert!(matches!(walk.value(masked), Value::Opaque(_)));
}

#[test]
fn the_guard_against_nan_drops_out_only_around_its_own_softmax() {
    let mut b = Builder::new();
    let s = b.scores();
    let soft = b.node("Softmax", &[s], &[]);
    let nan = b.node("IsNaN", &[soft], &[]);
    let (zero, one) = (b.floats(&[], &[0.0]), b.floats(&[], &[1.0]));
    let guarded = b.node("Where", &[nan, zero, soft], &[]);
    let other = b.node("Where", &[nan, one, soft], &[]);
    let raw = b.node("Where", &[nan, zero, s], &[]);
    let of_scores = b.node("IsNaN", &[s], &[]);
    let walk = b.walk();
    assert!(same(&walk, soft, guarded));
    for v in [other, raw, of_scores] {
        assert!(matches!(walk.value(v), Value::Opaque(_)));
    }
}

#[test]
fn dropout_drops_out_only_in_evaluation() {
    let mut b = Builder::new();
    let s = b.scores();
    let ratio = b.floats(&[], &[0.1]);
    let (off, on) = (b.constant(DType::Bool, &[], vec![0]), b.constant(DType::Bool, &[], vec![1]));
    let plain = b.node("Dropout", &[s], &[]);
    let (evaluating, training) = (b.node("Dropout", &[s, ratio, off], &[]), b.node("Dropout", &[s, ratio, on], &[]));
    let walk = b.walk();
    assert!(same(&walk, s, plain) && same(&walk, s, evaluating));
    assert!(matches!(walk.value(training), Value::Opaque(_)));
}

#[test]
fn casts_drop_out_only_between_floats() {
    let mut b = Builder::new();
    let s = b.scores();
    let half = b.node("Cast", &[s], &[("to", Attr::Int(10))]);
    let whole = b.node("Cast", &[s], &[("to", Attr::Int(7))]);
    let walk = b.walk();
    assert!(same(&walk, s, half));
    assert!(matches!(walk.value(whole), Value::Opaque(_)));
}

#[test]
fn a_resize_drops_out_only_where_it_keeps_the_size() {
    let mut b = Builder::new();
    let none = b.floats(&[0], &[]);
    let (one, more) = (b.floats(&[4], &[1.0; 4]), b.floats(&[4], &[1., 1., 1.1, 1.1]));
    let same_size = b.node("Resize", &[0, none, one], &[]);
    // 4 · 1.1 rounds down to 4, and moves the pixels all the same
    let moved = b.node("Resize", &[0, none, more], &[]);
    let cropped = b.node(
        "Resize",
        &[0, none, one],
        &[("coordinate_transformation_mode", Attr::Str("tf_crop_and_resize".into()))],
    );
    let walk = b.walk();
    assert!(same(&walk, 0, same_size));
    for v in [moved, cropped] {
        assert!(matches!(walk.value(v), Value::Opaque(_)));
    }
}

#[test]
fn a_table_is_resized_to_an_image_whose_size_is_known_alone() {
    let mut b = Builder::new();
    let (none, table) = (b.floats(&[0], &[]), b.floats(&[1, 1, 2, 2], &[1., 2., 3., 4.]));
    let sizes = b.ints(&[1, 1, 4, 4]);
    let fitted = b.node("Resize", &[table, none, none, sizes], &[("mode", Attr::Str("cubic".into()))]);
    assert!(matches!(b.walk().value(fitted), Value::Const(c) if c.array.shape() == [1, 1, 4, 4]));
    // every size that is tried would fit otherwise
    let setting = Setting { image: [1_000_003, 1, 4, 4], tolerance: 1e-5, guessed: true };
    let walk = Walk::run(&b.graph, setting).unwrap();
    let Value::Opaque(k) = walk.value(fitted) else { panic!("{:?}", walk.value(fitted)) };
    assert!(
        walk.obstacles[*k as usize].why.contains("from 2×2 to 4×4")
            && walk.obstacles[*k as usize].why.contains("--img-size")
    );
}

#[test]
fn a_long_chain_needs_no_stack() {
    let mut b = Builder::new();
    let mut at = b.scores();
    let first = at;
    for _ in 0..30_000 {
        at = b.node("Identity", &[at], &[]);
    }
    let one = b.floats(&[1, 1, 4], &[0.5; 4]);
    for _ in 0..30_000 {
        at = b.node("Mul", &[at, one], &[]);
    }
    let walk = b.walk();
    assert!(!same(&walk, first, at));
    assert!(walk.x.len() > 30_000 || matches!(walk.value(at), Value::View(_)));
}
