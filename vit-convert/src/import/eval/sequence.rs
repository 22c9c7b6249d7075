//! Sequences of tensors, as TorchScript exports splits.

use std::rc::Rc;

use super::call::Call;
use super::select::axis_index;
use super::value::{Rule, Value, axis_in, need};
use super::walk::Walk;
use crate::import::array::Array;
use crate::import::axes::Pick;
use crate::onnx::graph::DType;

/// Sequences are short: the outputs of a split.
const SEQUENCE_LIMIT: usize = 1024;

impl Walk<'_> {
    pub(super) fn sequence_construct(&mut self, call: &Call<'_>) -> Rule<Value> {
        need!(call.inputs.len() <= SEQUENCE_LIMIT, "a sequence of {}", call.inputs.len());
        need!(!call.inputs.iter().any(|v| matches!(v, Value::Seq(_))), "a sequence of sequences");
        Ok(Value::Seq(Rc::new(call.inputs.clone())))
    }

    fn items(value: &Value) -> Rule<Rc<Vec<Value>>> {
        if let Value::Seq(items) = value { Ok(items.clone()) } else { Err("a tensor where a sequence belongs".into()) }
    }

    pub(super) fn sequence_insert(&mut self, call: &Call<'_>) -> Rule<Value> {
        let mut items = Self::items(call.get(0))?.to_vec();
        need!(items.len() < SEQUENCE_LIMIT && !matches!(call.get(1), Value::Seq(_)), "a long or nested sequence");
        let at = if call.has(2) {
            call.get(2).array("the position")?.one().ok_or("the position")? as i64
        } else {
            items.len() as i64
        };
        let at = if at < 0 { at + items.len() as i64 } else { at };
        let at = usize::try_from(at).ok().filter(|&k| k <= items.len()).ok_or("a position outside of the sequence")?;
        items.insert(at, call.get(1).clone());
        Ok(Value::Seq(Rc::new(items)))
    }

    pub(super) fn sequence_at(&mut self, call: &Call<'_>) -> Rule<Value> {
        let items = Self::items(call.get(0))?;
        let at = call.get(1).array("the position")?.one().ok_or("the position")? as i64;
        Ok(items[axis_index(at, items.len())?].clone())
    }

    pub(super) fn sequence_length(&mut self, call: &Call<'_>) -> Rule<Value> {
        Ok(Array::ints(DType::I64, &[], &[Self::items(call.get(0))?.len() as i64]).into())
    }

    pub(super) fn concat_from_sequence(&mut self, call: &Call<'_>) -> Rule<Value> {
        need!(call.int("new_axis", 0)? == 0, "a sequence is stacked along a new axis");
        let items = Self::items(call.get(0))?;
        self.concat(&items, call.int("axis", 0)?)
    }

    pub(super) fn split_to_sequence(&mut self, call: &Call<'_>) -> Rule<Value> {
        let shape = call.get(0).shape()?;
        let axis = axis_in(call.int("axis", 0)?, shape.len())?;
        let keep = call.int("keepdims", 1)? != 0 || call.has(1);
        let n = shape[axis];
        let sizes: Vec<usize> = if call.has(1) {
            let split = call.get(1).array("split")?;
            let list = call.get(1).ints("split")?;
            let size = |s: i64| usize::try_from(s).ok().filter(|&s| s > 0).ok_or_else(|| format!("a split of {s}"));
            if split.rank() == 0 {
                let each = size(list[0])?;
                need!(n.div_ceil(each) <= SEQUENCE_LIMIT, "a long sequence");
                (0..n.div_ceil(each)).map(|k| each.min(n - k * each)).collect()
            } else {
                list.into_iter().map(size).collect::<Rule<_>>()?
            }
        } else {
            need!(n <= SEQUENCE_LIMIT, "a long sequence");
            vec![1; n]
        };
        need!(
            sizes.len() <= SEQUENCE_LIMIT && sizes.iter().try_fold(0usize, |a, &b| a.checked_add(b)) == Some(n),
            "a split of {n} into {sizes:?}"
        );
        let mut items = Vec::with_capacity(sizes.len());
        let mut at = 0;
        for s in sizes {
            let part = self.restrict(call.get(0), axis, &Pick::range(at, s))?;
            at += s;
            items.push(if keep {
                part
            } else {
                Self::relaid(&part, |dims| {
                    Ok(dims.iter().enumerate().filter(|(k, _)| *k != axis).map(|(_, d)| d.clone()).collect())
                })?
            });
        }
        Ok(Value::Seq(Rc::new(items)))
    }
}
