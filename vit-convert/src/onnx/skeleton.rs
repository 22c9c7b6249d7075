//! The file without its weights: large elements stay in the file, and the decoded messages say where.
//!
//! Fields and depth are limited here, so that a small file cannot expand to gigabytes and deep nesting cannot overflow
//! the stack.

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
};

use super::{limits, proto};
use crate::{
    Error, Result,
    onnx::stored::{StoredFile, wide},
};

/// A tensor's `raw_data` is kept in memory up to this many bytes, and stays in the file above.
pub const IN_MEMORY: usize = 1 << 12;
/// A field that is not used (comments, fields of a later version) is kept up to this many bytes.
const UNREAD: u64 = 1 << 12;

/// What the fields of a message are.
#[derive(Clone, Copy, PartialEq)]
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
    /// The kind of a length-delimited field, if it is a message.
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

    /// A field that [`proto`] knows.
    fn knows(self, tag: u64) -> bool {
        match self {
            Self::Model => matches!(tag, 1..=3 | 7 | 8 | 14 | 25),
            Self::Graph => matches!(tag, 1 | 5 | 11 | 12 | 15),
            Self::Node => matches!(tag, 1..=5 | 7..=9),
            Self::Attribute => matches!(tag, 1..=11 | 20..=22),
            Self::Tensor => matches!(tag, 1..=11 | 13 | 14),
            Self::Function => matches!(tag, 1 | 4..=7 | 9..=11 | 13),
            Self::Flat => true,
        }
    }
}

/// A message that is being read, and what is kept of it.
struct Open {
    kind: Kind,
    /// Its own field number and wire type.
    key: u64,
    /// Where it ends in the file.
    end: u64,
    kept: Vec<u8>,
    /// It has said that its elements stay in the file.
    stretched: bool,
}

/// The file's messages, with a [`proto::Stretch`] in the place of each large `raw_data`.
pub fn of(file: &StoredFile) -> Result<Vec<u8>> {
    let mut input = Input { reader: BufReader::with_capacity(1 << 14, file.file()), at: 0 };
    input.reader.seek(SeekFrom::Start(0)).map_err(|error| Error::graph(format!("cannot be read: {error}")))?;
    let (mut fields, mut graph_bytes) = (0_usize, 0_u64);
    let mut outer: Vec<Open> = Vec::new();
    let mut open = Open { kind: Kind::Model, key: 0, end: file.len(), kept: Vec::new(), stretched: false };
    loop {
        if input.at == open.end {
            let Some(mut parent) = outer.pop() else { return Ok(open.kept) };
            put_payload(&mut parent.kept, open.key, &open.kept);
            open = parent;
            continue;
        }
        fields = fields.saturating_add(1);
        if fields > limits::FIELDS {
            let most = limits::FIELDS;
            return Err(Error::graph(format!("more than {most} protobuf fields: larger than any Vision Transformer")));
        }
        let key = input.varint(open.end)?.ok_or_else(|| broken("a field has no number"))?;
        let tag = key >> 3;
        if tag == 0 {
            return Err(broken("a field has the number 0"));
        }
        // this field number is reserved for us
        let drop = open.kind == Kind::Tensor && tag == u64::from(proto::STRETCH);
        let fixed = match key & 7 {
            0 => {
                let value = input.varint(open.end)?.ok_or_else(|| broken("a number does not end"))?;
                if !drop {
                    put_varint(&mut open.kept, key);
                    put_varint(&mut open.kept, value);
                }
                continue;
            }
            1 => 8,
            5 => 4,
            2 => {
                let len = input.varint(open.end)?.ok_or_else(|| broken("a length does not end"))?;
                let end =
                    input.at.checked_add(len).filter(|&end| end <= open.end).ok_or_else(|| {
                        broken("the file ends within a field (was it downloaded or copied completely?)")
                    })?;
                if let Some(kind) = open.kind.child(tag) {
                    if outer.len() >= limits::MESSAGE_DEPTH {
                        let most = limits::MESSAGE_DEPTH;
                        return Err(Error::graph(format!("messages nested more than {most} deep")));
                    }
                    let inner = Open { kind, key, end, kept: Vec::new(), stretched: false };
                    outer.push(std::mem::replace(&mut open, inner));
                    continue;
                }
                if drop || (!open.kind.knows(tag) && len > UNREAD) {
                    input.skip(len)?;
                    continue;
                }
                if open.kind == Kind::Tensor && tag == 9 {
                    // protobuf: if a field occurs twice, the last one counts
                    let large = usize::try_from(len).map_or(true, |len| len > IN_MEMORY);
                    if large || open.stretched {
                        let (offset, len) = if large { (input.at, len) } else { (0, 0) };
                        let mut stretch = Vec::new();
                        for (field, value) in [(1, offset), (2, len)] {
                            put_varint(&mut stretch, field << 3);
                            put_varint(&mut stretch, value);
                        }
                        put_payload(&mut open.kept, (u64::from(proto::STRETCH) << 3) | 2, &stretch);
                        open.stretched = large;
                    }
                    if large {
                        put_payload(&mut open.kept, key, &[]);
                        input.skip(len)?;
                        continue;
                    }
                }
                if open.kind != Kind::Tensor {
                    graph_bytes = graph_bytes.saturating_add(len);
                    if graph_bytes > limits::GRAPH_BYTES {
                        let most = limits::GRAPH_BYTES >> 20;
                        return Err(Error::graph(format!(
                            "more than {most} MB beside the weights: no Vision Transformer"
                        )));
                    }
                }
                put_varint(&mut open.kept, key);
                put_varint(&mut open.kept, len);
                input.copy(len, &mut open.kept)?;
                continue;
            }
            other => return Err(broken(&format!("a field has the wire type {other}"))),
        };
        if open.end.saturating_sub(input.at) < fixed {
            return Err(broken("the file ends within a number"));
        }
        let mut value = Vec::with_capacity(8);
        input.copy(fixed, &mut value)?;
        if !drop {
            put_varint(&mut open.kept, key);
            open.kept.extend_from_slice(&value);
        }
    }
}

fn broken(why: &str) -> Error {
    Error::graph(format!("not an ONNX file, or a damaged one: {why}"))
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    loop {
        let low = u8::try_from(value & 0x7f).unwrap_or_default();
        value >>= 7;
        if value == 0 {
            return out.push(low);
        }
        out.push(low | 0x80);
    }
}

fn put_payload(out: &mut Vec<u8>, key: u64, payload: &[u8]) {
    put_varint(out, key);
    put_varint(out, wide(payload.len()));
    out.extend_from_slice(payload);
}

/// The file from its beginning to its end.
struct Input<'a> {
    reader: BufReader<&'a File>,
    at: u64,
}

impl Input<'_> {
    /// A base-128 number of at most ten bytes, which ends before `end`.
    fn varint(&mut self, end: u64) -> Result<Option<u64>> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            if self.at >= end {
                return Ok(None);
            }
            let mut byte = [0];
            self.reader.read_exact(&mut byte).map_err(unreadable)?;
            self.at = self.at.saturating_add(1);
            let [byte] = byte;
            value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or_default();
            if byte & 0x80 == 0 {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    fn skip(&mut self, len: u64) -> Result<()> {
        let by = i64::try_from(len).map_err(|_| broken("a field is larger than any file"))?;
        self.reader.seek_relative(by).map_err(unreadable)?;
        self.at = self.at.saturating_add(len);
        Ok(())
    }

    fn copy(&mut self, len: u64, out: &mut Vec<u8>) -> Result<()> {
        let copied = (&mut self.reader).take(len).read_to_end(out).map_err(unreadable)?;
        if u64::try_from(copied) != Ok(len) {
            return Err(unreadable(io::ErrorKind::UnexpectedEof.into()));
        }
        self.at = self.at.saturating_add(len);
        Ok(())
    }
}

#[allow(clippy::needless_pass_by_value)] // as `map_err` gives it
fn unreadable(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => broken("the file became shorter while it was read"),
        _ => Error::graph(format!("cannot be read: {error}")),
    }
}
