//! Quantised graphs: weights are dequantised, activations are not rounded, and the result is marked as an
//! approximation.

use std::sync::Arc;

use super::call::Call;
use super::fold;
use super::norm::Reduce;
use super::value::{Const, Factor, Rule, Value, View, axis_in, need};
use super::walk::Walk;
use crate::import::array::{Array, Blocks};
use crate::import::axes;
use crate::import::expr::{Func, Head, Id, Op};
use crate::onnx::graph::DType;

impl Walk<'_> {
    fn approximated(&mut self, why: &str) {
        if !self.approximate.iter().any(|w| w == why) {
            self.approximate.push(why.into());
        }
    }

    /// Integers as floats: `(codes - zero) · scale`. A one-dimensional scale or zero point runs along `axis`.
    fn dequantised(codes: &Array, scale: &Array, zero: Option<&Array>, axis: i64, block: usize) -> Rule<Array> {
        need!(
            !codes.dtype.is_float() && scale.dtype.is_float(),
            "codes of type {:?} and scales of type {:?}",
            codes.dtype,
            scale.dtype
        );
        let rank = codes.rank();
        let lay = |a: &Array| -> Rule<Array> {
            if a.len() == 1 {
                return a.reshape(&[]).ok_or_else(|| "a scale".into());
            }
            let k = axis_in(axis, rank)?;
            if a.rank() == 1 {
                need!(a.len() == codes.dim(k), "{} scales for {} channels", a.len(), codes.dim(k));
                let mut shape = vec![1; rank];
                shape[k] = a.len();
                return a.reshape(&shape).ok_or_else(|| "a scale".into());
            }
            // one scale for each block along the axis
            need!(
                a.rank() == rank
                    && block > 0
                    && (0..rank).all(|i| if i == k {
                        a.dim(i).checked_mul(block) == Some(codes.dim(i))
                    } else {
                        a.dim(i) == codes.dim(i)
                    }),
                "blocked scales of shape {:?} for {:?}",
                a.shape(),
                codes.shape()
            );
            let mut cut = a.shape();
            cut.insert(k + 1, 1);
            let mut wide = a.shape();
            wide.insert(k + 1, block);
            let out = a.reshape(&cut).and_then(|a| a.expand(&wide)).and_then(|a| a.reshape(&codes.shape()));
            out.ok_or_else(|| "blocked scales".into())
        };
        let zero = match zero {
            Some(z) if z.uniform() != Some(0.0) => Some(lay(z)?),
            _ => None,
        };
        let scale = lay(scale)?;
        let small = codes.len() <= 64;
        let out = Array::dequantised(codes.clone(), &scale, zero.as_ref())?;
        Ok(if small { Array::floats(DType::F32, &out.shape(), &out.f64s()) } else { out })
    }

    /// `QuantizeLinear` does not change an activation, and rounds a small constant.
    pub(super) fn quantize(&mut self, call: &Call<'_>) -> Rule<Value> {
        let scale = call.get(1).array("the scale")?;
        need!(scale.dtype.is_float(), "a scale of type {:?}", scale.dtype);
        match call.get(0) {
            Value::View(v) => {
                need!(!matches!(self.x.op(v.e), Op::Raw | Op::Out(_)), "the pixels are quantised");
                self.approximated("activations are quantised in the file, and not in the model");
                Ok(call.get(0).clone())
            }
            Value::Const(c) => {
                let zero = if call.has(2) { Some(call.get(2).array("the zero point")?) } else { None };
                need!(
                    c.array.len() <= 4096 && scale.len() == 1 && zero.is_none_or(|z| z.len() == 1),
                    "a large constant is quantised in the graph"
                );
                let (s, z) = (scale.f64s()[0], zero.map_or(0.0, |z| z.f64s()[0]));
                let dtype = zero.map_or(DType::U8, |z| z.dtype);
                let (lo, hi) = match dtype {
                    DType::I8 => (-128.0, 127.0),
                    DType::U8 => (0.0, 255.0),
                    DType::I16 => (-32768.0, 32767.0),
                    DType::U16 => (0.0, 65535.0),
                    other => return Err(format!("codes of type {other:?}")),
                };
                let codes: Vec<i64> =
                    c.array.f64s().iter().map(|v| ((v / s).round_ties_even() + z).clamp(lo, hi) as i64).collect();
                Ok(Array::ints(dtype, &c.array.shape(), &codes).into())
            }
            _ => Err("a sequence is quantised".into()),
        }
    }

    pub(super) fn dequantize(&mut self, call: &Call<'_>) -> Rule<Value> {
        let scale = call.get(1).array("the scale")?;
        match call.get(0) {
            Value::View(v) => {
                need!(*self.x.op(v.e) != Op::Raw, "the pixels are dequantised by the graph");
                need!(
                    !matches!(self.x.op(v.e), Op::IntLinear { .. } | Op::IntPatch { .. }),
                    "an integer product is dequantised"
                );
                Ok(call.get(0).clone())
            }
            Value::Const(c) => {
                self.approximated("weights are dequantised");
                let zero = if call.has(2) { Some(call.get(2).array("the zero point")?) } else { None };
                let block = usize::try_from(call.int("block_size", 0)?).map_err(|_| "block_size")?;
                Ok(Self::dequantised(&c.array, scale, zero, call.int("axis", 1)?, block)?.into())
            }
            _ => Err("a sequence is dequantised".into()),
        }
    }

    /// The float value of an operand that comes as codes with a scale and a zero point.
    fn operand(&mut self, call: &Call<'_>, at: usize, axis: i64) -> Rule<Value> {
        match call.get(at) {
            Value::Const(c) => {
                self.approximated("weights are dequantised");
                let zero = if call.has(at + 2) { Some(call.get(at + 2).array("the zero point")?) } else { None };
                Ok(Self::dequantised(&c.array, call.get(at + 1).array("the scale")?, zero, axis, 0)?.into())
            }
            v => {
                let view = v.view("an operand")?;
                need!(*self.x.op(view.e) != Op::Raw, "integer arithmetic on the pixels");
                Ok(v.clone())
            }
        }
    }

    pub(super) fn qlinear_matmul(&mut self, call: &Call<'_>) -> Rule<Value> {
        let (a, b) = (self.operand(call, 0, -1)?, self.operand(call, 3, -1)?);
        self.matmul(&a, &b)
    }

    pub(super) fn qlinear_conv(&mut self, call: &Call<'_>) -> Rule<Value> {
        let (x, w) = (self.operand(call, 0, -1)?, self.operand(call, 3, 0)?);
        let v = self.patch_conv(call, &x, w.array("the weight")?)?;
        if !call.has(8) {
            return Ok(v.into());
        }
        // integers in units of both scales
        let (sx, sw) = (call.get(1).array("the scale")?, call.get(4).array("the scale")?);
        let s = fold::binary("Mul", sx, sw)?;
        let bias = Self::dequantised(call.get(8).array("the bias")?, &s, None, 0, 0)?;
        let bias = bias.reshape(&[1, 1, bias.len()]).ok_or("the bias")?;
        need!(bias.len() == w.array("the weight")?.dim(0), "a bias of {} for another number of channels", bias.len());
        Ok(v.of(self.x.add_c(v.e, &bias)?).into())
    }

    pub(super) fn qlinear_binary(&mut self, call: &Call<'_>) -> Rule<Value> {
        let (a, b) = (self.operand(call, 0, -1)?, self.operand(call, 3, -1)?);
        self.binary(if call.node.op == "QLinearAdd" { "Add" } else { "Mul" }, &a, &b)
    }

    pub(super) fn qlinear_unary(&mut self, call: &Call<'_>) -> Rule<Value> {
        let v = self.operand(call, 0, -1)?.view("the operand")?.clone();
        match call.node.op.as_str() {
            "QLinearSigmoid" => Ok(v.of(self.x.func(Func::Sigmoid, v.e)).into()),
            "QLinearSoftmax" => {
                let axis = axis_in(call.int("axis", -1)?, v.rank())?;
                need!(axis + 1 == v.rank(), "a quantised softmax along axis {axis}");
                Ok(self.soft(&v, axis, Head::Softmax)?.into())
            }
            "QLinearGlobalAveragePool" => {
                need!(call.int("channels_last", 0)? == 0 && v.rank() >= 3, "pooling with channels last");
                let which: Vec<usize> = (2..v.rank()).collect();
                Ok(self.reduce(&v, &which, true, Reduce::Mean)?.into())
            }
            _ => {
                let which = call.ints("axes")?.ok_or("the axes")?;
                let which = which.into_iter().map(|a| axis_in(a, v.rank())).collect::<Rule<Vec<_>>>()?;
                Ok(self.reduce(&v, &which, call.int("keepdims", 1)? != 0, Reduce::Mean)?.into())
            }
        }
    }

    pub(super) fn qlinear_concat(&mut self, call: &Call<'_>) -> Rule<Value> {
        let mut parts = Vec::new();
        let mut k = 2;
        while k < call.inputs.len() {
            parts.push(self.operand(call, k, -1)?);
            k += 3;
        }
        self.concat(&parts, call.int("axis", 0)?)
    }

    pub(super) fn qgemm(&mut self, call: &Call<'_>) -> Rule<Value> {
        let transposed = call.int("transB", 0)? != 0;
        need!(call.int("transA", 0)? == 0, "QGemm with transA");
        let a = self.operand(call, 0, -1)?;
        let b = self.operand(call, 3, i64::from(!transposed))?;
        let w = b.array("the weight")?;
        need!(w.rank() == 2 && a.shape()?.len() == 2, "QGemm of other tensors than matrices");
        let w = if transposed { w.transpose(&[1, 0]) } else { w.clone() };
        let product = self.matmul(&a, &w.into())?;
        let v = product.view("the product")?.clone();
        let alpha = call.float("alpha", 1.0)?;
        let out = Value::from(v.of(self.x.scale(v.e, alpha)));
        if !call.has(6) {
            return Ok(out);
        }
        let s = fold::binary("Mul", call.get(1).array("the scale")?, call.get(4).array("the scale")?)?;
        let s = fold::map(&s, DType::F32, |v| v, |v| v * alpha)?;
        let bias = Self::dequantised(call.get(6).array("the bias")?, &s, None, -1, 0)?;
        self.binary("Add", &out, &bias.into())
    }

    // ---------------------------------------------------------------------------------------------- dynamic

    pub(super) fn dynamic_quantize(&mut self, call: &Call<'_>) -> Rule {
        let v = call.get(0).view("the operand")?.clone();
        need!(*self.x.op(v.e) != Op::Raw, "the pixels are quantised");
        self.approximated("activations are quantised in the file, and not in the model");
        let one = Array::floats(DType::F32, &[], &[1.0]);
        Ok(vec![
            v.clone().into(),
            Value::Factor(Factor { of: v.e, times: Some(one) }),
            Value::Factor(Factor { of: v.e, times: None }),
        ])
    }

    /// Checks that the zero point is that of the activation.
    fn own_zero(call: &Call<'_>, k: usize, of: Id) -> Rule<()> {
        match call.get(k) {
            Value::Factor(Factor { of: e, times: None }) if *e == of => Ok(()),
            _ => Err("an integer product without the zero point of its operand".into()),
        }
    }

    /// A weight as integers and its zero point. The graph multiplies by the scale later.
    fn integer_weight(call: &Call<'_>, k: usize, zero: usize) -> Rule<(Array, Option<Array>)> {
        let codes = call.get(k).array("the weight")?.clone();
        need!(matches!(codes.dtype, DType::I8 | DType::U8), "integer weights of type {:?}", codes.dtype);
        let zero = if call.has(zero) { Some(call.get(zero).array("the zero point")?.clone()) } else { None };
        Ok((codes, zero.filter(|z| z.uniform() != Some(0.0))))
    }

    pub(super) fn matmul_integer(&mut self, call: &Call<'_>) -> Rule<Value> {
        let v = call.get(0).view("the operand")?.clone();
        Self::own_zero(call, 2, v.e)?;
        let (codes, zero) = Self::integer_weight(call, 1, 3)?;
        need!(codes.rank() == 2, "an integer product with a weight of rank {}", codes.rank());
        let shape = self.x.shape(v.e).to_vec();
        let last = v.dims.last().ok_or("an integer product of a scalar")?;
        let whole = shape.len() == 3 && *last == axes::axis(2, shape[2]) && codes.dim(0) == shape[2];
        need!(whole, "an integer product over something else than all channels");
        let n = codes.dim(1);
        let mut dims = v.dims.clone();
        if let Some(last) = dims.last_mut() {
            *last = axes::axis(2, n);
        }
        let zero = zero
            .map(|z| z.reshape(&[z.len()]).and_then(|z| z.expand(&[n])))
            .map(|z| z.ok_or("a zero point"))
            .transpose()?;
        let op = Op::IntLinear { codes: Arc::new(codes.transpose(&[1, 0])), zero: zero.map(Arc::new) };
        let e = self.x.make(op, vec![v.e], vec![shape[0], shape[1], n]);
        Ok(View { e, dims, sel: v.sel }.into())
    }

    pub(super) fn conv_integer(&mut self, call: &Call<'_>) -> Rule<Value> {
        let v = call.get(0).view("the operand")?.clone();
        Self::own_zero(call, 2, v.e)?;
        let (codes, zero) = Self::integer_weight(call, 1, 3)?;
        // the convolution gives the shape; its weight is replaced by integers
        let patch = self.patch_conv(call, call.get(0), &codes)?;
        let shape = self.x.shape(patch.e).to_vec();
        let n = codes.dim(0);
        let zero = zero
            .map(|z| z.reshape(&[z.len()]).and_then(|z| z.expand(&[n])))
            .map(|z| z.ok_or("a zero point"))
            .transpose()?;
        let op = Op::IntPatch { codes: Arc::new(codes), zero: zero.map(Arc::new) };
        let e = self.x.make(op, vec![patch.e, v.e], shape);
        Ok(patch.of(e).into())
    }

    /// A product with the run-time factor of an activation: of another constant, or of the integer product it belongs
    /// to.
    pub(super) fn rescale(&mut self, op: &str, a: &Value, b: &Value) -> Rule<Value> {
        need!(op == "Mul", "{op} with the scale of an activation");
        let (factor, other) = match (a, b) {
            (Value::Factor(f), other) | (other, Value::Factor(f)) => (f.clone(), other),
            _ => return Err("a scale".into()),
        };
        let times = factor.times.ok_or("a product with a zero point")?;
        match other {
            Value::Const(Const { array, .. }) => {
                let times = fold::binary("Mul", &times, array)?;
                Ok(Value::Factor(Factor { of: factor.of, times: Some(times) }))
            }
            Value::View(v) => {
                self.approximated("weights are dequantised");
                let e = self.with_scale(v.e, factor.of, &times)?;
                let fits = fold::broadcast_shape(&v.shape(), &times.shape())? == v.shape();
                need!(fits, "a scale of shape {:?}", times.shape());
                let last = v.dims.last().cloned().unwrap_or_default();
                let channels = self.x.shape(v.e)[2];
                // scales for each channel must run along the channels of the tensor
                let per_channel = times.len() > 1;
                let along = v
                    .dims
                    .iter()
                    .rev()
                    .zip(times.shape().iter().rev())
                    .all(|(d, &n)| n == 1 || *d == axes::axis(2, channels));
                need!(!per_channel || along, "a scale along another axis than the channels: {last:?}");
                Ok(v.of(e).into())
            }
            _ => Err("a product of two scales".into()),
        }
    }

    /// An integer product, its weight now with the scale.
    fn with_scale(&mut self, e: Id, of: Id, times: &Array) -> Rule<Id> {
        let lay = |a: &Array, n: usize, rank: usize| -> Rule<Array> {
            need!(a.len() == 1 || a.len() == n, "{} scales for {n} channels", a.len());
            let mut shape = vec![1; rank];
            if a.len() == n {
                shape[0] = n;
            }
            a.reshape(&shape).ok_or_else(|| "a scale".into())
        };
        let expr = self.x.get(e).clone();
        match expr.op {
            Op::IntLinear { codes, zero } if expr.args == [of] => {
                let n = codes.dim(0);
                let zero = zero.map(|z| lay(&z, n, 2)).transpose()?;
                let weight = Array::dequantised((*codes).clone(), &lay(times, n, 2)?, zero.as_ref())?;
                Ok(self.x.linear(of, weight, None))
            }
            Op::IntPatch { codes, zero } if expr.args.get(1) == Some(&of) => {
                let n = codes.dim(0);
                let zero = zero.map(|z| lay(&z, n, 4)).transpose()?;
                let scaled = Array::dequantised((*codes).clone(), &lay(times, n, 4)?, zero.as_ref())?;
                let patch = self.x.get(expr.args[0]).clone();
                let Op::Patch { grid, channels, pixels, .. } = patch.op else {
                    return Err("an integer convolution".into());
                };
                let op = Op::Patch { weight: Arc::new(scaled), bias: None, grid, channels, pixels };
                Ok(self.x.make(op, patch.args, patch.shape))
            }
            _ => Err("the scale of another activation".into()),
        }
    }

    /// `com.microsoft.DynamicQuantizeMatMul`: a float activation, an integer weight with its scale.
    pub(super) fn dynamic_matmul(&mut self, call: &Call<'_>) -> Rule<Value> {
        self.approximated("weights are dequantised");
        let zero = if call.has(3) { Some(call.get(3).array("the zero point")?) } else { None };
        let w = Self::dequantised(call.get(1).array("the weight")?, call.get(2).array("the scale")?, zero, -1, 0)?;
        let product = self.matmul(call.get(0), &w.into())?;
        if call.has(4) { self.binary("Add", &product, call.get(4)) } else { Ok(product) }
    }

    /// `com.microsoft.MatMulIntegerToFloat`: codes of both, with their scales.
    pub(super) fn integer_to_float(&mut self, call: &Call<'_>) -> Rule<Value> {
        self.approximated("weights are dequantised");
        let v = call.get(0).view("the operand")?.clone();
        match call.get(2) {
            Value::Factor(Factor { of, times: Some(t) }) if *of == v.e && t.uniform() == Some(1.0) => {}
            Value::Const(_) => {}
            _ => return Err("the scale of another activation".into()),
        }
        let zero = if call.has(5) { Some(call.get(5).array("the zero point")?) } else { None };
        let w = Self::dequantised(call.get(1).array("the weight")?, call.get(3).array("the scale")?, zero, -1, 0)?;
        let product = self.matmul(&v.into(), &w.into())?;
        if call.has(6) { self.binary("Add", &product, call.get(6)) } else { Ok(product) }
    }

    pub(super) fn matmul_nbits(&mut self, call: &Call<'_>) -> Rule<Value> {
        let size = |name: &str| -> Rule<usize> {
            let v = call.int(name, 0)?;
            usize::try_from(v).ok().filter(|&v| v > 0 && v <= 1 << 24).ok_or_else(|| format!("{name} = {v}"))
        };
        let (n, k, block) = (size("N")?, size("K")?, size("block_size")?);
        let bits = usize::try_from(call.int("bits", 4)?).unwrap_or(0);
        need!(matches!(bits, 2 | 4 | 8), "{bits}-bit weights");
        need!(block.is_power_of_two() && (16..=1 << 16).contains(&block), "block_size {block}");
        need!(!call.has(4), "MatMulNBits with a permutation of the channels");
        let codes = call.get(1).array("the weight")?.clone();
        let scales = call.get(2).array("the scales")?.clone();
        let blocks = k.div_ceil(block);
        let count = n.checked_mul(blocks).ok_or("a weight too large")?;
        need!(
            codes.dtype == DType::U8 && codes.len() == count * (block * bits / 8),
            "{} bytes of codes for {n}×{k}",
            codes.len()
        );
        need!(scales.dtype.is_float() && scales.len() == count, "{} scales for {count} blocks", scales.len());
        let zeros = if call.has(3) { Some(call.get(3).array("the zero points")?.clone()) } else { None };
        if let Some(z) = &zeros {
            let want = if z.dtype.is_float() { count } else { n * (blocks * bits).div_ceil(8) };
            need!(
                z.len() == want && (z.dtype.is_float() || z.dtype == DType::U8),
                "{} zero points for {count} blocks",
                z.len()
            );
        }
        self.approximated("weights are dequantised");
        let w = Array::blocks(Blocks { n, k, bits, block, codes, scales, zeros })?;
        let product = self.matmul(call.get(0), &w.transpose(&[1, 0]).into())?;
        if call.has(5) { self.binary("Add", &product, call.get(5)) } else { Ok(product) }
    }
}
