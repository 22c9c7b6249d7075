//! Rules that the fixtures' graphs do not reach, against values worked out by NumPy's and ONNX's definitions.

use std::collections::BTreeMap;

use super::value::Data;
use super::*;
use crate::onnx::graph::{DType, ValueInfo};

/// One node of a default-domain operator, run over `inputs`.
fn node(op: &str, opset: i64, attrs: &[(&str, Attr)], inputs: &[Value], outputs: usize) -> Result<Vec<Value>, Error> {
    let n = inputs.len() as ValueId;
    let info = |id| ValueInfo { id, dtype: None, shape: None };
    let graph = Graph {
        opset,
        names: (0..n + outputs as ValueId).map(|i| format!("v{i}")).collect(),
        inputs: (0..n).map(info).collect(),
        outputs: (n..n + outputs as ValueId).map(info).collect(),
        nodes: vec![Node {
            name: "n".into(),
            op: op.into(),
            domain: String::new(),
            inputs: (0..n).map(Some).collect(),
            outputs: (n..n + outputs as ValueId).map(Some).collect(),
            attrs: attrs.iter().map(|(k, a)| ((*k).to_string(), a.clone())).collect(),
        }],
        ..Graph::default()
    };
    run(&graph, inputs.to_vec())
}

fn f(dims: &[usize], data: &[f32]) -> Value {
    Value::f32(dims.to_vec(), data.to_vec())
}

fn floats(v: &Value) -> Vec<f64> {
    v.to_f64().unwrap()
}

#[test]
fn broadcasting_follows_numpy() {
    let a = f(&[2, 1, 3], &[0., 1., 2., 10., 11., 12.]);
    let b = f(&[2, 1], &[100., 200.]);
    let out = &node("Add", 17, &[], &[a, b], 1).unwrap()[0];
    assert_eq!(out.dims, [2, 2, 3]);
    assert_eq!(floats(out), [100., 101., 102., 200., 201., 202., 110., 111., 112., 210., 211., 212.]);
}

#[test]
fn an_operand_that_nobody_else_holds_becomes_the_result() {
    let place = |v: &Value| if let Data::F32(x) = &v.data { x.as_ptr() } else { panic!("{v:?}") };
    let all = || f(&[2, 3], &[0., 1., 2., 10., 11., 12.]);
    let (row, column, one) = (f(&[3], &[3., 4., 5.]), f(&[2, 1], &[7., 8.]), f(&[], &[9.]));
    for other in [row, column, one, all()] {
        let fits = other.rank() == 2 && other.len() == 6;
        let (a, b) = (all(), all());
        let (before, after) = (arith::binary(&a, &other, "Sub").unwrap(), arith::binary(&other, &b, "Sub").unwrap());
        let places = [place(&a), place(&b)];
        let reused = [arith::combine(a, other.clone(), "Sub").unwrap(), arith::combine(other, b, "Sub").unwrap()];
        assert_eq!((floats(&reused[0]), floats(&reused[1])), (floats(&before), floats(&after)));
        // of two that fit it is the first
        assert!(places[0] == place(&reused[0]) && (places[1] == place(&reused[1]) || fits));
        assert_eq!([&reused[0].dims, &reused[1].dims], [&before.dims, &after.dims]);
    }
}

#[test]
fn operands_of_two_types_are_refused_by_name() {
    let err = node("Add", 17, &[], &[f(&[1], &[1.]), Value::ints(vec![1])], 1).unwrap_err().to_string();
    assert!(err.contains("node `n` (Add)") && err.contains("F32") && err.contains("I64"), "{err}");
}

#[test]
fn slices_count_from_both_ends_and_backwards() {
    let v = Value::ints((0..10).collect());
    let cut = |s: i64, e: i64, step: i64| {
        let list = |x| Value::ints(vec![x]);
        node("Slice", 17, &[], &[v.clone(), list(s), list(e), list(0), list(step)], 1).unwrap()[0]
            .as_ints()
            .unwrap()
            .to_vec()
    };
    assert_eq!(cut(-3, i64::MAX, 1), [7, 8, 9]);
    assert_eq!(cut(8, -11, -3), [8, 5, 2]);
    assert_eq!(cut(1, 8, 3), [1, 4, 7]);
    assert_eq!(cut(5, 5, 1), [0i64; 0]);
    assert_eq!(cut(i64::MAX, i64::MIN, -4), [9, 5, 1]);
}

#[test]
fn softmax_before_opset_13_is_over_all_later_axes() {
    let x = f(&[1, 2, 2], &[0., 0., 0., 0.]);
    let axis = [("axis", Attr::Int(1))];
    assert_eq!(floats(&node("Softmax", 11, &axis, std::slice::from_ref(&x), 1).unwrap()[0]), [0.25; 4]);
    assert_eq!(floats(&node("Softmax", 13, &axis, &[x], 1).unwrap()[0]), [0.5; 4]);
}

#[test]
fn einsum_traces_transposes_and_contracts() {
    let x = f(&[2, 2], &[1., 2., 3., 4.]);
    let sum = |eq: &'static str, inputs: &[Value]| {
        node("Einsum", 17, &[("equation", Attr::Str(bytes::Bytes::from_static(eq.as_bytes())))], inputs, 1)
            .map(|v| floats(&v[0]))
    };
    assert_eq!(sum("ii->", std::slice::from_ref(&x)).unwrap(), [5.]);
    assert_eq!(sum("ij->ji", std::slice::from_ref(&x)).unwrap(), [1., 3., 2., 4.]);
    assert_eq!(sum("ij,kj", &[x.clone(), x.clone()]).unwrap(), [5., 11., 11., 25.]);
    assert_eq!(sum("...i,i->...", &[x.clone(), f(&[2], &[1., -1.])]).unwrap(), [-1., -1.]);
    assert_eq!(sum("ij,jk,kl->il", &[x.clone(), x.clone(), x.clone()]).unwrap(), [37., 54., 81., 118.]);
    assert!(sum("ij,jk->iz", &[x.clone(), x]).is_err());
}

#[test]
fn convolution_strides_pads_dilates_and_groups() {
    let x = Value::f32(vec![1, 2, 3, 3], (0..18).map(|i| i as f32).collect());
    let ones = Value::f32(vec![2, 1, 2, 2], vec![1.0; 8]);
    let ints = |x: &[i64]| Attr::Ints(x.to_vec());
    let grouped = [("group", Attr::Int(2)), ("strides", ints(&[1, 2])), ("pads", ints(&[0, 1, 0, 0]))];
    let out = &node("Conv", 17, &grouped, &[x.clone(), ones.clone()], 1).unwrap()[0];
    assert_eq!(out.dims, [1, 2, 2, 2]);
    assert_eq!(floats(out), [3., 12., 9., 24., 21., 48., 27., 60.]);
    let wide = [("group", Attr::Int(2)), ("dilations", ints(&[2, 2]))];
    assert_eq!(floats(&node("Conv", 17, &wide, &[x.clone(), ones.clone()], 1).unwrap()[0]), [16., 52.]);
    assert!(node("Conv", 17, &[("kernel_shape", ints(&[3, 3])), ("group", Attr::Int(2))], &[x, ones], 1).is_err());
}

#[test]
fn quantising_rounds_half_to_even_and_saturates() {
    let x = f(&[5], &[0.5, 1.5, -0.5, 400.0, -400.0]);
    let zero = Value::int(DType::I8, vec![], vec![1]);
    let out = &node("QuantizeLinear", 13, &[], &[x, f(&[], &[1.0]), zero], 1).unwrap()[0];
    assert_eq!((out.dtype, out.as_ints().unwrap()), (DType::I8, [1, 3, 1, 127, -128].as_slice()));
}

#[test]
fn half_precision_is_rounded_after_every_node() {
    let one = Value::scalar(DType::F16, 1.0);
    let small = Value::scalar(DType::F16, 2f64.powi(-12));
    assert_eq!(floats(&node("Add", 17, &[], &[one, small], 1).unwrap()[0]), [1.0]);
}

#[test]
fn integers_wrap_and_division_by_zero_is_an_error() {
    let byte = |x| Value::int(DType::U8, vec![], vec![x]);
    assert_eq!(node("Add", 17, &[], &[byte(250), byte(10)], 1).unwrap()[0].as_ints().unwrap(), [4]);
    assert!(node("Div", 17, &[], &[byte(1), byte(0)], 1).is_err());
}

#[test]
fn sizes_are_checked_before_anything_is_allocated() {
    let huge = Value::ints(vec![1 << 40, 1 << 40]);
    let err = node("ConstantOfShape", 17, &[], &[huge], 1).unwrap_err().to_string();
    assert!(err.contains("limit"), "{err}");
    let big = Value::ints(vec![1 << 20]);
    let v = node("ConstantOfShape", 17, &[], &[big], 1).unwrap().remove(0).with_dims(vec![1 << 20, 1]).unwrap();
    let t = v.clone().with_dims(vec![1, 1 << 20]).unwrap();
    assert!(node("MatMul", 17, &[], &[v, t], 1).unwrap_err().to_string().contains("limit"));
}

/// A graph of two inputs and two outputs: `sum = a + b`, and `picked`, which an If takes from one of two bodies. The
/// body that is not taken, and a node that no output needs, hold an operator without a rule.
fn branching() -> Graph {
    let info = |id| ValueInfo { id, dtype: None, shape: None };
    let op = |op: &str, inputs: &[ValueId], outputs: &[ValueId], attrs: BTreeMap<String, Attr>| Node {
        name: op.into(),
        op: op.into(),
        domain: String::new(),
        inputs: inputs.iter().copied().map(Some).collect(),
        outputs: outputs.iter().copied().map(Some).collect(),
        attrs,
    };
    let none = BTreeMap::new;
    let body = |node: Node, output| {
        Attr::Graph(Box::new(SubGraph {
            inputs: vec![],
            outputs: vec![output],
            initializers: BTreeMap::new(),
            nodes: vec![node],
        }))
    };
    let attrs = BTreeMap::from([
        ("then_branch".to_string(), body(op("Neg", &[3], &[5], none()), 5)),
        ("else_branch".to_string(), body(op("Unknown", &[3], &[6], none()), 6)),
    ]);
    Graph {
        opset: 17,
        names: (0..8).map(|i| format!("v{i}")).collect(),
        inputs: vec![info(0), info(1), info(2)],
        outputs: vec![info(3), info(4), info(7)],
        nodes: vec![op("Add", &[1, 2], &[3], none()), op("If", &[0], &[4], attrs), op("Unknown", &[3], &[7], none())],
        ..Graph::default()
    }
}

#[test]
fn only_what_the_outputs_need_is_run() {
    let graph = branching();
    let bool = |x| Value::int(DType::Bool, vec![], vec![x]);
    let run = |condition, outputs: &[ValueId]| {
        let inputs = vec![bool(condition), f(&[2], &[1., 2.]), f(&[2], &[10., 20.])];
        run_watched(&graph, inputs, outputs, Arithmetic::AsStored, &mut |_, _| {})
    };
    assert_eq!(floats(&run(0, &[3]).unwrap()[0]), [11., 22.]);
    // in the order that they are asked for
    let both = run(1, &[4, 3]).unwrap();
    assert_eq!([floats(&both[0]), floats(&both[1])], [[-11., -22.], [11., 22.]]);
    for outputs in [&[7][..], &[3, 7]] {
        let error = run(1, outputs).unwrap_err().to_string();
        assert!(error.contains("Unknown") && error.contains("no rule"), "{error}");
    }
    assert!(run(0, &[4]).unwrap_err().to_string().contains("Unknown"));
}

#[test]
fn a_resize_repeats_the_nearest_and_padding_that_changes_the_size_has_no_rule() {
    let x = f(&[1, 1, 2, 2], &[1., 2., 3., 4.]);
    let (none, list) = (f(&[0], &[]), |n: &[f32]| f(&[n.len()], n));
    let resize = |scales: Value| node("Resize", 17, &[], &[x.clone(), none.clone(), scales], 1);
    assert_eq!(floats(&resize(list(&[1., 1., 1., 1.])).unwrap()[0]), [1., 2., 3., 4.]);
    let twice = &resize(list(&[1., 1., 1., 2.])).unwrap()[0];
    assert_eq!((twice.dims.as_slice(), floats(twice)), (&[1, 1, 2, 4][..], vec![1., 1., 2., 2., 3., 3., 4., 4.]));
    let pad = |pads: &[i64]| node("Pad", 17, &[], &[x.clone(), Value::ints(pads.to_vec())], 1);
    assert_eq!(floats(&pad(&[0; 8]).unwrap()[0]), [1., 2., 3., 4.]);
    assert!(pad(&[0, 0, 1, 0, 0, 0, 0, 0]).is_err());
}
