//! What a file may ask for, checked before anything is allocated on its word.

use crate::{Error, Result};

/// Operator sets that are understood.
pub const OPSETS: std::ops::RangeInclusive<i64> = 7..=28;
/// Protobuf fields in all: a message costs up to 100 times its two bytes once it is decoded.
pub const FIELDS: usize = 4_000_000;
/// Messages within messages; an `If` within an `If` takes three.
pub const MESSAGE_DEPTH: usize = 64;
/// Bodies and function calls within one another.
pub const NESTING: usize = 24;
/// Nodes, with every function inlined.
pub const NODES: usize = 1 << 18;
/// Inputs, outputs and attribute elements of all nodes, with every function inlined.
pub const NODE_PARTS: usize = 1 << 22;
/// Bytes of all names of values and nodes, with every function inlined.
pub const NAME_BYTES: usize = 1 << 26;
/// Dimensions of a tensor.
pub const RANK: usize = 32;
/// Files that hold external data.
pub const DATA_FILES: usize = 8192;

/// What the fields of a message are.
#[derive(Clone, Copy)]
enum Kind {
    Model,
    Graph,
    Node,
    Attribute,
    Tensor,
    Function,
    /// A message without submessages of interest: its fields are counted, not entered.
    Flat,
}

impl Kind {
    /// The kind of a length-delimited field, where it is a message.
    fn child(self, tag: u64) -> Option<Self> {
        Some(match (self, tag) {
            (Self::Model, 7) | (Self::Attribute, 6 | 11) => Self::Graph,
            (Self::Model, 25) => Self::Function,
            (Self::Graph, 1) | (Self::Function, 7) => Self::Node,
            (Self::Graph, 5) | (Self::Attribute, 5 | 10) => Self::Tensor,
            (Self::Node, 5) | (Self::Function, 11) => Self::Attribute,
            (Self::Model, 8 | 14) | (Self::Graph, 11..=16) | (Self::Tensor, 13) => Self::Flat,
            _ => return None,
        })
    }
}

/// Counts fields and depth over the wire format, without decoding: a graph of a few hundred bytes must not become
/// gigabytes, nor a deep one a stack overflow. Payloads are skipped, so this costs nothing beside reading the weights.
pub fn scan(file: &[u8]) -> Result<()> {
    let mut open: Vec<(Kind, &[u8])> = vec![(Kind::Model, file)];
    let mut fields = 0_usize;
    while let Some((kind, rest)) = open.pop() {
        let mut rest = rest;
        let Some((tag, payload)) = field(&mut rest)? else { continue };
        fields = fields.saturating_add(1);
        if fields > FIELDS {
            return Err(Error::graph(format!(
                "more than {FIELDS} protobuf fields: larger than any Vision Transformer"
            )));
        }
        open.push((kind, rest));
        if let (Some(payload), Some(child)) = (payload, kind.child(tag)) {
            if open.len() >= MESSAGE_DEPTH {
                return Err(Error::graph(format!("messages nested more than {MESSAGE_DEPTH} deep")));
            }
            open.push((child, payload));
        }
    }
    Ok(())
}

/// A field's number and, where it has a length, its payload.
type Field<'a> = (u64, Option<&'a [u8]>);

/// The next field of a message.
fn field<'a>(rest: &mut &'a [u8]) -> Result<Option<Field<'a>>> {
    let broken = |why: &str| Error::graph(format!("not an ONNX file, or a damaged one: {why}"));
    if rest.is_empty() {
        return Ok(None);
    }
    let key = varint(rest).ok_or_else(|| broken("a field has no number"))?;
    let tag = key >> 3;
    if tag == 0 {
        return Err(broken("a field has the number 0"));
    }
    let fixed = match key & 7 {
        0 => {
            varint(rest).ok_or_else(|| broken("a number does not end"))?;
            return Ok(Some((tag, None)));
        }
        1 => 8,
        5 => 4,
        2 => {
            let len = varint(rest).ok_or_else(|| broken("a length does not end"))?;
            let split = usize::try_from(len).ok().and_then(|len| rest.split_at_checked(len));
            let (payload, tail) = split
                .ok_or_else(|| broken("the file ends within a field (was it downloaded or copied completely?)"))?;
            *rest = tail;
            return Ok(Some((tag, Some(payload))));
        }
        other => return Err(broken(&format!("a field has the wire type {other}"))),
    };
    *rest = rest.get(fixed..).ok_or_else(|| broken("the file ends within a number"))?;
    Ok(Some((tag, None)))
}

/// A base-128 number of at most ten bytes.
fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (&byte, tail) = rest.split_first()?;
        *rest = tail;
        value |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
