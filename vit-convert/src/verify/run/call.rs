//! A node that is about to run: its inputs, its attributes by type, and the work that it may still do.

use super::shape::Res;
use super::value::{Data, Value};
use crate::onnx::graph::{Attr, DType, Node, Tensor};

/// Multiplications that one evaluation may do: 2⁴⁵, several times a ViT-g at 512 px.
pub const MAX_WORK: u64 = 1 << 45;

/// One node with its inputs.
pub struct Call<'a> {
    pub node: &'a Node,
    pub inputs: Vec<Option<Value>>,
    pub opset: i64,
    pub ideal: bool,
    pub work: u64,
}

impl Call<'_> {
    /// A constant in an attribute.
    pub fn constant(&self, tensor: &Tensor) -> Res<Value> {
        Value::read(tensor).map(|v| if self.ideal { v.ideal() } else { v })
    }

    /// ONNX's number of an element type.
    pub fn dtype(&self, code: i64) -> Res<DType> {
        let dtype = dtype_of(code)?;
        Ok(if self.ideal && matches!(dtype, DType::F16 | DType::Bf16) { DType::F32 } else { dtype })
    }

    /// An input that must be there.
    pub fn input(&self, i: usize) -> Res<&Value> {
        match self.inputs.get(i) {
            Some(Some(v)) if !matches!(v.data, Data::Sequence(_)) => Ok(v),
            Some(Some(_)) => Err(format!("input {i} is a sequence")),
            _ => Err(format!("input {i} is missing")),
        }
    }

    /// An input that may be absent.
    pub fn opt(&self, i: usize) -> Option<&Value> {
        self.inputs.get(i)?.as_ref()
    }

    /// Takes an input out, so that its buffer can be reused.
    pub fn take(&mut self, i: usize) -> Res<Value> {
        self.input(i)?;
        self.inputs[i].take().ok_or_else(|| format!("input {i} is missing"))
    }

    pub fn int(&self, name: &str, default: i64) -> Res<i64> {
        match self.node.attrs.get(name) {
            None => Ok(default),
            Some(Attr::Int(x)) => Ok(*x),
            Some(_) => Err(format!("attribute `{name}` is no integer")),
        }
    }

    pub fn float(&self, name: &str, default: f32) -> Res<f64> {
        Ok(self.opt_float(name)?.unwrap_or(default as f64))
    }

    pub fn opt_float(&self, name: &str) -> Res<Option<f64>> {
        match self.node.attrs.get(name) {
            None => Ok(None),
            Some(Attr::Float(x)) => Ok(Some(*x as f64)),
            Some(_) => Err(format!("attribute `{name}` is no float")),
        }
    }

    pub fn ints(&self, name: &str) -> Res<Option<Vec<i64>>> {
        match self.node.attrs.get(name) {
            None => Ok(None),
            Some(Attr::Ints(x)) => Ok(Some(x.clone())),
            Some(_) => Err(format!("attribute `{name}` is no list of integers")),
        }
    }

    pub fn str(&self, name: &str, default: &str) -> Res<String> {
        match self.node.attrs.get(name) {
            None => Ok(default.into()),
            Some(Attr::Str(x)) => Ok(String::from_utf8_lossy(x).into_owned()),
            Some(_) => Err(format!("attribute `{name}` is no string")),
        }
    }

    /// A list that is an attribute in old operator sets and an input in new ones.
    pub fn list(&self, name: &str, input: usize) -> Res<Option<Vec<i64>>> {
        match self.opt(input) {
            Some(v) => Ok(Some(v.as_ints()?.to_vec())),
            None => self.ints(name),
        }
    }

    /// Counts multiplications against the limit.
    pub fn spend(&mut self, factors: &[usize]) -> Res<()> {
        let n = factors.iter().try_fold(1u64, |n, &f| n.checked_mul(f as u64));
        self.work = n.and_then(|n| n.checked_add(self.work)).filter(|&n| n <= MAX_WORK).ok_or("too much work")?;
        Ok(())
    }
}

/// The one result of most operators, as a rule gives it.
#[allow(clippy::unnecessary_wraps)]
pub fn one(value: Res<Value>) -> Option<Res<Vec<Value>>> {
    Some(value.map(|v| vec![v]))
}

/// ONNX's number of an element type.
fn dtype_of(code: i64) -> Res<DType> {
    Ok(match code {
        1 => DType::F32,
        2 => DType::U8,
        3 => DType::I8,
        4 => DType::U16,
        5 => DType::I16,
        6 => DType::I32,
        7 => DType::I64,
        9 => DType::Bool,
        10 => DType::F16,
        11 => DType::F64,
        12 => DType::U32,
        13 => DType::U64,
        16 => DType::Bf16,
        21 => DType::U4,
        22 => DType::I4,
        _ => return Err(format!("element type {code} is not supported")),
    })
}
