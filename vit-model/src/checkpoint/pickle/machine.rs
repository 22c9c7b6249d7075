//! Runs the instructions of a pickle that build values, and refuses those that would call anything. Nothing is executed: a
//! name is looked up in a list, and a "call" of one of them makes a plain value.

use std::{collections::BTreeMap, sync::Arc};

use super::value::{Global, Id, Storage, Tensor, Value, Values, allowed};
use crate::limits;

/// A pickle that has been read.
pub(super) struct Pickled {
    pub values: Values,
    pub root: Id,
    /// The bytes that it took.
    pub used: usize,
}

/// Why a pickle cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// It continues beyond the bytes that there are.
    Ends,
    Refused(String),
}

fn refused<T>(why: impl Into<String>) -> Result<T, Trouble> {
    Err(Trouble::Refused(why.into()))
}

/// Reads the pickle that `bytes` begin with. `script` says that it is from a TorchScript archive, whose own classes are inert.
pub(super) fn read(bytes: &[u8], script: bool) -> Result<Pickled, Trouble> {
    let mut machine = Machine {
        bytes,
        at: 0,
        script,
        values: Values::default(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: BTreeMap::new(),
        budget: limits::PICKLE_VALUES,
    };
    loop {
        let [op] = *machine.take(1)? else { return Err(Trouble::Ends) };
        if op == b'.' {
            let root = machine.pop()?;
            return Ok(Pickled { values: machine.values, root, used: machine.at });
        }
        machine.step(op)?;
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    script: bool,
    values: Values,
    stack: Vec<Id>,
    /// The height of the stack at each mark.
    marks: Vec<usize>,
    memo: BTreeMap<u64, Id>,
    /// How many more values and elements may be made.
    budget: usize,
}

impl Machine<'_> {
    fn step(&mut self, op: u8) -> Result<(), Trouble> {
        match op {
            0x80 => {
                let version = self.number(1)?;
                if version > 5 {
                    return refused(format!("is a pickle of protocol {version}; those up to 5 are read"));
                }
            }
            0x95 => drop(self.take(8)?), // a frame's length, which only helps to read ahead
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.marked()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b'N' => self.push(Value::None)?,
            0x88 => self.push(Value::Bool(true))?,
            0x89 => self.push(Value::Bool(false))?,
            b'I' | b'L' => {
                let line = self.line()?;
                let value = match (op, line) {
                    (b'I', "00") => Value::Bool(false),
                    (b'I', "01") => Value::Bool(true),
                    _ => line.trim_end_matches('L').parse().map_or(Value::Number, Value::Int),
                };
                self.push(value)?;
            }
            b'J' => {
                let number = self.take(4)?.try_into().map_or(0, i32::from_le_bytes);
                self.push(Value::Int(number.into()))?;
            }
            b'K' => self.push_number(1)?,
            b'M' => self.push_number(2)?,
            0x8a | 0x8b => {
                let len = self.len(if op == 0x8a { 1 } else { 4 })?;
                let value = long(self.take(len)?);
                self.push(value)?;
            }
            b'F' => {
                self.line()?;
                self.push(Value::Number)?;
            }
            b'G' => {
                self.take(8)?;
                self.push(Value::Number)?;
            }
            b'S' => {
                let line = self.line()?;
                let text = line.trim_matches(['\'', '"']).to_owned();
                self.push_text(text)?;
            }
            b'V' => {
                let text = self.line()?.to_owned();
                self.push_text(text)?;
            }
            b'U' => self.push_string(1)?,
            b'T' | b'X' => self.push_string(4)?,
            0x8c => self.push_string(1)?,
            0x8d => self.push_string(8)?,
            b'C' => self.push_bytes(1)?,
            b'B' => self.push_bytes(4)?,
            0x8e | 0x96 => self.push_bytes(8)?,
            b']' | 0x8f => self.push(Value::List(Vec::new()))?,
            b'l' | 0x91 => {
                let items = self.marked()?;
                self.push(Value::List(items))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.extend(vec![item])?;
            }
            b'e' | 0x90 => {
                let items = self.marked()?;
                self.extend(items)?;
            }
            b')' => self.push(Value::Tuple(Vec::new()))?,
            b't' => {
                let items = self.marked()?;
                self.push(Value::Tuple(items))?;
            }
            0x85..=0x87 => {
                let count = usize::from(op).saturating_sub(0x84);
                let items = self.pop_many(count)?;
                self.push(Value::Tuple(items))?;
            }
            b'}' => self.push(Value::Dict(Vec::new()))?,
            b'd' => {
                let items = self.marked()?;
                self.push(Value::Dict(pairs(&items)))?;
            }
            b's' => {
                let items = self.pop_many(2)?;
                self.insert(&items)?;
            }
            b'u' => {
                let items = self.marked()?;
                self.insert(&items)?;
            }
            b'c' => {
                let module = self.line()?.to_owned();
                let name = self.line()?.to_owned();
                self.global(&module, &name)?;
            }
            0x93 => {
                let items = self.pop_many(2)?;
                let text = |at: usize| items.get(at).and_then(|&id| self.values.text(id)).map(str::to_owned);
                let (Some(module), Some(name)) = (text(0), text(1)) else {
                    return refused("has a damaged pickle: a name that is no text");
                };
                self.global(&module, &name)?;
            }
            b'R' | 0x81 => {
                let [callee, arguments] = self.two()?;
                self.call(callee, arguments)?;
            }
            0x92 => {
                let items = self.pop_many(3)?;
                let &[class, arguments, _] = items.as_slice() else { return Err(Trouble::Ends) };
                self.call(class, arguments)?;
            }
            b'o' => {
                let mut items = self.marked()?.into_iter();
                let Some(class) = items.next() else {
                    return refused("has a damaged pickle: an object without a class");
                };
                let arguments = self.add(Value::Tuple(items.collect()))?;
                self.call(class, arguments)?;
            }
            b'i' => {
                let module = self.line()?.to_owned();
                let name = self.line()?.to_owned();
                let items = self.marked()?;
                self.global(&module, &name)?;
                let class = self.pop()?;
                let arguments = self.add(Value::Tuple(items))?;
                self.call(class, arguments)?;
            }
            b'b' => {
                let state = self.pop()?;
                let top = self.top()?;
                // the state of dictionaries and tensors is metadata that no value depends on
                if let Some(Value::Object { state: slot }) = self.value_mut(top) {
                    *slot = Some(state);
                }
            }
            b'p' => {
                let at = self.line()?.parse().map_err(|_| Trouble::Refused("has a damaged pickle".into()))?;
                self.remember(at)?;
            }
            b'q' | b'r' => {
                let at = self.number(if op == b'q' { 1 } else { 4 })?;
                self.remember(at)?;
            }
            0x94 => {
                let at = u64::try_from(self.memo.len()).unwrap_or(u64::MAX);
                self.remember(at)?;
            }
            b'g' => {
                let at = self.line()?.parse().map_err(|_| Trouble::Refused("has a damaged pickle".into()))?;
                self.recall(at)?;
            }
            b'h' | b'j' => {
                let at = self.number(if op == b'h' { 1 } else { 4 })?;
                self.recall(at)?;
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id)?;
                self.push(Value::Storage(storage))?;
            }
            b'P' => return refused("has a pickle whose storages are named as no version of PyTorch names them"),
            0x82..=0x84 => {
                return refused(
                    "has a pickle that uses the registry of extensions, which is not read: a registered name could be anything",
                );
            }
            0x97 | 0x98 => return refused("has a pickle with buffers outside of it, which torch.save does not write"),
            _ => return refused(format!("has a damaged pickle: there is no instruction {op:#04x}")),
        }
        Ok(())
    }

    fn take(&mut self, len: usize) -> Result<&[u8], Trouble> {
        let end = self.at.checked_add(len).ok_or(Trouble::Ends)?;
        let part = self.bytes.get(self.at..end).ok_or(Trouble::Ends)?;
        self.at = end;
        Ok(part)
    }

    /// A little-endian number of at most eight bytes.
    fn number(&mut self, len: usize) -> Result<u64, Trouble> {
        Ok(self.take(len)?.iter().rev().fold(0u64, |n, &byte| n.wrapping_shl(8) | u64::from(byte)))
    }

    fn len(&mut self, bytes: usize) -> Result<usize, Trouble> {
        usize::try_from(self.number(bytes)?).map_err(|_| Trouble::Ends)
    }

    fn line(&mut self) -> Result<&str, Trouble> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let end = rest.iter().position(|&byte| byte == b'\n').ok_or(Trouble::Ends)?;
        self.at = self.at.saturating_add(end).saturating_add(1);
        let line = rest.get(..end).and_then(|line| std::str::from_utf8(line).ok());
        line.map(|line| line.trim_end_matches('\r'))
            .ok_or_else(|| Trouble::Refused("has a damaged pickle: a line that is no text".into()))
    }

    fn spend(&mut self, count: usize) -> Result<(), Trouble> {
        match self.budget.checked_sub(count) {
            Some(left) => self.budget = left,
            None => {
                return refused(format!(
                    "describes more than {} values, which no checkpoint does",
                    limits::PICKLE_VALUES
                ));
            }
        }
        Ok(())
    }

    fn add(&mut self, value: Value) -> Result<Id, Trouble> {
        self.spend(1)?;
        let id = Id(u32::try_from(self.values.0.len()).map_err(|_| Trouble::Ends)?);
        self.values.0.push(value);
        Ok(id)
    }

    fn push(&mut self, value: Value) -> Result<(), Trouble> {
        let id = self.add(value)?;
        self.stack.push(id);
        Ok(())
    }

    fn push_number(&mut self, len: usize) -> Result<(), Trouble> {
        let number = self.number(len)?;
        self.push(i64::try_from(number).map_or(Value::Number, Value::Int))
    }

    fn push_text(&mut self, text: String) -> Result<(), Trouble> {
        self.push(Value::Text(text.into()))
    }

    fn push_string(&mut self, len_bytes: usize) -> Result<(), Trouble> {
        let len = self.len(len_bytes)?;
        let text = String::from_utf8_lossy(self.take(len)?).into_owned();
        self.push_text(text)
    }

    fn push_bytes(&mut self, len_bytes: usize) -> Result<(), Trouble> {
        let len = self.len(len_bytes)?;
        self.take(len)?;
        self.push(Value::Bytes)
    }

    /// The top of the stack, which stays there.
    fn top(&self) -> Result<Id, Trouble> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.last() {
            Some(&id) if self.stack.len() > floor => Ok(id),
            _ => refused("has a damaged pickle: it takes more values than it makes"),
        }
    }

    fn pop(&mut self) -> Result<Id, Trouble> {
        let id = self.top()?;
        self.stack.pop();
        Ok(id)
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Id>, Trouble> {
        let mut items = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        items.reverse();
        Ok(items)
    }

    fn two(&mut self) -> Result<[Id; 2], Trouble> {
        let second = self.pop()?;
        Ok([self.pop()?, second])
    }

    /// Everything above the last mark.
    fn marked(&mut self) -> Result<Vec<Id>, Trouble> {
        let Some(mark) = self.marks.pop().filter(|&mark| mark <= self.stack.len()) else {
            return refused("has a damaged pickle: a list that begins nowhere");
        };
        Ok(self.stack.split_off(mark))
    }

    fn value_mut(&mut self, id: Id) -> Option<&mut Value> {
        usize::try_from(id.0).ok().and_then(|at| self.values.0.get_mut(at))
    }

    /// Appends to the list on top of the stack.
    fn extend(&mut self, mut items: Vec<Id>) -> Result<(), Trouble> {
        let top = self.top()?;
        match self.value_mut(top) {
            Some(Value::List(list)) => list.append(&mut items),
            Some(Value::Object { .. }) => {}
            _ => return refused("has a damaged pickle: it appends to what is no list"),
        }
        Ok(())
    }

    /// Adds to the dictionary on top of the stack.
    fn insert(&mut self, items: &[Id]) -> Result<(), Trouble> {
        let top = self.top()?;
        match self.value_mut(top) {
            Some(Value::Dict(entries)) => entries.extend(pairs(items)),
            Some(Value::Object { .. }) => {}
            _ => return refused("has a damaged pickle: it adds an entry to what is no dictionary"),
        }
        Ok(())
    }

    fn remember(&mut self, at: u64) -> Result<(), Trouble> {
        let top = self.top()?;
        self.memo.insert(at, top);
        Ok(())
    }

    fn recall(&mut self, at: u64) -> Result<(), Trouble> {
        let Some(&id) = self.memo.get(&at) else {
            return refused("has a damaged pickle: it refers to a value that it has not made");
        };
        self.spend(1)?;
        self.stack.push(id);
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), Trouble> {
        match allowed(module, name, self.script) {
            Some(global) => self.push(Value::Global(global)),
            None => refused(format!(
                "is a pickle, and a pickle is a program: this one uses `{}`, which is not on the list of names that weights \
                 need. Nothing of it was run. If you trust the file, save the weights alone in PyTorch, as safetensors or \
                 with torch.save(model.state_dict(), …)",
                shortened(&format!("{module}.{name}"))
            )),
        }
    }

    /// What a call of `callee` would return, if that is a plain value.
    fn call(&mut self, callee: Id, arguments: Id) -> Result<(), Trouble> {
        let items = match self.values.get(arguments) {
            Value::Tuple(items) => items.as_slice(),
            _ => return refused("has a damaged pickle: arguments that are no tuple"),
        };
        let argument = |at: usize| items.get(at).map(|&id| self.values.get(id));
        let value = match self.values.get(callee) {
            Value::Global(Global::RebuildTensor) => Value::Tensor(tensor(&self.values, items)?),
            Value::Global(Global::RebuildParameter) => match argument(0) {
                Some(Value::Tensor(tensor)) => Value::Tensor(tensor.clone()),
                _ => return refused("has a damaged pickle: a parameter without a tensor"),
            },
            Value::Global(Global::RebuildFromType) => {
                let (Some(&function), Some(&arguments)) = (items.first(), items.get(2)) else {
                    return refused("has a damaged pickle: a tensor without arguments");
                };
                // one step down, never further: the function is one that makes a tensor or a parameter
                return match self.values.get(function) {
                    Value::Global(Global::RebuildTensor | Global::RebuildParameter) => self.call(function, arguments),
                    _ => refused("has a tensor that is made by an unknown function"),
                };
            }
            Value::Global(Global::Dict) => {
                let entries = match argument(0) {
                    Some(Value::Dict(entries)) => entries.clone(),
                    // pairs, as Python 2 wrote an ordered dictionary
                    Some(Value::List(list)) => {
                        let pair = |&id: &Id| match self.values.get(id) {
                            Value::List(pair) | Value::Tuple(pair) => pair.first().copied().zip(pair.get(1).copied()),
                            _ => None,
                        };
                        list.iter().filter_map(pair).collect()
                    }
                    _ => Vec::new(),
                };
                self.spend(entries.len())?;
                Value::Dict(entries)
            }
            Value::Global(Global::List) => {
                let list = match argument(0) {
                    Some(Value::List(list) | Value::Tuple(list)) => list.clone(),
                    _ => Vec::new(),
                };
                self.spend(list.len())?;
                Value::List(list)
            }
            Value::Global(Global::Inert) => Value::Object { state: None },
            _ => return refused("has a pickle that calls what is no function"),
        };
        self.push(value)
    }

    /// A storage, from the tuple that names it.
    fn storage(&self, id: Id) -> Result<Storage, Trouble> {
        let damaged = || Trouble::Refused("has a pickle with a damaged storage".into());
        let Value::Tuple(items) = self.values.get(id) else { return Err(damaged()) };
        let item = |at: usize| items.get(at).map(|&id| self.values.get(id));
        if !matches!(item(0), Some(Value::Text(kind)) if &**kind == "storage") {
            return Err(damaged());
        }
        let Some(Value::Global(Global::Storage(element))) = item(1) else { return Err(damaged()) };
        let key: Arc<str> = match item(2) {
            Some(Value::Text(key)) if key.len() <= limits::STORAGE_NAME => (**key).into(),
            Some(Value::Int(key)) => key.to_string().into(),
            _ => return Err(damaged()),
        };
        let count = item(4).and_then(size).ok_or_else(damaged)?;
        let (mut first, mut viewed) = (0, count);
        // a part of another storage: its name, the first element, and how many
        if let Some(Value::Tuple(view)) = item(5) {
            let number = |at: usize| view.get(at).and_then(|&id| size(self.values.get(id)));
            (first, viewed) = (number(1).ok_or_else(damaged)?, number(2).ok_or_else(damaged)?);
            if first.checked_add(viewed).is_none_or(|end| end > count) {
                return Err(damaged());
            }
        }
        Ok(Storage { key, element: *element, first, count: viewed })
    }
}

/// A tensor, from the arguments of `_rebuild_tensor` and its successors.
fn tensor(values: &Values, items: &[Id]) -> Result<Tensor, Trouble> {
    let damaged = || Trouble::Refused("has a pickle with a damaged tensor".into());
    let argument = |at: usize| items.get(at).map(|&id| values.get(id));
    let Some(Value::Storage(storage)) = argument(0) else { return Err(damaged()) };
    let offset = argument(1).and_then(size).ok_or_else(damaged)?;
    let sizes = |at: usize| match argument(at) {
        Some(Value::Tuple(list) | Value::List(list)) if list.len() <= limits::RANK => {
            list.iter().map(|&id| size(values.get(id))).collect::<Option<Vec<_>>>()
        }
        _ => None,
    };
    let (shape, strides) = (sizes(2).ok_or_else(damaged)?, sizes(3).ok_or_else(damaged)?);
    if shape.len() != strides.len() {
        return Err(damaged());
    }
    let element = match argument(6) {
        Some(Value::Global(Global::Dtype(element))) => *element,
        // a negated or conjugated view, of which only the flag is stored
        Some(Value::Dict(flags)) if !flags.is_empty() => {
            return refused("has a tensor that is stored as another one's negative: save it after .resolve_neg()");
        }
        _ => storage.element.ok_or_else(damaged)?,
    };
    Ok(Tensor { storage: storage.clone(), element, offset, shape, strides })
}

fn size(value: &Value) -> Option<usize> {
    match value {
        Value::Int(n) => usize::try_from(*n).ok(),
        _ => None,
    }
}

/// Keys and values, which alternate.
fn pairs(items: &[Id]) -> Vec<(Id, Id)> {
    items.as_chunks::<2>().0.iter().map(|&[key, value]| (key, value)).collect()
}

/// An integer in two's complement, little-endian.
fn long(bytes: &[u8]) -> Value {
    let negative = bytes.last().is_some_and(|&byte| byte & 0x80 != 0);
    let fill = if negative { 0xff } else { 0 };
    let mut eight = [fill; 8];
    for (at, &byte) in bytes.iter().enumerate() {
        match eight.get_mut(at) {
            Some(slot) => *slot = byte,
            None if byte == fill => {}
            None => return Value::Number,
        }
    }
    let number = i64::from_le_bytes(eight);
    if (number < 0) == negative { Value::Int(number) } else { Value::Number }
}

/// A name that is short enough for an error message.
fn shortened(name: &str) -> String {
    match name.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", name.get(..end).unwrap_or_default()),
        None => name.to_owned(),
    }
}
