//! Resize and Upsample: each axis in turn, as ONNX's operator documentation defines it.

use super::call::Call;
use super::shape::{Res, count};
use super::value::{Data, Value, is_float};
use crate::onnx::graph::Attr;

/// What is added to a neighbour's position, and its coefficient.
type Neighbours = Vec<(i64, f64)>;

/// Resizes a value, or hands on one that keeps its size.
pub(super) fn resize(call: &mut Call<'_>) -> Res<Value> {
    let upsample = call.node.op == "Upsample";
    let early = upsample || call.opset < 11;
    let word = |name: &str, default: &str| call.str(name, default);
    let mode = word("mode", "nearest")?;
    let transform = word("coordinate_transformation_mode", if early { "asymmetric" } else { "half_pixel" })?;
    let rounding = word("nearest_mode", if early { "floor" } else { "round_prefer_floor" })?;
    if word("keep_aspect_ratio_policy", "stretch")? != "stretch" {
        return Err("there is no rule for keep_aspect_ratio_policy".into());
    }
    let (antialias, exclude) = (call.int("antialias", 0)? != 0, call.int("exclude_outside", 0)? != 0);
    let (a, fill) = (call.float("cubic_coeff_a", -0.75)?, call.float("extrapolation_value", 0.0)?);
    let numbers = |i: usize| call.opt(i).filter(|v| !v.is_empty()).map(Value::to_f64).transpose();
    let scales = match call.node.attrs.get("scales") {
        Some(Attr::Floats(list)) => Some(list.iter().map(|&s| f64::from(s)).collect()),
        _ => numbers(if early { 1 } else { 2 })?,
    };
    let sizes = if early { None } else { numbers(3)? };
    let roi = if early { None } else { numbers(1)? };
    let axes = call.ints("axes")?;
    let mut v = call.take(0)?;
    let axes = match axes {
        Some(axes) => axes.iter().map(|&a| v.axis(a)).collect::<Res<Vec<_>>>()?,
        None => (0..v.rank()).collect(),
    };
    let crop = transform == "tf_crop_and_resize";
    if crop && roi.is_none() {
        return Err("crops a region that it does not name".into());
    }
    for (i, &axis) in axes.iter().enumerate() {
        let n = v.dims[axis];
        let of = |list: &Option<Vec<f64>>, i: usize| list.as_ref().and_then(|list| list.get(i)).copied();
        let (m, scale) = match (of(&sizes, i), of(&scales, i)) {
            (Some(size), _) => (size, size / n as f64),
            (None, Some(s)) if (s - 1.0).abs() < 1e-6 => (n as f64, 1.0),
            (None, Some(s)) => ((n as f64 * s).floor(), s),
            (None, None) => return Err("has no size to resize to".into()),
        };
        let (start, end) = (of(&roi, i).unwrap_or(0.0), of(&roi, i + axes.len()).unwrap_or(1.0));
        if !(m >= 1.0 && m <= f64::from(1 << 24)) || n == 0 {
            return Err(format!("resizes axis {axis} of {:?} to {m}", v.dims));
        }
        if m == n as f64 && scale == 1.0 && (!crop || (start, end) == (0.0, 1.0)) {
            continue;
        }
        if mode == "nearest" && early && scale < 1.0 {
            return Err("there is no rule for the nearest neighbour in a smaller size before opset 11".into());
        }
        let place = |k: usize| -> Res<f64> {
            let (x, n) = (k as f64, n as f64);
            let pixel = (x + 0.5) / scale - 0.5;
            Ok(match transform.as_str() {
                "half_pixel" => pixel,
                "pytorch_half_pixel" if m > 1.0 => pixel,
                "half_pixel_symmetric" => {
                    let adjustment = m / (scale * n);
                    (n / 2.0) * (1.0 - adjustment) + pixel
                }
                "align_corners" if m > 1.0 => x * (n - 1.0) / (m - 1.0),
                "pytorch_half_pixel" | "align_corners" => 0.0,
                "asymmetric" => x / scale,
                "tf_crop_and_resize" if m > 1.0 => start * (n - 1.0) + x * (end - start) * (n - 1.0) / (m - 1.0),
                "tf_crop_and_resize" => 0.5 * (start + end) * (n - 1.0),
                other => return Err(format!("there is no rule for the transformation `{other}`")),
            })
        };
        let shrunk = if antialias { scale.min(1.0) } else { 1.0 };
        let plan = (0..m as usize).map(|k| {
            let at = place(k)?;
            if crop && !(at >= 0.0 && at <= n as f64 - 1.0) {
                return Ok(None);
            }
            let base = at.floor();
            let mut list = neighbours(&mode, &rounding, at, shrunk, a)?;
            for entry in &mut list {
                entry.0 += base as i64;
                if exclude && !(0..n as i64).contains(&entry.0) {
                    entry.1 = 0.0;
                }
            }
            let total: f64 = list.iter().map(|entry| entry.1).sum();
            list.retain(|entry| entry.1 != 0.0);
            Ok(Some(list.into_iter().map(|(i, c)| (i.clamp(0, n as i64 - 1) as usize, c / total)).collect()))
        });
        let plan: Vec<Option<Vec<(usize, f64)>>> = plan.collect::<Res<_>>()?;
        let most = plan.iter().flatten().map(Vec::len).max().unwrap_or(1);
        call.spend(&[v.len() / n, m as usize, most])?;
        v = along(&v, axis, &plan, fill)?;
    }
    Ok(v)
}

/// The neighbours of a position, counted from the integer below it.
fn neighbours(mode: &str, rounding: &str, at: f64, shrunk: f64, a: f64) -> Res<Neighbours> {
    let ratio = at - at.floor();
    if mode == "nearest" {
        // positions are computed in f32, and a tie must be a tie here, too
        let ratio = f64::from(at as f32) - at.floor();
        let up = match rounding {
            "round_prefer_floor" => ratio > 0.5,
            "round_prefer_ceil" => ratio >= 0.5,
            "floor" => ratio >= 1.0,
            "ceil" => ratio > 0.0,
            other => return Err(format!("there is no rule for nearest_mode `{other}`")),
        };
        return Ok(vec![(i64::from(up), 1.0)]);
    }
    let reach = match mode {
        "linear" | "bilinear" => 1.0,
        "cubic" => 2.0,
        other => return Err(format!("there is no rule for the mode `{other}`")),
    };
    let width = (reach / shrunk).ceil();
    if width > f64::from(1 << 20) {
        return Err("resizes by too large a factor".into());
    }
    let width = width as i64;
    let coefficient = |i: i64| {
        let x = ((i as f64 - ratio) * shrunk).abs();
        match (reach == 1.0, x < 1.0, x < 2.0) {
            (true, true, _) => 1.0 - x,
            (false, true, _) => (a + 2.0) * x.powi(3) - (a + 3.0) * x.powi(2) + 1.0,
            (false, false, true) => a * x.powi(3) - 5.0 * a * x.powi(2) + 8.0 * a * x - 4.0 * a,
            _ => 0.0,
        }
    };
    Ok((-width..=width + 1).map(|i| (i, coefficient(i))).collect())
}

/// Sums of places of an axis; a place without a sum gets `fill`.
fn along(v: &Value, axis: usize, plan: &[Option<Vec<(usize, f64)>>], fill: f64) -> Res<Value> {
    let mut dims = v.dims.clone();
    dims[axis] = plan.len();
    let all = count(&dims)?;
    let inner: usize = dims[axis + 1..].iter().product();
    let n = v.dims[axis];
    if !is_float(v.dtype) && !matches!(v.data, Data::F64(_)) && plan.iter().flatten().any(|sum| sum.len() != 1) {
        return Err("interpolates integers".into());
    }
    let data = v.to_f64()?;
    let out = (0..all).map(|at| {
        let (outer, rest) = (at / inner / plan.len(), at % inner);
        match &plan[at / inner % plan.len()] {
            None => fill,
            Some(sum) => sum.iter().map(|&(i, c)| c * data[(outer * n + i) * inner + rest]).sum(),
        }
    });
    let out: Vec<f64> = out.collect();
    Ok(if matches!(v.data, Data::F64(_)) && !is_float(v.dtype) {
        Value { dtype: v.dtype, ..Value::f64(dims, out) }
    } else {
        Value::reals(v.dtype, dims, out)
    })
}
