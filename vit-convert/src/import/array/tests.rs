//! Reading a view element by element, against the slow definition.

use super::*;
use crate::import::axes::Pick;
use crate::onnx::graph::DType;

fn iota(dims: &[usize]) -> Array {
    let n: usize = dims.iter().product();
    Array::floats(DType::F32, dims, &(0..n).map(|v| v as f64).collect::<Vec<_>>())
}

/// The slow definition.
fn naive(a: &Array) -> Vec<f64> {
    let all: Vec<f64> = match a.origin() {
        Origin::Computed(t) => t.data.read().as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect(),
        _ => panic!(),
    };
    let mut at = vec![a.offset];
    for d in a.dims.iter().flatten() {
        at = at.iter().flat_map(|p| (0..d.size).map(move |i| p + i * d.stride)).collect();
    }
    at.iter().map(|&p| all[p]).collect()
}

#[test]
fn reading_follows_the_digits() {
    let a = iota(&[70, 6, 45]);
    for perm in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let t = a.transpose(&perm);
        assert_eq!(t.f64s(), naive(&t), "{perm:?}");
        let part = t.pick(1, &Pick::steps(1, 2, 2)).unwrap();
        assert_eq!(part.f64s(), naive(&part), "{perm:?}");
    }
    let wide = iota(&[3]).reshape(&[3, 1]).unwrap().expand(&[2, 3, 4]).unwrap();
    assert_eq!(wide.f64s(), [0., 0., 0., 0., 1., 1., 1., 1., 2., 2., 2., 2.].repeat(2));
}

#[test]
fn concat_finds_neighbours_again() {
    let a = iota(&[9, 4]);
    let parts: Vec<Array> = (0..3).map(|i| a.pick(0, &Pick::range(i * 3, 3)).unwrap()).collect();
    assert_eq!(Array::concat(&parts, 0).unwrap(), a);
    let other = [parts[2].clone(), parts[0].clone()];
    let joined = Array::concat(&other, 0).unwrap();
    assert_eq!(joined.f64s(), [&naive(&parts[2])[..], &naive(&parts[0])[..]].concat());
    let columns: Vec<Array> = [1, 0].iter().map(|&i| a.pick(1, &Pick::range(i, 1)).unwrap()).collect();
    assert_eq!(
        Array::concat(&columns, 1).unwrap().f64s(),
        (0..9).flat_map(|i| [i as f64 * 4. + 1., i as f64 * 4.]).collect::<Vec<_>>()
    );
}

#[test]
fn a_dimension_collapses_only_where_it_repeats() {
    let a = Array::floats(DType::F32, &[2, 3], &[1., 2., 3., 1., 2., 3.]);
    assert_eq!(a.collapse(0).unwrap().f64s(), [1., 2., 3.]);
    assert!(a.collapse(1).is_none());
    let b = Array::floats(DType::F32, &[2, 2], &[1., 2., 1., 2.000001]);
    assert!(b.collapse(0).is_none());
}
