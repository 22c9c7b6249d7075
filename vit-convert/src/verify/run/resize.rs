//! Resize and Upsample, axis by axis: nearest, linear, cubic.

use super::value::{Res, Value};
use super::{Call, one, reduce};

pub(super) fn run(call: &mut Call<'_>) -> Option<Res<Vec<Value>>> {
    match call.node.op.as_str() {
        "Resize" | "Upsample" => one(resize(call)),
        _ => None,
    }
}

struct Plan {
    mode: String,
    coordinates: String,
    nearest: String,
    a: f64,
    exclude_outside: bool,
    antialias: bool,
}

fn resize(call: &mut Call<'_>) -> Res<Value> {
    let old = call.node.op == "Upsample" || call.opset < 11;
    let plan = Plan {
        mode: call.str("mode", "nearest")?,
        coordinates: call.str("coordinate_transformation_mode", if old { "asymmetric" } else { "half_pixel" })?,
        nearest: call.str("nearest_mode", if old { "floor" } else { "round_prefer_floor" })?,
        a: call.float("cubic_coeff_a", -0.75)?,
        exclude_outside: call.int("exclude_outside", 0)? != 0,
        antialias: call.int("antialias", 0)? != 0,
    };
    if call.str("keep_aspect_ratio_policy", "stretch")? != "stretch" {
        return Err("only stretches".into());
    }
    let v = call.input(0)?.clone();
    let axes = match call.ints("axes")? {
        Some(axes) => axes.iter().map(|&a| v.axis(a)).collect::<Res<Vec<_>>>()?,
        None => (0..v.rank()).collect(),
    };
    let (scales, sizes) = if old { (call.opt(1), None) } else { (call.opt(2), call.opt(3)) };
    let given = scales.filter(|s| !s.is_empty()).map(Value::to_f64).transpose()?;
    let given = if given.is_none() && call.node.op == "Upsample" {
        match call.node.attrs.get("scales") {
            Some(crate::graph::Attr::Floats(s)) => Some(s.iter().map(|&s| s as f64).collect()),
            _ => None,
        }
    } else {
        given
    };
    let targets: Vec<(usize, f64)> = match (given, sizes.filter(|s| !s.is_empty())) {
        (Some(scales), _) if scales.len() == axes.len() => {
            let one = |(s, &a): (&f64, &usize)| ((v.dims[a] as f64 * s).floor() as usize, *s);
            scales.iter().zip(&axes).map(one).collect()
        }
        (None, Some(sizes)) if sizes.len() == axes.len() => {
            let sizes = super::layout::sizes(sizes.as_ints()?)?;
            sizes.iter().zip(&axes).map(|(&n, &a)| (n, n as f64 / v.dims[a].max(1) as f64)).collect()
        }
        _ => return Err(format!("scales or sizes do not fit {:?}", v.dims)),
    };
    let mut out = v;
    for (&axis, (n, scale)) in axes.iter().zip(targets) {
        if n != out.dims[axis] || scale != 1.0 {
            out = along(&out, axis, n, scale, &plan)?;
        }
    }
    Ok(out)
}

fn along(v: &Value, axis: usize, n: usize, scale: f64, plan: &Plan) -> Res<Value> {
    let len = v.dims[axis];
    if len == 0 || !(scale.is_finite() && scale > 0.0) {
        return Err(format!("a scale of {scale} over {:?}", v.dims));
    }
    let mut dims = v.dims.clone();
    dims[axis] = n;
    super::value::count(&dims)?;
    let source = |i: usize| -> Res<f64> {
        let i = i as f64;
        Ok(match plan.coordinates.as_str() {
            "half_pixel" => (i + 0.5) / scale - 0.5,
            "pytorch_half_pixel" => {
                if n > 1 {
                    (i + 0.5) / scale - 0.5
                } else {
                    0.0
                }
            }
            "half_pixel_symmetric" => {
                let adjust = n as f64 / (scale * len as f64);
                let centre = len as f64 / 2.0;
                centre * (1.0 - adjust) + (i + 0.5) / scale - 0.5
            }
            "align_corners" => {
                if n > 1 {
                    i * (len as f64 - 1.0) / (scale * len as f64 - 1.0)
                } else {
                    0.0
                }
            }
            "asymmetric" => i / scale,
            other => return Err(format!("coordinate_transformation_mode `{other}` has no rule")),
        })
    };
    // for every output place the input places it reads, with weights
    let (reach, cubic): (f64, bool) = match plan.mode.as_str() {
        "nearest" => (0.0, false),
        "linear" => (1.0, false),
        "cubic" => (2.0, true),
        other => return Err(format!("mode `{other}` has no rule")),
    };
    if plan.antialias && scale < 1.0 && reach > 0.0 {
        return Err("shrinks with antialias, which has no rule".into());
    }
    let kernel = |d: f64| {
        let d = d.abs();
        match cubic {
            false => (1.0 - d).max(0.0),
            true if d <= 1.0 => ((plan.a + 2.0) * d - (plan.a + 3.0)) * d * d + 1.0,
            true if d < 2.0 => ((plan.a * d - 5.0 * plan.a) * d + 8.0 * plan.a) * d - 4.0 * plan.a,
            true => 0.0,
        }
    };
    let mut taps: Vec<Vec<(usize, f64)>> = Vec::with_capacity(n);
    for i in 0..n {
        let x = source(i)?;
        if reach == 0.0 {
            let at = match plan.nearest.as_str() {
                "floor" => x.floor(),
                "ceil" => x.ceil(),
                "round_prefer_ceil" => (x + 0.5).floor(),
                _ => (x - 0.5).ceil(),
            };
            taps.push(vec![(at.clamp(0.0, len as f64 - 1.0) as usize, 1.0)]);
            continue;
        }
        let (first, last) = (x.floor() as i64 - reach as i64 + 1, x.floor() as i64 + reach as i64);
        let mut row = Vec::new();
        for p in first..=last {
            let outside = !(0..len as i64).contains(&p);
            if outside && plan.exclude_outside {
                continue;
            }
            row.push((p.clamp(0, len as i64 - 1) as usize, kernel(x - p as f64)));
        }
        let sum: f64 = row.iter().map(|r| r.1).sum();
        if plan.exclude_outside {
            for tap in &mut row {
                tap.1 /= sum;
            }
        }
        taps.push(row);
    }
    reduce::over_last_sized(v, axis, n, |row, out| {
        for (o, taps) in out.iter_mut().zip(&taps) {
            *o = taps.iter().map(|&(p, w)| row[p] * w).sum();
        }
    })
}
