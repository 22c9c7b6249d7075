//! Resize and Upsample. The result of resizing a constant, such as a position table that the graph fits to another grid, is
//! computed. Of an activation, only a resize that leaves every element in its place is accepted.

use super::call::Call;
use super::fold;
use super::value::{Rule, Value, axis_in, need};
use super::walk::Walk;
use crate::import::array::Array;
use crate::onnx::graph::Attr;

/// Products that one resize may take.
const WORK_LIMIT: usize = 1 << 28;

/// The positions that one position of the result reads along an axis, with their weights. `None`: it lies outside of the
/// cropped region.
type Taps = Option<Vec<(usize, f64)>>;

/// How the elements of an axis are interpolated.
enum Mode {
    Nearest(String),
    Linear,
    /// With the coefficient `a` of the kernel.
    Cubic(f64),
}

/// What the attributes of a node say.
struct Method {
    coordinates: String,
    mode: Mode,
    antialias: bool,
    exclude_outside: bool,
}

/// One axis: its length before and after, the factor between them, and the region that is cropped, as fractions.
struct Axis {
    at: usize,
    from: usize,
    to: usize,
    scale: f64,
    region: [f64; 2],
}

impl Method {
    fn of(call: &Call<'_>, opset: i64) -> Rule<Self> {
        let old = opset < 11 || call.node.op == "Upsample";
        let mode = match call.text("mode", "nearest")?.as_str() {
            "nearest" if old => Mode::Nearest("floor".into()),
            "nearest" => Mode::Nearest(call.text("nearest_mode", "round_prefer_floor")?),
            "linear" | "bilinear" => Mode::Linear,
            "cubic" => Mode::Cubic(call.float("cubic_coeff_a", -0.75)?),
            other => return Err(format!("a resize with the mode `{other}`")),
        };
        let policy = call.text("keep_aspect_ratio_policy", "stretch")?;
        need!(policy == "stretch", "a resize with keep_aspect_ratio_policy `{policy}`");
        let default = if old { "asymmetric" } else { "half_pixel" };
        Ok(Self {
            coordinates: call.text("coordinate_transformation_mode", default)?,
            mode,
            antialias: call.int("antialias", 0)? != 0,
            exclude_outside: call.int("exclude_outside", 0)? != 0,
        })
    }

    /// Where position `k` of the result lies in the original.
    fn original(&self, axis: &Axis, k: usize) -> Rule<f64> {
        let (k, n, m) = (k as f64, axis.from as f64, axis.to as f64);
        let half = (k + 0.5) / axis.scale - 0.5;
        Ok(match self.coordinates.as_str() {
            "half_pixel" => half,
            "half_pixel_symmetric" => n / 2.0 * (1.0 - m / (n * axis.scale)) + half,
            "pytorch_half_pixel" => {
                if axis.to > 1 {
                    half
                } else {
                    0.0
                }
            }
            "align_corners" => {
                if axis.to > 1 {
                    k * (n - 1.0) / (m - 1.0)
                } else {
                    0.0
                }
            }
            "asymmetric" => k / axis.scale,
            "tf_crop_and_resize" => {
                let [start, end] = axis.region;
                if axis.to > 1 {
                    start * (n - 1.0) + k * (end - start) * (n - 1.0) / (m - 1.0)
                } else {
                    0.5 * (start + end) * (n - 1.0)
                }
            }
            other => return Err(format!("a resize with the coordinate_transformation_mode `{other}`")),
        })
    }

    fn taps(&self, axis: &Axis, k: usize) -> Rule<Taps> {
        let at = self.original(axis, k)?;
        let last = axis.from as f64 - 1.0;
        if self.coordinates == "tf_crop_and_resize" && !(0.0..=last).contains(&at) {
            return Ok(None);
        }
        let clamped = |i: f64| i.clamp(0.0, last) as usize;
        let (radius, a) = match &self.mode {
            Mode::Nearest(how) => {
                // a runtime computes positions in f32, in which most ties are exact
                let at = f64::from(at as f32);
                let nearest = match how.as_str() {
                    "round_prefer_floor" => (at - 0.5).ceil(),
                    "round_prefer_ceil" => (at + 0.5).floor(),
                    "floor" => at.floor(),
                    "ceil" => at.ceil(),
                    other => return Err(format!("a resize with the nearest_mode `{other}`")),
                };
                return Ok(Some(vec![(clamped(nearest), 1.0)]));
            }
            Mode::Linear => (1.0, None),
            Mode::Cubic(a) => (2.0, Some(*a)),
        };
        // antialiasing widens the kernel, so that every element of the original counts
        let wide = if self.antialias { 1.0 / axis.scale.min(1.0) } else { 1.0 };
        let (first, end) = ((at - radius * wide).ceil(), (at + radius * wide).floor());
        let few = end - first <= 4.0 * axis.from as f64 + 8.0;
        need!(few, "a resize by {}", axis.scale);
        let mut taps: Vec<(usize, f64)> = Vec::new();
        let mut i = first;
        while i <= end {
            let weight = kernel(((i - at) / wide).abs(), a);
            if !self.exclude_outside || (0.0..=last).contains(&i) {
                taps.push((clamped(i), weight));
            }
            i += 1.0;
        }
        let sum: f64 = taps.iter().map(|tap| tap.1).sum();
        need!(sum.is_finite() && sum != 0.0, "a resize whose weights sum to {sum}");
        taps.iter_mut().for_each(|tap| tap.1 /= sum);
        Ok(Some(taps))
    }
}

/// The weight at a distance: of the cubic kernel with this coefficient (Keys 1981), or of the linear one.
fn kernel(x: f64, cubic: Option<f64>) -> f64 {
    match cubic {
        None => (1.0 - x).max(0.0),
        Some(a) if x <= 1.0 => ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0,
        Some(a) if x < 2.0 => ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a,
        Some(_) => 0.0,
    }
}

impl Walk<'_> {
    pub(super) fn resize(&mut self, call: &Call<'_>) -> Rule<Value> {
        let from = call.get(0).shape()?;
        let list = |k: usize, what: &str| -> Rule<Option<Vec<f64>>> {
            if !call.has(k) {
                return Ok(None);
            }
            let a = call.get(k).array(what)?;
            need!(a.len() <= 32, "Resize with {} sizes", a.len());
            Ok((!a.is_empty()).then(|| a.f64s()))
        };
        let which = match call.ints("axes")? {
            Some(list) => list.into_iter().map(|a| axis_in(a, from.len())).collect::<Rule<Vec<_>>>()?,
            None => (0..from.len()).collect(),
        };
        let method = Method::of(call, self.graph.opset)?;
        // before opset 11, and in Upsample, the scales follow the operand
        let early = call.inputs.len() == 2 || call.node.op == "Upsample";
        let scales = match call.node.attrs.get("scales") {
            Some(Attr::Floats(scales)) => Some(scales.iter().map(|&s| f64::from(s)).collect()),
            _ => list(if early { 1 } else { 2 }, "the scales of a resize")?,
        };
        let sizes = if early { None } else { list(3, "the size that is resized to")? };
        let region =
            if method.coordinates == "tf_crop_and_resize" { list(1, "the region that is cropped")? } else { None };
        need!(
            method.coordinates != "tf_crop_and_resize" || region.is_some(),
            "a resize of a region that the node does not name"
        );
        let count = which.len();
        let mut axes = Vec::with_capacity(count);
        for (k, &at) in which.iter().enumerate() {
            let n = from[at];
            let (to, scale) = match (&sizes, &scales) {
                (Some(sizes), _) => {
                    let size = sizes.get(k).copied().unwrap_or(0.0);
                    (size, size / n.max(1) as f64)
                }
                (None, Some(scales)) => {
                    let scale = scales.get(k).copied().unwrap_or(0.0);
                    let scale = if (scale - 1.0).abs() < 1e-6 { 1.0 } else { scale };
                    ((n as f64 * scale).floor(), scale)
                }
                (None, None) => return Err("a resize without a size".into()),
            };
            need!((1.0..=65536.0 * 16.0).contains(&to) || to == n as f64, "a resize of {n} to {to}");
            let open = method.mode_is_old_nearest(call, self.graph.opset) && scale < 1.0;
            need!(!open, "a nearest resize to a smaller size, which opset {} leaves open", self.graph.opset);
            let bound = |at: usize| region.as_ref().and_then(|r| r.get(at)).copied();
            let region = [bound(k).unwrap_or(0.0), bound(k + count).unwrap_or(1.0)];
            axes.push(Axis { at, from: n, to: to as usize, scale, region });
        }
        // a size of 4 times 1.1 rounds down to 4: by ONNX's definition the elements move all the same, ONNX Runtime copies them
        if let Some(axis) = axes.iter().find(|axis| axis.from == axis.to && axis.scale != 1.0) {
            return Err(format!(
                "a resize by {} that leaves the size at {}, on which runtimes disagree",
                axis.scale, axis.from
            ));
        }
        axes.retain(|axis| axis.from != axis.to || axis.region != [0.0, 1.0]);
        if axes.is_empty() {
            return Ok(call.get(0).clone());
        }
        let size = |side: fn(&Axis) -> usize| -> String {
            axes.iter().map(|axis| side(axis).to_string()).collect::<Vec<_>>().join("×")
        };
        let (before, after) = (size(|axis| axis.from), size(|axis| axis.to));
        match call.get(0) {
            // a graph that fits its table to any image takes every size, and only the table's own is not arbitrary
            Value::Const(_) if self.guessed => Err(format!(
                "a table is resized from {before} to {after} to fit the image, whose size the file leaves open: choose it with --img-size"
            )),
            Value::Const(c) => {
                resized(&c.array, &axes, &method, call.float("extrapolation_value", 0.0)?).map(Value::from)
            }
            Value::View(v) => {
                if self.pixels(v.e).is_none() {
                    return Err(format!(
                        "an activation is resized from {before} to {after}, as decoders of segmentation or depth models do: a ViT ends \
                         before that; --output with the name of a value below it converts the ViT alone"
                    ));
                }
                let open = self
                    .graph
                    .inputs
                    .iter()
                    .flat_map(|input| input.shape.iter().flatten().skip(1))
                    .any(Option::is_none);
                let flag = if open {
                    format!(", or convert with --img-size {}", after.replace('×', "x"))
                } else {
                    String::new()
                };
                Err(format!(
                    "the graph resizes the image from {before} to {after} before the patches; resizing belongs to the preprocessing: \
                     export the model without it, for images of {after}{flag}"
                ))
            }
            _ => Err("a sequence is resized".into()),
        }
    }
}

impl Method {
    /// Before opset 11, which neighbour is the nearest was not defined.
    fn mode_is_old_nearest(&self, call: &Call<'_>, opset: i64) -> bool {
        matches!(self.mode, Mode::Nearest(_)) && (opset < 11 || call.node.op == "Upsample")
    }
}

/// A constant resized along some axes, one after the other.
fn resized(x: &Array, axes: &[Axis], method: &Method, outside: f64) -> Rule<Array> {
    let nearest = matches!(method.mode, Mode::Nearest(_));
    need!(x.dtype.is_float() || nearest, "integers are resized with interpolation");
    let mut shape = x.shape();
    fold::small(x.len())?;
    let mut values = x.f64s();
    for axis in axes {
        let outer: usize = shape[..axis.at].iter().product();
        let inner: usize = shape[axis.at + 1..].iter().product();
        let all = [outer, inner, axis.to].iter().try_fold(1usize, |n, &m| n.checked_mul(m)).unwrap_or(usize::MAX);
        fold::small(all)?;
        let taps = (0..axis.to).map(|k| method.taps(axis, k)).collect::<Rule<Vec<_>>>()?;
        let most = taps.iter().flatten().map(Vec::len).max().unwrap_or(0);
        need!(all.saturating_mul(most) <= WORK_LIMIT, "a resize of a constant that takes too much work");
        let mut out = vec![0.0; all];
        for o in 0..outer {
            for (k, taps) in taps.iter().enumerate() {
                let to = (o * axis.to + k) * inner;
                let Some(taps) = taps else {
                    out[to..to + inner].fill(f64::NAN);
                    continue;
                };
                for &(i, weight) in taps {
                    let from = (o * axis.from + i) * inner;
                    let row = out[to..to + inner].iter_mut().zip(&values[from..from + inner]);
                    row.for_each(|(sum, v)| *sum += weight * v);
                }
            }
        }
        shape[axis.at] = axis.to;
        values = out;
    }
    if method.coordinates == "tf_crop_and_resize" {
        // what lies outside along any axis has the value for that
        values.iter_mut().filter(|v| v.is_nan()).for_each(|v| *v = outside);
    }
    Ok(if x.dtype.is_float() {
        Array::floats(x.dtype, &shape, &values)
    } else {
        Array::ints(x.dtype, &shape, &values.iter().map(|&v| v as i64).collect::<Vec<_>>())
    })
}
