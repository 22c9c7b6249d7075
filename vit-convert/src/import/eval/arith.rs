//! Elementwise operators: sums, products, powers, functions, activations and casts.

use std::rc::Rc;

use vit_model::config::Activation;

use super::align::{align, over_base};
use super::call::Call;
use super::fold;
use super::value::{Const, Rule, Value, View, axis_in, need};
use super::walk::Walk;
use crate::import::array::Array;
use crate::import::axes;
use crate::import::expr::{Func, Head, Id, Op};
use crate::onnx::graph::{Attr, DType};

impl Walk<'_> {
    pub(super) fn constant(&mut self, call: &Call<'_>) -> Rule<Value> {
        match (call.node.attrs.get("value"), call.node.outputs.first()) {
            (Some(Attr::Tensor(t)), Some(Some(id))) => Ok(Array::stored(*id, t.clone()).into()),
            _ => Err("a constant without numbers".into()),
        }
    }

    pub(super) fn dropout(&mut self, call: &Call<'_>) -> Rule<Value> {
        let training = call.has(2) && call.get(2).array("training_mode")?.one() != Some(0.0);
        let ratio = if call.has(1) { call.get(1).array("the ratio")?.one() } else { None };
        need!(!training || ratio == Some(0.0), "Dropout in training mode: call model.eval() before the export");
        Ok(call.get(0).clone())
    }

    /// A cast between float types does not change an activation or a stored weight, but it rounds computed numbers.
    fn cast_to(&mut self, value: &Value, to: DType) -> Rule<Value> {
        match value {
            Value::Const(c) => {
                let a = &c.array;
                let weight = a.dtype.is_float() && to.is_float() && a.len() > 1;
                if weight || a.dtype == to {
                    let mut a = a.clone();
                    a.dtype = to;
                    return Ok(Value::Const(Const { array: a, terms: c.terms.clone() }));
                }
                fold::map(a, to, |v| v, |v| v).map(Value::from)
            }
            Value::View(v) => {
                if *self.x.op(v.e) == Op::Raw {
                    need!(to.is_float(), "the pixels are cast to {to:?}");
                    let shape = self.x.shape(v.e).to_vec();
                    return Ok(v.of(self.x.make(Op::Input, Vec::new(), shape)).into());
                }
                let index = matches!(self.x.op(v.e), Op::Out(Head::ArgMax | Head::TopK));
                need!(to.is_float() || index, "an activation is cast to {to:?}");
                Ok(value.clone())
            }
            Value::Factor(_) => Ok(value.clone()),
            _ => Err("a sequence is cast".into()),
        }
    }

    pub(super) fn cast(&mut self, call: &Call<'_>) -> Rule<Value> {
        let number = call.int("to", 0)?;
        let to = i32::try_from(number)
            .ok()
            .and_then(DType::from_onnx)
            .ok_or_else(|| format!("cast to element type {number}"))?;
        self.cast_to(call.get(0), to)
    }

    pub(super) fn cast_like(&mut self, call: &Call<'_>) -> Rule<Value> {
        let to = match call.get(1) {
            Value::Const(c) => c.array.dtype,
            Value::View(v) if *self.x.op(v.e) == Op::Raw => return Err("a cast to the type of the pixels".into()),
            Value::View(_) => DType::F32,
            _ => return Err("a cast to the type of a sequence".into()),
        };
        self.cast_to(call.get(0), to)
    }

    // ---------------------------------------------------------------------------------------------- two operands

    pub(super) fn sum(&mut self, call: &Call<'_>) -> Rule<Value> {
        let mut total = call.get(0).clone();
        for v in call.inputs.iter().skip(1) {
            total = self.binary("Add", &total, v)?;
        }
        Ok(total)
    }

    /// Add, Sub, Mul, Div or Pow, with broadcasting.
    pub(super) fn binary(&mut self, op: &str, a: &Value, b: &Value) -> Rule<Value> {
        match (a, b) {
            (Value::Const(x), Value::Const(y)) => return self.constants(op, x, y),
            (Value::Factor(_), _) | (_, Value::Factor(_)) => return self.rescale(op, a, b),
            _ => {}
        }
        for v in [a, b] {
            if let Value::View(v) = v {
                need!(*self.x.op(v.e) != Op::Raw, "integer arithmetic on the pixels");
                need!(!matches!(self.x.op(v.e), Op::Out(_) | Op::IsNan), "{op} after the output activation");
            }
        }
        match op {
            "Sub" => {
                let minus = match b {
                    Value::Const(c) => fold::negate(&c.array)?.into(),
                    other => {
                        let v = other.view("an operand")?.clone();
                        let e = self.x.scale(v.e, -1.0);
                        v.of(e).into()
                    }
                };
                self.binary("Add", a, &minus)
            }
            "Div" => {
                let inverse = match b {
                    Value::Const(c) => {
                        need!(c.array.dtype.is_float(), "a division by integers");
                        fold::map(&c.array, DType::F64, |v| v, |v| 1.0 / v)?.into()
                    }
                    other => {
                        let v = other.view("an operand")?.clone();
                        let e = self.x.pow(v.e, -1.0);
                        v.of(e).into()
                    }
                };
                self.binary("Mul", a, &inverse)
            }
            "Pow" => {
                let p = b.array("the exponent")?.one().ok_or("the exponent is not one number")?;
                let v = a.view("the base of a power")?.clone();
                let e = self.x.pow(v.e, (p * 1e6).round() / 1e6);
                Ok(v.of(e).into())
            }
            _ => match (a, b) {
                (Value::View(v), Value::Const(c)) | (Value::Const(c), Value::View(v)) => self.with_constant(op, v, c),
                (Value::View(a), Value::View(b)) => self.two_views(op, a, b).map(Value::from),
                _ => Err(format!("{op} of a sequence")),
            },
        }
    }

    fn constants(&mut self, op: &str, x: &Const, y: &Const) -> Rule<Value> {
        let (a, b) = (&x.array, &y.array);
        let shape = fold::broadcast_shape(&a.shape(), &b.shape())?;
        let float = a.dtype.is_float() && a.len() > 1 && b.len() > 1;
        if op == "Add" && float {
            // adding zeros to a parameter leaves it as stored, so that it is written bit for bit
            if a.uniform() == Some(0.0) {
                return Ok(Value::Const(Const { array: b.expand(&shape).ok_or("shapes")?, terms: y.terms.clone() }));
            }
            if b.uniform() == Some(0.0) {
                return Ok(Value::Const(Const { array: a.expand(&shape).ok_or("shapes")?, terms: x.terms.clone() }));
            }
        }
        let array = fold::binary(op, a, b)?;
        let terms = (op == "Add" && float).then(|| Rc::new((a.clone(), b.clone())));
        Ok(Value::Const(Const { array, terms }))
    }

    fn with_constant(&mut self, op: &str, v: &View, c: &Const) -> Rule<Value> {
        let array = &c.array;
        need!(array.dtype.is_float(), "{op} of an activation and integers");
        need!(matches!(op, "Add" | "Mul"), "{op}");
        let rank = v.rank().max(array.rank());
        let mut dims = axes::pad(&v.dims, rank);
        // one number is the bias of a head of one class
        let bias = op == "Add" && self.x.shape(v.e).last() == Some(&1) && self.x.bare(v.e);
        if let Some(c) = array.one()
            && !bias
        {
            let e = if op == "Add" { self.x.add_s(v.e, c) } else { self.x.scale(v.e, c) };
            return Ok(View { e, dims, sel: v.sel }.into());
        }
        let base = self.x.shape(v.e).to_vec();
        // a vector over channels is added after a reduction with keepdims: restore the digits that the reduction
        // dropped
        if base.len() == 3 && rank > 0 && dims[rank - 1].is_empty() {
            let lowest = dims.iter().flatten().filter(|d| d.axis == 2).map(|d| d.stride).min().unwrap_or(base[2]);
            if lowest > 1 && array.dim(array.rank() - 1) == lowest {
                dims[rank - 1] = axes::axis(2, lowest);
            }
        }
        let mut v = View { e: v.e, dims, sel: v.sel };
        let over = match over_base(array, &v.dims, v.sel, &base) {
            Ok(over) => over,
            Err(_) if v.sel.is_some() => {
                v = self.settle(&v)?;
                over_base(array, &v.dims, None, self.x.shape(v.e))?
            }
            Err(why) => return Err(why),
        };
        let e = if op == "Add" { self.x.add_c(v.e, &over)? } else { self.x.mul_c(v.e, &over) };
        Ok(v.of(e).into())
    }

    pub(super) fn two_views(&mut self, op: &str, a: &View, b: &View) -> Rule<View> {
        let (a, b) = if a.sel == b.sel { (a.clone(), b.clone()) } else { (self.settle(a)?, self.settle(b)?) };
        let (s, t) = (self.x.shape(a.e), self.x.shape(b.e));
        let fits = s.len() == t.len() && s.iter().zip(t).all(|(x, y)| x == y || *x == 1 || *y == 1);
        need!(fits, "{op} of two activations of different kinds: {s:?} and {t:?}");
        let dims = align(&a.dims, &b.dims)?;
        let e = match op {
            "Add" => self.x.add(a.e, b.e),
            "Mul" => self.x.mul(a.e, b.e),
            _ => return Err(format!("{op} of two activations")),
        };
        Ok(View { e, dims, sel: a.sel })
    }

    /// A selection of tokens as an expression of its own.
    pub(super) fn settle(&mut self, v: &View) -> Rule<View> {
        match v.sel {
            None => Ok(v.clone()),
            Some((start, n)) => Ok(View { e: self.x.select(v.e, start, n)?, dims: v.dims.clone(), sel: None }),
        }
    }

    /// A parameter that is used as an activation.
    pub(super) fn lift(&mut self, c: &Const) -> Rule<View> {
        let a = &c.array;
        need!(a.rank() == 3 && a.dtype.is_float(), "a parameter of shape {:?} is used as tokens", a.shape());
        let order: [usize; 3] = if a.dim(1) == self.batch && a.dim(0) != self.batch { [1, 0, 2] } else { [0, 1, 2] };
        let turned = a.transpose(&order);
        let n = turned.dim(0);
        let base = if n == self.batch && n > 1 { turned.collapse(0).unwrap_or(turned.clone()) } else { turned.clone() };
        let batch = if base.dim(0) == n { axes::axis(0, n) } else { axes::broadcast(n) };
        let all = [batch, axes::axis(1, turned.dim(1)), axes::axis(2, turned.dim(2))];
        let e = self.param(&base, c)?;
        Ok(View { e, dims: order.iter().map(|&k| all[k].clone()).collect(), sel: None })
    }

    /// A parameter over the base axes; a sum of two parameters stays one parameter plus a constant.
    pub(super) fn param(&mut self, base: &Array, c: &Const) -> Rule<Id> {
        let shape = base.shape();
        if let Some(terms) = &c.terms {
            let part = |a: &Array| {
                let a = a.expand(&fold::broadcast_shape(&a.shape(), &shape).ok()?)?;
                let a = if a.dim(0) == shape[0] { a } else { a.collapse(0)? };
                (a.shape() == shape).then_some(a)
            };
            if let (Some(x), Some(y)) = (part(&terms.0), part(&terms.1)) {
                let p = self.x.make(Op::Param(x.into()), Vec::new(), shape);
                return self.x.add_c(p, &y);
            }
        }
        Ok(self.x.make(Op::Param(base.clone().into()), Vec::new(), shape))
    }

    // ---------------------------------------------------------------------------------------------- one operand

    pub(super) fn unary(&mut self, call: &Call<'_>) -> Rule<Value> {
        let op = call.node.op.as_str();
        let v = call.get(0).view("the operand")?.clone();
        need!(*self.x.op(v.e) != Op::Raw, "integer arithmetic on the pixels");
        let e = match op {
            "Sqrt" => self.x.pow(v.e, 0.5),
            "Reciprocal" => self.x.pow(v.e, -1.0),
            "Neg" => self.x.scale(v.e, -1.0),
            "Relu" => self.x.act(Activation::Relu, v.e),
            "Erf" => self.x.func(Func::Erf, v.e),
            "Tanh" => self.x.func(Func::Tanh, v.e),
            "Sigmoid" => self.x.func(Func::Sigmoid, v.e),
            "Exp" => self.x.func(Func::Exp, v.e),
            "Log" => self.x.func(Func::Log, v.e),
            other => return Err(format!("a ViT has no {other} here")),
        };
        Ok(v.of(e).into())
    }

    /// A lower bound that changes nothing: 0 below a square, or the tiny number that keeps a division by a length finite.
    pub(super) fn bounded(&mut self, call: &Call<'_>) -> Rule<Value> {
        let op = call.node.op.as_str();
        let (x, bound) = match (op, call.get(0), call.get(1)) {
            ("Max", Value::Const(c), Value::View(v)) | ("Max", Value::View(v), Value::Const(c)) => (v, c.array.one()),
            ("Clip", Value::View(v), low) => {
                need!(!call.has(2) && !call.node.attrs.contains_key("max"), "a ViT has no upper bound here");
                let own =
                    if let Some(Attr::Float(low)) = call.node.attrs.get("min") { Some(f64::from(*low)) } else { None };
                (v, if let Value::Const(c) = low { c.array.one() } else { own })
            }
            _ => return Err(format!("a ViT has no {op} here")),
        };
        need!(op == "Clip" || call.inputs.len() == 2, "a ViT has no {op} here");
        let low = bound.ok_or("the bound is not one number")?;
        let (e, factor) = self.x.scaled(x.e);
        let power = |e: Id| if let Op::Pow(p) = self.x.op(e) { p.0 } else { 1.0 };
        let square = |e: Id| matches!(self.x.op(e), Op::Mean { .. }) && power(self.x.arg(e, 0)) == 2.0;
        let length = power(e) == 0.5 && square(self.x.arg(e, 0));
        if *self.x.op(x.e) != Op::Raw && factor > 0.0 && (low <= 0.0 && (square(e) || length) || low <= 1e-6 && length)
        {
            return Ok(x.clone().into());
        }
        match op {
            "Max" if low == 0.0 => self.activate(Activation::Relu, &x.clone().into()),
            _ => Err(format!("a ViT has no {op} here")),
        }
    }

    /// `LpNormalization`: each vector of channels divided by its length.
    pub(super) fn unit_length(&mut self, call: &Call<'_>) -> Rule<Value> {
        let v = call.get(0).view("the operand")?.clone();
        let axis = axis_in(call.int("axis", -1)?, v.rank())?;
        need!(call.int("p", 2)? == 2, "LpNormalization with p = {}", call.int("p", 2)?);
        let shape = self.x.shape(v.e).to_vec();
        let channels = shape.len() == 3 && v.dims[axis] == axes::axis(2, shape[2]);
        need!(channels, "vectors of something else than channels are scaled to unit length (L2-normalised)");
        let (core, factor) = self.x.scaled(v.e);
        need!(factor.is_sign_positive(), "a negated vector is scaled to unit length (L2-normalised)");
        Ok(v.of(self.x.make(Op::Out(Head::Unit), vec![core], shape)).into())
    }

    pub(super) fn activate(&mut self, act: Activation, value: &Value) -> Rule<Value> {
        let v = value.view("the operand")?.clone();
        need!(*self.x.op(v.e) != Op::Raw, "integer arithmetic on the pixels");
        Ok(v.of(self.x.act(act, v.e)).into())
    }

    pub(super) fn gelu(&mut self, call: &Call<'_>) -> Rule<Value> {
        match call.text("approximate", "none")?.as_str() {
            "none" => self.activate(Activation::Gelu, call.get(0)),
            "tanh" => self.activate(Activation::GeluTanh, call.get(0)),
            other => Err(format!("Gelu with approximate = `{other}`")),
        }
    }

    pub(super) fn swish(&mut self, call: &Call<'_>) -> Rule<Value> {
        let alpha = call.float("alpha", 1.0)?;
        if self.x.near(alpha, 1.0) {
            return self.activate(Activation::Silu, call.get(0));
        }
        need!(self.x.near(alpha, 1.702), "x · sigmoid({alpha} x) is neither SiLU (1) nor quick GELU (1.702)");
        self.activate(Activation::QuickGelu, call.get(0))
    }

    pub(super) fn is_nan(&mut self, call: &Call<'_>) -> Rule<Value> {
        let v = call.get(0).view("the operand")?.clone();
        need!(*self.x.op(v.e) == Op::Softmax, "IsNaN of something else than attention weights");
        let shape = self.x.shape(v.e).to_vec();
        Ok(v.of(self.x.make(Op::IsNan, vec![v.e], shape)).into())
    }

    /// `Where` is resolved if its condition is all true or all false, or if it is the guard that replaces NaN in
    /// attention weights by zeros.
    pub(super) fn where_(&mut self, call: &Call<'_>) -> Rule<Value> {
        let (cond, a, b) = (call.get(0), call.get(1), call.get(2));
        if let (Value::View(cond), Value::Const(zero), Value::View(kept)) = (cond, a, b)
            && *self.x.op(cond.e) == Op::IsNan
            && zero.array.uniform() == Some(0.0)
            && zero.array.len() == 1
            && self.x.arg(cond.e, 0) == kept.e
            && cond.dims == kept.dims
        {
            return Ok(b.clone());
        }
        let cond = cond.array("the condition of Where")?;
        let value = cond.uniform().ok_or("a mask: Where with a condition that is not the same everywhere")?;
        let kept = if value == 0.0 { b } else { a };
        let v = kept.view("what Where keeps")?;
        // the result has the shape that all three broadcast to
        let mut shape = v.shape();
        for other in [Ok(cond.shape()), a.shape(), b.shape()] {
            shape = fold::broadcast_shape(&shape, &other?)?;
        }
        need!(shape == v.shape(), "Where broadcasts what it keeps");
        Ok(kept.clone())
    }
}
